"""Preconditioning by a randomised low-rank approximation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, require_symmetric
from implicitgrad.linalg.matrix import as_columns, as_rows, factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.preconditioner import Preconditioner, spectral_form
from implicitgrad.linalg.sampling import rows_at_once
from implicitgrad.linalg.solver import Products, check_finite


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    r"""The inverse of a randomised Nyström approximation, for A = C + λI whose large eigenvalues are few.

    With an orthonormal random Ω of `rank` columns and Y = CΩ, the approximation is $Y (\Omega^\top Y)^{-1} Y^\top = U
    \Lambda U^\top$ and

    $$P = U (\Lambda + \lambda)^{-1} U^\top + (I - U U^\top) / (\lambda_r + \lambda),$$

    so that PA has eigenvalues near one on the span of U and at most about one elsewhere: CG then behaves as if the
    condition number were $(\lambda_r + \lambda) / (\lambda_{min} + \lambda)$ with the smallest found eigenvalue
    $\lambda_r$. It pays where the spectrum falls quickly; where it falls slowly CG itself makes better use of the same
    products. Costs `rank` products and O(n rank²) once, `rank` vectors of memory, and two passes over them per use.

    Source: Frangella, Tropp and Udell, Randomized Nyström preconditioning (2023), algorithm 2.1 and equation (5.3).
    Departures: divided by λ_r + λ, so that it approximates A⁻¹ also in size; in place of a small shift and a Cholesky
    factor, eigenvalues of ΩᵀY below rounding, and negative ones, are left out, so that no matrix is too singular;
    the small factors are computed in float64.

    Args:
        rank: columns of Ω, at most n.
        damping: λ ≥ 0, a part of A that is known to be λI; None for `A.eigenvalue_floor`, or 0 if that is unknown.
        seed: of Ω.

    Raises:
        ValueError: a hyperparameter out of range; in `build`, an operator that is not declared symmetric, or
            `rank` above n.

    Example:
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([4.0, 0.0, 0.0])), symmetric=True).damped(1.0)
        >>> Nystrom(rank=2, damping=1.0).build(A)(torch.ones(3))
        tensor([0.2000, 1.0000, 1.0000])
    """

    rank: int
    damping: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("Nystrom", "rank", self.rank)
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise ValueError(f"Nystrom(damping=...) needs a finite number of at least 0, or None; got {self.damping}.")

    def build(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        require_symmetric("Nystrom", A, "GMRES without a preconditioner")
        if self.rank > A.size:
            raise ValueError(f"Nystrom(rank={self.rank}) needs rank <= n = {A.size}; at rank n use Cholesky.")
        damping = max(A.eigenvalue_floor or 0.0, 0.0) if self.damping is None else self.damping
        basis, eigenvalues = self._approximate(A, damping)
        shifted = eigenvalues + damping
        smallest = torch.where(shifted > 0, shifted, torch.inf).amin(-1, keepdim=True)
        bulk = torch.where(smallest.isfinite(), smallest, 1)  # of A = 0
        return spectral_form(basis, torch.where(shifted > 0, shifted, bulk), bulk)

    def cost(self, A: LinearOperator) -> int:
        return self.rank

    def _approximate(self, A: LinearOperator, damping: float) -> tuple[Tensor, Tensor]:
        """Uᵀ ``(*batch, rank, n)`` and Λ ``(*batch, rank)`` in float64, zero where the sketch found nothing."""
        generator = torch.Generator(A.device).manual_seed(self.seed)
        dtype, product = factor_dtype(A.dtype), Products(A)
        shape = (*A.vector_shape, self.rank)
        test = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=dtype, device=A.device)).Q.to(A.dtype)
        image = torch.cat([product(rows) for rows in as_rows(test).contiguous().split(rows_at_once(A))])
        check_finite("Nystrom", 0, image)
        test, image = test.to(dtype), as_columns(image).to(dtype)
        image = image - damping * test

        core = (test.mT @ image).double()
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        lost = self.rank * torch.finfo(A.dtype).eps * values.abs().amax(-1, keepdim=True)
        inverse_root = torch.where(values > lost, values, torch.inf).rsqrt()
        Q, R = torch.linalg.qr(image)
        U, S, _ = torch.linalg.svd(R.double() @ (vectors * inverse_root.unsqueeze(-2)))
        return (Q @ U.to(dtype)).mT.to(A.dtype).contiguous(), S.square()
