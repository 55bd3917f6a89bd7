"""The frame that least-squares solvers share: rectangular systems, damping, and two ways to have converged.

The problem  min |A x - b|² + damping |x|²  is  min |Ā x - b̄|²  with Ā the rows of A above those of √damping · I, and
b̄ = (b, 0). At the solution the residual r̄ = b̄ - Ā x need not vanish, but Āᵀ r̄ = Aᵀ(b - A x) - damping x does. Each
cycle of a recurrence ends with both computed from their definitions, by one product with A and one with Aᵀ; the next
cycle solves for the correction.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.checks import CheckedSystem, check_count, check_rtol, check_system, default_rtol
from implicitgrad.linalg.cycles import REFINEMENT_GAIN, REFINEMENT_TARGET
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, row_norm, safe_row_norm
from implicitgrad.linalg.solver import Products, Solution, check_finite, unscaled_solution, zero_solution

NUM_REFINEMENTS = 2
DEFAULT_MAX_ITER = 2000
# In units of eps: |Aᵀr| / (|A| |r|) below this means that r is orthogonal to the range of A to working precision.
SINGULAR = 50.0


class System(NamedTuple):
    """What a recurrence works on: Ā and Āᵀ divided by a lower bound on |Ā|, so that their norm is one or more."""

    forward: Callable[[Tensor], Tensor]  # v -> Ā v, (..., n) -> (..., m)
    backward: Callable[[Tensor], Tensor]  # u -> Āᵀ u
    solved: Callable[[Tensor, Tensor, Tensor], Tensor]  # norms of r̄ and Āᵀ r̄, lower bound on that of Ā -> row flags


class Descent(NamedTuple):
    """What a recurrence did to ``min |Ā d - residual|``; row scalars are 0-dimensional or (..., 1)."""

    step: Tensor  # d, (..., n)
    num_iter: int
    claimed: Tensor  # rows whose estimates passed the test
    norm: Tensor  # the largest |Ā v| / |v| seen, at least one


# (system, residual, Āᵀ residual, budget) -> Descent. Rows with a zero residual are to be left alone.
Recurrence = Callable[[System, Tensor, Tensor, int], Descent]


class _Point(NamedTuple):
    """An iterate with what its quality is judged by."""

    x: Tensor
    r: Tensor  # b̄ - Ā x
    gradient: Tensor  # Āᵀ r
    size: Tensor  # |r|
    slope: Tensor  # |Āᵀ r|


def check_hyperparameters(name: str, rtol: float | None, max_iter: int | None, damping: float) -> None:
    """Refuse what no least-squares solver can take.

    Raises:
        ValueError: with the value.
    """
    check_rtol(name, rtol)
    check_count(name, "max_iter", max_iter)
    if not (isinstance(damping, (int, float)) and math.isfinite(damping) and damping >= 0):
        raise ValueError(f"{name}(damping=...) needs a finite number, zero or positive; got {damping!r}.")


def solve_least_squares(
    name: str,
    recurrence: Recurrence,
    A: LinearOperator,
    b: Tensor,
    x0: Tensor | None,
    *,
    damping: float,
    rtol: float | None,
    max_iter: int | None,
    num_vectors: int,
) -> Solution:
    """Minimise ``|A x - b|² + damping |x|²`` by cycles of a recurrence until the true residuals pass or nothing helps.

    A row has converged when |r̄| <= rtol |b| ("consistent") or |Āᵀ r̄| <= rtol |Ā| |r̄| ("least squares"), with a lower
    bound on |Ā| from the products. If A has no more rows than columns and is not damped, so that b is expected in its
    range, the second counts below 50 eps only: a loose rtol must not take a small singular value for a zero one.

    Args:
        name: class name of the solver, for messages.
        recurrence: one cycle.
        A: the operator, of any shape.
        b: right-hand sides ``(*batch_shape, m)`` or ``(k, *batch_shape, m)``.
        x0: first guess, ``(..., n)``.
        damping: not negative.
        rtol: None for `default_rtol`.
        max_iter: over all cycles; None for 2000.
        num_vectors: vectors that the recurrence holds per right-hand side, in each of the two spaces.

    Raises:
        ValueError: A has no transposed product; what `check_system` refuses.
        FloatingPointError: NaN or infinity in a residual or the solution.
    """
    if not A.T.has_product:
        raise ValueError(f"{name} needs products with Aᵀ; got {A} without. Make it with rmatvec=..., or use GMRES.")
    system = check_system(name, A, b, x0, rectangular=True)
    if system.zero:
        zero = zero_solution(name, system)
        return replace(zero, value=b.new_zeros(*b.shape[:-1], A.size), normal_residual=zero.residual_norm)
    problem = _Problem(A, system, damping, default_rtol(A) if rtol is None else rtol)
    budget = DEFAULT_MAX_ITER if max_iter is None else max_iter
    point = problem.start(system.x0)
    check_finite(name, 0, point.size, point.slope)
    norm = problem.first_norm(point)
    unsolved = ~(problem.excess(point.size, point.slope, norm) <= 1)
    floor = refined = torch.zeros_like(unsolved)
    num_iter = refinement = 0
    while num_iter < budget and refinement <= NUM_REFINEMENTS and any_row(unsolved):
        unit = torch.where(norm > 0, norm, 1)
        descent = recurrence(
            problem.scaled(unit, margin=REFINEMENT_TARGET if refinement else 1.0),
            torch.where(unsolved, point.r, 0),
            torch.where(unsolved, point.gradient / unit, 0),
            budget - num_iter,
        )
        first, num_iter = num_iter == 0, num_iter + descent.num_iter
        new = problem.point(point.x + descent.step / unit)
        check_finite(name, num_iter, new.size, new.slope, descent.norm)
        norm = torch.maximum(norm, descent.norm * unit)

        old_excess = problem.excess(point.size, point.slope, norm)
        new_excess = problem.excess(new.size, new.slope, norm)
        unsolved = unsolved & ~(new_excess <= 1)
        # a row that ends without a claim, though there is budget left, has come as far as one whose refinement fails
        ended = refined & descent.claimed if num_iter >= budget else refined | ~descent.claimed
        floor = floor | unsolved & ended & (new_excess > REFINEMENT_GAIN * old_excess)
        refined = refined | descent.claimed
        unsolved = unsolved & ~floor
        kept = (new_excess < old_excess) | first
        point = _Point(*(torch.where(kept, *pair) for pair in zip(new, point, strict=True)))
        refinement += any_row(unsolved & descent.claimed)
    outcomes = {
        "precision floor": floor,
        "max_iter reached" if num_iter >= budget else "num_refinements reached": unsolved,
        "least squares": point.size > problem.rtol,
    }
    reason = next((word for word, rows in outcomes.items() if any_row(rows)), "consistent")
    solution = unscaled_solution(
        name,
        system,
        point.x,
        row_norm(point.r[..., : A.num_rows]),
        num_iter=num_iter,
        num_matvec=problem.forward.count + problem.backward.count,
        converged=reason in ("consistent", "least squares"),
        reason=reason,
        memory=(num_vectors + 2) * (point.x.nbytes + point.r.nbytes),  # with x, b and their residuals
    )
    return replace(solution, normal_residual=(point.slope * system.scale).reshape(b.shape[:-1]))


class _Problem:
    """``min |Ā x - b̄|`` with its products, counted."""

    def __init__(self, A: LinearOperator, system: CheckedSystem, damping: float, rtol: float):
        stacked = _stacked(A, damping)
        self.forward, self.backward = Products(stacked), Products(stacked.T)
        self.rtol = rtol
        attainable = stacked.num_rows <= stacked.size
        self._normal_rtol = min(rtol, SINGULAR * torch.finfo(A.dtype).eps) if attainable else rtol
        self._zero = system.b.new_zeros(*system.b.shape[:-1], A.size)
        self._b = torch.cat([system.b, self._zero], -1) if damping else system.b

    def start(self, x0: Tensor | None) -> _Point:
        return self._measured(self._zero, self._b) if x0 is None else self.point(x0)

    def point(self, x: Tensor) -> _Point:
        return self._measured(x, self._b - self.forward(x))

    def _measured(self, x: Tensor, r: Tensor) -> _Point:
        gradient = self.backward(r)
        return _Point(x, r, gradient, safe_row_norm(r), safe_row_norm(gradient))

    def first_norm(self, point: _Point) -> Tensor:
        """A lower bound on |Ā| from the products made so far."""
        image = safe_row_norm(self._b - point.r)
        return torch.maximum(_ratio(point.slope, point.size), _ratio(image, safe_row_norm(point.x)))

    def excess(self, size: Tensor, slope: Tensor, norm: Tensor) -> Tensor:
        """How far above the tolerance: at most one where solved."""
        cosine = torch.where(slope > 0, slope / size / norm, slope)
        return torch.minimum(size / self.rtol, cosine / self._normal_rtol)

    def scaled(self, unit: Tensor, margin: float) -> System:
        """What a recurrence sees: Ā divided by `unit`."""
        return System(
            lambda v: self.forward(v) / unit,
            lambda u: self.backward(u) / unit,
            lambda size, slope, norm: self.excess(size, slope, norm) <= margin,
        )


def _stacked(A: LinearOperator, damping: float) -> LinearOperator:
    """The rows of A above those of √damping · I."""
    if damping == 0:
        return A
    root, num_rows, transposed = math.sqrt(damping), A.num_rows, A.T

    def forward(v: Tensor) -> Tensor:
        return torch.cat([A @ v, root * v], -1)

    def backward(u: Tensor) -> Tensor:
        return torch.add(transposed @ u[..., :num_rows].contiguous(), u[..., num_rows:], alpha=root)

    return LinearOperator(
        forward,
        A.size,
        num_rows=num_rows + A.size,
        rmatvec=backward,
        matmat=forward,
        rmatmat=backward,
        dtype=A.dtype,
        device=A.device,
        batch_shape=A.batch_shape,
    )


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0)
