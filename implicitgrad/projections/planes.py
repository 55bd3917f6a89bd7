"""Projections onto hyperplanes, half-spaces and affine sets."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.linalg.rows import safe_row_norm
from implicitgrad.projections import checks
from implicitgrad.tree import Tree


def hyperplane(y: Tree, normal: Tree, offset: float | Tensor) -> Tree:
    """The nearest point of the hyperplane `{z : <normal, z> = offset}`: `y - a (<a, y> - c) / ‖a‖²`.

    Smooth in all arguments. Costs `O(n)`.

    Args:
        y: Tree of n numbers, one point.
        normal: Tree like y, not zero.
        offset: c, a number.

    Raises:
        ValueError: the normal is zero or not like y; y has no entries.
        TypeError: y is no tree of floating point tensors of one dtype, or the offset no number.
        FloatingPointError: NaN or infinity in an argument. Inside `torch.func` transforms, where values cannot be read,
            this and a normal of zero give NaN.

    Example:
        >>> hyperplane(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), 3.0)
        tensor([2.5000, 0.5000])
    """
    flat, unit, level, unravel = _plane("hyperplane", y, normal, offset)
    return unravel(flat - unit * (unit @ flat - level))


def half_space(y: Tree, normal: Tree, offset: float | Tensor) -> Tree:
    """The nearest point of the half-space `{z : <normal, z> <= offset}`: y itself inside, else `hyperplane`.

    Args:
        y: Tree of n numbers, one point.
        normal: Tree like y, not zero.
        offset: A number.

    Raises:
        ValueError, TypeError, FloatingPointError: as `hyperplane`.

    Example:
        >>> half_space(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), 5.0)
        tensor([3., 1.])
    """
    flat, unit, level, unravel = _plane("half_space", y, normal, offset)
    excess = unit @ flat - level
    return unravel(flat - unit * torch.where(excess < 0, 0, excess))


class RowSpace(NamedTuple):
    """A factorised matrix `A = Rᵀ Qᵀ` of full row rank, made by `row_space`.

    Attributes:
        basis: Q `(n, m)`, orthonormal columns.
        triangle: R `(m, m)`, upper triangular, nonsingular.
    """

    basis: Tensor
    triangle: Tensor


def row_space(A: Tensor) -> RowSpace:
    """Factorise the matrix of an affine set, so that `affine_set` need not do so for every point.

    Costs `2 n m²`. The factor carries the derivative in A.

    Args:
        A: `(m, n)` of rank m.

    Raises:
        ValueError: A is no matrix, or its rows are linearly dependent.
        FloatingPointError: NaN or infinity in A. Inside `torch.func` transforms, where values cannot be read, a wrong A
            gives NaN.

    Example:
        >>> plane = row_space(torch.tensor([[1.0, 1.0]]))
        >>> affine_set(torch.tensor([3.0, 1.0]), plane, torch.tensor([3.0]))
        tensor([2.5000, 0.5000])
    """
    m, n = checks.array("affine_set", "A", A, (None, None), A).shape
    if m > n:
        raise ValueError(f"affine_set needs at most as many rows in A as columns, got {m} and {n}; drop dependent rows")
    Q, R = torch.linalg.qr(A.mT)
    # |R_kk| is the distance of row k from the span of the rows before
    distance, norm = R.diagonal().abs(), torch.linalg.vector_norm(R, dim=0)
    dependent = distance <= 10 * n * torch.finfo(A.dtype).eps * norm
    claim = checks.Claim(
        ~dependent.any(),
        lambda: (
            f"affine_set needs linearly independent rows in A, got rows {dependent.nonzero().flatten().tolist()} that "
            "combine those before (or are zero); drop them"
        ),
    )
    return RowSpace(checks.checked("affine_set", Q, {"A": A}, [claim]), R)


def affine_set(y: Tree, A: Tensor | RowSpace, b: Tensor) -> Tree:
    """The nearest point of the affine set `{z : A z = b}`: `y - A⁺ (A y - b)`.

    With `A = Rᵀ Qᵀ` this is `y - Q (Qᵀ y - R⁻ᵀ b)`. Smooth in all arguments. A point costs `4 n m + m²`, the
    factorisation `2 n m²`; hand over `row_space(A)` to make it once for many points.

    Args:
        y: Tree of n numbers, one point, in the order of `tree.ravel`.
        A: `(m, n)` of rank m, or its `row_space`.
        b: `(m,)`.

    Raises:
        ValueError: the rows of A are linearly dependent; shapes that do not fit; y has no entries.
        TypeError: y is no tree of floating point tensors of one dtype.
        FloatingPointError: NaN or infinity in an argument. Inside `torch.func` transforms, where values cannot be read,
            this and dependent rows give NaN.

    Source: Golub, Van Loan (2013), "Matrix computations", §5.6.2 (LQ factorisation of underdetermined systems).

    Example:
        >>> affine_set(torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 1.0]]), torch.tensor([3.0]))
        tensor([2.5000, 0.5000])
    """
    flat, unravel = tree.ravel(y)
    Q, R = A if isinstance(A, RowSpace) else row_space(A)
    checks.array("affine_set", "A", Q.mT, (None, len(flat)), flat)
    checks.array("affine_set", "b", b, (len(R),), flat)
    flat = checks.checked("affine_set", flat, {"b": b})
    wanted = torch.linalg.solve_triangular(R.mT, b.unsqueeze(1), upper=False).squeeze(1)
    return unravel(flat - Q @ (Q.mT @ flat - wanted))


def _plane(
    name: str, y: Tree, normal: Tree, offset: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tree]]:
    """The point, the unit normal and the offset that goes with it, checked, and the way back to a tree."""
    flat, unravel = tree.ravel(y)
    a = tree.ravel_like(y, normal).to(flat)
    c = checks.number(name, "offset", offset, flat)
    claim = checks.Claim(a.any(), lambda: f"{name} needs a normal other than zero")
    flat = checks.checked(name, flat, {"normal": a, "offset": c}, [claim])
    norm = safe_row_norm(a)
    return flat, a / norm, c / norm, unravel
