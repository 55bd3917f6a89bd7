"""Constrained minima in another geometry: a mirror descent step no longer moves."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.conditions.steps import check_function, check_step
from implicitgrad.curvature import hvp
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class MirrorDescent(OptimalityCondition):
    """`y` minimises a loss over a set: `y - projection(x, mirror_map(y) - step · ∇_y loss(x, y, *data), *data) = 0`.

    `mirror_map` is the gradient of a strictly convex function φ, and `projection` leads from mirror space to the set:
    `projection(v) = argmax_z ⟨v, z⟩ - φ(z)` over z in the set, the Bregman projection of `(∇φ)⁻¹(v)`. On the simplex
    with `φ(z) = Σ z log z` these are `torch.log` and the softmax, without a sort.

    Holds for a convex loss at the minima in the interior of the domain of φ, whatever the step: with the entropy, all
    entries must be positive. The Jacobian is `I - P (∇²φ(y) - step · H)` with the derivative P of the projection; it is
    nonsingular where H is positive definite along the set. The loss needs a double backward.

    Attributes:
        loss: Function of `(x, y, *data)` that returns a scalar tensor, twice differentiable in `y`.
        projection: Function of `(x, v, *data)` from mirror space to the set; returns a tree like `y`.
        mirror_map: Function of `y` that returns a tree like `y`.
        step: Step size. The solution does not depend on it, the condition of the Jacobian does.

    Source: Beck and Teboulle (2003), "Mirror descent and nonlinear projected subgradient methods for convex
    optimization"; Blondel et al. (2022), "Efficient and modular implicit differentiation", section 2.2.

    Example:
        >>> import torch
        >>> cheapest = MirrorDescent(
        ...     loss=lambda x, y: (x * y).sum() + (y * y.log()).sum(),
        ...     projection=lambda x, v: v.softmax(0),
        ...     mirror_map=torch.log,
        ... )
        >>> cost = torch.tensor([0.0, 1.0])
        >>> cheapest.residual(cost, (-cost).softmax(0)).abs().max() < 1e-6
        tensor(True)
    """

    loss: Callable[..., Tensor]
    projection: Callable[..., Tree]
    mirror_map: Callable[[Tree], Tree]
    step: float = 1.0

    def __post_init__(self) -> None:
        check_function("MirrorDescent", "loss(x, y, *data)", self.loss)
        check_function("MirrorDescent", "projection(x, v, *data)", self.projection)
        check_function("MirrorDescent", "mirror_map(y)", self.mirror_map)
        check_step("MirrorDescent", self.step)

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """`y - projection(x, mirror_map(y) - step · ∇loss, *data)`, a tree like `y`."""
        gradient = hvp.marked_grad(lambda point: self.loss(x, point, *data), y)
        point = tree.map(lambda mirrored, slope: mirrored - self.step * slope, self.mirror_map(y), gradient)
        return tree.map(lambda now, after: now - after, y, self.projection(x, point, *data))
