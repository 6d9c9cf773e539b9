"""`zofo merge`: the backbone of a run with an adapter, as one plain Hugging Face folder."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zofo.commands.stored import StoredRun
from zofo.console import Say
from zofo.errors import ZofoError
from zofo.models.export import save_model, save_tokenizer
from zofo.models.load import DType, load_tokenizer, load_weights, stored_dtype
from zofo.models.peft import UPPER, is_prompt, merged, note_of_move
from zofo.training.checkpoint import half_of, writing
from zofo.training.folder import TASKS, reading
from zofo.training.trained_rows import trained_rows_of, write_trained_rows


def merge(run: Path, adapter: str, output: Path, dtype: DType | None, say: Say, task: str | None = None) -> None:
    """Writes the backbone of a run, with one of its adapters merged in, as a plain Hugging Face folder.

    An adapter of virtual tokens cannot be merged, and is put into a folder of its own beside the backbone. `task` says
    whose adapter, in a run over several tasks.
    """
    with new_folder(output) as half:
        with reading(run):
            place = _place(run, adapter, task)
            model, tokenizer, beside = _loaded(run, place, output, dtype, say)
        with writing(output):
            save_model(model, half)
            save_tokenizer(tokenizer, half)
            known = trained_rows_of(str(run / "backbone"), str(place) if place.is_dir() else None)
            if known is not None:
                write_trained_rows(half, known)
            if beside:
                shutil.copytree(place, half / beside)


def _place(run: Path, adapter: str, task: str | None) -> Path:
    """The folder of the adapter, whether it is there or not."""
    if (run / TASKS).is_dir():
        found = StoredRun.at(run).parts(adapter, task)[1]
        assert found is not None
        return Path(found)
    if task is not None and not StoredRun.at(run).is_of_task(task):
        raise ZofoError(f"{run} is no run of task {task!r}: leave --task out")
    return run / adapter


def _loaded(
    run: Path, place: Path, output: Path, dtype: DType | None, say: Say
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """The merged model, its tokenizer, and the adapter that stays beside it."""
    if not (run / "backbone").is_dir():
        raise ZofoError(
            f"{run} is no finished run: it holds no backbone/ (a quantised one is not stored, and cannot take up an "
            "adapter); give the output_dir of zofo train"
        )
    backbone, beside = str(run / "backbone"), None
    if place.is_dir() and (note := note_of_move(place)):
        say(note)
    dtype = dtype or stored_dtype(backbone)
    if place.is_dir() and is_prompt(place):
        beside, model = place.name, load_weights(backbone, dtype)
        say(f"{place} consists of virtual tokens, which cannot be merged: it is kept in {output / place.name}")
    elif place.is_dir():
        model, difference = merged(backbone, str(place), dtype)
        say(f"merged in float32, rounded to {dtype}: the logits differ by {difference:.1e} from backbone and adapter")
    elif (run / UPPER).is_dir():
        raise ZofoError(
            f"{run} has no adapter {place.name!r}, only upper: lower is of method bilevel with a finite penalty"
        )
    else:
        say(f"{run} has no adapters: its backbone is the whole model")
        model = load_weights(backbone, dtype)
    return model, load_tokenizer(backbone, model), beside


@contextmanager
def new_folder(output: Path) -> Generator[Path]:
    """A folder beside `output`, of this command alone: becomes it when the block ends, and is gone if it raises."""
    if output.exists():
        raise ZofoError(f"{output} exists already and is not overwritten: give a new folder")
    half = half_of(output)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            half.mkdir()
        except FileExistsError as error:
            raise ZofoError(
                f"{half} is in the way, of a command that is running or was cut off: remove it, or give another folder"
            ) from error
    try:
        yield half
        with writing(output):
            half.rename(output)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
