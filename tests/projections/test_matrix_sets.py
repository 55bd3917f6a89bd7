"""Spectral sets and cones: against CVXPY and optimality conditions, with derivatives where spectra repeat."""

from collections.abc import Callable

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from implicitgrad.projections import (
    dual_cone,
    exponential_cone,
    packed_psd_cone,
    psd_cone,
    second_order_cone,
    stiefel,
    zero_cone,
)

Map = Callable[[Tensor], Tensor]
CONES = {
    "zero": (zero_cone, 4),
    "second order": (second_order_cone, 4),
    "ray": (second_order_cone, 1),
    "psd": (packed_psd_cone, 6),
    "exponential": (exponential_cone, 3),
    "dual of exponential": (dual_cone(exponential_cone), 3),
}
every_cone = pytest.mark.parametrize(("project", "size"), CONES.values(), ids=CONES.keys())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: list[float], rows: int | None = None) -> Tensor:
    left = torch.linalg.qr(draw(rows or len(values), len(values), seed=1)).Q
    right = left if rows is None else torch.linalg.qr(draw(len(values), len(values), seed=2)).Q
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


# --- cones ------------------------------------------------------------------------------------------------------------


@every_cone
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 1.0, 4.0]))
def test_cone_projection_fulfils_moreau_and_does_not_expand(project: Map, size: int, seed: int, spread: float) -> None:
    scale = (spread * draw(50, 1, seed=seed + 1)).exp()
    y, other = scale * draw(50, size, seed=seed), draw(50, size, seed=seed + 2)
    z, there = project(y), project(other)
    length = y.norm(dim=-1)
    assert ((z * (z - y)).sum(-1).abs() <= 1e-12 * length**2).all()
    assert ((project(z) - z).norm(dim=-1) <= 1e-12 * length).all()
    # z - y lies in the dual cone: its inner products with points of the cone are not negative
    assert (((z - y) * there).sum(-1) >= -1e-12 * length * (1 + other.norm(dim=-1))).all()
    assert ((z - there).norm(dim=-1) <= (y - other).norm(dim=-1) * (1 + 1e-12)).all()


def _cvxpy_second_order(z: cp.Variable) -> list:
    return [cp.SOC(z[0], z[1:])]


def _cvxpy_exponential(z: cp.Variable) -> list:
    return [cp.ExpCone(z[0], z[1], z[2])]


@pytest.mark.parametrize(
    ("project", "size", "constrain"),
    [(second_order_cone, 4, _cvxpy_second_order), (exponential_cone, 3, _cvxpy_exponential)],
)
def test_vector_cones_equal_cvxpy(project: Map, size: int, constrain: Callable) -> None:
    for seed in range(6):
        y = draw(size, seed=seed)
        z = cp.Variable(size)
        cp.Problem(cp.Minimize(cp.sum_squares(z - y.numpy())), constrain(z)).solve(solver="CLARABEL")
        # Clarabel stops at a gap of 1e-8 in the squared distance, relative to one
        assert np.abs(project(y).numpy() - z.value).max() < 1e-4


def test_exponential_cone_far_out_meets_its_own_inequality() -> None:
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (40 * torch.rand(20_000, 3, generator=generator, dtype=torch.float64) - 30)
    y = size * draw(20_000, 3).sign()
    y = y / y.abs().amax(-1, keepdim=True)
    u, v, w = (z := exponential_cone(y)).unbind(-1)
    logs = torch.where(v > 0, v * (w.clamp(min=1e-300).log() - v.clamp(min=1e-300).log()), 0)
    assert (u <= logs + 1e-13).all() and (v >= 0).all() and (w >= -1e-15).all()
    assert ((z * (z - y)).sum(-1).abs() < 1e-14).all()
    assert (exponential_cone(y.float()).double() - exponential_cone(y.float().double())).abs().max() < 1e-5


def test_second_order_cone_has_three_regimes() -> None:
    assert torch.equal(second_order_cone(torch.tensor([6.0, 3.0, 4.0])), torch.tensor([6.0, 3.0, 4.0]))
    assert torch.equal(second_order_cone(torch.tensor([-6.0, 3.0, 4.0])), torch.zeros(3))
    huge = torch.tensor([0.0, 3e30, 4e30])  # whose square is infinite in float32
    assert torch.allclose(second_order_cone(huge), torch.tensor([2.5e30, 1.5e30, 2e30]))


@every_cone
def test_derivatives_of_cones_of_both_orders_in_both_modes(project: Map, size: int) -> None:
    for seed in range(4):
        y = draw(size, seed=seed).requires_grad_()
        assert gradcheck(project, y, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(project, y, fast_mode=True)


def test_second_order_cone_on_its_axis_has_no_nan() -> None:
    for y in ([2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]):
        assert gradcheck(second_order_cone, torch.tensor(y, dtype=torch.float64, requires_grad=True))


def test_packed_cone_is_that_of_matrices() -> None:
    y = draw(5, 5)
    y = y + y.T
    rows, columns = np.tril_indices(5)
    order = np.lexsort((rows, columns))  # column by column, as SCS has it
    rows, columns = rows[order], columns[order]
    scale = torch.tensor(np.where(rows == columns, 1.0, np.sqrt(2)))
    got = packed_psd_cone(y[rows, columns] * scale)
    assert torch.allclose(got, psd_cone(y)[rows, columns] * scale, atol=1e-13)


# --- matrices ---------------------------------------------------------------------------------------------------------


def test_psd_cone_equals_cvxpy_and_ignores_the_skew_part() -> None:
    y = draw(4, 4)
    z = cp.Variable((4, 4), PSD=True)
    cp.Problem(cp.Minimize(cp.sum_squares(z - y.numpy()))).solve(solver="CLARABEL")
    assert np.abs(psd_cone(y).numpy() - z.value).max() < 1e-4  # see above
    assert torch.allclose(psd_cone(y), psd_cone((y + y.T) / 2), atol=1e-14)


@pytest.mark.parametrize("values", [[2, 2, 1, -1, -1], [3, 3, 3, 3, 3], [-1, -1, -1, -1, -2], [5, 1, -1, -5, -5]])
def test_psd_cone_is_differentiable_at_repeated_eigenvalues(values: list[float]) -> None:
    y = with_spectrum(values).requires_grad_()
    assert gradcheck(psd_cone, y, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(psd_cone, y, check_fwd_over_rev=True)


def test_psd_derivative_is_accurate_near_the_boundary() -> None:
    y, direction = with_spectrum([1, 1e-10, -1e-10, -2]), draw(4, 4)
    values, vectors = torch.linalg.eigh(y)
    weights = (values.clamp(min=0)[:, None] - values.clamp(min=0)) / (values[:, None] - values)
    weights.diagonal().copy_((values > 0).double())
    symmetric = (direction + direction.T) / 2
    want = vectors @ (weights * (vectors.T @ symmetric @ vectors)) @ vectors.T
    got = torch.func.jvp(psd_cone, (y,), (direction,))[1]
    assert (got - want).abs().max() < 1e-5  # eigenvalues of 1e-10 are known to 1e-16, so their quotients to 1e-6


def test_stiefel_is_the_nearest_of_many_and_orthonormal() -> None:
    for shape in ((5, 3), (3, 5), (4, 4), (1, 1), (2, 5, 3)):
        y = draw(*shape)
        q = stiefel(y)
        tall, point = (q, y) if shape[-2] >= shape[-1] else (q.mT, y.mT)
        eye = torch.eye(tall.shape[-1], dtype=torch.float64).expand(*tall.shape[:-2], -1, -1)
        assert torch.allclose(tall.mT @ tall, eye, atol=1e-14)
        for seed in range(20):
            other = torch.linalg.qr(draw(*tall.shape, seed=seed + 3)).Q
            assert ((other - point).square().sum((-2, -1)) >= (tall - point).square().sum((-2, -1))).all()


@pytest.mark.parametrize(("values", "rows"), [([2, 2, 1], 5), ([2, 2, 2], 3), ([3, 1, 0.5], 3)])
def test_stiefel_is_differentiable_at_repeated_singular_values(values: list[float], rows: int) -> None:
    y = with_spectrum(values, rows).requires_grad_()
    for point in (y, y.detach().T.clone().requires_grad_()):
        assert gradcheck(stiefel, point, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(stiefel, point, check_fwd_over_rev=True)


@pytest.mark.parametrize("project", [psd_cone, stiefel])
def test_batches_vmap_and_modes_agree(project: Map) -> None:
    y = draw(3, 4, 4)
    assert torch.allclose(torch.func.vmap(project)(y), project(y), atol=1e-14)
    assert torch.allclose(project(y)[1], project(y[1]), atol=1e-14)
    value = lambda y: project(y).sin().sum()
    forward, reverse = (
        torch.func.vmap(transform)(y)
        for transform in (torch.func.hessian(value), torch.func.jacrev(torch.func.jacrev(value)))
    )
    assert torch.allclose(forward, reverse, atol=1e-12)
    assert project(y[:0]).shape == (0, 4, 4)
    assert project(y.float()).dtype == torch.float32


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="n, n"):
        psd_cone(torch.ones(2, 3))
    with pytest.raises(ValueError, match="matrix"):
        stiefel(torch.ones(3))
    with pytest.raises(TypeError, match="floating"):
        stiefel(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(FloatingPointError, match="NaN"):
        psd_cone(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="n \\(n \\+ 1\\) / 2"):
        packed_psd_cone(torch.ones(4))
    with pytest.raises(ValueError, match="dimension of 3"):
        exponential_cone(torch.ones(4))
    with pytest.raises(ValueError, match="n >= 1"):
        second_order_cone(torch.ones(2, 0))
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(psd_cone))(torch.eye(2))


def test_nan_under_a_transform_stays_in_its_example() -> None:
    y = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan)])
    for project in (psd_cone, stiefel):
        z = torch.func.vmap(project)(y)
        assert torch.allclose(z[0], torch.eye(3)) and z[1].isnan().all()
    assert torch.func.vmap(exponential_cone)(y[1]).isnan().all()
