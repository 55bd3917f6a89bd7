"""Chebyshev semi-iteration."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, check_rtol, require_symmetric
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
from implicitgrad.linalg.lanczos import LANCZOS_VECTORS, spectral_interval
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_norm
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite

# The residual shrinks from the first step on if the bounds hold; a hundredfold growth is taken for divergence.
DIVERGENCE = 100.0


@dataclass(frozen=True)
class Chebyshev(LinearSolver):
    r"""Solves symmetric positive definite systems by a fixed polynomial in A: the Neumann series, accelerated.

    Among polynomials of its degree that of Chebyshev makes the residual $p_k(A) b$, $p_k(0) = 1$, smallest for
    eigenvalues anywhere in ``[low, high]``: it falls like $2 ((\sqrt\kappa - 1) / (\sqrt\kappa + 1))^k$ with
    $\kappa = high / low$, where the series of `Neumann` has $(1 - 1 / \kappa)^k$. Eigenvalues between 0 and `low` are
    reduced too, but slowly; one above ``low + high`` makes it diverge. Costs one product and four passes over a vector
    per iteration, one product more for the true residual, and six vectors of memory per right-hand side. Unlike `CG`
    it needs no inner products, and x depends linearly on b; `CG` needs fewer iterations.

    A row whose residual has grown a hundredfold ends with the reason "diverged" and the last iterate. A Ritz value
    that is not positive ends it with "negative curvature" before the first iteration. Take `MINRES` then.

    Source: Golub and Varga (1961); Saad, Iterative Methods (2003), algorithm 12.1. Departure: automatic bounds.

    Args:
        rtol: stops at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        max_iter: iterations over all restarts; None for 10 n, at most 2000.
        bounds: ``(low, high)`` around the eigenvalues, in units of A. None looks for them with 20 products by Lanczos,
            once per operator, each system of a stack for itself: `high` is 1.05 (θ_max + its residual), `low` is
            0.5 θ_min or the proven `LinearOperator.eigenvalue_floor` if that is more; with at most 20 unknowns they are
            the extreme eigenvalues. `Solution.reason` names them. A wrong `low` costs iterations only: one that is off
            by a factor c either way up to 2 √c times as many.

    Raises:
        ValueError: a hyperparameter out of range; in `solve`, an operator that is not declared symmetric (use GMRES).

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True, definite=True)
        >>> Chebyshev(bounds=(2.0, 5.0)).solve(A, torch.tensor([1.0, 2.0])).value
        tensor([0.0909, 0.6364])
    """

    rtol: float | None = None
    max_iter: int | None = None
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_rtol("Chebyshev", self.rtol)
        check_count("Chebyshev", "max_iter", self.max_iter)
        if self.bounds is not None and not 0 < self.bounds[0] <= self.bounds[1] < math.inf:
            raise ValueError(
                f"Chebyshev(bounds=...) needs a pair with 0 < low <= high, or None for automatic ones; got"
                f" {self.bounds}."
            )

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        require_symmetric("Chebyshev", A, "GMRES")
        solution = solve_in_cycles(
            "Chebyshev",
            partial(self._recurrence, A),
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.max_iter,
            num_refinements=2,
            num_vectors=4 if self.bounds is not None else LANCZOS_VECTORS,
        )
        if self.bounds is not None or solution.num_iter == 0:
            return solution
        low, high = self._bounds(A, Products(A))  # remembered by now
        seen = f"eigenvalues taken between {low.amin():.3g} and {high.amax():.3g}"
        return replace(solution, reason=f"{solution.reason} ({seen})")

    def _bounds(self, A: LinearOperator, product: Products) -> tuple[Tensor, Tensor]:
        """Row scalars; not positive where A is not positive definite."""
        if self.bounds is not None:
            low, high = torch.tensor(self.bounds, dtype=A.dtype, device=A.device)
            return low, high
        low, high = spectral_interval("Chebyshev", A, product)
        return low.clamp_min(A.eigenvalue_floor) if A.eigenvalue_floor else low, high

    def _recurrence(self, A: LinearOperator, product: Products, residual: Tensor, target: float, budget: int) -> Cycle:
        every = check_every(residual)
        low, high = self._bounds(A, product)
        definite = low > 0
        low, high = torch.where(definite, low, 1), torch.where(definite, high, 1)
        middle, radius = (high + low) / 2, (high - low) / 2
        d, r = torch.zeros_like(residual), residual
        size = row_norm(r)
        limit = DIVERGENCE * size
        active = (size > target) & definite
        rho = radius / middle
        p = r / middle
        num_iter = 0
        while num_iter < budget:
            num_iter += 1
            d.addcmul_(p, active.to(d.dtype))
            if num_iter == budget:  # the frame computes this residual from its definition
                break
            new_r = r - product(p)
            size = torch.where(active, row_norm(new_r), size)
            active = active & (size > target) & (size <= limit)
            r = torch.where(active, new_r, r)
            gain = 2 / (2 * middle - radius * rho)  # 2 ρ' / δ in Saad, who divides by a radius that may be zero
            p = torch.addcmul(gain * r, p, gain * radius / 2 * rho)
            rho = gain * radius / 2
            if num_iter % every == 0 and not any_row(active):
                break
        if any_row(size.isnan()):  # an infinite size is divergence
            check_finite("Chebyshev", num_iter, size)
        reason = "diverged" if not any_row(~definite) else "negative curvature"
        return Cycle(d, num_iter, size <= target, (size > limit) | ~definite, reason)
