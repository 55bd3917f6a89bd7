"""Linear systems restricted to the support of a sparse or bounded solution.

Outside of the support S a residual is ``yᵢ - const``, so ``A = ∂r/∂y`` has unit rows there: with S first,
``A = [A_SS, A_SN; 0, I]``. Only A_SS has to be solved with: ``A u = b`` by ``u_N = b_N`` and
``A_SS u_S = b_S - A_SN b_N``, the transposed ``Aᵀu = v`` by ``A_SSᵀ u_S = v_S`` and ``u_N = v_N - A_SNᵀ u_S``.

Source: Bertrand et al. (2022), "Implicit differentiation for fast hyperparameter selection in non-smooth convex
learning", section 3.
"""

from dataclasses import replace

import torch
from torch import Tensor

from implicitgrad.linalg import AsymmetryError, LinearOperator, LinearSolver, Solution
from implicitgrad.linalg.symmetry import symmetry_tolerance


class Restriction:
    """The systems with A and Aᵀ by way of A_SS.

    Args:
        A: The whole matrix.
        mask: Which coordinates are in the support, booleans `(*batch_shape, n)`.
        symmetric: Declares A_SS symmetric; tested with two products, but for a stack.

    Raises:
        AsymmetryError: A_SS is not symmetric.
    """

    def __init__(self, A: LinearOperator, mask: Tensor, symmetric: bool) -> None:
        self.size = int(mask.sum(-1).max())
        self._A, self._mask = A, mask
        # one system: the submatrix. A stack of systems, each with a support of its own: unit rows and columns outside
        self._index = None if A.batch_shape else mask.nonzero().squeeze(-1)
        self._inner: LinearOperator | None = None
        if self.size:
            self._inner = self._submatrix(symmetric) if self._index is not None else self._masked(symmetric)

    def solve(self, solver: LinearSolver, b: Tensor, transposed: bool, start: Tensor | None) -> Solution:
        """`A⁻¹b` or `A⁻ᵀb` for `b` of shape `(*batch_shape, n)` or `(k, *batch_shape, n)`."""
        outside = torch.where(self._mask, 0, b)
        right = b if transposed or not outside.any() else b - (self._A @ outside).detach()
        solution = self._solve_inside(solver, right, transposed, start)
        if transposed:
            outside = torch.where(self._mask, 0, b - (self._A.T @ solution.value).detach())
        return replace(solution, value=solution.value + outside, ritz_min=None, ritz_max=None, energy_error=None)

    def _solve_inside(self, solver: LinearSolver, b: Tensor, transposed: bool, start: Tensor | None) -> Solution:
        """On the support; zero outside."""
        if self._inner is None:
            norm = torch.zeros(b.shape[:-1], dtype=b.dtype, device=b.device)
            return Solution(torch.zeros_like(b), norm, norm, 0, 0, True, "empty support", "Restriction", 0)
        operator = self._inner.T if transposed else self._inner
        if self._index is None:
            start = None if start is None else torch.where(self._mask, start, 0)
            return solver.solve(operator, torch.where(self._mask, b, 0), start)
        start = None if start is None else start.index_select(-1, self._index)
        solution = solver.solve(operator, b.index_select(-1, self._index), start)
        return replace(solution, value=torch.zeros_like(b).index_copy(-1, self._index, solution.value))

    def _submatrix(self, symmetric: bool) -> LinearOperator:
        assert self._index is not None
        part = self._A.restricted(self._index)
        if not symmetric or part.symmetric:
            return part
        defect = part.symmetry_defect()
        if not defect <= max(symmetry_tolerance(part.dtype), 10 * part.noise):
            raise AsymmetryError(
                "the condition declares symmetric_on_support, but its Jacobian there is not symmetric: <u, Av> and"
                f" <v, Au> differ by {defect:.1e} relative to their size; leave that declaration out"
            )
        return _declared_symmetric(part)

    def _masked(self, symmetric: bool) -> LinearOperator:
        A, mask = self._A, self._mask

        def product(factor: LinearOperator):
            return lambda v: torch.where(mask, factor @ torch.where(mask, v, 0), v)

        def dense() -> Tensor:
            inside = mask.unsqueeze(-1) & mask.unsqueeze(-2)
            return torch.where(inside, A.to_dense(), torch.eye(A.size, dtype=A.dtype, device=A.device))

        return LinearOperator(
            product(A),
            A.size,
            rmatvec=product(A.T),
            matmat=product(A),
            rmatmat=product(A.T),
            dense=dense,
            dense_cost=A.dense_cost,
            symmetric=symmetric or A.symmetric,
            noise=A.noise,
            dtype=A.dtype,
            device=A.device,
            batch_shape=A.batch_shape,
        )


def _declared_symmetric(A: LinearOperator) -> LinearOperator:
    product = lambda v: A.T @ v  # the reverse product is the cheaper one
    return LinearOperator(
        product,
        A.size,
        matmat=product,
        dense=A.to_dense,
        dense_cost=A.dense_cost,
        noise=A.noise,
        symmetric=True,
        dtype=A.dtype,
        device=A.device,
    )
