"""Predictions: those of plain transformers and peft, for rows without labels, in every form of table."""

import csv
import io
import json
import re
import shutil
from contextlib import redirect_stdout

import pandas
import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from plain import make_rows, make_trainer
from shell import QUICK, ROWS, arguments, failed, refused, write_task
from tiny import tiny_model, tiny_tokenizer
from zofo.cli import main

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORT = {"answer": "{{ [' a', ' the'][label] }}", "options": [" a", " the"]}
GENERATED = {"options": None, "metric": "exact_match"}
# name -> (keys of the run, changes of its task)
RUNS = {
    "options of one token": ({}, SHORT),
    "longer options": ({}, {}),
    "virtual tokens": ({"adapter": "prefix"}, {}),
    "no adapter": ({"method": "zo", "adapter": "none", "zo_learning_rate": 1e-2}, {}),
    "bilevel": ({"method": "bilevel", "penalty": 1.0}, {}),
    "a suffix": ({}, {"suffix": " to me."}),
    "the suffix alone": ({}, {"suffix": " to me.", "score": "suffix"}),
    "options without a space": (
        {}, {"prompt": "{{ text }}\n", "answer": "{{ ['bad', 'good'][label] }}", "options": ["bad", "good"]},
    ),
    "a chat": ({"chat_template": True, "system_prompt": "Be brief."}, {}),
    "generated": ({"loss": "lm"}, GENERATED),
    "generated, of two lines": (
        {"loss": "lm"}, {**GENERATED, "answer": "\nwhat:\n{{ ['bad', 'good'][label] }}"},
    ),
    "generated after a space": ({"loss": "lm"}, {**GENERATED, "prompt": "{{ text }}: ", "answer": "{{ label }}"}),
    "generated in a chat": ({"loss": "lm", "chat_template": True}, GENERATED),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose own settings would spoil greedy text, with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    made = tiny_model(vocab_size=len(tokenizer))
    made.generation_config.repetition_penalty = 9.0
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(folder, model, task=None, **keys):
    """A run folder."""
    task = write_task(folder / "task", **(task or {}))
    keys = {**QUICK, "learning_rate": 3e-2, "model": model, "task": task, "output_dir": folder / "run", **keys}
    assert main(arguments(**keys)) == 0
    return folder / "run"


def predicted(capsys, **options):
    """The rows that `zofo predict` says."""
    capsys.readouterr()
    assert main(arguments("predict", **options)) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def ended(model, tmp_path_factory):
    """The same model with a tokenizer that ends each text itself."""
    folder = tmp_path_factory.mktemp("ended") / "model"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    single = "<s> $A </s>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=known)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["longer options", "a suffix", "the suffix alone", "generated", "a chat"])
def test_the_code_of_the_card_leaves_out_the_end_that_a_tokenizer_adds(capsys, tmp_path, ended, monkeypatch, name):
    assert AutoTokenizer.from_pretrained(ended)("a")["input_ids"][-1] == 1
    require_code_as_predict(capsys, tmp_path, ended, monkeypatch, *RUNS[name])


@pytest.mark.parametrize(("keys", "task"), RUNS.values(), ids=RUNS)
def test_the_code_of_the_card_gives_what_predict_gives(capsys, tmp_path, model, monkeypatch, keys, task):
    require_code_as_predict(capsys, tmp_path, model, monkeypatch, keys, task)


def require_code_as_predict(capsys, tmp_path, model, monkeypatch, keys, task):
    run = trained(tmp_path, model, task, **keys)
    card = (run / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    made: dict = {}
    monkeypatch.chdir(run)
    with redirect_stdout(io.StringIO()) as said:
        exec(code, made)
    shown = next(row for row in ROWS if row["text"] in made["prompt"])
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": shown["text"]}))
    (row,) = predicted(capsys, run=run, data=tmp_path / "one.jsonl")
    assert row["text"] == shown["text"]
    assert said.getvalue().lstrip().startswith(row["prediction"])
    if "answer" in made:
        assert made["answer"] == row["prediction"]
        assert "scores" not in row
        return
    scores = {option.strip(): score for option, score in made["scores"].items()}
    assert row["scores"] == pytest.approx(scores, abs=1e-5)
    chances = torch.tensor(list(scores.values())).softmax(-1)
    assert row["probability"] == pytest.approx(float(chances.max()), abs=1e-5)
    assert row["prediction"] == max(scores, key=scores.get)


def test_rows_without_labels_are_answered_as_plain_libraries_answer_them(capsys, tmp_path, model):
    """Not by the code of the card, on rows of several lengths in one batch."""
    run = trained(tmp_path, model)
    texts = ["fine", "a terrible plot, a dull cast and a long evening", "the film 3 was great", "who wrote it?"]
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)))
    rows = predicted(capsys, run=run, data=tmp_path / "new.jsonl", batch_size=3)
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    tokenizer = AutoTokenizer.from_pretrained(run / "backbone")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "backbone"), run / "upper").eval()
    for row in rows:
        for option, score in row["scores"].items():
            ids = tokenizer(f"{row['text']} It was {option}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(f"{row['text']} It was")["input_ids"])
            values = plain(ids).logits[0].log_softmax(-1)[range(start - 1, ids.shape[1] - 1), ids[0, start:]]
            assert float(values.mean()) == pytest.approx(score, abs=1e-5)


def test_predictions_of_labelled_rows_are_those_that_are_evaluated(capsys, tmp_path, model):
    run = trained(tmp_path, model)
    rows = predicted(capsys, run=run, data=tmp_path / "task" / "rows.jsonl")
    right = [["bad", "good"][row["label"]] == row["prediction"] for row in rows]
    assert main(arguments("eval", run=run, split="train")) == 0
    report = json.loads(capsys.readouterr().out)["tasks"]["task"]
    trained_on = {row["text"] for row in ROWS} - {row["text"] for row in samples(capsys, tmp_path, run)}
    inside = [value for value, row in zip(right, rows, strict=True) if row["text"] in trained_on]
    assert report["rows"] == len(inside)
    assert report["accuracy"] == pytest.approx(sum(inside) / len(inside))


def samples(capsys, folder, run):
    """The rows that an evaluation of the run's own file scores, by their samples."""
    data = folder / "task" / "rows.jsonl"
    assert main(arguments("eval", run=run, data=data, log_samples=folder / "samples.jsonl")) == 0
    capsys.readouterr()
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return [{"text": json.loads(line)["prompt"].removesuffix(" It was"), **json.loads(line)} for line in lines]


def test_every_form_of_table_holds_the_same(capsys, tmp_path, model):
    run = trained(tmp_path, model)
    (tmp_path / "new.csv").write_text('text,id\n"a long, dull film",007\n"it said ""no""",1e5\n')
    said = predicted(capsys, run=run, data=tmp_path / "new.csv")
    files = [tmp_path / f"out.{suffix}" for suffix in ("csv", "jsonl", "parquet")]
    for file in files:
        assert main(arguments("predict", run=run, data=tmp_path / "new.csv", output=file)) == 0
    assert [row["id"] for row in said] == ["007", "1e5"]
    assert [json.loads(line) for line in files[1].read_text().splitlines()] == said
    with open(files[0], newline="") as table:
        cells = list(csv.DictReader(table))
    assert [{**c, "scores": json.loads(c["scores"]), "truncated": json.loads(c["truncated"])} for c in cells] == [
        {**row, "probability": str(row["probability"])} for row in said
    ]
    frame = pandas.read_parquet(files[2])
    assert [dict(pairs) for pairs in frame.pop("scores")] == [row["scores"] for row in said]
    assert frame.to_dict("records") == [{k: v for k, v in row.items() if k != "scores"} for row in said]


def test_columns_that_parquet_has_no_type_for_are_texts(tmp_path, model):
    run = trained(tmp_path, model)
    rows = [{"text": "fine", "meta": {}, "id": 2**70}, {"text": "dull", "meta": {}, "id": 5}]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(arguments("predict", run=run, data=tmp_path / "new.jsonl", output=tmp_path / "o.parquet")) == 0
    frame = pandas.read_parquet(tmp_path / "o.parquet")
    assert frame["meta"].tolist() == ["{}", "{}"]
    assert frame["id"].tolist() == [str(2**70), "5"]


def test_a_table_that_was_trained_on_says_how_new_rows_are_answered(capsys, tmp_path, model):
    (tmp_path / "mine.csv").write_text(
        "review,stars\n"
        + "".join(f"the film {n} was {['bad', 'good'][n % 2]},{['one', 'five'][n % 2]}\n" for n in range(60))
    )
    keys = {**QUICK, "model": model, "data": tmp_path / "mine.csv", "text": "review", "label": "stars"}
    assert main(arguments(**keys, output_dir=tmp_path / "run")) == 0
    (tmp_path / "mine.csv").unlink()  # the run knows the words
    (tmp_path / "new.csv").write_text("review\nfine\n")
    (row,) = predicted(capsys, run=tmp_path / "run", data=tmp_path / "new.csv")
    assert row["prediction"] in ("one", "five")
    assert row["scores"].keys() == {"one", "five"}


def test_a_prompt_that_was_cut_is_marked(capsys, tmp_path, model):
    run = trained(tmp_path, model)
    rows = [{"text": "it " * 60}, {"text": "fine"}]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = predicted(capsys, run=run, data=tmp_path / "new.jsonl", max_length=40)
    assert [row["truncated"] for row in found] == [True, False]


def test_a_model_with_an_adapter_and_a_task_need_no_run(capsys, tmp_path, model):
    run = trained(tmp_path, model)
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "fine"}))
    own = predicted(capsys, run=run, data=tmp_path / "new.jsonl")
    parts = {"model": run / "backbone", "adapter": run / "upper", "task": tmp_path / "task" / "task.yaml"}
    assert predicted(capsys, **parts, data=tmp_path / "new.jsonl") == own
    assert predicted(capsys, model=model, task=parts["task"], data=tmp_path / "new.jsonl") != own


WRONG = {
    "a column of its own": ({}, {"text": "a", "scores": 1}, "already, which zofo predict would write: rename it"),
    "no such column": ({}, {"txt": "a"}, "the row has no column 'text'"),
    "a form that is not known": ({"output": "{folder}/out.xlsx"}, {"text": "a"}, "must end in .csv, .jsonl, .parquet"),
    "no such adapter": ({"adapter": "lower"}, {"text": "a"}, "has no adapter 'lower'"),
    "no such run": ({"run": "{folder}"}, {"text": "a"}, "is no run: it holds no config.yaml"),
    "no rows": ({}, None, "new.jsonl is empty"),
    "a key of training": ({"max_steps": 3}, {"text": "a"}, "zofo predict has no --max_steps"),
    "a file that is there": ({"output": "{folder}/new.jsonl"}, {"text": "a"}, "is not overwritten"),
}


@pytest.mark.parametrize(("changes", "row", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_is_said_before_the_model_is_loaded(
    capsys, tmp_path, model, monkeypatch, changes, row, message
):
    run = trained(tmp_path, model)
    (tmp_path / "new.jsonl").write_text(json.dumps(row) if row else "")
    monkeypatch.setattr("zofo.commands.stored.load_model", lambda *_: pytest.fail("loaded"))
    given = {key: str(value).format(folder=tmp_path) for key, value in changes.items()}
    assert message in refused(
        capsys, arguments("predict", **{"run": run, "data": tmp_path / "new.jsonl", **given}), tmp_path
    )


def test_a_run_that_has_not_ended_says_how_to_go_on(capsys, tmp_path, model):
    run = trained(tmp_path, model)
    (run / "results.json").unlink()
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "fine"}))
    assert "has not ended: go on with resume_from_checkpoint" in failed(
        capsys, arguments("predict", run=run, data=tmp_path / "new.jsonl")
    )


def test_a_trainer_predicts_with_what_is_deployed(tmp_path):
    trainer = make_trainer(tmp_path, method="bilevel")
    trainer.train()
    rows = [{"prompt": row["prompt"], "options": row["options"]} for row in make_rows(5, first=40)]
    trainer.adapted.use("lower")
    found = trainer.predict(rows)
    trainer.adapted.use("upper")
    for row, answer in zip(rows, found, strict=True):
        texts = [row["prompt"] + option for option in row["options"]]
        ids = [trainer.processing_class(text, return_tensors="pt")["input_ids"] for text in texts]
        scores = [trainer.model(i).logits[0, -2].log_softmax(-1)[i[0, -1]] for i in ids]
        torch.testing.assert_close(answer.scores, torch.stack(scores).detach(), rtol=0, atol=1e-5)
        assert answer.text == row["options"][int(answer.scores.argmax())]
    assert trainer.predict([]) == []
    texts = trainer.predict([{"prompt": "the film was"}])
    assert texts[0].scores is None
    assert isinstance(texts[0].text, str)
    with pytest.raises(ValueError, match="row 0 has no text 'prompt'"):
        trainer.predict([{"text": "the film was"}])
