"""How far a hypergradient can be from the truth."""

import math
from dataclasses import dataclass

from implicitgrad.linalg import ErrorBound


@dataclass(frozen=True)
class Certificate:
    """Bounds on the error of `h = ∇ₓF - Bᵀu`, one for each thing that was solved inexactly.

    Attributes:
        adjoint: From `u`: `‖B‖ ‖A⁻¹‖ ‖s - Aᵀu‖` with `Aᵀu = s`, at the given `y`; or dual-weighted. None where nothing
            is known about `‖A⁻¹‖`, or `B` cannot be multiplied with.
        inner: From `y`: `lipschitz · ‖residual‖ / strong_convexity`. None without these two constants.
        missing: What would have to be known for the bounds that are None.
    """

    adjoint: ErrorBound | None
    inner: ErrorBound | None
    missing: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        """The sum of both bounds; infinite if one is missing."""
        return sum(part.value if part else math.inf for part in (self.adjoint, self.inner))

    @property
    def rigorous(self) -> bool:
        """Whether `bound` is proven, up to rounding and the constants that you supplied."""
        return all(part is not None and part.rigorous for part in (self.adjoint, self.inner))

    def __str__(self) -> str:
        parts = [f"{name} {part}" for name, part in (("adjoint", self.adjoint), ("inner", self.inner)) if part]
        return "; ".join([*parts, *(f"not certified: {what}" for what in self.missing)])
