"""Constrained minima: a projected gradient step no longer moves."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.conditions.steps import check_function, check_step, gradient_step
from implicitgrad.conditions.support import moving_coordinates
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class ProjectedGradient(OptimalityCondition):
    """`y` minimises a loss over a convex set: `y - projection(x, y - step · ∇_y loss(x, y, *data), *data) = 0`.

    For a convex loss this holds exactly at the minima, whatever the step. With P the derivative of the projection at
    `y - step · ∇loss` and H the Hessian of the loss, the Jacobian is `I - P (I - step · H)`.

    Rows of P that are zero belong to coordinates that are held (at zero, at a bound) while the rest moves: the linear
    systems are restricted to the other ones, the support. It is read off P, not off `y`, so it is right also where the
    inner solver leaves small numbers instead of zeros.

    Holds where the projection is differentiable at `y - step · ∇loss`: no constraint is weakly active (strict
    complementarity); and where the Jacobian is nonsingular: H is positive definite on the face of the set on which y
    lies. The loss needs a double backward.

    Attributes:
        loss: Function of `(x, y, *data)` that returns a scalar tensor, twice differentiable in `y`.
        projection: Function of `(x, y, *data)` that returns the nearest point of the set, a tree like `y`; for example
            `lambda x, y: projections.simplex(y)`.
        step: Step size. The solution does not depend on it, the condition of the Jacobian does: best near `1 / ‖H‖`.
        symmetric_on_support: Declare that P is the identity on the support, as for boxes and the non-negative orthant:
            then the restricted system is `step · H`, symmetric, and Cholesky and CG solve it.

    Source: Blondel et al. (2022), "Efficient and modular implicit differentiation", section 2.2; restriction to the
    support by Bertrand et al. (2022), "Implicit differentiation for fast hyperparameter selection in non-smooth convex
    learning", section 3.

    Example:
        >>> import torch
        >>> nearest = ProjectedGradient(lambda x, y: (y - x).square().sum(), lambda x, y: y.clamp(min=0))
        >>> nearest.residual(torch.tensor([2.0, -1.0]), torch.tensor([2.0, 0.0])).tolist()
        [0.0, 0.0]
        >>> nearest.support(torch.tensor([2.0, -1.0]), torch.tensor([2.0, 0.0]))
        tensor([ True, False])
    """

    loss: Callable[..., Tensor]
    projection: Callable[..., Tree]
    step: float = 1.0
    symmetric_on_support: bool = False

    def __post_init__(self) -> None:
        check_function("ProjectedGradient", "loss(x, y, *data)", self.loss)
        check_function("ProjectedGradient", "projection(x, y, *data)", self.projection)
        check_step("ProjectedGradient", self.step)

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """`y - projection(x, y - step · ∇loss, *data)`, a tree like `y`."""
        point = gradient_step(self.loss, self.step, x, y, data)
        return tree.map(lambda now, after: now - after, y, self.projection(x, point, *data))

    def support(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """Where the projection lets a coordinate move; booleans like `y`."""
        point = gradient_step(self.loss, self.step, x, y, data)
        return moving_coordinates(lambda point: self.projection(x, point, *data), point)
