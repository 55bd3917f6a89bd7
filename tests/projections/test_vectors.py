"""Simplices, balls, spheres and boxes: ties, edges of parameters, accuracy, size, errors."""

import pytest
import torch
from torch import Tensor

from implicitgrad import projections
from implicitgrad.projections import (
    box,
    hypercube,
    l1_ball,
    l1_sphere,
    l2_ball,
    l2_sphere,
    linf_ball,
    non_negative,
    simplex,
    sparse_simplex,
)
from tests.projections.sets import near

F64 = {"dtype": torch.float64}
SCALED = [simplex, l1_ball, l1_sphere, l2_ball, l2_sphere, linf_ball, hypercube, lambda y, r: sparse_simplex(y, 2, r)]
NAMES = ["simplex", "l1_ball", "l1_sphere", "l2_ball", "l2_sphere", "linf_ball", "hypercube", "sparse_simplex"]
every_scaled_set = pytest.mark.parametrize("project", SCALED, ids=NAMES)
Y = torch.tensor([0.5, -1.2, 2.0, 0.1], **F64)


def bisected_simplex(y: Tensor, radius: float) -> Tensor:
    """An independent road: the threshold by bisection."""
    low, high = y.min() - radius, y.max()
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (middle, high) if (y - middle).clamp(min=0).sum() > radius else (low, middle)
    return (y - high).clamp(min=0)


@every_scaled_set
def test_radius_zero_gives_zero_and_a_negative_one_raises(project) -> None:
    assert torch.equal(project(Y, 0.0).abs(), torch.zeros_like(Y))
    with pytest.raises(ValueError, match=r"got -1\.5"):
        project(Y, -1.5)
    with pytest.raises(ValueError, match=r"got -1\.5"):
        project(Y, torch.tensor(-1.5, **F64, requires_grad=True))
    under_vmap = torch.func.vmap(project)(torch.stack([Y, Y]), torch.tensor([-1.5, 1.0], **F64))
    assert under_vmap[0].isnan().all() and torch.equal(under_vmap[1], project(Y, 1.0))


@every_scaled_set
def test_radius_may_be_of_another_type_but_must_be_a_finite_number(project) -> None:
    want = project(Y.float(), 0.5)
    assert torch.equal(project(Y.float(), torch.tensor(0.5, **F64)), want) and want.dtype == torch.float32
    assert torch.equal(project(Y, 1), project(Y, torch.tensor(1)))
    with pytest.raises(FloatingPointError, match=r"in (radius|side)"):
        project(Y, torch.nan)
    with pytest.raises(TypeError, match="got str"):
        project(Y, "1")
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        project(Y, torch.ones(4, **F64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_simplex_is_accurate_for_a_million_entries_of_any_offset(dtype: torch.dtype) -> None:
    y = torch.randn(10**6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    eps = torch.finfo(dtype).eps
    for offset, radius in ((0.0, 1e4), (1e3, 1.0)):
        moved = y + offset
        got = simplex(moved, radius)
        assert got.amin() >= 0 and abs(got.double().sum().item() - radius) <= 1e6 * eps
        assert (got.double() - bisected_simplex(moved.double(), radius)).abs().max() <= 4 * eps * (1 + abs(offset))


@pytest.mark.parametrize("name", ["l1_ball", "l2_ball", "l2_sphere", "l1_sphere", "linf_ball"])
def test_a_million_entries_and_their_gradient_need_no_matrix(name: str) -> None:
    y = torch.randn(10**6, **F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = getattr(projections, name)(y, 2.0)
    norm = {"l1": 1, "l2": 2, "li": torch.inf}[name[:2]]
    assert abs(torch.linalg.vector_norm(z.detach(), norm).item() - 2.0) < 1e-9
    (gradient,) = torch.autograd.grad(z.square().sum(), y)
    assert gradient.isfinite().all()


def test_simplex_gives_equal_entries_to_equal_entries() -> None:
    y = torch.tensor([0.7, -2.0, 0.7, 0.7], **F64)
    assert near(simplex(y), torch.tensor([1 / 3, 0, 1 / 3, 1 / 3], **F64), 1e-15)
    assert torch.equal(simplex(torch.zeros(8, **F64), 2.0), torch.full((8,), 0.25, **F64))


def test_one_entry_takes_the_whole_radius() -> None:
    y = torch.tensor([-3.0], **F64)
    for project, want in ((simplex, 0.5), (l1_sphere, -0.5), (l2_sphere, -0.5), (l1_ball, -0.5), (l2_ball, -0.5)):
        assert project(y, 0.5).item() == want
    assert sparse_simplex(y, 1, 0.5).item() == 0.5


def test_shape_of_the_point_does_not_matter() -> None:
    assert torch.equal(simplex(Y.reshape(2, 2)), simplex(Y).reshape(2, 2))
    assert torch.equal(simplex(torch.tensor(3.0, **F64)), torch.tensor(1.0, **F64))


def test_sparse_simplex_breaks_ties_in_order_and_is_simplex_for_many_entries() -> None:
    assert torch.equal(sparse_simplex(torch.ones(5, **F64), 2), torch.tensor([0.5, 0.5, 0, 0, 0], **F64))
    for many in (4, 7):
        assert torch.equal(sparse_simplex(Y, many), simplex(Y))
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="max_nonzeros"):
            sparse_simplex(Y, bad)


def test_l1_sphere_moves_zeros_to_the_positive_side_with_the_derivative_of_that_side() -> None:
    y = torch.tensor([0.1, 0.0, -0.1], **F64)
    want = torch.tensor([0.1 + 0.8 / 3, 0.8 / 3, -0.1 - 0.8 / 3], **F64)
    assert near(l1_sphere(y), want, 1e-15)
    s = torch.tensor([1.0, 1.0, -1.0], **F64)
    jacobian = torch.func.jacrev(l1_sphere)(y)
    assert near(jacobian, torch.eye(3, **F64) - torch.outer(s, s) / 3, 1e-15)


def test_balls_leave_what_is_inside_and_are_smooth_at_zero() -> None:
    zero = torch.zeros(3, **F64)
    for project in (l1_ball, l2_ball, linf_ball):
        assert torch.equal(project(0.1 * Y), 0.1 * Y)
        assert torch.equal(torch.func.jacrev(project)(zero), torch.eye(3, **F64))
        assert torch.equal(torch.func.hessian(lambda y, p=project: p(y).square().sum())(zero), 2 * torch.eye(3, **F64))


def test_l2_sphere_refuses_zero() -> None:
    with pytest.raises(ValueError, match="all points are nearest"):
        l2_sphere(torch.zeros(3, **F64))
    under_vmap = torch.func.vmap(l2_sphere)(torch.stack([torch.zeros(4, **F64), Y]))
    assert under_vmap[0].isnan().all() and near(under_vmap[1], Y / Y.norm(), 1e-15)


def test_l2_projections_neither_overflow_nor_underflow() -> None:
    for size in (1e30, 1e-30):
        y = torch.tensor([3.0, 4.0]) * size
        assert near(l2_sphere(y), torch.tensor([0.6, 0.8]), 2e-7)
        assert near(l2_ball(y, size) / size, torch.tensor([0.6, 0.8]), 2e-7)


def test_box_takes_numbers_trees_and_smaller_tensors() -> None:
    y = {"w": torch.tensor([[-2.0, 0.5], [3.0, 0.2]], **F64), "b": torch.tensor(9.0, **F64)}
    want = box(y, 0.0, 1.0)
    assert torch.equal(want["w"], torch.tensor([[0.0, 0.5], [1.0, 0.2]], **F64)) and want["b"] == 1
    spread = box(y, {"w": torch.zeros(2, **F64), "b": 0.0}, {"b": torch.tensor(1.0), "w": torch.ones(2, 1)})
    assert all(torch.equal(spread[key], want[key]) for key in y)
    with pytest.raises(ValueError, match="missing"):
        box(y, {"w": 0.0}, 1.0)
    with pytest.raises(ValueError, match=r"lower like y, got shape \(3,\)"):
        box(y, {"w": torch.zeros(3), "b": 0.0}, 1.0)
    with pytest.raises(TypeError, match="NoneType"):
        box(y["w"], None, 1.0)


def test_box_follows_its_bounds_where_they_are_equal() -> None:
    def held(at: Tensor) -> Tensor:
        return box(torch.tensor([-1.0, 3.0], **F64), at, at)

    assert torch.equal(torch.func.jacrev(held)(torch.tensor([0.5, 0.5], **F64)), torch.eye(2, **F64))


def test_box_without_bounds_is_the_point() -> None:
    assert torch.equal(box(Y, -torch.inf, torch.inf), Y)


def test_empty_boxes_raise() -> None:
    with pytest.raises(ValueError, match=r"got 1\.0 above 0\.5 in the first of 2 entries"):
        box(torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]), 0.5)
    with pytest.raises(ValueError, match="no number lies between"):
        box(torch.zeros(3), torch.inf, torch.inf)
    with pytest.raises(FloatingPointError, match="in upper"):
        box(torch.zeros(3), 0.0, torch.nan)
    under_vmap = torch.func.vmap(lambda y, top: box(y, 0.0, top))(torch.zeros(2, 3), torch.tensor([-1.0, 1.0]))
    assert under_vmap[0].isnan().all() and torch.equal(under_vmap[1], torch.zeros(3))


def test_at_a_kink_the_derivative_is_that_of_the_inside() -> None:
    corner = torch.zeros(2, **F64)
    for project in (non_negative, lambda y: box(y, 0.0, 1.0), hypercube):
        assert torch.equal(torch.func.jacrev(project)(corner), torch.eye(2, **F64))
