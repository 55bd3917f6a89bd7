"""A classification data set cut into train, validation and test parts, standardised on the train part only."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor


class Part(NamedTuple):
    """One part of a data set: features `X: (n, d)` in float64 and class labels `t: (n,)` in int64."""

    X: Tensor
    t: Tensor


@dataclass(frozen=True)
class Dataset:
    """Three disjoint parts with the same class proportions."""

    name: str
    num_classes: int
    train: Part
    validation: Part
    test: Part

    @property
    def num_features(self) -> int:
        return self.train.X.shape[1]

    def __str__(self) -> str:
        sizes = f"{len(self.train.t)} train / {len(self.validation.t)} validation / {len(self.test.t)} test"
        return f"{self.name}: {self.num_features} features, {self.num_classes} classes, rows {sizes}"


def split(
    source: tuple[np.ndarray, np.ndarray], name: str, validation_fraction: float, test_fraction: float, seed: int
) -> Dataset:
    """Three stratified parts of `source`, shifted and scaled to mean 0 and standard deviation 1 on the train part.

    Args:
        source: features `(n, d)` and labels `(n,)` counted from 0, as scikit-learn's loaders return them.
        name: what the figure calls the data.
        validation_fraction: share of all rows, no unit.
        test_fraction: share of all rows, no unit.
        seed: decides which row goes where.
    """
    X, t = source
    rest, test = train_test_split(np.arange(len(t)), test_size=test_fraction, random_state=seed, stratify=t)
    train, validation = train_test_split(
        rest, test_size=validation_fraction / (1 - test_fraction), random_state=seed, stratify=t[rest]
    )

    mean, scale = X[train].mean(0), X[train].std(0)
    scale[scale == 0] = 1.0  # a pixel that never changes on the train part: 0 / 0 would be NaN

    def part(rows: np.ndarray | list[int]) -> Part:
        standardised = torch.as_tensor((X[rows] - mean) / scale, dtype=torch.float64)
        return Part(standardised, torch.as_tensor(t[rows], dtype=torch.int64))

    return Dataset(name, int(t.max()) + 1, part(train), part(validation), part(test))
