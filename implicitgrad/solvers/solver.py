"""What a solver of inner problems is, and how its solution becomes differentiable."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, final

from torch import Tensor

from implicitgrad import closure, internals, tree
from implicitgrad.conditions import OptimalityCondition
from implicitgrad.implicit import implicit, implicit_root
from implicitgrad.isolation import Isolation
from implicitgrad.linalg import LinearSolver
from implicitgrad.surroundings import look_around
from implicitgrad.tree import Tree


class SolverInfo(NamedTuple):
    """What happened in one run of an inner solver.

    Under `torch.func.vmap` the figures are the worst over the examples, and `num_evaluations` their sum.

    Attributes:
        num_iter: Iterations done.
        residual_norm: Norm of the residual of the solver's condition at the returned y, computed there.
        converged: Whether that met `tol`.
        reason: Why the solver stopped, in words.
        num_evaluations: Evaluations of the user's function, with or without derivatives.
        value: Objective at the returned y; None for solvers without one, and under `vmap`.
        linear_solver: Solver of systems with the Jacobian at y that the run leaves behind, for example by the last
            factor of Newton's method; None if there is none. `InnerSolver.__call__` uses it and hands out None.
    """

    num_iter: int
    residual_norm: float
    converged: bool
    reason: str
    num_evaluations: int
    value: float | None = None
    linear_solver: LinearSolver | None = None


class InnerSolver(ABC):
    """Solves an inner problem, and hands out the solution as a differentiable function of `x` and `data`.

    Subclasses are frozen dataclasses of hyperparameters with at least `tol` (of the residual norm), `max_iter` and
    `linear_solver`. Calling a solver runs it below all transforms and attaches the derivative of its condition, so that
    reverse mode, forward mode, `vmap` and higher orders work as for `implicit`.

    Attributes:
        linear_solver: For the linear systems of the derivative; None for what the run leaves behind, or `Auto()`.
    """

    linear_solver: LinearSolver | None = None

    @property
    @abstractmethod
    def condition(self) -> OptimalityCondition:
        """What holds at the solution."""

    @abstractmethod
    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        """The solution as plain numbers, without a graph, and what happened.

        Arguments are not changed, nor module buffers nor the random state; `init` may require gradients, which are not
        recorded. A run that ends early tells so in the info.

        Args:
            x: Upper variable.
            init: Where to start, a tree like y.
            data: Further arguments of the condition.

        Raises:
            FloatingPointError: NaN or infinity where a finite number is needed.
        """

    @final
    def __call__(self, x: Tree, *data: Tree, init: Tree) -> tuple[Tree, SolverInfo]:
        """The solution, differentiable in x, data and what the condition closes over, and what happened.

        Args:
            x: Upper variable.
            data: Further arguments of the condition.
            init: Where to start, a tree like y; the solution of a nearby problem saves iterations.

        Raises:
            FloatingPointError: NaN or infinity in the run or in the residual.
        """
        condition = self.condition
        infos: list[SolverInfo] = []
        hidden = _closed_over(condition, x, init, data) if internals.transforming() else []

        def solve(x: Tree, init: Tree, exchanged: Sequence[Tensor], *data: Tree) -> Tree:
            with internals.without_forward_mode(), closure.Substitution(hidden, exchanged):
                y, info = self.run(x, init, *data)
            infos.append(info)
            return y

        y, _ = implicit(condition)(solve).solve(x, init, hidden, *data)
        info = _worst(infos)
        y = implicit_root(condition, x, y, *data, solver=self.linear_solver or info.linear_solver)
        return y, info._replace(linear_solver=None)


def _closed_over(condition: OptimalityCondition, x: Tree, init: Tree, data: tuple) -> list[Tensor]:
    """Tensors of transforms that the condition closes over, which a run below the transforms must not meet."""
    values, rebuild = tree.flatten((x, init, data))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]

    def residual(*tensors: Tensor) -> Tree:
        full = list(values)
        for i, tensor in zip(places, tensors, strict=True):
            full[i] = tensor
        x, y, data = rebuild(full)
        return condition.residual(x, y, *data)

    device = tree.leaves(init)[0].device
    with Isolation(device, look_around(condition, x, data))(), internals.without_forward_mode():
        return closure.record(residual, [values[i] for i in places])


def _worst(infos: Sequence[SolverInfo]) -> SolverInfo:
    """One info for several runs; a solver that one of them leaves behind serves the others only if it is the same."""
    if len(infos) == 1:
        return infos[0]
    worst = max(infos, key=lambda info: (not info.converged, info.residual_norm))
    same = all(info.linear_solver == worst.linear_solver for info in infos)
    return worst._replace(
        num_iter=max(info.num_iter for info in infos),
        num_evaluations=sum(info.num_evaluations for info in infos),
        value=None,
        linear_solver=worst.linear_solver if same else None,
    )
