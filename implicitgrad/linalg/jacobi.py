"""Preconditioning by the diagonal."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, require_symmetric
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.preconditioner import Preconditioner
from implicitgrad.linalg.trace import diagonal

# Fewer probes leave errors in the diagonal as large as the diagonal.
FEWEST_PROBES = 16


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    r"""P = D⁻¹ with the diagonal D of A: the remedy for unknowns of different scale.

    With the exact diagonal no rescaling of the unknowns changes the number of iterations. It costs n products, or none
    where `A.to_dense` has been called before. An estimate costs `num_probes` products: the mean of $z \odot A z$ over
    random signs z, whose error in entry i has the variance $\sum_{j \neq i} A_{ij}^2 / m$. Entries that are lost in
    that noise count as large as it, so that a small entry is never mistaken for a tiny one.

    Entries enter by their absolute values, and none below `A.eigenvalue_floor`, which no true diagonal entry falls
    below, or below eps² times the largest, which only keeps an empty row from a division by zero.

    Source: Saad, Iterative Methods (2003), section 10.2; the estimate is that of Bekas, Kokiopoulou and Saad (2007).
    The floor at the standard error is this library's.

    Args:
        num_probes: products spent on an estimate, at least 16; None for the exact diagonal.
        seed: of the random signs.

    Raises:
        ValueError: fewer than 16 probes; in `build`, an operator that is not declared symmetric.

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[4.0, 1.0], [1.0, 2.0]]), symmetric=True, definite=True)
        >>> Jacobi().build(A)(torch.ones(2))
        tensor([0.2500, 0.5000])
    """

    num_probes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("Jacobi", "num_probes", self.num_probes, at_least=FEWEST_PROBES)

    def build(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        require_symmetric("Jacobi", A, "GMRES without a preconditioner")
        if self.num_probes is None:
            size = diagonal(A, exact=True).value.abs()
        else:
            value, error, _ = diagonal(A, self.num_probes, torch.Generator(A.device).manual_seed(self.seed))
            size = torch.maximum(value.abs(), error)
        floor = torch.finfo(A.dtype).eps ** 2 * size.amax(-1, keepdim=True)
        size = torch.maximum(size, floor.clamp(min=max(A.eigenvalue_floor or 0.0, 0.0)))
        size = torch.where(size > 0, size, 1).to(A.dtype)  # 1 for A = 0
        return lambda r: r / size

    def cost(self, A: LinearOperator) -> int:
        if self.num_probes is not None:
            return self.num_probes
        return A.size if A.without_graph() is None else 0
