"""Fixed points: a step that no longer moves."""

from collections.abc import Callable
from dataclasses import dataclass

from implicitgrad import tree
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class FixedPoint(OptimalityCondition):
    """`y` is a fixed point of a step: `y - step(x, y, *data) = 0`.

    The Jacobian is `I - ∂step/∂y`; it must be nonsingular, which holds when the step contracts. With `Neumann()` the
    adjoint series `Σ (∂step/∂y)ᵏ` converges exactly when the spectral radius of `∂step/∂y` is below one.

    Attributes:
        step: Function of `(x, y, *data)` that returns a tree like `y`.
        symmetric: Declare `∂step/∂y` symmetric to allow CG, MINRES and Cholesky; checked with a pair of products.

    Source: Almeida (1987) and Pineda (1987), recurrent backpropagation; Bai, Kolter, Koltun (2019), deep equilibrium
    models.

    Example:
        >>> import torch
        >>> babylonian = FixedPoint(lambda x, y: (y + x / y) / 2)
        >>> babylonian.residual(torch.tensor(4.0), torch.tensor(2.0)).item()
        0.0
    """

    step: Callable[..., Tree]
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not callable(self.step):
            raise TypeError(f"FixedPoint needs a function step(x, y, *data), got {type(self.step).__name__}")

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """`y - step(x, y, *data)`, a tree like `y`."""
        return tree.map(lambda now, after: now - after, y, self.step(x, y, *data))
