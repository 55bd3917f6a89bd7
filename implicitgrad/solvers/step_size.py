"""Step sizes that adapt without a host synchronisation."""

from typing import NamedTuple

import torch
from torch import Tensor

SEARCH, GROWTH = 2.0, 1.1  # before the first trial that fails, and afterwards
SHORTEST_CUT = 1e-2  # a trial far out may see a curvature that says nothing about that nearby
HOPELESS = 1e-30  # of the first step: a hundred halvings in a row


class StepSize(NamedTuple):
    """A step size and the factor by which it grows after a step that passed.

    A trial step d of size t passes if `t · <Δgradient, d> <= <d, d>`: the mean curvature along d is at most 1/t (or
    that of a mirror map). For a quadratic loss this is the usual test of values, `f(y + d) <= f(y) + <∇f, d> +
    <d, d>/2t`. Near a solution differences of values drown in rounding at `|d| ~ √eps`; those of gradients still
    decide.
    All numbers stay on their device: a failed trial is an idle iteration, not an inner loop.

    Source: Becker, Candès, Grant (2011), "Templates for convex cone problems", section 5.3, both the test and growing
    steps.

    Attributes:
        size: t, 0-dimensional.
        growth: 0-dimensional.
    """

    size: Tensor
    growth: Tensor

    @classmethod
    def first(cls, like: Tensor, size: float) -> "StepSize":
        """The first trial; it need not be good."""
        return cls(like.new_full((), size), like.new_full((), SEARCH))

    def passes(self, curvature: Tensor, square: Tensor, rounding: Tensor) -> Tensor:
        """Whether a step with `<Δgradient, d> = curvature` and `<d, d> = square` is short enough; NaN is not."""
        return self.size * (curvature - rounding) <= square

    def after(self, passed: Tensor, curvature: Tensor, square: Tensor) -> "StepSize":
        """What to try next: a longer step, or the one that the curvature allows and at most half of the last."""
        fitting = square / curvature
        shorter = torch.where(fitting > 0, fitting, self.size).clamp(SHORTEST_CUT * self.size, self.size / 2)
        size = torch.where(passed, self.growth * self.size, shorter)
        return StepSize(size, torch.where(passed, self.growth, GROWTH))


def rounding_of(gradient: Tensor, direction: Tensor) -> Tensor:
    """Rounding error of `<Δgradient, direction>`."""
    lengths = torch.linalg.vector_norm(gradient) * torch.linalg.vector_norm(direction)
    return 10 * torch.finfo(direction.dtype).eps * lengths
