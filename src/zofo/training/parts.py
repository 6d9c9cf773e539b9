"""What a run writes of its model into a folder; a backbone that does not change is written once and then shared."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from zofo.models.adapters import BACKBONE, AdaptedModel
from zofo.models.export import save_tokenizer
from zofo.training.checkpoint import share
from zofo.training.trained_rows import write_trained_rows


def save_parts(
    folder: Path,
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: frozenset[bytes],
    home: Path | None = None,
    whole: Path | None = None,
) -> None:
    """Writes backbone, tokenizer and adapters, and into each of them which rows it was trained on.

    `home` is where the content of `folder` will be in the end, if elsewhere; `whole` is a sealed checkpoint whose
    backbone is this one, bit for bit, and may be shared.
    """
    parts = ["", *adapted.adapters]
    if whole is not None and share(whole, folder, BACKBONE):
        adapted.save_adapters(folder, home)
    else:
        save_tokenizer(tokenizer, adapted.save(folder, home))
        parts.append(BACKBONE)
    for part in parts:
        if (folder / part).is_dir():
            write_trained_rows(folder / part, rows)
