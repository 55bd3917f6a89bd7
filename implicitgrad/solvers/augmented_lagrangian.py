"""Minimisation under equality constraints by the method of multipliers, with inexact Newton steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import KKT
from implicitgrad.linalg import CG, LinearSolver
from implicitgrad.report import check_finite
from implicitgrad.solvers.newton import Newton
from implicitgrad.solvers.newton_systems import check_systems
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree

# A violation that does not fall to this share has the penalty grow by this factor (Nocedal and Wright, section 17.4).
ENOUGH_PROGRESS, PENALTY_GROWTH = 0.25, 10.0
LARGEST_PENALTY = 1e12  # relative to the first: beyond it constraints contradict each other
# Subproblems are solved to this share of the residual of the whole problem.
SUBPROBLEM_SHARE = 0.1
NEWTON_STEPS = 50  # in a subproblem; the next one goes on from where it ends


@dataclass(frozen=True)
class AugmentedLagrangian(InnerSolver):
    r"""Minimises $f(x, z)$ subject to $h(x, z) = 0$ by the method of multipliers.

    Minimises $f + \nu^\top h + \frac{\rho}{2} \|h\|^2$ in z by `Newton`, then sets $\nu \leftarrow \nu + \rho h$, and
    raises ρ tenfold where $\|h\|$ did not fall to a quarter. Converges to a point with vanishing residual where second-
    order sufficient conditions hold and gradients of constraints are independent, from a start near enough or for
    convex problems; the violation falls by a factor of about 1/ρ per update.

    The solution is `{"primal": z, "equality": ν}`, and so is `init`; ν is shaped like the values of h, and zero if
    nothing better is known. Both parts are differentiable.

    The Newton systems have the Hessian of the Lagrangian plus $\rho J^\top J$, whose eigenvalues lie far apart: a few
    large ones, as many as constraints. Conjugate gradients find those quickly; a randomised sketch removes them,
    `CG(rtol=0.01, preconditioner=Nystrom(rank))` with a rank above the number of constraints.

    Args:
        objective: `f(x, z, *data)`, a scalar tensor, twice differentiable in z.
        equality: `h(x, z, *data)`, a tensor or a tree of tensors, zero at the solution.
        tol: Largest norm of the residual of `KKT` that counts as solved (gradient of the Lagrangian and h together),
            absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Updates of the multipliers.
        penalty: First ρ, in units of objective / h². It should be so large that the subproblem is convex near the
            solution.
        system_solver: For the Newton systems; solved loosely by default.
        linear_solver: For the systems of the derivative, which are symmetric and indefinite; None for `Auto()`.

    Source: Hestenes (1969), Powell (1969); Nocedal and Wright (2006), algorithm 17.4. Inexact Newton: Dembo, Eisenstat
    and Steihaug (1982). Departure: a subproblem is solved to a tenth of the residual of the whole problem.

    Raises:
        TypeError: a function is none, or `system_solver` no linear solver.
        ValueError: a hyperparameter out of range; in a run, `init` without its two parts.
        FloatingPointError: in a run, NaN or infinity in a function or its derivatives.

    Example:
        >>> import torch
        >>> nearest = AugmentedLagrangian(
        ...     lambda x, z: (z - x).square().sum() / 2, lambda x, z: z.sum().reshape(1) - 1
        ... )
        >>> x = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> y, info = nearest(x, init={"primal": torch.zeros(2), "equality": torch.zeros(1)})
        >>> y["primal"].detach().round(decimals=3), torch.autograd.grad(y["primal"][0], x)[0].round(decimals=3)
        (tensor([-0.5000,  1.5000]), tensor([ 0.5000, -0.5000]))
    """

    objective: Callable[..., Tensor]
    equality: Callable[..., Tree]
    tol: float | None = None
    max_iter: int = 50
    penalty: float = 10.0
    system_solver: LinearSolver = field(default_factory=lambda: CG(rtol=0.01))
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("AugmentedLagrangian", self.objective, self.tol, self.max_iter)
        check_hyperparameters("AugmentedLagrangian", self.equality, self.tol, self.max_iter)
        check_systems("AugmentedLagrangian", None, 1, self.system_solver)
        if not 0 < self.penalty < math.inf:
            raise ValueError(f"AugmentedLagrangian(penalty=...) needs a positive number; got {self.penalty!r}.")

    @property
    def condition(self) -> KKT:
        """The gradient of the Lagrangian and the constraints vanish."""
        return KKT(self.objective, equality=self.equality)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        problem = Objective("AugmentedLagrangian", self.objective, x, init, data)
        constants = problem.constants
        condition, tol = self.condition, tolerance(self.tol, problem.start.dtype)
        y, penalty, num_iter, reason = problem.unravel(problem.start), self.penalty, 0, "max_iter reached"
        norm, violation = _norms(condition, problem, y)
        while norm > tol and num_iter < self.max_iter:
            newton = Newton(
                self._augmented,
                tol=max(SUBPROBLEM_SHARE * norm, 0.5 * tol),
                max_iter=NEWTON_STEPS,
                system_solver=self.system_solver,
            )
            z, info = newton.run(constants[0], y["primal"], y["equality"], penalty, *constants[1:])
            problem.num_evaluations += info.num_evaluations
            values = problem.evaluate(lambda x, z, *data: tree.detach(self.equality(x, z, *data)), z)
            multipliers = tree.map(partial(_updated, penalty), y["equality"], values)
            y = {"primal": z, "equality": multipliers}
            num_iter, before = num_iter + 1, violation
            norm, violation = _norms(condition, problem, y)
            if violation > max(ENOUGH_PROGRESS * before, 0.5 * tol):
                penalty *= PENALTY_GROWTH
            if penalty > LARGEST_PENALTY * self.penalty:
                reason = f"constraints violated by {violation:.1e} under any penalty: they may contradict each other"
                break
        flat = tree.ravel_like(problem.unravel(problem.start), y)
        value = problem.evaluate(lambda x, y, *data: self.objective(x, y["primal"], *data), y).item()
        return problem.outcome(flat, num_iter=num_iter, residual_norm=norm, tol=tol, reason=reason, value=value)

    def _augmented(self, x: Tree, z: Tree, multipliers: Tree, penalty: float, *data: Tree) -> Tensor:
        terms = tree.map(lambda nu, h: ((nu + 0.5 * penalty * h) * h).sum(), multipliers, self.equality(x, z, *data))
        value = tree.scalar(self.objective(x, z, *data), "the objective")
        return value + torch.stack(tree.leaves(terms)).sum()


def _updated(penalty: float, multiplier: Tensor, value: Tensor) -> Tensor:
    return multiplier + penalty * value


def _norms(condition: KKT, problem: Objective, y: Tree) -> tuple[float, float]:
    """Norms of the residual and of its part h."""
    residual = problem.evaluate(condition.residual, y)
    whole, part = tree.ravel(tree.detach(residual))[0], tree.ravel(tree.detach(residual["equality"]))[0]
    check_finite(whole, f"{problem.name}: the residual")
    norm, violation = torch.stack([torch.linalg.vector_norm(whole), torch.linalg.vector_norm(part)]).tolist()
    return norm, violation
