"""Quadratic programs by the packages Clarabel and OSQP."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

from implicitgrad import optional
from implicitgrad.conditions import QP
from implicitgrad.linalg import LinearSolver
from implicitgrad.linalg.checks import check_count
from implicitgrad.solvers.qp_interior_point import (
    DUAL_INFEASIBLE,
    PRIMAL_INFEASIBLE,
    RUNNING,
    SOLVED,
    STALLED,
    check_tol,
    polished,
    summary,
    tolerance,
)
from implicitgrad.solvers.qp_program import Point, Program, program, solution_tree
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class QPPackage(InnerSolver):
    """Solves quadratic programs by Clarabel (interior points) or OSQP (operator splitting), on the CPU.

    Problems of a stack are solved one after the other. The packages see sparse matrices: entries that are exactly zero
    cost nothing. Last come Newton steps on the active set, dense ones, which make the solution exact up to rounding
    where the package identified that set.

    Needs SciPy and the package: `pip install "implicitgrad[qp]"`.

    Source: Goulart and Chen (2024), "Clarabel: an interior-point solver for conic programs with quadratic objectives";
    Stellato et al. (2020), "OSQP: an operator splitting solver for quadratic programs".

    Args:
        package: Which of the two.
        tol: Given to the package as every tolerance, and asked of the result as in `QPInteriorPoint`; None for 1e-9 in
            float64, 1e-4 in float32.
        max_iter: Iterations; None for 200 of Clarabel, 100 000 of OSQP.
        linear_solver: For the systems of the derivative; None for the factor of the last step.

    Raises:
        ValueError: another package, or a hyperparameter out of range.
        ImportError: in `run`, a package is missing; says how to get it.
    """

    package: Literal["clarabel", "osqp"] = "clarabel"
    tol: float | None = None
    max_iter: int | None = None
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        if self.package not in _PACKAGES:
            raise ValueError(f"QPPackage needs a package of {sorted(_PACKAGES)}, got {self.package!r}")
        check_tol("QPPackage", self.tol)
        check_count("QPPackage", "max_iter", self.max_iter)

    @property
    def condition(self) -> QP:
        """The conditions of Karush, Kuhn and Tucker."""
        return QP()

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        """The solution; a stack of problems if parts have leading dimensions. `init` is not used.

        Raises:
            TypeError, ValueError, FloatingPointError: parts that do not fit, or are not finite.
        """
        qp, stack = program(x, data)
        tol = tolerance(self.tol, qp.c.dtype)
        package, sparse = optional.require(self.package, extra="qp"), optional.require("scipy.sparse", extra="qp")
        solve = _PACKAGES[self.package]
        results = [solve(package, one, tol, self.max_iter) for one in _problems(qp, sparse)]
        table = torch.tensor([[*one.z, *one.multipliers] for one in results], dtype=torch.float64)
        table = table.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(qp.c)  # packages mark infeasible problems by NaN
        _, n, p, m = qp.sizes
        status = torch.tensor([one.status for one in results], device=qp.c.device)
        num_iter = max(one.num_iter for one in results)
        with torch.no_grad():
            y, factor = polished(qp, Point(*table.split([n, p, m], -1)), status)
            info = summary(qp, y, status, num_iter, tol, factor)
        return solution_tree(x, data, y, stack), info


class _Problem(NamedTuple):
    """One program in NumPy: upper triangle of Q, then rows of equalities before those of inequalities."""

    Q: Any
    c: Any
    rows: Any
    bounds: Any
    num_equalities: int


class _Result(NamedTuple):
    z: list[float]
    multipliers: list[float]
    status: int
    num_iter: int


def _problems(qp: Program, sparse: ModuleType) -> list[_Problem]:
    batch, n, p, m = qp.sizes
    double = [part.double().cpu().expand(batch, *part.shape[1:]) for part in qp]
    Q, c, A, b, G, h = double
    rows, bounds = torch.cat([A, G], 1).numpy(), torch.cat([b, h], 1).numpy()
    return [
        _Problem(sparse.csc_matrix(Q[i].triu().numpy()), c[i].numpy(), sparse.csc_matrix(rows[i]), bounds[i], p)
        for i in range(batch)
    ]


def _clarabel(package: ModuleType, one: _Problem, tol: float, max_iter: int | None) -> _Result:
    settings = package.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = tol
    settings.max_iter = max_iter or 200
    num_inequalities = len(one.bounds) - one.num_equalities
    cones = [package.ZeroConeT(one.num_equalities), package.NonnegativeConeT(num_inequalities)]
    cones = [cone for cone, size in zip(cones, (one.num_equalities, num_inequalities), strict=True) if size]
    found = package.DefaultSolver(one.Q, one.c, one.rows, one.bounds, cones, settings).solve()
    codes = {
        "Solved": SOLVED,
        "PrimalInfeasible": PRIMAL_INFEASIBLE,
        "AlmostPrimalInfeasible": PRIMAL_INFEASIBLE,
        "DualInfeasible": DUAL_INFEASIBLE,
        "AlmostDualInfeasible": DUAL_INFEASIBLE,
        "MaxIterations": RUNNING,
    }
    return _Result(found.x, found.z, codes.get(str(found.status), STALLED), found.iterations)


def _osqp(package: ModuleType, one: _Problem, tol: float, max_iter: int | None) -> _Result:
    lower = one.bounds.copy()
    lower[one.num_equalities :] = -float("inf")
    solver = package.OSQP()
    solver.setup(
        one.Q, one.c, one.rows, lower, one.bounds, verbose=False, eps_abs=tol, eps_rel=tol, max_iter=max_iter or 100_000
    )
    found = solver.solve(raise_error=False)
    codes = {
        "solved": SOLVED,
        "primal infeasible": PRIMAL_INFEASIBLE,
        "dual infeasible": DUAL_INFEASIBLE,
        "maximum iterations reached": RUNNING,
    }
    return _Result(list(found.x), list(found.y), codes.get(found.info.status, STALLED), found.info.iter)


_PACKAGES: dict[str, Callable[[ModuleType, _Problem, float, int | None], _Result]] = {
    "clarabel": _clarabel,
    "osqp": _osqp,
}
