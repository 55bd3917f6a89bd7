"""Projections onto sections of a box by a hyperplane, by sorting."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.projections import checks
from implicitgrad.projections.boxes import bound_like, bounds_claim, clip, finite_part
from implicitgrad.tree import Tree


def box_section(
    y: Tree, lower: float | Tree, upper: float | Tree, weights: float | Tree, total: float | Tensor
) -> Tree:
    """The nearest point of the box section `{z : lower <= z <= upper, <weights, z> = total}`.

    `z = clip(y - τ w, lower, upper)` with the number τ for which `<w, z> = total`. As a function of τ, `<w, z>` is
    piecewise linear and does not increase; its 2n kinks are sorted to find the piece that holds the solution. Costs
    `O(n log n)`, and some 20 vectors of memory. Derivatives in all arguments are exact wherever no entry of `y - τ w`
    lies at a bound.

    Args:
        y: Tree of n numbers, one point.
        lower: A number or tensor `()` for all entries; or a tree like y, whose tensors may be smaller and broadcast.
            Minus infinity for no bound.
        upper: Likewise.
        weights: Likewise w, of any signs; an entry of weight zero is clipped and takes no other part.
        total: A number. Where only one corner of the box reaches it, that corner is the result, with derivative zero.

    Raises:
        ValueError: no point of the box reaches the total (a rounding error beyond is allowed), in particular a lower
            bound above its upper bound; weights all zero; shapes or trees that do not fit y; y has no entries.
        TypeError: y is no tree of floating point tensors of one dtype; the total is no number.
        FloatingPointError: NaN or infinity in an argument, except for infinite bounds. Inside `torch.func` transforms,
            where values cannot be read, a wrong argument of this or the first kind gives NaN.

    Source: Kiwiel (2008), "Breakpoint searching algorithms for the continuous quadratic knapsack problem". Departures:
    a sort takes the place of the median search, since it also works under `vmap`; and τ is computed anew from the
    entries found to be inside their bounds, which removes the rounding errors of long sums and carries the derivative.

    Example:
        >>> box_section(torch.tensor([0.9, 0.1, 5.0]), 0.0, 1.0, torch.tensor([1.0, 1.0, 1.0]), 1.5)
        tensor([0.5000, 0.0000, 1.0000])
    """
    flat, unravel = tree.ravel(y)
    low, high = bound_like("box_section", "lower", lower, y), bound_like("box_section", "upper", upper, y)
    w = bound_like("box_section", "weights", weights, y)
    c = checks.number("box_section", "total", total, flat)
    parameters = {"lower": finite_part(low), "upper": finite_part(high), "weights": w, "total": c}
    flat = checks.checked(
        "box_section", flat, parameters, [bounds_claim("box_section", low, high), *_claims(low, high, w, c)]
    )
    multiplier = _multiplier(flat.detach(), low.detach(), high.detach(), w.detach(), c.detach())
    moved = flat.detach() - multiplier * w.detach()
    fixed = (moved < low) | (moved > high)
    bound = torch.where(moved < low, low, high).masked_fill(~fixed, 0)
    free = w.masked_fill(fixed, 0)
    square = free.square().sum()
    exact = (free @ flat + w @ bound - c) / torch.where(square == 0, 1, square)
    exact = torch.where(square == 0, multiplier, exact)
    return unravel(torch.where(fixed, bound, clip(flat - exact * w, low.detach(), high.detach())))


def _claims(lower: Tensor, upper: Tensor, w: Tensor, c: Tensor) -> list[checks.Claim]:
    """There are weights, and the total lies between the smallest and the largest that the box reaches."""
    ends = torch.stack([w * lower, w * upper]).masked_fill(w == 0, 0)
    least, most = ends.amin(0).sum(), ends.amax(0).sum()
    rounding = 10 * torch.finfo(w.dtype).eps * (c.abs() + finite_part(ends).abs().sum())
    return [
        checks.Claim(w.any(), lambda: "box_section needs weights that are not all zero; use box for a box alone"),
        checks.Claim(
            (least - rounding <= c) & (c <= most + rounding),
            lambda: (
                f"box_section needs a total between {least.item()} and {most.item()}, what the box reaches, got "
                f"{c.item()}; the set is empty otherwise"
            ),
        ),
    ]


class _Pieces(NamedTuple):
    """The kinks of `<w, clip(y - τ w)>` in rising order, and `linear - τ square` on the piece after each.

    The first entry stands for minus infinity, where the first piece begins.
    """

    kinks: Tensor
    linear: Tensor
    square: Tensor


def _multiplier(y: Tensor, lower: Tensor, upper: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """τ `()` with `<w, clip(y - τ w)> = c`, up to rounding errors in sums of 2n numbers."""
    kinks, linear, square = _pieces(y, lower, upper, w)
    reached = linear - kinks * square  # <w, z> at each kink
    before = torch.where(kinks.isfinite(), reached >= c, kinks < 0)
    last = before.sum().reshape(1) - 1
    begin, end = kinks.gather(0, last), torch.cat([kinks[1:], kinks.new_full((1,), torch.inf)]).gather(0, last)
    level, slope = linear.gather(0, last), square.gather(0, last)
    inside = (level - c) / torch.where(slope <= 0, 1, slope)
    return torch.minimum(torch.maximum(inside, begin), end).squeeze(0)


def _pieces(y: Tensor, lower: Tensor, upper: Tensor, w: Tensor) -> _Pieces:
    # as τ grows, w z stays at its largest value, then falls with y - τ w, then stays at its smallest
    largest, smallest = torch.where(w > 0, upper, lower), torch.where(w > 0, lower, upper)
    leaves = torch.where(w == 0, -torch.inf, (y - largest) / w)
    arrives = torch.where(w == 0, torch.inf, (y - smallest) / w)
    starts_free, ends_free = leaves.isinf(), arrives.isinf()
    fall_linear = torch.where(starts_free, 0, w * (y - largest))
    stop_linear = torch.where(ends_free, 0, w * (smallest - y))
    kinks, order = torch.cat([leaves, arrives]).sort()
    linear = torch.cat([fall_linear, stop_linear]).gather(0, order).cumsum(0)
    square = torch.cat([w.square().masked_fill(starts_free, 0), -w.square().masked_fill(ends_free, 0)])
    first_linear = (w * torch.where(starts_free, y, largest)).sum()
    first_square = w.square().masked_fill(~starts_free, 0).sum()
    with_first = lambda first, rest: torch.cat([first.reshape(1), rest])
    return _Pieces(
        with_first(kinks.new_full((), -torch.inf), kinks),
        with_first(first_linear, linear + first_linear),
        with_first(first_square, square.gather(0, order).cumsum(0) + first_square),
    )
