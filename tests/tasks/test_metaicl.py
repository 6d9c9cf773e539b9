"""Rows in MetaICL's form without a task file: which files are read, what the task is called, and its metric."""

import json

import pytest

from zofo.errors import ZofoError
from zofo.identity import anywhere, known, same
from zofo.tasks.metaicl import is_metaicl, metaicl_name
from zofo.tasks.records import Record
from zofo.tasks.task import load_task

YES_NO = ["yes", "no"]


def rows(count=4, options=YES_NO, first=0):
    """Rows with fixed options, with options of their own, or with none."""
    made = []
    for i in range(first, first + count):
        own = options(i) if callable(options) else options
        made.append({"task": "t", "input": f"question {i}?", "output": own[i % 2] if own else f"{i}", "options": own})
    return made


def write(file, content=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in (rows() if content is None else content)))
    return file


def test_a_folder_with_a_file_for_each_split_is_a_task(tmp_path):
    for split, first in (("train", 0), ("test", 10), ("dev", 20)):
        write(tmp_path / "my-task" / f"{split}.jsonl", rows(first=first))
    task = load_task(str(tmp_path / "my-task"))
    assert task.name == "my-task"
    found = task.records()
    assert {split: part[0].prompt for split, part in found.items()} == {
        "train": "question 0?\n", "test": "question 10?\n", "dev": "question 20?\n",
    }  # fmt: skip
    assert found["train"][1] == Record("question 1?\n", "no", ("yes", "no"))


def test_of_several_draws_one_is_named(tmp_path):
    folder = tmp_path / "unifiedqa:mctest"
    for draw, first in (("16_13", 0), ("16_100", 50)):
        for split in ("train", "dev", "test"):
            write(folder / f"unifiedqa:mctest_{draw}_{split}.jsonl", rows(first=first))
    with pytest.raises(ZofoError, match=r"has several draws of its rows, '16_100', '16_13': name one, as in .*#16_100"):
        load_task(str(folder))
    task = load_task(f"{folder}#16_100")
    assert task.name == "unifiedqa:mctest"
    assert {split: part[0].prompt for split, part in task.records().items()} == dict.fromkeys(
        ("train", "dev", "test"), "question 50?\n"
    )
    with pytest.raises(ZofoError, match="has no draw '4_4': it has '16_100', '16_13'"):
        load_task(f"{folder}#4_4")


def test_the_only_draw_need_not_be_named(tmp_path):
    write(tmp_path / "piqa" / "piqa_16384_100_train.jsonl")
    assert load_task(str(tmp_path / "piqa")).records().keys() == {"train"}


@pytest.mark.parametrize(
    ("options", "metrics"),
    [
        (YES_NO, ("macro_f1", "accuracy")),
        (lambda i: YES_NO[:: 1 - 2 * (i % 2)], ("macro_f1", "accuracy")),  # the same ones in another order
        (lambda i: [f"a{i}", f"b{i}"], ("accuracy",)),
        ([], ("exact_match", "token_f1")),
    ],
)
def test_the_metric_follows_the_options(tmp_path, options, metrics):
    file = write(tmp_path / "t" / "train.jsonl", rows(options=options))
    for name in (file, file.parent):
        assert load_task(str(name)).metrics == metrics
        assert load_task(str(name)).has_options == (options != [])


@pytest.mark.parametrize(
    ("name", "called"),
    [("piqa_16_13_test.jsonl", "piqa"), ("quiz/train.jsonl", "quiz"), ("quiz/own.jsonl", "own"), ("a/b", "b")],
)
def test_a_task_is_called_as_its_folder_or_its_file(name, called):
    assert metaicl_name(name) == called


def test_a_single_file_is_divided(tmp_path):
    task = load_task(str(write(tmp_path / "quiz.jsonl")))
    assert (task.name, {split: len(part) for split, part in task.records().items()}) == ("quiz", {"all": 4})


def test_a_built_in_task_comes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sst2" / "train.jsonl")
    assert load_task("sst2").metrics == ("accuracy",)
    assert load_task("./sst2").metrics == ("macro_f1", "accuracy")
    assert anywhere("task", "sst2") == "sst2"
    assert anywhere("task", "./sst2") == str(tmp_path / "sst2")


def test_where_a_task_lies_is_no_matter_for_a_resumed_run_but_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a" / "a_16_13_train.jsonl")
    assert anywhere("task", "a#16_13") == f"{tmp_path / 'a'}#16_13"
    assert same("task", known("task", "a#16_13"), known("task", str(write(tmp_path / "b.jsonl"))))


def test_rows_from_elsewhere_take_the_place_of_its_own(tmp_path):
    write(tmp_path / "t" / "train.jsonl")
    other = write(tmp_path / "other.jsonl", rows(first=7))
    assert load_task(str(tmp_path / "t"), str(other)).records()["all"][0].prompt == "question 7?\n"


WRONG = {
    "no training rows": ({"test": rows()}, "has rows of test, but none to train on: add train.jsonl"),
    "two files for a split": ({"dev": rows(), "val": rows(), "train": rows()}, "has both dev.jsonl and val.jsonl"),
    "other columns": ({"train": [{"text": "a", "label": 1}]}, "holds no rows in MetaICL's .* but 'text', 'label'"),
    "options that are no list": ({"train": [rows()[0] | {"options": "yes"}]}, "must be a list of texts, but are 'yes'"),
    "rows with and without": ({"train": rows() + rows(3, [])}, "3 of the 7 rows of .* have no options: give all rows"),
    "no rows": ({"train": []}, "is empty"),
    "two tasks": ({"a_1_2_train": rows(), "b_1_2_test": rows()}, "has rows of several tasks, 'a', 'b': give each a"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_task_is_said_in_one_line(tmp_path, case):
    files, message = WRONG[case]
    for stem, content in files.items():
        write(tmp_path / f"{stem}.jsonl", content)
    with pytest.raises(ZofoError, match=message) as raised:
        load_task(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_folder_without_rows_and_a_file_that_is_not_there_are_no_tasks(tmp_path):
    assert not is_metaicl(str(tmp_path))
    with pytest.raises(ZofoError, match=r"is a folder without rows of its own, such as train\.jsonl"):
        load_task(str(tmp_path))
    with pytest.raises(ZofoError, match=r"there is no task file .*gone\.jsonl"):
        load_task(str(tmp_path / "gone.jsonl"))
