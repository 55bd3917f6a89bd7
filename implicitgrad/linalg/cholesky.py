"""Cholesky factorisation of the dense matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg.checks import check_rtol, require_symmetric
from implicitgrad.linalg.dense import Factor, finite_matrix, solve_directly
from implicitgrad.linalg.matrix import factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.solver import LinearSolver, Solution


@dataclass(frozen=True)
class Cholesky(LinearSolver):
    """Solves symmetric positive definite systems by ``A = L Lᵀ``.

    The factor is remembered on the operator: the first solve costs n products (none if the operator knows its matrix),
    n³/3 operations and 2 n² numbers of memory; each further right-hand side 2 n² operations and one product for the
    true residual. `x0` is not used.

    Source: Golub and Van Loan, Matrix Computations (4th ed.), section 4.2; one step of iterative refinement (section
    3.5.3) in working precision where the residual is above `rtol`.

    Args:
        rtol: decides about `Solution.converged` and the refinement; None for 1e-10 in float64, 1e-5 in float32.

    Raises:
        ValueError: `rtol` out of range; in `solve`, an operator that is not declared symmetric (use LU).
        torch.linalg.LinAlgError: in `solve`, the matrix is not positive definite (use LU or MINRES).

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[4.0, 0.0], [0.0, 2.0]]), symmetric=True, definite=True)
        >>> Cholesky().solve(A, torch.tensor([1.0, 1.0])).value
        tensor([0.2500, 0.5000])
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        check_rtol("Cholesky", self.rtol)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        require_symmetric("Cholesky", A, "LU")
        return solve_directly("Cholesky", _factorise, A, b, x0, self.rtol)


def _factorise(A: LinearOperator) -> Factor:
    # a failure is remembered as well: who falls back on another solver does so without a second attempt
    lower, info = A.remember(Cholesky, lambda: _attempt(finite_matrix("Cholesky", A.base)))
    if info.any():
        raise LinAlgError(
            f"Cholesky: {A} is not positive definite (first at pivot {int(info.max())}). Use LU or MINRES, or add"
            f" damping: A.damped(...)."
        )
    return Factor(lambda columns: torch.cholesky_solve(columns.to(lower.dtype), lower), lower.nbytes)


def _attempt(matrix: Tensor) -> tuple[Tensor, Tensor]:
    factor = torch.linalg.cholesky_ex(matrix.to(factor_dtype(matrix.dtype)))
    return factor.L, factor.info
