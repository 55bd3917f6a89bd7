"""The inverse of a diagonal plus low-rank matrix by the Woodbury formula; with gradients as rows, static M-FAC."""

from typing import final

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg.checks import check_count
from implicitgrad.linalg.damping import Damping
from implicitgrad.linalg.matrix import Product
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.split_rows import SplitRows, split_rows
from implicitgrad.linalg.structure import ShiftedInverse


@final
class LowRankInverse:
    r"""``F⁻¹`` for ``F = diag(damping) + Σᵢ weightᵢ gᵢ gᵢᵀ`` with rows gᵢ of n entries, i = 1 … m.

    With D = diag(damping), W = diag(weight) and G the matrix of rows, ``F⁻¹ = D⁻¹ - D⁻¹ Gᵀ W^½ C⁻¹ W^½ G D⁻¹`` where
    ``C = I + W^½ G D⁻¹ Gᵀ W^½`` is m x m, made and factorised in float64 at construction. That costs m² n operations
    and m³/3; each product afterwards reads the rows twice. Memory beside the rows: 2 m² numbers in float64.

    Two conventions for the rows: those of `implicitgrad.curvature` give the matrix GᵀG and take ``weight=1``, the
    default. The M-FAC paper's ``λI + (1/m) Σ gᵢ gᵢᵀ`` of plain gradients takes ``weight=1 / m``.

    Rows cut into blocks make F block diagonal: what couples two blocks is left out, and there is one C per block. Rows
    in half precision stand for their rounded values: F is that of the rounded rows, and F⁻¹ is accurate for that.

    Accuracy in float32, with n = 20 000, m = 256 and cond(F) = 2e4: 1e-6 for a random v, but 1e-2 for v in the span of
    the rows, since there F⁻¹ v is a small difference of large vectors. ``refine=1`` brings both to 4e-8; `apply_span`
    avoids the difference. Where the Gram matrix in float32 is not definite after rounding, it is made in float64.

    Source: Hager (1989), Updating the inverse of a matrix; Frantar, Kurtic and Alistarh (2021), M-FAC, static
    algorithm, which computes the same inverse by a recursion over the rows. Departures: Gram matrix and Cholesky factor
    instead of the recursion (a sixth to a fourteenth of the time); blocks of right-hand sides; weights; refinement.

    Args:
        rows: ``(m, n)``, kept by reference: once they change in place, the inverse refuses to work; `split_rows` for
            blocks, devices, half precision.
        damping: λ > 0, or ``(n,)`` positive numbers.
        weight: one number or ``(m,)``, not negative.

    Raises:
        ValueError: damping not positive, weight negative, shape, dtype or device that does not fit.
        FloatingPointError: NaN or infinity in the rows, or products of them that overflow.
        torch.linalg.LinAlgError: C is not definite to float64: the damping is below 1e-16 times the largest eigenvalue.

    Example:
        >>> F = LowRankInverse(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), damping=1.0, weight=0.5)
        >>> F.apply(torch.tensor([1.0, 1.0])), F.element(0, 1)
        (tensor([0.4000, 0.2000]), tensor(-0.2000))
    """

    def __init__(self, rows: Tensor | SplitRows, damping: float | Tensor, weight: float | Tensor = 1.0):
        self._rows = rows if isinstance(rows, SplitRows) else split_rows(rows)
        self._version = self._rows.version
        self.size = self._rows.size
        self.num_rows = self._rows.num_rows
        self.dtype = self._rows.dtype
        self.device = self._rows.device
        self._D = Damping(damping, self.size, self.dtype, self.device)
        self.damping = self._D.value
        self.weight = _checked_weight(weight, self._rows)
        self._root = torch.as_tensor(self.weight, dtype=torch.float64, device=self.device).sqrt()
        self._positive = bool((torch.as_tensor(self.weight) > 0).all())
        self._cholesky = self._factorised()  # L with C = L Lᵀ, (B, m, m)
        self._transformed: SplitRows | None = None
        self._shifted: tuple[float, LowRankInverse] | None = None

    def __repr__(self) -> str:
        damping = "a diagonal" if isinstance(self.damping, Tensor) else self.damping
        return f"LowRankInverse(size={self.size}, num_rows={self.num_rows}, damping={damping}, {self.dtype})"

    def apply(self, v: Tensor, refine: int = 0) -> Tensor:
        """``F⁻¹ v``; NaN in v gives NaN.

        Costs two passes over the rows, read once for all right-hand sides. A refinement adds two; these and one of the
        first two are then made in float64: in all six to eight times the time on a CPU.

        Args:
            v: ``(n,)`` or ``(k, n)``.
            refine: corrections of the part in the span of the rows. One gives an error near the precision of `dtype`
                as long as cond(F) is below its reciprocal; beyond that a second one helps.

        Raises:
            ValueError: v does not fit.
            RuntimeError: the rows have changed in place or in their window.
        """
        block = self._as_block("apply", v, self.size, self.dtype, refine)
        sums = self._D.scale * self._rows.products(self._D.divide(block))
        weights = self._root * self._solve(self._root * sums)
        x = self._divided(-weights, block, refine)
        return self._refined(x, weights, refine).view(v.shape)

    def apply_span(self, coefficients: Tensor, refine: int = 0) -> Tensor:
        """``F⁻¹ Σ cᵢ gᵢ`` by the identity ``F⁻¹ Gᵀ c = D⁻¹ Gᵀ (I + W G D⁻¹ Gᵀ)⁻¹ c``.

        One pass instead of two, and without the small difference of large vectors: in the example of the class F⁻¹ gᵢ
        is two to four digits more accurate than by `apply`. With blocks, cᵢ weighs gᵢ in all of them.

        Args:
            coefficients: c, ``(m,)`` or ``(k, m)``, in any real dtype.
            refine: as in `apply`.

        Raises:
            ValueError: c does not fit, or a weight is zero, so that its row is no part of F: use `apply`.
            RuntimeError: the rows have changed in place or in their window.
        """
        block = self._as_block("apply_span", coefficients, self.num_rows, coefficients.dtype, refine).double()
        if not self._positive:
            raise ValueError("apply_span needs positive weights; a row with weight 0 is no part of F. Use apply.")
        block = block.expand(self._rows.num_blocks, -1, -1)
        weights = self._pushed(block)
        x = self._divided(weights, None, refine)
        return self._refined(x, block - weights, refine).view(*coefficients.shape[:-1], self.size)

    def product(self, v: Tensor) -> Tensor:
        """``F v`` for ``(n,)`` or ``(k, n)``; two passes over the rows."""
        block = self._as_block("product", v, self.size, self.dtype)
        weights = self._root.square() * self._rows.products(block)
        if isinstance(self.damping, Tensor):
            return self._rows.mixture(weights, self.damping * block).view(v.shape)
        return self._rows.mixture(weights, block, self.damping).view(v.shape)

    def element(self, i: int, j: int) -> Tensor:
        """``(F⁻¹)ᵢⱼ``, 0-dimensional, at O(m).

        The first element, row or diagonal makes L⁻¹ W^½ G D⁻¹ with ``C = L Lᵀ``: about m² n operations, and as much
        memory as the rows take in `dtype`. Errors are relative to 1 / damping; ``apply`` to a unit vector with
        ``refine=1`` does better for entries far below that.

        Raises:
            ValueError: an index outside of 0 … n - 1.
            RuntimeError: the rows have changed in place or in their window.
        """
        (first, block_i), (second, block_j) = self._column(i), self._column(j)
        value = first.double() @ second.double() if block_i == block_j else first.new_zeros((), dtype=torch.float64)
        return ((self._D.reciprocal(i) if i == j else 0.0) - value).to(self.dtype)

    def row(self, i: int) -> Tensor:
        """Row i of ``F⁻¹``, ``(n,)``, at O(m) per entry; see `element`."""
        column, block = self._column(i)
        weights = self._root.new_zeros(self._rows.num_blocks, 1, self.num_rows)
        weights[block, 0] = -column
        row = self._elements().mixture(weights)[0]
        row[i] += self._D.reciprocal(i)
        return row

    def diagonal(self) -> Tensor:
        """The diagonal of ``F⁻¹``, ``(n,)``, at O(m) per entry; see `element`."""
        squares = [part.rows.square().sum(1).flatten().to(self.device) for part in self._elements().parts]
        return self._D.reciprocal() - torch.cat(squares)

    def logdet(self) -> Tensor:
        """log det F, 0-dimensional in float64, at O(m); O(n) for a diagonal damping."""
        return 2 * self._cholesky.diagonal(dim1=-2, dim2=-1).log().sum() + self._D.logdet()

    def with_damping(self, damping: float | Tensor) -> "LowRankInverse":
        """The same rows and weights with another damping, at the cost of a factorisation, m³/3 operations.

        Damping by a vector makes a Gram matrix of its own, m² n operations more.
        """
        self._check_current()
        return LowRankInverse(self._rows, damping, self.weight)

    def operator(self) -> LinearOperator:
        """F as a definite operator that knows its inverse, also when damped or scaled."""
        inverse = lambda lam: lambda v: self._damped_by(lam).apply(v, refine=1)
        return self._as_operator(self.product, inverse, self._D.lowest)

    def inverse_operator(self) -> LinearOperator:
        """F⁻¹ as a definite operator."""
        # no eigenvalue of F is larger than max(D) times the norm of C; a thousandth is left for rounding
        norm = torch.linalg.matrix_norm(self._cholesky @ self._cholesky.mT).max()
        return self._as_operator(self.apply, None, 1 / (1.001 * self._D.highest * float(norm)))

    def _as_operator(self, product: Product, inverse: ShiftedInverse | None, floor: float) -> LinearOperator:
        return LinearOperator(
            product,
            self.size,
            matmat=product,
            symmetric=True,
            eigenvalue_floor=floor,
            shifted_inverse=inverse,
            dtype=self.dtype,
            device=self.device,
        )

    def _damped_by(self, lam: float) -> "LowRankInverse":
        """The inverse of F + lam I; the last one is remembered."""
        if lam == 0:
            return self
        if self._shifted is None or self._shifted[0] != lam:
            self._shifted = lam, self.with_damping(self.damping + lam)
        return self._shifted[1]

    def _factorised(self) -> Tensor:
        """The Cholesky factor; from a Gram matrix in float64 if one in `dtype` is not definite after rounding."""
        core = torch.empty(0)
        for exact in (False, True):
            divisor = self._D.divisor
            gram = self._rows.gram(exact) if divisor is None else self._rows.divided_gram(divisor, exact)
            core = gram * (self._D.scale * self._root.unsqueeze(-1) * self._root)
            core.diagonal(dim1=-2, dim2=-1).add_(1)
            lower, info = torch.linalg.cholesky_ex(core)
            # what is not finite in a row of C makes the diagonal entry of L not finite
            if (info == 0).all() & lower.diagonal(dim1=-2, dim2=-1).isfinite().all():
                return lower
        if not core.isfinite().all():
            raise FloatingPointError(
                "LowRankInverse: NaN or infinity in the rows, or products of rows that overflow float64. Look for the"
                " gradient that is not finite."
            )
        raise LinAlgError(
            f"LowRankInverse: I + G Gᵀ / damping is not definite to float64, its largest diagonal entry is"
            f" {float(core.amax()):.1e}. Raise the damping to at least 1e-14 of the largest eigenvalue."
        )

    def _solve(self, right: Tensor) -> Tensor:
        """C⁻¹ on rows ``(B, k, m)``."""
        return torch.cholesky_solve(right.mT, self._cholesky).mT

    def _pushed(self, coefficients: Tensor) -> Tensor:
        """``(I + W G D⁻¹ Gᵀ)⁻¹ c`` for c that is zero where the weight is."""
        reciprocal = torch.where(self._root > 0, 1 / self._root, 0)
        return self._root * self._solve(reciprocal * coefficients)

    def _divided(self, weights: Tensor, v: Tensor | None, refine: int) -> Tensor:
        """``D⁻¹ (v + Gᵀ weights)``."""
        dtype = torch.float64 if refine else None
        return self._D.divide(self._rows.mixture(self._D.scale * weights, v, self._D.scale, dtype))

    def _refined(self, x: Tensor, weights: Tensor, refine: int) -> Tensor:
        """Corrections of an x that lies near F⁻¹ v, with ``v - D x = Gᵀ weights``.

        The residual v - F x = Gᵀ (weights - W G x) is in the span of the rows, so that its correction is, too, and is
        made without the difference. Sums are made in float64: both W G x and, where rows are nearly dependent, the
        sum of the correction are small beside their terms.
        """
        for _ in range(refine):
            step = self._pushed(weights - self._root.square() * self._rows.products(x, torch.float64))
            x = x + self._divided(step, None, refine)
            weights = weights - step
        return x

    def _elements(self) -> SplitRows:
        """``L⁻¹ W^½ G D⁻¹ = E`` as rows: F⁻¹ = D⁻¹ - Eᵀ E."""
        self._check_current()
        if self._transformed is None:
            identity = torch.eye(self.num_rows, dtype=torch.float64, device=self.device)
            inverse = torch.linalg.solve_triangular(self._cholesky, identity, upper=False)
            self._transformed = self._rows.transformed(self._D.scale * inverse * self._root, self._D.divisor)
        return self._transformed

    def _column(self, i: int) -> tuple[Tensor, int]:
        """Column i of the matrix above, ``(m,)``, and its block."""
        if not 0 <= i < self.size:
            raise ValueError(f"LowRankInverse has elements 0 to {self.size - 1} in each direction; got {i}.")
        return self._elements().column(i)

    def _as_block(self, name: str, v: Tensor, size: int, dtype: torch.dtype, refine: int = 0) -> Tensor:
        self._check_current()
        check_count(f"LowRankInverse.{name}", "refine", refine, at_least=0)
        if v.ndim not in (1, 2) or v.shape[-1] != size or v.device != self.device or v.dtype != dtype:
            raise ValueError(
                f"LowRankInverse.{name} needs shape ({size},) or (k, {size}) in {dtype} on {self.device}; got"
                f" {tuple(v.shape)} in {v.dtype} on {v.device}."
            )
        return v.detach().reshape(-1, size)

    def _check_current(self) -> None:
        if self._rows.version != self._version:
            raise RuntimeError(
                "the rows have changed since this inverse was made: ask for window.inverse() again, or make another"
                " LowRankInverse. Give it rows.clone() if their memory, or a part of it, is written to in between."
            )


def _checked_weight(weight: float | Tensor, rows: SplitRows) -> float | Tensor:
    values = torch.as_tensor(weight, dtype=torch.float64)
    if values.ndim > 0 and (values.shape != (rows.num_rows,) or values.device != rows.device):
        raise ValueError(
            f"weight must be a number or ({rows.num_rows},) on {rows.device}; got {tuple(values.shape)} on"
            f" {values.device}."
        )
    if not ((values >= 0) & values.isfinite()).all():
        raise ValueError(f"weights must be finite and not negative; got values down to {float(values.min())}.")
    return values.detach() if values.ndim > 0 else float(values)
