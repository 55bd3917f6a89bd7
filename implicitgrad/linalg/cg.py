"""Conjugate gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, check_rtol, require_symmetric
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_dot
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite


@dataclass(frozen=True)
class CG(LinearSolver):
    r"""Solves symmetric positive definite systems by conjugate gradients, with honest residuals.

    Each iterate minimises ``½ xᵀAx - bᵀx`` over a Krylov space; the error falls at least like
    $2 ((\sqrt\kappa - 1) / (\sqrt\kappa + 1))^k$ with the condition number $\kappa$. Costs one product and about
    five passes over a vector per iteration, one product more for the true residual, and seven vectors of memory per
    right-hand side.

    Whether A is definite need not be known: a direction p with ``pᵀAp <= 0`` ends that row with the reason
    "negative curvature" and the iterate before it. Take `MINRES` then.

    Source: Hestenes and Stiefel (1952), section 3; preconditioned as in Saad, Iterative Methods (2003), algorithm 9.1.
    Departures: every right-hand side has its own step lengths and stands still once done; after the recurrence has
    converged the residual is computed afresh and CG restarted from there if it is too large.

    Args:
        rtol: stops at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        max_iter: iterations over all restarts; None for 10 n, at most 2000.
        num_refinements: restarts after the recurrence has converged and the true residual has not. One that does not
            halve the residual is the last, with the reason "precision floor".
        preconditioner: ``r -> z`` on ``(..., n)``, symmetric positive definite, close to A⁻¹ r. It must leave r
            unchanged.

    Raises:
        ValueError: a hyperparameter out of range; in `solve`, an operator that is not declared symmetric (use GMRES).

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True, definite=True)
        >>> CG().solve(A, torch.tensor([1.0, 2.0])).value
        tensor([0.0909, 0.6364])
    """

    rtol: float | None = None
    max_iter: int | None = None
    num_refinements: int = 2
    preconditioner: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_rtol("CG", self.rtol)
        check_count("CG", "max_iter", self.max_iter)
        check_count("CG", "num_refinements", self.num_refinements, at_least=0)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        require_symmetric("CG", A, "GMRES")
        return solve_in_cycles(
            "CG",
            self._recurrence,
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.max_iter,
            num_refinements=self.num_refinements,
            num_vectors=5,
        )

    def _recurrence(self, product: Products, residual: Tensor, target: float, budget: int) -> Cycle:
        every, limit = check_every(residual), target**2
        d, r = torch.zeros_like(residual), residual.clone()
        z, rho, square = self._precondition(r)
        p = z.clone()
        zero = torch.zeros_like(square)
        lowest = zero + torch.inf  # curvature so far; keeps a NaN
        active = square > limit
        num_iter = 0
        while num_iter < budget:
            num_iter += 1
            q = product(p)
            curvature = row_dot(p, q)
            lowest = torch.minimum(lowest, curvature)
            active = active & (curvature > 0)
            step = torch.where(active, rho / curvature, zero)
            d.addcmul_(p, step)
            r.addcmul_(q, step, value=-1)
            old_rho = rho
            z, rho, square = self._precondition(r)
            active = active & (square > limit)
            if self.preconditioner is not None:
                active = active & (rho > 0)
            if num_iter % every == 0 and not any_row(active):
                break
            torch.addcmul(z, p, torch.where(active, rho / old_rho, zero), out=p)
        check_finite("CG", num_iter, lowest, square, rho)
        claimed = square <= limit
        broken = ~active & ~claimed
        misled = self.preconditioner is not None and bool((broken & (rho <= 0)).any())
        return Cycle(
            d, num_iter, claimed, broken, "preconditioner not positive definite" if misled else "negative curvature"
        )

    def _precondition(self, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z = P r, <r, z> and <r, r>."""
        square = row_dot(r, r)
        if self.preconditioner is None:
            return r, square, square
        z = self.preconditioner(r).detach()
        return z, row_dot(r, z), square
