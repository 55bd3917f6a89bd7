"""Accelerated projected gradient descent."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import ProjectedGradient
from implicitgrad.linalg import LinearSolver
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.proximal_gradient import accelerate
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class AcceleratedProjectedGradient(InnerSolver):
    """Minimises a smooth convex loss over a convex set by accelerated projected gradient steps.

    The method, its convergence and its costs are those of `AcceleratedProximalGradient` with a projection for prox.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, differentiable in y, convex.
        projection: `projection(x, y, *data)` returns the nearest point of the set, a tree like y; see `projections`.
        tol: Largest norm of `y - projection(x, y - step ∇loss)` that counts as solved, absolute; None for 1.5e-8 in
            float64, 3.5e-4 in float32.
        max_iter: Iterations, those included whose step was too long.
        step: Step of the condition, in which `tol` is measured, and the first step tried.
        symmetric_on_support: As in `ProjectedGradient`.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Raises:
        TypeError: `loss` or `projection` is no function.
        ValueError: a hyperparameter out of range; in a run, a loss that does not depend on y.
        FloatingPointError: in a run, NaN or infinity in the loss or its gradient, or from the projection.

    Example:
        >>> import torch
        >>> from implicitgrad import projections
        >>> loss = lambda x, y: (y - x).square().sum()
        >>> solver = AcceleratedProjectedGradient(loss, lambda x, y: projections.simplex(y))
        >>> x = torch.tensor([1.0, 0.5, -1.0], requires_grad=True)
        >>> y, info = solver(x, init=torch.zeros(3))
        >>> y.detach(), torch.autograd.grad(y[0], x)[0]
        (tensor([0.7500, 0.2500, 0.0000]), tensor([ 0.5000, -0.5000,  0.0000]))
    """

    loss: Callable[..., Tensor]
    projection: Callable[..., Tree]
    tol: float | None = None
    max_iter: int = 5000
    step: float = 1.0
    symmetric_on_support: bool = False
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("AcceleratedProjectedGradient", self.loss, self.tol, self.max_iter)
        _ = self.condition  # checks the rest

    @property
    def condition(self) -> ProjectedGradient:
        """A projected gradient step no longer moves y."""
        return ProjectedGradient(self.loss, self.projection, self.step, self.symmetric_on_support)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        objective = Objective("AcceleratedProjectedGradient", self.loss, x, init, data)
        constraint = Objective("AcceleratedProjectedGradient", self.projection, x, init, data)

        def nearest(point: Tensor, step: Tensor) -> Tensor:
            y = objective.unravel(point)
            return tree.ravel_like(y, constraint.evaluate(self.projection, y)).detach()

        return accelerate(objective, nearest, self.step, tolerance(self.tol, objective.start.dtype), self.max_iter)
