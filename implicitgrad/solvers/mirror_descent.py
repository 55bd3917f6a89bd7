"""Mirror descent."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import MirrorDescent
from implicitgrad.linalg import LinearSolver
from implicitgrad.linalg.rows import check_every
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.solvers.step_size import HOPELESS, StepSize, rounding_of
from implicitgrad.tree import Tree


def softmax_of_all(x: Tree, v: Tree, *data: Tree) -> Tree:
    """From mirror space of the entropy to the simplex; all of v is one vector."""
    flat, unravel = tree.ravel(v)
    return unravel(flat.softmax(0))


def logarithm(y: Tree) -> Tree:
    """Mirror map of the entropy `Σ y log y`, up to a constant."""
    return tree.map(torch.log, y)


@dataclass(frozen=True)
class MirrorGradientDescent(InnerSolver):
    r"""Minimises a convex loss over a set by gradient steps in mirror space; on the simplex by default.

    $y_{k+1} = projection(\nabla\varphi(y_k) - t \nabla f(y_k))$, with the entropy $\varphi(y) = \sum_i y_i \log y_i$
    exponentiated gradients: $y_{k+1} \propto y_k \exp(-t \nabla f)$. A step passes if
    $t \langle \nabla f(y_{k+1}) - \nabla f(y_k), d \rangle \le \langle \nabla\varphi(y_{k+1}) - \nabla\varphi(y_k), d
    \rangle$, $d = y_{k+1} - y_k$, which holds for $t \le 1/L$ wherever $L \varphi - f$ is convex; f need not have a
    Lipschitz gradient. Values of f then fall, like 1/k, and linearly where f is strongly convex relative to φ.

    Costs one gradient, one mirror map and two projections per iteration, and seven vectors of memory. On a device
    numbers are read every 8 iterations only.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, differentiable in y, convex.
        projection: `projection(x, v, *data)` from mirror space to the set; see `MirrorDescent`. The softmax of all
            entries by default.
        mirror_map: ∇φ, a function of y; the logarithm by default. `init` must lie where it is finite.
        tol: Largest norm of `y - projection(x, mirror_map(y) - step ∇loss)` that counts as solved, absolute; None for
            1.5e-8 in float64, 3.5e-4 in float32. Entries on their way to zero shrink by a factor per step, so that the
            residual of a solution with zeros falls with them.
        max_iter: Iterations, those included whose step was too long.
        step: Step of the condition, in which `tol` is measured, and the first step tried.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Source: Nemirovski and Yudin (1983); Beck and Teboulle (2003); steps by relative smoothness: Bauschke, Bolte and
    Teboulle (2017); Lu, Freund and Nesterov (2018). Departure: the test of steps.

    Raises:
        TypeError: `loss`, `projection` or `mirror_map` is no function.
        ValueError: a hyperparameter out of range; in a run, a loss that does not depend on y.
        FloatingPointError: in a run, NaN or infinity in the loss, its gradient, or the mirror image of init.

    Example:
        >>> import torch
        >>> solver = MirrorGradientDescent(lambda x, y: (x * y).sum() + (y * y.log()).sum())
        >>> x = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> y, info = solver(x, init=torch.tensor([0.5, 0.5]))
        >>> y.detach(), (-x).detach().softmax(0)
        (tensor([0.7311, 0.2689]), tensor([0.7311, 0.2689]))
    """

    loss: Callable[..., Tensor]
    projection: Callable[..., Tree] = softmax_of_all
    mirror_map: Callable[[Tree], Tree] = logarithm
    tol: float | None = None
    max_iter: int = 5000
    step: float = 1.0
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("MirrorGradientDescent", self.loss, self.tol, self.max_iter)
        _ = self.condition  # checks the rest

    @property
    def condition(self) -> MirrorDescent:
        """A mirror descent step no longer moves y."""
        return MirrorDescent(self.loss, self.projection, self.mirror_map, self.step)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        objective = Objective("MirrorGradientDescent", self.loss, x, init, data)
        geometry = Objective("MirrorGradientDescent", self.projection, x, init, data)

        def nearest(v: Tensor) -> Tensor:
            like = objective.unravel(v)
            return tree.ravel_like(like, geometry.evaluate(self.projection, like)).detach()

        def mirror(y: Tensor) -> Tensor:
            like = objective.unravel(y)
            return tree.ravel_like(like, geometry.evaluate(lambda x, y, *data: self.mirror_map(y), like)).detach()

        y, tol, reason = objective.start, tolerance(self.tol, objective.start.dtype), "max_iter reached"
        every, trial, num_iter = check_every(y), StepSize.first(y, self.step), 0
        loss, gradient = objective.value_and_gradient(y)
        objective.checked(loss, gradient)
        image = mirror(y)

        def measure() -> tuple[float, float]:
            residual = torch.linalg.vector_norm(y - nearest(image - self.step * gradient))
            norm, size = torch.stack([residual, trial.size]).tolist()
            if math.isnan(norm):
                raise FloatingPointError(
                    f"MirrorGradientDescent: NaN in the residual after {num_iter} iterations; start where mirror_map "
                    "is finite: with the entropy, at positive numbers"
                )
            return norm, size

        norm, size = measure()
        while norm > tol and num_iter < self.max_iter:
            num_iter += 1
            candidate = nearest(image - trial.size * gradient)
            new_loss, new_gradient = objective.value_and_gradient(candidate)
            new_image = mirror(candidate)
            d = candidate - y
            spread = torch.where(d == 0, 0.0, (new_image - image) * d).sum()  # 0 · ∞ on the boundary of the set
            curvature = (new_gradient - gradient) @ d
            passed = new_loss.isfinite() & trial.passes(curvature, spread, rounding_of(gradient, d))
            y, image = torch.where(passed, candidate, y), torch.where(passed, new_image, image)
            loss, gradient = torch.where(passed, new_loss, loss), torch.where(passed, new_gradient, gradient)
            trial = trial.after(passed, curvature, spread)
            if num_iter % every == 0 or num_iter == self.max_iter:
                norm, size = measure()
                if size < HOPELESS * self.step:
                    objective.checked(new_loss, new_gradient)
                    reason = "no step passes, however short: the loss is not convex or not smooth here"
                    break
        return objective.outcome(y, num_iter=num_iter, residual_norm=norm, tol=tol, reason=reason, value=loss.item())
