"""`zofo merge`: the backbone of a run with an adapter, as one plain Hugging Face folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

from zofo.errors import ZofoError
from zofo.models.load import DType, load_tokenizer, load_weights, stored_dtype
from zofo.models.peft import UPPER, is_prompt, merged
from zofo.training.checkpoint import writing

Say = Callable[[str], None]


def merge(run: Path, adapter: str, output: Path, dtype: DType | None, say: Say) -> None:
    """Writes the backbone of a run, with one of its adapters merged in, as a plain Hugging Face folder.

    An adapter of virtual tokens cannot be merged, and is put into a folder of its own beside the backbone.

    Raises:
        ZofoError: if there is no such run or adapter, it cannot be merged, or `output` exists.
    """
    if not (run / "backbone").is_dir():
        raise ZofoError(
            f"{run} is no finished run: it holds no backbone/ (a quantised one is not stored, and cannot take up an "
            "adapter); give the output_dir of zofo train"
        )
    if output.exists():
        raise ZofoError(f"{output} exists already and is not overwritten: give a new folder")
    half = output.with_name(output.name + ".half")
    if half.exists():
        raise ZofoError(f"{half} is in the way, perhaps of a merge that was cut off: remove it, or give another folder")
    backbone, beside = str(run / "backbone"), None
    dtype = dtype or stored_dtype(backbone)
    if (run / adapter).is_dir() and is_prompt(run / adapter):
        beside, model = adapter, load_weights(backbone, dtype)
        say(f"{run / adapter} consists of virtual tokens, which cannot be merged: it is kept in {output / adapter}")
    elif (run / adapter).is_dir():
        model, difference = merged(backbone, str(run / adapter), dtype)
        say(f"merged in float32, rounded to {dtype}: the logits differ by {difference:.1e} from backbone and adapter")
    elif (run / UPPER).is_dir():
        raise ZofoError(f"{run} has no adapter {adapter!r}, only upper: this run has no lower level")
    else:
        say(f"{run} has no adapters: its backbone is the whole model")
        model = load_weights(backbone, dtype)
    tokenizer = load_tokenizer(backbone, model)
    with writing(output):
        model.save_pretrained(half)
        tokenizer.save_pretrained(half)
        if beside:
            shutil.copytree(run / beside, half / beside)
        half.rename(output)
