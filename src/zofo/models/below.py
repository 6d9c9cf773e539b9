"""The blocks below the lowest adapter: while the backbone rests, several passes over a batch share one run of them."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zofo.models.adapters import AdaptedModel
from zofo.models.selection import block_paths


class Below:
    """What the last block below the adapters has returned for a batch: its hidden states, in the form that it has.

    It holds as long as the weights below and the batch are the same. Dropout there is drawn once for all passes.
    """

    def __init__(self) -> None:
        self._output: Any = None

    @contextmanager
    def shared(self, blocks: Sequence[nn.Module]) -> Generator[None]:
        """In the first such block, a forward runs through `blocks` and is kept; in the others it passes over them."""
        if not blocks:
            yield
            return
        with ExitStack() as undone:
            if self._output is None:
                undone.callback(blocks[-1].register_forward_hook(self._keep).remove)
            for block in blocks if self._output is not None else ():
                undone.enter_context(_replaced(block, self._output))
            yield

    def _keep(self, _: nn.Module, args: Any, output: Any) -> None:
        self._output = tree_map(_detached, output)


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part


@contextmanager
def _replaced(block: nn.Module, output: Any) -> Generator[None]:
    """Within the block, a module returns this."""
    own = vars(block).get("forward")  # what others have put in place of the method of its class
    block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def blocks_below(adapted: AdaptedModel) -> list[nn.Module]:
    """The blocks that backpropagation to the adapters does not reach, from the first on."""
    through, _ = adapted.blocks_of_backward
    paths = block_paths(adapted.backbone)
    return [adapted.base.get_submodule(paths[number]) for number in range(through.start)]
