"""Steps that decrease a function sufficiently."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SUFFICIENT = 1e-4  # share of the linear decrease that a step has to reach (Nocedal and Wright, section 3.1)
FLATTER = 0.9  # share of the slope that a Wolfe step may leave
NUM_TRIALS = 40  # 0.5^40 = 1e-12: a step that short no longer changes y in float64


def backtrack(
    value: Callable[[Tensor], Tensor],
    y: Tensor,
    direction: Tensor,
    *,
    reference: float,
    slope: float,
    step: float = 1.0,
) -> float | None:
    """The first of `step`, `step / 2`, `step / 4`, ... that decreases `value` sufficiently.

    A step t passes with `value(y + t d) <= reference + 1e-4 t slope`. Ten roundings of the reference are allowed
    besides: near a solution the decrease drowns in rounding while the gradient still falls. NaN and infinities do not
    pass, so that steps out of the domain of a function are shortened.

    Args:
        value: Function of `(n,)` with 0-dimensional values.
        y: Where to start, `(n,)`.
        direction: d, `(n,)`.
        reference: What the new value is compared with: the value at y, or a larger one.
        slope: Derivative along d at y, negative.
        step: Largest step.

    Returns:
        The step; None if 40 did not pass.

    Source: Armijo (1966); the allowance for rounding is that of approximate Wolfe conditions (Hager and Zhang, 2005).
    """
    for _ in range(NUM_TRIALS):
        if _is_lower(value(y + step * direction).item(), reference, step * slope, y.dtype):
            return step
        step /= 2
    return None


def wolfe(
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    y: Tensor,
    direction: Tensor,
    *,
    reference: float,
    slope: float,
    step: float = 1.0,
) -> tuple[float, Tensor, Tensor] | None:
    """A step that decreases a function sufficiently and leaves at most 0.9 of its slope, so that curvature is positive.

    Doubles the step while the slope is too steep, then halves the interval between a step too short and one too long.

    Args:
        value_and_gradient: Function of `(n,)` with a 0-dimensional value and a gradient `(n,)`.
        y: Where to start, `(n,)`.
        direction: d, `(n,)`.
        reference: Value at y.
        slope: Derivative along d at y, negative.
        step: First trial.

    Returns:
        The step, value and gradient there; None if 40 trials found none.

    Source: Lewis and Overton (2013), "Nonsmooth optimization via quasi-Newton methods", algorithm 4.6, with the
    allowance for rounding of `backtrack`.
    """
    short, long = 0.0, math.inf
    for _ in range(NUM_TRIALS):
        loss, gradient = value_and_gradient(y + step * direction)
        after, left = torch.stack([loss.double(), (gradient @ direction).double()]).tolist()
        if not _is_lower(after, reference, step * slope, y.dtype) or not math.isfinite(left):
            long = step
        elif left < FLATTER * slope:
            short = step
        else:
            return step, loss, gradient
        step = 2 * short if long == math.inf else (short + long) / 2
    return None


def _is_lower(after: float, before: float, linear: float, dtype: torch.dtype) -> bool:
    slack = 10 * torch.finfo(dtype).eps * abs(before)
    return math.isfinite(after) and after <= before + SUFFICIENT * linear + slack
