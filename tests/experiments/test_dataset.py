"""The three parts: disjoint, stratified, and standardised without a look at validation or test."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits

from experiments.dataset import Dataset, split


def _split(source: tuple[np.ndarray, np.ndarray], seed: int = 0) -> Dataset:
    return split(source, "name", validation_fraction=0.25, test_fraction=0.25, seed=seed)


@pytest.fixture
def source() -> tuple[np.ndarray, np.ndarray]:
    return load_breast_cancer(return_X_y=True)


def test_train_part_has_mean_zero_and_deviation_one(source: tuple[np.ndarray, np.ndarray]) -> None:
    X = _split(source).train.X
    assert X.dtype == torch.float64
    assert X.mean(0).abs().max() < 1e-12
    assert (X.std(0, correction=0) - 1).abs().max() < 1e-12


def test_standardisation_ignores_validation_and_test(source: tuple[np.ndarray, np.ndarray]) -> None:
    X, t = source
    marked = np.column_stack([X, np.arange(len(t))])  # the last column tells each row's number
    before = _split((marked, t))
    order = np.arange(len(t))
    mean, scale = _mean_and_scale_of_last_column(before, order)
    held_out = torch.cat([before.validation.X, before.test.X])[:, -1] * scale + mean
    shifted = marked.copy()
    shifted[held_out.round().int().numpy(), :-1] += 1000.0
    after = _split((shifted, t))
    assert torch.equal(before.train.X, after.train.X)
    assert not torch.equal(before.validation.X, after.validation.X)


def _mean_and_scale_of_last_column(dataset: Dataset, column: np.ndarray) -> tuple[float, float]:
    """The two numbers that map standardised row numbers, all of them together, back to `column`."""
    values = torch.cat([part.X[:, -1] for part in (dataset.train, dataset.validation, dataset.test)]).numpy()
    scale = (column[-1] - column[0]) / (values.max() - values.min())
    return column[0] - values.min() * scale, scale


def test_parts_share_class_proportions_and_leave_no_row_out(source: tuple[np.ndarray, np.ndarray]) -> None:
    dataset = _split(source)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert sum(len(part.t) for part in parts) == len(source[1])
    assert all(abs(part.t.double().mean().item() - source[1].mean()) < 0.01 for part in parts)


def test_same_seed_gives_same_parts_and_another_seed_others(source: tuple[np.ndarray, np.ndarray]) -> None:
    assert torch.equal(_split(source, seed=3).test.X, _split(source, seed=3).test.X)
    assert not torch.equal(_split(source, seed=3).test.X, _split(source, seed=4).test.X)


def test_pixels_constant_on_train_stay_finite() -> None:
    dataset = _split(load_digits(return_X_y=True))
    assert (dataset.train.X == 0).all(0).any()
    assert all(part.X.isfinite().all() for part in (dataset.train, dataset.validation, dataset.test))
