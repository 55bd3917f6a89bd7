"""Accelerated proximal gradient descent (FISTA)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import ProximalGradient
from implicitgrad.linalg import LinearSolver
from implicitgrad.linalg.rows import check_every
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.solvers.step_size import HOPELESS, StepSize, rounding_of
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class AcceleratedProximalGradient(InnerSolver):
    r"""Minimises a smooth convex loss plus a simple term by accelerated proximal gradient steps.

    $z = y_k + \frac{a_k - 1}{a_{k+1}} (y_k - y_{k-1})$, $y_{k+1} = prox(z - t \nabla f(z), t)$ with
    $a_{k+1} = \frac{1}{2} (1 + \sqrt{1 + 4 a_k^2 t_k / t_{k+1}})$. The step t follows the curvature seen, see
    `StepSize`, and the momentum starts anew wherever it points uphill. For convex f with a Lipschitz gradient values
    fall like 1/k², and linearly where the minimum is strong, without knowledge of either constant.

    Costs two gradients and two prox per iteration, at z for the step and at y for the curvature and the residual, and
    nine vectors of memory. On a device numbers are read every 8 iterations only.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, differentiable in y, convex.
        prox: `prox(x, y, scaling, *data)` returns a tree like y; see `ProximalGradient`. `scaling` is a 0-dimensional
            tensor.
        tol: Largest norm of `y - prox(x, y - step ∇loss, step)` that counts as solved, absolute; None for 1.5e-8 in
            float64, 3.5e-4 in float32.
        max_iter: Iterations, those included whose step was too long.
        step: Step of the condition, in which `tol` is measured, and the first step tried.
        symmetric_on_support: As in `ProximalGradient`.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    The info's `value` is that of the loss alone.

    Source: Beck and Teboulle (2009), FISTA; growing steps: Scheinberg, Goldfarb and Bai (2014); gradient restart:
    O'Donoghue and Candès (2015), section 3.2. Departures: the test of steps; a restart also where the gradient at z is
    not finite.

    Raises:
        TypeError: `loss` or `prox` is no function.
        ValueError: a hyperparameter out of range; in a run, a loss that does not depend on y.
        FloatingPointError: in a run, NaN or infinity in the loss or its gradient, or from prox.

    Example:
        >>> import torch
        >>> from implicitgrad import prox
        >>> loss = lambda x, y, target: 0.5 * (y - target).square().sum()
        >>> lasso = AcceleratedProximalGradient(loss, lambda x, y, scaling, target: prox.l1(y, x, scaling))
        >>> x, target = torch.tensor(1.0, requires_grad=True), torch.tensor([3.0, 0.5])
        >>> y, info = lasso(x, target, init=torch.zeros(2))
        >>> y.detach(), torch.autograd.grad(y.sum(), x)[0]
        (tensor([2., 0.]), tensor(-1.))
    """

    loss: Callable[..., Tensor]
    prox: Callable[..., Tree]
    tol: float | None = None
    max_iter: int = 5000
    step: float = 1.0
    symmetric_on_support: bool = False
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("AcceleratedProximalGradient", self.loss, self.tol, self.max_iter)
        _ = self.condition  # checks the rest

    @property
    def condition(self) -> ProximalGradient:
        """A proximal gradient step no longer moves y."""
        return ProximalGradient(self.loss, self.prox, self.step, self.symmetric_on_support)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        objective = Objective("AcceleratedProximalGradient", self.loss, x, init, data)
        terms = Objective("AcceleratedProximalGradient", self.prox, x, init, data)

        def nearest(point: Tensor, step: Tensor) -> Tensor:
            y = objective.unravel(point)
            moved = terms.evaluate(lambda x, y, *data: self.prox(x, y, step, *data), y)
            return tree.ravel_like(y, moved).detach()

        return accelerate(objective, nearest, self.step, tolerance(self.tol, objective.start.dtype), self.max_iter)


def accelerate(
    objective: Objective, nearest: Callable[[Tensor, Tensor], Tensor], step: float, tol: float, max_iter: int
) -> tuple[Tree, SolverInfo]:
    """What a run of `AcceleratedProximalGradient` returns.

    Args:
        objective: The loss, and where to start.
        nearest: `(point, t) -> prox`, on vectors `(n,)`.
        step: Of the residual, and first trial.
        tol: Of the residual norm.
        max_iter: Iterations.
    """
    y = previous = objective.start
    every, one = check_every(y), y.new_ones(())
    residual_step, trial, weight, last = step * one, StepSize.first(y, step), one, step * one
    loss, gradient = objective.value_and_gradient(y)
    objective.checked(loss, gradient)
    reason, num_iter, moved = "max_iter reached", 0, one

    def measure() -> tuple[float, float, float]:
        residual = torch.linalg.vector_norm(y - nearest(y - residual_step * gradient, residual_step))
        norm, size, movement = torch.stack([residual, trial.size, moved]).tolist()
        if math.isnan(norm):
            raise FloatingPointError(
                f"{objective.name}: NaN in the residual after {num_iter} iterations; check prox or projection"
            )
        return norm, size, movement

    norm, size, movement = measure()
    while norm > tol and num_iter < max_iter:
        num_iter += 1
        new_weight = (1 + (1 + 4 * weight.square() * last / trial.size).sqrt()) / 2
        z = y + (weight - 1) / new_weight * (y - previous)
        _, slope = objective.value_and_gradient(z)
        inside = slope.isfinite().all()
        slope = torch.where(inside, slope, 0.0)
        candidate = nearest(z - trial.size * slope, trial.size)
        new_loss, new_gradient = objective.value_and_gradient(candidate)
        d = candidate - z
        square, curvature = d @ d, (new_gradient - slope) @ d
        passed = inside & new_loss.isfinite() & trial.passes(curvature, square, rounding_of(slope, d))

        fresh = ~inside | passed & ((z - candidate) @ (candidate - y) > 0)
        moved = torch.where(passed, square + (candidate - y).square().sum(), moved)
        previous = torch.where(passed & ~fresh, y, torch.where(passed, candidate, previous))
        y, gradient = torch.where(passed, candidate, y), torch.where(passed, new_gradient, gradient)
        loss, last = torch.where(passed, new_loss, loss), torch.where(passed, trial.size, last)
        weight = torch.where(fresh, one, torch.where(passed, new_weight, weight))
        trial = trial.after(passed, curvature, square)
        if num_iter % every == 0 or num_iter == max_iter:
            norm, size, movement = measure()
            if movement == 0:
                reason = "precision floor: steps no longer move y"
                break
            if size < HOPELESS * step:
                objective.checked(new_loss, new_gradient)
                reason = "no step passes, however short: the loss is not convex or not smooth here"
                break
    return objective.outcome(y, num_iter=num_iter, residual_norm=norm, tol=tol, reason=reason, value=loss.item())
