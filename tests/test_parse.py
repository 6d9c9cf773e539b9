"""What files say is read as it stands: tables as texts, and YAML without anything that is lost or grows."""

import csv
import io
import math
import random

import pytest
import yaml

from zofo.errors import ZofoError
from zofo.parse import Cell, read_table, read_yaml


def cells(text, **named):
    return [list(row.values()) for row in read_table(text, "t.csv", **named)]


WORDS = [
    "0012",
    "7e5",
    "true",
    "NaN",
    "null",
    "",
    " 1 ",
    "2024-01-05",
    "1,5",
    "0x10",
    "1_000",
    'say "no"',
    "a\nb",
    "ä;ö",
]


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_cells_are_the_texts_that_were_written(delimiter, quoting):
    """Whatever the other rows of a column hold."""
    source = random.Random(0)
    rows = [[source.choice(WORDS), source.choice(WORDS)] for _ in range(200)]
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter, quoting=quoting).writerows([["text", "label"], *rows])
    assert cells(written.getvalue()) == rows


def test_beside_tabs_quotation_marks_are_characters():
    lines = [['"scene 5 was clever', "pos"], ['a 5" disk', "neg"], ['"All said"', "pos"], ['""', "neg"], ["'", '"']]
    text = "text\tlabel\n" + "".join("\t".join(line) + "\n" for line in lines)
    assert cells(text) == lines
    assert cells(text, delimiter="\t") == lines
    assert cells(text.replace("\n", "\r\n")) == lines


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('text\tlabel\na\tb\n"He said ""no"""\tc\n', 3),
        ('"text"\t"label"\n"a"\t"b"\n', 1),
        ('\n\r\n"text"\t"label"\n"a"\t"b"\n', 3),
        ('sep=\t\n\n"text"\t"label"\n"a"\t"b"\n', 3),
    ],
)
def test_a_quoted_table_with_tabs_is_refused_by_its_line(text, line):
    with pytest.raises(ZofoError, match=f"t.csv, line {line}: .*beside tabs quotation marks are characters"):
        cells(text)


@pytest.mark.parametrize("first", ["sep=;\n", "sep=;\r\n", '"sep=;"\n', "SEP=;\n"])
def test_a_first_line_may_name_the_separator(first):
    assert cells(f"{first}text, of a film;label\nx, y;1\n") == [["x, y", "1"]]
    with pytest.raises(ZofoError, match="line 3 has 1 fields"):
        cells(f"{first}text;label\nx\n")
    assert cells('sep=\t\ntext\tlabel\n"x\t1\n') == [['"x', "1"]]


def test_a_header_that_can_be_read_in_two_ways_is_refused():
    with pytest.raises(ZofoError, match="may be separated by ',' or ';'"):
        cells("text;of,a film\nx;y\n")
    assert cells('"text;of",a film\nx,y\n') == [["x", "y"]]
    assert cells('"text\n, of";"a"\nx;y\n') == [["x", "y"]]


BROKEN = {
    "a repeated column": ("text,label,text\na,b,c\n", "two columns named 'text'"),
    "two columns without a name": ("text,,\na,b,c\n", "two columns without a name"),
    "a mark after a closed one": ('text,label\na,b\n"x"y,c\n', "line 3: "),
    "a mark that is never closed": ('text,label\na,b\n"x,c\nd,e\n', "line 3: unexpected end of data"),
    "a short row after one over two lines": ('text,label\n"a\nb",c\nd\n', "line 4 has 1 fields"),
    "a long row": ("text,label\na,b\n\nd,e,f\n", "line 4 has 3 fields, but the header has 2 columns"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_refused_with_its_line(text, message):
    with pytest.raises(ZofoError, match=message) as caught:
        cells(text)
    assert "\n" not in str(caught.value)


def test_texts_of_a_table_may_be_long():
    assert cells("text\n" + "x" * 200_000 + "\n") == [["x" * 200_000]]


def test_a_cell_is_a_text_that_no_number_equals():
    cell = Cell("1")
    assert cell == "1"
    assert cell != "2"
    assert cell in {"1": 0}
    assert Cell("1") == Cell("1")
    assert cell is not None
    assert cell != None  # noqa: E711
    for number in (1, 1.0, True):
        for compare in (
            lambda number: cell == number,
            lambda number: cell != number,
            lambda number: number == cell,
            lambda number: cell in [number],
        ):
            with pytest.raises(TypeError, match="cannot be compared"):
                compare(number)
    assert [bool(Cell(text)) for text in ("", "a", "1")] == [False, True, True]
    for text in ("0", "False", "0.0"):
        with pytest.raises(TypeError, match="would count as true"):
            bool(Cell(text))


def test_yaml_is_read_as_the_safe_loader_reads_it(tmp_path):
    text = (
        "a: [1, 2.5, true, null, word]\nb: &b {c: ü, d: 'x'}\ne: *b\n"
        "f: {<<: *b, c: 3}\ng: &g {<<: *b, h: 1}\ni: {<<: *g}"
    )
    assert read_yaml(text, "t.yaml") == yaml.safe_load(text)
    (tmp_path / "t.yaml").write_text("\ufeff" + text, encoding="utf-8")
    assert read_yaml(tmp_path / "t.yaml", "t.yaml") == yaml.safe_load(text)
    assert read_yaml("", "t.yaml") is None


@pytest.mark.parametrize("word", ["yes", "Off", "010", "1_000", "12:30", "2026-01-05", "2026_01_05", "1e-5", "0x1F"])
def test_words_that_only_older_yaml_takes_for_other_things_are_texts(word):
    assert read_yaml(f"key: {word}", "t.yaml") == {"key": word}


VALUES = [
    None, True, False, 0, -3, 1.5, 1e-9, 1e300, math.inf, "yes", "no", "010", "1_000", "12:30", "2026-01-05", "1e-5",
    "true", "null", "~", ".5", "5.", "=", "", "0", "<<", "0b1", "08", "+1", "1.0e+5", ".inf", "١٢", "-.5", "+.5",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_pyyaml_writes_is_read_as_it_was(value):
    read = read_yaml(yaml.safe_dump({"key": value}), "t.yaml")["key"]
    assert read == value
    assert type(read) is type(value)


def bomb():
    levels = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for last, name in zip("abcdefgh", "bcdefghi", strict=True):
        levels.append(f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]")
    return "\n".join(levels)


BAD_YAML = {
    "a repeated key": ("a: 1\nb: 2\na: 3\n", "the key 'a' occurs twice"),
    "a repeated key within": ("a: {b: 1, b: 1}", "the key 'b' occurs twice"),
    "aliases of aliases": (bomb(), "more than 100000 values"),
    "an alias within itself": ("a: &a [1, *a]", "an alias stands inside what it repeats"),
    "3000 brackets": ("a: " + "[" * 3000, "nested more than 50 deep"),
    "3000 indents": ("".join(" " * n + "a:\n" for n in range(3000)), "nested more than 50 deep"),
    "a date that is none": ("a: !!timestamp 2023-02-30", "is no valid YAML: day is out of range"),
    "a number of 5000 digits": ("a: " + "9" * 5000, "is no valid YAML: Exceeds the limit"),
    "a float that is none": ("a: !!float abc", "is no valid YAML: could not convert"),
    "a truth that is none": ("a: !!bool abc", "is no valid YAML: "),
    "half a character": (r'a: "\ud83d"', "half of a character"),
    "two documents": ("a: 1\n---\nb: 2\n", "expected a single document"),
    "an object of Python": ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
}


@pytest.mark.parametrize(("text", "message"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_is_lost_or_grows_is_refused_in_one_line(text, message):
    with pytest.raises(ZofoError, match=message) as caught:
        read_yaml(text, "t.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
