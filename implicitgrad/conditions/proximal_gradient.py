"""Minima of a smooth loss plus a simple term: a proximal gradient step no longer moves."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.conditions.steps import check_function, check_step, gradient_step
from implicitgrad.conditions.support import moving_coordinates
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class ProximalGradient(OptimalityCondition):
    """`y` minimises `loss + g`: `y - prox(x, y - step · ∇_y loss(x, y, *data), step, *data) = 0`.

    `prox(x, v, s, *data)` is `argmin_z ½‖z - v‖² + s g(z)`. For convex loss and g this holds exactly at the minima,
    whatever the step. With P the derivative of prox at `y - step · ∇loss` and H the Hessian of the loss, the Jacobian
    is `I - P (I - step · H)`.

    Rows of P that are zero belong to coordinates that are held, as the zeros of a lasso: the linear systems are
    restricted to the other ones, the support. It is read off P, not off `y`, so it is right also where the inner solver
    leaves small numbers instead of zeros.

    Holds where prox is differentiable at `y - step · ∇loss` (for the lasso: no coordinate of the gradient outside of
    the support is exactly at the penalty; strict complementarity), and where the Jacobian is nonsingular: for the
    lasso, H restricted to the support. The loss needs a double backward.

    Attributes:
        loss: Function of `(x, y, *data)` that returns a scalar tensor, twice differentiable in `y`.
        prox: Function of `(x, y, scaling, *data)` that returns a tree like `y`; for example
            `lambda x, y, scaling, *data: prox.l1(y, x.exp(), scaling)`.
        step: Step size. The solution does not depend on it, the condition of the Jacobian does: best near `1 / ‖H‖`.
        symmetric_on_support: Declare that P is one multiple of the identity on the support, as for `prox.l1` and, with
            one penalty for all, `prox.elastic_net`: then the restricted system is symmetric, for the lasso `step · H`,
            and Cholesky and CG solve it.

    Source: Blondel et al. (2022), "Efficient and modular implicit differentiation", section 2.2; restriction to the
    support by Bertrand et al. (2022), "Implicit differentiation for fast hyperparameter selection in non-smooth convex
    learning", section 3.

    Example:
        >>> import torch
        >>> from implicitgrad import prox
        >>> loss = lambda x, y, target: 0.5 * (y - target).square().sum()
        >>> lasso = ProximalGradient(loss, lambda x, y, scaling, target: prox.l1(y, x, scaling))
        >>> penalty, target = torch.tensor(1.0), torch.tensor([3.0, 0.5])
        >>> lasso.residual(penalty, torch.tensor([2.0, 0.0]), target).tolist()
        [0.0, 0.0]
    """

    loss: Callable[..., Tensor]
    prox: Callable[..., Tree]
    step: float = 1.0
    symmetric_on_support: bool = False

    def __post_init__(self) -> None:
        check_function("ProximalGradient", "loss(x, y, *data)", self.loss)
        check_function("ProximalGradient", "prox(x, y, scaling, *data)", self.prox)
        check_step("ProximalGradient", self.step)

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """`y - prox(x, y - step · ∇loss, step, *data)`, a tree like `y`."""
        point = gradient_step(self.loss, self.step, x, y, data)
        return tree.map(lambda now, after: now - after, y, self.prox(x, point, self.step, *data))

    def support(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """Where prox lets a coordinate move; booleans like `y`."""
        point = gradient_step(self.loss, self.step, x, y, data)
        return moving_coordinates(lambda point: self.prox(x, point, self.step, *data), point)
