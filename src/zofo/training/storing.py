"""What `ZOFOTrainer` saves and loads: the backbone and all adapters, in checkpoints that are sealed when whole."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError, did_you_mean
from zofo.models.adapters import BACKBONE, AdaptedModel
from zofo.models.export import save_tokenizer
from zofo.training.callbacks import Cost, is_over
from zofo.training.checkpoint import (
    is_of,
    loading,
    read_seal,
    rotate_checkpoints,
    seal,
    share,
    steps_of,
    unseal,
    writing,
)
from zofo.training.folder import TASKS, claim, drop_old
from zofo.training.rehearsal import require_finite
from zofo.training.tasks import Joint, RunTask
from zofo.training.trained_rows import write_trained_rows


class StoringTrainer(Trainer):
    """Transformers' `Trainer` with the backbone in its checkpoints."""

    args: ZOFOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    adapted: AdaptedModel
    cost: Cost
    tasks: dict[str, RunTask]
    notes: dict[str, Any]  # what else the seals of checkpoints hold
    identity: dict[str, Any]
    _task: RunTask  # whose adapters and metrics are in use
    _joint: Joint
    _tokenizer: PreTrainedTokenizerBase
    trained_rows: frozenset[bytes]
    _own_checkpoints: set[str]  # which alone `save_total_limit` removes
    _whole: Path | None  # the last whole checkpoint of this run; a backbone that does not change is shared with it

    def set_task(self, name: str) -> None:
        """Makes forwards use the adapters of a task, and evaluations its metrics, where a run has several tasks."""
        if name not in self.tasks:
            hint = did_you_mean(name, self.tasks, f"its tasks are {', '.join(self.tasks)}")
            raise ZofoError(f"this run has no task {name!r}: {hint}")
        self._joint.bank.use(name)
        self._task = self.tasks[name]

    def each_task(self) -> Generator[str]:
        """The name of each task, while it is the one in use; after it, the task that was in use before."""
        current = self._joint.bank.current if self._joint.bank.exchanges else next(iter(self.tasks))
        try:
            for name in self.tasks:
                self.set_task(name)
                yield name
        finally:
            self.set_task(current)

    @property
    def selection(self) -> dict[str, Any]:
        """By what the best checkpoint is chosen."""
        metric = self.args.metric_for_best_model
        more = self.args.greater_is_better
        return {"metric_for_best_model": metric and metric.removeprefix("eval_"), "greater_is_better": more}

    def save_final(self, folder: Path, home: Path) -> None:
        """Writes what a run ends with into a folder that will be renamed, or whose parts will, to `home`."""
        with writing(folder):
            self._save_parts(folder, home, own=True)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _is_finished(self, folder: str, steps: int) -> bool:
        """Whether a checkpoint is the last one of a run; loads it then, where Trainer would take one more step."""
        state = TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME))
        if steps_of(Path(folder)) < steps and not is_over(state, self.args.early_stopping_patience):
            return False
        self.state = state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(folder)
        if best is not None:
            self._load_best_model()
        return True

    def require_finite(self) -> None:
        """Refuses weights that the last step has made infinite or not a number."""
        for _ in self.each_task():
            require_finite(self.adapted, self.args, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        with writing(folder):
            own = folder.name == f"checkpoint-{self.state.global_step}"
            self._save_parts(folder, own=own and is_of(folder, Path(str(self.args.output_dir))))

    def _save_parts(self, folder: Path, home: Path | None = None, own: bool = False) -> None:
        """Writes backbone, tokenizer and adapters, and into each of them which rows it was trained on.

        A backbone that does not change is written once, and then shared by the folders that are this run's `own`.
        """
        whole = self._whole if own and not self.args.updates_backbone else None
        shared = whole is not None and share(whole, folder, BACKBONE)
        if not shared:
            save_tokenizer(self._tokenizer, self.adapted.save_backbone(folder))
        for part in ["", *self._save_adapters(folder, home), *([] if shared else [BACKBONE])]:
            if (folder / part).is_dir():
                write_trained_rows(folder / part, self.trained_rows)

    def _save_adapters(self, folder: Path, home: Path | None) -> list[str]:
        """Writes the adapters, of each task into its own folder; returns what was written."""
        if not self._joint.bank.exchanges:
            self.adapted.save_adapters(folder, home)
            return [*self.adapted.adapters]
        for name in self.each_task():
            place = folder / TASKS / name
            self.adapted.save_adapters(place, home or folder)
            (place / "README.md").unlink()  # peft's, of each adapter alone
        return [f"{TASKS}/{name}/{adapter}" for name in self.tasks for adapter in self.adapted.adapters]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.require_finite()
        run = Path(self._get_output_dir(trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        with self._removing_nothing(), writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            claim(run, folder.name)
            unseal(folder)
            (folder / "README.md").unlink(missing_ok=True)  # peft would read it, and a killed save left it half
            super()._save_checkpoint(model, trial)
            self.adapted.save_trained(folder)
            self._joint.bank.save(folder)
            seal(folder, {"config": self.identity, "cost": asdict(self.cost), **self.selection, **self.notes})
            self._whole = folder
            drop_old(run)
        # only now that the new one is whole may an old one go
        self._own_checkpoints.add(folder.name)
        limit = self.args.save_total_limit
        rotate_checkpoints(run, limit, self.state.best_model_checkpoint, self._own_checkpoints)

    @contextmanager
    def _removing_nothing(self) -> Generator[None]:
        """Within the block `Trainer` removes no checkpoint: it would take those of others, and the newest one."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        with self._removing_nothing():
            return super()._finalize_training(trial, num_train_samples, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(Path(resume_from_checkpoint)):
            self.adapted.load(Path(resume_from_checkpoint))
            self._joint.bank.load(Path(resume_from_checkpoint))
        vars(self.cost).update(read_seal(Path(resume_from_checkpoint))["cost"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(Path(str(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(Path(str(checkpoint))):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        own = Path(str(self.args.output_dir)) / best.name  # a run may have been moved
        folder = own if own.is_dir() else best
        with loading(folder):
            self.adapted.load(folder)
            self._joint.bank.load(folder)
