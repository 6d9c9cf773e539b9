"""The blocks below the lowest adapter: while the backbone rests, several passes over a batch share one run of them."""

from collections.abc import Callable, Generator, Sequence
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
        self._outputs: list[Any] = []  # of each forward that the batch takes: wide rows may take one each

    @contextmanager
    def shared(self, blocks: Sequence[nn.Module]) -> Generator[None]:
        """In the first such block, forwards run through `blocks` and are kept; in the others they pass over them."""
        if not blocks:
            yield
            return
        with ExitStack() as undone:
            if self._outputs:
                left = iter(self._outputs)
                current: list[Any] = []

                def first(*args: Any, **kwargs: Any) -> Any:
                    current[:] = [next(left)]
                    return current[0]

                undone.enter_context(_replaced(blocks[0], first))
                for block in blocks[1:]:
                    undone.enter_context(_replaced(block, lambda *args, **kwargs: current[0]))
            else:
                undone.callback(blocks[-1].register_forward_hook(self._keep).remove)
            yield

    def _keep(self, _: nn.Module, args: Any, output: Any) -> None:
        self._outputs.append(tree_map(_detached, output))


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part


@contextmanager
def _replaced(block: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Within the block, a module has another forward."""
    own = vars(block).get("forward")  # what others have put in place of the method of its class
    block.forward = forward
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
    return [adapted.base.get_submodule(paths[number]) for number in sorted(paths) if number < through.start]
