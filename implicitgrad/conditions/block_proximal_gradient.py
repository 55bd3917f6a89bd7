"""Minima of a smooth loss plus a simple term for each block of unknowns."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.conditions.steps import check_function, gradient_step
from implicitgrad.conditions.support import moving_coordinates
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class BlockProximalGradient(OptimalityCondition):
    """`y` minimises `loss + Σ_b g_b(y_b)` over blocks, the leaves of y, each with its own step and proximal operator.

    `y_b - prox_b(x, y_b - step_b · ∇_b loss(x, y, *data), step_b, *data) = 0` for every leaf `y_b`. Assumptions,
    restriction to the support and errors are those of `ProximalGradient`; the solution is the same for all steps, and
    steps that suit each block, near `1 / ‖∇²_bb loss‖`, make the Jacobian better conditioned where blocks differ in
    scale.

    Attributes:
        loss: Function of `(x, y, *data)` that returns a scalar tensor, twice differentiable in `y`.
        prox: Tree like `y` of functions of `(x, leaf, scaling, *data)` that return a tensor like the leaf; for example
            `{"coef": lambda x, y, s: prox.l1(y, x, s), "intercept": lambda x, y, s: prox.zero(y)}`.
        step: A number for all blocks, or a tree like `y` of positive numbers and tensors that broadcast against the
            leaf; with a tensor, for example one step per row, that is what `prox` receives as scaling.

    Source: Tseng (2001), "Convergence of a block coordinate descent method for nondifferentiable minimization";
    Blondel et al. (2022), appendix "Block proximal gradient fixed point".

    Example:
        >>> import torch
        >>> from implicitgrad import prox
        >>> two = BlockProximalGradient(
        ...     loss=lambda x, y: 0.5 * ((y["a"] - 3) ** 2 + (y["b"] - 1) ** 2),
        ...     prox={"a": lambda x, y, s: prox.l1(y, x, s), "b": lambda x, y, s: prox.zero(y)},
        ...     step={"a": 1.0, "b": 0.5},
        ... )
        >>> residual = two.residual(torch.tensor(2.0), {"a": torch.tensor(1.0), "b": torch.tensor(1.0)})
        >>> residual["a"].item(), residual["b"].item()
        (0.0, 0.0)
    """

    loss: Callable[..., Tensor]
    prox: Tree
    step: Tree = 1.0

    def __post_init__(self) -> None:
        check_function("BlockProximalGradient", "loss(x, y, *data)", self.loss)
        for prox in tree.leaves(self.prox):
            check_function("BlockProximalGradient", "prox(x, leaf, scaling, *data) for every leaf of y", prox)
        for step in tree.leaves(self.step):
            low, high = (step.min(), step.max()) if isinstance(step, Tensor) else (step, step)
            if not (low > 0 and high < math.inf):
                raise ValueError(f"BlockProximalGradient needs positive finite steps, got {step}")

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """`y_b - prox_b(x, y_b - step_b · ∇_b loss, step_b, *data)`, a tree like `y`."""
        steps = self._steps(y)
        after = self._nearest(x, gradient_step(self.loss, steps, x, y, data), steps, data)
        return tree.map(lambda now, then: now - then, y, after)

    def support(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """Where a prox lets a coordinate move; booleans like `y`."""
        steps = self._steps(y)
        point = gradient_step(self.loss, steps, x, y, data)
        return moving_coordinates(lambda point: self._nearest(x, point, steps, data), point)

    def _nearest(self, x: Tree, point: Tree, steps: Tree, data: tuple) -> Tree:
        return tree.map(lambda leaf, step, prox: prox(x, leaf, step, *data), point, steps, self.prox)

    def _steps(self, y: Tree) -> Tree:
        return tree.map(lambda _: self.step, y) if isinstance(self.step, float | int) else self.step
