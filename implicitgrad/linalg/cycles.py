"""The frame that iterative solvers share: run a recurrence, measure the true residual, go on with what is left.

A recurrence only knows an estimate of its residual, which drifts away from the truth by rounding: asked for 1e-5 in
float32, CG's estimate was met at a true residual of 1.8e-5. So each cycle ends with one product that computes
``b - A x``, and the next cycle solves ``A d = b - A x`` for the correction d.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_system, default_rtol
from implicitgrad.linalg.hindsight import Hindsight, merged
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, safe_row_norm
from implicitgrad.linalg.solver import Products, Solution, check_finite, unscaled_solution, zero_solution

# A restart aims below the tolerance: rounding is not to leave it just above once more. So does a first cycle in
# single precision, where the estimate strays: 2 to 5 % more iterations instead of a restart that takes 7 %.
REFINEMENT_TARGET = 0.5
FIRST_TARGET = 0.8
# A refinement that does not halve the residual has met the precision of the products.
REFINEMENT_GAIN = 0.5
# A cycle of a restarted method that gains less than this will not get there.
CYCLE_GAIN = 0.999


class Cycle(NamedTuple):
    """What a recurrence did to ``A d = residual``. Row flags are 0-dimensional or (..., 1), like row scalars."""

    step: Tensor  # d, shape of the residual
    num_iter: int
    claimed: Tensor  # rows whose estimated residual met the target
    broken: Tensor  # rows on which the method cannot go on
    reason: str = ""  # why, for the broken rows
    hindsight: Hindsight | None = None  # of methods that have one, unless they broke down


# (product, residual, target, budget) -> Cycle. Rows with a zero residual are to be left alone. The residual is a copy
# that the recurrence may write into.
Recurrence = Callable[[Products, Tensor, float, int], Cycle]


def solve_in_cycles(
    name: str,
    recurrence: Recurrence,
    A: LinearOperator,
    b: Tensor,
    x0: Tensor | None,
    *,
    rtol: float | None,
    max_iter: int | None,
    num_refinements: int,
    num_vectors: int,
    exhausted: str = "max_iter reached",
) -> Solution:
    """Solve ``A x = b`` by cycles of a recurrence until the true residual meets the tolerance or nothing helps.

    Args:
        name: class name of the solver, for messages.
        recurrence: one cycle.
        A: the operator.
        b: right-hand sides, see `LinearSolver.solve`.
        x0: first guess.
        rtol: on |b - A x| / |b|; None for `default_rtol`.
        max_iter: over all cycles; None for 10 n, at most 2000.
        num_refinements: cycles allowed after one whose estimate met the tolerance while the true residual did not.
        num_vectors: vectors the solver holds per right-hand side.
        exhausted: the reason given when `max_iter` is used up.

    Raises:
        FloatingPointError: NaN or infinity in a residual or the solution.
    """
    system = check_system(name, A, b, x0)
    if system.zero:
        return zero_solution(name, system)
    b = system.b
    rtol = default_rtol(A) if rtol is None else rtol
    budget = min(10 * A.size, 2000) if max_iter is None else max_iter
    product = Products(A)
    x = system.x0  # None for zero: no vector for that while the first cycle runs
    r = b if x is None else b - product(x)
    relative = safe_row_norm(r)
    check_finite(name, 0, relative)
    unsolved = ~(relative <= rtol)
    broken = floor = stuck = refined = torch.zeros_like(unsolved)
    num_iter, refinement, reason, hindsight = 0, 0, "", None
    while num_iter < budget and refinement <= num_refinements and any_row(unsolved):
        cycle = recurrence(product, torch.where(unsolved, r, 0), rtol * _target(b.dtype, refinement), budget - num_iter)
        first, num_iter = num_iter == 0, num_iter + cycle.num_iter
        new_x = cycle.step if x is None else x + cycle.step
        new_r = b - product(new_x)
        new_relative = safe_row_norm(new_r)
        check_finite(name, num_iter, new_relative)

        unsolved = unsolved & ~(new_relative <= rtol)
        ended = cycle.claimed | cycle.broken
        floor = floor | unsolved & refined & ended & (new_relative > REFINEMENT_GAIN * relative)
        # a breakdown in a refinement is curvature lost in rounding, not a property of A
        broken = broken | unsolved & cycle.broken & ~refined
        if num_iter < budget:
            stuck = stuck | unsolved & ~ended & (new_relative > CYCLE_GAIN * relative)
        refined = refined | cycle.claimed
        unsolved = unsolved & ~(floor | broken | stuck)
        reason = reason or cycle.reason
        hindsight = merged(hindsight, cycle.hindsight)

        # the first iterate is kept even where its residual is larger: CG lowers the error, not the residual
        kept = (new_relative < relative) | first
        x, r = new_x if x is None else torch.where(kept, new_x, x), torch.where(kept, new_r, r)
        relative = torch.where(kept, new_relative, relative)
        refinement += any_row(unsolved & cycle.claimed)
    outcomes = {
        reason: broken,
        "precision floor": floor,
        "stagnated": stuck,
        exhausted if num_iter >= budget else "num_refinements reached": unsolved,
    }
    reason = next((word for word, rows in outcomes.items() if any_row(rows)), "converged")
    return unscaled_solution(
        name,
        system,
        torch.zeros_like(b) if x is None else x,
        relative,
        num_iter=num_iter,
        num_matvec=product.count,
        converged=reason == "converged",
        reason=reason,
        memory=(num_vectors + (1 if system.x0 is None else 3)) * b.nbytes,  # with b scaled; a start and its residual
        hindsight=None if any_row(broken) else hindsight,
    )


def _target(dtype: torch.dtype, refinement: int) -> float:
    """The residual that a cycle aims at, in units of rtol."""
    if refinement:
        return REFINEMENT_TARGET
    return 1.0 if dtype == torch.float64 else FIRST_TARGET
