"""What is no key is found without the libraries, and what is one is not refused."""

import dataclasses

import pytest

from zofo import ZOFOConfig, ZofoError, spelling
from zofo.spelling import EVAL_KEYS, key_names, require_known


def test_the_source_of_the_classes_says_what_their_fields_are():
    assert key_names() == {field.name for field in dataclasses.fields(ZOFOConfig) if field.init}
    assert key_names() > set(EVAL_KEYS)


@pytest.mark.parametrize(
    "words",
    [
        ["--penalty", "1", "--max-steps=3", "--no_normalize_penalty", "--no-normalize-penalty"],
        ["--system_prompt", "-- be brief --", "--zo_exclude", "a", "-b"],
        ["--system_prompt=--a"],
    ],
)
def test_words_that_the_parser_takes_are_left_to_it(words):
    require_known("train", (), words)


def test_fields_from_elsewhere_are_left_to_the_parser(monkeypatch):
    """As if a later transformers had moved fields of TrainingArguments to a class that is not read."""
    with pytest.raises(ZofoError, match="unknown key 'sede': did you mean seed"):
        require_known("train", (), ["--sede", "1"])
    monkeypatch.delitem(spelling._CLASSES, "TrainingArguments")
    require_known("train", (), ["--sede", "1"])


def test_each_verb_takes_keys_of_its_own():
    require_known("eval", (), ["--source", "a"])
    require_known("predict", (), ["--template", "1"])
    with pytest.raises(ZofoError, match="zofo predict has no --source: it is a key of zofo train"):
        require_known("predict", (), ["--source", "a"])
    with pytest.raises(ZofoError, match="unrecognized arguments: b; see zofo merge --help"):
        require_known("merge", (), ["b"])
