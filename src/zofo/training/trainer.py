"""`ZOFOTrainer`: transformers' `Trainer` with another step, and with the backbone in what it saves and loads."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput

from zofo.config import ZOFOConfig
from zofo.errors import NonFiniteLossError, ZofoError
from zofo.keys import name_of
from zofo.methods.first_order_optimizers import require_optimizer
from zofo.methods.method import Bundle
from zofo.models.peft import UPPER
from zofo.scoring.batch import padding_id
from zofo.scoring.evaluation import Answer, Evaluator, require_scorable
from zofo.scoring.generation import AnswerSpan
from zofo.scoring.padding import probe, random_batch
from zofo.scoring.scorer import Scorer, Tokens
from zofo.scoring.tokens import Example, tokenize
from zofo.tasks.metrics import Metric
from zofo.tasks.prompts import as_chat, chat_identity
from zofo.tasks.records import Record, Rows, digest, questions
from zofo.training import objective, start
from zofo.training.bundles import BundleCollator, IterationSampler, planned_steps
from zofo.training.callbacks import Cost, LossBar, own_callbacks
from zofo.training.checkpoint import (
    is_of,
    last_sealed,
    loading,
    require_optimizer_state,
    require_same,
    require_whole,
    siblings,
    steps_of,
)
from zofo.training.diagnosis import Diagnosis
from zofo.training.folder import owned
from zofo.training.interrupt import Interrupt
from zofo.training.rehearsal import require_schedule_and_batches
from zofo.training.storing import StoringTrainer
from zofo.training.trained_rows import digests
from zofo.training.trial import Trial, trial


class ZOFOTrainer(StoringTrainer):
    """Trains a backbone, its adapters, or both, by the method that `args` names.

    Args:
        model: the backbone, or what `load_model` takes, or a `PeftModel` with one adapter, whose values the run starts
            from. It is changed in place.
        args: the configuration.
        train_dataset: rows with `prompt`, `completion` and, for a loss over options, `options`; or conversations, with
            `messages`: a list of dicts, a datasets.Dataset or a pandas DataFrame. With method bilevel
            and without `upper_dataset`, `args.lower_fraction` of them go to the lower level, the others to the upper;
            if that is shared, both levels read all rows of both data sets.
        upper_dataset: rows of the upper level; methods without levels train on both together.
        eval_dataset: rows for model selection, which no level trains on.
        processing_class: the tokenizer; loaded with the model if not given.
        peft_config: of the adapter; by default what `args.adapter` names.
        metrics: of evaluations, the first one decides; by default accuracy for rows with options, else exact_match. A
            function (predictions, references) -> number counts as well.
        callbacks: more transformers callbacks.
        reward_funcs: with `args.objective` reward, functions as trl's trainers take them, in place of `args.reward`.
        others: refused, with what to write for arguments of other trainers.

    Raises:
        ZofoError: if these do not go together, before any work.

    Examples:
        In the README, under Use; `zofo.commands.train.train` is a complete run.

    References:
        R. Shirkavand et al., "Bilevel ZOFO" (arXiv 2502.03604).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
        args: ZOFOConfig | None = None,
        train_dataset: Rows | None = None,
        upper_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        metrics: Sequence[Metric] | Metric = (),
        callbacks: list[TrainerCallback] | None = None,
        reward_funcs: objective.RewardFuncs | None = None,
        **others: Any,
    ) -> None:
        args = start.require_config(type(self), args, others)
        self.rewards = objective.run_rewards(args, reward_funcs)
        set_seed(args.seed)
        self.adapted, processing_class, kind = start.starting_model(model, args, processing_class, peft_config)
        model = self.adapted.base
        chat = {"chat_template_digest": chat_identity(processing_class)} if args.chat_template else {}
        self.identity = {**args.identity(), "peft_config": kind, **chat}
        rows = start.training_rows(args, train_dataset, upper_dataset)
        self.identity["rows"] = [digest(part) for part in rows.values()]
        self._trained_rows = start.rows_of_before(model)
        if args.method_class.trains():
            self._trained_rows |= digests([row for part in rows.values() for row in part])
        self.metrics = start.chosen_metrics(args, metrics, next(iter(rows.values()))[0])
        if args.method_class.backpropagates:
            require_optimizer(args)
        self.args = args
        self.cost = Cost()
        self.truncated = 0
        self._tokenizer = processing_class
        self.longest = min(args.max_length, self.adapted.positions)
        train = {split: self.examples(part) for split, part in rows.items()}
        self._sizes = {split: len(examples) for split, examples in train.items()}
        every = [example for examples in train.values() for example in examples]
        self.span = objective.answer_span(args, AnswerSpan.of(every, processing_class))
        start.require_rows_for_a_batch(args, self._sizes)
        evaluated = [] if eval_dataset is None else self.examples(start.rows_of(args, eval_dataset, "eval_dataset"))
        self.require_scorable([*every, *evaluated] if self.rewards else evaluated)
        args.settle_evaluations(len(evaluated))
        use_cache = model.config.use_cache
        with start.setting_up(args):
            super().__init__(
                model=self.adapted.model,
                args=args,
                train_dataset=cast(Any, every),
                eval_dataset=cast(Any, evaluated or None),
                processing_class=processing_class,
                callbacks=[*own_callbacks(self.cost, self.adapted.base, args), *(callbacks or [])],
            )
        model.config.use_cache = use_cache  # the trainer switches it off for good, in what is saved too
        if self.pop_callback(ProgressCallback):
            self.add_callback(LossBar())
        self._interrupt = Interrupt()
        self.add_callback(self._interrupt)
        if args.method_class.zeroth_order:
            start.warm_up(self.adapted)
        self._layout = probe(self.adapted, processing_class)
        scorer = Scorer(self.adapted, self.cost, self._layout)
        black_box = objective.black_box(args, self._evaluator(), scorer)
        self.method = args.method_class(self.adapted, scorer, args, black_box)
        if args.method_class.zeroth_order:
            batch: Any = random_batch(self.adapted, processing_class, self.method.scorer.layout)
            self.method.require_forwards(cast(Any, self._prepare_inputs(batch)))
        self._diagnosis = self._diagnose() if args.diagnose and args.method_class.trains() else None
        self._micro: list[Bundle] = []
        self._logs: dict[str, list[float]] = defaultdict(list)
        self._skipped = self._skipped_in_a_row = 0
        self._own_checkpoints = set()
        self._resumable: Path | None = None  # the checkpoint that was found to be whole
        self._whole = None
        self.notes: dict[str, Any] = {}

    def examples(self, rows: Sequence[Record]) -> list[Example]:
        """Tokenises rows for this model; `truncated` counts those whose prompt was cut."""
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

    def require_resumable(self, folder: Path) -> None:
        """Refuses a checkpoint that this run cannot go on from, or that is none."""
        if folder == self._resumable:
            return  # reading every byte once is enough
        content = require_whole(folder)
        require_same(content["config"], self.identity, folder)
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
        sampler = IterationSampler(self._sizes, streams, size, args.gradient_accumulation_steps, args.order_seed)
        return sampler, BundleCollator(streams, size, self._collate())

    def _collate(self) -> Any:
        """What makes a batch of examples."""
        manner = {"pad_id": padding_id(self._tokenizer), "layout": self.method.scorer.layout}
        return partial(objective.collator(self.args), kind=self.args.loss, **manner)

    def _diagnose(self) -> Diagnosis:
        """On the rows of the first micro-step."""
        sampler, collator = self._order()
        rows: list[Example] = list(cast(Any, self.train_dataset))
        bundle: Any = collator([rows[i] for i in next(iter(sampler))])
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
            logs = self.method.step(number, number / self.state.max_steps, cast(Any, micro))
        except NonFiniteLossError:
            self.method.skip()
            if self.args.on_nonfinite == "raise":
                raise
            self._skipped += 1
            self._skipped_in_a_row += 1
            start.require_progress(self._skipped_in_a_row, number, self.state.max_steps)
            return nothing
        self._skipped_in_a_row = 0
        for key, value in logs.items():
            self._logs[key].append(value)
        return nothing + logs["loss"]

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
            logs.update({key: sum(values) / len(values) for key, values in self._logs.items()})
            self._logs.clear()
            self._skipped = 0
            logs.update(self.method.learning_rates())
            logs.update(self.method.signal_to_noise())
        super().log(logs, start_time)

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metric and loss of every adapter: `eval_loss` of the deployed one, `eval_lower_loss` of the lower one."""
        rows: Any = self.eval_dataset
        if eval_dataset is not None:
            rows = self.examples(start.rows_of(self.args, eval_dataset, "eval_dataset"))
        if rows is None:
            raise ZofoError("there is nothing to evaluate on: pass eval_dataset to ZOFOTrainer")
        metrics: dict[str, float] = {}
        for adapter, (scores, answers) in self.scored(rows).items():
            for line in objective.shown(rows, answers) if self.rewards else ():
                tqdm.write(f"{adapter}: {line}")
            prefix = metric_key_prefix if adapter == UPPER else f"{metric_key_prefix}_{adapter}"
            metrics.update({f"{prefix}_{key}": value for key, value in scores.items()})
        self.log(metrics)
        if self._diagnosis and self.is_in_train and self.method.zeroth_order_level:
            self.log(self._diagnosis.measure(self.state.global_step, self.state.global_step / self.state.max_steps))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

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
        metrics = ["accuracy" if len(examples[0].answers) > 1 and not self.rewards else "exact_match"]
        with self.adapted.deployed_after():
            self.adapted.use(UPPER)
            return self._evaluator("predict", metrics).unrewarded(examples)

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
        run = Path(str(self.args.output_dir))
        if resume_from_checkpoint:
            last = resume_from_checkpoint is True
            folder = last_sealed(run) if last else Path(str(resume_from_checkpoint)).expanduser()
            self.require_resumable(folder)
            self._own_checkpoints = siblings(folder, run, self.identity)
            self._whole = folder if is_of(folder, run) else None
            resume_from_checkpoint = str(folder)
        with owned(run), self.adapted.deployed_after():
            if resume_from_checkpoint and self._is_finished(resume_from_checkpoint, self.planned_steps()):
                return TrainOutput(self.state.global_step, 0.0, {})
            with self._interrupt.listening(saves=name_of(self.args.save_strategy) != "no"):
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def planned_steps(self) -> int:
        """Iterations of the whole run."""
        return planned_steps(self.args, self._sizes, self.method.streams(self.args))

    def _evaluator(self, progress: str = "", metrics: Sequence[str] = ()) -> Evaluator:
        return Evaluator(
            Scorer(self.adapted, Tokens(), self._layout),
            self._tokenizer,
            metrics or self.metrics,
            self.args.loss,
            self.args.per_device_eval_batch_size,
            place=lambda batch: self._prepare_inputs(batch),
            span=self.span,
            progress="" if self.args.disable_tqdm else progress,
            rewards=self.rewards,
        )
