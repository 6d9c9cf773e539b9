"""What `ZOFOTrainer` evaluates: each task with its own adapters, on rows that no level trains on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from zofo.errors import ZofoError
from zofo.methods.method import Method
from zofo.models.peft import UPPER
from zofo.scoring.evaluation import Answer, Evaluator, require_numbers, require_scorable
from zofo.scoring.generation import AnswerSpan
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import Example, tokenize
from zofo.tasks.metrics import Metric
from zofo.tasks.prompts import as_chat
from zofo.tasks.records import Record, Rows, questions
from zofo.tasks.rewards import Rewards
from zofo.training import given_rows, objective
from zofo.training.diagnosis import Diagnosis
from zofo.training.storing import StoringTrainer
from zofo.training.tasks import ALONE, Scores, mean_scores


class EvaluatingTrainer(StoringTrainer):
    """Evaluations and predictions of the tasks of a run."""

    longest: int  # tokens that the model can read
    truncated: int
    rewards: Rewards | None
    _layout: Any
    _diagnosis: Diagnosis | None
    method: Method

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Of the task in use."""
        return self._task.metrics

    @metrics.setter
    def metrics(self, metrics: Sequence[Metric]) -> None:
        name = next(name for name, task in self.tasks.items() if task is self._task)
        self._task = self.tasks[name] = replace(self._task, metrics=tuple(metrics))

    @property
    def span(self) -> AnswerSpan:
        """How long the answers of the task in use are."""
        return self._task.span

    def examples(self, rows: Sequence[Record]) -> list[Example]:
        """Tokenises rows for this model; `truncated` counts those whose prompt was cut."""
        if not rows:
            return []
        made, cut = tokenize(self.posed(rows), self._tokenizer, self.longest)
        self.truncated += cut
        return made

    def posed(self, rows: Sequence[Record]) -> Sequence[Record]:
        """The rows as this run puts them to the model."""
        if not self.args.chat_template:
            return rows
        return [as_chat(row, self._tokenizer, self.args.system_prompt) for row in rows]

    def require_scorable(self, rows: Sequence[Example]) -> None:
        """Refuses rows that `evaluate` could not score."""
        require_scorable(self.adapted, self.metrics, rows)
        objective.require_rewardable(self.rewards, self.adapted, self.span, rows)

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metric and loss of every adapter: `eval_loss` of the deployed one, `eval_lower_loss` of another lower one.

        Of several tasks these are means, and each one's own come with its name, as in `eval_NAME_loss`.
        """
        each = self._scores_of_tasks() if eval_dataset is None else {}
        if eval_dataset is not None:
            each[ALONE] = self._scored_aloud(self.examples(given_rows.rows_of(self.args, eval_dataset, "eval_dataset")))
        if not each:
            raise ZofoError("there is nothing to evaluate on: pass eval_dataset to ZOFOTrainer")
        metrics = _named(mean_scores([*each.values()]), metric_key_prefix)
        for name, scores in each.items() if len(each) > 1 else ():
            metrics |= _named(scores, f"{metric_key_prefix}_{name}")
        self.log(metrics)
        if self._diagnosis and self.is_in_train and self.method.zeroth_order_level:
            self.log(self._diagnosis.measure(self.state.global_step, self.state.global_step / self.state.max_steps))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _scores_of_tasks(self) -> dict[str, Scores]:
        """Of each task on its own rows, with its own adapters."""
        return {name: self._scored_aloud(self.tasks[name].dev) for name in self.each_task() if self.tasks[name].dev}

    def _scored_aloud(self, rows: Sequence[Example]) -> Scores:
        """The scores of rows; with rewards, it shows a few completions."""
        found: Scores = {}
        for adapter, (scores, answers) in self.scored(rows).items():
            for line in objective.shown(rows, answers) if self.rewards else ():
                tqdm.write(f"{adapter}: {line}")
            found[adapter] = scores
        return found

    def score(self, rows: Sequence[Example], adapters: Sequence[str] = ()) -> dict[str, dict[str, float]]:
        """{adapter: {metric, loss, rows}}; a model without adapters counts as `upper`, which is what is deployed."""
        return {adapter: scores for adapter, (scores, _) in self.scored(rows, adapters).items()}

    def scored(
        self, rows: Sequence[Example], adapters: Sequence[str] = ()
    ) -> dict[str, tuple[dict[str, float], list[Answer]]]:
        """The same with the answers that were scored."""
        found: dict[str, tuple[dict[str, float], list[Answer]]] = {}
        with self.adapted.deployed_after():
            for adapter in adapters or self.adapted.adapters or (UPPER,):
                self.adapted.use(adapter)
                evaluator = self._evaluator(f"evaluate {adapter}")
                answers = evaluator.answers(rows)
                found[adapter] = evaluator.measure(rows, answers), answers
        return found

    def score_backbone(self, rows: Sequence[Example]) -> dict[str, float]:
        """The scores of the backbone alone: before training, the zero-shot ones."""
        with self.adapted.without_adapter():
            return self._evaluator("evaluate the backbone").evaluate(rows)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, test_dataset: Rows, ignore_keys: Any = None, metric_key_prefix: str = "test"
    ) -> list[Answer]:
        """What the deployed adapter answers to rows with a `prompt`, and perhaps `options`: in their order.

        Raises:
            ZofoError: if a row has no prompt, or text cannot be generated with this adapter.

        Examples:
            `[answer.text for answer in trainer.predict([{"prompt": "a dull film. It was", "options": [" bad", ...]}])]`
        """
        rows = questions(test_dataset, self.span.example)
        if not rows:
            return []
        examples = self.examples(rows)
        asked = {len(example.answers) > 1 for example in examples}
        if len(asked) > 1 and not self.rewards:
            raise ZofoError("some rows have options to choose from, and others have none: predict these apart")
        metrics = ["accuracy" if asked == {True} and not self.rewards else "exact_match"]
        with self.adapted.deployed_after():
            self.adapted.use(UPPER)
            answers = self._evaluator("predict", metrics).unrewarded(examples)
        require_numbers(answers)
        return answers

    def _evaluator(self, progress: str = "", metrics: Sequence[str] = ()) -> Evaluator:
        return Evaluator(
            Scorer(self.adapted, Tokens(), self._layout),
            self._tokenizer,
            metrics or self.metrics,
            self.args.loss,
            self.args.per_device_eval_batch_size,
            place=lambda batch: self._prepare_inputs(batch),
            scoring="channel" if self.args.is_channel else "mean",
            span=self.span,
            progress="" if self.args.disable_tqdm else progress,
            rewards=self.rewards,
        )


def _named(scores: Mapping[str, Mapping[str, float]], prefix: str) -> dict[str, float]:
    """The scores of all adapters, by the names under which they are logged."""
    return {
        f"{prefix if adapter == UPPER else f'{prefix}_{adapter}'}_{key}": value
        for adapter, own in scores.items()
        for key, value in own.items()
    }
