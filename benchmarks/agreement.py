"""Do scores agree with lm-evaluation-harness, and with a plain scorer that reads one candidate in one forward?

    python benchmarks/agreement.py FOLDER        # of folders named after tasks, with rows of the Hub's field names

Needs the extra `harness`. Writes `benchmarks/results/agreement-<machine>.json`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from timing import MODEL, write
from zofo.models.adapters import AdaptedModel
from zofo.models.load import load_model
from zofo.scoring.evaluation import Evaluator, by_length, option_totals
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import Example, tokenize
from zofo.tasks.records import Record
from zofo.tasks.task import Task, load_task, task_names

ROWS = 16
CANDIDATES = 64  # a task with many options gets fewer rows
GENERATED = 4
LENGTH = 768


def pairs(record: Record) -> list[tuple[str, str]]:
    """(what is read, what is scored) of each candidate, as text."""
    behind = record.suffix
    if record.partial:
        return [(record.prompt + option, behind) for option in record.options]
    return [(record.prompt, option + behind) for option in record.options]


@torch.no_grad()
def plain(model: Any, tokenizer: Any, read: str, scored: str) -> float:
    """Log P(scored | read), from one forward over one candidate, with all logits, in the model's own precision."""
    ids = tokenizer(read + scored, return_offsets_mapping=True)
    tokens = torch.tensor([ids["input_ids"]])
    logs = model(tokens).logits[0].log_softmax(-1)
    first = next(i for i, (_, end) in enumerate(ids["offset_mapping"]) if end > len(read))
    return sum(float(logs[i - 1, tokens[0, i]]) for i in range(first, tokens.shape[1]))


def apart(task: Task, records: list[Record]) -> tuple[int, list[Record]]:
    """The first template whose prompts end in a word: the harness scores white space at their end as well."""
    for number in range(len(task.templates)):
        worded = task.reworded(records, number)
        if not any(read[-1:].isspace() for record in worded for read, _ in pairs(record)):
            return number, worded
    raise AssertionError("every template ends in white space")


def ours(scorer: Scorer, tokenizer: Any, examples: Sequence[Example]) -> list[list[float]]:
    """The same of all candidates, as zofo computes them: in batches, as many options in a row as fit."""
    found: dict[int, list[float]] = {}
    for numbers in by_length(examples, 8, "options"):
        sums = option_totals(scorer, [examples[i] for i in numbers], tokenizer).sums.tolist()
        found.update({i: own[: len(examples[i].answers)] for i, own in zip(numbers, sums, strict=True)})
    return [found[i] for i in range(len(examples))]


def asked(lm: HFLM, kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What the harness answers to requests of one kind."""
    made = [Instance(kind, {}, request, i) for i, request in enumerate(arguments)]
    return list(lm.loglikelihood(made) if kind == "loglikelihood" else lm.generate_until(made))


def accuracy(records: Sequence[Record], totals: Sequence[Sequence[float]]) -> float:
    """The share of rows whose likeliest candidate is right."""
    best = [r.options[max(range(len(own)), key=own.__getitem__)] for r, own in zip(records, totals, strict=True)]
    return sum(choice in r.right for choice, r in zip(best, records, strict=True)) / len(records)


def compare_options(scorer: Scorer, lm: HFLM, tokenizer: Any, name: str, records: list[Record]) -> dict[str, Any]:
    """The largest differences of log-probabilities over all candidates, and the metric by all three."""
    examples, cut = tokenize(records, tokenizer, LENGTH)
    assert not cut, "a cut row is read differently by each"
    own = ours(scorer, tokenizer, examples)
    texts = [pair for record in records for pair in pairs(record)]
    harness = [value for value, _ in asked(lm, "loglikelihood", texts)]
    alone = [plain(scorer.adapted.model, tokenizer, *pair) for pair in texts]
    flat = list(itertools.chain.from_iterable(own))
    sizes = iter(harness)
    theirs = [[next(sizes) for _ in record.options] for record in records]
    found = Evaluator(scorer, tokenizer, ["accuracy"], "options", batch_size=8, scoring="sum").evaluate(examples)
    return {
        "task": name,
        "rows": len(records),
        "candidates": len(flat),
        "largest difference to the harness": max(abs(a - b) for a, b in zip(flat, harness, strict=True)),
        "largest difference to one forward each": max(abs(a - b) for a, b in zip(flat, alone, strict=True)),
        "accuracy": found["accuracy"],
        "accuracy of the harness's log-probabilities": accuracy(records, theirs),
    }


def compare_texts(scorer: Scorer, lm: HFLM, tokenizer: Any, name: str, records: list[Record]) -> dict[str, Any]:
    """Exact match and token F1 of greedy answers, and of the harness's answers to the same prompts."""
    examples, _ = tokenize(records, tokenizer, LENGTH)
    metrics = ["exact_match", "token_f1"]
    found = Evaluator(scorer, tokenizer, metrics, "lm", batch_size=8).evaluate(examples)
    until = {"until": ["\n"], "max_gen_toks": 50, "do_sample": False}
    answers = [text.strip() for text in asked(lm, "generate_until", [(r.prompt, until) for r in records])]
    from zofo.tasks.metrics import score

    references = [record.right for record in records]
    theirs = {metric: score(metric, answers, references) for metric in metrics}
    return {"task": name, "rows": len(records), **{m: found[m] for m in metrics}, "of the harness's answers": theirs}


def main(folder: Path) -> None:
    """Compares on every task that has a folder."""
    model, tokenizer = load_model(MODEL, "float32")
    scorer = Scorer(AdaptedModel(model), Tokens())
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=LENGTH)
    found: list[dict[str, Any]] = []
    for name in task_names():
        if not (folder / name).is_dir():
            continue
        task = load_task(name, str(folder / name))
        splits = task.records()
        records = [r for r in splits.get("test") or next(iter(splits.values())) if len(r.prompt) < 2 * LENGTH]
        if task.has_options:
            rows = max(4, min(ROWS, CANDIDATES // len(records[0].options)))
            number, worded = apart(task, records[:rows])
            found.append({"template": number, **compare_options(scorer, lm, tokenizer, name, worded)})
        else:
            found.append(compare_texts(scorer, lm, tokenizer, name, records[:GENERATED]))
        print(found[-1], flush=True)
    write("agreement", {"model": MODEL, "tasks": found})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
