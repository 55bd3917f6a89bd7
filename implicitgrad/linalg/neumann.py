"""The truncated Neumann series."""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, check_rtol
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
from implicitgrad.linalg.lanczos import LANCZOS_VECTORS, spectral_interval
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_norm
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite

# Residuals of a matrix far from normal may grow a while before they fall; a hundredfold growth is taken for divergence.
DIVERGENCE = 100.0


@dataclass(frozen=True)
class Neumann(LinearSolver):
    r"""Approximates A⁻¹b by the first terms of a geometric series; any square operator.

    $x = step \sum_{k < num\_terms} (I - step A)^k b$. Converges for every b if and only if the spectral radius of
    I - step A is below one: for symmetric A if 0 < step · eig(A) < 2, at the rate 1 - step · λ_min. Costs `num_terms`
    products, one of them for the true residual, and four vectors of memory per right-hand side. `CG` and `GMRES` need
    far fewer products for the same accuracy; the series is for T-step truncated differentiation, to which it is equal.

    With a guess x0 the series starts there: the terms act on b - A x0 and are added to x0. A row whose residual has
    grown a hundredfold ends with the reason "diverged" and the last iterate.

    Source: Lorraine, Vicol and Duvenaud (2020), algorithm 3, where the step is the learning rate. Departures: stops
    early once the residual (I - step A)^k b meets `rtol`; the automatic step.

    Args:
        num_terms: terms of the series.
        step: factor in front of A; in units of 1 / A. None for an automatic one: for symmetric A
            1 / (1.05 (θ_max + its residual)) with the largest Ritz value of 20 products by Lanczos, once per operator,
            each system of a stack for itself; 1 / λ_max with at most 20 unknowns. The series converges then for every
            definite A of which θ_max shows more than half. For an A that is not symmetric None is 1, the step of fixed
            points. `Solution.reason` names it.
        rtol: stops early at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.

    Raises:
        ValueError: a hyperparameter out of range.

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[0.5]]))
        >>> Neumann(num_terms=3).solve(A, torch.ones(1)).value  # 1 + 1/2 + 1/4
        tensor([1.7500])
    """

    num_terms: int
    step: float | None = 1.0
    rtol: float | None = None

    def __post_init__(self) -> None:
        check_count("Neumann", "num_terms", self.num_terms)
        check_rtol("Neumann", self.rtol)
        if self.step is not None and not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(
                f"Neumann(step=...) needs a positive number, or None for an automatic one; got {self.step}."
                f" For negative A solve with -A."
            )

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        solution = solve_in_cycles(
            "Neumann",
            partial(self._recurrence, A),
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.num_terms,
            num_refinements=2,
            num_vectors=2 if self.step is not None else LANCZOS_VECTORS,
            exhausted="num_terms reached",
        )
        if self.step is not None or solution.num_iter == 0:
            return solution
        steps = self._step(A, Products(A))  # remembered by now
        low, high = steps.amin().item(), steps.amax().item()
        shown = f"step {low:.3g}" if low == high else f"steps {low:.3g} to {high:.3g}"
        return replace(solution, reason=f"{solution.reason} ({shown})")

    def _step(self, A: LinearOperator, product: Products) -> Tensor:
        """A row scalar; zero where A has no positive eigenvalue."""
        one = torch.ones((), dtype=A.dtype, device=A.device)
        if self.step is not None or not A.symmetric:
            return one if self.step is None else self.step * one
        largest = spectral_interval("Neumann", A, product)[1]
        return torch.where(largest > 0, 1 / largest, 0)

    def _recurrence(self, A: LinearOperator, product: Products, residual: Tensor, target: float, budget: int) -> Cycle:
        every = check_every(residual)
        rate = self._step(A, product)
        d, r = torch.zeros_like(residual), residual
        size = row_norm(r)
        limit = DIVERGENCE * size
        active = (size > target) & (rate > 0)
        step = active * rate
        num_iter = 0
        while num_iter < budget:
            num_iter += 1
            d.addcmul_(r, step)
            if num_iter == budget:  # the frame computes this residual from its definition
                break
            new_r = torch.addcmul(r, product(r), rate, value=-1)
            size = torch.where(active, row_norm(new_r), size)
            active = active & (size > target) & (size <= limit)
            r = torch.where(active, new_r, r)
            step = step * active
            if num_iter % every == 0 and not any_row(active):
                break
        if any_row(size.isnan()):  # an infinite size is divergence
            check_finite("Neumann", num_iter, size)
        hopeless = ~(rate > 0)
        reason = "no positive eigenvalue" if any_row(hopeless) else "diverged"
        return Cycle(d, num_iter, size <= target, (size > limit) | hopeless, reason)
