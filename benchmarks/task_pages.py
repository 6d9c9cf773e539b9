"""Writes `docs/task-pages.md`: what `zofo tasks NAME` prints for three built-in tasks.

python benchmarks/task_pages.py
"""

from __future__ import annotations

from pathlib import Path

from zofo.commands.tasks import page

FILE = Path(__file__).parents[1] / "docs" / "task-pages.md"
TASKS = ("movie_reviews", "question_types", "sms_spam")
_HEAD = """# What a model sees: three built-in tasks

Written by `python benchmarks/task_pages.py`: the output of `zofo tasks NAME`, which works for every
task, one of yours too. Lines behind a bar are the prompt; an option follows it without anything between.
"""


def document() -> str:
    """The page as Markdown."""
    pages = [f"## `zofo tasks {name}`\n\n```text\n{page(name)}\n```\n" for name in TASKS]
    return "\n".join([_HEAD, *pages])


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
