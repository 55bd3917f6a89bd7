"""A stack of quadratic programs as numbers: common shapes, true residuals, and the last step on the active set."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.conditions.qp import gathered
from implicitgrad.conditions.qualification import is_active
from implicitgrad.solvers.active_set_factor import ActiveSetFactor
from implicitgrad.tree import Tree

DIMENSIONS = {"Q": 2, "c": 1, "A": 2, "b": 1, "G": 2, "h": 1}


class Point(NamedTuple):
    """A primal-dual point of every program: `z: (B, n)`, `nu: (B, p)`, `lam: (B, m)`."""

    z: Tensor
    nu: Tensor
    lam: Tensor

    def where(self, mask: Tensor, other: "Point") -> "Point":
        """These values where `mask: (B,)` is set, those of `other` elsewhere."""
        return Point(*_where(mask, self, other))


class Terms(NamedTuple):
    """The products at one point that residuals consist of."""

    Qz: Tensor  # (B, n)
    At_nu: Tensor  # (B, n)
    Gt_lam: Tensor  # (B, n)
    Az: Tensor  # (B, p)
    Gz: Tensor  # (B, m)

    def where(self, mask: Tensor, other: "Terms") -> "Terms":
        """These values where `mask: (B,)` is set, those of `other` elsewhere."""
        return Terms(*_where(mask, self, other))


class Program(NamedTuple):
    """`min_z zᵀQz / 2 + cᵀz` subject to `A z = b`, `G z <= h`, B times; a first dimension of 1 is shared by all.

    `Q: (B, n, n)` is symmetric. Parts that a user left out are zero, or have no rows.
    """

    Q: Tensor
    c: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, n, p, m)."""
        return max(len(part) for part in self), self.Q.shape[-1], self.A.shape[-2], self.G.shape[-2]

    def terms(self, y: Point) -> Terms:
        """All products of the matrices with `y`."""
        pulls = apply(self.A.mT, y.nu), apply(self.G.mT, y.lam)
        return Terms(apply(self.Q, y.z), *pulls, apply(self.A, y.z), apply(self.G, y.z))

    def value(self, y: Point, terms: Terms) -> Tensor:
        """Objective, `(B,)`."""
        return (y.z * (terms.Qz / 2 + self.c)).sum(-1)

    def stationarity(self, terms: Terms) -> Tensor:
        """`Q z + c + Aᵀν + Gᵀλ`, `(B, n)`."""
        return terms.Qz + self.c + terms.At_nu + terms.Gt_lam

    def feasibility(self, y: Point, terms: Terms) -> Tensor:
        """`(A z - b, min(λ, h - G z))`, `(B, p + m)`."""
        return torch.cat([terms.Az - self.b, torch.minimum(y.lam, self.h - terms.Gz)], -1)

    def error(self, y: Point, terms: Terms) -> Tensor:
        """Largest entry of stationarity and of feasibility, each relative to 1 plus its largest term; `(B,)`."""
        return torch.maximum(
            largest(self.stationarity(terms)) / (1 + largest(terms.Qz, self.c, terms.At_nu, terms.Gt_lam)),
            largest(self.feasibility(y, terms)) / (1 + largest(terms.Az, self.b, terms.Gz, self.h)),
        )

    def active_set_factor(self, y: Point) -> ActiveSetFactor:
        """For Newton steps on the inequalities that are active at `y`; costs an LU factor of `n + p + m` unknowns."""
        active = is_active(y.lam, apply(self.G, y.z) - self.h)
        return ActiveSetFactor.of(self._kkt_matrix(active), active)

    def polished(self, y: Point, factor: ActiveSetFactor) -> Point:
        """`y` after two Newton steps on its active set where they lower the error: exact up to rounding if it is right.

        Args:
            y: Any point.
            factor: Of the matrices there.
        """
        _, n, p, m = self.sizes
        y = Point(y.z, y.nu, torch.where(factor.active, y.lam, 0))
        terms = self.terms(y)
        for _ in range(2):
            violation = torch.where(factor.active, terms.Gz - self.h, 0)
            residual = torch.cat([self.stationarity(terms), terms.Az - self.b, violation], -1)
            step = factor.inverse(residual.unsqueeze(-1)).squeeze(-1)
            new = Point(*(a - b for a, b in zip(y, step.split([n, p, m], -1), strict=True)))
            new_terms = self.terms(new)
            better = self.error(new, new_terms) < self.error(y, terms)  # not for NaN, which a singular matrix gives
            y, terms = new.where(better, y), new_terms.where(better, terms)
        return y

    def chosen(self, index: Tensor) -> "Program":
        """The programs at some positions; shared parts stay shared."""
        return Program(*(part if len(part) == 1 else part[index] for part in self))

    def _kkt_matrix(self, active: Tensor) -> Tensor:
        """`[Q, Aᵀ, G_activeᵀ; A, 0, 0; G_active, 0, 0]` with unit rows for inactive inequalities."""
        batch, n, p, m = self.sizes
        matrix = self.Q.new_zeros(batch, n + p + m, n + p + m)
        rows = torch.where(active.unsqueeze(-1), self.G, 0)
        matrix[:, :n, :n] = self.Q
        matrix[:, n : n + p, :n], matrix[:, :n, n : n + p] = self.A, self.A.mT
        matrix[:, n + p :, :n], matrix[:, :n, n + p :] = rows, rows.mT
        matrix.diagonal(dim1=-2, dim2=-1)[:, n + p :] = (~active).to(matrix.dtype)
        return matrix


def program(x: Tree, data: tuple = ()) -> tuple[Program, tuple[int, ...]]:
    """The program of `QP` with arguments `x` and `data`, without graph, and the shape of the stack of problems.

    Raises:
        TypeError: parts of several dtypes, or not of floating point.
        ValueError: shapes that do not fit together, no variables or no problems.
        FloatingPointError: NaN or infinity in a part.
    """
    parts = {name: value.detach() for name, value in gathered(x, data).items()}
    kinds = {(value.dtype, value.device) for value in parts.values()}
    if len(kinds) > 1 or not next(iter(kinds))[0].is_floating_point:
        raise TypeError(f"a QP needs parts of one floating point dtype on one device, got {sorted(map(str, kinds))}")
    shapes = {name: tuple(value.shape) for name, value in parts.items()}
    fault = ValueError(
        f"the shapes {shapes} do not fit together: wanted Q (..., n, n), c (..., n), A (..., p, n), b (..., p), "
        "G (..., m, n), h (..., m), with leading dimensions that broadcast"
    )
    if any(len(shape) < DIMENSIONS[name] for name, shape in shapes.items()):
        raise fault
    own = {name: shape[len(shape) - DIMENSIONS[name] :] for name, shape in shapes.items()}
    n, p, m = (own.get("Q") or own["c"])[-1], own.get("b", (0,))[0], own.get("h", (0,))[0]
    wanted = {"Q": (n, n), "c": (n,), "A": (p, n), "b": (p,), "G": (m, n), "h": (m,)}
    if n == 0 or any(own[name] != wanted[name] for name in own):
        raise fault
    try:
        stack = torch.broadcast_shapes(*(shape[: len(shape) - len(own[name])] for name, shape in shapes.items()))
    except RuntimeError:
        raise fault from None
    for name, value in parts.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"the part {name} of the QP has NaN or infinite entries; leave out such rows")
    count = torch.Size(stack).numel()
    if count == 0:
        raise ValueError(f"a stack of no problems: leading dimensions {tuple(stack)}")
    template = next(iter(parts.values()))
    full = {name: template.new_zeros(1, *wanted[name]) for name in wanted}
    for name, value in parts.items():
        shared = value.shape[: value.ndim - len(own[name])].numel() == 1
        full[name] = (
            value.reshape(1, *own[name]) if shared else value.expand(*stack, *own[name]).reshape(count, *own[name])
        )
    full["Q"] = (full["Q"] + full["Q"].mT) / 2
    return Program(**full), tuple(stack)


def solution_tree(x: Tree, data: tuple, y: Point, stack: tuple[int, ...]) -> dict[str, Tensor]:
    """`y` as `QP` wants it, with the leading dimensions of the problem."""
    problem = gathered(x, data)
    tree = {"primal": y.z.reshape(*stack, -1)}
    if "A" in problem:
        tree["equality"] = y.nu.reshape(*stack, y.nu.shape[-1])
    if "G" in problem:
        tree["inequality"] = y.lam.reshape(*stack, y.lam.shape[-1])
    return tree


def _where(mask: Tensor, these: Iterable[Tensor], others: Iterable[Tensor]) -> Iterator[Tensor]:
    return (torch.where(mask.unsqueeze(-1), a, b) for a, b in zip(these, others, strict=True))


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """`(B, m, n), (B, n) -> (B, m)`; where one matrix serves all, as one product."""
    if len(matrix) == 1 and len(vector) > 1:
        return vector @ matrix[0].mT
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def largest(*vectors: Tensor) -> Tensor:
    """Largest absolute entry of vectors `(B, ·)`, `(B,)`; 0 for empty ones."""
    found = [vector.abs().amax(-1) for vector in vectors if vector.shape[-1]]
    return torch.stack(torch.broadcast_tensors(*found)).amax(0) if found else vectors[0].new_zeros(len(vectors[0]))
