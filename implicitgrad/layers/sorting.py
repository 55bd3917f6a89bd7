"""Isotonic regression, and sorting and ranking made soft by a projection onto the permutahedron.

All act on the last dimension; those before are a batch.
"""

import torch
from torch import Tensor, nn

from implicitgrad.below import computed
from implicitgrad.projections import checks


def isotonic_regression(y: Tensor, weights: Tensor | None = None, *, increasing: bool = True) -> Tensor:
    """The nearest monotone sequence: `argmin Σ weightsᵢ (zᵢ - yᵢ)²` over `z₁ <= z₂ <= ... <= zₙ`.

    Exact, by pooling adjacent violators: z is constant on blocks and equal to the weighted mean of y there. So the
    derivative is that of block means, at O(n) per product; there is none where two blocks touch, and then the finer
    partition is taken. The pooling runs on the CPU in O(n) steps per sequence.

    Args:
        y: `(*batch, n)`.
        weights: Positive, of a shape that broadcasts to that of y; ones by default. Differentiable.
        increasing: False for a decreasing sequence.

    Raises:
        ValueError: a weight is not positive; shapes do not fit; n is zero.
        TypeError: y is no floating point tensor.
        FloatingPointError: NaN or infinity in y or weights. Inside `torch.func` transforms, where values cannot be
            read, a wrong value gives NaN.

    Source: Ayer, Brunk, Ewing, Reid, Silverman (1955); Best and Chakravarti (1990) for the linear cost.

    Example:
        >>> isotonic_regression(torch.tensor([1.0, 3.0, 2.0, 4.0]))
        tensor([1.0000, 2.5000, 2.5000, 4.0000])
    """
    _check_rows("isotonic_regression", y)
    weights = torch.ones_like(y) if weights is None else _broadcast("isotonic_regression", "weights", weights, y)
    positive = checks.Claim((weights > 0).all(), lambda: f"isotonic_regression needs weights > 0, got {weights.min()}")
    y = checks.checked("isotonic_regression", y, {"weights": weights}, [positive])
    sign = 1 if increasing else -1
    (blocks,) = computed(_pooled, sign * y, weights)
    return _block_means(y, blocks, weights)


def permutahedron(y: Tensor, w: Tensor) -> Tensor:
    """The nearest point of the permutahedron of w, the convex hull of all permutations of its entries.

    An isotonic regression of sorted y minus sorted w. Piecewise linear; costs O(n log n), and O(n) per derivative
    product.

    Args:
        y: `(*batch, n)`.
        w: `(*batch, n)`, or a shape that broadcasts to that.

    Raises:
        ValueError: shapes do not fit, n is zero.
        TypeError: y is no floating point tensor.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, NaN.

    Source: Blondel, Teboul, Berthet, Djolonga (2020), "Fast differentiable sorting and ranking", proposition 3; Lim and
    Wright (2016). Departure: means of y and w over blocks are taken separately, so that a block of one entry is exact.

    Example:
        >>> permutahedron(torch.tensor([10.0, 0.1, 0.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([3.0000, 1.5500, 1.4500])
    """
    _check_rows("permutahedron", y)
    w = _broadcast("permutahedron", "w", w, y)
    y = checks.checked("permutahedron", y, {"w": w})
    ordered, order = y.sort(dim=-1, descending=True, stable=True)
    target = w.sort(dim=-1, descending=True, stable=True).values
    ones = torch.ones_like(y)
    (blocks,) = computed(_pooled, target - ordered, ones)
    # within a block y keeps its spread and takes over the mean of w
    point = ordered - _block_means(ordered, blocks, ones) + _block_means(target, blocks, ones)
    return point.gather(-1, order.argsort(-1))


def soft_rank(y: Tensor, strength: float | Tensor = 1.0, *, descending: bool = False) -> Tensor:
    """Ranks from 1 to n, made differentiable: the projection of `y / strength` onto the permutahedron of 1, ..., n.

    Equal to the ranks for a strength up to the smallest gap between entries of y; the ranks all tend to their mean
    (n + 1) / 2 as the strength grows.

    Args:
        y: `(*batch, n)`.
        strength: Of the regularisation, positive; in units of y. Differentiable.
        descending: Whether the largest entry has rank 1, not the smallest.

    Raises:
        ValueError: the strength is not positive; n is zero.
        TypeError: y is no floating point tensor.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, NaN.

    Source: Blondel et al. (2020), equation 10, quadratic regularisation.

    Example:
        >>> soft_rank(torch.tensor([2.9, 0.1, 1.2]), strength=0.1)
        tensor([3., 1., 2.])
    """
    _check_rows("soft_rank", y)
    strength = _checked_strength("soft_rank", strength, y)
    ranks = torch.arange(1, y.shape[-1] + 1, device=y.device).to(y.dtype)
    return permutahedron((-y if descending else y) / strength, ranks)


def soft_sort(y: Tensor, strength: float | Tensor = 1.0, *, descending: bool = False) -> Tensor:
    """Sorted entries, made smooth: the projection of `(1, ..., n) / strength` onto the permutahedron of y.

    Equal to the sorted entries for a strength up to the inverse of the largest gap between neighbours; all entries tend
    to the mean of y as the strength grows.

    Args:
        y: `(*batch, n)`.
        strength: Of the regularisation, positive; in units of 1/y. Differentiable.
        descending: Whether the largest entry comes first.

    Raises:
        ValueError, TypeError, FloatingPointError: as `soft_rank`.

    Source: Blondel et al. (2020), equation 9, quadratic regularisation.

    Example:
        >>> soft_sort(torch.tensor([2.9, 0.1, 1.2]), strength=0.1)
        tensor([0.1000, 1.2000, 2.9000])
    """
    _check_rows("soft_sort", y)
    strength = _checked_strength("soft_sort", strength, y)
    ranks = torch.arange(1, y.shape[-1] + 1, device=y.device).to(y.dtype)
    sign = -1 if descending else 1
    return sign * permutahedron((ranks / strength).expand_as(y), sign * y)


class SoftRank(nn.Module):
    """`soft_rank` as a layer.

    Example:
        >>> SoftRank(strength=0.1)(torch.tensor([2.9, 0.1, 1.2]))
        tensor([3., 1., 2.])
    """

    def __init__(self, strength: float = 1.0, *, descending: bool = False) -> None:
        super().__init__()
        self.strength = strength
        self.descending = descending

    def forward(self, y: Tensor) -> Tensor:
        return soft_rank(y, self.strength, descending=self.descending)


class SoftSort(nn.Module):
    """`soft_sort` as a layer.

    Example:
        >>> SoftSort(strength=0.1)(torch.tensor([2.9, 0.1, 1.2]))
        tensor([0.1000, 1.2000, 2.9000])
    """

    def __init__(self, strength: float = 1.0, *, descending: bool = False) -> None:
        super().__init__()
        self.strength = strength
        self.descending = descending

    def forward(self, y: Tensor) -> Tensor:
        return soft_sort(y, self.strength, descending=self.descending)


def _pooled(y: Tensor, weights: Tensor) -> tuple[Tensor]:
    """For each entry the number of its block in the increasing regression, `(*batch, n)`."""
    rows = zip(y.reshape(-1, y.shape[-1]).tolist(), weights.reshape(-1, y.shape[-1]).tolist(), strict=True)
    blocks = torch.tensor([_pool(*row) for row in rows], dtype=torch.long)
    return (blocks.reshape(y.shape).to(y.device),)


def _pool(y: list[float], weights: list[float]) -> list[int]:
    means: list[float] = []
    masses: list[float] = []
    sizes: list[int] = []
    for mean, mass in zip(y, weights, strict=True):
        size = 1
        while means and means[-1] > mean:
            before = masses.pop()
            mean = (before * means.pop() + mass * mean) / (before + mass)
            mass += before
            size += sizes.pop()
        means.append(mean)
        masses.append(mass)
        sizes.append(size)
    return [block for block, size in enumerate(sizes) for _ in range(size)]


def _block_means(y: Tensor, blocks: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of y over the block of each entry; exactly y in a block of one."""
    last = _sums(torch.ones_like(y), blocks).cumsum(-1).gather(-1, blocks) - 1  # place of the last entry of a block
    base = y.gather(-1, last.long()).detach()  # means of differences to one entry: no cancellation
    excess = _sums(weights * (y - base), blocks) / _sums(weights, blocks).masked_fill(_empty(blocks), 1)
    return base + excess.gather(-1, blocks)


def _sums(y: Tensor, blocks: Tensor) -> Tensor:
    return torch.zeros_like(y).scatter_add(-1, blocks, y)


def _empty(blocks: Tensor) -> Tensor:
    return torch.arange(blocks.shape[-1], device=blocks.device) > blocks.amax(-1, keepdim=True)


def _check_rows(name: str, y: Tensor) -> None:
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise TypeError(f"{name} needs a floating point tensor, got {y.dtype if isinstance(y, Tensor) else type(y)}")
    if y.dim() < 1 or y.shape[-1] == 0:
        raise ValueError(f"{name} needs a tensor (*batch, n) with n >= 1, got shape {tuple(y.shape)}")


def _broadcast(name: str, field: str, value: Tensor, y: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} needs a tensor as {field}, got {type(value).__name__}")
    if value.dim() > y.dim() or any(a not in (1, b) for a, b in zip(value.shape[::-1], y.shape[::-1], strict=False)):
        raise ValueError(f"{name} needs {field} like y, got shape {tuple(value.shape)} where y has {tuple(y.shape)}")
    return value.to(y).expand_as(y)


def _checked_strength(name: str, strength: float | Tensor, y: Tensor) -> Tensor:
    value = checks.number(name, "strength", strength, y)
    claim = checks.Claim(value > 0, lambda: f"{name} needs strength > 0, got {value.item()}")
    return checks.checked(name, value, {}, [claim])
