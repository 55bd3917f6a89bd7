"""Gradient descent with a line search."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.conditions import Stationary
from implicitgrad.linalg import LinearSolver
from implicitgrad.solvers.line_search import backtrack
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree

# Barzilai-Borwein steps are kept within these factors of the last one that the curvature confirmed.
LONGEST_STEP, SHORTEST_STEP = 1e10, 1e-10


@dataclass(frozen=True)
class GradientDescent(InnerSolver):
    r"""Minimises a smooth loss by gradient steps of Barzilai-Borwein length, safeguarded by a line search.

    With $s = y_k - y_{k-1}$ and $z = \nabla f(y_k) - \nabla f(y_{k-1})$ the trial step is $s^\top s / s^\top z$, the
    inverse of the curvature just seen; it is halved until the loss falls sufficiently below the largest of the last
    `memory` values. Converges to a stationary point where the loss is bounded below and has a Lipschitz gradient. Costs
    one gradient and one value per iteration, rarely more values, and four vectors of memory; two or three numbers are
    read from the device per iteration.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, differentiable in y.
        tol: Largest gradient norm that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Gradient steps.
        memory: Values that a new one is compared with. 1 makes every step a descent (Armijo's rule), which costs
            Barzilai-Borwein steps much of their speed.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Source: Barzilai and Borwein (1988); Raydan (1997), the global Barzilai and Borwein method, with its nonmonotone
    line search of Grippo, Lampariello and Lucidi (1986). Departures: halving in place of interpolation; where the
    curvature is not positive the step is ten times the last one; ten roundings of the loss are allowed.

    Raises:
        TypeError: `loss` is no function.
        ValueError: a hyperparameter out of range; in a run, a loss that does not depend on y.
        FloatingPointError: in a run, NaN or infinity in the loss or its gradient.

    Example:
        >>> import torch
        >>> solver = GradientDescent(lambda x, y: (y - x).square().sum() + y.square().sum())
        >>> x = torch.tensor([2.0, 4.0], requires_grad=True)
        >>> y, info = solver(x, init=torch.zeros(2))
        >>> torch.autograd.grad(y.sum(), x)[0], info.converged
        (tensor([0.5000, 0.5000]), True)
    """

    loss: Callable[..., Tensor]
    tol: float | None = None
    max_iter: int = 1000
    memory: int = 10
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("GradientDescent", self.loss, self.tol, self.max_iter)
        if not (isinstance(self.memory, int) and self.memory >= 1):
            raise ValueError(f"GradientDescent(memory=...) needs an integer of at least 1; got {self.memory!r}.")

    @property
    def condition(self) -> Stationary:
        """The gradient of the loss vanishes."""
        return Stationary(self.loss)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        objective = Objective("GradientDescent", self.loss, x, init, data)
        y, tol, reason = objective.start, tolerance(self.tol, objective.start.dtype), "max_iter reached"
        loss, gradient = objective.value_and_gradient(y)
        value, norm = objective.checked(loss, gradient)
        recent = deque([value], maxlen=self.memory)
        step, num_iter = 1.0 / max(norm, 1.0), 0
        while norm > tol and num_iter < self.max_iter:
            found = backtrack(objective.value, y, -gradient, reference=max(recent), slope=-(norm**2), step=step)
            if found is None:
                reason = "precision floor: no step along the gradient decreases the loss"
                break
            num_iter += 1
            moved = y - found * gradient
            loss, new = objective.value_and_gradient(moved)
            step = _trial_step(moved - y, new - gradient, found)
            y, gradient = moved, new
            value, norm = objective.checked(loss, gradient)
            recent.append(value)
        return objective.outcome(y, num_iter=num_iter, residual_norm=norm, tol=tol, reason=reason, value=value)


def _trial_step(s: Tensor, z: Tensor, last: float) -> float:
    """`sᵀs / sᵀz`, or a longer step than the last where the curvature is not positive."""
    square, curvature = torch.stack([s @ s, s @ z]).tolist()
    step = square / curvature if curvature > 0 else 10 * last
    return min(max(step, SHORTEST_STEP), LONGEST_STEP) if math.isfinite(step) else last
