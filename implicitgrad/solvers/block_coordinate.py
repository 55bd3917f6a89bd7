"""Block coordinate descent."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import BlockProximalGradient
from implicitgrad.linalg import LinearSolver
from implicitgrad.linalg.rows import check_every
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.solvers.step_size import HOPELESS, StepSize, rounding_of
from implicitgrad.tree import Tree

NAME = "BlockCoordinateDescent"


@dataclass(frozen=True)
class BlockCoordinateDescent(InnerSolver):
    """Minimises `loss + Σ_b g_b(y_b)` over one leaf of y after the other, with the newest values of all others.

    A leaf is moved by a proximal gradient step whose size follows the curvature along this leaf, see `StepSize`, or by
    an exact minimiser where one is given. Converges for a loss that is convex in each leaf and has a Lipschitz
    gradient there; to a minimum if it is convex in all. Worth its price where blocks differ much in scale, or where a
    minimiser of one block is known, as in alternating least squares.

    Costs two gradients in a leaf and one prox for each leaf and sweep, or its minimiser, and one gradient and prox of
    all leaves for the residual. On a device numbers are read every 8 sweeps only.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, differentiable in y.
        prox: Tree like y of functions of `(x, leaf, scaling, *data)`; see `BlockProximalGradient`. `scaling` is a
            0-dimensional tensor.
        minimizers: Tree like y of functions of `(x, y, *data)` that return the leaf for which loss and its own term are
            least, all other leaves as in y; None in place of a function for proximal gradient steps. None for such
            steps everywhere.
        tol: Largest residual norm of `BlockProximalGradient` that counts as solved, absolute; None for 1.5e-8 in
            float64, 3.5e-4 in float32.
        max_iter: Sweeps over all leaves.
        step: Step of the condition, in which `tol` is measured, and the first step tried.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    The info's `value` is that of the loss alone.

    Source: Tseng (2001); Beck and Tetruashvili (2013), "On the convergence of block coordinate descent type methods",
    cyclic order. Departure: the test of steps.

    Raises:
        TypeError: `loss`, a prox or a minimiser is no function.
        ValueError: a hyperparameter out of range; in a run, trees that do not match y, or a loss that does not depend
            on a leaf.
        FloatingPointError: in a run, NaN or infinity in the loss or its gradient, from a prox or a minimiser.

    Example:
        >>> import torch
        >>> from implicitgrad import prox
        >>> shrink, keep = lambda x, leaf, s: prox.l1(leaf, x, s), lambda x, leaf, s: leaf
        >>> loss = lambda x, y: 0.5 * (y["a"] + y["b"] - 3).square().sum() + 0.5 * y["b"].square().sum()
        >>> x = torch.tensor(0.5, requires_grad=True)
        >>> solver = BlockCoordinateDescent(loss, {"a": shrink, "b": keep})
        >>> y, info = solver(x, init={"a": torch.zeros(1), "b": torch.zeros(1)})
        >>> torch.autograd.grad(y["b"], x)[0].round(decimals=3)
        tensor(1.)
    """

    loss: Callable[..., Tensor]
    prox: Tree
    minimizers: Tree = None
    tol: float | None = None
    max_iter: int = 2000
    step: float = 1.0
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters(NAME, self.loss, self.tol, self.max_iter)
        _ = self.condition  # checks loss, prox and step
        for minimizer in tree.leaves(self.minimizers):
            if minimizer is not None and not callable(minimizer):
                raise TypeError(
                    f"{NAME} needs functions minimizer(x, y, *data), or None, got {type(minimizer).__name__}"
                )

    @property
    def condition(self) -> BlockProximalGradient:
        """A proximal gradient step of no block moves y."""
        return BlockProximalGradient(self.loss, self.prox, self.step)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        whole = Objective(NAME, self.loss, x, init, data)
        y, tol, num_iter, reason = whole.start, tolerance(self.tol, whole.start.dtype), 0, "max_iter reached"
        blocks, every = self._blocks(whole, x, data), check_every(y)

        def measure() -> tuple[float, float, float]:
            value, gradient = whole.value_and_gradient(y)
            value, _ = whole.checked(value, gradient)
            pairs = zip(blocks, _split(whole, y), _split(whole, gradient), strict=True)
            nearest = [
                block.nearest(part - self.step * slope, y.new_full((), self.step)) for block, part, slope in pairs
            ]
            residual = torch.linalg.vector_norm(y - torch.cat(nearest))
            norm, size = torch.stack([residual, torch.stack([block.trial.size for block in blocks]).amin()]).tolist()
            if math.isnan(norm):
                raise FloatingPointError(
                    f"{NAME}: NaN in the residual after {num_iter} sweeps; check the prox of each leaf"
                )
            return norm, size, value

        norm, size, value = measure()
        while norm > tol and num_iter < self.max_iter:
            num_iter += 1
            parts = _split(whole, y)
            for i, block in enumerate(blocks):
                parts[i] = block.moved(parts)
            y = torch.cat(parts)
            if num_iter % every == 0 or num_iter == self.max_iter:
                norm, size, value = measure()
                if norm > tol and size < HOPELESS * self.step:
                    reason = "no step passes in some leaf, however short: the loss is not convex or not smooth there"
                    break
        whole.num_evaluations += sum(block.num_evaluations for block in blocks)
        return whole.outcome(y, num_iter=num_iter, residual_norm=norm, tol=tol, reason=reason, value=value)

    def _blocks(self, whole: Objective, x: Tree, data: tuple[Tree, ...]) -> "list[_Block]":
        start = whole.unravel(whole.start)
        minimizers = tree.map(lambda _: None, start) if self.minimizers is None else self.minimizers
        places = tree.map(lambda _, place: place, start, _numbered(start))
        made = tree.map(
            lambda _, place, prox, minimizer: _Block(self.loss, prox, minimizer, self.step, start, place, x, data),
            start,
            places,
            self.prox,
            minimizers,
        )
        return tree.leaves(made)


class _Block:
    """One leaf of y, as the others see it.

    Attributes:
        trial: Its step size.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        prox: Callable[..., Tensor],
        minimizer: Callable[..., Tensor] | None,
        step: float,
        start: Tree,
        place: int,
        x: Tree,
        data: tuple[Tree, ...],
    ) -> None:
        self._leaves, self._rebuild = tree.flatten(start)
        self._place, self._prox, self._minimizer = place, prox, minimizer
        leaf = self._leaves[place]
        along = lambda x, leaf, *data: loss(x, self._with(leaf), *data)
        self._along = Objective(NAME, along, x, leaf, data)
        self._other = Objective(NAME, prox, x, leaf, data)
        self.trial = StepSize.first(leaf, step)

    @property
    def num_evaluations(self) -> int:
        """Of the loss."""
        return self._along.num_evaluations

    def _with(self, leaf: Tensor) -> Tree:
        leaves = list(self._leaves)
        leaves[self._place] = leaf
        return self._rebuild(leaves)

    def nearest(self, point: Tensor, step: Tensor) -> Tensor:
        """prox of a vector."""
        leaf = self._along.unravel(point)
        after = self._other.evaluate(lambda x, y, *data: self._prox(x, y, step, *data), leaf)
        return tree.ravel_like(leaf, after).detach()

    def moved(self, parts: list[Tensor]) -> Tensor:
        """What becomes of this leaf when all are as in `parts`, vectors."""
        self._leaves = [part.view(leaf.shape) for part, leaf in zip(parts, self._leaves, strict=True)]
        here = parts[self._place]
        if self._minimizer is not None:
            leaf, minimizer = self._along.unravel(here), self._minimizer
            found = self._other.evaluate(lambda x, y, *data: minimizer(x, self._with(y), *data), leaf)
            return tree.ravel_like(leaf, found).detach()
        _, slope = self._along.value_and_gradient(here)
        there = self.nearest(here - self.trial.size * slope, self.trial.size)
        value, new_slope = self._along.value_and_gradient(there)
        d = there - here
        square, curvature = d @ d, (new_slope - slope) @ d
        passed = value.isfinite() & self.trial.passes(curvature, square, rounding_of(slope, d))
        self.trial = self.trial.after(passed, curvature, square)
        return torch.where(passed, there, here)


def _split(whole: Objective, flat: Tensor) -> list[Tensor]:
    return [leaf.reshape(-1) for leaf in tree.leaves(whole.unravel(flat))]


def _numbered(like: Tree) -> Tree:
    values, rebuild = tree.flatten(like)
    return rebuild(list(range(len(values))))
