"""Projections as proximal operators."""

from collections.abc import Callable

from implicitgrad.tree import Tree


def prox_from_projection(projection: Callable[..., Tree]) -> Callable[..., Tree]:
    """The proximal operator of the indicator of a set: the projection onto it, whatever the scaling.

    Makes a projection fit where a condition or solver wants a proximal operator.

    Args:
        projection: Function of `(x, y, *data)` that returns a tree like y.

    Returns:
        Function of `(x, y, scaling, *data)`.

    Raises:
        TypeError: `projection` is no function.

    Source: Parikh and Boyd (2014), Proximal Algorithms, section 1.2.

    Example:
        >>> import torch
        >>> prox = prox_from_projection(lambda x, y: y.clamp(max=x))
        >>> prox(torch.tensor(1.0), torch.tensor([0.5, 3.0]), 0.1)
        tensor([0.5000, 1.0000])
    """
    if not callable(projection):
        raise TypeError(f"prox_from_projection needs a function (x, y, *data), got {type(projection).__name__}")

    def prox(x: Tree, y: Tree, scaling: object, *data: Tree) -> Tree:
        return projection(x, y, *data)

    return prox
