"""What is declared about a matrix, and what follows for sums, products and parts of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from implicitgrad.linalg.matrix import Product

# lam -> product with (A + lam I)⁻¹ on tensors (..., n)
ShiftedInverse = Callable[[float], Product]


@dataclass(frozen=True)
class Structure:
    """Declared facts about a matrix A.

    Attributes:
        symmetric: A = Aᵀ.
        definite: symmetric positive definite.
        eigenvalue_floor: a proven lower bound on the eigenvalues of a symmetric A, None if there is none.
        shifted_inverse: the product with (A + lam I)⁻¹ for any lam that leaves it definite, if A knows it.
        noise: relative error of the products beyond rounding.

    Raises:
        ValueError: `definite`, `eigenvalue_floor` or `shifted_inverse` without `symmetric`; a floor that is not finite.
    """

    symmetric: bool = False
    definite: bool = False
    eigenvalue_floor: float | None = None
    shifted_inverse: ShiftedInverse | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.definite and not self.symmetric:
            raise ValueError("definite=True declares a symmetric positive definite operator; pass symmetric=True too.")
        if self.shifted_inverse is not None and not self.symmetric:
            raise ValueError("shifted_inverse=... is read for symmetric operators only; pass symmetric=True too.")
        if self.eigenvalue_floor is None:
            if self.definite:
                object.__setattr__(self, "eigenvalue_floor", 0.0)
            return
        if not self.symmetric or not math.isfinite(self.eigenvalue_floor):
            raise ValueError(
                f"eigenvalue_floor={self.eigenvalue_floor} bounds the eigenvalues of a symmetric operator: pass a"
                f" finite number and symmetric=True."
            )
        object.__setattr__(self, "definite", self.definite or self.eigenvalue_floor > 0)

    def without_inverse(self) -> "Structure":
        """The same without a known inverse; also that of any principal submatrix (Cauchy's interlacing theorem)."""
        return replace(self, shifted_inverse=None)

    @property
    def inverse(self) -> Product | None:
        """The product with A⁻¹, where it is known and A is not known to lack one."""
        floor = self.eigenvalue_floor
        if self.shifted_inverse is None or (floor is not None and floor <= 0 and not self.definite):
            return None
        return self.shifted_inverse(0.0)


def combined(scales: Sequence[float], terms: Sequence[Structure], shift: float) -> Structure:
    """Structure of Σ cᵢ Aᵢ + shift · I."""
    symmetric = all(term.symmetric for term in terms)
    floors = [
        scale * term.eigenvalue_floor
        for scale, term in zip(scales, terms, strict=True)
        if scale >= 0 and term.eigenvalue_floor is not None
    ]
    floor, definite = None, False
    if symmetric and len(floors) == len(terms):
        floor = sum(floors) + shift
        some_definite = any(term.definite and scale > 0 for scale, term in zip(scales, terms, strict=True))
        definite = floor > 0 or shift >= 0 and min(floors) >= 0 and some_definite
    inverse = _scaled_inverse(scales[0], terms[0], shift) if len(terms) == 1 else None
    return Structure(symmetric, definite, floor, inverse, max(term.noise for term in terms))


def composed(left: Structure, right: Structure, gram: bool) -> Structure:
    """Structure of A B; with `gram`, A is the transpose of B."""
    return Structure(symmetric=gram, eigenvalue_floor=0.0 if gram else None, noise=left.noise + right.noise)


def _scaled_inverse(scale: float, term: Structure, shift: float) -> ShiftedInverse | None:
    """lam -> (c A + (shift + lam) I)⁻¹ = (A + (shift + lam) / c I)⁻¹ / c."""
    known = term.shifted_inverse
    if known is None or not scale > 0:
        return None

    def inverse(lam: float) -> Product:
        product = known((shift + lam) / scale)
        return product if scale == 1.0 else lambda v: product(v) / scale

    return inverse
