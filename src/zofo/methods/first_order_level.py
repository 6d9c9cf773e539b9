"""A level that backpropagation updates."""

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from zofo.errors import FORWARD_ERRORS, NonFiniteLossError, ZofoError, first_line, is_lack_of_memory
from zofo.keys import Keys
from zofo.methods.first_order_optimizers import first_order_optimizer
from zofo.models.adapters import AdaptedModel
from zofo.models.below import Below, blocks_below
from zofo.scoring.batch import UNLIMITED, Batch, parts
from zofo.scoring.scorer import Scorer, Tokens, count

# of a forward with its backward where the adapters leave blocks below them: the activations of the few blocks above are
# then no more than what a plain forward of a batch holds at once, and products of so many tokens are still efficient
_TOKENS_AT_ONCE = 1024


class FirstOrderLevel:
    """Parameters that backpropagation updates: an adapter, or the whole model where there is none.

    `remedy` names the keys to lower where a loss is not finite.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        scorer: Scorer,
        adapter: str,
        learning_rate: float,
        keys: Keys,
        remedy: str = "learning_rate",
    ) -> None:
        self._adapted = adapted
        self._scorer = scorer
        self._adapter = adapter
        self._keys = keys
        self._remedy = remedy
        self._blocks_below = blocks_below(adapted) if adapted.adapters else []
        self._tokens_at_once = _TOKENS_AT_ONCE if self._blocks_below else UNLIMITED
        self.norm = 0.0  # of the last gradient
        named = adapted.adapter_parameters(adapter) if adapted.adapters else adapted.movable
        self.parameters = list(named.values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = first_order_optimizer(self.parameters, learning_rate, keys)

    def gradient(self, batches: Sequence[Batch], label: str, factor: float = 1.0, below: Sequence[Below] = ()) -> float:
        """Adds the gradient of `factor` times the mean loss over all batches to `.grad`; returns the mean loss.

        One batch at a time goes forward and backward, so memory is that of one, or of a part of it where blocks are
        below the adapters. Train mode: dropout is on. With `optimizer_in_backward` the parameters are updated when it
        returns, and have no `.grad`. With `below`, one for each batch, its forward begins above the blocks that have
        run for this batch before.
        """
        self._adapted.use(self._adapter)
        self._adapted.model.train()
        total = sum(map(count, batches))
        loss, norms = 0.0, list[Tensor]()
        for batch, kept in zip(batches, below or [Below() for _ in batches], strict=True):
            with kept.shared(self._blocks_below if below else ()):
                for part in parts(batch, self._tokens_at_once):
                    share = self._scorer.loss(part) / total
                    loss += float(share.detach())
                    self._require_finite(loss, label)
                    norms += self._backward(share * factor)
            self._scorer.tokens.backward_tokens += int(batch["attention_mask"].sum())
        gradients = norms or [p.grad for p in self.parameters if p.grad is not None]
        self.norm = float(torch.nn.utils.get_total_norm(gradients))
        self._require_finite(self.norm, f"{label} (its gradient)")
        return loss

    @torch.no_grad()
    def require_below(self, batch: Batch) -> None:
        """Refuses a model whose loss is another one where its forward begins above the blocks below the adapter."""
        scorer, below = Scorer(self._adapted, Tokens(), self._scorer.layout), Below()
        self._adapted.model.eval()
        losses: list[float] = []
        reason = "gives another loss"
        try:
            for _ in range(2):
                with self._adapted.deployed_after(), below.shared(self._blocks_below):
                    self._adapted.use(self._adapter)
                    losses.append(float(scorer.loss(batch)))
        except FORWARD_ERRORS as error:
            if is_lack_of_memory(error):
                raise
            reason = f"fails ({first_line(error)})"
        if not all(map(math.isfinite, losses)):
            return  # it shows nothing, and the run itself will say it
        tolerance = torch.finfo(self._adapted.base.dtype).eps ** 0.5
        if len(losses) < 2 or not math.isclose(*losses, rel_tol=tolerance):
            raise ZofoError(
                f"lower_pool is set, but a forward of this {self._adapted.base.config.model_type} model that begins "
                f"above the blocks below its adapter {reason}: leave lower_pool out"
            )

    def _backward(self, loss: Tensor) -> list[Tensor]:
        """Backpropagation; with `optimizer_in_backward`, the norm of each gradient, which is used and dropped in it.

        A hook runs when all uses of a parameter, as of a tied one, have added to its gradient. The optimizer passes
        over the other parameters, as they have none. Hooks are there for this pass only: the model may get another
        optimizer.
        """
        norms: list[Tensor] = []

        def update(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norms.append(torch.linalg.vector_norm(parameter.grad))
            self.optimizer.step()
            parameter.grad = None

        with ExitStack() as hooks:
            for parameter in self.parameters if self._keys.optimizer_in_backward else ():
                hooks.callback(parameter.register_post_accumulate_grad_hook(update).remove)
            loss.backward()
        return norms

    def step(self) -> None:
        """One optimizer step of its own, clipped as the trainer clips, for a level that the trainer does not step."""
        if self._keys.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self._keys.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def snapshot(self) -> tuple[list[Tensor], dict[str, Any]]:
        """A copy of the parameters and of the optimizer's state."""
        return [p.detach().clone() for p in self.parameters], copy.deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def restore(self, snapshot: tuple[list[Tensor], dict[str, Any]]) -> None:
        """Back to a snapshot, bit for bit."""
        for parameter, value in zip(self.parameters, snapshot[0], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(snapshot[1])

    def _require_finite(self, value: float, label: str) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(f"{label} is {value}: lower {self._remedy}, or set on_nonfinite: skip")
