"""Sets to project onto, each with an independent road to the nearest point; an entry here inherits the contract."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Generator, Tensor

from implicitgrad import projections

Draw = Callable[[int, Generator], tuple[Tensor, ...]]


@dataclass(frozen=True)
class SetCase:
    """A projection and what it should be.

    Attributes:
        name: Of the set.
        project: Function of a point and parameters, all tensors.
        draw: Random parameters for points of n entries.
        describe: `(z, *parameters)` to the constraints of a CVXPY problem; for a set that is not convex, several lists
            of constraints whose union it is.
        violation: By how much a point lies outside, for points of moderate size.
        convex: Whether the set is.
        like_y: Which parameters are trees like the point.
        scale: Size of the points to project.
    """

    name: str
    project: Callable[..., Tensor]
    draw: Draw
    describe: Callable[..., list[Any]]
    violation: Callable[..., Tensor]
    convex: bool = True
    like_y: tuple[int, ...] = ()
    scale: float = 1.0

    def __str__(self) -> str:
        return self.name

    def example(self, n: int, seed: int) -> tuple[Tensor, ...]:
        """A point with n entries, and parameters."""
        generator = torch.Generator().manual_seed(seed)
        parameters = self.draw(n, generator)
        return self.scale * torch.randn(n, generator=generator, dtype=torch.float64), *parameters

    def nearest(self, y: Tensor, *parameters: Tensor) -> Tensor:
        """The nearest point by CVXPY and Clarabel."""
        z = cp.Variable(len(y))
        described = self.describe(z, *(p.numpy() for p in parameters))
        best = (np.inf, np.full(len(y), np.nan))
        for constraints in [described] if self.convex else described:
            problem = cp.Problem(cp.Minimize(cp.sum_squares(z - y.numpy())), constraints)
            problem.solve(cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
            assert z.value is not None
            best = min(best, (float(np.sum((z.value - y.numpy()) ** 2)), z.value), key=lambda pair: pair[0])
        return torch.tensor(best[1])


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether no entry differs by more than `tolerance`."""
    return a.shape == b.shape and bool((a - b).abs().amax() <= tolerance)


def rand(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def randn(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def radius(n: int, g: Generator) -> tuple[Tensor, ...]:
    return (0.3 + rand(g),)


def bounds(n: int, g: Generator) -> tuple[Tensor, Tensor]:
    return -rand(g, n), rand(g, n)


def plane(n: int, g: Generator) -> tuple[Tensor, Tensor]:
    return randn(g, n), randn(g)


def rows(n: int, g: Generator) -> tuple[Tensor, Tensor]:
    m = (n + 1) // 2
    return randn(g, m, n), randn(g, m)


def inequalities(n: int, g: Generator) -> tuple[Tensor, Tensor]:
    G, inside = randn(g, 2 * n, n), 0.3 * randn(g, n)
    return G, G @ inside + 0.1 + rand(g, 2 * n)


def both(n: int, g: Generator) -> tuple[Tensor, ...]:
    A, inside = randn(g, n // 3, n), 0.3 * randn(g, n)
    G = randn(g, 2 * n, n)
    return A, A @ inside, G, G @ inside + 0.1 * rand(g, 2 * n)


def section(n: int, g: Generator) -> tuple[Tensor, ...]:
    lower, upper = bounds(n, g)
    weights = randn(g, n)
    return lower, upper, weights, weights @ (lower + (upper - lower) * rand(g, n))


def simplex_violation(z: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(-z.amin(), (z.sum() - radius).abs())


def finite(z: Any, lower: Any, upper: Any) -> list[Any]:
    """Constraints for those bounds that are finite."""
    below, above = np.isfinite(lower).nonzero()[0], np.isfinite(upper).nonzero()[0]
    sides = [(z[below] >= lower[below], below), (z[above] <= upper[above], above)]
    return [constraint for constraint, entries in sides if len(entries)]


def sparse(z: Any, radius: Any) -> list[Any]:
    n = z.shape[0]
    kept = itertools.combinations(range(n), min(2, n))
    return [[z >= 0, cp.sum(z) == radius, *(z[i] == 0 for i in range(n) if i not in support)] for support in kept]


def orthants(z: Any, radius: Any) -> list[Any]:
    signs = itertools.product([-1.0, 1.0], repeat=z.shape[0])
    return [[cp.multiply(np.array(s), z) >= 0, np.array(s) @ z == radius] for s in signs]


SETS = [
    SetCase("non_negative", projections.non_negative, lambda n, g: (), lambda z: [z >= 0], lambda z: -z.amin()),
    SetCase(
        "box",
        projections.box,
        bounds,
        finite,
        lambda z, lower, upper: torch.maximum(lower - z, z - upper).amax(),
        like_y=(0, 1),
    ),
    SetCase(
        "box with half its bounds",
        projections.box,
        lambda n, g: (-rand(g, n), torch.where(torch.arange(n) % 2 == 0, torch.inf, rand(g, n))),
        finite,
        lambda z, lower, upper: torch.maximum(lower - z, z - upper).amax(),
        like_y=(0, 1),
    ),
    SetCase(
        "hypercube",
        projections.hypercube,
        radius,
        lambda z, side: [z >= 0, z <= side],
        lambda z, side: torch.maximum(-z, z - side).amax(),
    ),
    SetCase(
        "linf_ball",
        projections.linf_ball,
        radius,
        lambda z, radius: [cp.abs(z) <= radius],
        lambda z, radius: z.abs().amax() - radius,
    ),
    SetCase("simplex", projections.simplex, radius, lambda z, r: [z >= 0, cp.sum(z) == r], simplex_violation),
    SetCase(
        "l1_ball outside",
        projections.l1_ball,
        radius,
        lambda z, radius: [cp.norm1(z) <= radius],
        lambda z, radius: z.abs().sum() - radius,
        scale=2.0,
    ),
    SetCase(
        "l1_ball inside",
        projections.l1_ball,
        radius,
        lambda z, radius: [cp.norm1(z) <= radius],
        lambda z, radius: z.abs().sum() - radius,
        scale=0.01,
    ),
    SetCase(
        "l2_ball outside",
        projections.l2_ball,
        radius,
        lambda z, radius: [cp.norm2(z) <= radius],
        lambda z, radius: z.norm() - radius,
        scale=3.0,
    ),
    SetCase(
        "l2_ball inside",
        projections.l2_ball,
        radius,
        lambda z, radius: [cp.norm2(z) <= radius],
        lambda z, radius: z.norm() - radius,
        scale=0.01,
    ),
    SetCase(
        "hyperplane",
        projections.hyperplane,
        plane,
        lambda z, a, c: [a @ z == c],
        lambda z, a, c: (a @ z - c).abs(),
        like_y=(0,),
    ),
    SetCase(
        "half_space",
        projections.half_space,
        plane,
        lambda z, a, c: [a @ z <= c],
        lambda z, a, c: a @ z - c,
        like_y=(0,),
        scale=3.0,
    ),
    SetCase(
        "affine_set",
        projections.affine_set,
        rows,
        lambda z, A, b: [A @ z == b],
        lambda z, A, b: (A @ z - b).abs().amax(),
    ),
    SetCase(
        "polyhedron",
        lambda y, G, h: projections.polyhedron(y, G=G, h=h),
        inequalities,
        lambda z, G, h: [G @ z <= h],
        lambda z, G, h: (G @ z - h).amax(),
        scale=3.0,
    ),
    SetCase(
        "polyhedron with equalities",
        projections.polyhedron,
        both,
        lambda z, A, b, G, h: [A @ z == b, G @ z <= h] if len(A) else [G @ z <= h],
        lambda z, A, b, G, h: torch.cat([(A @ z - b).abs(), G @ z - h]).amax(),
        scale=3.0,
    ),
    SetCase(
        "box_section",
        projections.box_section,
        section,
        lambda z, lower, upper, w, c: [z >= lower, z <= upper, w @ z == c],
        lambda z, lower, upper, w, c: torch.cat([lower - z, z - upper, (w @ z - c).abs().reshape(1)]).amax(),
        like_y=(0, 1, 2),
    ),
    SetCase(
        "sparse_simplex",
        lambda y, radius: projections.sparse_simplex(y, 2, radius),
        radius,
        sparse,
        lambda z, r: torch.maximum(simplex_violation(z, r), (z.abs().sort(descending=True).values[2:]).sum()),
        convex=False,
    ),
    SetCase(
        "l1_sphere outside",
        projections.l1_sphere,
        radius,
        orthants,
        lambda z, radius: (z.abs().sum() - radius).abs(),
        convex=False,
        scale=2.0,
    ),
    SetCase(
        "l1_sphere inside",
        projections.l1_sphere,
        radius,
        orthants,
        lambda z, radius: (z.abs().sum() - radius).abs(),
        convex=False,
        scale=0.05,
    ),
]
