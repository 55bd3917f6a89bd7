"""Conjugate gradients for one matrix with many dampings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.cg import CG, NEGATIVE_CURVATURE
from implicitgrad.linalg.checks import check_count, check_rtol, check_system, default_rtol, require_symmetric
from implicitgrad.linalg.hindsight import Coefficients, Hindsight
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_dot, safe_row_norm
from implicitgrad.linalg.solver import Products, Solution, check_finite, unscaled_solution, zero_solution


@dataclass(frozen=True)
class MultiShiftCG:
    r"""Solves ``(A + shift I) x = b`` for a whole list of shifts at the price of the smallest.

    The Krylov space of A + shift I and b is the same for every shift, and so are the residuals of CG up to a factor:
    $r_\sigma = \zeta_\sigma r$. One run of `CG` with the smallest shift, the slowest, thus gives the iterates of all by
    recurrences of scalars. Costs the products of that run, one product per shift for the true residuals, and three
    passes over a vector per shift and iteration; 2 vectors of memory per shift and 4 for the run. A shift that has
    converged stands still and costs nothing from then on.

    It starts at zero and takes no preconditioner, as either would turn the residuals in different directions. A shift
    whose true residual misses the tolerance, by rounding in the recurrences, is finished by `CG` on its own.

    Source: Jegerlehner (1996), "Krylov space solvers for shifted linear systems"; Frommer and Maass (1999), "Fast
    CG-based methods for Tikhonov-Phillips regularization". Departure: it carries the ratio of successive $\zeta$, in
    whose recurrence all terms are positive.

    Args:
        shifts: finite numbers in any order, negative ones too. A + shift I has to be positive definite; if it is not
            with the smallest shift, that one ends with "negative curvature" and the others are finished by `CG`.
        rtol: stops a shift at |b - (A + shift I) x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32.
        max_iter: iterations for each shift; None for 10 n, at most 2000.

    Raises:
        ValueError: a hyperparameter out of range.

    Example:
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, 3.0])), symmetric=True, definite=True)
        >>> MultiShiftCG(shifts=(1.0, 0.0)).solve(A, torch.tensor([3.0, 3.0])).value
        tensor([[1.5000, 0.7500],
                [3.0000, 1.0000]])
    """

    shifts: Sequence[float]
    rtol: float | None = None
    max_iter: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.shifts, (int, float)):
            raise ValueError(f"MultiShiftCG(shifts=...) needs a sequence of numbers; got {self.shifts!r}.")
        if not (len(self.shifts) and all(math.isfinite(shift) for shift in self.shifts)):
            raise ValueError(f"MultiShiftCG(shifts=...) needs at least one shift, all finite; got {self.shifts!r}.")
        check_rtol("MultiShiftCG", self.rtol)
        check_count("MultiShiftCG", "max_iter", self.max_iter)

    def solve(self, A: LinearOperator, b: Tensor) -> Solution:
        """The solutions for all shifts, without autograd graph and without change of an argument.

        Args:
            A: symmetric.
            b: ``(*batch_shape, n)``, or ``(k, *batch_shape, n)`` for k right-hand sides.

        Returns:
            A `Solution` with one leading dimension more, for the shifts in the order given: `value` is
            ``(num_shifts, *b.shape)``, the residuals ``(num_shifts, *b.shape[:-1])``. The Ritz values are those of A
            without shift; `energy_error` takes every shift for the smallest, where a residual means the largest error;
            both are missing after negative curvature. `reason` is that of the smallest shift that failed, with its
            value.

        Raises:
            ValueError: shape, dtype or device do not fit, or the operator is not declared symmetric (use GMRES).
            FloatingPointError: NaN or infinity in b, a product with A, or the solution.
        """
        require_symmetric("MultiShiftCG", A, "GMRES")
        system = check_system("MultiShiftCG", A, b, None)
        b, leading = system.b, (len(self.shifts), *system.b.shape)
        system = system._replace(b=b.expand(leading), scale=system.scale.expand(*leading[:-1], 1))
        if system.zero:
            return zero_solution("MultiShiftCG", system)
        rtol = default_rtol(A) if self.rtol is None else self.rtol
        budget = min(10 * A.size, 2000) if self.max_iter is None else self.max_iter
        order = sorted(range(len(self.shifts)), key=lambda i: self.shifts[i])
        shifts = [float(self.shifts[i]) for i in order]
        product = Products(A)
        sweep = _sweep(product, b, shifts, rtol, budget)
        relative, reasons, num_iter = _finish(A, product, b, shifts, sweep, rtol, budget)
        failed = [f"{word} at shift {shift:g}" for word, shift in zip(reasons, shifts, strict=True) if word]
        back = torch.tensor(order, device=b.device).argsort()
        return unscaled_solution(
            "MultiShiftCG",
            system,
            sweep.x[back],
            relative[back],
            num_iter=num_iter,
            num_matvec=product.count,
            converged=not failed,
            reason=failed[0] if failed else "converged",
            memory=2 * sweep.x.nbytes + 5 * b.nbytes,
            hindsight=sweep.hindsight,
        )


class _Sweep(NamedTuple):
    """One run for all shifts in ascending order."""

    x: Tensor  # (num_shifts, *b.shape)
    num_iter: int
    broken: bool  # negative curvature of A + smallest shift
    hindsight: Hindsight | None


def _sweep(product: Products, b: Tensor, shifts: list[float], rtol: float, budget: int) -> _Sweep:
    """The run with the smallest shift, and with it the iterates of the others."""
    every, limit = check_every(b), rtol**2
    coefficients = Coefficients()
    x = b.new_zeros(len(shifts), *b.shape)
    delta, directions = _column(shifts, x) - shifts[0], b.expand_as(x).clone()
    r, p, rho = b.clone(), b.clone(), row_dot(b, b)
    zero = torch.zeros_like(rho)
    zeta = ratio = torch.ones_like(delta) + zero  # a shift's residual is zeta r; the ratio is that of its last two
    pull = zero  # beta / alpha of the last iteration
    lowest, broken = zero + torch.inf, zero > 0  # curvature so far, which keeps a NaN
    active, moving = (rho > limit).expand_as(zeta), rho > limit  # shifts of rows, and rows
    num_iter = 0
    while num_iter < budget:
        num_iter += 1
        q = torch.add(product(p), p, alpha=shifts[0])
        curvature = row_dot(p, q)
        lowest = torch.minimum(lowest, curvature)
        broken = broken | moving & (curvature <= 0)
        moving = moving & ~broken
        active = active & moving
        alpha = torch.where(moving, rho / curvature, zero)
        coefficients.append(alpha, rho)
        ratio = 1 / (1 + alpha * (delta + pull * (1 - ratio)))
        x[: len(delta)].addcmul_(directions, torch.where(active, alpha * ratio, zero))
        r.addcmul_(q, alpha, value=-1)
        old_rho, rho = rho, row_dot(r, r)
        zeta = torch.where(active, zeta * ratio, zeta)
        active = active & (zeta.square() * rho > limit)
        moving = active.any(0).view_as(moving)
        if num_iter % every == 0:
            flags = active.flatten(1).any(1).tolist()
            if not any(flags):
                break
            left = len(flags) - flags[::-1].index(True)  # large shifts converge first
            delta, directions, zeta, ratio, active = (t[:left] for t in (delta, directions, zeta, ratio, active))
        beta = torch.where(moving, rho / old_rho, zero)
        pull = torch.where(moving, beta / alpha, zero)
        torch.addcmul(r, p, beta, out=p)
        directions.mul_(torch.where(active, beta * ratio.square(), zero)).addcmul_(r, torch.where(active, zeta, zero))
    check_finite("MultiShiftCG", num_iter, lowest, rho)
    failed = any_row(broken)
    hindsight = None if failed else coefficients.hindsight(rho, rho, ritz=True).shifted(-shifts[0])
    return _Sweep(x, num_iter, failed, hindsight)


def _finish(
    A: LinearOperator, product: Products, b: Tensor, shifts: list[float], sweep: _Sweep, rtol: float, budget: int
) -> tuple[Tensor, list[str], int]:
    """Run CG on the shifts whose true residual is above the tolerance; `sweep.x` is corrected in place.

    Returns:
        The norms of the true residuals ``(num_shifts, ..., 1)``; per shift why it failed, empty for success; iterations
        of the slowest.
    """
    x, num_iter, reasons = sweep.x, sweep.num_iter, [""] * len(shifts)
    relative = safe_row_norm(b - product(x.view(-1, *A.vector_shape)).view_as(x) - _column(shifts, x) * x)
    check_finite("MultiShiftCG", num_iter, relative)
    for i, missed in enumerate((relative > rtol).flatten(1).any(1).tolist()):
        if not missed:
            continue
        if sweep.broken and shifts[i] == shifts[0]:
            reasons[i] = NEGATIVE_CURVATURE
        elif sweep.num_iter == budget:
            reasons[i] = "max_iter reached"
        else:
            start = torch.where(relative[i] <= 1, x[i], 0)  # zero leaves a residual of 1
            rest = CG(rtol, budget - sweep.num_iter).solve(A.damped(shifts[i]), b, start)
            x[i], relative[i] = rest.value, rest.relative_residual.view_as(relative[i])
            reasons[i] = "" if rest.converged else rest.reason
            num_iter = max(num_iter, sweep.num_iter + rest.num_iter)
            product.count += rest.num_matvec
    return relative, reasons, num_iter


def _column(shifts: list[float], x: Tensor) -> Tensor:
    """The shifts, so that they broadcast against ``(num_shifts, ...)``."""
    return torch.tensor(shifts, dtype=x.dtype, device=x.device).view(-1, *(1 for _ in x.shape[1:]))
