"""The tasks of the field in the box: their rows from local files, every template, scores, training, generation."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from test_scorer import pytestmark  # noqa: F401

from plain import make_trainer, write_config
from tiny import save_tiny_model, tiny_tokenizer
from zofo.cli import main
from zofo.commands.tasks import page
from zofo.scoring.tokens import tokenize
from zofo.tasks.task import load_task, task_names

TOKENIZER = tiny_tokenizer()
WORDS = ("river", "storm", "engine", "garden", "letter", "village", "market", "winter")


def row(task, i):
    """A row with the fields that the data set has on the Hub; every text differs from row to row."""
    a, b, label = WORDS[i % 8], WORDS[(i + 3) % 8], i % 2
    text = f"The {a} number {i} was seen near the {b}."
    return {
        "sst2": {"sentence": f"a fine {a} of number {i} ", "label": label, "idx": i},
        "rte": {"premise": text, "hypothesis": f"There was a {a}.", "label": label, "idx": i},
        "cb": {"premise": text, "hypothesis": f"there was a {a}", "label": i % 3, "idx": i},
        "boolq": {"question": f"is the {a} near the {b}", "passage": text, "label": label, "idx": i},
        "wsc": {
            "text": f"{text} It was big.",
            "span1_index": 0,
            "span2_index": 9,
            "span1_text": f"The {a}",
            "span2_text": "It",
            "label": label,
        },
        "wic": {"word": a, "sentence1": text, "sentence2": f"My {a} is old.", "label": label},
        "multirc": {
            "paragraph": f"{text} It was in year {i // 4}.",
            "question": f"What was seen in {i // 2}?",
            "answer": f"the {a} {i}",
            "idx": {"paragraph": i // 4, "question": i // 2, "answer": i},
            "label": label,
        },
        "copa": {
            "premise": text,
            "choice1": f"The {b} was near.",
            "choice2": "I was late.",
            "question": ("cause", "effect")[label],
            "label": i % 3 % 2,
        },
        "record": {
            "passage": f"{text} So said Anna Berg.\n@highlight\nAnna Berg saw the {a}",
            "query": f"It was @placeholder who saw number {i}.",
            "entities": ["Anna Berg", f"Carl {i}", "Anna Berg", "Dora"],
            "answers": ["Anna Berg"] if label else [f"Carl {i}", "Dora"],
        },
        "winogrande": {
            "sentence": f"The {a} hit the {b} number {i} because the _ was heavy.",
            "option1": a,
            "option2": b,
            "answer": str(label + 1),
        },
        "squad": {
            "id": str(i),
            "title": "" if label else f"The_{a}",
            "context": text,
            "question": f"What was near the {b}?",
            "answers": {"text": [f"The {a}", f"{a} number {i}"], "answer_start": [0, 4]},
        },
        "drop": {
            "passage": text,
            "question": f"How many times was number {i} seen?",
            "answers_spans": {"spans": [str(i), f"{i} times"], "types": ["number", "span"]},
        },
    }[task]


FIELD = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "winogrande", "squad", "drop")


def write_source(folder, task, form="jsonl", train=24, validation=12):
    folder.mkdir(exist_ok=True)
    for split, numbers in (("train", range(train)), ("validation", range(100, 100 + validation))):
        rows = [row(task, i) for i in numbers]
        file = folder / f"{split}.{form}"
        if form == "jsonl":
            file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        elif form == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            with file.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return folder


def test_the_box_holds_the_tasks_of_the_field_and_of_the_package():
    assert set(FIELD) <= set(task_names())
    assert len(task_names()) == len(FIELD) + 6


@pytest.mark.parametrize("name", task_names())
def test_a_task_has_four_templates_one_of_them_without_a_word_of_ours_and_a_licence(name):
    task = load_task(name)
    assert len(task.templates) >= 4
    assert task.licence
    assert len(task.description) > 40


@pytest.mark.parametrize("name", FIELD)
def test_every_template_renders_every_row_into_tokens(name, tmp_path):
    task = load_task(name, str(write_source(tmp_path, name)))
    records = task.records()
    assert {split: len(rows) for split, rows in records.items()} == {"train": 24, "test": 12}
    bare = 0
    for number in range(len(task.templates)):
        rows = task.reworded(records["train"], number)
        for record, first in zip(rows, records["train"], strict=True):
            text = record.prompt + record.completion + record.suffix
            assert "  " not in text.replace("\n", " ").strip() or name in ("record",), text
            assert record.prompt[-1:].isspace() != record.completion[:1].isspace(), text
            assert len(record.options) in (0, 2, 3)
            assert record.completion in record.right
            assert (record.options or (0,)).index(record.completion if record.options else 0) == (
                first.options or (0,)
            ).index(first.completion if first.options else 0)
        examples, _ = tokenize(rows, TOKENIZER, 4096)
        assert all(min(map(len, e.answers)) > 0 for e in examples)
        fields = " ".join(map(str, records["train"][0].row.values())).lower()
        words = [w for w in rows[0].prompt.split() if w.strip(".,?!\"'-:").lower() not in fields]
        bare += not words
    assert bare >= 1, "no template consists of the row's fields alone"


def test_several_right_answers_reach_the_metric(tmp_path):
    for name, right in (("squad", 2), ("drop", 2), ("record", 2)):
        task = load_task(name, str(write_source(tmp_path / name, name)))
        assert max(len(record.right) for record in task.records()["train"]) == right


def test_winogrande_scores_the_rest_of_the_sentence_alone(tmp_path):
    record = load_task("winogrande", str(write_source(tmp_path, "winogrande"))).records()["train"][1]
    assert record == type(record)(
        prompt="The storm hit the letter number 1 because the ",
        completion="letter",
        options=("storm", "letter"),
        suffix=" was heavy.",
        partial=True,
    )


def test_multirc_keeps_the_answers_to_a_question_together(tmp_path):
    from zofo.tasks.splits import split_records

    task = load_task("multirc", str(write_source(tmp_path, "multirc")))
    splits = split_records(task.records(), train_size=None, dev_size=5, test_size=7, seed=1)
    groups = [{record.group for record in part} for part in (splits.train, splits.dev, splits.test)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert (len(splits.dev), len(splits.test)) == (4, 6)  # whole questions of two answers


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("name", ["rte", "winogrande"])
def test_local_files_may_have_any_form(name, form, tmp_path):
    lines = load_task(name, str(write_source(tmp_path / "a", name))).records()
    others = load_task(name, str(write_source(tmp_path / "b", name, form))).records()
    assert lines == others


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("cb", "multirc", "record", "winogrande", "squad") else pytest.mark.full)
        for name in FIELD
    ],
)
def test_a_task_of_the_field_scores_trains_two_steps_and_is_evaluated(name, tmp_path, capsys):
    save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    write_source(tmp_path / "rows", name)
    keys = {
        "task": name, "source": str(tmp_path / "rows"), "adapter": "lora", "max_steps": 2, "lower_steps": 1,
        "per_device_train_batch_size": 2, "dev_size": 4, "save_strategy": "no", "learning_rate": 1e-2,
        "loss": "lm" if name in ("squad", "drop") else "options", "max_length": 1024,
    }  # fmt: skip
    config = write_config(tmp_path, "run", **keys)
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    task = load_task(name)
    assert results["task"] == name
    assert results["backbone_change"] > 0
    for scores in (results["zero_shot"], results["metrics"]["upper"]):
        assert set(scores) == {*task.metrics, "loss", "rows"}
        assert all(0 <= scores[metric] <= 1 for metric in task.metrics)
        assert scores["rows"] == 12
    capsys.readouterr()
    arguments = [
        "--task",
        name,
        "--model",
        str(tmp_path / "run" / "backbone"),
        "--adapter",
        str(tmp_path / "run/upper"),
    ]
    assert main(["eval", *arguments]) == 0
    again = json.loads(capsys.readouterr().out)["tasks"][name]
    assert again == pytest.approx(results["metrics"]["upper"], abs=1e-6)


def test_a_page_shows_every_template_with_the_answer_marked(tmp_path):
    text = page("cb", str(write_source(tmp_path, "cb")))
    assert text.count("## template") == len(load_task("cb").templates)
    assert text.count("<- right") == len(load_task("cb").templates)
    assert "option: 'Maybe'" in text or "option: ' Maybe'" in text
    text = page("squad", str(write_source(tmp_path, "squad")))
    assert "answer: " in text
    assert "also right: " in text


def test_a_trainer_takes_the_records_of_a_task(tmp_path):
    rows = load_task("copa", str(write_source(tmp_path, "copa"))).records()["train"]
    trainer = make_trainer(tmp_path / "run", train=rows, max_length=1024)
    assert trainer.train().global_step == 3
