"""Linear systems by the factor that a Newton iteration leaves behind."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from implicitgrad.linalg import CG, Auto, LinearOperator, LinearSolver, Solution


@dataclass(frozen=True)
class LastFactor(LinearSolver):
    """Solves by conjugate gradients preconditioned with the inverse of a matrix near A; by `Auto` where that fails.

    The factor of the last Newton step was made one step before the solution, so that it differs from the Jacobian there
    by as much as that step changed y: one or two products suffice, and nothing is factorised.

    Args:
        inverse: ``r -> B⁻¹ r`` on ``(..., n)`` with B symmetric positive definite and close to A.
        rtol: as in `CG`.

    Raises:
        ValueError: in `solve`, an operator that is not declared symmetric.

    Example:
        >>> import torch
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, 2.0])), symmetric=True, definite=True)
        >>> solution = LastFactor(lambda r: r / torch.tensor([1.0, 2.0])).solve(A, torch.ones(2))
        >>> solution.value, solution.num_iter
        (tensor([1.0000, 0.5000]), 1)
    """

    inverse: Callable[[Tensor], Tensor]
    rtol: float | None = None

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        solution = CG(rtol=self.rtol, max_iter=A.size + 100, preconditioner=self.inverse).solve(A, b, x0)
        if solution.converged or solution.reason == "precision floor":  # which no other solver would undercut
            return solution
        return Auto(rtol=self.rtol).solve(A, b, solution.value)


def left_behind(A: LinearOperator, solver: LinearSolver, last: Solution) -> LastFactor | None:
    """What a system with A that gave `last` leaves for later ones; None unless A was factorised and is definite.

    Holds the matrix and its factor, but not the graph behind A.
    """
    if last.solver == "KnownInverse":
        inverse = A.known_inverse
        return inverse and LastFactor(inverse)
    known = A.without_graph() if last.solver == "Cholesky" else None
    return known and LastFactor(lambda r: solver.solve(known, r.reshape(-1, known.size)).value.view(r.shape))
