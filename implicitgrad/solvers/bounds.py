"""Bounds on the entries of y, as a field of a solver."""

from collections.abc import Callable

import torch
from torch import Tensor

from implicitgrad import projections, tree
from implicitgrad.conditions import ProjectedGradient
from implicitgrad.projections.boxes import bound_like
from implicitgrad.tree import Tree

Bound = Tree | float | None
Bounds = tuple[Bound, Bound] | Callable[..., tuple[Bound, Bound]]


def check_bounds(name: str, bounds: object) -> None:
    """Refuse what is neither a pair nor a function.

    Raises:
        TypeError: with what was given.
    """
    if not (callable(bounds) or isinstance(bounds, tuple) and len(bounds) == 2):
        raise TypeError(
            f"{name}(bounds=...) needs a pair (lower, upper), or a function of (x, *data) that returns one; got "
            f"{type(bounds).__name__}"
        )


def bounds_at(bounds: Bounds, x: Tree, *data: Tree) -> tuple[Tree | float, Tree | float]:
    """`(lower, upper)`, infinite where there is none."""
    lower, upper = bounds(x, *data) if callable(bounds) else bounds
    return (-torch.inf if lower is None else lower), (torch.inf if upper is None else upper)


def flat_bounds(bounds: Bounds, y: Tree, x: Tree, *data: Tree) -> tuple[Tensor, Tensor]:
    """The same as vectors `(n,)` in the order of `tree.ravel(y)`.

    Raises:
        TypeError: a bound is neither a number nor a tensor.
        ValueError: a lower bound above its upper bound, or bounds that do not fit y.
    """
    lower, upper = tree.detach(bounds_at(bounds, x, *data))
    low, high = bound_like("bounds", "lower", lower, y), bound_like("bounds", "upper", upper, y)
    if not (low <= high).all():
        raise ValueError(
            f"bounds contradict each other: lower is above upper for {int((~(low <= high)).sum())} entries"
        )
    return low, high


def bounded_minimum(loss: Callable[..., Tensor], bounds: Bounds) -> ProjectedGradient:
    """What holds at the minimum of a loss within bounds, differentiable in them, too."""
    projection = lambda x, y, *data: projections.box(y, *bounds_at(bounds, x, *data))
    return ProjectedGradient(loss, projection, symmetric_on_support=True)
