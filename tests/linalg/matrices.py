"""Matrices with given eigenvalues, and what dense algebra says about them."""

import torch
from torch import Tensor

from implicitgrad.linalg import LinearOperator

SLOW = torch.logspace(-3, 0, 300, dtype=torch.float64)  # condition number 1e3


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric_matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(rows(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = q @ torch.diag(eigenvalues.double()) @ q.mT
    return (matrix + matrix.mT) / 2


def symmetric(matrix: Tensor) -> LinearOperator:
    return LinearOperator.from_dense(matrix, symmetric=True)


def exact(matrix: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, b.mT).mT


def krylov_basis(matrix: Tensor, starts: Tensor, num_steps: int) -> Tensor:
    """Orthonormal columns that span [b, A b, ..., A^(m-1) b] for all rows b."""
    basis = block = torch.linalg.qr(starts.mT)[0]
    for _ in range(num_steps - 1):
        block = matrix @ block
        for _ in range(2):
            block = block - basis @ (basis.mT @ block)
        block = torch.linalg.qr(block)[0]
        basis = torch.cat([basis, block], 1)
    return basis


def minimisers(matrix: Tensor, b: Tensor, basis: Tensor) -> Tensor:
    """Minimisers of ½ xᵀAx - bᵀx over the span of the columns."""
    return (basis @ torch.linalg.solve(basis.mT @ matrix @ basis, basis.mT @ b.mT)).mT


def energy_norm(matrix: Tensor, error: Tensor) -> float:
    return ((error @ matrix) * error).sum(-1).max().sqrt().item()
