"""Isotonic regression against scikit-learn; soft sorting and ranking against CVXPY, limits and finite differences."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from torch.autograd import gradcheck

from implicitgrad.layers import SoftRank, SoftSort, isotonic_regression, permutahedron, soft_rank, soft_sort


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


seeds, sizes = st.integers(0, 10**6), st.integers(1, 12)


@settings(max_examples=40, deadline=None)
@given(n=sizes, seed=seeds, increasing=st.booleans(), tied=st.booleans())
def test_isotonic_regression_equals_scikit_learn(n: int, seed: int, increasing: bool, tied: bool) -> None:
    y, weights = 3 * draw(2, n, seed=seed), draw(2, n, seed=seed + 1).exp()
    y = y.round() if tied else y
    model = IsotonicRegression(increasing=increasing)
    got = isotonic_regression(y, weights, increasing=increasing)
    for row, weight, mine in zip(y, weights, got, strict=True):
        want = model.fit_transform(np.arange(n), row.numpy(), sample_weight=weight.numpy())
        assert np.abs(mine.numpy() - want).max() < 1e-13 * (1 + np.abs(want).max())
    assert torch.equal(isotonic_regression(y[0]), isotonic_regression(y)[0])


def test_an_outlier_at_the_end_pools_everything() -> None:
    y = torch.arange(20_000, dtype=torch.float64)
    y[-1] = -1e9  # pools everything, one entry after the other
    assert torch.allclose(isotonic_regression(y), y.mean().expand_as(y))


def test_permutahedron_equals_cvxpy() -> None:
    for seed in range(3):
        y, w = draw(5, seed=seed), draw(5, seed=seed + 5)
        # the hull of all permutations of w: doubly stochastic matrices times w
        mix = cp.Variable((5, 5), nonneg=True)
        sums = [cp.sum(mix, 0) == 1, cp.sum(mix, 1) == 1]
        cp.Problem(cp.Minimize(cp.sum_squares(mix @ w.numpy() - y.numpy())), sums).solve(solver="CLARABEL")
        assert np.abs(permutahedron(y, w).numpy() - mix.value @ w.numpy()).max() < 1e-4  # a gap of 1e-8, squared


@settings(max_examples=40, deadline=None)
@given(n=sizes, seed=seeds, strength=st.sampled_from([1e-9, 0.1, 1.0, 30.0]))
def test_soft_operators_keep_sums_and_order(n: int, seed: int, strength: float) -> None:
    y = draw(3, n, seed=seed)
    ranks, values = soft_rank(y, strength), soft_sort(y, strength)
    assert torch.allclose(ranks.sum(-1), torch.full((3,), n * (n + 1) / 2, dtype=torch.float64))
    assert torch.allclose(values.sum(-1), y.sum(-1))
    assert (values.diff(dim=-1) >= -1e-12 / strength).all()
    assert (ranks.gather(-1, y.argsort(-1)).diff(dim=-1) >= -1e-12 / strength).all()
    down = soft_rank(y, strength, descending=True), soft_sort(y, strength, descending=True)
    assert torch.allclose(down[0], n + 1 - ranks) and torch.allclose(down[1], values.flip(-1), atol=1e-12)


def test_soft_operators_tend_to_hard_ones_and_to_means() -> None:
    y = draw(4, 9)
    hard = y.argsort(-1).argsort(-1) + 1
    assert torch.equal(soft_rank(y, 1e-9), hard.double())
    assert torch.equal(soft_sort(y, 1e-9), y.sort(-1).values)
    assert torch.allclose(soft_rank(y, 1e9), torch.full_like(y, 5.0))
    assert torch.allclose(soft_sort(y, 1e9), y.mean(-1, keepdim=True).expand_as(y))
    assert torch.equal(SoftRank(0.3)(y), soft_rank(y, 0.3))
    assert torch.equal(SoftSort(0.3, descending=True)(y), soft_sort(y, 0.3, descending=True))


def test_derivatives_in_every_argument() -> None:
    y, w = draw(2, 7).requires_grad_(), draw(2, 7, seed=1).exp().requires_grad_()
    strength = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    for fn, arguments in (
        (isotonic_regression, (y, w)),
        (lambda y: isotonic_regression(y, increasing=False), (y,)),
        (permutahedron, (y, w)),
        (soft_rank, (y, strength)),
        (soft_sort, (y, strength)),
    ):
        assert gradcheck(fn, arguments, **modes)


@pytest.mark.parametrize("fn", [isotonic_regression, soft_rank, soft_sort])
def test_vmap_and_dtypes(fn) -> None:
    y = draw(3, 6)
    assert torch.equal(torch.func.vmap(fn)(y), fn(y))
    jacobians = torch.func.vmap(torch.func.jacrev(fn))(y)
    assert torch.allclose(jacobians, torch.func.vmap(torch.func.jacfwd(fn))(y))
    assert torch.allclose(jacobians, torch.stack([torch.autograd.functional.jacobian(fn, row) for row in y]))
    assert fn(y.float()).dtype == torch.float32 and torch.allclose(fn(y.float()).double(), fn(y), atol=1e-5)
    assert fn(y[:0]).shape == (0, 6)


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        isotonic_regression(torch.ones(2, 0))
    with pytest.raises(TypeError, match="floating"):
        soft_sort(torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="weights > 0"):
        isotonic_regression(torch.ones(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="shape"):
        permutahedron(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="strength > 0"):
        soft_rank(torch.ones(3), 0.0)
    with pytest.raises(FloatingPointError, match="NaN"):
        soft_sort(torch.tensor([1.0, torch.nan]))
