"""The command line as a test sees it: run a command in this process, and hold it to the rules for bad input."""

import json

from zofo.cli import main

OPTIONS = [" bad", " good"]
TASK = {
    "source": "rows.jsonl",
    "prompt": "{{ text }} It was",
    "answer": "{{ [' bad', ' good'][label] }}",
    "options": OPTIONS,
}
ROWS = [{"text": f"the film {n} was {'great' if n % 2 else 'terrible'}", "label": n % 2} for n in range(60)]
# two steps of a second in all
QUICK = {
    "method": "fo", "max_steps": 2, "per_device_train_batch_size": 4, "dev_size": 10, "test_size": 10,
    "save_strategy": "no", "lower_steps": 1, "disable_tqdm": "true", "use_cpu": "true",
}  # fmt: skip


def write_task(folder, rows=ROWS, **changes):
    """A task file with its rows; a change to None removes the key."""
    folder.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {key: value for key, value in {**TASK, **changes}.items() if value is not None}
    file = folder / "task.yaml"
    file.write_text(json.dumps(spec), encoding="utf-8")  # JSON is YAML
    return file


def arguments(verb="train", /, **keys):
    """`--key value` for each key; None leaves a key out."""
    words = [verb]
    for key, value in keys.items():
        words += [] if value is None else [f"--{key}", str(value)]
    return words


def snapshot(folder):
    """Every path below a folder, and what the files hold."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys, words, folder, status=2):
    """Runs a command that must fail: returns its one line, after checking that nothing below `folder` changed."""
    before = snapshot(folder)
    line = failed(capsys, words, status)
    assert snapshot(folder) == before
    return line


def failed(capsys, words, status=2):
    """Runs a command that must fail, and returns its one line on standard error."""
    capsys.readouterr()
    assert main(words) == status
    said = capsys.readouterr().err
    assert said.startswith("zofo: "), said
    assert said.endswith("\n"), said
    assert said.count("\n") == 1, said
    assert "Traceback" not in said, said
    return said[len("zofo: ") : -1]
