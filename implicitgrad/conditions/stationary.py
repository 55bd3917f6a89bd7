"""Stationary points: the gradient of a loss vanishes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.curvature import hvp
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class Stationary(OptimalityCondition):
    """`y` is a stationary point of a loss: `∇_y loss(x, y, *data) = 0`.

    The Jacobian of the residual is the Hessian `∇²_yy loss`, so it is symmetric. It must be nonsingular at `y`.

    Attributes:
        loss: Function of `(x, y, *data)` that returns a scalar tensor, twice differentiable in `y`.
        route: `"retained graph"` differentiates the gradient twice; `"finite difference"` needs first derivatives
            only, and is taken by itself where code in `loss` has no double backward.
        strong_convexity: A constant `mu > 0` with `∇²_yy loss ⪰ mu I` everywhere, if you can vouch for one: a penalty
            `mu/2 ‖y‖²` beside a convex loss. Then errors of solutions and linear systems are bounded, not estimated.

    Source: implicit function theorem; Bengio (2000), "Gradient-based optimization of hyperparameters".

    Example:
        >>> import torch
        >>> x, y = torch.tensor(3.0), {"w": torch.tensor(1.5)}
        >>> Stationary(lambda x, y: (y["w"] - x / 2) ** 2).residual(x, y)["w"].item()
        0.0
    """

    loss: Callable[..., Tensor]
    route: Literal["retained graph", "finite difference"] = "retained graph"
    strong_convexity: float | None = None
    symmetric = True
    symmetric_by_construction = True

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(f"Stationary needs a function loss(x, y, *data), got {type(self.loss).__name__}")
        if self.route not in ("retained graph", "finite difference"):
            raise ValueError(f'route must be "retained graph" or "finite difference", got {self.route!r}')
        if self.strong_convexity is not None and not 0 < self.strong_convexity < math.inf:
            raise ValueError(f"strong_convexity must be a positive number, got {self.strong_convexity}")

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """Gradient of the loss in `y`, a tree like `y`."""
        gradient = hvp.marked_grad if self.route == "retained graph" else hvp.differenced_grad
        return gradient(lambda point: self.loss(x, point, *data), y)

    def first_order_twin(self) -> "Stationary | None":
        """The same condition by finite differences of first-order gradients; None if this is it already."""
        return replace(self, route="finite difference") if self.route == "retained graph" else None
