"""Soft thresholding of singular values."""

from typing import Any

import torch
from torch import Tensor

from implicitgrad.projections import psd_cone
from implicitgrad.prox.parameters import leafwise, threshold
from implicitgrad.tree import Tree


def nuclear_norm(y: Tree, penalty: Any = 1.0, scaling: Any = 1.0) -> Tree:
    """The proximal operator of `penalty Σ σᵢ(z)`, the sum of singular values; each leaf of y is one matrix.

    `z = U max(Σ - t, 0) Vᵀ` for `y = U Σ Vᵀ` and `t = scaling · penalty`. It is smooth wherever no singular value
    equals t, also where some are repeated or zero, and derivatives here are right there: z is twice the upper right
    block of the positive part of `[[-t I, y], [yᵀ, -t I]]`, whose eigenvalues are `-t ± σᵢ` and `-t`. One
    eigendecomposition of that matrix, O((n + m)³), and four products of such matrices per derivative product.

    Args:
        y: Tree of matrices `(n, m)`.
        penalty: Not negative; a number or tensor `()`, or a tree like y with one for every leaf.
        scaling: Likewise; usually a step size.

    Returns:
        A tree like y; its singular values below t vanish up to rounding.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype, or a parameter is neither number nor tensor.
        ValueError: a leaf is no matrix; a parameter is negative or has dimensions; y has no entries.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, this and a
            negative parameter give NaN.
        NotImplementedError: two nested forward-mode transforms.

    Source: Cai, Candès and Shen (2010), "A singular value thresholding algorithm for matrix completion", theorem 2.1;
    here through `projections.psd_cone`.

    Example:
        >>> nuclear_norm(torch.tensor([[3.0, 0.0], [0.0, 0.5]])).round(decimals=4).abs()
        tensor([[2., 0.],
                [0., 0.]])
    """
    return leafwise(_shrunk_spectrum, y, penalty, scaling)


def _shrunk_spectrum(leaf: Tensor, penalty: Any, scaling: Any) -> Tensor:
    if leaf.dim() != 2:
        raise ValueError(
            f"nuclear_norm needs matrices, got shape {tuple(leaf.shape)}; use torch.func.vmap for many of them"
        )
    leaf, t = threshold("nuclear_norm", leaf, penalty, scaling)
    n, m = leaf.shape
    upper = torch.cat([-t * torch.eye(n, dtype=leaf.dtype, device=leaf.device), leaf], dim=1)
    lower = torch.cat([leaf.mT, -t * torch.eye(m, dtype=leaf.dtype, device=leaf.device)], dim=1)
    shrunk = 2 * psd_cone(torch.cat([upper, lower]))[:n, n:]
    return torch.where(t == 0, leaf, shrunk)
