"""Newton's method with a line search or with a damping by the gradient, whose factor serves the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.conditions import Stationary
from implicitgrad.linalg import LinearOperator, LinearSolver
from implicitgrad.solvers.line_search import backtrack
from implicitgrad.solvers.newton_systems import NewtonSystems, check_systems
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree

NUM_FAILURES = 30  # 4^30 = 1e18 covers any scale of a loss
FLOOR = "precision floor: no step decreases the loss"


@dataclass(frozen=True)
class Newton(InnerSolver):
    r"""Minimises a smooth loss by Newton steps with a line search; a factor may serve several steps.

    $y \leftarrow y - t\,(A + \lambda I)^{-1} \nabla f(y)$ with A the Hessian, or another curvature, at y or at one of
    the last `refresh_every - 1` iterates. λ is zero where the step then goes down; otherwise it grows until it does.
    Converges to a stationary point where the loss is bounded below; near a minimum with a regular Hessian quadratically
    at `refresh_every=1`, and else by a factor per step that shrinks with each refresh.

    The derivative needs no factorisation: its systems are solved by conjugate gradients preconditioned with the last
    factor, in one or two products, see `LastFactor`. With a `system_solver` that iterates there is no factor, and the
    default solver takes over.

    Costs per iteration a gradient and a value or more; per refresh n products, n³/3 operations and two matrices of
    memory where the systems are solved densely. A few numbers are read from the device per iteration.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, twice differentiable in y.
        tol: Largest gradient norm that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Steps.
        curvature: `curvature(x, y, *data)`, a symmetric operator on vectors like `tree.ravel(y)`, say a `gauss_newton`
            with damping; None for the Hessian of the loss.
        refresh_every: Steps with one matrix and one factor. A step that does not go down refreshes at once.
        system_solver: For the Newton systems; None for `Cholesky` up to 500 unknowns, and above for `CG` to the square
            root of the gradient norm relative to the first, at most 0.1: an inexact Newton method. Others should notice
            a matrix that is not definite, as those two do: solvers like `LU` also go to saddle points.
        linear_solver: For the systems of the derivative; None for the last factor.

    Source: Nocedal and Wright (2006), algorithm 3.2 with the modification of algorithm 3.3; lazy refreshes: Shamanskii
    (1967), and Doikov, Chayti and Jaggi (2023), "Second-order optimization with lazy Hessians". Departures: λ starts at
    a thousandth of `‖A g‖ / ‖g‖`, or of `‖g‖ / max(‖y‖, 1)` if that is more, and grows also where the line search
    fails; early refreshes.

    Raises:
        TypeError: `loss` or `curvature` is no function, or a solver none.
        ValueError: a hyperparameter out of range; in a run, a loss that does not depend on y, or a curvature that does
            not fit y.
        FloatingPointError: in a run, NaN or infinity in the loss, its gradient or its curvature.
        RuntimeError: in a run, a loss without double backward: give a `curvature`, for example a `hessian` by
            `route="finite difference"`.

    Example:
        >>> import torch
        >>> solver = Newton(lambda x, y: (y**4 / 4 - x * y).sum())
        >>> x = torch.tensor([1.0, 8.0], requires_grad=True)
        >>> y, info = solver(x, init=torch.ones(2))
        >>> y.detach(), torch.autograd.grad(y.sum(), x)[0]  # the cube root and its derivative
        (tensor([1., 2.]), tensor([0.3333, 0.0833]))
    """

    loss: Callable[..., Tensor]
    tol: float | None = None
    max_iter: int = 100
    curvature: Callable[..., LinearOperator] | None = None
    refresh_every: int = 1
    system_solver: LinearSolver | None = None
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("Newton", self.loss, self.tol, self.max_iter)
        check_systems("Newton", self.curvature, self.refresh_every, self.system_solver)

    @property
    def condition(self) -> Stationary:
        """The gradient of the loss vanishes."""
        return Stationary(self.loss)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        objective = Objective("Newton", self.loss, x, init, data)
        systems = NewtonSystems(objective, self.loss, self.curvature, self.system_solver, self.refresh_every)
        y, tol, reason = objective.start, tolerance(self.tol, objective.start.dtype), "max_iter reached"
        loss, gradient = objective.value_and_gradient(y)
        value, norm = objective.checked(loss, gradient)
        num_iter = 0
        while norm > tol and num_iter < self.max_iter:
            systems.update(y, num_iter)
            direction, slope = systems.descent(gradient)
            step = backtrack(objective.value, y, direction, reference=value, slope=slope)
            if step is None and (systems.expire(num_iter) or systems.stiffen(gradient)):
                continue
            if step is None:
                reason = FLOOR
                break
            num_iter += 1
            y = y + step * direction
            loss, gradient = objective.value_and_gradient(y)
            value, norm = objective.checked(loss, gradient)
        return objective.outcome(
            y,
            num_iter=num_iter,
            residual_norm=norm,
            tol=tol,
            reason=reason,
            value=value,
            linear_solver=systems.left_behind(),
        )


@dataclass(frozen=True)
class RegularizedNewton(InnerSolver):
    r"""Minimises a convex loss by Newton steps that the gradient damps, without a line search.

    $y \leftarrow y - (\nabla^2 f(y) + \lambda I)^{-1} \nabla f(y)$ with $\lambda = \sqrt{M \|\nabla f(y)\|}$. M
    estimates half the Lipschitz constant of the Hessian: a step is taken if
    $f(y^+) \le f(y) - \frac{2}{3} \lambda r^2$ and $\|\nabla f(y^+)\| \le 2 \lambda r$ with
    $r = \|y^+ - y\|$, and M grows fourfold until it is; after each step it falls to a quarter. For convex losses with
    a Lipschitz Hessian the values fall like 1/k² from any start, and quickly near a minimum with a regular Hessian,
    also where the Hessian is singular far away, which stops `Newton`. Where the loss is not convex, M grows until the
    matrix is definite; the rates are lost.

    Costs as `Newton`, but a new λ needs a new factor of the same matrix: n³/3 operations per step, and per value of M
    that was tried; the derivative needs none, see `Newton`.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, twice differentiable in y.
        tol: Largest gradient norm that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Steps.
        curvature: As in `Newton`.
        refresh_every: Steps with one matrix. A step that is not taken at first refreshes at once.
        lipschitz: First M, in units of gradient / y².
        system_solver: As in `Newton`.
        linear_solver: For the systems of the derivative; None for the last factor.

    Source: Mishchenko (2021), "Regularized Newton method with global O(1/k²) convergence", algorithms 1 and 2; with old
    Hessians: Doikov, Chayti and Jaggi (2023), algorithm 2. Departures: tests allow for rounding, and a gradient below
    `tol` passes; with an old Hessian M is adapted as with a new one.

    Raises:
        TypeError: as in `Newton`.
        ValueError: as in `Newton`.
        FloatingPointError: as in `Newton`.
        RuntimeError: as in `Newton`.

    Example:
        >>> import torch
        >>> solver = RegularizedNewton(lambda x, y: torch.cosh(y - x).sum())  # full Newton steps diverge from afar
        >>> x = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> y, info = solver(x, init=torch.full((2,), 8.0))
        >>> y.detach().round(decimals=3), torch.autograd.grad(y.sum(), x)[0].round(decimals=3)
        (tensor([ 1., -2.]), tensor([1., 1.]))
    """

    loss: Callable[..., Tensor]
    tol: float | None = None
    max_iter: int = 200
    curvature: Callable[..., LinearOperator] | None = None
    refresh_every: int = 1
    lipschitz: float = 1.0
    system_solver: LinearSolver | None = None
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("RegularizedNewton", self.loss, self.tol, self.max_iter)
        check_systems("RegularizedNewton", self.curvature, self.refresh_every, self.system_solver)
        if not 0 < self.lipschitz < float("inf"):
            raise ValueError(f"RegularizedNewton(lipschitz=...) needs a positive number; got {self.lipschitz!r}.")

    @property
    def condition(self) -> Stationary:
        """The gradient of the loss vanishes."""
        return Stationary(self.loss)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        objective = Objective("RegularizedNewton", self.loss, x, init, data)
        systems = NewtonSystems(objective, self.loss, self.curvature, self.system_solver, self.refresh_every)
        y, tol, reason = objective.start, tolerance(self.tol, objective.start.dtype), "max_iter reached"
        loss, gradient = objective.value_and_gradient(y)
        value, norm = objective.checked(loss, gradient)
        lipschitz, num_iter, num_failures = self.lipschitz, 0, 0
        while norm > tol and num_iter < self.max_iter:
            systems.update(y, num_iter)
            damping = (lipschitz * norm) ** 0.5
            direction = systems.direction(gradient, damping)
            loss, new = objective.value_and_gradient(y + direction)
            if _is_good(direction, damping, value, loss, new, tol):
                y, gradient, lipschitz = y + direction, new, lipschitz / 4
                value, norm = objective.checked(loss, gradient)
                num_iter, num_failures = num_iter + 1, 0
            elif not systems.expire(num_iter):
                lipschitz, num_failures = 4 * lipschitz, num_failures + 1
                if num_failures == NUM_FAILURES:
                    reason = FLOOR
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


def _is_good(direction: Tensor, damping: float, value: float, loss: Tensor, gradient: Tensor, tol: float) -> bool:
    """Mishchenko's two tests of a step; NaN fails them."""
    length = torch.linalg.vector_norm(direction)
    length, after, norm = torch.stack([length, loss, torch.linalg.vector_norm(gradient)]).tolist()
    slack = 10 * torch.finfo(direction.dtype).eps * abs(value)
    lower = after <= value - 2 / 3 * damping * length**2 + slack
    return lower and (norm <= 2 * damping * length or norm <= tol)
