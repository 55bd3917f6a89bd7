"""Nonlinear least squares by Gauss-Newton and Levenberg-Marquardt."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import Stationary
from implicitgrad.curvature import jacobian
from implicitgrad.linalg import LinearOperator, LinearSolver
from implicitgrad.solvers.newton import Newton
from implicitgrad.solvers.newton_systems import NewtonSystems, check_systems
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree

FIRST_DAMPING = 1e-3  # of Levenberg-Marquardt, relative to the size of JᵀJ (Nielsen's tau)
NUM_FAILURES = 30  # rejected steps in a row; the damping grows by 2^(30·31/2) meanwhile


@dataclass(frozen=True)
class GaussNewton(InnerSolver):
    r"""Minimises $\frac{1}{2} \|r(y)\|^2$ by Gauss-Newton steps with a line search.

    $y \leftarrow y - t\,(J^\top J)^{-1} J^\top r$ with the Jacobian J of the residuals: `Newton` without the second
    derivatives of r. One step solves a linear problem; where residuals vanish at the solution the convergence is
    quadratic, elsewhere linear, the slower the larger and the more curved they are.

    The derivative is that of a stationary point, second derivatives of r included; its systems are preconditioned with
    the last factor of JᵀJ, see `Newton`.

    Args:
        residuals: `residuals(x, y, *data)`, a tensor or a tree of tensors with m numbers, differentiable in y.
        tol: Largest norm of Jᵀr that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Steps.
        system_solver: For the systems with JᵀJ, as in `Newton`.
        linear_solver: For the systems of the derivative; None for the last factor.

    Source: Nocedal and Wright (2006), section 10.3. Departure: where J loses rank, JᵀJ is damped as in `Newton`.

    Raises:
        TypeError: `residuals` is no function, or `system_solver` no linear solver.
        ValueError: a hyperparameter out of range; in a run, residuals that do not depend on y.
        FloatingPointError: in a run, NaN or infinity in the residuals or their derivatives.

    Example:
        >>> import torch
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
        >>> t = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
        >>> y, info = GaussNewton(lambda x, y, t: X @ y - t)(None, t, init=torch.zeros(2))
        >>> y.detach().round(decimals=3), torch.autograd.grad(y[0], t)[0].round(decimals=3)
        (tensor([1., 2.]), tensor([ 0.8330,  0.3330, -0.1670]))
    """

    residuals: Callable[..., Tree]
    tol: float | None = None
    max_iter: int = 100
    system_solver: LinearSolver | None = None
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("GaussNewton", self.residuals, self.tol, self.max_iter)
        check_systems("GaussNewton", None, 1, self.system_solver)

    @property
    def condition(self) -> Stationary:
        """The gradient of half the sum of squares vanishes."""
        return Stationary(half_square(self.residuals))

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        newton = Newton(
            half_square(self.residuals),
            tol=self.tol,
            max_iter=self.max_iter,
            curvature=gram_of(self.residuals),
            system_solver=self.system_solver,
        )
        return newton.run(x, init, *data)


@dataclass(frozen=True)
class LevenbergMarquardt(InnerSolver):
    r"""Minimises $\frac{1}{2} \|r(y)\|^2$ by damped Gauss-Newton steps, for poor starts and ill-conditioned problems.

    $y \leftarrow y - (J^\top J + \lambda I)^{-1} J^\top r$. The gain of a step, its decrease over the one that the
    linear model predicts, rules λ: it falls by up to a factor of three where the model is good, and grows by 2, 4, 8,
    ... while steps are rejected. λ falls towards zero at a solution of small residuals, so that convergence ends like
    that of `GaussNewton`.

    The derivative is that of a stationary point, as for `GaussNewton`. Costs per iteration a gradient and a value, a
    Jacobian after each step taken, and a factor of n³/3 operations.

    Args:
        residuals: `residuals(x, y, *data)`, a tensor or a tree of tensors with m numbers, differentiable in y.
        tol: Largest norm of Jᵀr that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Steps tried, also rejected ones.
        system_solver: For the systems, as in `Newton`.
        linear_solver: For the systems of the derivative; None for the last factor.

    Source: Nielsen (1999), "Damping parameter in Marquardt's method"; Madsen, Nielsen and Tingleff (2004), algorithm
    3.16. Departures: the first λ is a thousandth of `‖JᵀJ g‖ / ‖g‖`, which needs no diagonal; a decrease
    below ten roundings of the value counts as predicted.

    Raises:
        TypeError: `residuals` is no function, or `system_solver` no linear solver.
        ValueError: a hyperparameter out of range; in a run, residuals that do not depend on y.
        FloatingPointError: in a run, NaN or infinity at the start, or in a product with the Jacobian.

    Example:
        >>> import torch
        >>> rosenbrock = lambda x, y: torch.stack([x - y[0], 10 * (y[1] - y[0] ** 2)])
        >>> x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> y, info = LevenbergMarquardt(rosenbrock)(x, init=torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> y.detach().float().round(decimals=3), torch.autograd.grad(y[1], x)[0].float().round(decimals=3)
        (tensor([1., 1.]), tensor(2.))
    """

    residuals: Callable[..., Tree]
    tol: float | None = None
    max_iter: int = 200
    system_solver: LinearSolver | None = None
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("LevenbergMarquardt", self.residuals, self.tol, self.max_iter)
        check_systems("LevenbergMarquardt", None, 1, self.system_solver)

    @property
    def condition(self) -> Stationary:
        """The gradient of half the sum of squares vanishes."""
        return Stationary(half_square(self.residuals))

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        loss = half_square(self.residuals)
        objective = Objective("LevenbergMarquardt", loss, x, init, data)
        systems = NewtonSystems(objective, loss, gram_of(self.residuals), self.system_solver, refresh_every=1)
        y, tol, reason = objective.start, tolerance(self.tol, objective.start.dtype), "max_iter reached"
        now, gradient = objective.value_and_gradient(y)
        value, norm = objective.checked(now, gradient)
        damping, growth, num_iter, num_taken, num_failures = 0.0, 2.0, 0, 0, 0
        while norm > tol and num_iter < self.max_iter:
            systems.update(y, num_taken)
            damping = damping or FIRST_DAMPING * systems.size(gradient)
            direction = systems.direction(gradient, damping)
            gain = _gain(value, objective.value(y + direction), gradient, direction, damping)
            num_iter += 1
            if gain > 0:
                y = y + direction
                value, norm = objective.checked(*(evaluated := objective.value_and_gradient(y)))
                gradient, num_taken, num_failures = evaluated[1], num_taken + 1, 0
                damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
            else:
                damping, growth, num_failures = damping * growth, 2 * growth, num_failures + 1
                if num_failures == NUM_FAILURES:
                    reason = "precision floor: no step decreases the sum of squares"
                    break
        return objective.outcome(
            y,
            num_iter=num_iter,
            residual_norm=norm,
            tol=tol,
            reason=reason,
            value=value,
            linear_solver=systems.left_behind(),
        )


def half_square(residuals: Callable[..., Tree]) -> Callable[..., Tensor]:
    """`x, y, *data ↦ ½ ‖residuals‖²`."""

    def loss(x: Tree, y: Tree, *data: Tree) -> Tensor:
        return 0.5 * torch.stack([part.square().sum() for part in tree.leaves(residuals(x, y, *data))]).sum()

    return loss


def gram_of(residuals: Callable[..., Tree]) -> Callable[..., LinearOperator]:
    """`x, y, *data ↦ JᵀJ` with the Jacobian of the residuals in y."""

    def gram(x: Tree, y: Tree, *data: Tree) -> LinearOperator:
        J = jacobian(lambda y, x, *data: residuals(x, y, *data), y, x, *data, check=False)
        return J.T @ J

    return gram


def _gain(value: float, after: Tensor, gradient: Tensor, direction: Tensor, damping: float) -> float:
    """Decrease over predicted decrease; one if both drown in rounding, below zero for NaN."""
    predicted = 0.5 * (damping * direction @ direction - gradient @ direction)
    predicted, new = torch.stack([predicted, after]).tolist()
    slack = 10 * torch.finfo(direction.dtype).eps * abs(value)
    decrease = value - new
    if not (predicted > 0 and decrease > -slack):
        return -1.0
    return 1.0 if max(predicted, abs(decrease)) <= slack else decrease / predicted
