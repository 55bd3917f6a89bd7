"""LU factorisation of the dense matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg.checks import check_rtol
from implicitgrad.linalg.dense import Factor, finite_matrix, solve_directly
from implicitgrad.linalg.matrix import factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.solver import LinearSolver, Solution


@dataclass(frozen=True)
class LU(LinearSolver):
    """Solves any regular system by ``P A = L U`` with row exchanges.

    The factor is remembered on the operator and serves A and ``A.T``: the first solve costs n products (none if the
    operator knows its matrix), 2n³/3 operations and 2 n² numbers of memory; each further right-hand side 2 n²
    operations and one product for the true residual. `x0` is not used.

    A matrix that is singular up to rounding gives a solution all the same; whether it is one is told by
    `Solution.converged` and the residual.

    Source: Golub and Van Loan, Matrix Computations (4th ed.), section 3.4; one step of iterative refinement (section
    3.5.3) in working precision where the residual is above `rtol`.

    Args:
        rtol: decides about `Solution.converged` and the refinement; None for 1e-10 in float64, 1e-5 in float32.

    Raises:
        ValueError: `rtol` out of range.
        torch.linalg.LinAlgError: in `solve`, the matrix is exactly singular (damp it, or use MINRES if symmetric).

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> LU().solve(A, torch.tensor([2.0, 3.0])).value, LU().solve(A.T, torch.tensor([2.0, 3.0])).value
        (tensor([3., 1.]), tensor([1.5000, 2.0000]))
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        check_rtol("LU", self.rtol)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        return solve_directly("LU", _factorise, A, b, x0, self.rtol)


def _factorise(A: LinearOperator) -> Factor:
    factor, pivots, info = A.remember(LU, lambda: _attempt(finite_matrix("LU", A.base)))
    if info.any():
        raise LinAlgError(
            f"LU: {A} is singular (pivot {int(info.max())} is zero). Add damping, A.damped(...), or use MINRES if A is"
            f" symmetric and b in its range."
        )
    transposed = A.transposed
    return Factor(
        lambda columns: torch.linalg.lu_solve(factor, pivots, columns.to(factor.dtype), adjoint=transposed),
        factor.nbytes,
    )


def _attempt(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.linalg.lu_factor_ex(matrix.to(factor_dtype(matrix.dtype))))
