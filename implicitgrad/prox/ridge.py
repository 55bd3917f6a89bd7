"""Quadratic penalties, and none at all."""

from typing import Any

from implicitgrad import tree
from implicitgrad.prox.parameters import entrywise
from implicitgrad.tree import Tree


def zero(y: Tree) -> Tree:
    """The proximal operator of no penalty: y itself, in new tensors or the same.

    Example:
        >>> import torch
        >>> zero(torch.tensor([3.0, -1.0]))
        tensor([ 3., -1.])
    """
    return tree.map(lambda leaf: leaf, y)


def ridge(y: Tree, penalty: Any = 1.0, scaling: Any = 1.0) -> Tree:
    """The proximal operator of `penalty/2 ‖z‖²`: `z = y / (1 + scaling · penalty)`; entry by entry.

    O(n).

    Args:
        y: Tree of tensors.
        penalty: Not negative; a number or tensor `()` for all entries, or a tree like y, whose tensors may be smaller
            and broadcast.
        scaling: Likewise; usually a step size.

    Returns:
        A tree like y.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype, or a parameter is neither number nor tensor.
        ValueError: a parameter is negative or does not fit y; y has no entries.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, this and a
            negative parameter give NaN.

    Source: Parikh and Boyd (2014), Proximal Algorithms, section 6.1.1.

    Example:
        >>> import torch
        >>> ridge(torch.tensor([3.0, -1.0]), penalty=0.5, scaling=2.0)
        tensor([ 1.5000, -0.5000])
    """
    shrunk = lambda entries, p, s: entries / (1 + p * s)
    return entrywise("ridge", shrunk, y, {"penalty": penalty, "scaling": scaling})


def non_negative_ridge(y: Tree, penalty: Any = 1.0, scaling: Any = 1.0) -> Tree:
    """The proximal operator of `penalty/2 ‖z‖²` on `z ≥ 0`: `zᵢ = max(yᵢ, 0) / (1 + scaling · penalty)`.

    Entry by entry, O(n). Arguments and errors as for `ridge`.

    Source: Parikh and Boyd (2014), Proximal Algorithms, section 6.

    Example:
        >>> import torch
        >>> non_negative_ridge(torch.tensor([3.0, -1.0]))
        tensor([1.5000, 0.0000])
    """
    shrunk = lambda entries, p, s: entries.relu() / (1 + p * s)
    return entrywise("non_negative_ridge", shrunk, y, {"penalty": penalty, "scaling": scaling})
