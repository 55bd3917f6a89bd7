"""Products and intersections of sets: against closed forms and CVXPY, derivatives also in what is closed over."""

from typing import NamedTuple

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from implicitgrad.projections import Dykstra, cartesian, l2_ball, non_negative, psd_cone, simplex


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex_as_intersection(y: Tensor, radius: Tensor) -> Tensor:
    return Dykstra((non_negative, lambda y: y - (y.sum() - radius) / y.numel()))(y)


CENTRE = torch.tensor([1.0, 0.2, 0.0, -0.3], dtype=torch.float64)


def lens(y: Tensor, radius: Tensor) -> Tensor:
    """Two balls that overlap; the point of these tests is nearest to their common rim, where both curve."""
    return Dykstra((lambda y: l2_ball(y, radius), lambda y: CENTRE + l2_ball(y - CENTRE, 0.9 * radius)))(y)


RIM = torch.tensor([0.5, 2.0, 1.0, 0.7], dtype=torch.float64)
ONE = torch.tensor(1.0, dtype=torch.float64)
PROBLEMS = {"simplex": (simplex_as_intersection, draw(5), 1.3 * ONE), "lens": (lens, RIM, ONE)}
every_problem = pytest.mark.parametrize(("project", "y", "radius"), PROBLEMS.values(), ids=PROBLEMS.keys())


# --- products ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_cartesian_projects_each_part() -> None:
    y = {"w": Pair(draw(3), draw(2, seed=1)), "v": [draw(4, seed=2)], "u": {"a": draw(2), "b": draw(1)}}
    z = cartesian({"w": Pair(simplex, non_negative), "v": [l2_ball], "u": simplex})(y)
    assert isinstance(z["w"], Pair) and isinstance(z["v"], list) and list(z) == list(y)
    assert torch.equal(z["w"].first, simplex(y["w"].first)) and torch.equal(z["w"].second, non_negative(y["w"].second))
    assert torch.equal(z["v"][0], l2_ball(y["v"][0]))
    assert torch.allclose(z["u"]["a"].sum() + z["u"]["b"].sum(), ONE)  # a tree below is one vector


def test_cartesian_refuses_what_does_not_match() -> None:
    with pytest.raises(TypeError, match="int"):
        cartesian({"w": 1})
    for y in ({"v": draw(3)}, [draw(3)], draw(3), {"w": draw(3), "v": draw(3)}):
        with pytest.raises(ValueError, match="same structure"):
            cartesian({"w": simplex})(y)


# --- intersections ----------------------------------------------------------------------------------------------------


def test_dykstra_finds_the_simplex() -> None:
    for seed in range(5):
        y = draw(6, seed=seed)
        assert torch.allclose(simplex_as_intersection(y, ONE), simplex(y, ONE), atol=1e-10)


def test_dykstra_equals_cvxpy_on_curved_sets_and_reports_honestly() -> None:
    z = cp.Variable(4)
    sets = [cp.norm(z) <= 1, cp.norm(z - CENTRE.numpy()) <= 0.9]
    cp.Problem(cp.Minimize(cp.sum_squares(z - RIM.numpy())), sets).solve(solver="CLARABEL")
    found = lens(RIM, ONE)
    assert np.abs(found.numpy() - z.value).max() < 1e-5  # the solver's gap
    assert torch.allclose(found.norm(), ONE) and torch.allclose((found - CENTRE).norm(), 0.9 * ONE)  # on the rim
    run = Dykstra((l2_ball, lambda y: CENTRE + l2_ball(y - CENTRE, 0.9)))
    point, info = run.solve(RIM)
    assert info.converged and info.residual_norm <= 1e-12 * RIM.norm() and info.num_iter > 1
    assert torch.allclose(point, found, atol=1e-10)
    few, info = Dykstra(run.projections, max_iter=3).solve(RIM)
    assert not info.converged and info.num_iter == 3 and info.residual_norm > 1e-6
    assert not torch.allclose(few, found, atol=1e-6)


def test_nearest_correlation_matrix_of_higham() -> None:
    y = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.float64)
    z = Dykstra((psd_cone, lambda m: m - torch.diag_embed(m.diagonal() - 1)))(y)
    want = torch.tensor([[1, 0.7607, 0.1573], [0.7607, 1, 0.7607], [0.1573, 0.7607, 1]], dtype=torch.float64)
    assert (z - want).abs().max() < 5e-5  # printed to four digits: Higham (2002), section 4


@every_problem
def test_derivatives_in_point_and_radius_of_both_orders(project, y: Tensor, radius: Tensor) -> None:
    arguments = (y.clone().requires_grad_(), radius.clone().requires_grad_())
    assert gradcheck(project, arguments, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(project, arguments, fast_mode=True)


@every_problem
def test_transforms_agree(project, y: Tensor, radius: Tensor) -> None:
    value = lambda y, radius: project(y, radius).sin().sum()
    forward = torch.func.hessian(value, (0, 1))(y, radius)
    reverse = torch.func.jacrev(torch.func.jacrev(value, (0, 1)), (0, 1))(y, radius)
    for one, other in zip(forward, reverse, strict=True):
        assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(one, other, strict=True))
    points, radii = torch.stack([y, y * 1.1]), torch.stack([radius, radius * 1.05])
    want = torch.stack([torch.func.grad(value)(*pair) for pair in zip(points, radii, strict=True)])
    assert torch.allclose(torch.func.vmap(torch.func.grad(value))(points, radii), want, atol=1e-8)
    want = torch.stack([project(y, radius) for radius in radii])
    assert torch.allclose(torch.func.vmap(project, (None, 0))(y, radii), want, atol=1e-12)


def test_implicit_derivative_equals_unrolled() -> None:
    def unrolled(y: Tensor, radius: Tensor) -> Tensor:
        z, increments = y, [torch.zeros_like(y)] * 2
        for _ in range(400):
            for i, centre, size in ((0, 0 * CENTRE, radius), (1, CENTRE, 0.9 * radius)):
                point = z + increments[i]
                z = centre + l2_ball(point - centre, size)
                increments[i] = point - z
        return z

    for got, want in zip(
        torch.func.jacrev(lens, (0, 1))(RIM, ONE), torch.func.jacrev(unrolled, (0, 1))(RIM, ONE), strict=True
    ):
        assert torch.allclose(got, want, atol=1e-8)


def test_trees_are_kept_and_errors_are_loud() -> None:
    y = {"a": draw(2), "b": draw(3, seed=1)}
    z = Dykstra((non_negative, l2_ball))(y)
    assert z["a"].shape == (2,) and all((part >= 0).all() for part in z.values())
    apart = Dykstra((lambda y: 0 * y, lambda y: 0 * y + 1), max_iter=20)
    with pytest.raises(RuntimeError, match="no point in common"):
        apart(draw(3))
    with pytest.raises(ValueError, match="two or more"):
        Dykstra((non_negative,))
    with pytest.raises(TypeError, match="functions"):
        Dykstra((non_negative, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tol"):
        Dykstra((non_negative, l2_ball), tol=0.0)
    with pytest.raises(FloatingPointError, match="NaN"):
        Dykstra((non_negative, lambda y: y / 0))(draw(3))
