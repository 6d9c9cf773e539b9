"""The Python of the README runs as it stands, on a tiny model in place of the one from the Hub."""

import re
from pathlib import Path

from tiny import save_tiny_model

README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert code.count("Qwen/Qwen3-0.6B") == 2
    model = save_tiny_model(tmp_path / "model", "qwen3")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("Qwen/Qwen3-0.6B", str(model)), {})
    found = {folder.name for folder in (tmp_path / "run").iterdir()}
    assert {"backbone", "upper"} <= found
    assert "lower" not in found
