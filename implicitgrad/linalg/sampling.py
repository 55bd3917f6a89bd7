"""Random vectors for estimators, and means of random quantities with their standard errors."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.matrix import COLUMNS_PER_BLOCK, factor_dtype
from implicitgrad.linalg.operator import LinearOperator

# A block of random vectors holds at most so many numbers, or is one vector.
NUMBERS_PER_BLOCK = 2**22


class Estimate(NamedTuple):
    """A mean of independent samples.

    Attributes:
        value: the mean; unbiased.
        standard_error: one standard deviation of `value`, judged by the spread of the samples; same shape. Zero where
            the value is exact.
        num_matvec: products spent.
    """

    value: Tensor
    standard_error: Tensor
    num_matvec: int


def generator_on(device: torch.device, generator: torch.Generator | None) -> torch.Generator:
    """The caller's generator, or a fresh one with a fixed seed on the device."""
    return torch.Generator(device).manual_seed(0) if generator is None else generator


def draw_gaussian(A: LinearOperator, generator: torch.Generator) -> Tensor:
    """A vector of standard normal numbers for A, float32 or better."""
    draw = torch.randn(A.vector_shape, generator=generator, device=generator.device, dtype=factor_dtype(A.dtype))
    return draw.to(A.device)


def sign_blocks(A: LinearOperator, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`count` vectors of random signs for A in blocks ``(k, *batch_shape, n)`` of bounded memory."""
    rows = rows_at_once(A)
    for first in range(0, count, rows):
        shape = (min(rows, count - first), *A.vector_shape)
        yield torch.randint(2, shape, generator=generator, device=generator.device, dtype=A.dtype).to(A.device) * 2 - 1


def rows_at_once(A: LinearOperator) -> int:
    """So many vectors make a block of bounded memory."""
    return max(1, min(COLUMNS_PER_BLOCK, NUMBERS_PER_BLOCK // math.prod(A.vector_shape)))


class RunningMean:
    """Mean and standard error of samples that are not kept; float32 or better.

    Source: Chan, Golub and LeVeque (1983), the updating formulas (2.1): no cancellation of large squares.
    """

    def __init__(self, example: Tensor):
        self.count = 0
        self.mean = torch.zeros_like(example, dtype=factor_dtype(example.dtype))
        self._spread = torch.zeros_like(self.mean)

    def add(self, samples: Tensor) -> None:
        """Take in ``(k, *example.shape)``."""
        samples = samples.to(self.mean.dtype)
        mean, count = samples.mean(0), self.count + len(samples)
        gap = mean - self.mean
        self._spread += (samples - mean).square().sum(0) + gap.square() * (self.count * len(samples) / count)
        self.mean += gap * (len(samples) / count)
        self.count = count

    @property
    def standard_error(self) -> Tensor:
        """Of the mean; needs two samples."""
        return (self._spread / (self.count * (self.count - 1))).sqrt()
