"""Bad input through the real command: status 2, one line that says what, why and how to mend it, nothing written."""

import contextlib
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from shell import QUICK, ROWS, arguments, failed, refused, write_task
from tiny import save_tiny_model, tiny_model, tiny_tokenizer
from zofo import ZOFOConfig
from zofo.cli import main

KEYS = {
    "a misspelt key": ({"penlty": 1}, "unknown key 'penlty': did you mean penalty?"),
    "a key like no other": ({"qqqq": 1}, "unknown key 'qqqq': see `zofo train --help`"),
    "another library's name of a key": (
        {"batch_size": 4},
        "unknown key 'batch_size': write per_device_train_batch_size",
    ),
    "an option of another verb": ({"scoring": "sum"}, "unknown key 'scoring': it is an option of zofo eval"),
    "levels that share something else": ({"lower_fraction": "all"}, "'all', but must be a number or shared"),
    "layers without LoRA": (
        {"adapter": "prefix", "adapter_layers": "last 2"},
        "adapter_layers is 'last 2', but adapter is prefix: leave it out, or set adapter: lora",
    ),
    "a rank without LoRA": (
        {"adapter": "prompt", "lora_r": 4},
        "lora_r is 4, but adapter is prompt: leave it out, or set adapter: lora; a PEFT config has r",
    ),
    "a rank of 0": ({"lora_r": 0}, "lora_r is 0, but must be greater than 0"),
    "modules that are not there": ({"lora_target_modules": ["qq_proj"]}, "qq_proj"),
    "layers that are not there": ({"adapter_layers": "last 3"}, "'last3' is no range of layers of this model: they"),
    "more examples than rows": (
        {"method": "none", "shots": 41},
        "41 examples are wanted in context, but there are 40 training rows: ask for fewer",
    ),
    "an adapter as the method": ({"method": "lora"}, "LoRA is an adapter: write method: fo with adapter: lora"),
    "a method by its name in papers": ({"method": "mezo"}, "write method: zo with adapter: none"),
    "an adapter of another kind of model": ({"adapter": "qlora"}, "a model that is stored quantised"),
    "a number that is none": ({"max_steps": "three"}, "invalid int value: 'three'"),
    "a whole number that is none": ({"lower_steps": 2.5}, "invalid int value: '2.5'"),
    "a float that is none": ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
    "a truth value that is none": ({"normalize_penalty": "perhaps"}, "perhaps"),
    "an unknown method": ({"method": "bilvel"}, "method: invalid choice: 'bilvel' (choose from 'bilevel', 'zo'"),
    "an unknown dtype": ({"dtype": "float8"}, "dtype: invalid choice: 'float8' (choose from"),
    "an unknown loss": ({"loss": "mse"}, "loss: invalid choice: 'mse' (choose from"),
    "an unknown estimator": (
        {"zo_estimator": "three_sided"},
        "invalid choice: 'three_sided' (choose",
    ),
    "an unknown schedule": ({"lr_scheduler_type": "nosuch"}, "nosuch is not a valid SchedulerType"),
    "an unknown optimizer": ({"optim": "nosuch"}, "nosuch"),
    "an unknown adapter": ({"adapter": "loar"}, "adapter is 'loar': give one of lora, prefix, prompt, none, or"),
    "bilevel without an adapter": (
        {"method": "bilevel", "adapter": "none"},
        "method bilevel trains an adapter, but adapter is none: choose lora, prefix or prompt, or method zo",
    ),
    "two stages without an adapter": (
        {"method": "two_stage", "adapter": "none"},
        "but adapter is none: choose lora",
    ),
    "autocast": ({"bf16": "true"}, "set dtype: bfloat16"),
    "no model": ({"model": None}, "model is not given: add model: ... to the config, or --model ... to the command"),
    "no task": ({"task": None}, "task is not given"),
    "an unknown task": ({"task": "movie_review"}, "there is no task 'movie_review': did you mean movie_reviews?"),
    "a task by the name of its data": ({"task": "trec"}, "there is no task 'trec': question_types has TREC's"),
    "a task in another spelling": ({"task": "SST-2"}, "there is no task 'SST-2': did you mean sst2?"),
    "a data set of the Hub as task": (
        {"task": "a/b"},
        "there is no task 'a/b': for a Hub data set write a task file with source: a/b",
    ),
    "a table as task": ({"task": "rows.csv"}, "there is no task 'rows.csv': zofo train takes a table as data"),
    "a task file that is not there": ({"task": "none.yaml"}, "there is no task file none.yaml"),
    "more training rows than exist": ({"train_size": 41}, "train_size is 41, but only 40 rows are left for it"),
    "more test rows than exist": ({"test_size": 61}, "test_size is 61, but only 60 rows are left for it: ask for"),
    "more dev rows than exist": ({"dev_size": 51}, "dev_size is 51, but only 50 rows are left for it"),
    "no training row left": ({"dev_size": 50}, "no row is left to train on"),
    "decay at an automatic rate": (
        {"method": "zo", "adapter": "none", "zo_learning_rate": "auto", "zo_weight_decay": 0.1},
        "zo_weight_decay is 0.1, but the automatic rate grows without bound",
    ),
    "an optimizer that is not there": ({"optim": "galore_adamw"}, "optim galore_adamw cannot be used ("),
    "an optimizer with weights of its own": ({"optim": "schedule_free_adamw"}, "optim schedule_free_adamw keeps"),
    "no metric to choose by": (
        {"eval_steps": 1, "metric_for_best_model": "accuracee"},
        "metric_for_best_model is 'accuracee', but evaluations report accuracy",
    ),
    "a length with no room": ({"max_length": 2}, "max_length 2: raise max_length, or shorten the answers"),
}
MUST_BE_POSITIVE = (
    "zo_eps", "num_perturbations", "zo_learning_rate", "max_length", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "train_size", "dev_size", "test_size", "max_steps",
    "zo_rank", "zo_members_per_forward", "lower_fraction", "two_stage_fraction", "logging_steps", "save_steps",
    "eval_steps", "reward_timeout", "max_new_tokens",
)  # fmt: skip
MUST_NOT_BE_NEGATIVE = (
    "learning_rate", "upper_learning_rate", "penalty", "lower_steps", "zo_weight_decay", "weight_decay", "seed",
    "data_seed", "warmup_steps", "max_grad_norm", "shots", "train_shots",
)  # fmt: skip
WRONG_NUMBERS = [
    *((key, value) for key in MUST_BE_POSITIVE for value in ("0", "-3")),
    *((key, "-3") for key in MUST_NOT_BE_NEGATIVE),
    *((key, value) for key in ("learning_rate", "zo_learning_rate", "zo_eps") for value in ("nan", "inf")),
    ("penalty", "nan"),  # inf is `infinite`
    ("lower_fraction", "1"),
    ("two_stage_fraction", "1.5"),
    ("lower_fraction", "nan"),
]
TASKS = {
    "an unknown key": ({"anwser": "x"}, "task.yaml: unknown key 'anwser'; did you mean answer?"),
    "no answer": (
        {"answer": None},
        "task task: the key 'answer' is missing: add it; only method zo with objective: reward",
    ),
    "options that are no list": ({"options": 2}, "task.yaml: options must be a list of texts, or a template"),
    "an answer that is no option": (
        {"answer": " fine"},
        "60 of 60 rows cannot be used (rows 1, 2, 3, ...)",
    ),
    "a column that is not there": ({"prompt": "{{ body }}"}, "the row has no column 'body', but 'text', 'label'"),
    "a sandbox escape": ({"prompt": "{{ text.__class__ }}"}, "task.yaml, prompt tries what templates may not do"),
    "an endless template": ({"prompt": "{{ 'x' * 10 ** 12 }}"}, "task.yaml, prompt tries what templates may not do"),
    "a file that is not there": ({"source": "none.jsonl"}, "none.jsonl: correct `source`; paths are relative"),
    "an unknown metric": ({"metric": "acuracy"}, "task.yaml: unknown metric 'acuracy'; did you mean accuracy?"),
    "no options for a loss over them": ({"options": None}, "set loss: lm, or give options"),
}
LINES = [json.dumps(row) + "\n" for row in ROWS]
DATA = {
    "broken JSON": ("".join(LINES[:6]).encode() + b'{"text": "x", \n', "rows.jsonl, line 7: broken JSON"),
    "an empty file": (b"", "rows.jsonl is empty: give a file with at least one row"),
    "another encoding": ('{"text": "ä", "label": 1}\n'.encode("latin-1"), "is not UTF-8 (byte 10): save it in UTF-8"),
    "compressed bytes": (gzip.compress(b"x"), "is not UTF-8"),
    "a missing label": ("".join([*LINES, '{"text": "x"}\n']).encode(), "1 of 61 rows cannot be used (rows 61)"),
    "a null label": ("".join([*LINES, '{"text": "x", "label": null}']).encode(), "1 of 61 rows cannot be used"),
    "a nested label": ("".join([*LINES, '{"text": "x", "label": [1]}']).encode(), "1 of 61 rows cannot be used"),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def keys(model, tmp_path):
    """The keys of a run that works."""
    return {"model": model, "task": write_task(tmp_path / "task"), "output_dir": tmp_path / "run", **QUICK}


@pytest.mark.parametrize(("changes", "message"), KEYS.values(), ids=KEYS)
def test_keys(capsys, tmp_path, keys, changes, message):
    assert message in refused(capsys, arguments(**{**keys, **changes}), tmp_path)


@pytest.mark.parametrize(("changes", "message"), KEYS.values(), ids=KEYS)
def test_keys_in_a_file(capsys, tmp_path, keys, changes, message):
    merged = {k: v if isinstance(v, int | float) else str(v) for k, v in {**keys, **changes}.items() if v is not None}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(merged))
    line = refused(capsys, ["train", "--config", str(file)], tmp_path)
    assert message in line
    assert "unknown key" not in line or str(file) in line  # where to correct it


@pytest.mark.parametrize(("key", "value"), WRONG_NUMBERS)
def test_numbers_that_cannot_be(capsys, tmp_path, keys, key, value):
    changes = {"save_strategy": "steps"} if key == "save_steps" else {}
    line = refused(capsys, arguments(**{**keys, **changes, key: value}), tmp_path)
    assert key in line


@pytest.mark.parametrize(("changes", "message"), TASKS.values(), ids=TASKS)
def test_task_files(capsys, tmp_path, keys, changes, message):
    task = write_task(tmp_path / "bad", **changes)
    assert message in refused(capsys, arguments(**{**keys, "task": task}), tmp_path)


def test_an_answer_that_is_the_same_for_all_training_rows(capsys, tmp_path, keys, monkeypatch):
    rows = [{**row, "useful": 0} for row in ROWS]
    task = write_task(tmp_path / "bad", rows, templates=[{"answer": "{{ [' bad', ' good'][useful] }}"}])
    words = arguments(**{**keys, "task": task, "template": 1, "train_size": 20})
    with monkeypatch.context() as patch:
        patch.setattr("zofo.commands.train.load_model", lambda *_: pytest.fail("loaded"))
        line = refused(capsys, words, tmp_path)
    assert "all 20 training rows of task task have the answer ' bad', so nothing is learned: check" in line
    assert main([*words, "--method", "none"]) == 0  # which trains on none of them
    assert "answers of" not in capsys.readouterr().out


def test_the_answers_of_the_training_rows_are_counted(capsys, keys):
    assert main(arguments(**{**keys, "train_size": 20})) == 0
    assert "answers of the 20 training rows: bad 10, good 10\n" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "message"), DATA.values(), ids=DATA)
def test_data_files(capsys, tmp_path, keys, content, message):
    (tmp_path / "task" / "rows.jsonl").write_bytes(content)
    assert message in refused(capsys, arguments(**keys), tmp_path)


BARE = {
    "alone": "{{ text }}",
    "with words": "{{ text }} It was",
    "a list inside": "{{ ['a', 'b'][label] }}",
    "a condition": "{% if label %}a{% endif %}",
}


@pytest.mark.parametrize("template", BARE.values(), ids=BARE)
def test_a_template_without_quotation_marks(capsys, tmp_path, template):
    file = tmp_path / "bare.yaml"
    file.write_text(f'source: rows.jsonl\nanswer: "good"\nprompt: {template}\n')
    line = refused(capsys, ["tasks", str(file)], tmp_path)
    assert "bare.yaml, line 3, is no valid YAML: put the template into quotation marks, since YAML reads" in line
    assert line.endswith(f"prompt: {template}")


def test_another_mistake_beside_a_template_is_told_as_it_is(capsys, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text('source: rows.jsonl\nprompt: |-\n  {{ text }} It was\nanswer: "x\n')
    assert "broken.yaml is no valid YAML: while scanning a quoted" in refused(capsys, ["tasks", str(file)], tmp_path)


def test_rows_that_are_too_few_to_hold_some_out(capsys, tmp_path, keys):
    (tmp_path / "task" / "rows.jsonl").write_text("".join(LINES[:4]))
    given = {**keys, "test_size": None, "dev_size": None}
    assert "no row is left for test: give more rows, or test_size" in refused(capsys, arguments(**given), tmp_path)
    scored = {"model": keys["model"], "task": keys["task"]}
    assert "has no row left for test: give more" in refused(capsys, arguments("eval", **scored), tmp_path)
    given |= {"test_size": 1, "eval_steps": 1}
    assert "no row is left for dev: give more rows, or dev_size" in refused(capsys, arguments(**given), tmp_path)


CONFIGS = {
    "broken YAML": (b"model: [", "is no valid YAML"),
    "a list": (b"- a\n", "is no config: it must hold lines like"),
    "empty": (b"", "is no config"),
    "another encoding": ("model: ä".encode("latin-1"), "is not UTF-8"),
    "a word that YAML reads as no": (b"text: false", "text is False, as YAML reads true and false: put it into quotes"),
    "a word that YAML reads as a number": (
        b"output_dir: 1.10",
        "output_dir is 1.1, as YAML reads a number: put it into quotes",
    ),
    "a nested value": (b"lower_steps: {a: 1}", "lower_steps is {'a': 1}, but takes one value"),
    "a list for a number": (b"lower_steps: [1, 2]", "lower_steps"),
    "a list for a text": (b"output_dir: [a, b]", "output_dir"),
    "a key that is a number": (b"3: 4", "unknown key '3'"),
    **{
        f"NUL in {key}": (
            f'{key}: "a\\0b"'.encode(),
            f"{key} is 'a\\x00b', which holds a NUL character: take it out",
        )
        for key in ("model", "task", "data", "source", "adapter", "adapter_init", "output_dir", "run_name")
    },
}


@pytest.mark.parametrize(("content", "message"), CONFIGS.values(), ids=CONFIGS)
def test_config_files(capsys, tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    assert message in refused(capsys, ["train", "--config", str(file)], tmp_path)


def test_config_files_that_are_not_there(capsys, tmp_path):
    assert "there is no config file none.yaml" in refused(capsys, ["train", "--config", "none.yaml"], tmp_path)
    assert "cannot read the config file" in refused(capsys, ["train", "--config", str(tmp_path)], tmp_path)
    assert "--config: expected one argument" in refused(capsys, ["train", "--config"], tmp_path)


def test_a_config_may_be_given_with_an_equals_sign(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("penlty: 1")
    assert "did you mean penalty?" in refused(capsys, ["train", f"--config={tmp_path / 'c.yaml'}"], tmp_path)


def no_causal_model(folder):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def no_tokenizer(folder):
    tiny_model(vocab_size=320).save_pretrained(folder)


def needs_its_own_code(folder):
    folder.mkdir()
    config = {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "code.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('the code ran')")
    (folder / "model.safetensors").write_bytes(b"")


def pickled(folder):
    no_tokenizer(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def truncated(folder):
    save_tiny_model(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def another_tokenizer(folder):
    save_tiny_model(folder)
    tiny_model(vocab_size=300).save_pretrained(folder)


MODELS = {
    "not there": (lambda folder: None, "there is no model at {model}: give a Hub id"),
    "an adapter": (
        lambda folder: (folder.mkdir(), (folder / "adapter_config.json").write_text("{}")),
        "{model} is an adapter, not a model: give the model that it was trained on",
    ),
    "no model folder": (lambda folder: folder.mkdir(), "{model} is no model folder: it has no config.json"),
    "no causal language model": (no_causal_model, "{model} is a t5 model, which is no causal language model"),
    "no tokenizer": (no_tokenizer, "{model} has no tokenizer that can be loaded"),
    "code of its own": (needs_its_own_code, "cannot load {model}: it needs trust_remote_code"),
    "a pickle": (pickled, "{model} holds no safetensors files; pytorch_model.bin is a pickle"),
    "truncated weights": (truncated, "{model}/model.safetensors is no complete safetensors file"),
    "another model's tokenizer": (another_tokenizer, "320 tokens and the model 300 embeddings"),
}


@pytest.mark.parametrize("verb", ["train", "eval"])
@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
def test_models(capsys, tmp_path, keys, make, message, verb):
    make(tmp_path / "model")
    given = {**keys, "model": tmp_path / "model"}
    if verb == "eval":
        given = {"model": tmp_path / "model", "task": keys["task"], "output": tmp_path / "scores.json"}
    assert message.format(model=tmp_path / "model") in refused(capsys, arguments(verb, **given), tmp_path)


def test_two_tasks_of_one_name(capsys, tmp_path, keys):
    second = write_task(tmp_path / "other")
    words = ["eval", "--model", str(keys["model"]), "--task", str(keys["task"]), str(second)]
    assert "two of the tasks are called" in refused(capsys, words, tmp_path)


EVAL = {
    "an adapter that is not there": (
        {"adapter": "none"},
        "none is no adapter: give a folder with",
    ),
    "an unknown split": ({"split": "valid"}, "invalid choice: 'valid' (choose from"),
    "no rows": ({"test_size": 0}, "test_size is 0, but must be greater than 0"),
    "a size that is no number": ({"test_size": "all"}, "test_size: invalid"),
    "more rows than exist": ({"test_size": 61}, "test_size is 61, but only 60 rows are left for it"),
    "an unknown task": ({"task": "tweet"}, "there is no task 'tweet': did you mean tweets?"),
    "an unknown option": ({"taks": "tweets"}, "zofo eval has no --taks: did you mean task?"),
    "an option of another verb": ({"method": "fo"}, "zofo eval has no --method: it is a key of zofo train"),
    "another library's name of a key": ({"max_seq_length": 9}, "zofo eval has no --max_seq_length: write max_length"),
    "samples of the harness": (
        {"task": None, "harness": "boolq", "log_samples": "{file}.jsonl"},
        "--log_samples is of zofo's own tasks",
    ),
    "no task": ({"task": None}, "task is not given: add --task; or --data with --text and --label"),
    "an output below a file": ({"output": "{file}/scores.json"}, "scores.json"),
    "an output that exists": ({"output": "{file}"}, "exists already and is not overwritten: give a new file"),
}


@pytest.mark.parametrize(("changes", "message"), EVAL.values(), ids=EVAL)
def test_eval(capsys, tmp_path, keys, changes, message):
    (tmp_path / "file").write_text("mine")
    given = {k: v.format(file=tmp_path / "file") if isinstance(v, str) else v for k, v in changes.items()}
    words = arguments("eval", **{"model": keys["model"], "task": keys["task"], "test_size": 5, **given})
    assert message in refused(capsys, words, tmp_path)


def test_verbs(capsys, tmp_path):
    assert "invalid choice: 'trian'" in refused(capsys, ["trian"], tmp_path)
    assert "required: --run, --output" in refused(capsys, ["merge"], tmp_path)


OTHERS = {
    "a key": (["tasks", "--data", "x.csv"], "zofo tasks has no --data: it is a key of zofo train"),
    "an option": (["tasks", "--split=dev"], "zofo tasks has no --split: it is an option of zofo eval"),
    "of no verb": (["tasks", "--qqqq"], "zofo tasks has no --qqqq: see zofo tasks --help"),
    "misspelt": (["tasks", "--souce", "a.csv"], "zofo tasks has no --souce: did you mean source?"),
    "misspelt in estimate": (["estimate", "--memory_onl"], "unknown key 'memory_onl': did you mean memory_only?"),
    "a word": (["tasks", "tweets", "sms_spam"], "unrecognized arguments: sms_spam; see zofo tasks --help"),
    "in merge": (["merge", "--run", "a", "--output", "b", "--data", "c"], "zofo merge has no --data: it is a key of"),
}


@pytest.mark.parametrize(("words", "message"), OTHERS.values(), ids=OTHERS)
def test_options_of_another_verb(capsys, tmp_path, words, message):
    assert message in refused(capsys, words, tmp_path)


def test_options_are_named_with_the_verb_that_has_them(capsys, tmp_path):
    from zofo import habits

    for name, verb in habits.OPTIONS.items():
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert f"--{name}" in capsys.readouterr().out


def test_the_installed_command_ends_the_same_way(tmp_path):
    words = ["train", "--penlty", "1", "--output_dir", str(tmp_path / "run")]
    found = subprocess.run([sys.executable, "-m", "zofo.cli", *words], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "zofo: unknown key 'penlty': did you mean penalty?\n"
    assert not (tmp_path / "run").exists()


def test_one_of_several_processes_is_refused(capsys, tmp_path, keys, monkeypatch):
    monkeypatch.setattr(ZOFOConfig, "world_size", 2)
    assert "this is one of 2 processes" in refused(capsys, arguments(**keys), tmp_path)


@pytest.mark.full
def test_a_run_that_torchrun_has_started_is_refused(tmp_path, keys):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "zofo.cli"]
    found = subprocess.run([*launch, *arguments(**keys)], capture_output=True, text=True, timeout=120)
    assert found.returncode != 0
    assert "zofo: this is one of 2 processes" in found.stderr
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def nobody_reads():
    """Standard output and error go to a pipe whose reader has gone, through buffers as those of a real process."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as out, open(os.dup(write), "w", buffering=1) as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
        out.write("what is still in the buffers at the end goes nowhere")


def test_work_is_done_also_where_nobody_reads_what_it_says(tmp_path, keys):
    scores = tmp_path / "scores.json"
    with nobody_reads():
        assert main(arguments(**keys)) == 0
        assert main(["eval", "--run", str(tmp_path / "run"), "--output", str(scores)]) == 0
        assert main(arguments(**keys)) == 2  # the folder holds a run now
        assert main(["tasks"]) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["upper"]["rows"] == 10
    assert json.loads(scores.read_text())["tasks"]["task"]["rows"] == 10


def test_a_broken_pipe_of_the_work_itself_is_no_success(capsys, monkeypatch, tmp_path, keys):
    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("zofo.training.trainer.ZOFOTrainer.training_step", broken)
    assert "Broken pipe" in failed(capsys, arguments(**keys))


def test_the_run_that_all_these_are_changes_of_works(capsys, tmp_path, keys):
    assert main(arguments(**keys)) == 0
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["upper"]["rows"] == 10
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("the server hung up"), "zofo: the server hung up\n"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), "No space left on device: f; free space or choose"),
    ],
)
def test_errors_of_the_system_are_one_line(capsys, monkeypatch, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr("zofo.commands.tasks.listing", fail)
    assert main(["tasks"]) == 2
    assert said in capsys.readouterr().err
