"""Evaluate a model at θ + scale·z without ever writing θ: after an exception or Ctrl-C there is nothing to restore."""

import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from zofo.errors import ZofoError
from zofo.noise import Distribution, sample, stream_key
from zofo.zo.buffers import Scratch
from zofo.zo.low_rank import Matrix, is_matrix, require_rank
from zofo.zo.reads import Block, reader
from zofo.zo.watch import Noticed


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
    rank: int = 0,
    limits: Mapping[str, float] | None = None,
    scratch: Scratch | None = None,
    require_all: bool = True,
) -> Generator[None]:
    """Within the block, every forward pass sees W + scale·z in place of each W, z = direction(..., seed, step, query).

    W itself is never written, and gradients do not flow to it. Blocks nest: the inner one adds its noise to the outer
    one's. Not thread-safe: only the thread that entered the block sees W + scale·z. Extra memory: a copy of the largest
    parameter, on a CPU and without gradients at most 2²⁰ elements of a matrix that `linear` reads; more only while
    autograd or a view keeps a buffer alive.

    Args:
        model: whose parameters they are; see `require_all`.
        parameters: name -> tensor, as from `dict(model.named_parameters())`; a tied weight stands once.
        seed: the run's seed.
        scale: the factor of z, in the weights' unit; rounded as `noise.representable` says.
        step: the optimizer step.
        query: which of the step's directions.
        distribution: of z, a row of `noise.eager.SHAPES`; with a rank, of the factors A and B.
        rank: r > 0: the direction of a matrix is A Bᵀ / sqrt(r), and no copy is made for `linear`, `addmm` and
            `embedding`; 0: full rank.
        limits: name -> the |W| up to which a parameter's weights are perturbed; by default all are.
        scratch: buffers to use again; new ones by default.
        require_all: refuse parameters that are not the model's or, if anything ran in the block, were never read.

    Raises:
        ZofoError: if a parameter is written inside the block, is not one of the model's, is a matrix of a smaller
            rank, has a rank and a limit, or was never read. Of the experts of a mixture (`experts.0`, `experts.1`,
            ...) it is enough that one was: a batch need not visit all.

    Examples:
        >>> layer, x = nn.Linear(2, 1), Tensor([1.0, 2.0])
        >>> with perturbed(layer, dict(layer.named_parameters()), seed=1, scale=0.5):
        ...     output = layer(x)
        >>> bool((output != layer(x)).all())
        True
    """
    if require_all:
        require_members(model, parameters)
    require_rank(parameters, rank)
    if rank and limits:
        raise ZofoError("a direction of low rank moves all of a matrix: leave out the limits, or the rank")
    block = Block(parameters, (seed, step, query), scale, distribution, limits or {}, rank)
    noticed = Noticed(block, block.names)
    with reader(scratch) as reads, reads.joined_by(block), noticed if require_all else nullcontext():
        yield
    if noticed.anything:
        require_read(parameters, [name for key, name in block.names.items() if key in block.seen])


def require_members(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuses parameters that are not the model's."""
    members = {id(p) for p in model.parameters()}
    foreign = [name for name, p in parameters.items() if id(p) not in members]
    if foreign:
        raise ZofoError(
            f"{foreign[0]} is not a parameter of this {type(model).__name__}: pass the tensors themselves, as from "
            "dict(model.named_parameters()) or trainer.adapted.backbone, not copies of them"
        )


def require_read(parameters: Iterable[str], read: Iterable[str]) -> None:
    """Refuses parameters that were not read; of the experts of a mixture it is enough that one was."""
    parameters, seen = list(parameters), set(map(_of_any_expert, read))
    missed = [name for name in parameters if _of_any_expert(name) not in seen]
    if missed:
        raise ZofoError(
            f"the forward never read {', '.join(missed[:5])}{' ...' if len(missed) > 5 else ''} through torch: such a "
            f"parameter cannot be moved by forward passes; leave it out of `parameters`, in a config by zo_exclude "
            f"({len(missed)} of {len(parameters)} are affected), or use a model whose layers are plain torch"
        )


def direction(
    parameters: Mapping[str, Tensor],
    seed: int,
    step: int = 0,
    query: int = 0,
    distribution: Distribution = "normal",
    rank: int = 0,
) -> dict[str, Tensor]:
    """Name -> z of each parameter, in float32, of its shape and device; the arguments are those of `perturbed`.

    Raises:
        ZofoError: if a matrix has a smaller rank.

    Examples:
        >>> direction({"w": Tensor(2, 3)}, seed=0, step=0)["w"].shape
        torch.Size([2, 3])
    """
    require_rank(parameters, rank)

    def of(name: str, parameter: Tensor) -> Tensor:
        if rank and is_matrix(parameter):
            a, b = Matrix(parameter, name, rank, distribution).factors(seed, {(step, query): 1.0})
            return a.t() @ b
        key = stream_key(seed, step, query, name)
        return sample(key, 0, parameter.numel(), distribution).view(parameter.shape).to(parameter.device)

    return {name: of(name, parameter) for name, parameter in parameters.items()}


def _of_any_expert(name: str) -> str:
    return re.sub(r"(expert\w*)\.\d+\.", r"\1.*.", name)
