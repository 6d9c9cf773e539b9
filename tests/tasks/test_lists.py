"""Lists of tasks: what their words stand for, MetaICL's settings, and what may not stand in them together."""

import time

import pytest
import yaml
from test_metaicl import rows, write

from zofo.errors import ZofoError
from zofo.tasks.leakage import require_apart
from zofo.tasks.lists import require_options, task_files
from zofo.tasks.records import Conversation, Record
from zofo.tasks.settings import setting, setting_names
from zofo.tasks.task import load_task


@pytest.fixture
def folder(tmp_path):
    """A folder of three tasks in MetaICL's form."""
    for name in ("b", "a", "c"):
        write(tmp_path / "data" / name / f"{name}_16_13_train.jsonl", rows(options=[] if name == "c" else ["x", "y"]))
    return tmp_path / "data"


def task_yaml(file, **keys):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"source": "rows.jsonl", "prompt": "{{ t }}", "answer": "{{ a }}", **keys}))
    return str(file)


def test_a_folder_stands_for_its_tasks_by_name_and_everything_else_for_itself(folder, tmp_path):
    own, file = task_yaml(tmp_path / "own.yaml"), str(write(tmp_path / "quiz.jsonl"))
    (folder / ".cache").mkdir()
    (folder / "README.md").write_text("about")
    assert task_files([own, "tweets", str(folder), file]) == [
        own, "tweets", *(str(folder / name) for name in "abc"), file,
    ]  # fmt: skip
    assert task_files([str(folder / "b")]) == [str(folder / "b")]
    assert task_files([f"{folder}#16_13"]) == [f"{folder / name}#16_13" for name in "abc"]
    assert [load_task(name).name for name in task_files([f"{folder}#16_13"])] == ["a", "b", "c"]


def test_task_files_in_a_folder_are_its_tasks_and_the_rest_their_data(tmp_path):
    files = [task_yaml(tmp_path / f"{name}.yml", name=name) for name in ("one", "two")]
    write(tmp_path / "rows.jsonl")
    write(tmp_path / "data" / "train.jsonl")
    assert task_files([str(tmp_path)]) == files


def test_a_wrong_list_is_said_in_one_line(folder, tmp_path):
    twice = task_yaml(tmp_path / "other.yaml", name="a")
    (tmp_path / "empty").mkdir()
    wrong = {
        "task is an empty list": [],
        "two of the tasks are called tweets: tweets and tweets": ["tweets", "sst2", "tweets"],
        "two of the tasks are called a: .*other.yaml and .*a; leave": [twice, str(folder)],
        "empty holds no task: it needs task files": [str(tmp_path / "empty")],
        r"there is no task file .*gone\.yaml": ["tweets", str(tmp_path / "gone.yaml")],
        r"there is no task file .*gone\.jsonl": [str(tmp_path / "gone.jsonl")],
        "there is no task 'twets': did you mean tweets?": ["twets"],
        "3 is in the list of tasks": [3],
        "'' is in the list of tasks": [""],
    }
    for message, words in wrong.items():
        with pytest.raises(ZofoError, match=message) as raised:
            task_files(words)
        assert "\n" not in str(raised.value)
    (folder / "d").mkdir()
    with pytest.raises(ZofoError, match=r"d holds no rows in MetaICL's form, such as train\.jsonl: complete it or"):
        task_files([str(folder)])


def test_a_task_without_options_does_not_go_with_a_loss_over_them(folder):
    tasks = [load_task(name) for name in task_files([str(folder)])]
    require_options(tasks, "lm")
    require_options(tasks[:2], "options")
    with pytest.raises(ZofoError, match="loss is options, but of the 3 tasks 'c' have none to compare"):
        require_options(tasks, "options")


SIZES = {
    "hr_to_lr": (61, 26), "class_to_class": (43, 20), "non_class_to_class": (37, 20), "qa_to_qa": (37, 22),
    "non_qa_to_qa": (33, 22), "non_nli_to_nli": (55, 7), "non_paraphrase_to_paraphrase": (59, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_the_tasks_of_a_setting_are_found_in_a_folder_and_apart(tmp_path, name):
    assert setting_names() == [*SIZES]
    with pytest.raises(
        ZofoError, match=f"lacks {sum(SIZES[name])} of the {sum(SIZES[name])} tasks of the setting"
    ) as e:
        setting(name, str(tmp_path))
    missing = str(e.value).split(f"{name}: ")[1].split("; add")[0].replace("'", "").split(", ")
    for number, task in enumerate(missing):
        task_yaml(tmp_path / f"{task}.yaml") if number % 2 else write(tmp_path / task / f"{task}_16_13_train.jsonl")
    train, test = setting(name, f"{tmp_path}#16_13")
    assert (len(train), len(test)) == SIZES[name]
    assert not set(train) & set(test)
    assert task_files(train) == train
    assert task_files(test) == test
    assert load_task(next(entry for entry in train if "#" in entry)).records().keys() == {"train"}


def test_a_setting_that_there_is_not_is_refused_with_the_nearest_one(tmp_path):
    with pytest.raises(ZofoError, match=r"there is no setting 'hr_to_rl': did you mean hr_to_lr\?"):
        setting("hr_to_rl", str(tmp_path))


def named(prefix, count, **more):
    return [Record(f"{prefix} {i}\n", " a", **more) for i in range(count)]


def test_tasks_that_share_nothing_are_apart():
    require_apart({"a": named("a", 5), "b": named("b", 5)}, {"c": named("c", 5)})
    require_apart({"a": [Record("x", "a", suffix="1")]}, {"b": [Record("x", "a", suffix="2")]})
    talks = [Conversation("and?", "a", earlier=(("user", said),)) for said in ("one", "two")]
    require_apart({"a": talks[:1]}, {"b": talks[1:]})


def test_a_task_in_both_lists_is_named():
    with pytest.raises(ZofoError, match="'b': trained and tested on alike"):
        require_apart({"a": [], "b": []}, {"b": [], "c": []})


@pytest.mark.parametrize(
    "leak",
    [
        Record("  a\t3 \n", " other"),
        Record("Is this so: a 3?", " b", row={"text": "a 3", "label": 1}),
        Conversation("3", " b", earlier=(("user", "a"),)),
    ],
)
def test_a_row_of_a_test_task_among_the_training_rows_is_named_with_both_tasks(leak):
    train = {"films": named("x", 3), "books": named("a", 9)}
    train["books"][3] = Record("a 3\n", " a", row={"label": 1, "text": "a 3"})
    message = r"row 3 of the test task 'songs' is row 4 of the training task 'books': '.*3.*'; remove such rows"
    with pytest.raises(ZofoError, match=message):
        require_apart(train, {"clips": named("y", 4), "songs": [*named("z", 2), leak]})
    with pytest.raises(ZofoError, match="2 rows are in both, of 'songs and books', 'clips and films'"):
        require_apart(train, {"songs": [leak], "clips": named("x", 1)})


def test_a_hundred_thousand_rows_are_checked_in_seconds():
    rows = named("row with some words", 100_000, row={"text": "some words", "label": 1})
    for number, row in enumerate(rows):
        vars(row)["row"] = {"text": row.prompt, "label": number}
    started = time.perf_counter()
    require_apart({"a": rows[:80_000]}, {"b": rows[80_000:]})
    assert time.perf_counter() - started < 10  # some 1.5 s on one core; comparing all pairs would take an hour
