"""The usual ways to take a zeroth-order step, written plainly, to compare the cost of ours with.

Both take `draw(name, parameter)`, the direction z: `torch.randn_like` when they are timed, zofo's own stream when they
are checked to give the same numbers as zofo. Each pass over θ makes its numbers anew from the seed and a new tensor
for every weight, as MeZO's published code does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

Draw = Callable[[str, Tensor], Tensor]
Loss = Callable[[], Tensor]


def gaussian(seed: int) -> Callable[[], Draw]:
    """A source of directions that starts anew at each call."""

    def again() -> Draw:
        torch.manual_seed(seed)
        return lambda name, parameter: torch.randn_like(parameter)

    return again


def perturb(parameters: Mapping[str, Tensor], draw: Draw, scale: float) -> None:
    """θ <- θ + scale z, out of place: one pass over θ."""
    for name, parameter in parameters.items():
        parameter.data = parameter.data + scale * draw(name, parameter)


@torch.no_grad()
def mezo_step(parameters: Mapping[str, Tensor], loss: Loss, again: Callable[[], Draw], eps: float, lr: float) -> float:
    """A two-sided step as MeZO takes it: 4 passes over θ and 2 forwards. Returns the projected gradient."""
    perturb(parameters, again(), eps)
    plus = float(loss())
    perturb(parameters, again(), -2 * eps)
    minus = float(loss())
    perturb(parameters, again(), eps)
    projected = (plus - minus) / (2 * eps)
    perturb(parameters, again(), -lr * projected)
    return projected


def stored_gradient_step(
    backbone: Mapping[str, Tensor],
    upper_losses: tuple[Loss, Loss],
    lower_loss: Loss,
    again: Callable[[], Draw],
    eps: float,
    penalty: float,
    optimizers: tuple[torch.optim.Optimizer, ...],
) -> float:
    """An upper update at the cost of the paper's public code. Returns the projected gradient.

    Two forwards with backward for p; three losses at θ + εz and three at θ - εz; three passes over θ; the estimate
    stored as a gradient of every weight; Adam with two moments for each.
    """
    factors = (1 / (1 + penalty), penalty / (1 + penalty))
    for loss, factor in zip(upper_losses, factors, strict=True):
        (factor * loss()).backward()

    @torch.no_grad()
    def objective() -> float:
        upper, coupled, lower = (float(loss()) for loss in (*upper_losses, lower_loss))
        return factors[0] * upper + factors[1] * (coupled - lower)

    perturb(backbone, again(), eps)
    plus = objective()
    perturb(backbone, again(), -2 * eps)
    minus = objective()
    projected = (plus - minus) / (2 * eps)
    draw = again()
    for name, parameter in backbone.items():
        z = draw(name, parameter)
        parameter.data = parameter.data + eps * z
        parameter.grad = projected * z
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return projected


def option_loss(model: torch.nn.Module, batch: Mapping[str, Tensor], logits_to_keep: int = 0) -> Tensor:
    """Cross-entropy over one-token options; for transformers, to keep 0 means the logits of all positions."""
    mask, tokens = batch["attention_mask"], batch["scored"][2]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=logits_to_keep,
        use_cache=False,
    ).logits
    scores = logits.float()[:, -1].log_softmax(-1).gather(1, tokens[batch["slots"][:, :, 0]])
    return functional.cross_entropy(scores, batch["gold"])
