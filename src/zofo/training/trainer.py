"""`ZOFOTrainer`: transformers' `Trainer` with another step, and with the backbone in what it saves and loads."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput

from zofo.config import ZOFOConfig
from zofo.errors import NonFiniteLossError, ZofoError
from zofo.keys import name_of
from zofo.methods.first_order_optimizers import require_optimizer
from zofo.methods.method import Bundle
from zofo.scoring.batch import padding_id
from zofo.scoring.evaluation import require_scorable
from zofo.scoring.generation import AnswerSpan
from zofo.scoring.padding import probe, random_batch
from zofo.scoring.scorer import Scorer
from zofo.scoring.tokens import Example
from zofo.tasks.metrics import OPTION_METRICS, Metric
from zofo.tasks.prompts import chat_identity
from zofo.tasks.records import Record, digest
from zofo.training import given_rows, objective, start
from zofo.training.bundles import BundleCollator, IterationSampler, planned_steps
from zofo.training.callbacks import Cost, LossBar, own_callbacks
from zofo.training.checkpoint import (
    is_of,
    last_sealed,
    loading,
    require_optimizer_state,
    require_same,
    require_same_selection,
    require_whole,
    siblings,
    steps_of,
)
from zofo.training.diagnosis import Diagnosis
from zofo.training.evaluating import EvaluatingTrainer
from zofo.training.folder import owned
from zofo.training.given_rows import Metrics, TasksOrRows
from zofo.training.interrupt import Interrupt
from zofo.training.rehearsal import require_schedule_and_batches
from zofo.training.tasks import Joint, RunTask, TaskRows, draws_of
from zofo.training.trained_rows import digests, rows_of_folders
from zofo.training.trial import Trial, trial

_SKIPPED_IN_A_ROW = 20


class ZOFOTrainer(EvaluatingTrainer):
    """Trains a backbone, its adapters, or both, by the method that `args` names.

    Args:
        model: the backbone, or what `load_model` takes, or a `PeftModel` with one adapter, whose values the run starts
            from. It is changed in place.
        args: the configuration.
        train_dataset: rows with `prompt`, `completion` and, for a loss over options, `options`; or conversations, with
            `messages`: a list of dicts, a datasets.Dataset or a pandas DataFrame; of several tasks, a dict of them by
            names. With method bilevel and without `upper_dataset`, `args.lower_fraction` of them go to the lower level,
            the others to the upper; if that is shared, both levels read all rows of both data sets.
        upper_dataset: rows of the upper level; methods without levels train on both together.
        eval_dataset: rows for model selection, which no level trains on.
        processing_class: the tokenizer; loaded with the model if not given.
        peft_config: of the adapter; by default what `args.adapter` names.
        metrics: of evaluations, the first one decides; by default accuracy for rows with options, else exact_match. A
            function (predictions, references) -> number counts as well. A dict has those of each task.
        callbacks: more transformers callbacks.
        reward_funcs: functions as trl's trainers take them, in place of `args.reward`: measured in evaluations, and
            followed with `args.objective` reward.
        others: refused, with what to write for arguments of other trainers.

    Raises:
        ZofoError: if these do not go together, before any work.

    Examples:
        In the README, under Usage; `zofo.commands.train.train` is a complete run.

    References:
        R. Shirkavand et al., "Bilevel ZOFO" (arXiv 2502.03604).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
        args: ZOFOConfig | None = None,
        train_dataset: TasksOrRows | None = None,
        upper_dataset: TasksOrRows | None = None,
        eval_dataset: TasksOrRows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        metrics: Metrics | Mapping[str, Metrics] = (),
        callbacks: list[TrainerCallback] | None = None,
        reward_funcs: objective.RewardFuncs | None = None,
        **others: Any,
    ) -> None:
        args = start.require_config(type(self), args, others)
        self.rewards = objective.run_rewards(args, reward_funcs)
        set_seed(args.seed)
        self.adapted, processing_class, kind = start.starting_model(model, args, processing_class, peft_config)
        rows = given_rows.rows_of_tasks(args, train_dataset, upper_dataset, eval_dataset)
        self._identify(args, processing_class, kind, [part for task in rows.values() for part in task.train.values()])
        scored_by = given_rows.metrics_of_tasks(args, metrics, rows, rewarded=self.rewards is not None)
        if args.method_class.backpropagates:
            require_optimizer(args)
        self.args = args
        self.cost = Cost()
        self.truncated = 0
        self._tokenizer = processing_class
        self.longest = min(args.max_length, self.adapted.positions)
        self.tasks = {name: self._run_task(name, task, scored_by[name]) for name, task in rows.items()}
        self._task = next(iter(self.tasks.values()))
        evaluated = [example for task in self.tasks.values() for example in task.dev]
        args.settle_evaluations(len(evaluated))
        config = self.adapted.base.config
        use_cache = config.use_cache
        with start.setting_up(args):
            super().__init__(
                model=self.adapted.model,
                args=args,
                train_dataset=cast(Any, [example for task in self.tasks.values() for example in task.examples]),
                eval_dataset=cast(Any, evaluated or None),
                processing_class=processing_class,
                callbacks=[*own_callbacks(self.cost, self.adapted.base, args), *(callbacks or [])],
            )
        config.use_cache = use_cache  # the trainer switches it off for good, in what is saved too
        if self.pop_callback(ProgressCallback):
            self.add_callback(LossBar())
        self._interrupt = Interrupt()
        self.add_callback(self._interrupt)
        self._make_method(args, processing_class)
        self._diagnosis = self._diagnose() if args.diagnose and args.method_class.trains() else None
        self._micro: list[list[Bundle]] = []
        self._logs: dict[str, list[float]] = defaultdict(list)
        self._rates: dict[str, float] = {}  # of the last step, before the scheduler changed them
        self._skipped = self._skipped_in_a_row = 0
        self._own_checkpoints = set()
        self._resumable: Path | None = None  # the checkpoint that was found to be whole
        self._whole = None
        self.notes: dict[str, Any] = {}

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Whether `save_strategy: best` saves: after Ctrl-C in any case."""
        return super()._determine_best_metric(metrics, trial) or self._interrupt.asked

    def _identify(
        self,
        args: ZOFOConfig,
        tokenizer: PreTrainedTokenizerBase,
        kind: str | None,
        parts: Sequence[Sequence[Record]],
    ) -> None:
        """What a checkpoint must have in common with this run, and the rows that its model has seen, in the end."""
        chat = {"chat_template_digest": chat_identity(tokenizer)} if args.chat_template else {}
        rows = [digest(part, columns=self.rewards is not None) for part in parts]
        functions = {"reward_funcs": [*self.rewards.functions]} if self.rewards and not args.reward else {}
        self.identity = {**args.identity(), "peft_config": kind, **chat, **functions, "rows": rows}
        self.trained_rows = rows_of_folders(self.adapted.base.config.name_or_path, args.adapter_init)
        if args.method_class.trains():
            self.trained_rows |= digests([row for part in parts for row in part])

    def _make_method(self, args: ZOFOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """The method, with who measures its objective, after one try of its forwards."""
        if args.method_class.zeroth_order:
            start.warm_up(self.adapted)
        self._layout = probe(self.adapted, tokenizer)
        scorer = Scorer(self.adapted, self.cost, self._layout)
        black_box = objective.black_box(args, self._evaluator(), scorer)
        self.method = args.method_class(self.adapted, scorer, args, black_box)
        if args.method_class.zeroth_order:
            batch: Any = random_batch(self.adapted, tokenizer, self.method.scorer.layout)
            self.method.require_forwards(cast(Any, self._prepare_inputs(batch)))
        self._joint = Joint(self.method, self.tasks, draws_of(args, self._sizes))

    def _run_task(self, name: str, rows: TaskRows, metrics: tuple[Metric, ...]) -> RunTask:
        """The rows of a task as examples, which must be enough for a batch and fit its metrics."""
        train = {split: self.examples(part) for split, part in rows.train.items()}
        every = [example for part in train.values() for example in part]
        span = objective.answer_span(self.args, AnswerSpan.of(every, self._tokenizer), self.rewards is not None)
        task = RunTask(train, self.examples(rows.dev), metrics, span)
        given_rows.require_rows_for_a_batch(self.args, task.sizes, name)
        scored = [*every, *task.dev] if self.rewards else task.dev
        require_scorable(self.adapted, metrics, scored)
        if self.args.objective in OPTION_METRICS:  # which steps of θ compute of training rows
            require_scorable(self.adapted, (self.args.objective,), every)
        objective.require_rewardable(self.rewards, self.adapted, span, scored)
        return task

    @property
    def _sizes(self) -> list[dict[str, int]]:
        return [task.sizes for task in self.tasks.values()]

    def require_resumable(self, folder: Path) -> None:
        """Refuses a checkpoint that this run cannot go on from, or that is none."""
        if folder == self._resumable:
            return  # reading every byte once is enough
        content = require_whole(folder)
        require_same(content["config"], self.identity, folder)
        require_same_selection(content, self.selection, folder)
        with loading(folder):
            Cost(**content["cost"])
        if steps_of(folder) < self.planned_steps():
            require_optimizer_state(folder)
        self._resumable = folder

    def require_trainable(self) -> None:
        """Makes the schedule and one batch, as training will, so that what cannot work is said before any work."""
        try:
            require_schedule_and_batches(
                self.create_optimizer(),
                schedule=lambda: self.create_scheduler(self.planned_steps()),
                batch=lambda: next(iter(self.get_train_dataloader())),
            )
        finally:
            self.lr_scheduler, self._created_lr_scheduler = None, False

    def try_step(self) -> Trial | None:
        """Runs two steps and takes them back: what `trial` says of the longest rows, and of the first ones.

        None where a loss is not finite, and with `optimizer_in_backward`, whose steps cannot be taken back.
        """
        if self.args.optimizer_in_backward:
            return None
        rows, batch = list[Example](cast(Any, self.train_dataset)), self._collate()
        return trial(self.method, self.args, self.cost, rows, lambda part: cast(Any, self._prepare_inputs(batch(part))))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item is one micro-step with all its batches, so that Trainer's resuming and accumulation just work."""
        args, (sampler, collator) = self.args, self._order()
        loader: DataLoader[Any] = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def _order(self) -> tuple[IterationSampler, BundleCollator]:
        """Which rows go into which micro-step, and what makes its batches of them."""
        args = self.args
        streams, size = self.method.streams(args), args.per_device_train_batch_size
        accumulation, draws = args.gradient_accumulation_steps, self._joint.draws
        sampler = IterationSampler(self._sizes, streams, size, accumulation, args.seed, draws)
        return sampler, BundleCollator(streams, size, self._collate(), draws.per_step)

    def _collate(self) -> Any:
        """What makes a batch of examples."""
        manner = {"pad_id": padding_id(self._tokenizer), "layout": self.method.scorer.layout}
        return partial(objective.collator(self.args), kind=self.args.loss, **manner)

    def _diagnose(self) -> Diagnosis:
        """On the rows of the first micro-step."""
        sampler, collator = self._order()
        rows: list[Example] = list(cast(Any, self.train_dataset))
        bundle: Any = collator([rows[i] for i in next(iter(sampler))])[0]
        return Diagnosis(self.method, cast(Any, self._prepare_inputs(bundle)))

    def create_optimizer(self, model: Any = None) -> Any:
        """The method's own."""
        self.optimizer = self.method.optimizer
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Collects micro-steps; at the last one of an iteration, lets the method prepare the optimizer's step."""
        self._micro.append(inputs)
        nothing = torch.zeros((), device=self.args.device)
        if not self.accelerator.sync_gradients:
            return nothing
        micro = [self._prepare_inputs(cast(Any, bundle)) for bundle in self._micro]
        self._micro.clear()
        number = self.state.global_step
        try:
            logs = self._joint.step(number, number / self.state.max_steps, cast(Any, micro))
        except NonFiniteLossError:
            if self.args.on_nonfinite == "raise":
                raise
            self._skipped += 1
            self._skipped_in_a_row += 1
            _require_progress(self._skipped_in_a_row, number, self.state.max_steps)
            return nothing
        self._skipped_in_a_row = 0
        self._rates = dict(self.method.learning_rates())
        for key, value in logs.items():
            self._logs[key].append(value)
        return nothing + logs["loss"]

    def _forget_iteration(self) -> None:
        """Drops what an iteration that was cut short has left, as where Ctrl-C ended `train` in a notebook."""
        self.method.optimizer.zero_grad()
        self._micro.clear()
        self._logs.clear()
        if self.method.black_box:
            self.method.black_box.taken()

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: a bilevel step has no formula of its own in Trainer. `cost` counts tokens instead."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the method's own values, and every learning rate by its name."""
        if "loss" in logs:
            if self._skipped:
                logs["skipped_steps"] = self._skipped
            if not self._logs:
                del logs["loss"]  # all of them were skipped, and 0 would be no loss
            if logs.get("grad_norm") == 0:
                del logs["grad_norm"]  # Trainer looks for gradients when the method's step has freed them
            logs.update({key: sum(values) / len(values) for key, values in self._logs.items()})
            self._logs.clear()
            self._skipped = 0
            logs.update(self._rates)
            logs.update(self.method.signal_to_noise())
        super().log(logs, start_time)

    def train(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Trains as `Trainer.train` does; only a complete checkpoint of the same configuration is resumed from.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last complete one in `output_dir`.
            trial: as in Trainer.
            ignore_keys_for_eval: as in Trainer.

        Raises:
            ZofoError: if there is no such checkpoint, or it is incomplete, damaged, of another configuration or other
                rows; and at a loss that is not finite, unless `on_nonfinite` is skip.
            KeyboardInterrupt: after Ctrl-C, once the last whole step has a checkpoint; a second one does not wait.
        """
        self._whole = None
        self._forget_iteration()
        run = Path(str(self.args.output_dir))
        if resume_from_checkpoint:
            last = resume_from_checkpoint is True
            folder = last_sealed(run) if last else Path(str(resume_from_checkpoint)).expanduser()
            self.require_resumable(folder)
            self._own_checkpoints = siblings(folder, run, self.identity)
            self._whole = folder if is_of(folder, run) else None
            resume_from_checkpoint = str(folder)
        with owned(run), self.adapted.deployed_after():
            try:
                if resume_from_checkpoint and self._is_finished(resume_from_checkpoint, self.planned_steps()):
                    return TrainOutput(self.state.global_step, 0.0, {})
                with self._interrupt.listening(saves=name_of(self.args.save_strategy) != "no"):
                    return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            finally:
                self.set_task(next(iter(self.tasks)))

    def planned_steps(self) -> int:
        """Iterations of the whole run."""
        return planned_steps(self.args, self._sizes, self.method.streams(self.args))


def _require_progress(skipped: int, number: int, steps: int) -> None:
    """Ends a run that only skips: step `number` of `steps` is the last of so many that were skipped in a row.

    A bad batch or a bad direction is followed by a good one; weights that are not finite stay so.
    """
    if skipped >= min(_SKIPPED_IN_A_ROW, steps):
        raise ZofoError(
            f"step {number}: the loss was not finite in {skipped} steps in a row, so skipping does not help: start "
            "again with lower learning rates, or with dtype: float32"
        )
