"""Preconditioning by approximate eigenvectors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count
from implicitgrad.linalg.fitted import Fit, FittedPreconditioner, Pairs, orthonormal_pairs
from implicitgrad.linalg.preconditioner import spectral_form

# What earlier directions have in common with the new ones is left out, unless this part of their length is new: the
# error of an earlier image grows by its inverse.
NEW_PART = 0.3


@dataclass(frozen=True)
class Deflation(FittedPreconditioner):
    r"""Takes the eigenvalues found in earlier solves out of the spectrum.

    The Ritz pairs (θᵢ, uᵢ) of A on the span of the vectors of the pairs give

    $$P = U \Theta^{-1} U^\top + (I - U U^\top) / s,$$

    so that each uᵢ has the eigenvalue one in PA, and the rest that of A / s. Used are the `num_pairs` largest θ among
    those with ``|A u - θ u| < θ``: an eigenvalue of A within θ of the others might be zero. They need not be accurate.
    s is the geometric mean of the positive Ritz values left out, or of all if none is: it lies within the rest of the
    spectrum. Costs two passes over `num_pairs` vectors per use, and about 14 n num_pairs² operations per fit.

    The Ritz pairs are carried to the next operator and follow a slow drift without a product. In the span of the new
    vectors the new images count; for directions outside the earlier ones do, corrected by the symmetry of A. Large
    eigenvalues stand the drift better than small ones, which is why they come first.

    Source: the spectral preconditioner of Giraud and Gratton (2006), with Ritz vectors from CG as in Gratton, Sartenaer
    and Tshimanga (2011). Departures: unconverged Ritz vectors are used, the large end of the spectrum comes first, and
    pairs of successive operators are joined.

    Args:
        num_pairs: the first so many pairs of a solve are used, and so many Ritz pairs kept.

    Raises:
        ValueError: `num_pairs` below one; in `build`, an operator that is not declared symmetric or a stack.

    Example:
        >>> P = Deflation().fit(torch.eye(2, 3), torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0]])).product
        >>> P(torch.ones(3))
        tensor([0.2500, 1.0000, 0.5000])
    """

    num_pairs: int = 50

    def __post_init__(self) -> None:
        check_count("Deflation", "num_pairs", self.num_pairs)

    def fit(self, vectors: Tensor, images: Tensor, carried: Any = None) -> Fit:
        V, W = orthonormal_pairs("Deflation", vectors, images)
        if carried is not None:
            V, W = _joined(V, W, *(part.to(V.dtype) for part in carried))
        core = (V @ W.mT).double()
        values, coefficients = torch.linalg.eigh((core + core.mT) / 2)
        positive = values > 0
        if not positive.any():
            raise ValueError("Deflation found no positive curvature among the pairs; use MINRES.")
        turn = coefficients.mT.to(V.dtype)
        V, W = turn @ V, turn @ W
        gap = torch.linalg.vector_norm(W - values.unsqueeze(-1).to(V.dtype) * V, dim=-1)
        reliable = positive & (gap < values)
        kept = reliable & (reliable.flip(0).cumsum(0).flip(0) <= self.num_pairs)  # the largest: values ascend
        rest = positive & ~kept
        bulk = values[rest if rest.any() else kept].log().mean().exp()
        V, W = V[kept].to(vectors.dtype), W[kept].to(vectors.dtype)
        return Fit(spectral_form(V, values[kept], bulk.reshape(1)), (V, W))


def _joined(V: Tensor, W: Tensor, earlier: Tensor, images: Tensor) -> Pairs:
    """Orthonormal pairs of the new and the earlier directions; the images of the latter corrected where that can be.

    An earlier direction u has the part ``V Vᵀu`` whose image is known, which leaves an estimate of A e for the rest e.
    Its component in the span of V is not an estimate: by symmetry ``Vᵀ A e = (A V)ᵀ e``.
    """
    overlap = earlier @ V.mT
    rest, image = earlier - overlap @ V, images - overlap @ W
    squares, mixing = torch.linalg.eigh((rest @ rest.mT).double())
    new = squares > NEW_PART**2
    combination = (mixing[:, new] * squares[new].rsqrt()).mT.to(V.dtype)
    rest, image = combination @ rest, combination @ image
    image = image - (image @ V.mT - rest @ W.mT) @ V
    return torch.cat((V, rest)), torch.cat((W, image))
