"""What is special to one proximal operator: spectra, blocks of a signal, free coordinates."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicitgrad import prox
from implicitgrad.prox.total_variation import taut_string
from tests.prox.test_prox import draw

seeds = st.integers(0, 10**6)
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_one_penalty_per_coordinate_leaves_an_unpenalised_coordinate_alone() -> None:
    y, penalty = torch.tensor([0.0, 0.3, -0.3]), torch.tensor([0.0, 0.0, 1.0])
    assert torch.equal(prox.l1(y, penalty), torch.tensor([0.0, 0.3, 0.0]))
    assert torch.equal(torch.func.jacrev(prox.l1)(y, penalty), torch.diag(torch.tensor([1.0, 1.0, 0.0])))


def test_log_barrier_solves_its_equation_without_cancellation() -> None:
    y = torch.tensor([-1e8, -1.0, 0.0, 1.0, 1e8])
    z = prox.log_barrier(y, 0.25, 2.0)
    assert ((y - z + 0.5 / z) / (y.abs() + z)).abs().max() < 1e-15 and bool((z > 0).all())
    assert (z[0] * 1e8 - 0.5).abs() < 1e-12  # 0.5 / |y| as y goes to minus infinity
    # z' = z² / (z² + t)
    slopes = torch.func.jacrev(lambda y: prox.log_barrier(y, 0.25, 2.0))(y[1:4]).diag()
    assert (slopes - z[1:4] ** 2 / (z[1:4] ** 2 + 0.5)).abs().max() < 1e-15


SPECTRA = {"repeated": [2.0, 2.0, 2.0], "zero": [2.0, 0.0, 0.0], "mixed": [3.0, 0.5, 0.5], "none left": [0.5, 0.5, 0.0]}


@pytest.mark.parametrize("singular", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("wide", [False, True])
def test_nuclear_norm_is_differentiable_at_repeated_and_zero_singular_values(singular: list, wide: bool) -> None:
    left, right = torch.linalg.qr(draw(4, 3, seed=0))[0], torch.linalg.qr(draw(3, 3, seed=1))[0]
    y = left * torch.tensor(singular) @ right.mT
    y = (y.mT if wide else y).clone().requires_grad_()
    t = torch.tensor(1.0, requires_grad=True)
    want = left * (torch.tensor(singular) - 1).clamp(min=0) @ right.mT
    assert (prox.nuclear_norm(y, t) - (want.mT if wide else want)).abs().max() < 1e-14
    assert torch.autograd.gradcheck(prox.nuclear_norm, (y, t), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(prox.nuclear_norm, (y, t), check_fwd_over_rev=True)


@few
@given(seed=seeds, size=st.integers(1, 12))
def test_total_variation_derivative_averages_over_blocks(seed: int, size: int) -> None:
    y, penalty = draw(size, seed=seed), draw(1, seed=seed + 1).abs()[0]
    z = prox.total_variation(y, penalty)
    same = (z.unsqueeze(0) == z.unsqueeze(1)).to(y.dtype)  # numbers of a block are equal to the bit
    rows = torch.func.jacrev(prox.total_variation)(y, penalty)
    assert (rows - same / same.sum(0)).abs().max() < 1e-15


@few
@given(y=st.lists(st.integers(-2, 2), min_size=2, max_size=10), weight=st.integers(0, 3))
def test_total_variation_with_ties_satisfies_its_dual(y: list[int], weight: int) -> None:
    """With `u` the running sums of `z - y`: `|u| ≤ t`, and `u = t sign` where z jumps."""
    signal, t = torch.tensor(y, dtype=torch.float64), weight / 2
    z = prox.total_variation(signal, t)
    u = (z - signal).cumsum(0)
    assert u[-1].abs() < 1e-13 and bool((u[:-1].abs() <= t + 1e-13).all())
    jump = z.diff()
    # blocks that only touch may differ by a rounding
    assert bool(((u[:-1] - t * jump.sign()).abs() < 1e-13)[jump.abs() > 1e-13].all())


def test_total_variation_of_a_long_signal_satisfies_its_dual() -> None:
    steps = torch.repeat_interleave(draw(20, seed=0), 100)
    y, t = steps + 0.3 * draw(2000, seed=1), 2.0 + draw(1999, seed=2).abs()
    z = prox.total_variation(y, t)
    u, jump = (z - y).cumsum(0)[:-1], z.diff()
    assert bool((u.abs() <= t + 1e-11).all()) and 20 < (jump != 0).sum() < 200
    assert ((u - t * jump.sign()) * (jump != 0)).abs().max() < 1e-11
    assert taut_string([1.0], []) == [] and taut_string([0.0, 1.0], [0.1]) == [1.0]
