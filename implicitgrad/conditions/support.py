"""Which coordinates of a sparse or bounded solution can move."""

from collections.abc import Callable

from torch import Tensor

from implicitgrad import tree
from implicitgrad.linalg import irregular
from implicitgrad.tree import Tree


def moving_coordinates(nearest: Callable[[Tree], Tree], point: Tree) -> Tree:
    """Where the value of a map changes with its argument: true where the row of its Jacobian at `point` is not zero.

    One forward product would tell for all but a null set of directions; two irregular ones make sure also in low
    precision. Each costs two reverse passes through the map.

    Args:
        nearest: Maps trees to trees alike, a projection or a proximal operator.
        point: Where.

    Returns:
        A tree of booleans like `point`.
    """
    flat, unravel = tree.ravel(tree.detach(point))
    value = lambda vector: tree.ravel_like(point, nearest(unravel(vector)))

    def moves(pace: float) -> Tensor:
        return tree.jvp(value, (flat,), (irregular(flat, pace),)) != 0

    return unravel(moves(1.0) | moves(2.0))
