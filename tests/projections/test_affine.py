"""Planes, affine sets, box sections and polyhedra: factorisation, dependent rows, degenerate corners, size, errors."""

import pytest
import torch
from scipy.optimize import linprog, nnls
from torch import Tensor

from implicitgrad import projections
from implicitgrad.projections import (
    affine_set,
    box,
    box_section,
    half_space,
    hyperplane,
    polyhedron,
    row_space,
    simplex,
)
from tests.projections.sets import near

F64 = {"dtype": torch.float64}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **F64)


def kkt_error(y: Tensor, z: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> float:
    """How far z is from optimal: violations, and the distance of y - z from the cone of the rows that bind."""
    binding = h - G @ z <= 1e-9
    cone = torch.cat([A, -A, G[binding]]).T
    _, distance = nnls(cone.numpy(), (y - z).numpy())
    return max(distance, (A @ z - b).abs().sum().item(), (G @ z - h).clamp(min=0).sum().item())


# --- planes and affine sets -------------------------------------------------------------------------------------------


def test_one_row_is_a_hyperplane_and_a_half_space_is_where_it_binds() -> None:
    y, a = randn(5), randn(5, seed=1)
    want = affine_set(y, a[None], torch.tensor([0.3], **F64))
    assert near(hyperplane(y, a, 0.3), want, 1e-14)
    sides = (half_space(y, a, 0.3), half_space(y, -a, -0.3))
    assert sorted(near(side, want, 1e-14) for side in sides) == [False, True]
    assert any(torch.equal(side, y) for side in sides)


def test_planes_do_not_depend_on_the_length_of_the_normal() -> None:
    y, a = randn(5).float(), randn(5, seed=1).float()
    for size in (1e-30, 1e30):
        assert near(hyperplane(y, size * a, size * 0.3), hyperplane(y, a, 0.3), 1e-6)


@pytest.mark.parametrize("project", [hyperplane, half_space])
def test_a_normal_of_zero_or_of_another_shape_raises(project) -> None:
    with pytest.raises(ValueError, match="normal other than zero"):
        project(randn(3), torch.zeros(3, **F64), 1.0)
    with pytest.raises(ValueError, match="like y"):
        project(randn(3), randn(2), 1.0)
    with pytest.raises(FloatingPointError, match="in offset"):
        project(randn(3), randn(3), torch.nan)
    y = randn(3, seed=1)
    under_vmap = torch.func.vmap(lambda a: project(y, a, 1.0))(torch.stack([torch.zeros(3, **F64), randn(3)]))
    assert under_vmap[0].isnan().all() and near(under_vmap[1], project(y, randn(3), 1.0), 1e-14)


def test_a_factor_serves_many_points_and_carries_the_derivative_in_its_matrix() -> None:
    A, b, points = randn(3, 6).requires_grad_(), randn(3, seed=1), randn(4, 6, seed=2)
    factor = row_space(A)
    loss = lambda given: sum(affine_set(y, given, b).square().sum() for y in points)
    (got,) = torch.autograd.grad(loss(factor), A)
    (want,) = torch.autograd.grad(loss(A), A)
    assert near(got, want, 1e-11)
    batch = torch.func.vmap(affine_set, (0, None, None))(points, factor, b)
    assert near(batch, torch.stack([affine_set(y, A, b) for y in points]), 1e-13)


def test_affine_set_keeps_accuracy_where_normal_equations_lose_it() -> None:
    A = randn(3, 6)
    A[2] = A[0] + 1e-7 * A[2]  # condition 1e7: its square leaves two digits
    b = A @ randn(6, seed=1)
    assert (A @ affine_set(randn(6, seed=2), A, b) - b).abs().max() < 1e-14


def test_dependent_rows_raise_and_are_named() -> None:
    A = randn(4, 6)
    A[2] = A[0] - 2 * A[1]
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        affine_set(randn(6), A, torch.zeros(4, **F64))
    A[2] = 0
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        row_space(A)
    with pytest.raises(ValueError, match="at most as many rows"):
        row_space(randn(3, 2))
    both = torch.stack([A, randn(4, 6)])
    under_vmap = torch.func.vmap(affine_set, (None, 0, None))(randn(6), both, torch.zeros(4, **F64))
    assert under_vmap[0].isnan().all() and under_vmap[1].isfinite().all()


def test_scaled_rows_are_not_taken_for_dependent_ones() -> None:
    A = randn(3, 6) * torch.tensor([[1.0], [1e-20], [1e20]], **F64)
    b = A @ randn(6, seed=1)
    assert ((A @ affine_set(randn(6), A, b) - b) / A.norm(dim=1)).abs().max() < 1e-14


def test_matrices_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match=r"A of shape \(any, 6\)"):
        affine_set(randn(6), randn(2, 5), randn(2))
    with pytest.raises(ValueError, match=r"b of shape \(2\)"):
        affine_set(randn(6), randn(2, 6), randn(3))
    with pytest.raises(TypeError, match="float32"):
        affine_set(randn(6), randn(2, 6), randn(2).float())
    with pytest.raises(TypeError, match="list"):
        affine_set(randn(6), [[1.0]], randn(2))
    with pytest.raises(FloatingPointError, match="in A"):
        affine_set(randn(6), randn(2, 6) * torch.nan, randn(2))


# --- box sections -----------------------------------------------------------------------------------------------------


def test_box_section_without_bounds_is_a_hyperplane_and_with_unit_weights_a_simplex() -> None:
    y, w = randn(6), randn(6, seed=1)
    assert near(box_section(y, -torch.inf, torch.inf, w, 0.4), hyperplane(y, w, 0.4), 1e-14)
    assert near(box_section(y, 0.0, torch.inf, 1.0, 0.7), simplex(y, 0.7), 1e-14)
    assert near(box_section(y, -torch.inf, 0.0, 1.0, -0.7), -simplex(-y, 0.7), 1e-14)


def test_box_section_clips_entries_without_weight() -> None:
    y, w = randn(6), torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5, 0.0], **F64)
    z = box_section(y, -0.4, 0.5, w, 0.6)
    assert torch.equal(z[w == 0], box(y, -0.4, 0.5)[w == 0]) and abs(w @ z - 0.6) < 1e-15


def test_box_section_reaches_the_corners_of_the_box_and_nothing_beyond() -> None:
    y, w = randn(5), torch.tensor([1.0, -2.0, 0.5, 3.0, -0.1], **F64)
    for sign in (1, -1):
        corner = torch.where(sign * w > 0, 0.7, -0.3 * torch.ones_like(w))
        assert near(box_section(y, -0.3, 0.7, w, w @ corner), corner, 1e-14)  # 1e-15 over the smallest weight
        with pytest.raises(ValueError, match="needs a total between"):
            box_section(y, -0.3, 0.7, w, w @ corner + sign * 1e-9)
    with pytest.raises(ValueError, match="not all zero"):
        box_section(y, 0.0, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no number lies between"):
        box_section(y, 1.0, 0.0, w, 0.0)
    under_vmap = torch.func.vmap(lambda c: box_section(y, -0.3, 0.7, w, c))(torch.tensor([99.0, 0.1], **F64))
    assert under_vmap[0].isnan().all() and torch.equal(under_vmap[1], box_section(y, -0.3, 0.7, w, 0.1))


def test_box_section_in_a_gap_between_kinks_holds_every_entry_at_a_bound() -> None:
    y = torch.tensor([5.0, -5.0], **F64)  # as τ grows, the first entry falls only after the second has
    z = box_section(y, 0.0, 1.0, 1.0, 1.0)
    assert torch.equal(z, torch.tensor([1.0, 0.0], **F64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_box_section_of_a_million_entries_meets_its_total_and_its_optimality(dtype: torch.dtype) -> None:
    y, w = randn(10**6).to(dtype), randn(10**6, seed=1).to(dtype)
    z = box_section(y, -0.5, 0.25, w, 123.0)
    eps = torch.finfo(dtype).eps
    assert abs((w.double() @ z.double()).item() - 123.0) <= 1e6 * eps
    free = (z > -0.5) & (z < 0.25)
    multiplier = ((y - z) / w)[free & (w.abs() > 0.1)]  # the same for all free entries
    assert (multiplier.amax() - multiplier.amin()) <= 100 * eps
    assert near(box(y - multiplier.mean() * w, -0.5, 0.25), z, 100 * eps)


# --- polyhedra --------------------------------------------------------------------------------------------------------


def as_polyhedron(name: str, y: Tensor, radius: Tensor) -> Tensor:
    n = len(y)
    one, unit, h = torch.ones(1, n, **F64), torch.eye(n, **F64), radius.reshape(1)
    if name == "simplex":
        return polyhedron(y, one, h, -unit, torch.zeros(n, **F64))
    if name == "hypercube":
        return polyhedron(y, G=torch.cat([unit, -unit]), h=torch.cat([h.expand(n), torch.zeros(n, **F64)]))
    signs = torch.cartesian_prod(*n * [torch.tensor([-1.0, 1.0], **F64)])  # many of the 2ⁿ facets meet in one point
    return polyhedron(y, G=signs, h=h.expand(len(signs)))


@pytest.mark.parametrize("name", ["simplex", "hypercube", "l1_ball"])
def test_polyhedron_equals_projections_with_a_formula_and_their_derivatives(name: str) -> None:
    formula, radius = getattr(projections, name), torch.tensor(0.8, **F64)
    for seed in range(5):
        y = 2 * randn(5, seed=seed)
        assert near(as_polyhedron(name, y, radius), formula(y, radius), 1e-13)
        if name == "l1_ball":  # a sum over the facets that meet is not what each of them gives
            continue
        got = torch.func.jacrev(lambda *values: as_polyhedron(name, *values), (0, 1))(y, radius)
        want = torch.func.jacrev(formula, (0, 1))(y, radius)
        assert all(near(a, b, 1e-12) for a, b in zip(got, want, strict=True))


def test_polyhedron_of_many_constraints_is_optimal() -> None:
    n, p, q = 60, 10, 150
    A, G, inside = randn(p, n), randn(q, n, seed=1), 0.1 * randn(n, seed=2)
    b, h = A @ inside, G @ inside + torch.rand(q, generator=torch.Generator().manual_seed(3), **F64)
    for seed in range(3):
        y = 5 * randn(n, seed=4 + seed)
        z = polyhedron(y, A, b, G, h)
        assert kkt_error(y, z, A, b, G, h) < 1e-10 and (G @ z > h - 1e-9).sum() > 20


def test_polyhedron_takes_dependent_equalities_that_agree_and_doubled_inequalities() -> None:
    A, G, inside = randn(3, 6), randn(8, 6, seed=1), randn(6, seed=2)
    A[2] = A[0] - 2 * A[1]
    G[1], G[2] = G[0], 3 * G[0]
    b, h = A @ inside, G @ inside
    y = inside + G[0] + randn(6, seed=3)
    z = polyhedron(y, A, b, G, h)
    assert kkt_error(y, z, A, b, G, h) < 1e-12
    kept = [0, 3, 4, 5, 6, 7]
    assert near(z, polyhedron(y, A[:2], b[:2], G[kept], h[kept]), 1e-13)
    assert torch.func.jacrev(polyhedron)(y, A, b, G, h).isfinite().all()


def test_polyhedron_ends_at_a_corner_where_more_constraints_meet_than_dimensions() -> None:
    G = randn(40, 4)
    y = G[:10].sum(0)
    z = polyhedron(y, G=G, h=torch.zeros(40, **F64))  # a cone: all 40 meet in zero
    assert kkt_error(y, z, G[:0], G[:0, 0], G, torch.zeros(40, **F64)) < 1e-12


def test_polyhedron_gives_the_only_point_of_a_thin_set() -> None:
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], **F64)
    h = torch.tensor([0.3, -0.3, 1.0, -1.0], **F64)
    assert near(polyhedron(randn(2), G=G, h=h), torch.tensor([0.3, 1.0], **F64), 1e-15)


def test_polyhedron_does_not_depend_on_the_scale_of_its_constraints() -> None:
    G, h, y = randn(8, 4), 0.1 * torch.ones(8, **F64), 3 * randn(4, seed=1)
    factors = torch.logspace(-8, 8, 8, **F64)
    scaled = polyhedron(y, G=factors[:, None] * G, h=factors * h)
    assert near(scaled, polyhedron(y, G=G, h=h), 1e-13)


def test_polyhedron_without_rows_is_the_point_and_rows_of_zero_say_nothing() -> None:
    y = randn(3)
    assert torch.equal(polyhedron(y, G=randn(0, 3), h=randn(0)), y)
    assert torch.equal(polyhedron(y, G=torch.zeros(1, 3, **F64), h=torch.ones(1, **F64)), y)


def test_contradictory_constraints_raise_also_under_vmap() -> None:
    G = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], **F64)
    for A, b, h in (
        (None, None, torch.tensor([-1.0, -1.0], **F64)),
        (torch.tensor([[1.0, 0.0], [2.0, 0.0]], **F64), torch.ones(2, **F64), torch.ones(2, **F64)),
        (torch.tensor([[1.0, 0.0]], **F64), torch.full((1,), 5.0, **F64), torch.ones(2, **F64)),
    ):
        with pytest.raises(ValueError, match="set is empty for 1 of 1 points"):
            polyhedron(randn(2), A, b, G, h)
    with pytest.raises(ValueError, match="set is empty for 1 of 1 points"):
        polyhedron(randn(2), G=torch.zeros(1, 2, **F64), h=-torch.ones(1, **F64))
    y, sides = randn(2), torch.tensor([[1.0, 1.0], [-1.0, -1.0]], **F64)
    with pytest.raises(ValueError, match="set is empty for 1 of 2 points"):
        torch.func.vmap(lambda h: polyhedron(y, G=G, h=h))(sides)


def test_incomplete_constraints_raise() -> None:
    y, G, h = randn(3), randn(2, 3), randn(2)
    with pytest.raises(ValueError, match="needs constraints"):
        polyhedron(y)
    with pytest.raises(ValueError, match="got G without h"):
        polyhedron(y, G=G)
    with pytest.raises(ValueError, match="got b without A"):
        polyhedron(y, b=h, G=G, h=h)
    with pytest.raises(ValueError, match=r"h of shape \(2\)"):
        polyhedron(y, G=G, h=randn(3))
    with pytest.raises(FloatingPointError, match="in b or h"):
        polyhedron(y, G=G, h=h * torch.nan)


@pytest.mark.parametrize("seed", range(24))
def test_polyhedron_is_optimal_where_rows_depend_on_each_other_and_meet_in_one_point(seed: int) -> None:
    n, q = 3 + seed % 9, 30
    G = randn(q, 1 + seed % n, seed=seed) @ randn(1 + seed % n, n, seed=seed + 1)  # of low rank
    G = G.round() if seed % 3 == 0 else G + seed % 2 * 1e-4 * randn(q, n, seed=seed + 2)  # equal, or almost so
    h = G @ randn(n, seed=seed + 3)  # all meet
    y = 10.0 ** (seed % 4 - 1) * randn(n, seed=seed + 4)
    z = polyhedron(y, G=G, h=h)
    assert kkt_error(y, z, G[:0], G[:0, 0], G, h) < 1e-9 * (1 + y.norm())


def test_polyhedron_tells_empty_sets_as_a_linear_program_does() -> None:
    empty = 0
    for seed in range(60):
        n, q = 1 + seed % 7, 6 + seed % 17
        G, h, y = randn(q, n, seed=seed), 0.4 + 0.5 * randn(q, seed=seed + 1), randn(n, seed=seed + 2)
        status = linprog(torch.zeros(n).numpy(), G.numpy(), h.numpy(), bounds=(None, None)).status
        assert status in (0, 2)  # solved or infeasible
        empty += status == 2
        if status == 2:
            with pytest.raises(ValueError, match="set is empty"):
                polyhedron(y, G=G, h=h)
        else:
            polyhedron(y, G=G, h=h)
    assert 10 < empty < 50


def test_polyhedron_under_nested_vmap_shares_or_batches_each_argument() -> None:
    G, h, points = randn(2, 6, 3), 0.1 + randn(6).abs(), 2 * randn(4, 3, seed=1)
    twice = torch.func.vmap(torch.func.vmap(lambda y, G: polyhedron(y, G=G, h=h), (0, None)), (None, 0))
    want = torch.stack([torch.stack([polyhedron(y, G=each, h=h) for y in points]) for each in G])
    assert near(twice(points, G), want, 1e-13)
    alone = torch.func.vmap(lambda h: polyhedron(points[0], G=G[0], h=h))(torch.stack([h, 2 * h]))
    assert near(alone, torch.stack([polyhedron(points[0], G=G[0], h=s * h) for s in (1, 2)]), 1e-13)
