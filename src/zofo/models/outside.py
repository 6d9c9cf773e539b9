"""What peft would read or run beside an adapter's own files, because its config says so."""

from typing import Any

from peft import PeftConfig, PromptTuningInit
from transformers import AutoTokenizer

from zofo.errors import ZofoError, first_line
from zofo.models.source import NO_CODE

# field -> the value with which nothing is opened or imported
_HARMLESS = {
    "prompt_tuning_init_state_dict_path": None, "megatron_config": None, "adapters": None, "shadow_model": "mirror",
}  # fmt: skip


def require_nothing_outside(config: PeftConfig) -> None:
    """Refuses fields that make peft open other weights or import a module."""
    values = config.to_dict()
    for name, harmless in _HARMLESS.items():
        if values.get(name, harmless) != harmless:
            raise ZofoError(
                f"{name} is {values[name]!r:.80}, which makes peft open other files or import code: leave it out of "
                "the adapter's config"
            )


def require_plain_tokenizer(config: PeftConfig) -> None:
    """Refuses a text to start virtual tokens from whose tokenizer has code of its own: peft would let a user run it."""
    values = config.to_dict()
    if values.get("prompt_tuning_init") != PromptTuningInit.TEXT:
        return
    name, options = values.get("tokenizer_name_or_path"), values.get("tokenizer_kwargs")
    try:
        loaded: Any = AutoTokenizer.from_pretrained(name, **{**(options or {}), **NO_CODE})
        assert loaded is not None
    except Exception as error:  # a tokenizer can be wrong in any way
        raise ZofoError(
            f"tokenizer_name_or_path is {name!r}, which cannot be loaded without code of its own "
            f"({first_line(error)[:200]}): give the folder of the model's tokenizer"
        ) from error
