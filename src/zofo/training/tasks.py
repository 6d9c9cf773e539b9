"""The tasks of a run: which of them an iteration reads, and how the method's steps on them become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from zofo.config import ZOFOConfig
from zofo.errors import NonFiniteLossError
from zofo.methods.bank import AdapterBank
from zofo.methods.method import Bundle, Logs, Method
from zofo.scoring.generation import AnswerSpan
from zofo.scoring.tokens import Example
from zofo.tasks.metrics import Metric
from zofo.tasks.records import Record
from zofo.training.bundles import sizes_of
from zofo.training.draws import Draws

Scores = dict[str, dict[str, float]]
"""{adapter: {metric, loss, rows}}."""

ALONE = ""
"""The name of a run's only task."""


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task: for training, by split, and for evaluations."""

    train: Mapping[str, list[Record]]
    dev: list[Record]


@dataclass(frozen=True)
class RunTask:
    """A task of a run: its training rows by split, its rows for evaluations, and how its answers are scored."""

    train: Mapping[str, Sequence[Example]]
    dev: Sequence[Example]
    metrics: tuple[Metric, ...]
    span: AnswerSpan

    @property
    def examples(self) -> list[Example]:
        """All training rows, split after split."""
        return [example for rows in self.train.values() for example in rows]

    @property
    def sizes(self) -> dict[str, int]:
        """Training rows by split."""
        return {split: len(rows) for split, rows in self.train.items()}


def draws_of(keys: ZOFOConfig, tasks: Sequence[Mapping[str, int]]) -> Draws:
    """Which tasks each iteration reads, by the keys."""
    exponent = {"uniform": 0.0, "size": 1.0, "temperature": keys.task_exponent}[keys.task_sampling]
    return Draws(sizes_of(tasks), keys.tasks_per_step, exponent, keys.seed)


class Joint:
    """A step over the tasks of an iteration: the backbone gets the mean of their estimates, along the same directions.

    Each task's adapters make their own steps, all at one θ. A shared adapter, or a model without adapters, gets the
    mean of the tasks' gradients.
    """

    def __init__(self, method: Method, tasks: Mapping[str, RunTask], draws: Draws) -> None:
        self._method = method
        self._tasks = dict(tasks)
        self._names = list(tasks)
        self.draws = draws
        self.bank = AdapterBank(method.adapter_levels, self._names, method.keys.shared_adapter)

    def step(self, number: int, progress: float, micro: Sequence[Sequence[Bundle]]) -> Logs:
        """Prepares iteration `number`, as `Method.step` does; `micro` has the bundles of its tasks by micro-step.

        Raises:
            NonFiniteLossError: if a loss is not finite; with `on_nonfinite: skip` all adapters are as before then.
        """
        drawn = [self._names[index] for index in self.draws.of(number)]
        restores = len(drawn) > 1 and self._method.keys.on_nonfinite == "skip"
        before = self.bank.kept() if restores else None
        found: list[Logs] = []
        try:
            for place, task in enumerate(drawn):
                if place:
                    self.bank.step()
                self.bank.use(task)
                if self._method.black_box:
                    self._method.black_box.use(self._tasks[task].span)
                found.append(self._method.step(number, progress, [bundles[place] for bundles in micro]))
        except NonFiniteLossError:
            self._method.skip()
            if before is not None:
                self.bank.put_back(before)
            raise
        if len(drawn) > 1 and not self.bank.exchanges:
            _average(self._method.optimizer, len(drawn))
        return _means(found)


def mean_scores(each: Sequence[Scores]) -> Scores:
    """The mean over tasks of what all of them report, by adapter; of `rows`, the sum.

    Examples:
        >>> of = lambda accuracy: {"upper": {"accuracy": accuracy, "rows": 50}}
        >>> mean_scores([of(0.5), of(1.0)])
        {'upper': {'accuracy': 0.75, 'rows': 100}}
    """
    if len(each) == 1:
        return each[0]
    found: Scores = {}
    for adapter in each[0]:
        values = {key: [task[adapter][key] for task in each if key in task[adapter]] for key in each[0][adapter]}
        shared = {key: own for key, own in values.items() if len(own) == len(each)}
        found[adapter] = {key: sum(own) if key == "rows" else sum(own) / len(own) for key, own in shared.items()}
    return found


def _average(optimizer: Optimizer, count: int) -> None:
    """Sums of gradients become means."""
    for parameter in {id(p): p for group in optimizer.param_groups for p in group["params"]}.values():
        if parameter.grad is not None:
            parameter.grad /= count


def _means(found: Sequence[Logs]) -> Logs:
    """The mean of each value over the tasks that have it."""
    values = {key: [logs[key] for logs in found if key in logs] for logs in found for key in logs}
    return {key: sum(each) / len(each) for key, each in values.items()}
