"""The way between torch trees and the vectors of SciPy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.curvature import jacobian
from implicitgrad.optional import require
from implicitgrad.report import check_finite
from implicitgrad.solvers.bounds import Bounds, flat_bounds
from implicitgrad.solvers.objective import Objective, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree


class Bridge:
    """One problem between torch trees and SciPy's vectors, and what a run returns.

    Attributes:
        scipy: The module `scipy.optimize`.
        objective: The user's function.
        tol: What the norm of the residual has to meet.
        limits: Bounds as vectors; None if there are none.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Tree],
        solver: InnerSolver,
        tol: float | None,
        bounds: Bounds | None,
        x: Tree,
        init: Tree,
        data: tuple[Tree, ...],
    ) -> None:
        self.scipy = require("scipy.optimize", extra="scipy")
        self.objective = Objective(name, function, x, init, data)
        self.tol = tolerance(tol, self.objective.start.dtype)
        start = self.objective.start
        point = self.objective.unravel(start)
        self.limits = None if bounds is None else flat_bounds(bounds, point, *self.objective.constants)
        self._start = start if self.limits is None else start.clamp(*self.limits)
        self._condition = solver.condition

    def run(self, solve: Callable[[Tensor], Any], value: Callable[[Tensor], float | None]) -> tuple[Tree, SolverInfo]:
        """Call SciPy unless the start solves the problem; measure where it ends."""
        norm = self._residual_norm(self._start)
        if norm <= self.tol:
            return self._outcome(self._start, norm, 0, "converged", value)
        result = solve(self._start)
        y = self.vector(result.x)
        num_iter = int(result.get("nit", result.get("nfev", 0)))
        return self._outcome(y, self._residual_norm(y), num_iter, f"SciPy: {result.message}", value)

    def _outcome(
        self, y: Tensor, norm: float, num_iter: int, reason: str, value: Callable[[Tensor], float | None]
    ) -> tuple[Tree, SolverInfo]:
        return self.objective.outcome(
            y, num_iter=num_iter, residual_norm=norm, tol=self.tol, reason=reason, value=value(y)
        )

    def _residual_norm(self, flat: Tensor) -> float:
        y = self.objective.unravel(flat)
        residual = tree.ravel_like(y, self.objective.evaluate(self._condition.residual, y)).detach()
        check_finite(residual, f"{self.objective.name}: the residual")
        return torch.linalg.vector_norm(residual).item()

    def values_of(self, fn: Callable[..., Tensor]) -> Callable[[Any], Any]:
        """`fn(x, y, *data)` as a function of SciPy's vectors."""
        return lambda point: array(self.objective.evaluate(fn, self.objective.unravel(self.vector(point))))

    def jacobian_of(self, fn: Callable[..., Tensor]) -> Callable[[Any], Any]:
        """Its Jacobian matrix as such a function."""

        def matrix(point: Any) -> Any:
            self.objective.num_evaluations += 1
            y, (x, *data) = self.objective.unravel(self.vector(point)), self.objective.constants
            return array(jacobian(lambda y, x, *data: fn(x, y, *data), y, x, *data, check=False).to_dense())

        return matrix

    def vector(self, point: Any) -> Tensor:
        """A vector of SciPy, which it may use again, as a tensor."""
        return torch.tensor(point, dtype=self.objective.start.dtype, device=self.objective.start.device)


def array(tensor: Tensor) -> Any:
    """A tensor as SciPy takes it: NumPy, float64."""
    return tensor.detach().double().cpu().numpy()
