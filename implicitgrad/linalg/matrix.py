"""From a matrix to products, and from products to a matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

# This many unit vectors are multiplied at a time: a batched product keeps every intermediate value of a model once per
# row, so the whole identity at once would cost n times the memory of one product.
COLUMNS_PER_BLOCK = 64


def as_columns(rows: Tensor) -> Tensor:
    """``(k, *batch, n)`` as ``(*batch, n, k)``, the layout of torch.linalg."""
    return rows.movedim(0, -1)


def as_rows(columns: Tensor) -> Tensor:
    """``(*batch, n, k)`` as ``(k, *batch, n)``."""
    return columns.movedim(-1, 0)


def vector_product(matrix: Tensor) -> Product:
    """v -> M v for ``M: (*batch, m, n)`` and ``v: (*batch, n)``."""
    return lambda v: (matrix @ v.unsqueeze(-1)).squeeze(-1)


def block_product(matrix: Tensor) -> Product:
    """The same for blocks ``(k, *batch, n)``, as one matrix product."""
    return lambda rows: as_rows(matrix @ as_columns(rows))


def by_rows(product: Product) -> Product:
    """The product with a block, one row after the other."""
    return lambda rows: torch.stack([product(row) for row in rows])


def matrix_of(block_product: Product, example: Tensor) -> Tensor:
    """The matrix ``(*batch, m, n)`` of a product with blocks, column by column; n products.

    Args:
        block_product: ``(k, *batch, n) -> (k, *batch, m)``.
        example: a vector ``(*batch, n)``; read for its shape, dtype and device.
    """
    size = example.shape[-1]
    unit_vectors = torch.eye(size, dtype=example.dtype, device=example.device)
    unit_vectors = unit_vectors.view(size, *(1 for _ in example.shape[:-1]), size).expand(size, *example.shape)
    return as_columns(torch.cat([block_product(block) for block in unit_vectors.split(COLUMNS_PER_BLOCK)]))


def mixture(weights: list[float], parts: list[Tensor], shift: float, identity: Tensor) -> Tensor:
    """Σ wᵢ · partsᵢ + shift · identity, one pass over memory per part."""
    out = parts[0] if weights[0] == 1.0 else weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        out = torch.add(out, part, alpha=weight)
    return torch.add(out, identity, alpha=shift) if shift else out


def no_transpose(v: Tensor) -> Tensor:
    """Stands in for a transposed product that was not given."""
    raise ValueError("A.T @ v needs the transposed product; make the operator with rmatvec=..., or use its to_dense().")


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for factorisations, which torch.linalg has for float32 and float64 only."""
    return torch.promote_types(dtype, torch.float32)
