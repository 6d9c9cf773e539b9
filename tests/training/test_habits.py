"""What users of other libraries write by habit: it works, or one line says what to write instead."""

import dataclasses
import math
import re

import numpy as np
import pandas
import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import TrainingArguments

from plain import make_rows, make_trainer
from tiny import tiny_model, tiny_tokenizer
from zofo import ZOFOConfig, ZOFOTrainer, habits
from zofo.config import field_names
from zofo.config_parser import parse_config
from zofo.errors import ZofoError
from zofo.scoring.evaluation import require_scorable
from zofo.tasks.prompts import as_chat
from zofo.tasks.records import questions, records
from zofo.tasks.task import task_names
from zofo.training.trained_rows import digests

CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "


class SFTConfig(TrainingArguments):
    """What trl calls its configuration."""


def trainer(tmp_path, **given):
    args = ZOFOConfig(
        output_dir=str(tmp_path), method="fo", max_steps=2, per_device_train_batch_size=2, use_cpu=True,
        disable_tqdm=True, report_to="none", save_strategy="no",
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    parts = {"args": args, "train_dataset": make_rows(4), "processing_class": tokenizer, **given}
    return ZOFOTrainer(tiny_model(vocab_size=len(tokenizer)), **parts)


def said(make, *args, **keys):
    """The one line of a refusal."""
    with pytest.raises(ZofoError) as refusal:
        make(*args, **keys)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("name", [*habits.RENAMED, *habits.INSTEAD])
def test_every_key_of_habit_is_refused_with_what_to_write(tmp_path, name):
    right = habits.RENAMED.get(name)
    hint = f"write {right}" if right else habits.INSTEAD[name]
    assert right is None or right in field_names()
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: run\n{name}: true\n")
    if name not in field_names():
        assert said(parse_config, file, []) == f"{file}: unknown key {name!r}: {hint}"
        assert said(parse_config, None, [f"--{name}", "1"]) == f"unknown key {name!r}: {hint}"
        assert said(ZOFOConfig, output_dir="run", **{name: 1}) == f"unknown key {name!r}: {hint}"
    else:
        line = said(ZOFOConfig, output_dir="run", given=["output_dir", name], **{name: True})
        assert line == f"{name} is given, but has no effect in zofo: {hint}"


def test_what_the_hints_name_is_there():
    texts = [*habits.INSTEAD.values(), *(hint for key in habits.VALUES.values() for hint in key.values())]
    named = {key for text in texts for key in re.findall(r"\b([a-z_]+): [a-z0-9\[]", text) if "_" in key}
    assert named <= set(field_names())
    for key, words in habits.VALUES.items():
        assert key in field_names()
        assert not {value for value in words if value in ("lora", "prefix", "prompt") and key == "adapter"}
    built_in = set(task_names())
    assert not {re.sub("[^a-z0-9]", "", name) for name in built_in} & habits.TASKS.keys()
    for hint in habits.TASKS.values():
        assert "source: " in hint or built_in & set(re.findall(r"\w+", hint))


@pytest.mark.parametrize(("key", "value"), [(key, word) for key, words in habits.VALUES.items() for word in words])
def test_every_value_of_habit_is_refused_with_what_to_write(key, value):
    hint = habits.VALUES[key][value]
    spoken = value.upper().replace("_", "-")
    assert said(parse_config, None, [f"--{key}", spoken]) == f"{key} is {spoken!r}, which is no {key} here: {hint}"
    assert said(ZOFOConfig, output_dir="run", **{key: value}).endswith(hint)


def test_a_folder_may_have_the_name_of_a_kind_of_adapter(tmp_path, monkeypatch):
    LoraConfig(r=2).save_pretrained(tmp_path / "ia3")
    monkeypatch.chdir(tmp_path)
    assert ZOFOConfig(output_dir="run", method="fo", adapter="ia3").adapter == "ia3"


def test_a_configuration_still_tells_its_keys_and_can_be_copied():
    import inspect

    assert {"method", "max_steps", "given"} <= inspect.signature(ZOFOConfig).parameters.keys()
    assert dataclasses.replace(ZOFOConfig(output_dir="run"), seed=3).seed == 3
    assert said(ZOFOConfig, output_dir="run", penlty=1) == "unknown key 'penlty': did you mean penalty?"


@pytest.mark.parametrize("name", habits.ARGUMENTS)
def test_every_argument_of_habit_is_refused_with_what_to_write(tmp_path, name):
    assert said(trainer, tmp_path, **{name: object()}) == f"ZOFOTrainer takes no {name}: {habits.ARGUMENTS[name]}"


ARGUMENTS = {
    "a key": ({"learning_rate": 1e-3}, "takes no learning_rate: it is a key: write ZOFOConfig(learning_rate=...)"),
    "a misspelt argument": ({"metric": ["accuracy"]}, "takes no metric: did you mean metrics?"),
    "a word like no other": ({"qqqq": 1}, "takes no qqqq: there are model, args, train_dataset, upper_dataset"),
    "transformers' configuration": ({"args": TrainingArguments(use_cpu=True)}, "args is a TrainingArguments, which"),
    "trl's configuration": ({"args": SFTConfig(use_cpu=True)}, "args is a SFTConfig, which lacks the keys of zofo"),
    "a dict": ({"args": {"max_steps": 3}}, "args is a dict: write ZOFOConfig(**args)"),
    "no configuration": ({"args": None}, "args is not given: give at least ZOFOConfig(output_dir='run')"),
    "no rows": ({"train_dataset": None}, "train_dataset is not given"),
    "empty rows": ({"train_dataset": []}, "train_dataset is empty"),
    "an adapter as a dict": ({"peft_config": {"r": 8}}, "peft_config is a dict, but must be what LoraConfig(...)"),
    "an adapter and none": (
        {"peft_config": LoraConfig(), "args": ZOFOConfig(output_dir="run", use_cpu=True, method="zo", adapter="none")},
        "peft_config is given, but adapter is none",
    ),
    "an adapter of another kind of model": (
        {"peft_config": LoraConfig(task_type="SEQ_CLS")},
        "has task_type SEQ_CLS, which is of another kind of model, so that its folder could not be opened: set ",
    ),
    "an adapter by its name": ({"peft_config": "lora"}, "peft_config is a str, but must be what LoraConfig(...)"),
    "a tokenizer by its name": ({"processing_class": "gpt2"}, "processing_class is a str, but must be what AutoTok"),
    "an unknown metric": ({"metrics": ["acc"]}, "unknown metric 'acc': did you mean accuracy?"),
    "a metric of logits": ({"metrics": [lambda p: {"accuracy": 1.0}]}, "has no name: give a name, or a function made"),
    "a name of rows": ({"train_dataset": "imdb"}, "train_dataset is the text 'imdb': give the rows, such as"),
    "splits": (
        {"train_dataset": DatasetDict(train=Dataset.from_list(make_rows(4)))},
        "train_dataset is a dict with train in it, not rows: give one of its values, such as that of 'train'",
    ),
    "columns": ({"train_dataset": {"prompt": ["a"], "completion": ["b"]}}, "write datasets.Dataset.from_dict("),
    "several sets for evaluation": ({"eval_dataset": {"a": make_rows(2)}}, "eval_dataset is a dict with a in it"),
    "a stream": (
        {"train_dataset": Dataset.from_list(make_rows(4)).to_iterable_dataset()},
        "train_dataset is a IterableDataset, and zofo must know how many rows there are: write list(train_dataset)",
    ),
    "a generator": ({"upper_dataset": iter(make_rows(4))}, "upper_dataset is a list_iterator, and zofo must know"),
    "options in one text": ({"train_dataset": [{**make_rows(1)[0], "options": "a, b"}]}, "options must be a list of"),
    "rows that are texts": ({"train_dataset": ["a", "b"]}, "row 0 is 'a': rows must be dicts with prompt"),
    "conversations without a format": (
        {"train_dataset": [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}],
                            "options": ["a", "b"]}] * 2},
        "rows with messages need the model's chat format: set chat_template: true",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_cannot_work_are_refused_in_one_line(tmp_path, given, message):
    assert message in said(trainer, tmp_path, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("column", habits.COLUMNS)
def test_every_column_of_habit_is_refused_with_what_to_do(column):
    line = said(records, [{column: "a", "output": "b"}])
    assert line == f"row 0 has no text 'prompt': {habits.COLUMNS[column]}"


def test_arguments_of_habit_that_are_none_are_as_if_left_out(tmp_path):
    assert trainer(tmp_path, compute_metrics=None, data_collator=None).metrics == ("accuracy",)


def test_a_data_frame_is_as_good_as_a_list(tmp_path):
    frame = pandas.DataFrame({**{key: [row[key] for row in make_rows(4)] for key in ("prompt", "completion")},
                              "options": [np.array(row["options"]) for row in make_rows(4)]})  # fmt: skip
    assert records(frame) == records(make_rows(4)) == records(Dataset.from_list(make_rows(4)))
    assert trainer(tmp_path, train_dataset=frame, eval_dataset=frame).evaluate()["eval_rows"] == 4
    missing = pandas.DataFrame({"prompt": ["a", None], "completion": ["b", "c"]})
    assert "row 1 has no text 'prompt'" in said(records, missing)
    options = pandas.DataFrame({"prompt": ["a", "b"], "completion": ["c", "d"], "options": [["c", "e"], None]})
    for nothing in (math.nan, None, pandas.NA):
        options.at[1, "options"] = nothing
        assert [row.options for row in records(options)] == [("c", "e"), ()]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "the plot"},
    {"role": "assistant", "content": "bad"},
]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("options", [None, ["good", "bad"]])
def test_a_conversation_is_what_the_tokenizer_writes_of_it(count, options):
    turns = TURNS[1:3] if count == 2 else TURNS[:count]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    rows = [{"messages": turns, "options": options}, {"prompt": turns[:-1], "completion": turns[-1:]}]
    for row in rows:
        (record,) = records(Dataset.from_list([row]))
        made = as_chat(record, tokenizer, None)
        assert made.prompt == tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        assert made.completion == turns[-1]["content"]
        assert list(made.options) == (row.get("options") or [])


def test_the_system_prompt_is_for_conversations_without_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    own, none = records([{"messages": TURNS[:3]}, {"messages": TURNS[1:3]}])
    assert as_chat(own, tokenizer, "Judge.").prompt == as_chat(own, tokenizer, None).prompt
    assert as_chat(none, tokenizer, "Judge.").prompt.startswith("<s>system: Judge.</s><s>user: the film</s>")


def test_conversations_with_other_earlier_turns_are_other_rows():
    other = [{**TURNS[0], "content": "Be long."}, *TURNS[1:]]
    first, second = records([{"messages": TURNS}, {"messages": other}])
    assert first.prompt == second.prompt
    assert not digests([first]) & digests([second])


BAD = {
    "no answer": ({"messages": TURNS[:2]}, "but this ends with system and user: leave out what follows"),
    "nothing": ({"messages": []}, "but this ends with nothing"),
    "two answers": ({"messages": [TURNS[1], TURNS[2], TURNS[2]]}, "ends with assistant and assistant"),
    "no list": ({"messages": "hi"}, "messages must be a list, but are 'hi'"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "3"}]}, "a message must have a role (system, user"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "and a text as content"),
    "a call": ({"messages": [{**TURNS[1], "tool_calls": [1]}]}, "calls of tools cannot be trained on"),
    "a message that is a text": ({"messages": ["hi"]}, "but one is 'hi'"),
    "one side": ({"prompt": TURNS[:2], "completion": "good"}, "completion must be a list with the one message that"),
    "a long answer": ({"prompt": TURNS[:2], "completion": TURNS[2:]}, "completion must be a list with the one"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_conversations_that_cannot_be_trained_on_are_refused(row, message):
    line = said(records, [{"prompt": "a", "completion": "b"}, row])
    assert line.startswith("row 1: ")
    assert message in line


def test_conversations_train(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    rows = [{"messages": TURNS}, {"messages": TURNS[:3]}] * 4
    made = make_trainer(
        tmp_path, train=rows, eval_rows=rows, tokenizer=tokenizer, method="fo", chat_template=True, loss="lm"
    )
    assert made.train().global_step == 3
    assert made.evaluate()["eval_rows"] == 8


def test_conversations_need_no_answer_to_be_answered(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    asked = [{"messages": TURNS[:4]}, {"prompt": TURNS[:4]}, {"messages": TURNS}]
    assert [as_chat(row, tokenizer, None).prompt for row in questions(asked, "good")] == [
        as_chat(records([{"messages": TURNS}])[0], tokenizer, None).prompt
    ] * 3
    rows = [{"messages": TURNS[1:3], "options": ["good", "bad"]}] * 2
    made = make_trainer(tmp_path, train=rows, tokenizer=tokenizer, method="fo", chat_template=True)
    found = made.predict([{"messages": TURNS[1:2], "options": ["good", "bad"]}])
    assert found[0].text in ("good", "bad")
    assert "but this ends with system: " in said(questions, [{"messages": TURNS[:1]}])
    assert [row.prompt for row in questions(pandas.DataFrame({"prompt": ["a", "b"]}))] == ["a", "b"]


def test_predictions_are_of_numbers_and_of_rows_of_one_kind(tmp_path):
    made = make_trainer(tmp_path, method="fo")
    question = {"prompt": "the film was"}
    choice = {**question, "options": [" a", " the"]}
    for rows in ([question, choice], [choice, question]):
        with pytest.raises(ZofoError, match="some rows have options to choose from, and others have none"):
            made.predict(rows)
    for parameter in made.adapted.adapter_parameters("upper").values():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ZofoError, match="the scores of 1 of 1 rows are nan"):
        made.predict([choice])


def right_share(predictions, references):
    assert all(isinstance(text, str) for text in predictions)
    assert all(isinstance(right, list) for right in references)
    return sum(text in right for text, right in zip(predictions, references, strict=True)) / len(predictions)


def several(predictions, references):
    return {"share": np.float64(right_share(predictions, references)), "rows_seen": len(predictions)}


def of_logits(prediction):
    return 0.0


def words(predictions, references):
    return "good"


def test_functions_are_metrics(tmp_path):
    rows = make_rows(4)
    found = trainer(tmp_path, eval_dataset=rows, metrics=[right_share, "accuracy", several]).evaluate()
    assert found["eval_right_share"] == found["eval_accuracy"] == found["eval_share"]
    assert found["eval_rows_seen"] == 4
    assert (
        trainer(tmp_path, eval_dataset=rows, metrics=right_share).evaluate()["eval_right_share"]
        == (found["eval_accuracy"])
    )
    assert trainer(tmp_path, eval_dataset=rows, metrics="accuracy").metrics == ("accuracy",)


def test_a_function_alone_scores_generated_text_where_rows_have_no_options(tmp_path):
    rows = [{"prompt": f"the film number {i} was", "completion": " great"} for i in range(4)]
    made = make_trainer(tmp_path, train=rows, eval_rows=rows, method="fo", loss="lm")
    made.metrics = (right_share, "exact_match")
    assert made.evaluate().keys() >= {"eval_right_share", "eval_exact_match"}
    made.metrics = (right_share,)
    require_scorable(made.adapted, made.metrics, made.examples(records(rows)))
    assert 0 <= made.evaluate()["eval_right_share"] <= 1


def test_functions_that_are_no_metrics_are_refused(tmp_path):
    assert "metric of_logits must take (predictions, references)" in said(trainer, tmp_path, metrics=[of_logits])
    wordy = trainer(tmp_path, eval_dataset=make_rows(4), metrics=[words])
    assert said(wordy.evaluate) == "metric words gave 'good': return a number, or a dict of numbers"


STOPPING = {"eval_steps": 1, "save_steps": 1, "save_strategy": "steps", "load_best_model_at_end": True}


def stopping(tmp_path, patience, **keys):
    """A run whose loss never gets better than at the first evaluation: the learning rate is far too large."""
    given = {"method": "fo", "max_steps": 12, "learning_rate": 1e-30, **STOPPING, **keys}
    return make_trainer(tmp_path, eval_rows=make_rows(4), early_stopping_patience=patience, **given)


def test_a_run_ends_early_and_a_resumed_one_at_the_same_step(tmp_path):
    whole = stopping(tmp_path / "whole", 4)
    whole.train()
    assert whole.state.global_step == 5
    part = stopping(tmp_path / "part", 4, max_steps=3)
    part.train()
    for folder, checkpoint in (("part", 3), ("whole", 5)):
        again = stopping(tmp_path / folder, 4)
        again.train(resume_from_checkpoint=str(tmp_path / folder / f"checkpoint-{checkpoint}"))
        assert again.state.global_step == 5
    longer = stopping(tmp_path / "whole", 6)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 7


def test_a_run_ends_early_only_with_evaluations_to_choose_by():
    line = said(ZOFOConfig, output_dir="run", early_stopping_patience=2)
    assert line.startswith("early_stopping_patience is 2, but without a best model nothing says when to stop: give")
    line = said(
        ZOFOConfig, output_dir="run", method="two_stage", early_stopping_patience=2, load_best_model_at_end=True
    )
    assert "the first one may stop early before the second has begun" in line
    best = {"early_stopping_patience": 2, "load_best_model_at_end": True, "eval_strategy": "no"}
    line = said(ZOFOConfig, output_dir="run", **best)
    assert "load_best_model_at_end needs evaluations to choose by" in line
    assert "greater than 0" in said(ZOFOConfig, output_dir="run", early_stopping_patience=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " ", "completion": "a"}, "row 1: the prompt is empty"),
        ({"prompt": "a", "completion": "b", "options": ["c", "d"]}, "row 1: the answer 'b' is none of the options"),
        ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}, "row 1: "),
    ],
)
def test_what_is_wrong_with_a_row_is_told_with_its_number(row, message):
    assert said(records, [{"prompt": "a", "completion": "b"}, row]).startswith(message)
