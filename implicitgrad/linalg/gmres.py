"""Generalised minimal residuals for systems without symmetry."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, check_rtol
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
from implicitgrad.linalg.matrix import factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_dot, row_norm
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Solves any regular system, restarted every `restart` iterations; the residual never grows.

    Each iterate minimises |b - A x| over a Krylov space, whose basis is kept: ``restart + 1`` vectors of memory per
    right-hand side, one product and 4 j passes over a vector in the j-th iteration. With ``n <= restart`` it ends with
    the solution after n iterations at the latest; otherwise a cycle that gains less than 0.1 % ends the row with the
    reason "stagnated". A larger `restart` helps then, or `LU`.

    Source: Saad and Schultz (1986), algorithm 4, with classical Gram-Schmidt done twice (Giraud, Langou, Rozložník and
    van den Eshof, 2005). Departures: the residual norm of iteration j is ``|r| / |u|`` with the null vector u of the
    transposed Hessenberg matrix, ``u₀ = 1`` (Ayachour 2003), one dot product per step instead of a chain of rotations;
    the residual at each restart is computed from its definition.

    Args:
        rtol: stops at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        restart: iterations per cycle.
        max_iter: iterations over all cycles; None for 10 n, at most 2000.

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

    def __post_init__(self) -> None:
        check_rtol("GMRES", self.rtol)
        check_count("GMRES", "restart", self.restart)
        check_count("GMRES", "max_iter", self.max_iter)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        length = min(self.restart, A.size)
        return solve_in_cycles(
            "GMRES",
            partial(_recurrence, length),
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.max_iter,
            num_refinements=2,
            num_vectors=length + 4,
        )


def _recurrence(length: int, product: Products, residual: Tensor, target: float, budget: int) -> Cycle:
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
        image = product(basis[..., j, :].contiguous())
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
    step = (coefficients.unsqueeze(-2) @ basis[..., :j, :]).squeeze(-2)
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
