"""Bisection of many scalar equations at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import OptimalityCondition, Root
from implicitgrad.linalg import LinearOperator, LinearSolver, Solution
from implicitgrad.linalg.checks import check_system, default_rtol
from implicitgrad.linalg.dense import apply_inverse
from implicitgrad.linalg.solver import zero_solution
from implicitgrad.report import check_finite
from implicitgrad.solvers.bounds import Bounds, check_bounds, flat_bounds
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class Bisection(InnerSolver):
    """Solves scalar equations, one for every entry of y, by halving brackets.

    Entry i of `function` must depend on entry i of y only, be continuous, and differ in sign at the ends of its
    bracket. The error halves with each iteration, whatever the function; 53 iterations exhaust float64. Costs one
    evaluation per iteration for all entries together, and four vectors of memory. The first trial is `init`, so a start
    that solves all equations ends at once.

    The derivative takes the slope of each equation, from one product, and divides by it; it must not vanish. The
    bracket has no influence on it.

    Args:
        function: `function(x, y, *data)`, a tree like y, zero at the solution.
        bounds: The brackets `(lower, upper)`, each a number or a tree like y of tensors that broadcast; or a function
            of `(x, *data)` that returns such a pair.
        tol: Largest norm of the function that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Halvings.
        linear_solver: For the systems of the derivative; None for a division by the slopes.

    Raises:
        TypeError: `function` is none, or `bounds` is neither a pair nor a function.
        ValueError: a hyperparameter out of range; in a run, a bracket that is infinite or at whose ends the function
            has one sign, or trees that do not match y.
        FloatingPointError: in a run, NaN or infinity at an end of a bracket or at the solution.

    Example:
        >>> import torch
        >>> root = Bisection(lambda x, y: y**3 + y - x, bounds=(0.0, 4.0))
        >>> x = torch.tensor([2.0, 10.0], requires_grad=True)
        >>> y, info = root(x, init=torch.ones(2))
        >>> y.detach().round(decimals=3), torch.autograd.grad(y.sum(), x)[0].round(decimals=3)
        (tensor([1., 2.]), tensor([0.2500, 0.0770]))
    """

    function: Callable[..., Tree]
    bounds: Bounds
    tol: float | None = None
    max_iter: int = 100
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("Bisection", self.function, self.tol, self.max_iter)
        check_bounds("Bisection", self.bounds)

    @property
    def condition(self) -> OptimalityCondition:
        """The function vanishes."""
        return Root(self.function)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        objective = Objective("Bisection", self.function, x, init, data)
        like = lambda x, y, *data: tree.ravel_like(y, self.function(x, y, *data)).detach()
        function = lambda flat: objective.evaluate(like, objective.unravel(flat))
        tol = tolerance(self.tol, objective.start.dtype)
        low, high = flat_bounds(self.bounds, objective.unravel(objective.start), *objective.constants)
        rising = self._orientation(low, high, function)
        y, num_iter, reason = objective.start.clamp(low, high), 0, "max_iter reached"
        value = function(y)
        while not _norm(value) <= tol and num_iter < self.max_iter:
            below = (value * rising) < 0
            low, high = torch.where(below, y, low), torch.where(below, high, y)
            middle = low + (high - low) / 2
            if torch.equal(middle, y):
                reason = "precision floor: no number lies between the ends of the brackets"
                break
            y, num_iter = middle, num_iter + 1
            value = function(y)
        check_finite(value, "Bisection: the function at the solution")
        return objective.outcome(
            y,
            num_iter=num_iter,
            residual_norm=_norm(value),
            tol=tol,
            reason=reason,
            value=None,
            linear_solver=Slopes(),
        )

    def _orientation(self, low: Tensor, high: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """1 where the function rises from one end of the bracket to the other, -1 where it falls.

        Raises:
            ValueError: an end is infinite, or there is no change of sign.
            FloatingPointError: the function is not finite at an end.
        """
        if not (low.isfinite() & high.isfinite()).all():
            raise ValueError("Bisection needs finite brackets; got an infinite bound")
        first, last = function(low), function(high)
        check_finite(torch.cat([first, last]), "Bisection: the function at the ends of the brackets")
        alike = first.sign() * last.sign() > 0
        if alike.any():
            i = int(alike.nonzero()[0, 0])
            raise ValueError(
                f"Bisection needs a change of sign in every bracket; {int(alike.sum())} of {alike.numel()} have none, "
                f"entry {i} has the values {first[i].item():.2g} at {low[i].item():.4g} and {last[i].item():.2g} at "
                f"{high[i].item():.4g}. Widen the bounds"
            )
        return torch.where((first < 0) | (last > 0), 1.0, -1.0).to(first)


def _norm(value: Tensor) -> float:
    return torch.linalg.vector_norm(value).item()


@dataclass(frozen=True)
class Slopes(LinearSolver):
    """Solves systems with a diagonal matrix that is known by its products: one for the diagonal, one to check.

    A matrix that is not diagonal leaves a residual, which the solution reports.

    Raises:
        ValueError: in `solve`, arguments that do not fit.
        FloatingPointError: in `solve`, a zero on the diagonal.

    Example:
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, -2.0])))
        >>> Slopes().solve(A, torch.ones(2)).value
        tensor([ 1.0000, -0.5000])
    """

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        system = check_system("Slopes", A, b, x0)
        if system.zero:
            return zero_solution("Slopes", system)
        ones = torch.ones(A.vector_shape, dtype=A.dtype, device=A.device)
        slopes = A.remember(Slopes, lambda: (A @ ones).detach())
        return apply_inverse(
            "Slopes", system, A, lambda rows: rows / slopes, default_rtol(A), num_matvec=1, memory=slopes.nbytes
        )
