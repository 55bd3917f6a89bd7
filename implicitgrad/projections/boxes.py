"""Projections onto products of intervals: entry by entry."""

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.projections import checks
from implicitgrad.tree import Tree


def non_negative(y: Tree) -> Tree:
    """The nearest point of the orthant `{z : z >= 0}`: `max(y, 0)` entry by entry.

    The derivative is 1 where `y > 0` and 0 where `y < 0`; at `y = 0`, where there is none, it is 1.

    Args:
        y: Tree of n numbers.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype.
        ValueError: y has no entries.
        FloatingPointError: NaN or infinity in y. Inside `torch.func` transforms, where values cannot be read, NaN.

    Example:
        >>> non_negative(torch.tensor([0.5, -3.0]))
        tensor([0.5000, 0.0000])
    """
    flat, unravel = tree.ravel(y)
    flat = checks.checked("non_negative", flat, {})
    return unravel(torch.where(flat < 0, 0, flat))


def box(y: Tree, lower: float | Tree, upper: float | Tree) -> Tree:
    """The nearest point of the box `{z : lower <= z <= upper}`, entry by entry.

    The derivative in y is 1 inside and 0 outside, those in the bounds 1 for the bound an entry lies beyond. At a bound,
    where there is no derivative, it is that of the inside.

    Args:
        y: Tree of n numbers.
        lower: A number or tensor `()` for all entries; or a tree like y, whose tensors may be smaller and broadcast.
            Minus infinity for no bound.
        upper: Likewise. Entries with equal bounds are held there, with a derivative that follows the bound.

    Raises:
        ValueError: a lower bound above its upper bound; shapes or trees that do not fit y; y has no entries.
        TypeError: y is no tree of floating point tensors of one dtype.
        FloatingPointError: NaN or infinity in y, NaN in a bound. Inside `torch.func` transforms, where values cannot be
            read, a wrong argument of this or the first kind gives NaN.

    Example:
        >>> box(torch.tensor([0.5, -3.0, 7.0]), 0.0, torch.tensor([1.0, 1.0, 2.0]))
        tensor([0.5000, 0.0000, 2.0000])
    """
    flat, unravel = tree.ravel(y)
    low, high = bound_like("box", "lower", lower, y), bound_like("box", "upper", upper, y)
    parameters = {"lower": finite_part(low), "upper": finite_part(high)}
    return unravel(clip(checks.checked("box", flat, parameters, [bounds_claim("box", low, high)]), low, high))


def hypercube(y: Tree, side: float | Tensor = 1.0) -> Tree:
    """The nearest point of the cube `{z : 0 <= z <= side}`, entry by entry; see `box`.

    Args:
        y: Tree of n numbers.
        side: Length of an edge, not negative.

    Raises:
        ValueError, TypeError, FloatingPointError: as `box`; the side is negative.

    Example:
        >>> hypercube(torch.tensor([0.5, -3.0, 7.0]))
        tensor([0.5000, 0.0000, 1.0000])
    """
    flat, unravel = tree.ravel(y)
    side = checks.number("hypercube", "side", side, flat)
    flat = checks.checked("hypercube", flat, {"side": side}, [checks.not_negative("hypercube", "side", side)])
    return unravel(clip(flat, torch.zeros_like(side), side))


def linf_ball(y: Tree, radius: float | Tensor = 1.0) -> Tree:
    """The nearest point of the ball `{z : max |z| <= radius}`, entry by entry; see `box`.

    Args:
        y: Tree of n numbers.
        radius: Not negative.

    Raises:
        ValueError, TypeError, FloatingPointError: as `box`; the radius is negative.

    Example:
        >>> linf_ball(torch.tensor([0.5, -3.0, 7.0]))
        tensor([ 0.5000, -1.0000,  1.0000])
    """
    flat, unravel = tree.ravel(y)
    radius = checks.number("linf_ball", "radius", radius, flat)
    flat = checks.checked("linf_ball", flat, {"radius": radius}, [checks.not_negative("linf_ball", "radius", radius)])
    return unravel(clip(flat, -radius, radius))


def bound_like(name: str, field: str, bound: float | Tree, y: Tree) -> Tensor:
    """A bound of projection `name` as one vector `(n,)` in the order of `tree.ravel(y)`.

    Args:
        name: Of the projection.
        field: Of the bound.
        bound: A number or tensor `()`; or a tree like y, of numbers and tensors that broadcast to those of y.
        y: Tree of n numbers.

    Raises:
        ValueError: trees or shapes do not fit.
        TypeError: a bound is neither a number nor a tensor.
    """

    def spread(leaf: Tensor, part: float | Tensor) -> Tensor:
        if not isinstance(part, Tensor):
            return checks.number(name, field, part, leaf).expand(leaf.shape)
        missing = leaf.dim() - part.dim()
        if missing < 0 or any(a not in (1, b) for a, b in zip(part.shape, leaf.shape[missing:], strict=True)):
            raise ValueError(
                f"{name} needs {field} like y, got shape {tuple(part.shape)} where y has {tuple(leaf.shape)}"
            )
        return part.to(leaf).expand(leaf.shape)

    one_for_all = isinstance(bound, (int, float)) or isinstance(bound, Tensor) and bound.dim() == 0
    spread_out = tree.map(lambda leaf: spread(leaf, bound), y) if one_for_all else tree.map(spread, y, bound)
    return tree.ravel(spread_out)[0]


def bounds_claim(name: str, lower: Tensor, upper: Tensor) -> checks.Claim:
    """The claim that numbers lie between all bounds."""
    empty = (lower > upper) | (lower == torch.inf) | (upper == -torch.inf)
    return checks.Claim(
        ~empty.any(),
        lambda: (
            f"{name} needs lower <= upper, got {lower[empty][0].item()} above {upper[empty][0].item()} in the first of "
            f"{int(empty.sum())} entries; no number lies between"
        ),
    )


def finite_part(bound: Tensor) -> Tensor:
    """A bound without its infinite entries, which are none; NaN stays."""
    return bound.masked_fill(bound.isinf(), 0)


def clip(y: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """`y` moved to the nearest bound. `torch.clamp` loses the derivative in the bounds where they are equal."""
    return torch.where(y < lower, lower, torch.where(y > upper, upper, y))
