"""A loss as a run of a solver sees it: a function of flat vectors, evaluated in isolation and counted."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure, tree
from implicitgrad.curvature.point import Point
from implicitgrad.linalg import LinearSolver
from implicitgrad.report import check_finite
from implicitgrad.solvers.solver import SolverInfo
from implicitgrad.tree import Tree


class Objective:
    """`flat y ↦ loss(x, y, *data)` with everything but y held fixed.

    User code sees the same random state in each evaluation, so dropout is one mask, and module buffers come back
    unchanged; the condition at the solution is evaluated in the same way.

    Args:
        name: Of the solver, for errors.
        loss: `loss(x, y, *data)`, a scalar tensor.
        x: Upper variable; detached.
        init: Tree of floating point tensors like y, n numbers.
        data: Further arguments; detached.

    Attributes:
        start: `init` as a vector `(n,)` of its own.
        unravel: From vectors to trees like y.
        constants: `(x, *data)`, detached.
        num_evaluations: Evaluations so far.

    Raises:
        TypeError: a leaf of init is no floating point tensor, or dtypes differ.
        ValueError: init is empty, or on several devices.
        FloatingPointError: NaN or infinity in init.
        RuntimeError: inside `torch.inference_mode`.
    """

    def __init__(self, name: str, loss: Callable[..., Tensor], x: Tree, init: Tree, data: tuple[Tree, ...]) -> None:
        self._point = Point(name, init, loss, x, data)
        check_finite(self._point.flat, f"{name}: init")
        self._loss = loss
        self.constants = tree.map(closure.without_derivative, (x, *data))
        self.start, self.unravel = self._point.flat, self._point.unravel
        self.num_evaluations = 0

    @property
    def name(self) -> str:
        """Name of the solver."""
        return self._point.name

    def evaluate(self, fn: Callable[..., Any], y: Tree) -> Any:
        """`fn(x, y, *data)` in isolation, with gradients enabled."""
        self.num_evaluations += 1
        x, *data = self.constants
        with torch.enable_grad(), self._point.isolation():
            return fn(x, y, *data)

    def value(self, flat: Tensor) -> Tensor:
        """The loss, 0-dimensional, without a graph; NaN and infinity pass."""
        return tree.scalar(self.evaluate(self._loss, self.unravel(flat))).detach()

    def value_and_gradient(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient `(n,)`, without a graph; NaN and infinity pass.

        Raises:
            ValueError: the loss is no scalar, or does not depend on y.
        """
        leaf = flat.detach().requires_grad_()
        value = tree.scalar(self.evaluate(self._loss, self.unravel(leaf)))
        with self._point.isolation():  # checkpointed blocks run again here
            gradient = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
        if gradient is None:
            raise ValueError("the loss does not depend on y; check the order of arguments: (x, y, *data)")
        return value.detach(), gradient

    def checked(self, value: Tensor, gradient: Tensor) -> tuple[float, float]:
        """Value and norm of the gradient as numbers; one transfer from the device.

        Raises:
            FloatingPointError: NaN or infinity in either.
        """
        numbers = torch.stack([value.double(), torch.linalg.vector_norm(gradient).double()]).tolist()
        if not all(map(math.isfinite, numbers)):
            raise FloatingPointError(
                f"{self.name}: loss {numbers[0]} and gradient norm {numbers[1]} at evaluation {self.num_evaluations}; "
                "check init and the data for NaN, and the loss for overflow, log(0) or a division by zero; where it "
                "diverged, take smaller steps"
            )
        return numbers[0], numbers[1]

    def outcome(
        self,
        flat: Tensor,
        *,
        num_iter: int,
        residual_norm: float,
        tol: float,
        reason: str,
        value: float | None,
        linear_solver: LinearSolver | None = None,
    ) -> tuple[Tree, SolverInfo]:
        """What a run returns, with `flat` as y."""
        converged = residual_norm <= tol
        reason = "converged" if converged else reason
        info = SolverInfo(num_iter, residual_norm, converged, reason, self.num_evaluations, value, linear_solver)
        return self.unravel(flat), info


def tolerance(tol: float | None, dtype: torch.dtype) -> float:
    """`tol`, or where none is given 1e-8 in float64, 1e-5 in float32, 1e-2 below."""
    return {torch.float64: 1e-8, torch.float32: 1e-5}.get(dtype, 1e-2) if tol is None else tol


def check_hyperparameters(name: str, function: object, tol: float | None, max_iter: int) -> None:
    """Refuse what no solver can take.

    Raises:
        TypeError: `function` is none.
        ValueError: a tolerance that is not positive and finite (None passes), or a count of iterations below one.
    """
    if not callable(function):
        raise TypeError(f"{name} needs a function of (x, y, *data), got {type(function).__name__}")
    if tol is not None and not (isinstance(tol, (int, float)) and 0 < tol < math.inf):
        raise ValueError(f"{name}(tol=...) needs a positive number, or None for the dtype's own; got {tol!r}.")
    if not (isinstance(max_iter, int) and max_iter >= 1):
        raise ValueError(f"{name}(max_iter=...) needs an integer of at least 1; got {max_iter!r}.")
