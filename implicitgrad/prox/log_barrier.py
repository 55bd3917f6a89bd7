"""The logarithmic barrier of the positive orthant."""

from typing import Any

import torch
from torch import Tensor

from implicitgrad.prox.parameters import entrywise
from implicitgrad.tree import Tree


def log_barrier(y: Tree, penalty: Any = 1.0, scaling: Any = 1.0) -> Tree:
    """The proximal operator of `-penalty Σ log zᵢ`: `zᵢ = (yᵢ + √(yᵢ² + 4t)) / 2 > 0`; entry by entry.

    With `t = scaling · penalty`; for `yᵢ ≤ 0` by `2t / (√(yᵢ² + 4t) - yᵢ)`, which does not cancel. O(n).

    Args:
        y: Tree of tensors.
        penalty: Positive; a number or tensor `()` for all entries, or a tree like y, whose tensors may be smaller and
            broadcast.
        scaling: Likewise; usually a step size.

    Returns:
        A tree like y, positive.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype, or a parameter is neither number nor tensor.
        ValueError: a parameter is not positive or does not fit y; y has no entries.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, this and a
            parameter that is not positive give NaN.

    Source: Parikh and Boyd (2014), Proximal Algorithms, section 6.1.3.

    Example:
        >>> log_barrier(torch.tensor([1.5, 0.0, -1.5]))
        tensor([2.0000, 1.0000, 0.5000])
    """
    return entrywise("log_barrier", _root, y, {"penalty": penalty, "scaling": scaling}, positive=True)


def _root(entries: Tensor, penalty: Tensor, scaling: Tensor) -> Tensor:
    t = penalty * scaling
    size = torch.where(entries > 0, entries, -entries)  # unlike abs, this has the right one-sided derivative at zero
    larger = (size + (entries.square() + 4 * t).sqrt()) / 2
    return torch.where(entries > 0, larger, t / larger)
