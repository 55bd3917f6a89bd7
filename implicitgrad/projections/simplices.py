"""Projections onto simplices, by sorting."""

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.projections import checks
from implicitgrad.tree import Tree


def simplex(y: Tree, radius: float | Tensor = 1.0) -> Tree:
    """The nearest point of the simplex `{z : z >= 0, Σ z = radius}`.

    `z = max(y - τ, 0)`, with the number τ for which the entries sum to the radius; a sort of y finds it. Costs
    `O(n log n)`, and 4 vectors of memory. The derivative in y is `I - 11ᵀ/k` on the support of k entries, that in the
    radius `1/k` there; both exact wherever no entry of `y - τ` is zero.

    Args:
        y: Tree of n numbers, one point.
        radius: Sum of the entries, not negative; zero gives zero.

    Raises:
        ValueError: the radius is negative; y has no entries.
        TypeError: y is no tree of floating point tensors of one dtype, or the radius no number.
        FloatingPointError: NaN or infinity in y or the radius. Inside `torch.func` transforms, where values cannot be
            read, a wrong argument of this or the kind before gives NaN.

    Source: Held, Wolfe, Crowder (1974), "Validation of subgradient optimization"; Duchi et al. (2008), "Efficient
    projections onto the l1-ball", figure 1. Departure: y is shifted by its largest entry, which keeps sums accurate.

    Example:
        >>> simplex(torch.tensor([0.5, 1.2, -3.0]))
        tensor([0.1500, 0.8500, 0.0000])
    """
    flat, unravel = tree.ravel(y)
    radius = checks.number("simplex", "radius", radius, flat)
    flat = checks.checked("simplex", flat, {"radius": radius}, [checks.not_negative("simplex", "radius", radius)])
    return unravel(simplex_point(flat, radius))


def sparse_simplex(y: Tree, max_nonzeros: int, radius: float | Tensor = 1.0) -> Tree:
    """A nearest point of the sparse simplex `{z : z >= 0, Σ z = radius, at most k entries not zero}`.

    The k largest entries of y are projected onto the simplex of k entries, the others become zero. The set is not
    convex: where the k-th and the next entry of y tie, several points are nearest, of which that with the nonzero
    entries first in y is returned, and the projection jumps there. Elsewhere the derivative is that of `simplex` on the
    entries kept. Costs `O(n log n)`.

    Args:
        y: Tree of n numbers, one point.
        max_nonzeros: k, at least 1; from n on this is `simplex`.
        radius: Sum of the entries, not negative.

    Raises:
        ValueError, TypeError, FloatingPointError: as `simplex`; `max_nonzeros` is no integer of at least 1.

    Source: Kyrillidis, Becker, Cevher, Koch (2013), "Sparse projections onto the simplex", theorem 1.

    Example:
        >>> sparse_simplex(torch.tensor([0.5, 0.5, 0.6, 0.5]), 2)
        tensor([0.4500, 0.0000, 0.5500, 0.0000])
    """
    if isinstance(max_nonzeros, bool) or not isinstance(max_nonzeros, int) or max_nonzeros < 1:
        raise ValueError(f"sparse_simplex needs an integer max_nonzeros of at least 1, got {max_nonzeros!r}")
    flat, unravel = tree.ravel(y)
    radius = checks.number("sparse_simplex", "radius", radius, flat)
    claim = checks.not_negative("sparse_simplex", "radius", radius)
    flat = checks.checked("sparse_simplex", flat, {"radius": radius}, [claim])
    kept = flat.detach().sort(descending=True, stable=True).indices[:max_nonzeros]
    zero = 0 * flat.detach()  # NaN stays
    return unravel(zero.scatter(0, kept, simplex_point(flat[kept], radius)))


def simplex_point(y: Tensor, radius: Tensor) -> Tensor:
    """`simplex` of a vector `(n,)` without checks; NaN goes through."""
    largest = y.detach().amax()
    shifted = y - largest  # a constant shift: it drops out of the derivative
    ordered = shifted.detach().sort(descending=True).values
    counts = torch.arange(1, len(y) + 1, device=y.device, dtype=y.dtype)
    # the i largest entries stay positive when the i-th exceeds the threshold that they would have by themselves
    stays = counts * ordered > ordered.cumsum(0) - radius.detach()
    last = (stays.sum() - 1).clamp(min=0)  # no entry exceeds a radius of zero
    outside = shifted < ordered.gather(0, last.reshape(1))  # so written, NaN is inside
    threshold = (shifted.masked_fill(outside, 0).sum() - radius) / (~outside).sum()
    return (shifted - threshold).masked_fill(outside, 0).clamp(min=0)  # the clamp is for rounding
