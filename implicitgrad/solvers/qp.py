"""Differentiable solutions of quadratic programs, one or a stack of them, by a solver of choice."""

from collections.abc import Sequence

import torch
from torch import Tensor

from implicitgrad import closure, internals
from implicitgrad.below import Algorithm, BatchRule, computed
from implicitgrad.conditions import QP
from implicitgrad.conditions.qp import gathered
from implicitgrad.implicit import implicit_root
from implicitgrad.solvers.qp_interior_point import DUAL_INFEASIBLE, PRIMAL_INFEASIBLE, STATUS, QPInteriorPoint
from implicitgrad.solvers.qp_program import DIMENSIONS
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree


class InfeasibleError(RuntimeError):
    """A problem has no feasible point, or an objective without lower bound; the message has the solver's status."""


def solve_qp(problem: dict[str, Tensor], *, solver: InnerSolver | None = None) -> tuple[dict[str, Tensor], SolverInfo]:
    """Solve `min_z zᵀQz / 2 + cᵀz` subject to `A z = b`, `G z <= h`; differentiable in every matrix and vector.

    The derivative is that of `QP`, of every order and in every mode; it takes the factor that the solver's last step
    left behind. Parts may have leading dimensions, which broadcast: a stack of problems, solved together; so are
    problems under `torch.func.vmap`.

    Args:
        problem: Some of `Q: (..., n, n)`, `c: (..., n)`, `A: (..., p, n)`, `b: (..., p)`, `G: (..., m, n)`,
            `h: (..., m)`. Only the symmetric part of Q counts; it must be positive semidefinite.
        solver: `QPInteriorPoint()`, the default, or `QPPackage()`.

    Returns:
        `{"primal": z, "equality": ν, "inequality": λ}`, the last two where there are such constraints, and what
        happened, the worst over a stack. Look at `info.converged`; unconverged solutions also warn when they are
        differentiated.

    Raises:
        InfeasibleError: the solver found a problem infeasible or unbounded; `solver.run` tells so without raising.
        TypeError: parts that are no tensors of one floating point dtype.
        ValueError: unknown or missing parts, shapes that do not fit.
        FloatingPointError: NaN or infinity in a part.

    Example:
        >>> import torch
        >>> c = torch.tensor([[-3.0, -0.5], [-0.2, 0.0]], requires_grad=True)
        >>> y, info = solve_qp({"Q": torch.eye(2), "c": c, "G": torch.eye(2), "h": torch.ones(2)})
        >>> y["primal"].sum().backward()
        >>> info.converged, c.grad.round().abs().tolist()
        (True, [[0.0, 1.0], [1.0, 1.0]])
    """
    solver = QPInteriorPoint() if solver is None else solver
    if not isinstance(solver, InnerSolver) or not isinstance(solver.condition, QP):
        raise TypeError(f"solve_qp needs a solver of quadratic programs, got {type(solver).__name__}")
    problem = gathered(problem, ())
    infos: list[SolverInfo] = []
    run = _Run(solver, tuple(problem), infos)
    if internals.transforming():
        outputs = computed(run, *closure.shown(list(problem.values())), batch_rule=_lead_aligned(run.names))
    else:
        outputs = run(*(closure.without_derivative(part) for part in problem.values()))
    info = infos[-1]
    y = _attached(problem, dict(zip(_parts_of_solution(problem), outputs, strict=True)), solver, info)
    return y, info._replace(linear_solver=None)


def _parts_of_solution(problem: dict[str, Tensor] | Sequence[str]) -> list[str]:
    return ["primal"] + ["equality"] * ("A" in problem) + ["inequality"] * ("G" in problem)


def _attached(problem: dict[str, Tensor], y: dict[str, Tensor], solver: InnerSolver, info: SolverInfo) -> Tree:
    """`y` with its derivative; a stack by `vmap`, which makes one stack of linear systems of it."""
    condition, linear = solver.condition, solver.linear_solver or info.linear_solver
    stack = y["primal"].shape[:-1]
    attach = lambda x, y: implicit_root(condition, x, y, solver=linear)
    if not stack:
        return attach(problem, y)
    flat: dict[str, Tensor] = {}
    dims: dict[str, int | None] = {}
    for name, part in problem.items():
        own = part.shape[part.ndim - DIMENSIONS[name] :]
        shared = part.ndim == DIMENSIONS[name]
        flat[name], dims[name] = (part, None) if shared else (part.expand(*stack, *own).reshape(-1, *own), 0)
    rows = {name: part.reshape(-1, part.shape[-1]) for name, part in y.items()}
    attached = torch.func.vmap(attach, in_dims=(dims, 0))(flat, rows)
    return {name: part.reshape(*stack, part.shape[-1]) for name, part in attached.items()}


class _Run:
    """One call of a solver on plain tensors, in the order of `names`."""

    def __init__(self, solver: InnerSolver, names: tuple[str, ...], infos: list[SolverInfo]) -> None:
        self.solver, self.names, self.infos = solver, names, infos

    def __call__(self, *parts: Tensor) -> tuple[Tensor, ...]:
        with internals.without_forward_mode():
            y, info = self.solver.run(dict(zip(self.names, parts, strict=True)), None)
        if STATUS[PRIMAL_INFEASIBLE] in info.reason or STATUS[DUAL_INFEASIBLE] in info.reason:
            raise InfeasibleError(
                f"{type(self.solver).__name__}: {info.reason}; relax the constraints, or make the objective grow in "
                "every feasible direction"
            )
        self.infos.append(info)
        return tuple(y[name] for name in _parts_of_solution(self.names))


def _lead_aligned(names: tuple[str, ...]) -> BatchRule:
    """The rule of `vmap`: one more leading dimension, the first of a stack, for the parts that have it."""

    def rule(again: Algorithm, size: int, in_dims: Sequence[int | None], parts: Sequence[Tensor]) -> tuple:
        leads = [
            part.ndim - (dim is not None) - DIMENSIONS[name]
            for name, part, dim in zip(names, parts, in_dims, strict=True)
        ]
        return again(
            *(
                part if dim is None else _stacked(part.movedim(dim, 0), max(leads) - lead)
                for part, dim, lead in zip(parts, in_dims, leads, strict=True)
            )
        )

    return rule


def _stacked(part: Tensor, missing: int) -> Tensor:
    """`part` with ones after its first dimension, so that this stays the first of a stack."""
    return part.reshape(part.shape[0], *[1] * missing, *part.shape[1:])
