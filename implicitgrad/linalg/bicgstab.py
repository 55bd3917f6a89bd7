"""Stabilised bi-conjugate gradients for systems without symmetry."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, check_right_preconditioner, check_rtol
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_dot, row_norm
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite

# Smallest cosine between s and A s that the stabilising step admits. Sleijpen and van der Vorst (1995) take 0.7. With
# restarts less is better: of 24 two-player games with 60 to 140 unknowns, 1000 iterations were enough for 11 with 0.7,
# 19 with 0.3, 18 with 0, and for 12 in SciPy, which neither lengthens the step nor restarts.
SMALLEST_COSINE = 0.3
# As in GMRES: restarts may need more than 10 n iterations, and hopeless systems are told apart by their stagnation.
DEFAULT_MAX_ITER = 2000


@dataclass(frozen=True)
class BiCGSTAB(LinearSolver):
    """Solves regular systems without symmetry in short recurrences; residuals fall on the whole, not at every step.

    Costs two products and about 14 passes over a vector per iteration, one product more for each true residual, and ten
    vectors of memory per right-hand side, whatever the number of iterations: for systems whose size forbids the basis
    of `GMRES`. Slow where the eigenvalues surround zero or lie near the imaginary axis; a skew-symmetric A, for which
    the very first step is undefined, ends with the reason "stagnated".

    Where a divisor of the recurrence vanishes next to its factors the method goes on afresh from the true residual of
    the best iterate. A cycle that gains less than 0.1 % ends the row with the reason "stagnated".

    Source: van der Vorst (1992), with the preconditioner on the right, so that the residual stays that of A x = b.
    Departures: the restarts; the iterate with the smallest residual is kept; the step length along s is raised where
    the cosine between s and A s is below 0.3, after Sleijpen and van der Vorst (1995), since short steps cost the
    recurrence its accuracy.

    Args:
        rtol: stops at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        max_iter: iterations over all cycles; None for 2000.
        preconditioner: ``r -> z`` on ``(..., n)``, linear, close to A⁻¹ r. It must leave r unchanged.

    Raises:
        ValueError: a hyperparameter out of range.

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
        >>> BiCGSTAB().solve(A, torch.tensor([5.0, 8.0])).value.round(decimals=3)
        tensor([1., 2.])
    """

    rtol: float | None = None
    max_iter: int | None = None
    preconditioner: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_rtol("BiCGSTAB", self.rtol)
        check_count("BiCGSTAB", "max_iter", self.max_iter)
        check_right_preconditioner("BiCGSTAB", self.preconditioner)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        return solve_in_cycles(
            "BiCGSTAB",
            self._recurrence,
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.max_iter or DEFAULT_MAX_ITER,
            num_refinements=2,
            num_vectors=8,
        )

    def _recurrence(self, product: Products, residual: Tensor, target: float, budget: int) -> Cycle:
        every, eps = check_every(residual), torch.finfo(residual.dtype).eps
        precondition = self.preconditioner or (lambda v: v)
        d, r, shadow = torch.zeros_like(residual), residual, residual
        best, p, v = torch.zeros_like(d), torch.zeros_like(d), torch.zeros_like(d)
        start = smallest = size = row_norm(r)
        zero, one = torch.zeros_like(size), torch.ones_like(size)
        limit = 0.1 / eps * start  # a residual is wrong by eps times the largest before it; beyond this nothing is won
        rho, alpha, omega = one, one, one
        norm, health = zero, zero  # a lower bound on that of A times the preconditioner; keeps a NaN
        active = size > target
        num_iter = 0
        while num_iter < budget:
            num_iter += 1
            old_rho, rho = rho, row_dot(shadow, r)
            active = active & (rho.abs() > eps * start * size)
            beta = torch.where(active, rho / old_rho * (alpha / omega), zero)
            p = torch.addcmul(r, torch.addcmul(p, v, omega, value=-1), beta)
            direction = precondition(p).detach()
            v = product(direction)
            sigma = row_dot(shadow, v)
            image, preimage = row_norm(v), row_norm(p)
            norm = torch.where(preimage > 0, torch.maximum(norm, image / preimage), norm)
            # below this the step alpha p is undefined, or so long that its rounding drowns the residual
            smallest_sigma = eps * torch.maximum(start * image, rho.abs() * norm * preimage / start)
            active = active & (sigma.abs() > smallest_sigma)
            alpha = torch.where(active, rho / sigma, zero)
            d.addcmul_(direction, alpha)
            s = torch.addcmul(r, v, alpha, value=-1)

            # r = s - omega A s with the omega that minimises |r|, or a larger one
            direction = precondition(s).detach()
            t = product(direction)
            size, length = row_norm(s), row_norm(t)
            cosine = row_dot(t, s) / (length * size)
            cosine = torch.where(cosine < 0, cosine.clamp(max=-SMALLEST_COSINE), cosine.clamp(min=SMALLEST_COSINE))
            halfway = active & (size <= target)
            active = active & ~halfway & (length > 0)
            omega = torch.where(active, cosine * size / length, zero)
            d.addcmul_(direction, omega)
            r = torch.addcmul(s, t, omega, value=-1)
            size = row_norm(r)
            health = health + 0 * (sigma + length + size)

            better = size < smallest
            best, smallest = torch.where(better, d, best), torch.where(better, size, smallest)
            active = active & (size > target) & (size <= limit)
            if num_iter % every == 0 and not any_row(active):
                break
        check_finite("BiCGSTAB", num_iter, health)
        # a row without convergence is not given up: the frame tells stagnation by the true residual
        return Cycle(best, num_iter, smallest <= target, torch.zeros_like(active))
