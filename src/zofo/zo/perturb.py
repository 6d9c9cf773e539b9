"""Evaluate a model at θ + scale·z without ever writing θ.

Inside `perturbed`, whatever reads one of the parameters is handed W + scale·z in a scratch buffer instead, by
`reads.py`. No value is written: an exception, an out-of-memory error or Ctrl-C in the block leaves none to restore.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from zofo import noise
from zofo.errors import ZofoError
from zofo.noise import Distribution
from zofo.zo.buffers import Scratch
from zofo.zo.reads import Block, Noticed, reader


@contextmanager
def perturbed(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    seed: int,
    scale: float,
    step: int = 0,
    query: int = 0,
    *,
    distribution: Distribution = "normal",
    limits: Mapping[str, float] | None = None,
    scratch: Scratch | None = None,
    require_all: bool = True,
) -> Generator[None]:
    """Within the block, every forward of the model sees W + scale·z in place of each parameter W.

    z is `direction(parameters, seed, step, query)`. The parameters themselves are never written. Blocks
    nest: the inner one adds its noise to the outer one's. Not thread-safe: the block belongs to the thread
    that entered it. Gradients do not flow to W. Extra memory: a copy of the largest parameter, on a CPU
    and without gradients of no more than 2²⁰ numbers of a matrix that `linear` reads; more only while autograd or a
    view keeps a buffer alive.

    Args:
        model: the model; only used to name a parameter that is not one of its own.
        parameters: name -> tensor, as from `dict(model.named_parameters())`; a tied weight stands once.
        seed: the run's seed.
        scale: the factor of z, in the weights' unit; rounded as `noise.representable` says.
        step: the optimizer step.
        query: which of the step's directions.
        distribution: "normal" or "rademacher".
        limits: name -> the |W| up to which a parameter's weights move; a name that is not there moves as a whole.
        scratch: buffers to use again; new ones by default.
        require_all: refuse parameters that are not the model's, and, if something ran in the block, those that were
            never read. Without it such parameters are left out in silence.

    Raises:
        ZofoError: if a parameter is written inside the block, is not one of the model's, or was never read. Of the
            experts of a mixture (`experts.0`, `experts.1`, ...) it is enough that one was: a batch need not visit all.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> x, theta = torch.ones(1, 2), dict(layer.named_parameters())
        >>> with perturbed(layer, theta, seed=1, scale=0.5):
        ...     moved = layer(x)
        >>> bool((moved != layer(x)).all())
        True
    """
    if require_all:
        _require_members(model, parameters)
    block = Block.of(parameters, (seed, step, query), scale, distribution, limits or {})
    noticed = Noticed(block)
    with reader(scratch) as reads, reads.joined_by(block), noticed if require_all else nullcontext():
        yield
    if not noticed.anything:
        return
    seen = {_of_any_expert(name) for number, name in block.names.items() if number in block.seen}
    missed = [name for name in parameters if _of_any_expert(name) not in seen]
    if missed:
        raise ZofoError(
            f"the forward never read {', '.join(missed[:5])}{' ...' if len(missed) > 5 else ''} through torch: such a "
            f"parameter cannot be moved by forward passes; leave it out of `parameters`, in a config by zo_exclude "
            f"({len(missed)} of {len(parameters)} are affected), or use a model whose layers are plain torch"
        )


def direction(
    parameters: Mapping[str, Tensor], seed: int, step: int = 0, query: int = 0, distribution: Distribution = "normal"
) -> dict[str, Tensor]:
    """The direction z of each parameter, materialised in float32: for tests and study.

    Args:
        parameters: name -> tensor of any shape.
        seed: the run's seed.
        step: the optimizer step.
        query: which of the step's directions.
        distribution: "normal" or "rademacher".

    Returns:
        name -> z, of the parameter's shape and device.

    Examples:
        >>> import torch
        >>> direction({"w": torch.empty(2, 3)}, seed=0, step=0)["w"].shape
        torch.Size([2, 3])
    """
    draw = noise.normal if distribution == "normal" else noise.rademacher
    return {
        name: draw(noise.stream_key(seed, step, query, name), 0, p.numel()).view(p.shape).to(p.device)
        for name, p in parameters.items()
    }


def _of_any_expert(name: str) -> str:
    return re.sub(r"(expert\w*)\.\d+\.", r"\1.*.", name)


def _require_members(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    own = {id(p) for p in model.parameters()}
    strange = [name for name, p in parameters.items() if id(p) not in own]
    if strange:
        raise ZofoError(
            f"{strange[0]} is not a parameter of this {type(model).__name__}: pass the tensors themselves, as from "
            "dict(model.named_parameters()) or trainer.adapted.backbone, not copies of them"
        )
