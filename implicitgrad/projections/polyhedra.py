"""Projections onto polyhedra: a dual active-set method finds the constraints that bind; the rest follows from them."""

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.projections import checks
from implicitgrad.projections.active_rows import ActiveRows
from implicitgrad.tree import Tree


def polyhedron(
    y: Tree,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
) -> Tree:
    """The nearest point of the polyhedron `{z : A z = b, G z <= h}`.

    The constraints that bind are found by a dual active-set method, which ends after finitely many steps with linearly
    independent ones `C z = d`; then `z = y - C⁺ (C y - d)`, whose derivatives are those of the projection wherever
    every constraint that binds has a positive multiplier. Where constraints that bind are linearly dependent, the
    derivative in their offsets does not exist; it is that of the independent ones found.

    Costs `m (20 n + 6 m)` for each of the steps, typically one to two for each constraint that binds, `m²` numbers of
    memory, and `n k² + k³/3` for k = min(m, n) at the end; all in float64. Under `torch.func.vmap` all points take
    their steps at once.

    Args:
        y: Tree of n numbers, one point, in the order of `tree.ravel`.
        A: `(p, n)`, or None. Rows may depend on each other if they do not contradict.
        b: `(p,)`, with A.
        G: `(q, n)`, or None.
        h: `(q,)`, with G.

    Raises:
        ValueError: the set is empty, by more than rounding errors (1e-10, relative); a matrix without its right side;
            no constraint at all; shapes that do not fit.
        TypeError: y is no tree of floating point tensors of one dtype, or an argument of another dtype.
        FloatingPointError: NaN or infinity in an argument.
        RuntimeError: the result is not exact to 1e-7, or no end after `20 m + 100` steps, which rounding errors cause
            where rows that bind are combinations of others up to some 1e-6.

    Source: Goldfarb, Idnani (1983), "A numerically stable dual method for solving strictly convex quadratic programs".
    Departures: the inverse of the Gram matrix of the active rows is kept up to date in place of a QR factorisation,
    since that works for many points at once; the end point is computed anew, by a Cholesky factorisation and one step
    of refinement.

    Example:
        >>> G = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
        >>> polyhedron(torch.tensor([-1.0, 3.0]), G=G, h=torch.tensor([4.0, 0.0]))
        tensor([0., 2.])
    """
    flat, unravel = tree.ravel(y)
    C, d, num_equal = _constraints(flat, A, b, G, h)
    if len(C) == 0:
        return y
    norm = torch.linalg.vector_norm(C.detach().double(), dim=1)
    norm = torch.where(norm == 0, 1, norm)  # constants: they scale the constraints, not the set
    C, d = C.double() / norm.unsqueeze(1), d.double() / norm
    active = ActiveRows.apply(flat.detach(), C.detach(), d.detach(), num_equal)
    first = active.long().argsort(descending=True, stable=True)[: len(flat)]
    holds = active[first]
    C, d = C[first] * holds.unsqueeze(1), d[first] * holds
    factor = torch.linalg.cholesky(C @ C.mT + torch.diag((~holds).to(C)))
    project = lambda z: z - C.mT @ torch.cholesky_solve((C @ z - d).unsqueeze(1), factor).squeeze(1)
    return unravel(project(project(flat.double())).to(flat))  # twice, as refinement


def _constraints(
    y: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """All rows, equalities first, their right sides, and how many equalities there are."""
    pairs = [("A", A, "b", b), ("G", G, "h", h)]
    if A is None and G is None:
        raise ValueError("polyhedron needs constraints: A and b, or G and h, or both; got none")
    matrices, sides = [], []
    for matrix_name, matrix, side_name, side in pairs:
        if (matrix is None) != (side is None):
            given, missing = (side_name, matrix_name) if matrix is None else (matrix_name, side_name)
            raise ValueError(f"polyhedron got {given} without {missing}; give both or neither")
        if matrix is not None and side is not None:
            matrices.append(checks.array("polyhedron", matrix_name, matrix, (None, len(y)), y))
            sides.append(checks.array("polyhedron", side_name, side, (len(matrix),), y))
    return torch.cat(matrices), torch.cat(sides), 0 if A is None else len(A)
