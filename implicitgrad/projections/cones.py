"""Projections onto the cones of conic programs.

A cone lies in the last dimension of a tensor, many cones of one kind in those before. The cone of positive semidefinite
matrices is `psd_cone`, for matrices; `packed_psd_cone` takes it as a vector. By Moreau's theorem the projection onto
the dual cone is `y + projection(-y)`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from implicitgrad.below import computed
from implicitgrad.linalg.rows import any_row, check_every
from implicitgrad.projections import checks
from implicitgrad.projections.matrix_sets import psd_cone


def zero_cone(y: Tensor) -> Tensor:
    """The nearest point of `{0}`: zeros. Its dual is the whole space.

    Raises:
        TypeError, FloatingPointError: as `second_order_cone`.

    Example:
        >>> zero_cone(torch.tensor([1.0, -2.0]))
        tensor([0., 0.])
    """
    _check_cone("zero_cone", y)
    y = checks.checked("zero_cone", y, {})
    return y - y


def dual_cone(projection: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The projection onto the dual `{z : <z, w> >= 0 for all w in K}` of a closed convex cone K.

    Args:
        projection: Projection onto K.

    Source: Moreau (1962): y is the sum of its projections onto K and onto the polar cone, which is minus the dual.

    Example:
        >>> dual_cone(zero_cone)(torch.tensor([1.0, -2.0]))
        tensor([ 1., -2.])
    """
    return lambda y: y + projection(-y)


def second_order_cone(y: Tensor) -> Tensor:
    r"""The nearest point of the cone `{(t, z) : ‖z‖ <= t}`; its own dual.

    The point itself inside, zero for `‖z‖ <= -t`, and else `½ (1 + t/‖z‖) (‖z‖, z)`. Smooth off the two boundaries
    `‖z‖ = ±t`, where the derivative is that of the first or second case. Costs O(n), derivative products too.

    Args:
        y: `(*batch, 1 + n)`, t first.

    Raises:
        ValueError: no last dimension, or an empty one.
        TypeError: no floating point tensor.
        FloatingPointError: NaN or infinity in y. Inside `torch.func` transforms, where values cannot be read, NaN.

    Source: Boyd and Parikh (2013), "Proximal algorithms", section 6.3.2.

    Example:
        >>> second_order_cone(torch.tensor([0.0, 3.0, 4.0]))
        tensor([2.5000, 1.5000, 2.0000])
    """
    _check_cone("second_order_cone", y)
    y = checks.checked("second_order_cone", y, {})
    t, z = y[..., :1], y[..., 1:]
    largest = z.detach().abs().amax(-1, keepdim=True) if z.shape[-1] else torch.zeros_like(t)
    size = torch.where(largest > 0, largest, 1)  # so that no square overflows
    norm = (z / size).square().sum(-1, keepdim=True)
    norm = size * torch.where(largest > 0, norm, 1).sqrt() * (largest > 0)
    inside, polar = norm <= t, norm <= -t
    divisor = torch.where(inside | polar, 1, norm)  # zero inside or in the polar cone only
    height = (t + norm) / 2
    middle = torch.cat([height, height / divisor * z], -1)
    return torch.where(inside, y, torch.where(polar, torch.zeros_like(y), middle))


def packed_psd_cone(y: Tensor) -> Tensor:
    """`psd_cone` for symmetric matrices as vectors: the lower triangle, column by column, off-diagonal times √2.

    So scaled, inner products of vectors are those of matrices, and the nearest vector is that of the nearest matrix.
    This is the layout of SCS.

    Args:
        y: `(*batch, n (n + 1) / 2)`.

    Raises:
        ValueError: the last dimension is no such number.
        TypeError, FloatingPointError, NotImplementedError: as `psd_cone`.

    Example:
        >>> packed_psd_cone(torch.tensor([2.0, 0.0, -1.0]))
        tensor([2., 0., 0.])
    """
    _check_cone("packed_psd_cone", y)
    length = y.shape[-1]
    size = (math.isqrt(8 * length + 1) - 1) // 2
    if size * (size + 1) // 2 != length:
        raise ValueError(f"packed_psd_cone needs a last dimension n (n + 1) / 2, got shape {tuple(y.shape)}")
    columns, rows = torch.triu_indices(size, size, device=y.device)
    positions = torch.empty(size, size, dtype=torch.long, device=y.device)
    positions[rows, columns] = positions[columns, rows] = torch.arange(length, device=y.device)
    scale = torch.where(rows == columns, y.new_ones(()), y.new_full((), math.sqrt(2)))
    return psd_cone((y / scale)[..., positions])[..., rows, columns] * scale


def exponential_cone(y: Tensor) -> Tensor:
    r"""The nearest point of the exponential cone, the closure of `{(u, v, w) : v > 0, v exp(u/v) <= w}`.

    The point itself inside, zero in the polar cone, `(min(u, 0), 0, max(w, 0))` where `u, v <= 0`. Elsewhere it is
    `s (ρ, 1, exp ρ)` with the root ρ of a strictly increasing function, found to the last digits by Newton's method
    within a bracket. Two more Newton steps, which torch differentiates, give exact derivatives up to third order. Costs
    some 10 evaluations of the function; O(1) per derivative product.

    Args:
        y: `(*batch, 3)`.

    Raises:
        ValueError: the last dimension is not 3.
        TypeError: no floating point tensor.
        FloatingPointError: NaN or infinity in y. Inside `torch.func` transforms, where values cannot be read, NaN.

    Source: Friberg (2023), "Projection onto the exponential cone: a univariate root-finding problem".
    Departures: the function is divided by `exp |ρ|`, so that nothing overflows; another bracket.

    Example:
        >>> exponential_cone(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
        tensor([0.4263, 0.7517, 1.3254], dtype=torch.float64)
    """
    _check_cone("exponential_cone", y)
    if y.shape[-1] != 3:
        raise ValueError(f"exponential_cone needs a last dimension of 3, got shape {tuple(y.shape)}")
    y = checks.checked("exponential_cone", y, {})
    largest = y.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    point = y / scale
    inside, polar, flat = (case.unsqueeze(-1) for case in _cases(*point.detach().unbind(-1)))
    generic = ~(inside | polar | flat | point.detach().isnan().any(-1, keepdim=True))
    curved = _on_the_curve(torch.where(generic, point, point.new_tensor([1.0, 1.0, 0.0])))
    edge = torch.stack([y[..., 0].clamp(max=0), torch.zeros_like(y[..., 1]), y[..., 2].clamp(min=0)], -1)
    outside = torch.where(polar, torch.zeros_like(y), torch.where(flat, edge, scale * curved))
    return torch.where(inside, y, torch.where(generic | polar | flat, outside, torch.nan))


def _cases(u: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a point of size 1 lies in the cone, in its polar, or has `u, v <= 0` up to rounding."""
    tiny = torch.finfo(u.dtype).eps ** 2
    ratio = lambda over, under: over / torch.where(under > 0, under, 1)
    inside = (v > 0) & (v * ratio(u, v).exp() <= w) | (v == 0) & (u <= 0) & (w >= 0)
    polar = (u > 0) & (u * ratio(v, u).exp() <= -math.e * w) | (u == 0) & (v <= 0) & (w <= 0)
    return inside, polar, (u <= tiny) & (v <= tiny)


def _on_the_curve(point: Tensor) -> Tensor:
    (rho,) = computed(_root, point.detach())
    for _ in range(2):
        gap, slope = _gap(rho, point)
        rho = rho - gap / slope
    _, _, w = point.unbind(-1)
    s, r = _weights(rho, point)
    # the last coordinate is exp(ρ) s = w + exp(-ρ) r; each way is accurate on its side
    steep = rho > 0
    decay = (-rho.abs()).exp()
    last = torch.where(steep, w + decay * r, decay * s)
    middle = torch.where(steep, decay * last, s)
    return torch.stack([rho * middle, middle, last], -1)


def _weights(rho: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """s and r in `point = s (ρ, 1, e^ρ) + r (1, 1 - ρ, -e^-ρ)`, as the first two coordinates give them."""
    u, v, _ = point.unbind(-1)
    divisor = rho * (rho - 1) + 1
    return ((rho - 1) * u + v) / divisor, (u - rho * v) / divisor


def _gap(rho: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """What is missing in the third coordinate, times `exp(-|ρ|)`: increasing through zero; and the slope of that."""
    u, v, w = point.unbind(-1)
    s, r = _weights(rho, point)
    divisor = rho * (rho - 1) + 1
    s_slope, r_slope = (u - s * (2 * rho - 1)) / divisor, -(v + r * (2 * rho - 1)) / divisor
    decay = (-rho.abs()).exp()
    square = decay.square()
    steep = rho > 0
    gap = torch.where(steep, s - square * r - w * decay, square * s - r - w * decay)
    rising = s_slope - square * (r_slope - 2 * r) + w * decay
    falling = square * (s_slope + 2 * s) - r_slope - w * decay
    return gap, torch.where(steep, rising, falling)


def _root(point: Tensor) -> tuple[Tensor]:
    """Zero of `_gap` by Newton's method, with every third step a bisection."""
    u, v, _ = point.unbind(-1)
    reach = 1500  # the exponential function spans less
    lowest = torch.where(u > 0, 1 - v / u, -torch.inf)
    highest = torch.where(v > 0, u / v, torch.inf)
    low = torch.maximum(lowest, highest.clamp(max=0) - reach)
    high = torch.minimum(highest, lowest.clamp(min=0) + reach)
    rho, every = (low + high) / 2, check_every(point)
    for i in range(1, 121):
        gap, slope = _gap(rho, point)
        low, high = torch.where(gap <= 0, rho, low), torch.where(gap >= 0, rho, high)
        step = rho - gap / slope
        middle = (low + high) / 2
        after = torch.where((step > low) & (step < high), step, middle) if i % 3 else middle
        far = (high - low) > 4 * torch.finfo(rho.dtype).eps * rho.abs().clamp(min=1)
        near = (step - rho).abs() <= 2 * torch.finfo(rho.dtype).eps * rho.abs().clamp(min=1)
        rho = torch.where(near, rho, after)
        if i % every == 0 and not any_row(far & ~near):
            break
    return (rho,)


def _check_cone(name: str, y: Tensor) -> None:
    if not isinstance(y, Tensor) or not y.is_floating_point():
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{name} needs a floating point tensor, got {got}")
    if y.dim() < 1 or y.shape[-1] == 0:
        raise ValueError(f"{name} needs a tensor (*batch, n) with n >= 1, got shape {tuple(y.shape)}")
