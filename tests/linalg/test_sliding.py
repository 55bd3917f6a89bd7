"""The inverse over a sliding window of rows, against dense matrices and the inverse of the same rows at rest."""

import io
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from implicitgrad.linalg import LowRankInverse, SlidingWindow, split_rows
from tests.linalg.test_mfac import N, dense, draw, ill_conditioned, reference, relative_error


@dataclass
class Model:
    """What a window should hold, as a list."""

    capacity: int
    rows: list[Tensor]
    oldest: int = 0

    def add(self, g: Tensor) -> int:
        if len(self.rows) < self.capacity:
            self.rows.append(g)
            return len(self.rows) - 1
        index, self.oldest = self.oldest, (self.oldest + 1) % self.capacity
        self.rows[index] = g
        return index


LAYOUTS = [(None, 1, None), (None, 3, None), (3, 1, [3, 3, 1]), ([2, 5], 2, [2, 5])]


@settings(max_examples=40, deadline=None)
@given(
    actions=st.lists(st.sampled_from(["add", "update_apply", "replace", "damping", "apply"]), max_size=14),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_window_equals_static_after_any_sequence(actions: list[str], layout: tuple, seed: int):
    blocks, num_devices, sizes = layout
    n, capacity = 7, 4
    window = SlidingWindow(capacity, n, 0.4, blocks=blocks, devices=["cpu"] * num_devices, storage=torch.float64)
    model, generator = Model(capacity, []), torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    matrix = lambda: dense(torch.stack([torch.zeros(n), *model.rows]), window.damping, 1 / capacity, sizes)
    for action in actions:
        g = random(n)
        if action == "add":
            assert window.add(g) == model.add(g)
        elif action == "update_apply":
            model.add(g)
            torch.testing.assert_close(window.update_apply(g), torch.linalg.solve(matrix(), g), rtol=0, atol=1e-11)
        elif action == "replace" and model.rows:
            i = int(torch.randint(len(model.rows), (), generator=generator))
            window.replace(i, g)
            model.rows[i] = g
        elif action == "damping":
            window.damping = float(random().abs() + 0.1)
        elif action == "apply":
            torch.testing.assert_close(window.apply(g), torch.linalg.solve(matrix(), g), rtol=0, atol=1e-11)
    assert window.num_rows == len(model.rows)
    v = random(3, n)
    torch.testing.assert_close(window.apply(v), torch.linalg.solve(matrix(), v.mT).mT, rtol=0, atol=1e-11)
    if model.rows:
        static = LowRankInverse(split_rows(torch.stack(model.rows), blocks=blocks), window.damping, 1 / capacity)
        torch.testing.assert_close(window.apply(v), static.apply(v), rtol=0, atol=1e-11)
        torch.testing.assert_close(window.inverse().diagonal(), static.diagonal(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("blocks", [None, 4])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_empty_window_is_its_damping(blocks: int | None, storage: torch.dtype):
    window = SlidingWindow(3, N, 0.5, blocks=blocks, storage=storage)
    for v in (torch.ones(N), torch.ones(2, N)):
        for refine in (0, 1):
            assert torch.equal(window.apply(v, refine), 2 * v)
    assert torch.equal(window.inverse().diagonal(), 2 * torch.ones(N))
    assert torch.equal(window.inverse().row(2), 2 * torch.eye(N)[2])
    assert torch.equal(window.inverse().operator() @ torch.ones(N), 0.5 * torch.ones(N))


def test_zero_rows_are_rows():
    window = SlidingWindow(3, N, 0.5)
    for _ in range(4):
        assert torch.equal(window.update_apply(torch.zeros(N)), torch.zeros(N))
    assert torch.equal(window.apply(torch.ones(N)), 2 * torch.ones(N))


def test_rows_added_together_are_factorised_once(monkeypatch: pytest.MonkeyPatch):
    factorised, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: factorised.append(matrix) or cholesky(matrix))
    window = SlidingWindow(5, N, 0.5, storage=torch.float64)
    for g in draw(9, N):
        window.add(g)
    for _ in range(2):
        window.apply(draw(N))
    assert len(factorised) == 1


def test_inverse_of_a_window_that_changed_refuses_to_work():
    window = SlidingWindow(2, N, 0.5, storage=torch.float64)
    window.add(draw(N))
    inverse = window.inverse()
    inverse.diagonal()
    window.damping = 0.7  # rows are the same, so the old inverse is as good as it was
    inverse.apply(draw(N))
    window.add(draw(N))
    uses = [lambda: inverse.apply(draw(N)), inverse.diagonal, lambda: inverse.element(0, 0), lambda: inverse.row(1)]
    for use in [*uses, lambda: inverse.with_damping(0.1), lambda: inverse.product(draw(N))]:
        with pytest.raises(RuntimeError, match="rows have changed"):
            use()


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("blocks", "num_devices"), [(None, 1), (None, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("count", [0, 2, 7])
def test_state_goes_through_a_file_bit_for_bit(storage: torch.dtype, blocks: int | None, num_devices: int, count: int):
    make = lambda damping: SlidingWindow(4, N, damping, blocks=blocks, devices=["cpu"] * num_devices, storage=storage)
    window, later = make(0.37), draw(5, N, seed=9).float()
    for g in draw(count, N).float():
        window.add(g)
    file = io.BytesIO()
    torch.save(window.state_dict(), file)
    file.seek(0)
    other = make(1.0)
    other.add(later[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.num_rows, other.damping) == (window.num_rows, 0.37)
    for g in later:
        assert torch.equal(other.apply(g), window.apply(g))
        assert torch.equal(other.update_apply(g), window.update_apply(g))


def test_loaded_state_is_a_copy():
    window, other = SlidingWindow(2, N, 0.5), SlidingWindow(2, N, 0.5)
    window.add(torch.ones(N))
    other.load_state_dict(window.state_dict())
    before = other.apply(torch.ones(N))
    window.replace(0, 5 * torch.ones(N))
    assert torch.equal(other.apply(torch.ones(N)), before)


@pytest.mark.parametrize("change", [{"capacity": 3}, {"size": N + 1}, {"blocks": 4}, {"storage": torch.bfloat16}])
def test_state_of_another_window_is_refused(change: dict):
    window, other = SlidingWindow(2, N, 0.5), SlidingWindow(**{"capacity": 2, "size": N, "damping": 0.5, **change})
    with pytest.raises(ValueError, match="same capacity, size, blocks, storage"):
        other.load_state_dict(window.state_dict())


@pytest.mark.parametrize("decades", [0.0, 1.5])
def test_newest_row_is_accurate_in_float32(decades: float):
    """1e-6 is demanded for rows of one size. Over 1.5 decades of singular values the sum itself cancels 30-fold."""
    rows = ill_conditioned(decades)
    window = SlidingWindow(96, 3000, 1e-6)
    for g in rows[:-1]:
        window.add(g)
    wanted = reference(rows, 1e-6, 1 / 96, rows[-1])
    assert relative_error(window.update_apply(rows[-1]), wanted) <= (1e-6 if decades == 0 else 3e-5)
    assert relative_error(window.apply_row(95, refine=1), wanted) <= 2e-7
    assert relative_error(window.apply(rows[-1]), wanted) > 1e-4  # what the span formula is there for


def test_window_refuses_what_does_not_fit():
    for arguments in ((0, N), (2, 0)):
        with pytest.raises(ValueError, match="at least 1; got 0"):
            SlidingWindow(*arguments, 1.0)
    window = SlidingWindow(2, N, 1.0)
    for g in (torch.ones(N + 1), torch.ones(1, N), torch.ones(N, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"a row must be \(11,\) in torch.float32"):
            window.add(g)
    window.add(torch.ones(N))
    for i in (-1, 1):
        with pytest.raises(ValueError, match=f"one of the 1 rows held; got {i}"):
            window.replace(i, torch.ones(N))
        with pytest.raises(ValueError, match=f"one of the 1 rows held; got {i}"):
            window.apply_row(i)
