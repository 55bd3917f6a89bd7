"""What a preconditioner of conjugate gradients is, and the form that most of them have."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from implicitgrad.linalg.operator import LinearOperator

# Eigenvalues of P below this many units in the last place of its largest drown in the rounding of P r.
SMALLEST_EIGENVALUE = 100.0


class Preconditioner(ABC):
    """A recipe for a cheap stand-in P for A⁻¹. Immutable: all fields are hyperparameters.

    `CG` accepts a recipe or the finished function ``r -> P r``. A recipe is carried out once per operator, through
    ``A.remember(recipe, lambda: recipe.build(A))``, and serves all solves with that operator; `Recycling` carries the
    result from one operator to the next and drops what does not pay.

    Operators that know their own inverse make preconditioners without a recipe: for an approximation B of A from K-FAC
    or low rank rows, pass ``B.damped(lam).known_inverse``.
    """

    @abstractmethod
    def build(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        """The function ``r -> P r`` on ``(..., *batch_shape, n)``, with P symmetric positive definite.

        It leaves r unchanged, records no autograd graph and holds no reference to A.

        Args:
            A: a symmetric operator; products are made with it here and never afterwards.

        Raises:
            ValueError: the recipe cannot take this kind of operator.
            FloatingPointError: NaN or infinity in a product with A.
        """

    @abstractmethod
    def cost(self, A: LinearOperator) -> int:
        """Products with A that `build` spends."""


def check_preconditioner(name: str, preconditioner: object) -> None:
    """Refuse what is neither a function nor a recipe; None passes.

    Args:
        name: class name of the solver, for messages.
        preconditioner: what the caller gave.

    Raises:
        ValueError: with the type, and the way out for those that come close.
    """
    if preconditioner is None or isinstance(preconditioner, Preconditioner):
        return
    if isinstance(preconditioner, type):
        got = f"the class {preconditioner.__name__}; pass an instance, as in Jacobi()"
    elif isinstance(preconditioner, LinearOperator):
        got = f"{preconditioner}; pass its .known_inverse, or lambda r: P @ r if it stands for the inverse itself"
    elif isinstance(preconditioner, Tensor):
        got = "Tensor; pass lambda r: r @ P for a symmetric matrix P close to the inverse"
    elif callable(preconditioner):
        return
    else:
        got = type(preconditioner).__name__
    raise ValueError(f"{name}(preconditioner=...) needs a function r -> z, or a recipe like Jacobi(); got {got}.")


def spectral_form(basis: Tensor, eigenvalues: Tensor, bulk: Tensor) -> Callable[[Tensor], Tensor]:
    """``r -> U diag(eigenvalues)⁻¹ Uᵀ r + (r - U Uᵀ r) / bulk``: the inverse of a matrix with a flat rest.

    Costs two passes over U. Eigenvalues above ``bulk / (100 eps)`` count as that: what they leave of r is smaller than
    the rounding of the difference in parentheses, which must not spoil the sign.

    Args:
        basis: U as orthonormal rows, ``(*batch_shape, k, n)``.
        eigenvalues: positive, ``(*batch_shape, k)``.
        bulk: the eigenvalue of the rest, positive, ``(*batch_shape, 1)``.
    """
    limit = SMALLEST_EIGENVALUE * torch.finfo(basis.dtype).eps
    ratio = (bulk / eigenvalues).clamp(min=limit)
    excess, scale = ((ratio - 1) / bulk).to(basis.dtype), (1 / bulk).to(basis.dtype)
    if basis.ndim == 2:
        return lambda r: torch.addcmul((r @ basis.mT * excess) @ basis, r, scale)
    return lambda r: torch.addcmul(_by_system(_by_system(r, basis.mT) * excess, basis), r, scale)


def _by_system(rows: Tensor, matrices: Tensor) -> Tensor:
    """``(..., *batch, n)`` times ``(*batch, n, k)``."""
    return (rows.unsqueeze(-2) @ matrices).squeeze(-2)
