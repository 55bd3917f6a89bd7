"""Symmetric indefinite factorisation of the dense matrix."""

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
class LDL(LinearSolver):
    """Solves symmetric systems, indefinite ones too, by ``P A Pᵀ = L D Lᵀ`` with blocks of one and two rows in D.

    The factor is remembered on the operator: the first solve costs n products (none if the operator knows its matrix),
    n³/3 operations, half of what `LU` takes, and 2 n² numbers of memory; each further right-hand side 2 n² operations
    and one product for the true residual. `x0` is not used.

    A matrix that is singular up to rounding gives a solution all the same; whether it is one is told by
    `Solution.converged` and the residual.

    Source: Bunch and Kaufman (1977); Golub and Van Loan, Matrix Computations (4th ed.), section 4.4; one step of
    iterative refinement (section 3.5.3) in working precision where the residual is above `rtol`.

    Args:
        rtol: decides about `Solution.converged` and the refinement; None for 1e-10 in float64, 1e-5 in float32.

    Raises:
        ValueError: `rtol` out of range; in `solve`, an operator that is not declared symmetric (use LU).
        torch.linalg.LinAlgError: in `solve`, the matrix is exactly singular (damp it, or use MINRES).

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), symmetric=True)
        >>> LDL().solve(A, torch.tensor([2.0, 4.0])).value
        tensor([2., 1.])
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        check_rtol("LDL", self.rtol)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        require_symmetric("LDL", A, "LU")
        return solve_directly("LDL", _factorise, A, b, x0, self.rtol)


def _factorise(A: LinearOperator) -> Factor:
    factor, pivots, info = A.remember(LDL, lambda: _attempt(finite_matrix("LDL", A)))
    if info.any():
        raise LinAlgError(
            f"LDL: {A} is singular (block {int(info.max())} of D is zero). Add damping, A.damped(...), or use MINRES if"
            f" b lies in its range."
        )
    return Factor(lambda columns: torch.linalg.ldl_solve(factor, pivots, columns.to(factor.dtype)), factor.nbytes)


def _attempt(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.linalg.ldl_factor_ex(matrix.to(factor_dtype(matrix.dtype))))
