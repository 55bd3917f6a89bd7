"""Solves regular systems by LU, and singular ones in the least-norm sense."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.conditions.regularity import rank_tolerance
from implicitgrad.linalg import LinearOperator, LinearSolver, Solution, irregular
from implicitgrad.linalg.checks import check_rtol
from implicitgrad.linalg.dense import Factor, finite_matrix, solve_directly
from implicitgrad.linalg.matrix import factor_dtype


@dataclass(frozen=True)
class LeastNorm(LinearSolver):
    """Solves any square system: by LU if the matrix is regular, otherwise the shortest of the best approximations.

    Whether it is regular is told by two steps of inverse iteration with the factor. A singular value below 1e-11 times
    the largest counts as zero; then the pseudo-inverse by a singular value decomposition takes over, at some ten times
    the cost. If b lies in the range of a singular A, the residual vanishes; where it does not, `Solution.converged` is
    false. Both factors are remembered on the operator and serve A and ``A.T``.

    Source: Golub and Van Loan, Matrix Computations (4th ed.), sections 3.4, 3.5.4 and 5.5.2.

    Args:
        rtol: decides about `Solution.converged`; None for 1e-10 in float64, 1e-5 in float32.

    Raises:
        ValueError: `rtol` out of range.

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        >>> LeastNorm().solve(A, torch.tensor([2.0, 2.0])).value
        tensor([1.0000, 1.0000])
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        check_rtol("LeastNorm", self.rtol)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        solution = solve_directly("LeastNorm", _factorise, A, b, x0, self.rtol)
        decomposition = A.remember(LeastNorm, lambda: _decompose(A.base))
        if isinstance(decomposition, _Regular) or decomposition.rank == A.size:
            return solution
        rank = f"the matrix is singular, of rank {decomposition.rank} of {A.size}"
        return replace(solution, reason=f"{rank}; {solution.reason if solution.converged else 'b is not in its range'}")


class _Regular(NamedTuple):
    factor: Tensor
    pivots: Tensor

    def inverse(self, columns: Tensor, transposed: bool) -> Tensor:
        return torch.linalg.lu_solve(self.factor, self.pivots, columns.to(self.factor.dtype), adjoint=transposed)


class _Singular(NamedTuple):
    left: Tensor
    values: Tensor  # inverses; 0 for those that count as zero
    right: Tensor
    rank: int  # the smallest of a batch

    def inverse(self, columns: Tensor, transposed: bool) -> Tensor:
        first, last = (self.right, self.left) if transposed else (self.left, self.right)
        return last @ (self.values.unsqueeze(-1) * (first.mT @ columns.to(first.dtype)))


def _factorise(A: LinearOperator) -> Factor:
    decomposition = A.remember(LeastNorm, lambda: _decompose(A.base))
    transposed = A.transposed
    nbytes = sum(part.nbytes for part in decomposition if isinstance(part, Tensor))
    return Factor(lambda columns: decomposition.inverse(columns, transposed), nbytes)


def _decompose(A: LinearOperator) -> _Regular | _Singular:
    matrix = finite_matrix("LeastNorm", A)
    matrix = matrix.to(factor_dtype(matrix.dtype))
    factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
    regular = _Regular(factor, pivots)
    if not info.any() and not _nearly_singular(matrix, regular):
        return regular
    left, values, right = torch.linalg.svd(matrix)
    cutoff = rank_tolerance(A.size, matrix.dtype) * values[..., :1]
    inverses = torch.where(values > cutoff, 1 / values, 0)
    return _Singular(left, inverses, right.mT, int((values > cutoff).sum(-1).min()))


def _nearly_singular(matrix: Tensor, regular: _Regular) -> bool:
    """Whether inverse iteration finds a singular value below the cutoff."""
    probe = irregular(matrix[..., 0]).unsqueeze(-1)
    for _ in range(2):
        probe = probe / torch.linalg.vector_norm(probe, dim=-2, keepdim=True)
        ahead = regular.inverse(probe, transposed=False)
        probe = regular.inverse(ahead, transposed=True)
    smallest = torch.linalg.vector_norm(probe, dim=-2).rsqrt().squeeze(-1)
    largest = torch.linalg.matrix_norm(matrix)  # Frobenius: at most √n above the largest singular value
    tolerance = rank_tolerance(matrix.shape[-1], matrix.dtype)
    return not bool((smallest > tolerance * largest).all())  # NaN from an overflow counts as singular
