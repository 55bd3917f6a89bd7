"""Soft thresholding and its relatives: sums of absolute values."""

from typing import Any

import torch
from torch import Tensor

from implicitgrad.prox.parameters import entrywise
from implicitgrad.tree import Tree


def l1(y: Tree, penalty: Any = 1.0, scaling: Any = 1.0) -> Tree:
    """Soft thresholding, the proximal operator of `penalty ‖z‖₁`; entry by entry.

    `zᵢ = sign(yᵢ) max(|yᵢ| - t, 0)` with `t = scaling · penalty`. The derivative is 1 where `|yᵢ| > t` or `t = 0`, else
    0. O(n).

    Args:
        y: Tree of tensors.
        penalty: Not negative; a number or tensor `()` for all entries, or a tree like y, whose tensors may be smaller
            and broadcast. Entries with penalty zero stay as they are.
        scaling: Likewise; usually a step size.

    Returns:
        A tree like y.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype, or a parameter is neither number nor tensor.
        ValueError: a parameter is negative or does not fit y; y has no entries.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, this and a
            negative parameter give NaN.

    Source: Donoho (1995), "De-noising by soft-thresholding".

    Example:
        >>> l1(torch.tensor([3.0, -0.5, -2.0]))
        tensor([ 2.,  0., -1.])
    """
    return entrywise("l1", _shrunk, y, {"penalty": penalty, "scaling": scaling})


def non_negative_l1(y: Tree, penalty: Any = 1.0, scaling: Any = 1.0) -> Tree:
    """The proximal operator of `penalty ‖z‖₁` on `z ≥ 0`: `zᵢ = max(yᵢ - scaling · penalty, 0)`; entry by entry.

    O(n). Arguments and errors as for `l1`.

    Source: Parikh and Boyd (2014), Proximal Algorithms, section 6.

    Example:
        >>> non_negative_l1(torch.tensor([3.0, 0.5, -2.0]))
        tensor([2., 0., 0.])
    """
    cut = lambda entries, p, s: torch.where(entries <= p * s, 0, entries - p * s)
    return entrywise("non_negative_l1", cut, y, {"penalty": penalty, "scaling": scaling})


def elastic_net(y: Tree, l1_penalty: Any = 1.0, l2_penalty: Any = 1.0, scaling: Any = 1.0) -> Tree:
    """The proximal operator of `l1_penalty ‖z‖₁ + l2_penalty/2 ‖z‖²`; entry by entry.

    Soft thresholding by `scaling · l1_penalty`, then division by `1 + scaling · l2_penalty`. O(n).

    Args:
        y: Tree of tensors.
        l1_penalty: As `penalty` of `l1`.
        l2_penalty: Likewise.
        scaling: Likewise.

    Returns:
        A tree like y.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype, or a parameter is neither number nor tensor.
        ValueError: a parameter is negative or does not fit y; y has no entries.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, this and a
            negative parameter give NaN.

    Source: Zou and Hastie (2005), "Regularization and variable selection via the elastic net"; Parikh and Boyd (2014),
    section 6.5.3.

    Example:
        >>> elastic_net(torch.tensor([3.0, -0.5, -2.0]))
        tensor([ 1.0000,  0.0000, -0.5000])
    """
    both = lambda entries, p, q, s: _shrunk(entries, p, s) / (1 + q * s)
    return entrywise("elastic_net", both, y, {"l1_penalty": l1_penalty, "l2_penalty": l2_penalty, "scaling": scaling})


def _shrunk(entries: Tensor, penalty: Tensor, scaling: Tensor) -> Tensor:
    t = penalty * scaling
    # NaN fails every comparison, so that it reaches the result
    return torch.where((entries.abs() <= t) & (t > 0), 0, entries - t * entries.sign())
