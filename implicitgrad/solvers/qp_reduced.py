"""Quadratic programs with definite Q, reduced to the multipliers of their inequalities."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.rows import check_every
from implicitgrad.solvers.active_set_factor import ActiveSetFactor
from implicitgrad.solvers.qp_program import Point, Program, apply, largest

MAX_ITER = 25  # beyond that the program is infeasible or degenerate, and the general method finds out which


class Reduction(NamedTuple):
    """`z` and `ν` as functions of `λ`, by factors that do not depend on it.

    For given λ the conditions of `QP` in z and ν are `K (z, ν) = (-c - Gᵀλ, b)` with `K = [Q, Aᵀ; A, 0]`. So the slacks
    are `s = q + M λ` with `q = h - G z(0)` and `M = G P Gᵀ`, P the upper left block of K⁻¹, and what remains is a
    linear complementarity problem: `s = q + M λ`, `s >= 0`, `λ >= 0`, `sᵀλ = 0`. An iteration of an interior point
    method on it factorises `M + diag(s/λ)`, m³/3 operations, where one on the program itself also has to form
    `Q + Gᵀ diag(λ/s) G` and to eliminate the equalities.

    Attributes:
        qp: The programs.
        lower: Cholesky factor L of Q, `(B, n, n)`.
        half: `L⁻¹Aᵀ`, `(B, n, p)`.
        schur: Cholesky factor of `A Q⁻¹Aᵀ`, `(B, p, p)`.
        matrix: M, `(B, m, m)`.
        offset: q, `(B, m)`.
    """

    qp: Program
    lower: Tensor
    half: Tensor
    schur: Tensor
    matrix: Tensor
    offset: Tensor

    @classmethod
    def of(cls, qp: Program) -> "Reduction | None":
        """The reduction; None unless every Q is definite and every A has independent rows."""
        lower, failed = torch.linalg.cholesky_ex(qp.Q)
        half, reach = (_forward(lower, part.mT) for part in (qp.A, qp.G))
        schur, failed_too = torch.linalg.cholesky_ex(half.mT @ half)
        if failed.any() or failed_too.any():
            return None
        basis = _forward(schur, half.mT)  # orthonormal rows
        inside = reach - basis.mT @ (basis @ reach)
        unfinished = cls(qp, lower, half, schur, inside.mT @ inside, qp.h)
        z, _ = unfinished.base(-qp.c.unsqueeze(-1), qp.b.unsqueeze(-1))
        return unfinished._replace(offset=qp.h - apply(qp.G, z.squeeze(-1)))

    def base(self, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """`K⁻¹ (r, e)` for columns `(B, n, k)` and `(B, p, k)`."""
        t = _forward(self.lower, r)
        nu = _backward(self.schur, _forward(self.schur, self.half.mT @ t - e))
        return _backward(self.lower, t - self.half @ nu), nu

    def point(self, lam: Tensor) -> Point:
        """z, ν and λ."""
        pull = -(self.qp.c + apply(self.qp.G.mT, lam))
        z, nu = self.base(pull.unsqueeze(-1), self.qp.b.unsqueeze(-1))
        return Point(z.squeeze(-1), nu.squeeze(-1), lam)

    def active_set_factor(self, active: Tensor) -> ActiveSetFactor:
        """For Newton steps on these inequalities; costs a Cholesky factor of m unknowns."""
        _, n, p, m = self.qp.sizes
        both = active.unsqueeze(-1) & active.unsqueeze(-2)
        factor = _cholesky(torch.where(both, self.matrix, 0), (~active).to(self.matrix.dtype))
        rows = torch.where(active.unsqueeze(-1), self.qp.G, 0)

        def inverse(columns: Tensor) -> Tensor:
            r, e, violation = columns.split([n, p, m], -2)
            z, _ = self.base(r, e)
            right = torch.where(active.unsqueeze(-1), rows @ z - violation, violation)
            lam = _backward(factor, _forward(factor, right))
            z, nu = self.base(r - rows.mT @ lam, e)
            return torch.cat([z, nu, lam], -2)

        parts = (self.lower, self.half, self.schur, factor, rows)
        return ActiveSetFactor(inverse, active, n + p + m, factor.dtype, sum(part.nbytes for part in parts))

    def solve(self, tol: float, max_iter: int) -> tuple[Tensor, Tensor, int]:
        """`(λ, s)`, each `(B, m)`, by Mehrotra's method, and the number of iterations. Where it fails, s is NaN.

        Stops at a duality gap of `√tol`, from where the active set is plain, and one Newton step on it is exact.
        """
        batch, _, _, m = self.qp.sizes
        M, q = self.matrix.expand(batch, m, m), self.offset.expand(batch, m)
        factor = _cholesky(M, torch.ones_like(q))
        lam = -_solved(factor, q)
        lam, s = lifted(lam), lifted(-lam)
        running = torch.ones_like(lam[:, :1], dtype=torch.bool)
        limit = tol**0.5
        for iteration in range(1, min(max_iter, MAX_ITER) + 1):
            residual, gap = q + apply(M, lam) - s, (s * lam).mean(-1, keepdim=True)
            factor = _cholesky(M, s / lam)
            affine = -_solved(factor, residual + s)
            ds = residual + apply(M, affine)
            length = longest_step(lam, affine, s, ds)
            ahead = ((s + length * ds) * (lam + length * affine)).mean(-1, keepdim=True)
            centring = (ahead / gap).clamp(min=0) ** 3
            dlam = -_solved(factor, residual + s + (ds * affine - centring * gap) / lam)
            ds = residual + apply(M, dlam)
            length = (0.99 * longest_step(lam, dlam, s, ds)).clamp(max=1)
            lam, s = (torch.where(running, a + length * b, a) for a, b in ((lam, dlam), (s, ds)))
            small = m * (s * lam).amax(-1, keepdim=True) <= limit * (1 + largest(lam) * largest(s)).unsqueeze(-1)
            running = running & ~(small & (length >= 0.9)) & s.isfinite().all(-1, keepdim=True)
            if iteration % check_every(s) == 0 and not running.any():
                break
        return lam, s, iteration


def longest_step(lam: Tensor, dlam: Tensor, s: Tensor, ds: Tensor) -> Tensor:
    """Longest step up to 1/0.99 that keeps multipliers and slacks from falling below zero, `(B, 1)`."""
    ratios = [torch.where(change < 0, -value / change, torch.inf) for value, change in ((lam, dlam), (s, ds))]
    return torch.minimum(*ratios).amin(-1, keepdim=True).clamp(max=1 / 0.99)


def lifted(v: Tensor) -> Tensor:
    """`v` itself where all entries are positive, otherwise moved so that the smallest is 1; `(B, m)`."""
    if not v.shape[-1]:
        return v
    lowest = v.amin(-1, keepdim=True)
    return torch.where(lowest > 0, v, v + 1 - lowest)


def _cholesky(matrix: Tensor, diagonal: Tensor) -> Tensor:
    """The factor of `matrix + diag(diagonal)`, with NaN on its own diagonal where there is none."""
    moved = matrix.clone(memory_format=torch.contiguous_format)
    moved.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    factor, info = torch.linalg.cholesky_ex(moved)
    factor.diagonal(dim1=-2, dim2=-1).add_(torch.where(info == 0, 0.0, torch.nan).to(factor.dtype).unsqueeze(-1))
    return factor


def _forward(L: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L, columns, upper=False)


def _backward(L: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L.mT, columns, upper=True)


def _solved(L: Tensor, v: Tensor) -> Tensor:
    return _backward(L, _forward(L, v.unsqueeze(-1))).squeeze(-1)
