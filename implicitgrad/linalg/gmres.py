"""Generalised minimal residuals for systems without symmetry."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, check_right_preconditioner, check_rtol
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
from implicitgrad.linalg.matrix import factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_dot, row_norm
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite

# A restarted method may well need more than 10 n iterations; what cannot be solved is told apart by its stagnation.
DEFAULT_MAX_ITER = 2000


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Solves any regular system, restarted every `restart` iterations; the residual never grows.

    Each iterate minimises |b - A x| over a Krylov space, whose basis is kept: ``restart + 1`` vectors of memory per
    right-hand side, one product and 4 j passes over a vector in the j-th iteration. With ``n <= restart`` it ends with
    the solution after n iterations at the latest; otherwise a cycle that gains less than 0.1 % ends the row with the
    reason "stagnated". A larger `restart` helps then, a preconditioner, or `LU`.

    Source: Saad and Schultz (1986), algorithm 4, with classical Gram-Schmidt done twice (Giraud, Langou, Rozložník and
    van den Eshof, 2005), preconditioned on the right as in Saad, Iterative Methods (2003), algorithm 9.5, so that the
    residual stays that of A x = b. Departures: the residual norm of iteration j is ``|r| / |u|`` with the null vector u
    of the transposed Hessenberg matrix, ``u₀ = 1`` (Ayachour 2003), one dot product per step instead of a chain of
    rotations; the residual at each restart is computed from its definition.

    Args:
        rtol: stops at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        restart: iterations per cycle.
        max_iter: iterations over all cycles; None for 2000.
        preconditioner: ``r -> z`` on ``(..., n)``, linear, close to A⁻¹ r. It must leave r unchanged.

    Raises:
        ValueError: a hyperparameter out of range.

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
        >>> GMRES().solve(A, torch.tensor([5.0, 8.0])).value.round(decimals=3)
        tensor([1., 2.])
    """

    rtol: float | None = None
    restart: int = 30
    max_iter: int | None = None
    preconditioner: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_rtol("GMRES", self.rtol)
        check_count("GMRES", "restart", self.restart)
        check_count("GMRES", "max_iter", self.max_iter)
        check_right_preconditioner("GMRES", self.preconditioner)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        length = min(self.restart, A.size)
        precondition = self.preconditioner or (lambda v: v)
        return solve_in_cycles(
            "GMRES",
            partial(_recurrence, length, precondition),
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.max_iter or DEFAULT_MAX_ITER,
            num_refinements=2,
            num_vectors=length + 4,
        )


def _recurrence(
    length: int,
    precondition: Callable[[Tensor], Tensor],
    product: Products,
    residual: Tensor,
    target: float,
    budget: int,
) -> Cycle:
    length = min(length, budget)
    every, eps = check_every(residual), torch.finfo(residual.dtype).eps
    rows, n = residual.shape[:-1], residual.shape[-1]
    basis = residual.new_zeros(*rows, length + 1, n)
    hessenberg = residual.new_zeros(*rows, length + 1, length)
    null = residual.new_zeros(*rows, length + 1)
    null[..., 0] = 1
    size = row_norm(residual)
    estimate = size
    active = size > target
    zero, one = torch.zeros_like(size), torch.ones_like(size)
    basis[..., 0, :] = residual * torch.where(active, 1 / size, zero)
    j = 0
    while j < length:
        image = product(precondition(basis[..., j, :].contiguous()).detach())
        known = basis[..., : j + 1, :]
        column, rest = _orthogonalised(image, known)
        height = row_norm(rest)

        # what is left of A v after rounding is no direction: the Krylov space ends here, with the solution in it
        # unless the new column does not reach the residual
        ends = height <= 10 * eps * row_norm(image)
        reach = row_dot(null[..., : j + 1], column)
        tiny = 100 * eps * row_norm(null[..., : j + 1]) * row_norm(column)
        hopeless = ends & (reach.abs() <= tiny)
        going = active & ~ends
        # a row at rest gets columns that meet no other column, so that their coefficients are zero
        hessenberg[..., : j + 1, j] = torch.where(active, column, zero)
        hessenberg[..., j + 1, j : j + 1] = torch.where(active, torch.where(ends, zero, height), one)
        null[..., j + 1 : j + 2] = torch.where(going, -reach / height, zero)
        basis[..., j + 1, :] = rest * torch.where(going, 1 / height, zero)
        solved = torch.where(ends, torch.where(hopeless, estimate, zero), size / row_norm(null[..., : j + 2]))
        estimate = torch.where(active, solved, estimate)
        active = going & (estimate > target)
        j += 1
        if j % every == 0 and not any_row(active):
            break
    check_finite("GMRES", j, estimate)
    coefficients = _least_squares(hessenberg[..., : j + 1, :j], size)
    step = precondition((coefficients.unsqueeze(-2) @ basis[..., :j, :]).squeeze(-2)).detach()
    return Cycle(step, j, estimate <= target, torch.zeros_like(active))


def _orthogonalised(v: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients ``(..., j)`` of v ``(..., n)`` in orthonormal rows, the basis ``(..., j, n)``, and the rest."""
    first = (basis @ v.unsqueeze(-1)).squeeze(-1)
    rest = v - (first.unsqueeze(-2) @ basis).squeeze(-2)
    second = (basis @ rest.unsqueeze(-1)).squeeze(-1)
    return first + second, rest - (second.unsqueeze(-2) @ basis).squeeze(-2)


def _least_squares(hessenberg: Tensor, size: Tensor) -> Tensor:
    """The y ``(..., j)`` that minimises ``|size e₀ - H y|``; zero where a column of H ``(..., j + 1, j)`` is idle."""
    q, r = torch.linalg.qr(hessenberg.to(factor_dtype(hessenberg.dtype)))
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    negligible = diagonal.abs() <= torch.finfo(r.dtype).eps * diagonal.abs().amax(-1, keepdim=True)
    r = r + torch.diag_embed(torch.where(negligible, torch.inf, 0.0).to(r.dtype))
    right = q[..., 0, :] * size
    return torch.linalg.solve_triangular(r, right.unsqueeze(-1), upper=True).squeeze(-1).to(hessenberg.dtype)
