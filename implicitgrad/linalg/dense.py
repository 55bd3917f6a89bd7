"""The frame that direct solvers share: apply an inverse, measure the true residual, refine once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.checks import CheckedSystem, check_system, default_rtol
from implicitgrad.linalg.matrix import as_columns, as_rows
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, safe_row_norm
from implicitgrad.linalg.solver import Products, Solution, check_finite, unscaled_solution, zero_solution


class Factor(NamedTuple):
    """A factorised matrix."""

    inverse: Callable[[Tensor], Tensor]  # b -> A⁻¹ b for columns (*batch, n, k)
    nbytes: int  # of the factor


def solve_directly(
    name: str,
    factorise: Callable[[LinearOperator], Factor],
    A: LinearOperator,
    b: Tensor,
    x0: Tensor | None,
    rtol: float | None,
) -> Solution:
    """Solve with a factor of the dense matrix; one step of iterative refinement where the residual is above `rtol`.

    The residual is made with a product of A, so that a matrix that differs from the products is noticed; only the
    transpose of an operator without `rmatvec` is measured with the matrix itself.

    Args:
        name: class name of the solver.
        factorise: returns the factor, remembered on the operator.
        A: the operator.
        b: right-hand sides, see `LinearSolver.solve`.
        x0: checked like b, but a direct solver has no use for a guess.
        rtol: None for `default_rtol`.

    Raises:
        torch.linalg.LinAlgError: from `factorise`.
        FloatingPointError: NaN or infinity in the matrix, a product or the solution.
    """
    system = check_system(name, A, b, x0)
    if system.zero:
        return zero_solution(name, system)
    dense_cost = A.dense_cost
    factor = factorise(A)
    matrix = A.to_dense().detach()
    return apply_inverse(
        name,
        system,
        A if A.has_product else LinearOperator.from_dense(matrix),
        lambda rows: _inverse_rows(factor, A, rows),
        default_rtol(A) if rtol is None else rtol,
        num_matvec=dense_cost,
        memory=matrix.nbytes + factor.nbytes,
    )


def apply_inverse(
    name: str,
    system: CheckedSystem,
    A: LinearOperator,
    inverse: Callable[[Tensor], Tensor],
    rtol: float,
    *,
    num_matvec: int,
    memory: int,
) -> Solution:
    """``inverse(b)`` with its true residual, refined once where that is above `rtol`.

    Args:
        name: class name of the solver.
        system: what to solve.
        A: whose products measure the residual.
        inverse: ``b -> A⁻¹ b``, up to rounding, on the rows of the system.
        rtol: relative residual that passes.
        num_matvec: products spent so far.
        memory: bytes held so far.

    Raises:
        FloatingPointError: NaN or infinity in a product or the solution.
    """
    b, product = system.b, Products(A)
    x = inverse(b)
    r = b - product(x)
    relative = safe_row_norm(r)
    if any_row(~(relative <= rtol)):
        refined = x + inverse(r)
        new_relative = safe_row_norm(b - product(refined))
        better = (new_relative < relative) | relative.isnan()
        x, relative = torch.where(better, refined, x), torch.where(better, new_relative, relative)
    check_finite(name, 0, relative)
    converged = not any_row(relative > rtol)
    return unscaled_solution(
        name,
        system,
        x,
        relative,
        num_iter=0,
        num_matvec=num_matvec + product.count,
        converged=converged,
        reason="converged" if converged else "precision floor",
        memory=memory + 3 * b.nbytes,
    )


def finite_matrix(name: str, A: LinearOperator) -> Tensor:
    """The matrix of A, without autograd graph.

    Raises:
        FloatingPointError: it has NaN or infinite entries.
    """
    matrix = A.to_dense().detach()
    if not matrix.sum().isfinite() and not matrix.isfinite().all():  # the sum alone is eight times cheaper to test
        raise FloatingPointError(f"{name}: the matrix of A has NaN or infinite entries; check A @ v for a finite v.")
    return matrix


def _inverse_rows(factor: Factor, A: LinearOperator, b: Tensor) -> Tensor:
    single = b.ndim == len(A.vector_shape)
    columns = as_columns(b.unsqueeze(0) if single else b)
    x = as_rows(factor.inverse(columns)).to(b.dtype)
    return (x[0] if single else x).contiguous()
