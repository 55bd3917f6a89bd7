"""The truncated Neumann series."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, check_rtol
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
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

    Source: Lorraine, Vicol and Duvenaud (2020), algorithm 3, where the step is the learning rate. Departure: stops
    early once the residual (I - step A)^k b meets `rtol`.

    Args:
        num_terms: terms of the series.
        step: factor in front of A; in units of 1 / A.
        rtol: stops early at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.

    Raises:
        ValueError: a hyperparameter out of range.

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[0.5]]))
        >>> Neumann(num_terms=3).solve(A, torch.ones(1)).value  # 1 + 1/2 + 1/4
        tensor([1.7500])
    """

    num_terms: int
    step: float = 1.0
    rtol: float | None = None

    def __post_init__(self) -> None:
        check_count("Neumann", "num_terms", self.num_terms)
        check_rtol("Neumann", self.rtol)
        if not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(
                f"Neumann(step=...) needs a positive number; got {self.step}. For negative A solve with -A."
            )

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        return solve_in_cycles(
            "Neumann",
            self._recurrence,
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.num_terms,
            num_refinements=2,
            num_vectors=2,
            exhausted="num_terms reached",
        )

    def _recurrence(self, product: Products, residual: Tensor, target: float, budget: int) -> Cycle:
        every = check_every(residual)
        d, r = torch.zeros_like(residual), residual
        size = row_norm(r)
        limit = DIVERGENCE * size
        active = size > target
        step = active * torch.full_like(size, self.step)
        num_iter = 0
        while num_iter < budget:
            num_iter += 1
            d.addcmul_(r, step)
            if num_iter == budget:  # the frame computes this residual from its definition
                break
            new_r = torch.add(r, product(r), alpha=-self.step)
            size = torch.where(active, row_norm(new_r), size)
            active = active & (size > target) & (size <= limit)
            r = torch.where(active, new_r, r)
            step = step * active
            if num_iter % every == 0 and not any_row(active):
                break
        if any_row(size.isnan()):  # an infinite size is divergence
            check_finite("Neumann", num_iter, size)
        return Cycle(d, num_iter, size <= target, size > limit, "diverged")
