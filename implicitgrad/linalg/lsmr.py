"""Minimal normal residuals for least squares."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.least_squares import Descent, System, check_hyperparameters, solve_least_squares
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_norm
from implicitgrad.linalg.solver import LinearSolver, Solution, check_finite


@dataclass(frozen=True)
class LSMR(LinearSolver):
    r"""Minimises $|Ax - b|^2 + damping\,|x|^2$ for A of any shape; |Aᵀ(b - A x)| falls at every step, |b - A x| too.

    Equal to MINRES on ``AᵀA x = Aᵀb``, without forming AᵀA: stops earlier than `CGLS` where b is out of reach, and
    keeps its accuracy where A is ill-conditioned. Costs one product with A, one with Aᵀ and about twelve passes over a
    vector per iteration, one product of each more for the true residuals, and seven vectors of memory in each space per
    right-hand side. The rate goes with the condition number of A, whose square is that of ``AᵀA``.

    For a singular A without damping: with x0 = 0 the shortest solution, otherwise x0 plus the shortest correction.
    `Solution.reason` is "consistent" if b is reached, |b - A x| <= rtol |b|, and "least squares" if the normal residual
    is small, |Aᵀ(b - A x) - damping x| <= rtol |A| |b - A x|, both measured afresh at the end;
    `Solution.normal_residual` holds the second. With damping, |b - A x| is to be read as |(b - A x, -√damping x)|.

    Source: Fong and Saunders (2011), on the bidiagonalisation of Golub and Kahan (1965). Departures: damping by rows
    √damping · I below A, which holds for any x0; |A| is bounded from below by the products made; |b - A x| by smoothing
    (Zhou and Walker, 1994; see the code) instead of a third chain of rotations; a square or wide A without damping
    counts as solved in the sense of least squares only below 50 eps, so that a loose `rtol` cannot take a small
    singular value for zero; the residuals are computed afresh after convergence and the method restarted if they are
    too large.

    Args:
        rtol: None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        max_iter: iterations over all restarts; None for 2000.
        damping: added to AᵀA, zero or positive; in units of A².

    Raises:
        ValueError: a hyperparameter out of range; in `solve`, an operator without transposed product.

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
        >>> solution = LSMR().solve(A, torch.tensor([2.0, 3.0, 4.0]))  # rank one: the shortest solution
        >>> solution.value.round(decimals=3), solution.residual_norm, solution.reason
        (tensor([1., 1.]), tensor(5.), 'least squares')
    """

    rtol: float | None = None
    max_iter: int | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_hyperparameters("LSMR", self.rtol, self.max_iter, self.damping)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        return solve_least_squares(
            "LSMR",
            _recurrence,
            A,
            b,
            x0,
            damping=self.damping,
            rtol=self.rtol,
            max_iter=self.max_iter,
            num_vectors=5,
        )


def _recurrence(system: System, residual: Tensor, gradient: Tensor, budget: int) -> Descent:
    every = check_every(residual)
    size = row_norm(residual)
    u = residual * _inverse(size)
    v = gradient * _inverse(size)
    alpha = row_norm(v)
    v = v * _inverse(alpha)
    h, h_bar, d = v, torch.zeros_like(v), torch.zeros_like(v)
    zero, norm = torch.zeros_like(size), torch.ones_like(size)
    rho, rho_bar, cosine_bar, sine_bar = norm, norm, norm, zero
    alpha_bar, zeta_bar, lsqr_size = alpha, alpha * size, size
    active = alpha > 0
    claimed = torch.zeros_like(active)
    num_iter = 0
    while num_iter < budget:
        num_iter += 1
        # Golub-Kahan: beta u = A v - alpha u, then alpha v = Aᵀu - beta v. Rows at rest have u = v = 0.
        u = torch.addcmul(system.forward(v), u, alpha, value=-1)
        beta = row_norm(u)
        norm = torch.maximum(norm, torch.hypot(alpha, beta))  # |A v|; keeps a NaN
        u = u * _inverse(beta)
        v = torch.addcmul(system.backward(u), v, beta, value=-1)
        alpha = row_norm(v)

        # B = Q R, then Rᵀ = Q̄ R̄
        old_rho, rho = rho, torch.hypot(alpha_bar, beta)
        cosine, sine = alpha_bar * _inverse(rho), beta * _inverse(rho)
        theta, alpha_bar = sine * alpha, cosine * alpha
        theta_bar, corner = sine_bar * rho, cosine_bar * rho
        old_rho_bar, rho_bar = rho_bar, torch.hypot(corner, theta)
        cosine_bar, sine_bar = corner * _inverse(rho_bar), theta * _inverse(rho_bar)
        zeta, zeta_bar = cosine_bar * zeta_bar, -sine_bar * zeta_bar

        h_bar = torch.addcmul(h, h_bar, theta_bar * rho * _inverse(old_rho * old_rho_bar), value=-1)
        d.addcmul_(h_bar, zeta * _inverse(rho * rho_bar))
        # LSMR's residuals are those of LSQR, smoothed: r = w r_old + (1 - w) r_lsqr with w = sine_bar², and those of
        # LSQR fulfil <r_old, r_lsqr> = |r_lsqr|²
        lsqr_size = sine * lsqr_size
        weight = sine_bar**4
        size = (weight * size.square() + (1 - weight) * lsqr_size.square()).sqrt()
        claimed = claimed | active & system.solved(size, zeta_bar.abs(), norm)
        active = active & ~claimed & (alpha > 0)
        if num_iter % every == 0 and not any_row(active):
            break
        alpha, zeta_bar = torch.where(active, alpha, zero), torch.where(active, zeta_bar, zero)
        v = v * _inverse(alpha)
        h = torch.addcmul(v, h, theta * _inverse(rho), value=-1)
    check_finite("LSMR", num_iter, norm, alpha)
    return Descent(d, num_iter, claimed, norm)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1 / x, 0)
