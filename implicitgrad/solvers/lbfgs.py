"""Limited-memory quasi-Newton."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.conditions import Stationary
from implicitgrad.linalg import LinearSolver
from implicitgrad.solvers.line_search import wolfe
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree

Pair = tuple[Tensor, Tensor, Tensor]  # s, z and 1 / sᵀz


@dataclass(frozen=True)
class LBFGS(InnerSolver):
    r"""Minimises a smooth loss by limited-memory quasi-Newton steps.

    $y \leftarrow y - t H \nabla f(y)$ where H approximates the inverse Hessian by the last `history_size` pairs of
    steps s and gradient changes z, on top of $s^\top z / z^\top z$ times the identity; t meets the weak Wolfe
    conditions. The method of choice for smooth losses of many variables. Costs one gradient per iteration, rarely more,
    and `2 history_size` vectors of memory; a few numbers are read from the device per iteration. For bounds see
    `ScipyMinimize`, whose L-BFGS-B keeps them.

    `torch.optim.LBFGS` does not serve here: its line search compares values to the last bit, so that it stalls at
    gradient norms of 5e-9 for two variables and 6e-8 for 2000, where this one reaches 1e-11.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, differentiable in y.
        tol: Largest gradient norm that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Quasi-Newton steps.
        history_size: Pairs of steps and gradient changes that make up the curvature.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Source: Liu and Nocedal (1989); Nocedal and Wright (2006), algorithm 7.5. Departures: the line search, see `wolfe`;
    where it fails the history is dropped and a gradient step taken.

    Raises:
        TypeError: `loss` is no function.
        ValueError: a hyperparameter out of range; in a run, a loss that does not depend on y.
        FloatingPointError: in a run, NaN or infinity in the loss or its gradient; steps that leave the domain of a
            loss are shortened.

    Example:
        >>> import torch
        >>> solver = LBFGS(lambda x, y: torch.cosh(y - x).sum())
        >>> x = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> y, info = solver(x, init=torch.zeros(2))
        >>> torch.autograd.grad(y.sum(), x)[0].round(decimals=3), info.converged
        (tensor([1., 1.]), True)
    """

    loss: Callable[..., Tensor]
    tol: float | None = None
    max_iter: int = 1000
    history_size: int = 20
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("LBFGS", self.loss, self.tol, self.max_iter)
        if not (isinstance(self.history_size, int) and self.history_size >= 1):
            raise ValueError(f"LBFGS(history_size=...) needs an integer of at least 1; got {self.history_size!r}.")

    @property
    def condition(self) -> Stationary:
        """The gradient of the loss vanishes."""
        return Stationary(self.loss)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        objective = Objective("LBFGS", self.loss, x, init, data)
        y, tol, reason = objective.start, tolerance(self.tol, objective.start.dtype), "max_iter reached"
        loss, gradient = objective.value_and_gradient(y)
        value, norm = objective.checked(loss, gradient)
        pairs: deque[Pair] = deque(maxlen=self.history_size)
        num_iter = 0
        while norm > tol and num_iter < self.max_iter:
            direction = _direction(pairs, gradient)
            slope, first = (gradient @ direction).item(), 1.0 if pairs else 1 / norm
            found = wolfe(objective.value_and_gradient, y, direction, reference=value, slope=slope, step=first)
            if found is None and pairs:
                pairs.clear()
                continue
            if found is None:
                reason = "precision floor: no step along the gradient decreases the loss"
                break
            num_iter += 1
            step, loss, new = found
            pairs.extend(_pair(step * direction, new - gradient))
            y, gradient = y + step * direction, new
            value, norm = objective.checked(loss, gradient)
        return objective.outcome(y, num_iter=num_iter, residual_norm=norm, tol=tol, reason=reason, value=value)


def _pair(s: Tensor, z: Tensor) -> list[Pair]:
    """The pair, or none where rounding ate the curvature."""
    curvature = s @ z
    rounding = torch.finfo(s.dtype).eps * torch.linalg.vector_norm(s) * torch.linalg.vector_norm(z)
    return [(s, z, 1 / curvature)] if curvature > rounding else []


def _direction(pairs: deque[Pair], gradient: Tensor) -> Tensor:
    """`-H g` by the two-loop recursion."""
    if not pairs:
        return -gradient
    direction, weights = -gradient, []
    for s, z, reciprocal in reversed(pairs):
        weights.append(reciprocal * (s @ direction))
        direction = direction - weights[-1] * z
    _, z, reciprocal = pairs[-1]
    direction = direction / (reciprocal * (z @ z))
    for (s, z, reciprocal), weight in zip(pairs, reversed(weights), strict=True):
        direction = direction + (weight - reciprocal * (z @ direction)) * s
    return direction
