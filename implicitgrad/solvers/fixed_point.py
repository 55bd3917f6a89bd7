"""Fixed-point iteration."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import FixedPoint
from implicitgrad.linalg import LinearSolver
from implicitgrad.linalg.rows import check_every
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class FixedPointIteration(InnerSolver):
    r"""Solves $y = step(x, y)$ by repetition: $y \leftarrow (1 - \beta) y + \beta\, step(x, y)$.

    Converges where the eigenvalues of $(1 - \beta) I + \beta\, \partial step/\partial y$ lie in the unit disk, at the
    rate of the largest; damping $\beta < 1$ helps where those of $\partial step/\partial y$ are large and negative or
    imaginary. Costs one step and two vectors of memory per iteration; on a device one number is read every 8
    iterations. `Anderson` needs fewer iterations for little more.

    Args:
        step: `step(x, y, *data)` returns a tree like y.
        tol: Largest norm of `y - step(x, y)` that counts as solved, absolute; None for 1.5e-8 in float64, 3.5e-4 in
            float32.
        max_iter: Steps.
        damping: β, in (0, 1]; 1 for none.
        symmetric: As in `FixedPoint`.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Source: Banach (1922); Krasnosel'skii (1955) and Mann (1953) for the damping.

    Raises:
        TypeError: `step` is no function.
        ValueError: a hyperparameter out of range; in a run, a step that returns no tree like y.
        FloatingPointError: in a run, NaN or infinity, also after divergence.

    Example:
        >>> import torch
        >>> solver = FixedPointIteration(lambda x, y: (y + x / y) / 2)
        >>> x = torch.tensor(9.0, requires_grad=True)
        >>> y, info = solver(x, init=torch.tensor(1.0))
        >>> y.item(), round(torch.autograd.grad(y, x)[0].item(), 4)
        (3.0, 0.1667)
    """

    step: Callable[..., Tree]
    tol: float | None = None
    max_iter: int = 1000
    damping: float = 1.0
    symmetric: bool = False
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("FixedPointIteration", self.step, self.tol, self.max_iter)
        check_damping("FixedPointIteration", self.damping)

    @property
    def condition(self) -> FixedPoint:
        """The step no longer moves y."""
        return FixedPoint(self.step, self.symmetric)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        problem = Objective("FixedPointIteration", self.step, x, init, data)
        y, tol, num_iter = problem.start, tolerance(self.tol, problem.start.dtype), 0
        every = check_every(y)
        change = movement(problem, self.step, y)
        norm = checked_norm(problem, torch.linalg.vector_norm(change))
        while norm > tol and num_iter < self.max_iter:
            num_iter += 1
            y = y + self.damping * change
            change = movement(problem, self.step, y)
            if num_iter % every == 0 or num_iter == self.max_iter:
                norm = checked_norm(problem, torch.linalg.vector_norm(change))
        return problem.outcome(y, num_iter=num_iter, residual_norm=norm, tol=tol, reason="max_iter reached", value=None)


def movement(problem: Objective, step: Callable[..., Tree], flat: Tensor) -> Tensor:
    """`step(y) - y` as a vector `(n,)` without a graph."""
    y = problem.unravel(flat)
    return tree.ravel_like(y, problem.evaluate(step, y)).detach() - flat


def checked_norm(problem: Objective, norm: Tensor) -> float:
    """A residual norm as a number; one transfer from the device.

    Raises:
        FloatingPointError: NaN or infinity.
    """
    number = norm.item()
    if not number < float("inf"):
        raise FloatingPointError(
            f"{problem.name}: the step moves y by {number} at evaluation {problem.num_evaluations}; check init and the "
            "data for NaN; where the iteration diverges, damp it or use Anderson"
        )
    return number


def check_damping(name: str, damping: float) -> None:
    """Raise ValueError unless the share of a new step is in (0, 1]."""
    if not (isinstance(damping, (int, float)) and 0 < damping <= 1):
        raise ValueError(f"{name}(damping=...) needs a number in (0, 1], where 1 is no damping; got {damping!r}.")
