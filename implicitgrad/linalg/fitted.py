"""Preconditioners fitted to products that were made anyway."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, require_symmetric
from implicitgrad.linalg.lanczos import lanczos
from implicitgrad.linalg.matrix import factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.preconditioner import Preconditioner
from implicitgrad.linalg.recording import Recorder

Pairs = tuple[Tensor, Tensor]  # vectors v and images A v, both (m, n)


class Fit(NamedTuple):
    """A preconditioner and what the next fit should know.

    Attributes:
        product: ``r -> P r``.
        carried: for the fit to the next, slightly different operator; what it is only the recipe knows.
    """

    product: Callable[[Tensor], Tensor]
    carried: Any


class FittedPreconditioner(Preconditioner):
    """A recipe that needs only pairs ``(v, A v)``, such as a solver leaves behind, see `Recorder`.

    `Recycling` fits it to the products of earlier solves at no further product. `build`, for `CG` alone, makes the
    pairs by the Lanczos process.
    """

    num_pairs: int

    @abstractmethod
    def fit(self, vectors: Tensor, images: Tensor, carried: Any = None) -> Fit:
        """P from pairs with a symmetric positive semidefinite matrix.

        Args:
            vectors: v of each pair, ``(m, n)``, of any length; dependent ones do no harm.
            images: A v, the same shape.
            carried: what this recipe's fit to the operator before handed out.

        Raises:
            ValueError: the vectors span no positive curvature ``vᵀAv > 0``, or are not of one shape ``(m, n)``.
            FloatingPointError: NaN or infinity in the pairs.
        """

    def check(self, A: LinearOperator) -> None:
        """Refuse a stack of systems, and an operator that is not declared symmetric, by a ValueError."""
        name = type(self).__name__
        require_symmetric(name, A, "GMRES without a preconditioner")
        if A.batch_shape:
            raise ValueError(f"{name} is fitted to one system; got a stack of shape {A.batch_shape}. Use Nystrom.")

    def build(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        self.check(A)
        recorder = Recorder(A, self.num_pairs)
        lanczos(recorder.operator, self.num_pairs)
        return self.fit(*recorder.pairs()).product

    def cost(self, A: LinearOperator) -> int:
        return min(self.num_pairs, A.size)


def orthonormal_pairs(name: str, vectors: Tensor, images: Tensor) -> Pairs:
    """Pairs with orthonormal vectors that span the same space, ``(k, n)`` with k <= m; float32 or better.

    Directions in which the vectors, scaled to length one, are nearly dependent are left out: singular values below
    eps^¼ times the largest, 0.02 in float32.

    Args:
        name: class name of the recipe, for messages.
        vectors: ``(m, n)``.
        images: ``(m, n)``.

    Raises:
        ValueError: shapes that are not both ``(m, n)``, or no vector but zero.
        FloatingPointError: NaN or infinity.
    """
    if vectors.ndim != 2 or vectors.shape != images.shape:
        raise ValueError(
            f"{name} needs vectors and images of one shape (m, n); got {tuple(vectors.shape)} and"
            f" {tuple(images.shape)}."
        )
    length, size = (torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64) for part in (vectors, images))
    if not (length.isfinite().all() & size.isfinite().all()):
        raise FloatingPointError(f"{name} got NaN or infinity in the pairs; check A @ v for a finite v.")
    dtype = factor_dtype(vectors.dtype)
    scale = torch.where(length > 0, 1 / length, 0).unsqueeze(-1).to(dtype)
    V, W = vectors.to(dtype) * scale, images.to(dtype) * scale
    for _ in range(2):  # the second time for what rounding has left of the first; faster than QR
        squares, mixing = torch.linalg.eigh((V @ V.mT).double())
        kept = squares > torch.finfo(vectors.dtype).eps ** 0.5 * squares[-1]
        if not kept.any():
            raise ValueError(f"{name} needs pairs with a vector that is not zero.")
        combination = (mixing[:, kept] * squares[kept].rsqrt()).mT.to(dtype)
        V, W = combination @ V, combination @ W
    return V, W


@dataclass(frozen=True)
class QuasiNewton(FittedPreconditioner):
    r"""The inverse that satisfies ``P A v = v`` for every pair, and changes what was known before least.

    With the vectors as columns of S and the images as columns of Y = AS,

    $$P = (I - S M Y^\top)\, B\, (I - Y M S^\top) + S M S^\top, \qquad M = (S^\top Y)^{-1},$$

    where B is γI at first, with 1 / γ the geometric mean of the Ritz values of A on the span of S. At later operators B
    is that first P: the pairs of the newest solve correct it. P is positive definite by construction. For the
    conjugate directions of one CG run it is the L-BFGS matrix of all pairs, but it depends neither on their order nor
    on conjugacy, which rounding destroys. The eigenvalues of PA are one on the span of S, the others lie within those
    of BA. Costs four passes over `num_pairs` vectors per use and two vectors of memory per pair; twice that at later
    operators.

    `Deflation` needs half of that or less, cuts as many iterations, and follows a longer drift.

    Source: Morales and Nocedal, Automatic preconditioning by limited memory quasi-Newton updating (2000), for pairs
    taken from CG; the order-free formula is that of Gratton, Sartenaer and Tshimanga (2011). Departures: the first
    pairs are kept, not an evenly spaced sample of all, and γ is not that of the last pair. It serves the purpose of
    PSGD's factor fitted to pairs (v, Av), in closed form and without a learning rate.

    Args:
        num_pairs: the first so many pairs of a solve are used.

    Raises:
        ValueError: `num_pairs` below one; in `build`, an operator that is not declared symmetric or a stack.

    Example:
        >>> P = QuasiNewton().fit(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 0.0]])).product
        >>> P(torch.tensor([4.0, 1.0]))
        tensor([1.0000, 0.2500])
    """

    num_pairs: int = 50

    def __post_init__(self) -> None:
        check_count("QuasiNewton", "num_pairs", self.num_pairs)

    def fit(self, vectors: Tensor, images: Tensor, carried: Any = None) -> Fit:
        S, Y = orthonormal_pairs("QuasiNewton", vectors, images)
        core = (S @ Y.mT).double()
        values, coefficients = torch.linalg.eigh((core + core.mT) / 2)
        kept = values > torch.finfo(vectors.dtype).eps ** 0.5 * values[-1].clamp(min=0)
        if not kept.any():
            raise ValueError("QuasiNewton found no positive curvature among the pairs; use MINRES.")
        whiten = (coefficients[:, kept] * values[kept].rsqrt()).mT.to(S.dtype)  # now S M Sᵀ = Sᵀ S in rows
        S, Y = ((whiten @ rows).to(vectors.dtype) for rows in (S, Y))
        gamma = (-values[kept].log().mean()).exp().to(vectors.dtype)
        base = carried or (lambda r: gamma * r)

        def product(r: Tensor) -> Tensor:
            along = r @ S.mT
            rest = base(r - along @ Y)
            return rest + (along - rest @ Y.mT) @ S

        return Fit(product, carried or product)
