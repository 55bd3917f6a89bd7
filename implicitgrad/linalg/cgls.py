"""Conjugate gradients for least squares."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.least_squares import Descent, System, check_hyperparameters, solve_least_squares
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_dot, row_norm
from implicitgrad.linalg.solver import LinearSolver, Solution, check_finite


@dataclass(frozen=True)
class CGLS(LinearSolver):
    r"""Minimises $|Ax - b|^2 + damping\,|x|^2$ for A of any shape by conjugate gradients, without forming AᵀA.

    Each iterate minimises the objective over a Krylov space, so |b - A x| falls at every step; |Aᵀ(b - A x)| need not
    (that of `LSMR` does). Costs one product with A, one with Aᵀ and about eight passes over a vector per iteration, one
    product of each more for the true residuals, and five vectors of memory in each space per right-hand side. The rate
    goes with the condition number of A, whose square is that of ``AᵀA``.

    For a singular A without damping: with x0 = 0 the shortest solution, otherwise x0 plus the shortest correction.
    `Solution.reason` is "consistent" if b is reached, |b - A x| <= rtol |b|, and "least squares" if the normal residual
    is small, |Aᵀ(b - A x) - damping x| <= rtol |A| |b - A x|, both measured afresh at the end;
    `Solution.normal_residual` holds the second. With damping, |b - A x| is to be read as |(b - A x, -√damping x)|.

    Source: Hestenes and Stiefel (1952), section 10; Björck, Numerical Methods for Least Squares Problems (1996),
    algorithm 7.4.1. Departures: damping by rows √damping · I below A, which holds for any x0; |A| is bounded from below
    by the products made; a square or wide A without damping counts as solved in the sense of least squares only below
    50 eps, so that a loose `rtol` cannot take a small singular value for zero; the residual is computed afresh after
    convergence and the method restarted if it is too large.

    Args:
        rtol: None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        max_iter: iterations over all restarts; None for 2000.
        damping: added to AᵀA, zero or positive; in units of A².

    Raises:
        ValueError: a hyperparameter out of range; in `solve`, an operator without transposed product.

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
        >>> solution = CGLS().solve(A, torch.tensor([1.0, 4.0, 5.0]))
        >>> solution.value.round(decimals=3), solution.residual_norm, solution.reason
        (tensor([1., 2.]), tensor(5.), 'least squares')
    """

    rtol: float | None = None
    max_iter: int | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_hyperparameters("CGLS", self.rtol, self.max_iter, self.damping)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        return solve_least_squares(
            "CGLS",
            _recurrence,
            A,
            b,
            x0,
            damping=self.damping,
            rtol=self.rtol,
            max_iter=self.max_iter,
            num_vectors=3,
        )


def _recurrence(system: System, residual: Tensor, gradient: Tensor, budget: int) -> Descent:
    every = check_every(residual)
    r, s, p = residual, gradient, gradient  # s = Aᵀ r
    d = torch.zeros_like(p)
    gamma = row_dot(s, s)
    zero, norm = torch.zeros_like(gamma), torch.ones_like(gamma)
    active = gamma > 0
    claimed = torch.zeros_like(active)
    num_iter = 0
    while num_iter < budget:
        num_iter += 1
        q = system.forward(p)
        square = row_dot(q, q)
        norm = torch.where(active, torch.maximum(norm, square.sqrt() / row_norm(p)), norm)  # keeps a NaN
        active = active & (square > 0)
        step = torch.where(active, gamma / square, zero)
        d.addcmul_(p, step)
        r = torch.addcmul(r, q, step, value=-1)
        s = system.backward(r)
        old_gamma, gamma = gamma, row_dot(s, s)
        claimed = claimed | active & system.solved(row_norm(r), gamma.sqrt(), norm)
        active = active & ~claimed
        if num_iter % every == 0 and not any_row(active):
            break
        p = torch.addcmul(s, p, torch.where(active, gamma / old_gamma, zero))
    check_finite("CGLS", num_iter, norm, gamma)
    return Descent(d, num_iter, claimed, norm)
