"""Training rows behind other ones, and turned around: which ones stand there, and what is scored."""

import dataclasses
import json
import random
from collections import Counter

import pytest
from test_scorer import pytestmark  # noqa: F401

from plain import write_task
from tiny import tiny_tokenizer
from zofo.cli import main
from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.scoring.batch import collate, padding_id
from zofo.scoring.tokens import tokenize
from zofo.tasks.prompts import SEPARATOR, as_channel, demonstrations, in_context, in_context_of_each_other
from zofo.tasks.records import Conversation, Record, digest
from zofo.training.rows import Posing
from zofo.training.trained_rows import digests, was_trained_on

TOKENIZER = tiny_tokenizer()
OPTIONS = (" terrible", " great")
POOL = [Record(f"row {i:02} was", OPTIONS[i % 2], OPTIONS) for i in range(20)]


def before(records, pool=POOL, shots=4, seed=0, width=10_000):
    """{prompt: what stands in front of it}."""
    made, _ = in_context_of_each_other(records, pool, shots, seed, TOKENIZER, width)
    return {old.prompt: new.prompt.removesuffix(old.prompt) for old, new in zip(records, made, strict=True)}


def shown(text):
    return text.split(SEPARATOR)[:-1]


def test_what_stands_before_a_row_depends_on_seed_and_row_and_not_on_any_order():
    mixed = random.Random(1).sample(POOL, len(POOL))
    first = before(POOL)
    assert first == before(mixed) == before(POOL, mixed)
    assert before(POOL[7:8])[POOL[7].prompt] == first[POOL[7].prompt]
    assert len(set(first.values())) > 15
    assert first != before(POOL, seed=1)


def test_a_row_stands_behind_different_rows_with_their_answers_and_never_behind_itself():
    answered = {record.prompt + record.completion for record in POOL}
    counts = Counter()
    for seed in range(20):
        for prompt, text in before(POOL, seed=seed).items():
            examples = shown(text)
            assert len(set(examples)) == len(examples) == 4
            assert set(examples) < answered
            assert prompt not in text
            counts.update(examples)
    assert counts.keys() == answered
    assert max(counts.values()) < 2 * min(counts.values())  # 80 of each are expected


def test_rows_of_one_group_are_no_examples_for_each_other():
    pool = [dataclasses.replace(record, group=str(i // 5)) for i, record in enumerate(POOL)]
    for prompt, text in before(pool, pool, shots=15).items():
        assert len(shown(text)) == 15
        assert not set(shown(text)) & {r.prompt + r.completion for r in pool if r.group == str(int(prompt[4:6]) // 5)}
    with pytest.raises(ZofoError, match="16 examples are wanted in context, but there are 15 other training rows"):
        before(pool, pool, shots=16)


def test_all_other_rows_can_stand_there_and_no_more():
    assert all(len(shown(text)) == 19 for text in before(POOL, shots=19).values())
    with pytest.raises(ZofoError, match="20 examples are wanted in context, but there are 19 other training rows"):
        before(POOL, shots=20)
    assert len(shown(before([Record("new", " great", OPTIONS)], shots=20)["new"])) == 20


def test_as_many_as_fit_stand_there_the_last_ones():
    whole, part = before(POOL, shots=8), before(POOL, shots=8, width=100)
    for prompt, text in part.items():
        assert 0 < len(shown(text)) < 8
        assert whole[prompt].endswith(text)


def test_a_row_behind_others_or_turned_around_still_asks_the_same():
    talk = Conversation("and now?", " great", OPTIONS, earlier=(("user", "hello"),))
    for record in (*POOL[:3], talk):
        (made,), _ = in_context([as_channel(record)], POOL[5:8], TOKENIZER, 500)
        assert made.identity == record.identity
        assert digest([made]) != digest([record])
        assert was_trained_on(record, digests([made]))
        assert not was_trained_on(POOL[4], digests([made]))
    assert not demonstrations(in_context(POOL, POOL[:1], TOKENIZER, 500)[0], 0, 0, POOL)
    with pytest.raises(ZofoError, match="there are 0 training rows"):
        demonstrations([as_channel(record) for record in POOL], 1, 0, POOL)


@pytest.mark.parametrize("method", ["fo", "bilevel"])
@pytest.mark.parametrize("prompt", ["direct", "channel"])
def test_no_row_stands_behind_one_that_is_held_out(method, prompt):
    config = ZOFOConfig(method=method, train_shots=3, train_prompt=prompt, seed=5)
    posing = Posing(config, POOL[:12], TOKENIZER, 1000)
    train = posing.trained(POOL[:6])
    (dev, _), (test, used) = posing.evaluated(POOL[12:15]), posing.evaluated(POOL[15:])
    assert used == [3] * 5
    for record in (*train, *dev, *test):
        texts = [text for text in (record.prompt, record.suffix) if "row" in text]
        numbers = [int(part[:2]) for text in texts for part in text.split("row ")[1:]]
        assert len(numbers) == 4
        assert max(numbers[:-1]) < 12
    fronts = {record.prompt.rpartition("row" if prompt == "direct" else SEPARATOR)[0] for record in (*dev, *test)}
    assert len(fronts) == 1


def test_without_shots_rows_are_as_they_are():
    posing = Posing(ZOFOConfig(method="fo"), POOL, TOKENIZER, 100)
    assert posing.trained(POOL[:3]) == posing.alone(POOL[:3]) == posing.evaluated(POOL[:3])[0] == POOL[:3]
    turned = Posing(ZOFOConfig(method="fo", train_prompt="channel"), POOL, TOKENIZER, 100)
    assert turned.trained(POOL[:3]) == [as_channel(record) for record in POOL[:3]]


def test_the_target_of_a_channel_row_is_its_text():
    (made,) = Posing(ZOFOConfig(method="fo", train_prompt="channel", train_shots=2), POOL, TOKENIZER, 500).trained(
        POOL[3:4]
    )
    batch = collate(tokenize([made], TOKENIZER, 500)[0], "lm", padding_id(TOKENIZER))
    assert TOKENIZER.decode(batch["scored"][2]) == "row 03 was"
    assert TOKENIZER.decode(batch["input_ids"][0]).endswith("great\nrow 03")  # the last token is predicted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("context"))


def run(folder, name, **keys):
    """What results.json holds of a run of 4 steps."""
    keys = {
        "model": folder / "model", "task": folder / "task.yaml", "output_dir": folder / name, "method": "fo",
        "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 16,
        "learning_rate": 0.03, "seed": 3, "data_seed": 3, "test_size": 8, "dev_size": 4, "use_cpu": "true",
        "disable_tqdm": "true", "report_to": "none", **keys,
    }  # fmt: skip
    assert main(["train", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]) == 0
    return json.loads((folder / name / "results.json").read_text())


@pytest.mark.parametrize("prompt", ["direct", "channel"])
def test_a_run_is_evaluated_as_it_was_trained_and_as_zofo_eval_does_it(folder, capsys, prompt):
    plain = run(folder, f"plain-{prompt}", train_prompt=prompt, loss="lm")
    found = run(folder, f"shown-{prompt}", train_prompt=prompt, loss="lm", train_shots=3)
    assert found["zero_shot"] == plain["zero_shot"]
    assert found["shots"] == {"least": 3, "mean": 3.0}
    assert "shots" not in plain
    assert found["metrics"] != plain["metrics"]
    capsys.readouterr()
    words = ["--scoring", "channel"] if prompt == "channel" else []
    assert main(["eval", "--run", str(folder / f"shown-{prompt}"), "--shots", "3", *words]) == 0
    scores = json.loads(capsys.readouterr().out)["tasks"]["tiny"]
    assert {key: scores[key] for key in found["metrics"]["upper"]} == pytest.approx(found["metrics"]["upper"])
    card = (folder / f"shown-{prompt}" / "README.md").read_text()
    assert "`upper` reads up to 3 training rows with their answers" in card


def test_a_run_with_examples_goes_on_with_the_same_ones_and_with_no_others(folder, capsys):
    first = run(folder, "whole", train_shots=2)
    again = run(folder, "again", train_shots=2, resume_from_checkpoint=folder / "whole" / "checkpoint-2")
    assert again["metrics"] == first["metrics"]
    files = [(folder / name / "upper" / "adapter_model.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]
    for key, value in (("train_shots", 3), ("train_prompt", "channel")):
        given = {"train_shots": 2, key: value, "resume_from_checkpoint": folder / "whole" / "checkpoint-2"}
        with pytest.raises(AssertionError):
            run(folder, "other", **given)
        assert f"{key}" in capsys.readouterr().err


def test_what_cannot_be_turned_around_is_refused(folder, capsys):
    with pytest.raises(ZofoError, match=r"train_prompt is channel, .* but chat_template is true"):
        ZOFOConfig(method="fo", train_prompt="channel", chat_template=True)
    text = (folder / "task.yaml").read_text()
    (folder / "text.yaml").write_text(text.replace("options:\n- ' terrible'\n- ' great'\n", ""))
    with pytest.raises(AssertionError):
        run(folder, "none", task=folder / "text.yaml", train_prompt="channel", loss="lm")
    assert "but a row of task tiny has no options: set train_prompt: direct" in capsys.readouterr().err
    with pytest.raises(
        ZofoError, match=r"an answer of \d+ tokens, with the text behind it, leaves no room .* the texts"
    ):
        tokenize([as_channel(POOL[0])], TOKENIZER, 6)
