"""Rows come out of every kind of file the same, and a broken file is named with its line."""

import csv
import gzip
import json
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from zofo.errors import ZofoError
from zofo.tasks.sources import read_rows

ROWS = [
    {"text": "Plain, with a comma", "label": 0},
    {"text": 'Quotes "inside" it', "label": 1},
    {"text": "Ümläute and 漢字", "label": 1},
]


def write_delimited(path, delimiter):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write(path, suffix):
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix == ".csv":
        write_delimited(path, ",")
    else:
        path.write_text(
            "".join(f"{a}\t{b}\n" for a, b in [("text", "label"), *map(dict.values, ROWS)]), encoding="utf-8"
        )


def rows_in(suffix):
    """What a file holds: JSON and Parquet know numbers, tables of text hold texts alone."""
    return [{**row, "label": str(row["label"])} for row in ROWS] if suffix in (".csv", ".tsv") else ROWS


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    write(tmp_path / f"rows{suffix}", suffix)
    assert read_rows(f"rows{suffix}", tmp_path) == {"all": rows_in(suffix)}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_gzip_gives_the_same_rows(tmp_path, suffix):
    write(tmp_path / f"rows{suffix}", suffix)
    packed = tmp_path / f"packed{suffix}.gz"
    packed.write_bytes(gzip.compress((tmp_path / f"rows{suffix}").read_bytes()))
    assert read_rows(packed.name, tmp_path) == {"all": rows_in(suffix)}


def test_text_gives_one_row_a_line_and_skips_empty_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo, with a comma\n   \n", encoding="utf-8")
    assert read_rows("a.txt", tmp_path) == {"all": [{"text": "one"}, {"text": "two, with a comma"}]}


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\nx,1\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x", "label": 1}\n')
    for name, label in (("a.csv", "1"), ("a.jsonl", 1)):
        assert read_rows(name, tmp_path) == {"all": [{"text": "x", "label": label}]}


def test_csv_keeps_line_breaks_in_quotes_and_the_words_null_and_na(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",1\nnull,0\nNA,0\n,1\n', encoding="utf-8")
    assert [row["text"] for row in read_rows("a.csv", tmp_path)["all"]] == ["two\nlines", "null", "NA", ""]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_a_line(tmp_path, mark):
    """JSON strings and lines of text may hold the other separators that `str.splitlines` splits at."""
    row = {"text": f"a{mark}b"}
    line = f'{{"text": "a{mark}b"}}\n' if mark > "\x1f" else json.dumps(row) + "\n"
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
    (tmp_path / "a.txt").write_text(f"a{mark}b\n", encoding="utf-8")
    assert read_rows("a.jsonl", tmp_path) == {"all": [row]}
    assert read_rows("a.txt", tmp_path) == {"all": [row]}


def test_windows_line_ends_are_line_ends(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\r\n")
    assert read_rows("a.jsonl", tmp_path) == read_rows("a.txt", tmp_path) == {"all": [{"text": "a"}, {"text": "b"}]}


def test_a_package_file_is_read_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "zofo_test_package"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write(package / "data" / "rows.csv", ".csv")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_rows("pkg://zofo_test_package/data/rows.csv", tmp_path / "elsewhere") == {"all": rows_in(".csv")}
    assert "zofo_test_package" not in sys.modules
    with pytest.raises(ZofoError, match=r"has no file 'data/none\.csv'"):
        read_rows("pkg://zofo_test_package/data/none.csv", tmp_path)
    with pytest.raises(ZofoError, match="has no file"):
        read_rows("pkg://zofo_test_package/../zofo_test_package/data/rows.csv", tmp_path)


BROKEN = {
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: broken JSON"),
    "broken JSON list": ("a.json", b'[{"text": "a"},\n {"text": }]', r"a\.json, line 2: broken JSON"),
    "a JSON object": ("a.json", b'{"rows": []}', r"a\.json holds no list of rows"),
    "rows that are no objects": ("a.jsonl", b'{"text": "a"}\n"b"\n', r"a\.jsonl, line 2: a row must be an object"),
    "an empty JSONL": ("a.jsonl", b"", r"a\.jsonl is empty"),
    "an empty JSON": ("a.json", b"", r"a\.json is empty"),
    "an empty JSON list": ("a.json", b"[]", r"a\.json is empty"),
    "an empty CSV": ("a.csv", b"", r"a\.csv is empty"),
    "a CSV of only a header": ("a.csv", b"text,label\n", r"a\.csv is empty"),
    "an empty text": ("a.txt", b"\n \n", r"a\.txt is empty"),
    "Latin-1 text": ("a.txt", "ä".encode("latin-1"), r"a\.txt is not UTF-8 \(byte 0\): save it in UTF-8"),
    "Latin-1 CSV": ("a.csv", "text\nxä\n".encode("latin-1"), r"a\.csv is not UTF-8 \(byte 6\)"),
    "UTF-16 JSONL": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"a\.jsonl is not UTF-8"),
    "a CSV row with too many fields": ("a.csv", b"text,label\na,1\nb,1,2\n", r"cannot read .*a\.csv: .*2 columns"),
    "a Parquet that is none": ("a.parquet", b"PAR1 no", r"cannot read .*a\.parquet"),
    "an empty Parquet file": ("a.parquet", b"", r"a\.parquet"),
    "a gzip that is none": ("a.jsonl.gz", b'{"text": "a"}', r"cannot read .*a\.jsonl\.gz"),
    "a truncated gzip": ("a.csv.gz", gzip.compress(b"text\n" + b"abc\n" * 99)[:-12], r"cannot read .*a\.csv\.gz"),
    "a corrupt gzip": ("a.txt.gz", gzip.compress(b"abc" * 99)[:10] + b"\xff" * 40, r"cannot read .*a\.txt\.gz"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ZofoError, match=message) as caught:
        read_rows(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ZofoError, match="paths are relative to the task file") as caught:
        read_rows("none.jsonl", tmp_path)
    assert str(tmp_path / "none.jsonl") in str(caught.value)


def test_a_folder_is_no_data_file(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(ZofoError, match="no data file"):
        read_rows("rows.jsonl", tmp_path)


def test_dev_and_validation_mean_the_same_and_a_missing_split_is_named(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}')
    for split in ("dev", "validation"):
        assert read_rows(f"{tmp_path}#{split}", tmp_path) == {"all": [{"text": "dev"}]}
    with pytest.raises(ZofoError, match=r"has no split 'test': it has dev, train"):
        read_rows(f"{tmp_path}#test", tmp_path)


def test_an_unknown_format_says_which_are_known(tmp_path):
    """What is no file of a known kind counts as a Hub data set; without a network the message names both ways out."""
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(ZofoError, match=r"rows\.xlsx.*\.jsonl, \.json, \.csv, \.tsv, \.parquet, \.txt.*Hub") as caught:
        read_rows("rows.xlsx", tmp_path)
    assert "\n" not in str(caught.value)


def test_of_a_hub_data_set_only_the_wanted_split_is_read(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"text": split}] if split else {"train": [{"text": "a"}], "test": [{"text": "b"}]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("owner/set:part#validation", tmp_path) == {"all": [{"text": "validation"}]}
    assert read_rows("owner/set", tmp_path) == {"train": [{"text": "a"}], "test": [{"text": "b"}]}
    assert asked == [("owner/set", "part", "validation"), ("owner/set", None, None)]


def test_a_hub_error_without_a_message_is_told_by_its_type(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ZofoError, match=r"cannot load the data set 'owner/set' \(TimeoutError\)"):
        read_rows("owner/set", tmp_path)


def folder_of(path, **files):
    """A folder with files by name; `_` stands for the point before the suffix."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".").replace("_of_", "-of-").replace("_n", "-")).write_text(content)
    return path


ROW_A, ROW_B = '{"text": "a"}\n', '{"text": "b"}\n'


@pytest.mark.parametrize("name", ["dev", "val", "valid", "validation", "eval", "Validation", "VAL"])
def test_every_name_of_the_dev_split_is_known(tmp_path, name):
    folder_of(tmp_path / "d", train__jsonl=ROW_A)
    (tmp_path / "d" / f"{name}.jsonl").write_text(ROW_B)
    assert read_rows("d", tmp_path) == {"train": [{"text": "a"}], "dev": [{"text": "b"}]}
    assert read_rows("d#validation", tmp_path) == {"all": [{"text": "b"}]}


def test_two_files_for_a_split_are_refused(tmp_path):
    folder_of(tmp_path / "d", train__jsonl=ROW_A, val__jsonl=ROW_A, validation__jsonl=ROW_B)
    with pytest.raises(ZofoError, match=r"has both val\.jsonl and validation\.jsonl: keep one"):
        read_rows("d", tmp_path)


def test_suffixes_may_have_capitals(tmp_path):
    folder_of(tmp_path / "d", train__CSV="text\na\n")
    (tmp_path / "d" / "test.JSON.GZ").write_bytes(gzip.compress(b'[{"text": "b"}]'))
    assert read_rows("d", tmp_path) == {"test": [{"text": "b"}], "train": [{"text": "a"}]}
    assert read_rows("d/train.CSV", tmp_path) == {"all": [{"text": "a"}]}


def test_shards_are_joined_in_their_order(tmp_path):
    (tmp_path / "d").mkdir()
    for number in range(12):
        (tmp_path / "d" / f"train-{number:05}-of-00012.jsonl").write_text(f'{{"n": {number}}}\n')
    (tmp_path / "d" / "val-00000-of-00001.jsonl").write_text('{"n": 99}\n')
    rows = read_rows("d", tmp_path)
    assert [row["n"] for row in rows["train"]] == list(range(12))
    assert rows["dev"] == [{"n": 99}]
    (tmp_path / "d" / "train-00003-of-00012.jsonl").unlink()
    with pytest.raises(ZofoError, match="numbered from 0 to 11, and 3 is missing"):
        read_rows("d", tmp_path)
    (tmp_path / "d" / "train.jsonl").write_text(ROW_A)
    with pytest.raises(ZofoError, match="has both"):
        read_rows("d", tmp_path)


@pytest.mark.parametrize(
    "name",
    ["data.train.jsonl", "held_out.csv", "test.csv.zip", "dev.xlsx", "test.ndjson", "val-1.jsonl", "test/x.json"],
)
def test_a_data_file_that_would_be_passed_over_is_refused(tmp_path, name):
    folder_of(tmp_path / "d", train__jsonl=ROW_A)
    (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "d" / name).write_text(ROW_A)
    with pytest.raises(ZofoError, match=f"holds {name.partition('/')[0]}, which would not be read"):
        read_rows("d", tmp_path)
    assert read_rows("d#train", tmp_path) == {"all": [{"text": "a"}]}


def test_files_that_hold_no_rows_may_lie_beside_data(tmp_path):
    folder_of(
        tmp_path / "d", train__jsonl=ROW_A, README__txt="about", dataset_info__json="{}", train__py="", task__yaml=""
    )
    (tmp_path / "d" / ".hidden.csv").write_text("text\na\n")
    assert read_rows("d", tmp_path) == {"train": [{"text": "a"}]}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_is_read_as_lines_or_as_a_list_whatever_its_name(tmp_path, name):
    for content in (ROW_A + ROW_B, '\n [\n{"text": "a"},\n{"text": "b"}]\n'):
        (tmp_path / name).write_text(content)
        assert read_rows(name, tmp_path) == {"all": [{"text": "a"}, {"text": "b"}]}


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_finite_number_is_missing(tmp_path, word):
    (tmp_path / "a.jsonl").write_text(f'{{"text": {word}, "inner": [1, {word}]}}\n')
    (tmp_path / "a.json").write_text(f'[{{"text": {word}, "inner": [1, {word}]}}]')
    for name in ("a.jsonl", "a.json"):
        assert read_rows(name, tmp_path) == {"all": [{"text": None, "inner": [1, None]}]}


def test_nan_in_parquet_is_missing_and_bytes_are_text_where_they_are_utf8(tmp_path):
    rows = [{"text": "Größe".encode(), "label": 1.5}, {"text": b"\xff\xfe", "label": float("nan")}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows("a.parquet", tmp_path) == {
        "all": [{"text": "Größe", "label": 1.5}, {"text": b"\xff\xfe", "label": None}]
    }


def test_a_repeated_column_of_parquet_is_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ZofoError, match=r"a\.parquet has two columns named 'text'"):
        read_rows("a.parquet", tmp_path)


BROKEN_ROWS = {
    "a repeated key": (b'{"text": "a"}\n{"text": "a", "text": "b"}\n', "line 2: the key 'text' occurs twice"),
    "a repeated key within": (b'[{"a": 1},\n{"text": {"x": 1, "x": 2}}]', "row 2: the key 'x' occurs twice"),
    "half a character": (b'{"text": "a"}\n{"text": "\\ud83d"}\n', "line 2: a text holds half of a character"),
    "deep nesting": (b'{"text": ' + b"[" * 60 + b"]" * 60 + b"}", "line 1: it is nested more than 50 deep"),
    "nesting beyond Python": (b'{"text": "a"}\n' + b"[" * 100_000, "nested too deep"),
    "a list beyond Python": (b'[{"text": ' + b"[" * 100_000, "nested too deep"),
    "a number of 5000 digits": (b'{"text": "a"}\n{"label": ' + b"1" * 5000 + b"}\n", "line 2: broken JSON"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_rows_that_say_two_things_or_none_are_refused(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ZofoError, match=message) as caught:
        read_rows("a.jsonl", tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_splits_of_a_hub_data_set_have_names_that_are_known(tmp_path, monkeypatch):
    splits = {"train": [{"text": "a"}], "val": [{"text": float("nan")}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    assert read_rows("owner/set", tmp_path) == {"train": [{"text": "a"}], "dev": [{"text": None}]}
    splits["unsupervised"] = []
    with pytest.raises(ZofoError, match=r"unsupervised is none of train, dev and test.*\{train: owner/set#train"):
        read_rows("owner/set", tmp_path)
    splits["dev"] = splits.pop("unsupervised")
    with pytest.raises(ZofoError, match="dev is a second dev"):
        read_rows("owner/set", tmp_path)


def test_a_small_file_that_becomes_a_huge_one_is_refused(tmp_path):
    line = b'{"text": "a"}'
    (tmp_path / "huge.jsonl.gz").write_bytes(gzip.compress(line + b" " * (1 << 27) + b"\n", compresslevel=9))
    with pytest.raises(
        ZofoError, match=r"huge\.jsonl\.gz holds more than 100 times its own size, [\d,]+ bytes: unpack"
    ):
        read_rows("huge.jsonl.gz", tmp_path)
    (tmp_path / "large.jsonl.gz").write_bytes(gzip.compress(line + b" " * (1 << 24) + b"\n", compresslevel=9))
    assert read_rows("large.jsonl.gz", tmp_path) == {"all": [{"text": "a"}]}


def test_rows_that_do_not_fit_into_memory_are_said_in_one_line(tmp_path, monkeypatch):
    def too_large(_):
        raise MemoryError

    (tmp_path / "a.csv").write_text("text\na\n")
    monkeypatch.setattr("zofo.tasks.sources._read_text", too_large)
    with pytest.raises(ZofoError, match=r"the rows of .*a\.csv do not fit into memory: give a part of them"):
        read_rows("a.csv", tmp_path)


def test_no_path_holds_a_nul(tmp_path):
    with pytest.raises(ZofoError, match=r"source is 'a\\x00b\.csv', which holds a NUL character: take it out"):
        read_rows("a\0b.csv", tmp_path)
