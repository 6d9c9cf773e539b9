"""What a run starts with, of what it is given: a name, a model, or a model with an adapter; and that it can start."""

import inspect
import logging
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zofo import noise
from zofo.config import ZOFOConfig, field_names
from zofo.errors import ZofoError, first_line, is_lack_of_memory
from zofo.habits import refuse_arguments
from zofo.keys import LORA_KEYS, name_of
from zofo.methods.first_order_optimizers import settings_of_optimizer
from zofo.models.adapters import AdaptedModel
from zofo.models.kinds import adapter_config
from zofo.models.load import load_model, require_fitting_tokenizer
from zofo.models.peft import described, taken_off
from zofo.models.source import require_dense

logger = logging.getLogger(__name__)


def require_config(trainer: type, args: Any, others: Mapping[str, Any]) -> ZOFOConfig:
    """The configuration; refuses what is none, and `others`, which are no arguments of the trainer."""
    known = [name for name in inspect.signature(trainer).parameters if name != "others"]
    refuse_arguments(others, known, field_names())
    if args is None:
        raise ZofoError("args is not given: give at least ZOFOConfig(output_dir='run'), where the run is written to")
    if isinstance(args, dict):
        raise ZofoError("args is a dict: write ZOFOConfig(**args)")
    if not isinstance(args, ZOFOConfig):
        raise ZofoError(
            f"args is a {type(args).__name__}, which lacks the keys of zofo: write ZOFOConfig(...), which takes the "
            "keys of TrainingArguments as well, such as ZOFOConfig(output_dir='run', method='bilevel', max_length=512)"
        )
    return args


def starting_model(
    model: PreTrainedModel | PeftModel | str,
    args: ZOFOConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
) -> tuple[AdaptedModel, PreTrainedTokenizerBase, str | None]:
    """The backbone with its adapters, the tokenizer, and what the adapters' config says; these must go together."""
    if isinstance(model, str):
        model, loaded = load_model(model, args.dtype)
        tokenizer = tokenizer or loaded
    if tokenizer is None:
        raise ZofoError("a loaded model comes without its tokenizer: pass it as processing_class")
    _require_kind("processing_class", tokenizer, PreTrainedTokenizerBase, "AutoTokenizer.from_pretrained(...)")
    _require_kind("peft_config", peft_config, PeftConfig | None, "LoraConfig(...), of a dict LoraConfig(**it)")
    with _parts(model, args, peft_config) as (base, folder):
        require_fitting_tokenizer(tokenizer, base)
        if args.updates_backbone or not args.method_class.trains():  # Trainer takes no quantised model alone
            require_dense(base.config, base.config.name_or_path or type(base).__name__, f"method {args.method}")
        config = peft_config or adapter_config(folder or args.adapter, base, args.lora)
        if config is not None and config.task_type not in (None, "CAUSAL_LM"):
            raise ZofoError(
                f"the adapter's config has task_type {name_of(config.task_type)}, which is of another kind of model, "
                'so that its folder could not be opened: set task_type="CAUSAL_LM"'
            )
        description = described(config)  # before peft fills in what it finds in the model
        real_prefix = peft_config is None and folder is None and args.adapter == "prefix"
        adapted = AdaptedModel(base, config, args.method_class.adapters, real_prefix=real_prefix, start=folder)
    adapted.require_prompts()
    if args.neftune_noise_alpha and adapted.prompt_learning:
        raise ZofoError(
            "neftune_noise_alpha is set, but virtual tokens are no embeddings of a text: leave it out, or choose "
            "another adapter, such as lora"
        )
    if args.activation_checkpointing:
        adapted.require_checkpointing()
    if args.method_class.backpropagates and not adapted.adapters:
        _require_epsilon(args, adapted)
    return adapted, tokenizer, description


def _require_kind(name: str, value: object, kind: Any, mend: str) -> None:
    if not isinstance(value, kind):
        raise ZofoError(f"{name} is a {type(value).__name__}, but must be what {mend} gives")


@contextmanager
def _parts(
    model: PreTrainedModel | PeftModel, args: ZOFOConfig, peft_config: PeftConfig | None
) -> Generator[tuple[PreTrainedModel, str | None]]:
    """The backbone, and the folder of the trained adapter to start from, if there is one."""
    if peft_config is not None and args.adapter == "none":
        raise ZofoError("peft_config is given, but adapter is none: leave one of them out")
    if peft_config is not None and args.adapter_init:
        raise ZofoError(f"both peft_config and adapter_init ({args.adapter_init}) are given: leave one of them out")
    for key in LORA_KEYS if peft_config is not None or isinstance(model, PeftModel) else ():
        if vars(args)[key] is not None:
            raise ZofoError(
                f"{key} is {vars(args)[key]!r}, but the adapter is given as a PEFT config or a PeftModel: leave it "
                f"out, and give LoraConfig({LORA_KEYS[key]}=...)"
            )
    if isinstance(model, PeftModel):
        if peft_config is not None or args.adapter_init or args.adapter == "none":
            raise ZofoError(
                "model is a PeftModel, whose adapter is trained, but peft_config, adapter_init or adapter: none says "
                "otherwise: leave that out, or pass the plain transformers model"
            )
        with tempfile.TemporaryDirectory() as folder:
            yield taken_off(model, folder), folder
        return
    if not isinstance(model, PreTrainedModel) or model._hf_peft_config_loaded:  # pyright: ignore
        raise ZofoError(
            f"model is a {type(model).__name__} with an adapter or of another kind: pass the plain transformers "
            "model, and its adapter as peft_config; or a PeftModel, to start from the values of its adapter"
        )
    if args.updates_backbone:
        _require_all_or_none(model)
    yield model, args.adapter_init


def _require_all_or_none(base: PreTrainedModel) -> None:
    """Refuses weights that somebody froze, among others, where the method would update all.

    What the architecture itself freezes, such as a table of sinusoidal positions, is constant and stays so.
    """
    frozen = [name for name, parameter in base.named_parameters() if not parameter.requires_grad]
    if 0 < len(frozen) < len([*base.parameters()]):
        with torch.device("meta"):
            made = type(base)(base.config)
        constant = {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
        frozen = [name for name in frozen if name not in constant]
    if 0 < len(frozen) < len([*base.parameters()]):
        raise ZofoError(
            f"{len(frozen)} weights of the model are frozen, such as {frozen[0]}, but this method updates all of the "
            "backbone: set requires_grad of all of them to True; zo_exclude names what zeroth-order steps leave alone"
        )


def _require_epsilon(args: ZOFOConfig, adapted: AdaptedModel) -> None:
    """Refuses an optimizer of torch whose ε is 0 in the weights' own dtype: a tiny gradient would become 0/0."""
    kind, settings = settings_of_optimizer(args)
    epsilon = settings.get("eps")
    if not str(kind.__module__).startswith("torch.") or not isinstance(epsilon, float):
        return  # others keep their state in float32
    for dtype in {p.dtype for p in adapted.backbone.values()}:
        if epsilon and not torch.tensor(epsilon).to(dtype):
            raise ZofoError(
                f"adam_epsilon is {epsilon}, which is 0 in {str(dtype).removeprefix('torch.')}, so that weights with a "
                "tiny gradient would become 0/0: set adam_epsilon: 1e-4, or dtype: bfloat16 or float32"
            )


@contextmanager
def setting_up(args: ZOFOConfig) -> Generator[None]:
    """Turns what Trainer's constructor refuses into one line: mostly a package to report to that is not there."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:
        if is_lack_of_memory(error):
            raise
        reports: list[str] = list(cast(Any, args.report_to) or [])
        mend = f": report_to is {', '.join(reports)}: install what that needs, or set report_to: none"
        raise ZofoError(f"the run cannot be set up ({first_line(error)}){mend if reports else ''}") from error


def warm_up(adapted: AdaptedModel) -> None:
    """Makes the noise kernels ready, and says so if there are none."""
    parameter = next(iter(adapted.backbone.values()))
    if not noise.warm_up(parameter.dtype, parameter.device):
        logger.warning("there is no working compiler for the noise kernels: zeroth-order steps are slower")
