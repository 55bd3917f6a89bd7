"""A solver chosen from size and declared structure."""

from dataclasses import dataclass, replace

from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg.cg import CG
from implicitgrad.linalg.checks import check_count, check_rtol
from implicitgrad.linalg.cholesky import Cholesky
from implicitgrad.linalg.gmres import GMRES
from implicitgrad.linalg.lu import LU
from implicitgrad.linalg.minres import MINRES
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.solver import LinearSolver, Solution

DENSE_SIZE = 500


@dataclass(frozen=True)
class Auto(LinearSolver):
    """Solves any system with the solver that suits its size and declared structure.

    | n                | symmetric                                           | not symmetric |
    | ---------------- | --------------------------------------------------- | ------------- |
    | up to dense_size | Cholesky; LU if the matrix is not positive definite | LU            |
    | above            | CG; MINRES if it meets negative curvature           | GMRES         |

    `Solution.solver` names the solver that produced the value, `Solution.reason` what was chosen and why, and
    `num_iter` and `num_matvec` count a failed first attempt too.

    The default for `dense_size` comes from logistic regression with 5 n examples and damping 1e-3, one right-hand side,
    one CPU thread (experiments/benchmarks/dense_crossover.py): matrix and Cholesky took 0.6 ms where CG took 9.8 at
    n = 50, 5 against 24 at 200, 33 against 47 at 400, 246 against 245 at 800, 2.0 s against 1.1 s at 1600. With damping
    1e-2 the crossing lay near 300, with 1e-4 near 1000. Further right-hand sides cost a factor one product each.

    Args:
        rtol: handed to the chosen solver.
        max_iter: handed to the chosen solver if it iterates.
        dense_size: largest n for which the matrix is written down.

    Raises:
        ValueError: a hyperparameter out of range.
        torch.linalg.LinAlgError: in `solve`, the matrix of a small system is exactly singular.

    Example:
        >>> import torch
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, -2.0])), symmetric=True)
        >>> Auto().solve(A, torch.ones(2)).reason
        'LU (n = 2 <= dense_size = 500; Cholesky found the matrix not positive definite): converged'
    """

    rtol: float | None = None
    max_iter: int | None = None
    dense_size: int = DENSE_SIZE

    def __post_init__(self) -> None:
        check_rtol("Auto", self.rtol)
        check_count("Auto", "max_iter", self.max_iter)
        check_count("Auto", "dense_size", self.dense_size, at_least=0)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        if A.size <= self.dense_size:
            return self._solve_directly(A, b, x0)
        return self._solve_by_iteration(A, b, x0)

    def _solve_directly(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        size = f"n = {A.size} <= dense_size = {self.dense_size}"
        cost = A.dense_cost
        if not A.symmetric:
            return _explained(LU(self.rtol).solve(A, b, x0), f"{size}, not symmetric")
        try:
            return _explained(Cholesky(self.rtol).solve(A, b, x0), f"{size}, symmetric")
        except LinAlgError:
            solution = LU(self.rtol).solve(A, b, x0)
        # the failed attempt made the matrix that LU found remembered
        solution = replace(solution, num_matvec=solution.num_matvec + cost)
        return _explained(solution, f"{size}; Cholesky found the matrix not positive definite")

    def _solve_by_iteration(self, A: LinearOperator, b: Tensor, x0: Tensor | None) -> Solution:
        size = f"n = {A.size} > dense_size = {self.dense_size}"
        if not A.symmetric:
            return _explained(GMRES(self.rtol, max_iter=self.max_iter).solve(A, b, x0), f"{size}, not symmetric")
        attempt = CG(self.rtol, self.max_iter).solve(A, b, x0)
        if attempt.reason != "negative curvature":
            return _explained(attempt, f"{size}, symmetric")
        solution = MINRES(self.rtol, self.max_iter).solve(A, b, x0)
        solution = replace(
            solution,
            num_iter=attempt.num_iter + solution.num_iter,
            num_matvec=attempt.num_matvec + solution.num_matvec,
            memory=max(attempt.memory, solution.memory),
        )
        return _explained(solution, f"{size}; CG met negative curvature after {attempt.num_iter} iterations")


def _explained(solution: Solution, why: str) -> Solution:
    return replace(solution, reason=f"{solution.solver} ({why}): {solution.reason}")
