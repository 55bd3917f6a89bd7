"""Systems of equations."""

from collections.abc import Callable
from dataclasses import dataclass

from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class Root(OptimalityCondition):
    """`y` solves a system of as many equations as unknowns: `function(x, y, *data) = 0`.

    The Jacobian `∂function/∂y` must be nonsingular at `y`.

    Attributes:
        function: Function of `(x, y, *data)` that returns a tree like `y`, differentiable.
        symmetric: Declare its Jacobian symmetric to allow CG, MINRES and Cholesky; checked with a pair of products.

    Source: implicit function theorem; Blondel et al. (2022), "Efficient and modular implicit differentiation", section
    2.1.

    Example:
        >>> import torch
        >>> circle = Root(lambda x, y: torch.stack([y.square().sum() - x, y[0] - y[1]]))
        >>> circle.residual(torch.tensor(2.0), torch.tensor([1.0, 1.0]))
        tensor([0., 0.])
    """

    function: Callable[..., Tree]
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"Root needs a function (x, y, *data), got {type(self.function).__name__}")

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """`function(x, y, *data)`, a tree like `y`."""
        return self.function(x, y, *data)
