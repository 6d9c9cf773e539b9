"""How well a zeroth-order estimate agrees with the true gradient, without all gradients in memory at once."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from zofo.noise import Distribution, Sum, Term, stream_key, write_sums

_PART = 1 << 20  # weights whose directions are in memory at a time


class Alignment:
    """The cosine of the estimate with the gradient that is backpropagated within `watching`.

        cos = <ĝ, ∇L> / |ĝ| |∇L|,   ĝ = (1 / q) sum_j g_j z_j

    Inner products are summed in double precision, parameter by parameter.

    Args:
        parameters: name -> tensor, leaves that require a gradient.
        seed: the run's seed.
        step: whose directions z_j are.
        projected: g_j, j < q.
        distribution: of the directions.
        limits: name -> the |W| above which a weight is not perturbed, where z counts as 0.

    Examples:
        >>> from zofo.noise import sample
        >>> w = torch.zeros(3, requires_grad=True)
        >>> z = sample(stream_key(0, 0, 0, "w"), 0, 3)
        >>> alignment = Alignment({"w": w}, 0, 0, projected=(5.0,))
        >>> with alignment.watching():
        ...     (w * z).sum().backward()
        >>> round(alignment.cosine, 6), w.grad is None
        (1.0, True)
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        seed: int,
        step: int,
        projected: Sequence[float],
        distribution: Distribution = "normal",
        limits: Mapping[str, float] | None = None,
    ) -> None:
        self._parameters = parameters
        self._stream = (seed, step)
        self._projected = projected
        self._distribution: Distribution = distribution
        self._limits = limits or {}
        self._product = self._of_estimate = self._of_gradient = 0.0

    @contextmanager
    def watching(self) -> Generator[None]:
        """Within the block, each gradient is used and dropped as soon as it is there: one backward pass only."""
        missing = dict(self._parameters)
        with ExitStack() as hooks:
            for name, parameter in self._parameters.items():

                def use(found: Tensor, name: str = name) -> None:
                    self._add(missing.pop(name), name, found.grad)
                    found.grad = None

                hooks.callback(parameter.register_post_accumulate_grad_hook(use).remove)
            yield
        for name, parameter in missing.items():  # of which the loss is no function, such as an expert's
            self._add(parameter, name, None)

    @property
    def cosine(self) -> float:
        """In [-1, 1]; nan where one of both is 0."""
        norms = math.sqrt(self._of_estimate) * math.sqrt(self._of_gradient)
        return self._product / norms if norms else math.nan

    @torch.no_grad()
    def _add(self, parameter: Tensor, name: str, gradient: Tensor | None) -> None:
        seed, step = self._stream
        factor = 1 / len(self._projected)
        terms = [Term(stream_key(seed, step, j, name), factor * g) for j, g in enumerate(self._projected)]
        flat = parameter.detach().flatten()
        for start in range(0, parameter.numel(), _PART):
            weights = flat[start : start + _PART]
            estimate = torch.zeros(len(weights), dtype=torch.float32, device=parameter.device)
            write_sums([Sum(estimate, estimate, terms, start)], self._distribution)
            perturbed = weights.abs() <= self._limits.get(name, math.inf)
            estimate = estimate.double() * perturbed
            self._of_estimate += float(estimate.dot(estimate))
            if gradient is not None:
                true = gradient.flatten()[start : start + _PART].double() * perturbed  # the others are not moved
                self._product += float(estimate.dot(true))
                self._of_gradient += float(true.dot(true))


def expected_cosine(directions: int, weights: int) -> float:
    """The mean cosine of a gradient with its projection onto q random directions in d dimensions.

        E cos = Γ((q + 1) / 2) Γ(d / 2) / [Γ(q / 2) Γ((d + 1) / 2)],   about sqrt(2 / π d) for q = 1

    An estimate of which every projected gradient is exact has it on average, if q is far below d.

    Examples:
        >>> round(expected_cosine(1, 10**8) / (2 / math.pi / 10**8) ** 0.5, 5), expected_cosine(5, 5)
        (1.0, 1.0)
    """
    gammas = (directions + 1, weights, directions, weights + 1)
    over, of_weights, under, of_more = (math.lgamma(n / 2) for n in gammas)
    return math.exp(over - under + of_weights - of_more)
