"""Norms of whole vectors: Euclidean (group lasso) and maximum norm."""

from typing import Any

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.prox.parameters import leafwise, threshold
from implicitgrad.tree import Tree


def group_lasso(y: Tree, penalty: Any = 1.0, scaling: Any = 1.0) -> Tree:
    """Block soft thresholding, the proximal operator of `Σ_leaves penalty ‖leaf‖₂`; each leaf of y is one group.

    `z = max(1 - t/‖y‖, 0) y` with `t = scaling · penalty` for each leaf. O(n). For the rows of a matrix as groups:
    `torch.func.vmap(group_lasso)(y)`, with `in_dims=(0, 0)` and a vector for one penalty per row.

    Args:
        y: Tree of tensors.
        penalty: Not negative; a number or tensor `()`, or a tree like y with one for every leaf.
        scaling: Likewise; usually a step size.

    Returns:
        A tree like y.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype, or a parameter is neither number nor tensor.
        ValueError: a parameter is negative or has dimensions; y has no entries.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, this and a
            negative parameter give NaN.

    Source: Yuan and Lin (2006), "Model selection and estimation in regression with grouped variables"; Parikh and Boyd
    (2014), section 6.5.1.

    Example:
        >>> group_lasso({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.6, 0.8])}, penalty=2.5)
        {'a': tensor([1.5000, 2.0000]), 'b': tensor([0., 0.])}
    """
    return leafwise(_shrunk_group, y, penalty, scaling)


def _shrunk_group(leaf: Tensor, penalty: Any, scaling: Any) -> Tensor:
    leaf, t = threshold("group_lasso", leaf, penalty, scaling)
    at_zero = ~leaf.any()
    nonzero = torch.where(at_zero, 1, leaf)  # the norm has no derivative at zero
    largest = nonzero.detach().abs().amax()  # so that no square over- or underflows
    # not torch.linalg.vector_norm, whose third derivatives fail in torch 2.13
    norm = largest * (nonzero / largest).square().sum().sqrt()
    inside = (at_zero | (norm <= t)) & (t > 0)
    return torch.where(inside, 0, leaf * (1 - t / norm))


def l_infinity(y: Tree, penalty: Any = 1.0, scaling: Any = 1.0) -> Tree:
    """The proximal operator of `penalty ‖z‖_∞`; all leaves together are one vector.

    With `t = scaling · penalty`, `zᵢ = sign(yᵢ) min(|yᵢ|, θ)` where `Σ max(|yᵢ| - θ, 0) = t`, and zero if `‖y‖₁ ≤ t`: y
    minus its projection onto the ℓ1 ball of radius t (Moreau). One sort, O(n log n).

    Args:
        y: Tree of tensors of one dtype with n > 0 numbers.
        penalty: Not negative, a number or tensor `()`.
        scaling: Likewise; usually a step size.

    Returns:
        A tree like y.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype, or a parameter is neither number nor tensor.
        ValueError: a parameter is negative or has dimensions; y has no entries.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, this and a
            negative parameter give NaN.

    Source: Parikh and Boyd (2014), Proximal Algorithms, section 6.5.2; threshold by the sort of Held, Wolfe and
    Crowder (1974).

    Example:
        >>> l_infinity(torch.tensor([3.0, -0.5, -2.5]), penalty=1.0)
        tensor([ 2.2500, -0.5000, -2.2500])
    """
    flat, unravel = tree.ravel(y)
    flat, t = threshold("l_infinity", flat, penalty, scaling)
    sizes = flat.abs()
    ordered = sizes.sort(descending=True).values
    places = torch.arange(1, len(flat) + 1, device=flat.device)
    above = ordered * places >= ordered.cumsum(0) - t
    level = (torch.where(above, ordered, 0).sum() - t) / above.sum().clamp(min=1)
    # NaN fails every comparison, so that it reaches the result
    clipped = torch.where(flat > level, level, torch.where(flat < -level, -level, flat))
    return unravel(torch.where((sizes.sum() <= t) & (t > 0), 0, clipped))
