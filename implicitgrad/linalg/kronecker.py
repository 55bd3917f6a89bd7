"""Block-diagonal matrices of Kronecker products, which are inverted in their eigenbasis at any damping.

A block acts on a matrix V ``(p, q)`` as ``left V rightᵀ``; for V flattened row by row that is ``left ⊗ right``. With
``left = Q diag(l) Qᵀ`` and ``right = R diag(r) Rᵀ`` its eigenvectors are the products of columns of Q and R, its
eigenvalues ``l rᵀ``; so ``(block + λI)⁻¹`` divides by ``l rᵀ + λ`` in that basis, without approximation.

Source: Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature (2015), appendix B;
eigenvalues other than ``l rᵀ`` as in George et al., Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis (2018).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg.matrix import Product, factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.symmetry import check_entries, symmetry_tolerance

Spans = tuple[tuple[int, int], ...]


class KroneckerBlock(NamedTuple):
    """One positive semidefinite block in its eigenbasis; `KroneckerBlock.of` makes it from two factors.

    ``block._replace(eigenvalues=...)`` keeps the basis and corrects the eigenvalues (EKFAC): no diagonal is closer to a
    matrix C in the Frobenius norm than that of ``(Q ⊗ R)ᵀ C (Q ⊗ R)``.

    Attributes:
        left_basis: Q ``(p, p)``, eigenvectors in columns.
        right_basis: R ``(q, q)``, likewise.
        eigenvalues: ``(p, q)``, not negative; that of the product of columns i of Q and j of R at ``[i, j]``.
        spans: where V lies in a vector: the columns of V from left to right, cut into matrices ``(p, width)`` that are
            stored row by row in ``vector[start:stop]``. A weight and its bias are two spans of one block.
    """

    left_basis: Tensor
    right_basis: Tensor
    eigenvalues: Tensor
    spans: Spans

    @classmethod
    def of(cls, left: Tensor, right: Tensor, spans: Sequence[tuple[int, int]]) -> "KroneckerBlock":
        """The block ``left ⊗ right`` of two symmetric positive semidefinite factors.

        A dense block M is ``M ⊗ 1``: give ``torch.ones(1, 1)`` for `right`. Costs ``O(p³ + q³)``; computed in float32
        or better, once more in float64 where that does not converge. Eigenvalues that rounding made negative become
        zero.

        Args:
            left: ``(p, p)``.
            right: ``(q, q)``.
            spans: ``(start, stop)`` of every part, see `KroneckerBlock`.

        Raises:
            ValueError: a factor is not a symmetric positive semidefinite matrix, or the spans do not hold p · q entries
                in whole columns.
            FloatingPointError: NaN or infinity in a factor.

        Example:
            >>> KroneckerBlock.of(torch.eye(2), torch.diag(torch.tensor([1.0, 3.0])), [(0, 4)]).eigenvalues
            tensor([[1., 3.],
                    [1., 3.]])
        """
        (left_values, left_basis), (right_values, right_basis) = _eigh("left", left), _eigh("right", right)
        widths = [(stop - start) / len(left) for start, stop in spans]
        if sum(widths) != len(right) or not all(width >= 1 and width.is_integer() for width in widths):
            raise ValueError(
                f"A block of {len(left)} x {len(right)} entries needs spans of whole columns, {len(left)} entries each;"
                f" got spans {tuple(spans)}."
            )
        return cls(left_basis, right_basis, left_values.outer(right_values), tuple(spans))

    def coefficients(self, vector: Tensor) -> Tensor:
        """``Qᵀ V R`` of the part that `vector` ``(..., n)`` has in this block, ``(..., p, q)``."""
        V = read_matrix(vector, self.spans, len(self.left_basis))
        return self.left_basis.mT @ V.to(self.left_basis.dtype) @ self.right_basis

    def write(self, coefficients: Tensor, vector: Tensor) -> None:
        """Overwrite the part of `vector` ``(..., n)`` in this block with ``Q coefficients Rᵀ``."""
        write_matrix(self.left_basis @ coefficients @ self.right_basis.mT, self.spans, vector)


def read_matrix(vector: Tensor, spans: Spans, num_rows: int) -> Tensor:
    """V ``(..., p, q)`` of p rows from the spans of a vector ``(..., n)``, see `KroneckerBlock`."""
    parts = [vector[..., start:stop].unflatten(-1, (num_rows, -1)) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def write_matrix(V: Tensor, spans: Spans, vector: Tensor) -> None:
    """The way back: overwrite the spans of a vector ``(..., n)`` with V ``(..., p, q)``."""
    widths = [(stop - start) // V.shape[-2] for start, stop in spans]
    for (start, stop), part in zip(spans, V.split(widths, -1), strict=True):
        vector[..., start:stop] = part.flatten(-2)


def kronecker(blocks: Sequence[KroneckerBlock], size: int, dtype: torch.dtype | None = None) -> LinearOperator:
    """The block-diagonal operator of Kronecker products; zero where no block lies.

    A product, and a product with the inverse of the damped operator, cost ``4 p q (p + q)`` operations per block. The
    inverse is exact: every eigenvalue is damped in the eigenbasis, and what no block covers is divided by the damping.

    Args:
        blocks: at least one, on one device, disjoint.
        size: n, length of the vectors.
        dtype: that of the vectors; by default that of the blocks.

    Raises:
        ValueError: no blocks, or they overlap or reach beyond `size`. In a product with the inverse: an eigenvalue is
            zero, so there is none without damping.
        FloatingPointError: eigenvalues that are NaN or infinite.

    Example:
        >>> block = KroneckerBlock.of(torch.eye(2), torch.diag(torch.tensor([1.0, 3.0])), [(0, 4)])
        >>> kronecker([block], 5) @ torch.ones(5)
        tensor([1., 3., 1., 3., 0.])
    """
    if not blocks:
        raise ValueError("kronecker needs at least one block; got none.")
    spans = sorted(span for block in blocks for span in block.spans)
    if spans[0][0] < 0 or spans[-1][1] > size or any(first[1] > second[0] for first, second in pairwise(spans)):
        raise ValueError(f"kronecker needs disjoint blocks within 0 and {size}; got spans {spans}.")
    if not torch.stack([block.eigenvalues.isfinite().all() for block in blocks]).all():
        raise FloatingPointError("kronecker got NaN or infinite eigenvalues; check the data the factors are made of.")
    covered = sum(stop - start for start, stop in spans) == size

    def shifted_inverse(shift: float) -> Product:
        shifted = [block.eigenvalues + shift for block in blocks]
        return _spectral_product(blocks, [values.reciprocal() for values in shifted], 0.0 if covered else 1 / shift)

    product = _spectral_product(blocks, [block.eigenvalues for block in blocks], 0.0)
    return LinearOperator(
        product,
        size,
        matmat=product,
        symmetric=True,
        eigenvalue_floor=0.0,
        shifted_inverse=shifted_inverse,
        dtype=dtype or blocks[0].eigenvalues.dtype,
        device=blocks[0].eigenvalues.device,
    )


def _spectral_product(blocks: Sequence[KroneckerBlock], weights: Sequence[Tensor], elsewhere: float) -> Product:
    """The product with the matrix that has these eigenvalues in the blocks and `elsewhere` outside of them."""

    def product(v: Tensor) -> Tensor:
        out = elsewhere * v
        for block, weight in zip(blocks, weights, strict=True):
            block.write(weight * block.coefficients(v), out)
        return out

    return product


def _eigh(name: str, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not negative, and eigenvectors of a symmetric positive semidefinite factor."""
    if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
        raise ValueError(f"A Kronecker factor is a square matrix; got {name} of shape {tuple(factor.shape)}.")
    factor = factor.detach().to(factor_dtype(factor.dtype))
    if not factor.isfinite().all():
        raise FloatingPointError(f"NaN or infinity in the {name} Kronecker factor; check the data it is made of.")
    check_entries(factor)
    values, basis = _converged_eigh(factor)
    lowest, largest = values[0].item(), values.abs().amax().item()
    if lowest < -symmetry_tolerance(factor.dtype) * largest:
        raise ValueError(
            f"A Kronecker factor must be positive semidefinite; {name} has an eigenvalue {lowest:.1e} where the largest"
            f" is {largest:.1e}. Use factors that are sums of outer products."
        )
    return values.clamp_min(0), basis


def _converged_eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(factor)
    except LinAlgError:  # rare, where many eigenvalues are tiny and close; float64 gets through
        values, basis = torch.linalg.eigh(factor.double())
        return values.to(factor.dtype), basis.to(factor.dtype)
