"""Minimal residuals for symmetric systems."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, check_rtol, require_symmetric
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_dot, row_norm
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite


@dataclass(frozen=True)
class MINRES(LinearSolver):
    """Solves symmetric systems, indefinite or singular ones too, with a residual that never grows.

    Each iterate minimises |b - A x| over a Krylov space, by the Lanczos process and a QR factorisation updated by one
    rotation per step. Costs one product and about nine passes over a vector per iteration, one product more for the
    true residual, and ten vectors of memory per right-hand side.

    A singular system is solved if b lies in the range of A. If it does not, the row ends near a least-squares solution
    with the reason "singular to working precision".

    Source: Paige and Saunders (1975), section 6, in the notation of their MINRES program. Departures: a row ends at a
    least-squares point when ``|A r| <= eps^0.75 |A| |r|``, with eps of the dtype and the longest part column of the
    Lanczos matrix for |A|, so that a loose `rtol` cannot trigger it; after convergence the residual is computed afresh
    and MINRES restarted if it is too large.

    Args:
        rtol: stops at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        max_iter: iterations over all restarts; None for 10 n, at most 2000.

    Raises:
        ValueError: a hyperparameter out of range; in `solve`, an operator that is not declared symmetric (use GMRES).

    Example:
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([2.0, -4.0])), symmetric=True)
        >>> MINRES().solve(A, torch.tensor([1.0, 1.0])).value
        tensor([ 0.5000, -0.2500])
    """

    rtol: float | None = None
    max_iter: int | None = None

    def __post_init__(self) -> None:
        check_rtol("MINRES", self.rtol)
        check_count("MINRES", "max_iter", self.max_iter)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        require_symmetric("MINRES", A, "GMRES")
        return solve_in_cycles(
            "MINRES",
            _recurrence,
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.max_iter,
            num_refinements=2,
            num_vectors=8,
        )


def _recurrence(product: Products, residual: Tensor, target: float, budget: int) -> Cycle:
    every, threshold = check_every(residual), torch.finfo(residual.dtype).eps ** 0.75
    d = torch.zeros_like(residual)
    w, w_old, v_old = torch.zeros_like(d), torch.zeros_like(d), torch.zeros_like(d)
    phi = row_norm(residual)  # norm of the residual
    active = phi > target
    zero = torch.zeros_like(phi)
    v = residual * torch.where(active, 1 / phi, zero)
    beta, delta_bar, epsilon, norm = zero, zero, zero, zero
    cosine, sine = zero - 1, zero
    num_iter = 0
    while num_iter < budget:
        num_iter += 1
        # Lanczos: beta_new v_new = A v - alpha v - beta v_old
        u = torch.addcmul(product(v), v_old, beta, value=-1)
        alpha = row_dot(v, u)
        u.addcmul_(v, alpha, value=-1)
        beta = row_norm(u)
        norm = torch.maximum(norm, torch.hypot(alpha, beta))  # keeps a NaN

        # the previous rotation acts on the new column of the tridiagonal matrix, which ends in alpha and beta
        epsilon_old = epsilon
        delta = cosine * delta_bar + sine * alpha
        gamma_bar = sine * delta_bar - cosine * alpha
        epsilon = sine * beta
        delta_bar = -cosine * beta
        # |A r| = phi · |(gamma_bar, delta_bar)|, before this step changes r
        active = active & (torch.hypot(gamma_bar, delta_bar) > threshold * norm)

        # a new rotation makes (gamma_bar, beta) into (gamma, 0)
        gamma = torch.hypot(gamma_bar, beta)
        inverse = torch.where(active, 1 / gamma, zero)
        cosine, sine = gamma_bar * inverse, beta * inverse
        direction = torch.addcmul(v, w_old, epsilon_old, value=-1).addcmul_(w, delta, value=-1).mul_(inverse)
        w_old, w = w, direction
        d.addcmul_(w, cosine * phi)
        phi = torch.where(active, sine * phi, phi)
        active = active & (phi > target)
        if num_iter % every == 0 and not any_row(active):
            break
        v_old, v = v, u.mul_(torch.where(active, 1 / beta, zero))
    check_finite("MINRES", num_iter, norm, phi)
    claimed = phi <= target
    return Cycle(d, num_iter, claimed, ~active & ~claimed, "singular to working precision")
