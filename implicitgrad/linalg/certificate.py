"""How far a computed solution of ``A x = b`` can be from the true one, and what that does to ``Bᵀx``.

``|x - x*| <= |A⁻¹| |b - A x|``. The residual is known; the bound is as good as what is known about ``|A⁻¹|``: proven
from an eigenvalue floor or from the inverse of a dense matrix, estimated from Ritz values of conjugate gradients.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.matrix import factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.solver import LinearSolver, Solution
from implicitgrad.linalg.symmetry import irregular

# The smallest Ritz value lies above the smallest eigenvalue, by 2 to 14 % once CG has converged to 1e-1 or better on
# logistic regression; the largest singular value found by five power steps lies below the largest there is.
ESTIMATE_MARGIN = 1.25
# Up to so many columns of B are computed one by one.
NUM_EXACT_COLUMNS = 8
NUM_POWER_STEPS = 5


@dataclass(frozen=True)
class ErrorBound:
    """An upper bound on the Euclidean norm of an error.

    Attributes:
        value: the bound, in units of what it bounds.
        rigorous: whether it is proven up to rounding in the products; otherwise it rests on an estimate.
        source: what it rests on.
    """

    value: float
    rigorous: bool
    source: str

    def __str__(self) -> str:
        return f"{'<=' if self.rigorous else '<~'} {self.value:.1e} ({self.source})"


class NormBound(NamedTuple):
    """An upper bound on a norm, proven or estimated, and what it rests on."""

    value: float
    rigorous: bool
    source: str


def inverse_norm(A: LinearOperator, ritz_min: float | None, *, dense: bool = True) -> NormBound | None:
    """A bound on |A⁻¹|, from the first of these that is at hand; None if none is.

    1. ``1 / eigenvalue_floor``: proven.
    2. From the remembered matrix, ``min(|A⁻¹|_F, sqrt(|A⁻¹|₁ |A⁻¹|_∞))``: proven, at the cost of one inverse.
    3. ``1.25 / ritz_min`` of CG: an estimate, as Ritz values approach the smallest eigenvalue from above.

    Args:
        A: the operator.
        ritz_min: `Solution.ritz_min` of a system with A, if there is one.
        dense: whether the inverse may be computed if the matrix is remembered.
    """
    if A.eigenvalue_floor is not None and A.eigenvalue_floor > 0:
        return NormBound(1 / A.eigenvalue_floor, A.noise == 0, "eigenvalue floor")
    if dense and A.dense_cost == 0:
        value, proven = A.remember("inverse norm", lambda: _dense_inverse_norm(A.to_dense()))
        return NormBound(value, proven and A.noise == 0, "dense inverse")
    if ritz_min is not None and ritz_min > 0:
        return NormBound(ESTIMATE_MARGIN / ritz_min, False, "Ritz values")
    return None


def _dense_inverse_norm(matrix: Tensor) -> tuple[float, bool]:
    """A bound on |M⁻¹| for the worst of ``(*batch, n, n)``, infinite for a singular one; whether rounding spares it."""
    matrix = matrix.detach().double()
    inverse, info = torch.linalg.inv_ex(matrix)
    size = inverse.abs()
    norms = torch.minimum(torch.linalg.matrix_norm(inverse), (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt())
    norms = torch.where((info == 0) & norms.isfinite(), norms, torch.inf)
    condition = norms * torch.linalg.matrix_norm(matrix)
    # rounding changes the inverse by about eps n cond
    return norms.max().item(), bool((torch.finfo(torch.float64).eps * len(matrix.mT) * condition < 0.1).all())


def solution_error(A: LinearOperator, b: Tensor, solution: Solution, *, dense: bool = True) -> ErrorBound | None:
    """A bound on ``|x - x*|`` for the worst right-hand side, None if nothing is known about |A⁻¹|.

    Args:
        A: the operator.
        b: right-hand sides, as given to the solver.
        solution: what the solver returned.
        dense: see `inverse_norm`.

    Example:
        >>> from implicitgrad.linalg import CG
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, 4.0])), symmetric=True).damped(1.0)
        >>> b = torch.ones(2)
        >>> print(solution_error(A, b, CG(max_iter=1).solve(A, b)))  # |A⁻¹| = 1/2
        <= 3.0e-01 (dense inverse)
    """
    norm = inverse_norm(A, solution.ritz_min, dense=dense)
    if norm is None:
        return None
    residual = solution.residual_norm + rounding(A, b, solution)
    return ErrorBound(norm.value * residual.max().item(), norm.rigorous, norm.source)


def rounding(A: LinearOperator, b: Tensor, solution: Solution) -> Tensor:
    """By how much the computed residual may differ from the true one, per right-hand side.

    ``(eps √n + noise) (|A| |x| + |b|)``, with what is known of |A|: from the matrix, or the largest Ritz value.
    """
    vector_norm = torch.linalg.vector_norm
    size = solution.ritz_max or (vector_norm(A.to_dense()).item() if A.dense_cost == 0 else 0.0)
    parts = size * vector_norm(solution.value, dim=-1) + vector_norm(b, dim=-1)
    return (torch.finfo(b.dtype).eps * A.size**0.5 + A.noise) * parts


def check_floor(A: LinearOperator, solution: Solution) -> None:
    """Refuse an eigenvalue floor that the solve has proven false.

    A Ritz value lies below it; or the matrix is at hand, and less the floor it has no Cholesky factor (n³ / 3
    operations, once).

    Raises:
        ValueError: with both numbers.
    """
    floor, eps = A.eigenvalue_floor, torch.finfo(A.dtype).eps
    if floor is None or A.noise > 0:
        return
    curvature = solution.ritz_min
    if curvature is not None and solution.ritz_max is not None:
        refuted = curvature < (1 - 1e-6) * floor - 100 * eps * solution.ritz_max
    elif A.dense_cost == 0:
        curvature = A.remember("floor refuted", lambda: _eigenvalue_below(A.to_dense().detach(), floor))
        refuted = curvature is not None
    else:
        return
    if refuted:
        raise ValueError(
            f"The eigenvalues of A were declared to be at least {floor:.3e} (strong_convexity or eigenvalue_floor), but"
            f" its curvature in some direction is {curvature:.3e}. Correct or drop that constant."
        )


def _eigenvalue_below(matrix: Tensor, floor: float) -> float | None:
    """The smallest eigenvalue of ``(*batch, n, n)`` if it lies below the floor by more than rounding, else None."""
    matrix = matrix.to(factor_dtype(matrix.dtype))
    slack = 100 * torch.finfo(matrix.dtype).eps * torch.linalg.matrix_norm(matrix) + 1e-6 * abs(floor)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    shift = (floor - slack).unsqueeze(-1).unsqueeze(-1)
    if not torch.linalg.cholesky_ex(matrix - shift * identity).info.any():
        return None
    return torch.linalg.eigvalsh(matrix).min().item()


def norm_bound(B: LinearOperator) -> NormBound:
    """A bound on |B|: the Frobenius norm for up to 8 columns or rows, otherwise estimated by five power steps.

    Costs min(m, n) products, or ten.
    """
    if min(B.shape) <= NUM_EXACT_COLUMNS:
        return NormBound(torch.linalg.matrix_norm(columns(B if B.size <= B.num_rows else B.T)).item(), True, "columns")
    v = irregular(torch.empty(B.vector_shape, dtype=B.dtype, device=B.device))
    size = v.new_zeros(())
    for _ in range(NUM_POWER_STEPS):
        image = B.T @ (B @ v)
        size = torch.linalg.vector_norm(image)
        v = image / torch.where(size > 0, size, 1)
    return NormBound(ESTIMATE_MARGIN * size.sqrt().item(), False, "power steps")


def columns(B: LinearOperator) -> Tensor:
    """The columns of B as rows ``(n, m)``; n products."""
    return (B @ torch.eye(B.size, dtype=B.dtype, device=B.device)).detach()


class DualWeighted(NamedTuple):
    """A correction to ``Bᵀu`` and a bound on the error that is left."""

    correction: Tensor  # Yᵀ r, (q,)
    bound: ErrorBound


def product_error(B: LinearOperator, error: ErrorBound) -> ErrorBound:
    """A bound on ``|Bᵀ(u - u*)|`` from one on ``|u - u*|``: times |B|."""
    norm = norm_bound(B)
    return ErrorBound(norm.value * error.value, norm.rigorous and error.rigorous, f"{error.source}, {norm.source}")


def dual_weighted(
    A: LinearOperator,
    B: LinearOperator,
    residual: Tensor,
    norm: NormBound,
    solver: LinearSolver,
    residual_error: float = 0.0,
) -> DualWeighted:
    """Correct ``Bᵀu`` for the residual ``r`` of ``Aᵀu = s``, with a bound on the error left.

    ``Bᵀ(u* - u) = Yᵀr + (B - A Y)ᵀ A⁻ᵀ r`` for every Y; with ``A Y = B`` solved loosely the last term is small, and at
    most ``|B - A Y|_F |A⁻¹| |r|``. Costs q products for B and one solve with q right-hand sides.

    Source: Becker and Rannacher (2001), "An optimal control approach to a posteriori error estimation", for the weight.

    Args:
        A: the operator of the system for u, without the transpose.
        B: ``(n, q)``, q at most 8.
        residual: ``r = s - Aᵀu``, ``(n,)``.
        norm: a bound on |A⁻¹|.
        solver: solves for Y; a relative residual of 0.1 is enough.
        residual_error: by how much the residual may be off, see `rounding`.

    Raises:
        ValueError: more than 8 columns.
    """
    if B.size > NUM_EXACT_COLUMNS:
        raise ValueError(
            f"A dual-weighted bound solves one system per upper variable, for at most {NUM_EXACT_COLUMNS};"
            f" got {B.size}."
        )
    right = columns(B)
    weights = solver.solve(A, right)
    size = torch.linalg.vector_norm
    left = size(weights.residual_norm + rounding(A, right, weights)).item() * norm.value
    bound = left * (size(residual).item() + residual_error) + size(weights.value).item() * residual_error
    return DualWeighted(weights.value @ residual, ErrorBound(bound, norm.rigorous, f"{norm.source}, dual weights"))
