"""Solves by an inverse that the operator itself knows."""

from dataclasses import dataclass

from torch import Tensor

from implicitgrad.linalg.checks import check_rtol, check_system, default_rtol
from implicitgrad.linalg.dense import apply_inverse
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.solver import LinearSolver, Solution, zero_solution


@dataclass(frozen=True)
class KnownInverse(LinearSolver):
    """Solves with an operator that knows its inverse: low rank plus identity, Kronecker factors.

    The operators of `LowRankInverse` (Woodbury's identity), of K-FAC (the eigenbasis of its factors) and of the exact
    Gauss-Newton matrix know theirs for every damping. The answer is measured by a product with A and refined once where
    it misses `rtol`: rounding in Woodbury's identity grows with the largest eigenvalue over the damping. Costs two
    applications of the inverse and two products at most; `x0` is not used.

    Source: Woodbury (1950), "Inverting modified matrices"; refinement as in Golub and Van Loan, section 3.5.3.

    Args:
        rtol: decides about `Solution.converged` and the refinement; None for 1e-10 in float64, 1e-5 in float32.

    Raises:
        ValueError: `rtol` out of range; in `solve`, an operator that knows no inverse (use Auto).

    Example:
        >>> import torch
        >>> half = lambda lam: lambda v: v / (2 + lam)
        >>> A = LinearOperator(
        ...     lambda v: 2 * v, 3, symmetric=True, shifted_inverse=half, dtype=torch.float32, device="cpu"
        ... )
        >>> KnownInverse().solve(A.damped(2.0), torch.ones(3)).value
        tensor([0.2500, 0.2500, 0.2500])
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        check_rtol("KnownInverse", self.rtol)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        inverse = A.known_inverse
        if inverse is None:
            raise ValueError(
                f"KnownInverse needs a definite operator that knows its inverse (low rank, K-FAC, exact Gauss-Newton,"
                f" each with positive damping: A.damped(...)); got {A}. Use Auto for others."
            )
        system = check_system("KnownInverse", A, b, x0)
        if system.zero:
            return zero_solution("KnownInverse", system)
        rtol = default_rtol(A) if self.rtol is None else self.rtol
        return apply_inverse(
            "KnownInverse", system, A, lambda rows: inverse(rows).detach(), rtol, num_matvec=0, memory=0
        )
