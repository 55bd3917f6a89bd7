"""Projections onto balls and spheres of the l1 and l2 norm. That of the l∞ ball is a box: `boxes.linf_ball`."""

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.linalg.rows import safe_row_norm
from implicitgrad.projections import checks
from implicitgrad.projections.simplices import simplex_point
from implicitgrad.tree import Tree


def l2_ball(y: Tree, radius: float | Tensor = 1.0) -> Tree:
    """The nearest point of the ball `{z : ‖z‖₂ <= radius}`: `y min(1, radius / ‖y‖)`.

    The derivative in y is `I` inside and `(radius / ‖y‖) (I - y yᵀ / ‖y‖²)` outside, that in the radius `y / ‖y‖`
    outside; on the sphere, where there is none, it is that of the inside. Costs `O(n)`.

    Args:
        y: Tree of n numbers, one point.
        radius: Not negative.

    Raises:
        ValueError: the radius is negative; y has no entries.
        TypeError: y is no tree of floating point tensors of one dtype, or the radius no number.
        FloatingPointError: NaN or infinity in y or the radius. Inside `torch.func` transforms, where values cannot be
            read, a wrong argument of this or the first kind gives NaN.

    Example:
        >>> l2_ball(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    flat, unravel = tree.ravel(y)
    radius = checks.number("l2_ball", "radius", radius, flat)
    flat = checks.checked("l2_ball", flat, {"radius": radius}, [checks.not_negative("l2_ball", "radius", radius)])
    zero = ~flat.any()
    norm = safe_row_norm(torch.where(zero, 1, flat))  # never of zero, where it has no derivative
    outside = ~zero & (norm > radius)
    return unravel(flat * torch.where(outside, radius / norm, 1))


def l2_sphere(y: Tree, radius: float | Tensor = 1.0) -> Tree:
    """The nearest point of the sphere `{z : ‖z‖₂ = radius}`: `y radius / ‖y‖`.

    The set is not convex: every point of it is nearest to `y = 0`, which is refused. Derivatives are those of `l2_ball`
    outside. Costs `O(n)`.

    Args:
        y: Tree of n numbers, one point, not zero.
        radius: Not negative.

    Raises:
        ValueError: y is zero; and as `l2_ball`.
        TypeError, FloatingPointError: as `l2_ball`.

    Example:
        >>> l2_sphere(torch.tensor([0.3, 0.4]))
        tensor([0.6000, 0.8000])
    """
    flat, unravel = tree.ravel(y)
    radius = checks.number("l2_sphere", "radius", radius, flat)
    nonzero = checks.Claim(
        flat.any(), lambda: "l2_sphere needs y other than zero, to which all points are nearest; move y a little"
    )
    claims = [checks.not_negative("l2_sphere", "radius", radius), nonzero]
    flat = checks.checked("l2_sphere", flat, {"radius": radius}, claims)
    return unravel(flat * (radius / safe_row_norm(flat)))


def l1_ball(y: Tree, radius: float | Tensor = 1.0) -> Tree:
    """The nearest point of the ball `{z : Σ |z| <= radius}`.

    y itself inside; outside `sign(y) simplex(|y|, radius)`, the soft threshold of y that has norm `radius`. Costs
    `O(n log n)` for a sort. The derivative in y outside is `I - s sᵀ/k` on the support of k entries with signs s, that
    in the radius `s/k` there.

    Args:
        y: Tree of n numbers, one point.
        radius: Not negative.

    Raises:
        ValueError, TypeError, FloatingPointError: as `l2_ball`.

    Source: Duchi, Shalev-Shwartz, Singer, Chandra (2008), "Efficient projections onto the l1-ball for learning in high
    dimensions".

    Example:
        >>> l1_ball(torch.tensor([0.5, -1.2, 0.1]))
        tensor([ 0.1500, -0.8500,  0.0000])
    """
    flat, unravel = tree.ravel(y)
    radius = checks.number("l1_ball", "radius", radius, flat)
    flat = checks.checked("l1_ball", flat, {"radius": radius}, [checks.not_negative("l1_ball", "radius", radius)])
    return unravel(torch.where(flat.abs().sum() <= radius, flat, _l1_sphere_point(flat, radius)))


def l1_sphere(y: Tree, radius: float | Tensor = 1.0) -> Tree:
    """A nearest point of the sphere `{z : Σ |z| = radius}`: `sign(y) simplex(|y|, radius)`.

    The set is not convex: to a point inside with entries of zero several points are nearest, of which that is returned
    where these entries are not negative, and the projection jumps there. Costs and derivatives as `l1_ball` outside.

    Args:
        y: Tree of n numbers, one point.
        radius: Not negative.

    Raises:
        ValueError, TypeError, FloatingPointError: as `l2_ball`.

    Example:
        >>> l1_sphere(torch.tensor([0.5, -0.1]))
        tensor([ 0.7000, -0.3000])
    """
    flat, unravel = tree.ravel(y)
    radius = checks.number("l1_sphere", "radius", radius, flat)
    flat = checks.checked("l1_sphere", flat, {"radius": radius}, [checks.not_negative("l1_sphere", "radius", radius)])
    return unravel(_l1_sphere_point(flat, radius))


def _l1_sphere_point(y: Tensor, radius: Tensor) -> Tensor:
    sign = torch.where(y < 0, -1, torch.ones_like(y))  # of zero too; torch.sign and abs have derivative zero there
    return sign * simplex_point(sign * y, radius)
