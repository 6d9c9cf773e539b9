"""Rows come out of every kind of file the same, and a broken file is named with its line."""

import csv
import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from zofo.errors import ZofoError
from zofo.tasks import sources
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
    else:
        write_delimited(path, "," if suffix == ".csv" else "\t")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    write(tmp_path / f"rows{suffix}", suffix)
    assert read_rows(f"rows{suffix}", tmp_path) == {"all": ROWS}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_gzip_gives_the_same_rows(tmp_path, suffix):
    write(tmp_path / f"rows{suffix}", suffix)
    packed = tmp_path / f"packed{suffix}.gz"
    packed.write_bytes(gzip.compress((tmp_path / f"rows{suffix}").read_bytes()))
    assert read_rows(packed.name, tmp_path) == {"all": ROWS}


def test_text_gives_one_row_a_line_and_skips_empty_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo, with a comma\n   \n", encoding="utf-8")
    assert read_rows("a.txt", tmp_path) == {"all": [{"text": "one"}, {"text": "two, with a comma"}]}


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\nx,1\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x", "label": 1}\n')
    for name in ("a.csv", "a.jsonl"):
        assert read_rows(name, tmp_path) == {"all": [{"text": "x", "label": 1}]}


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
    assert read_rows("pkg://zofo_test_package/data/rows.csv", tmp_path / "elsewhere") == {"all": ROWS}
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

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    assert read_rows("owner/set:part#validation", tmp_path) == {"all": [{"text": "validation"}]}
    assert read_rows("owner/set", tmp_path) == {"train": [{"text": "a"}], "test": [{"text": "b"}]}
    assert asked == [("owner/set", "part", "validation"), ("owner/set", None, None)]


def test_a_hub_error_without_a_message_is_told_by_its_type(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    with pytest.raises(ZofoError, match=r"cannot load the data set 'owner/set' \(TimeoutError\)"):
        read_rows("owner/set", tmp_path)
