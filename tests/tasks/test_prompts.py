"""What stands around a record: examples in context, channel order, chats; and `zofo eval` with them."""

import json

import pytest
from test_scorer import pytestmark  # noqa: F401

from plain import write_task
from tiny import tiny_tokenizer
from zofo.cli import main
from zofo.commands.eval import _posed
from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.scoring.evaluation import Evaluator
from zofo.scoring.tokens import tokenize
from zofo.tasks.prompts import SEPARATOR, as_channel, as_chat, demonstrations, in_context
from zofo.tasks.records import Record

TOKENIZER = tiny_tokenizer()
OPTIONS = (" terrible", " great")
POOL = [Record(f"row {i} was", OPTIONS[i % 2], OPTIONS) for i in range(20)]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def test_examples_in_context_are_a_seeded_choice_without_the_rows_that_are_asked_about():
    test = POOL[:15]
    first, again, other = (demonstrations(POOL, 4, seed, test) for seed in (1, 1, 2))
    assert first == again != other
    assert len({record.prompt for record in first}) == 4
    assert not set(first) & set(test)
    with pytest.raises(ZofoError, match="6 examples are wanted in context, but there are 5 training rows"):
        demonstrations(POOL, 6, 0, test)


def test_examples_stand_in_front_with_their_answers():
    (made,), used = in_context(POOL[:1], POOL[3:5], TOKENIZER, 500)
    assert made.prompt == f"row 3 was great{SEPARATOR}row 4 was terrible{SEPARATOR}row 0 was"
    assert (made.completion, made.options, used) == (" terrible", OPTIONS, [2])


@pytest.mark.parametrize("room", [22, 30, 45, 60, 300])
def test_as_many_examples_as_fit_are_shown_and_the_row_is_whole(room):
    records = [Record("x", " great", OPTIONS), Record("the film was great " * 2, " great", OPTIONS)]
    made, used = in_context(records, POOL[:8], TOKENIZER, room)
    examples, cut = tokenize(made, TOKENIZER, room)
    assert cut == 0
    assert used[0] >= used[1]
    assert (used == [8, 8]) == (room == 300)
    for record, shown, example in zip(records, used, examples, strict=True):
        assert TOKENIZER.decode(example.prompt).count(SEPARATOR) == shown
        assert TOKENIZER.decode(example.prompt).endswith(record.prompt)
        if shown < 8:
            more = tokenize(in_context([record], POOL[7 - shown : 8], TOKENIZER, 10_000)[0], TOKENIZER, 10_000)[0]
            assert more[0].length >= room


def test_a_channel_record_scores_the_prompt_behind_each_option():
    turned = as_channel(Record("a film was", " great", OPTIONS, references=(" great",)))
    assert turned == Record("", "great\n", ("terrible\n", "great\n"), ("great\n",), "a film was", True)
    (example,), _ = tokenize([turned], TOKENIZER, 100)
    assert example.prompt == (TOKENIZER.bos_token_id,)
    for j, option in enumerate(turned.options):
        answer, given = example.answers[j], example.unscored[j]
        assert TOKENIZER.decode(answer[:given]) == option
        assert TOKENIZER.decode(answer[given:]) == "a film was"


@pytest.mark.parametrize("record", [Record("x", " y"), Record("x", " y", (" y", " z"), suffix=" w")])
def test_only_plain_options_can_be_turned_around(record):
    with pytest.raises(ZofoError, match="channel scoring turns options around"):
        as_channel(record)


def test_a_chat_has_the_prompt_as_the_user_s_turn():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ZofoError, match="this model's tokenizer has none"):
        as_chat(POOL[1], tokenizer, None)
    tokenizer.chat_template = TEMPLATE
    made = as_chat(POOL[1], tokenizer, "Be brief.")
    assert made.prompt == "<s>system: Be brief.</s><s>user: row 1 was</s><s>assistant: "
    assert (made.completion, made.options) == ("great", ("terrible", "great"))
    assert as_chat(POOL[1], tokenizer, None).prompt == "<s>user: row 1 was</s><s>assistant: "
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ZofoError, match=r"refuses this \(no system role\): leave out system_prompt"):
        as_chat(POOL[1], tokenizer, "Be brief.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a task with three templates."""
    made = write_task(tmp_path_factory.mktemp("prompting"))
    more = "templates:\n- prompt: 'is {{ text }} great? it was'\n- prompt: '{{ text }}'\npremise: 'it was'\n"
    with (made / "task.yaml").open("a") as file:
        file.write(more)
    return made


def evaluated(folder, capsys, *arguments):
    model, task = str(folder / "model"), str(folder / "task.yaml")
    assert main(["eval", "--model", model, "--task", task, "--test_size", "12", *arguments]) == 0
    out, notes = capsys.readouterr()
    return json.loads(out)["tasks"]["tiny"], notes


def test_a_premise_stands_behind_the_examples_of_its_row(folder, capsys, monkeypatch):
    """Also where more would fit in front of it, as it is shorter."""
    seen, whole = [], Evaluator.answers

    def answers(self, examples, premises=()):
        pairs = zip(examples, premises, strict=True)
        seen.extend([self.tokenizer.decode([*e.prompt]).count(SEPARATOR) for e in pair] for pair in pairs)
        return whole(self, examples, premises)

    monkeypatch.setattr(Evaluator, "answers", answers)
    evaluated(folder, capsys, "--scoring", "pmi", "--shots", "8", "--max_length", "48")
    assert all(row == premise for row, premise in seen)
    assert {0 < row < 8 for row, _ in seen} == {True}


def test_a_chat_leaves_room_for_its_own_words():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = ZOFOConfig(method="none", chat_template=True, system_prompt="the film was long and the music was not")
    for room in (60, 80, 120):
        _, cut, used = _posed(POOL[:3], shown=POOL[3:], tokenizer=tokenizer, width=room, config=config, scoring="mean")
        assert cut == 0
        assert min(used) < 17
    assert min(used) > 0


def test_each_way_to_ask_gives_other_scores(folder, capsys):
    ways = [(), ("--template", "1"), ("--shots", "2"), ("--scoring", "sum"), ("--scoring", "pmi"),
            ("--scoring", "channel"), ("--shots", "2", "--scoring", "channel"), ("--loss", "lm")]  # fmt: skip
    losses = [evaluated(folder, capsys, *way)[0]["loss"] for way in ways]
    assert len(set(losses)) == len(ways)


def test_all_templates_come_with_mean_spread_and_worst(folder, capsys):
    alone = [evaluated(folder, capsys, "--template", str(number))[0] for number in range(3)]
    found, _ = evaluated(folder, capsys, "--template", "all")
    assert found["templates"] == alone
    accuracies = [own["accuracy"] for own in alone]
    assert found["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 3)
    assert found["accuracy"]["worst"] == min(accuracies)
    assert found["loss"]["worst"] == max(own["loss"] for own in alone)


def trained(folder, capsys, *arguments, **keys):
    """(what results.json holds, the card, what was said) of a run without training."""
    run = folder / f"run-{len(list(folder.iterdir()))}"
    keys = {"model": folder / "model", "task": folder / "task.yaml", "output_dir": run, "test_size": 12, **keys}
    keys["per_device_eval_batch_size"] = 16  # as `zofo eval` has it
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    assert main(["train", "--method", "none", "--use_cpu", "true", *words, *arguments]) == 0
    said = capsys.readouterr()
    return json.loads((run / "results.json").read_text()), (run / "README.md").read_text(), said.out + said.err


def test_a_run_with_shots_has_the_scores_of_an_evaluation_with_them(folder, capsys):
    """The evaluation takes its examples by `data_seed`, which divides the rows, and the run by `seed`."""
    plain, card, _ = trained(folder, capsys, seed=7, data_seed=7)
    assert "training rows with their answers" not in card
    assert "shots" not in plain
    found, card, said = trained(folder, capsys, seed=7, data_seed=7, shots=4)
    scores, _ = evaluated(folder, capsys, "--shots", "4", "--data_seed", "7")
    assert found["shots"] == {"least": scores.pop("shots_least"), "mean": scores.pop("shots_mean")}
    assert found["metrics"]["upper"] == scores
    assert found["zero_shot"] == plain["zero_shot"] == evaluated(folder, capsys, "--data_seed", "7")[0]
    assert found["metrics"]["upper"]["loss"] != found["zero_shot"]["loss"]
    assert "4 to 4 of 4 examples fit in front of a row" in said
    assert "`upper` reads up to 4 training rows with their answers" in card
    assert card.count("terrible") + card.count("great") > 4  # they are in the example that the card shows


def test_another_seed_shows_other_examples_to_the_same_rows(folder, capsys):
    first, other = (trained(folder, capsys, seed=seed, data_seed=7, shots=4)[0] for seed in (7, 8))
    assert first["zero_shot"] == other["zero_shot"]
    assert first["metrics"]["upper"]["loss"] != other["metrics"]["upper"]["loss"]


def test_an_evaluation_of_a_run_shows_the_examples_of_its_seed(folder, capsys):
    found, _, _ = trained(folder, capsys, data_seed=7, shots=4)  # the usual seed, which no file of the run names
    run = next(place for place in folder.glob("**/results.json") if json.loads(place.read_text()) == found).parent
    assert main(["eval", "--run", str(run), "--shots", "4"]) == 0
    scores = json.loads(capsys.readouterr().out)["tasks"]
    (scores,) = scores.values()
    assert found["metrics"]["upper"]["loss"] == pytest.approx(scores["loss"], abs=1e-6)


def test_methods_that_train_show_no_examples():
    config = ZOFOConfig(output_dir="run", use_cpu=True, method="fo", shots=4)
    assert config.notices() == ["not used by fo: shots"]


def test_the_number_of_examples_that_fit_is_said(folder, capsys):
    found, notes = evaluated(folder, capsys, "--shots", "9", "--max_length", "60")
    assert 0 < found["shots_least"] <= found["shots_mean"] < 9
    assert f"{found['shots_least']} to " in notes
    assert "of 9 examples fit" in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--template", "3"), "task tiny has no template 3: it has 3, numbered from 0"),
        (("--template", "one"), "template is 'one', but must be a number from 0, or all"),
        (("--shots", "200"), "200 examples are wanted in context"),
        (("--chat_template",), "this model's tokenizer has none"),
        (("--source", "nowhere.csv"), "there is no data file"),
        (("--scoring", "best"), "invalid choice"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(folder, capsys, arguments, message):
    model, task = str(folder / "model"), str(folder / "task.yaml")
    assert main(["eval", "--model", model, "--task", task, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
