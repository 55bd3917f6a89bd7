"""Conjugate gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, check_rtol, require_symmetric
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
from implicitgrad.linalg.hindsight import Coefficients
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.preconditioner import Preconditioner, check_preconditioner
from implicitgrad.linalg.rows import any_row, check_every, row_dot
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite

NEGATIVE_CURVATURE = "negative curvature"
MISLED = "preconditioner not positive definite"


@dataclass(frozen=True)
class CG(LinearSolver):
    r"""Solves symmetric positive definite systems by conjugate gradients, with honest residuals.

    Each iterate minimises ``½ xᵀAx - bᵀx`` over a Krylov space; the error falls at least like
    $2 ((\sqrt\kappa - 1) / (\sqrt\kappa + 1))^k$ with the condition number $\kappa$. Costs one product and about
    five passes over a vector per iteration, one product more for the true residual, and five vectors of memory per
    right-hand side.

    Whether A is definite need not be known: a direction p with ``pᵀAp <= 0`` ends that row with the reason
    "negative curvature" and the iterate before it. Take `MINRES` then.

    The coefficients of the recurrence give `Solution.ritz_min`, `Solution.ritz_max` and `Solution.energy_error` at no
    product. The Ritz values are missing with a preconditioner P, where they would be those of P A, and for more than
    256 right-hand sides; all three are missing after negative curvature.

    Source: Hestenes and Stiefel (1952), section 3; preconditioned as in Saad, Iterative Methods (2003), algorithm 9.1.
    Departures: every right-hand side has its own step lengths and stands still once done; after the recurrence has
    converged the residual is computed afresh and CG restarted from there if it is too large.

    Args:
        rtol: stops at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        max_iter: iterations over all restarts; None for 10 n, at most 2000.
        num_refinements: restarts after the recurrence has converged and the true residual has not. One that does not
            halve the residual is the last, with the reason "precision floor".
        preconditioner: ``r -> z`` on ``(..., n)``, symmetric positive definite, close to A⁻¹ r. It must leave r
            unchanged. Or a recipe, which is carried out at the first solve with an operator and remembered there.

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
    preconditioner: Callable[[Tensor], Tensor] | Preconditioner | None = None

    def __post_init__(self) -> None:
        check_rtol("CG", self.rtol)
        check_count("CG", "max_iter", self.max_iter)
        check_count("CG", "num_refinements", self.num_refinements, at_least=0)
        check_preconditioner("CG", self.preconditioner)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        require_symmetric("CG", A, "GMRES")

        def recurrence(product: Products, residual: Tensor, target: float, budget: int) -> Cycle:
            return conjugate_gradients(product, residual, target, budget, carried_out(self.preconditioner, A, product))

        return solve_in_cycles(
            "CG",
            recurrence,
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.max_iter,
            num_refinements=self.num_refinements,
            num_vectors=4 if self.preconditioner is None else 5,
        )


def carried_out(
    preconditioner: Callable[[Tensor], Tensor] | Preconditioner | None, A: LinearOperator, product: Products
) -> Callable[[Tensor], Tensor] | None:
    """The function ``r -> P r``; the products that a recipe spends are counted in `product`."""
    if not isinstance(preconditioner, Preconditioner):
        return preconditioner

    def build() -> Callable[[Tensor], Tensor]:
        product.count += preconditioner.cost(A.base)
        return preconditioner.build(A.base)

    return A.remember(preconditioner, build)


def conjugate_gradients(
    product: Products,
    residual: Tensor,
    target: float,
    budget: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
    name: str = "CG",
) -> Cycle:
    """One run of the recurrence, every row by itself; a `Recurrence` if there is no preconditioner.

    `name` is that of the solver, for errors.
    """
    every, limit = check_every(residual), target**2
    coefficients = Coefficients()
    d, r = torch.zeros_like(residual), residual
    z, rho, square = _precondition(precondition, r)
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
        coefficients.append(step, rho)
        d.addcmul_(p, step)
        r.addcmul_(q, step, value=-1)
        old_rho = rho
        z, rho, square = _precondition(precondition, r)
        active = active & (square > limit)
        if precondition is not None:
            active = active & (rho > 0)
        if num_iter % every == 0 and not any_row(active):
            break
        torch.addcmul(z, p, torch.where(active, rho / old_rho, zero), out=p)
    check_finite(name, num_iter, lowest, square, rho)
    claimed = square <= limit
    broken = ~active & ~claimed
    if any_row(broken):
        reason = MISLED if precondition is not None and any_row(broken & (rho <= 0)) else NEGATIVE_CURVATURE
        return Cycle(d, num_iter, claimed, broken, reason)
    hindsight = coefficients.hindsight(rho, square, ritz=precondition is None)
    return Cycle(d, num_iter, claimed, broken, hindsight=hindsight)


def _precondition(precondition: Callable[[Tensor], Tensor] | None, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z = P r, <r, z> and <r, r>."""
    square = row_dot(r, r)
    if precondition is None:
        return r, square, square
    z = precondition(r).detach()
    return z, row_dot(r, z), square
