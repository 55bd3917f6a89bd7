"""Linear systems of quadratic programs by the factors that the last step of a solver leaves behind."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg import Auto, LinearOperator, LinearSolver, Solution
from implicitgrad.linalg.checks import check_system, default_rtol
from implicitgrad.linalg.dense import apply_inverse
from implicitgrad.linalg.solver import zero_solution


@dataclass(frozen=True, eq=False)
class ActiveSetFactor(LinearSolver):
    """Solves systems of `QP` at one solution by factors made there, without another factorisation.

    The matrices are `[Q, Aᵀ, G_activeᵀ; A, 0, 0; G_active, 0, 0]` with unit rows and columns for inactive inequalities,
    so that they serve systems on the support, too. The residual is measured with a product of A; where it is above
    `rtol` after one refinement, since A belongs to another problem or another active set, `Auto` takes over.

    Args:
        inverse: ``b -> K⁻¹ b`` for `(B, N, k)` columns; infinite or NaN where a matrix is singular.
        active: Which inequalities are active, `(B, m)`; their multipliers are the last of the N unknowns.
        size: N.
        dtype: Of the factors.
        nbytes: Memory of the factors.
        rtol: As in `LU`.
    """

    inverse: Callable[[Tensor], Tensor]
    active: Tensor
    size: int
    dtype: torch.dtype
    nbytes: int
    rtol: float | None = None

    @classmethod
    def of(cls, matrices: Tensor, active: Tensor) -> "ActiveSetFactor":
        """By LU factors of the matrices `(B, N, N)`."""
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrices)
        inverse = lambda columns: torch.linalg.lu_solve(factors, pivots, columns)
        return cls(inverse, active, matrices.shape[-1], factors.dtype, factors.nbytes)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        system = check_system("ActiveSetFactor", A, b, x0)
        if system.zero:
            return zero_solution("ActiveSetFactor", system)
        if self._fits(A):
            rtol = default_rtol(A) if self.rtol is None else self.rtol
            try:
                solution = apply_inverse(
                    "ActiveSetFactor", system, A, self._rows, rtol, num_matvec=0, memory=self.nbytes
                )
            except FloatingPointError:  # singular
                return Auto(self.rtol).solve(A, b, x0)
            if solution.converged:
                return solution
        return Auto(self.rtol).solve(A, b, x0)

    def _fits(self, A: LinearOperator) -> bool:
        systems = torch.Size(A.batch_shape).numel()
        sizes = {self.size} if A.batch_shape else {self.size, len(self._support())}
        return (A.dtype, A.device, systems) == (self.dtype, self.active.device, len(self.active)) and A.size in sizes

    def _support(self) -> Tensor:
        """Of a single system: positions of unknowns other than multipliers of inactive inequalities."""
        inactive = (~self.active[0]).nonzero().squeeze(-1) + self.size - self.active.shape[-1]
        inside = torch.ones(self.size, dtype=torch.bool, device=self.active.device).index_fill(0, inactive, False)
        return inside.nonzero().squeeze(-1)

    def _rows(self, rows: Tensor) -> Tensor:
        """The inverse on `(..., *batch_shape, N)`, or on vectors of the support."""
        if rows.shape[-1] == self.size:
            columns = rows.reshape(-1, len(self.active), self.size).movedim(0, -1)
            return self.inverse(columns).movedim(-1, 0).reshape(rows.shape)
        index = self._support()
        padded = rows.new_zeros(*rows.shape[:-1], self.size).index_copy(-1, index, rows)
        return self._rows(padded).index_select(-1, index)
