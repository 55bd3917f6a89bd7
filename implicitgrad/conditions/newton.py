"""Fixed points of Newton's method: equations in units of the unknowns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class NewtonFixedPoint(OptimalityCondition):
    """`y` is a fixed point of Newton's step for `function(x, y, *data) = 0`: `J⁻¹ function(x, y, *data) = 0`.

    `J = ∂function/∂y` at `y`, as a constant: solutions and derivatives of every order are those of `Root(function)`,
    since a constant nonsingular factor does not change a root. The residual is the step that Newton's method would
    still take, so to first order it is `y` minus the solution, in the units of `y`: it compares where equations differ
    in scale, and `inner_tolerance` becomes a relative error of `y`. The Jacobian of the residual is the identity there.

    Each evaluation costs n reverse passes for J at once and an inversion, O(n³); meant for up to a few thousand
    unknowns. J must be nonsingular at `y`.

    Attributes:
        function: Function of `(x, y, *data)` that returns a tree like `y`, differentiable, of operations that
            `torch.func.vmap` can batch.

    Source: Blondel et al. (2022), "Efficient and modular implicit differentiation", section 2.2, "Newton fixed point".
    Departure: J is held constant, which leaves out terms that vanish at the solution.

    Example:
        >>> import torch
        >>> root = NewtonFixedPoint(lambda x, y: y.square() - x)
        >>> root.residual(torch.tensor([4.0]), torch.tensor([2.1]))  # nearly 2.1 - 2
        tensor([0.0976])
    """

    function: Callable[..., Tree]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"NewtonFixedPoint needs a function (x, y, *data), got {type(self.function).__name__}")

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """`J⁻¹ function(x, y, *data)`, a tree like `y`."""
        flat, unravel = tree.ravel(y)

        def equations(point: Tensor) -> Tensor:
            return tree.ravel_like(y, self.function(x, unravel(point), *data))

        value = equations(flat)
        inverse = torch.linalg.inv(torch.func.jacrev(equations)(flat.detach()).detach())
        return unravel(inverse @ value)
