"""A primal-dual interior point method for stacks of quadratic programs, in torch, on any device."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.conditions import QP
from implicitgrad.linalg import LinearSolver
from implicitgrad.linalg.checks import check_count
from implicitgrad.linalg.rows import check_every
from implicitgrad.solvers.active_set_factor import ActiveSetFactor
from implicitgrad.solvers.qp_program import Point, Program, Terms, apply, largest, program, solution_tree
from implicitgrad.solvers.qp_reduced import Reduction, lifted, longest_step
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree

RUNNING, SOLVED, PRIMAL_INFEASIBLE, DUAL_INFEASIBLE, STALLED = range(5)
STATUS = ("max_iter reached", "solved", "primal infeasible", "dual infeasible (unbounded)", "numerical trouble")


@dataclass(frozen=True)
class QPInteriorPoint(InnerSolver):
    """Solves quadratic programs by Mehrotra's predictor-corrector method, many at once.

    With slacks `s = h - G z > 0` and `λ > 0`, each iteration takes a Newton step on the conditions of `QP` with
    `sᵢ λᵢ = σμ` in place of `sᵢ λᵢ = 0`: first with σ = 0, which tells how far μ can fall, then with
    `σ = (μ_affine / μ)³` and the second-order term of the first. Last come Newton steps on the active set, which make
    the solution exact up to rounding and leave their factors to the derivative.

    Where every Q is definite, A has independent rows and m <= 2n, the program is first reduced to its inequalities, by
    factors of `(n, n)` and `(p, p)`; an iteration then costs a Cholesky factor of `(m, m)`, see `Reduction`. Programs
    that this does not solve, and all others, go to the general method: per iteration one Cholesky factor of
    `Q + Gᵀ diag(λ/s) G + ρ AᵀA`, where the term with ρ changes nothing but makes singular Q possible, and one of its
    Schur complement in A, n³/3 + n² (m + p) operations.

    Converges for feasible, bounded convex programs, in 10 to 20 iterations mostly. All problems of a stack go through
    the same operations; those that are finished stand still. Fewer numbers are read from a GPU than one per iteration.
    Use float64: in float32 about 1e-4 is reached.

    Source: Mehrotra (1992); Nocedal and Wright (2006), algorithm 16.4, with the starting point of Vandenberghe (2010),
    "The CVXOPT linear and quadratic cone program solvers", section 5.3. Infeasibility is told by certificates, as in
    Stellato et al. (2020), "OSQP", section 3.4: multipliers with `Aᵀν + Gᵀλ = 0`, `bᵀν + hᵀλ < 0`, or a direction with
    `Q d = 0`, `A d = 0`, `G d <= 0`, `cᵀd < 0`.

    Args:
        tol: Largest entry of the residual, relative to 1 plus the largest entry of its terms (`Qz`, `c`, `Aᵀν`, `Gᵀλ`;
            `Az`, `b`, `Gz`, `h`); None for 1e-9 in float64, 1e-4 in float32.
        max_iter: Iterations.
        linear_solver: For the systems of the derivative; None for the factor of the last step.

    Raises:
        ValueError: a hyperparameter out of range.

    Example:
        >>> import torch
        >>> problem = {"Q": torch.eye(2), "c": torch.tensor([-3.0, -0.5]), "G": torch.eye(2), "h": torch.ones(2)}
        >>> problem = {name: part.double() for name, part in problem.items()}
        >>> y, info = QPInteriorPoint().run(problem, None)
        >>> y["primal"].tolist(), y["inequality"].tolist(), info.reason
        ([1.0, 0.5], [2.0, 0.0], 'solved')
    """

    tol: float | None = None
    max_iter: int = 60
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_tol("QPInteriorPoint", self.tol)
        check_count("QPInteriorPoint", "max_iter", self.max_iter)

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
        with torch.no_grad():
            y, status, num_iter, factor = _solve(qp, tol, self.max_iter)
            info = summary(qp, y, status, num_iter, tol, factor)
        return solution_tree(x, data, y, stack), info


def _solve(qp: Program, tol: float, max_iter: int) -> tuple[Point, Tensor, int, ActiveSetFactor]:
    """Solutions, statuses `(B,)`, iterations, and factors there: of the reduced program, or of the whole one."""
    batch, n, _, m = qp.sizes
    reduction = Reduction.of(qp) if 0 < m <= 2 * n else None
    status = torch.full((batch,), RUNNING, device=qp.c.device)
    if reduction is None:
        return _solve_whole(qp, tol, max_iter)
    lam, s, num_iter = reduction.solve(tol, max_iter)
    factor = reduction.active_set_factor(lam > s)
    y = qp.polished(reduction.point(torch.where(lam > s, lam, 0)), factor)
    solved = qp.error(y, qp.terms(y)) <= tol
    if solved.all():
        return y, torch.full_like(status, SOLVED), num_iter, factor
    rest = (~solved).nonzero().squeeze(-1)
    others, status_of_others, more, _ = _solve_whole(qp.chosen(rest), tol, max_iter)
    y = Point(*(part.expand(batch, -1).index_copy(0, rest, new) for part, new in zip(y, others, strict=True)))
    status = torch.full_like(status, SOLVED).index_copy(0, rest, status_of_others)
    return y, status, num_iter + more, qp.active_set_factor(y)


def _solve_whole(qp: Program, tol: float, max_iter: int) -> tuple[Point, Tensor, int, ActiveSetFactor]:
    y, status, num_iter = interior_point(qp, tol, max_iter)
    y, factor = polished(qp, y, status)
    return y, status, num_iter, factor


def summary(qp: Program, y: Point, status: Tensor, num_iter: int, tol: float, factor: ActiveSetFactor) -> SolverInfo:
    """What happened: the worst over the stack.

    Args:
        qp: The programs.
        y: Where a solver stopped.
        status: How each program ended, `(B,)`; what it says about a solution is checked.
        num_iter: Iterations of the slowest.
        tol: On `Program.error`.
        factor: For the derivative.
    """
    terms = qp.terms(y)
    feasible = (status != PRIMAL_INFEASIBLE) & (status != DUAL_INFEASIBLE)
    solved = feasible & (qp.error(y, terms) <= tol)
    status = torch.where(solved, SOLVED, torch.where(status == SOLVED, STALLED, status))
    residual = torch.cat([qp.stationarity(terms), qp.feasibility(y, terms)], -1)
    codes = status.tolist()
    places = {code: [i for i, found in enumerate(codes) if found == code] for code in sorted(set(codes))}
    told = [
        STATUS[code] + ("" if code == SOLVED or len(codes) == 1 else f": problems {places[code]}") for code in places
    ]
    return SolverInfo(
        num_iter=num_iter,
        residual_norm=torch.linalg.vector_norm(residual, dim=-1).max().item(),
        converged=bool(solved.all()),
        reason="; ".join(told),
        num_evaluations=num_iter,
        value=qp.value(y, terms).item() if len(codes) == 1 else None,
        linear_solver=factor,
    )


def polished(qp: Program, y: Point, status: Tensor) -> tuple[Point, ActiveSetFactor]:
    """`y` after Newton steps on its active set where the program is not infeasible, and the factor of these steps."""
    factor = qp.active_set_factor(y)
    feasible = (status != PRIMAL_INFEASIBLE) & (status != DUAL_INFEASIBLE)
    return qp.polished(y, factor).where(feasible, y), factor


def interior_point(qp: Program, tol: float, max_iter: int) -> tuple[Point, Tensor, int]:
    """The last iterates, statuses `(B,)` and the number of iterations."""
    batch, _, _, m = qp.sizes
    gram = qp.A.mT @ qp.A
    y, s = _start(qp, gram)
    status = torch.full((batch,), RUNNING, device=qp.c.device)
    proof = torch.finfo(s.dtype).eps ** 0.5
    if m == 0:
        return y, torch.full_like(status, SOLVED), 1
    terms = qp.terms(y)
    for iteration in range(1, max_iter + 1):
        new, new_s = _step(qp, gram, y, s, terms)
        running = status == RUNNING
        finite = torch.stack([part.isfinite().all(-1) for part in (*new, new_s)]).all(0)
        move = running & finite
        y, s = new.where(move, y), torch.where(move.unsqueeze(-1), new_s, s)
        terms = qp.terms(y)
        found = _judge(qp, y, s, terms, tol, proof * torch.where(finite, 1, 100))
        found = torch.where(finite | (found != RUNNING), found, STALLED)
        status = torch.where(running, found, status)
        if iteration % check_every(s) == 0 and not (status == RUNNING).any():
            return y, status, iteration
    return y, status, max_iter


def _judge(qp: Program, y: Point, s: Tensor, terms: Terms, tol: float, proof: Tensor) -> Tensor:
    """Status of every program, `(B,)`; a certificate of infeasibility passes with an error of `proof: (B,)`."""
    slackness = (s * y.lam).sum(-1) / (1 + qp.value(y, terms).abs())
    feasibility = largest(terms.Gz + s - qp.h) / (1 + largest(qp.h, terms.Gz))
    solved = (qp.error(y, terms) <= tol) & (slackness <= tol) & (feasibility <= tol)
    separation = -((qp.b * y.nu).sum(-1) + (qp.h * y.lam).sum(-1))
    separates = largest(terms.At_nu + terms.Gt_lam) <= proof * separation
    descent = -(qp.c * y.z).sum(-1)
    ray = largest(terms.Qz, terms.Az, terms.Gz.clamp(min=0)) <= proof * descent
    status = torch.full_like(slackness, RUNNING, dtype=torch.int64)
    status = torch.where(ray & (descent > 0), DUAL_INFEASIBLE, status)
    status = torch.where(separates & (separation > 0), PRIMAL_INFEASIBLE, status)
    return torch.where(solved, SOLVED, status)


def _start(qp: Program, gram: Tensor) -> tuple[Point, Tensor]:
    """The minimiser of the objective plus `‖G z - h‖² / 2`, with slacks and multipliers moved to be positive."""
    system = _System.factorised(qp, gram, torch.ones_like(qp.h))
    z, nu = system.solve(qp, apply(qp.G.mT, qp.h) - qp.c, qp.b)
    lam = apply(qp.G, z) - qp.h
    return Point(z, nu, lifted(lam)), lifted(-lam)


def _step(qp: Program, gram: Tensor, y: Point, s: Tensor, terms: Terms) -> tuple[Point, Tensor]:
    """One iteration of Mehrotra's method."""
    stationarity, equality, inequality = qp.stationarity(terms), terms.Az - qp.b, terms.Gz + s - qp.h
    system = _System.factorised(qp, gram, y.lam / s)

    def direction(target: Tensor) -> tuple[Point, Tensor]:
        """Newton direction with `s dλ + λ ds = -target`."""
        pull = (y.lam * inequality - target) / s
        dz, dnu = system.solve(qp, -stationarity - apply(qp.G.mT, pull), -equality)
        ds = -inequality - apply(qp.G, dz)
        return Point(dz, dnu, (-target - y.lam * ds) / s), ds

    gap = (s * y.lam).mean(-1, keepdim=True)
    affine, ds = direction(s * y.lam)
    length = longest_step(y.lam, affine.lam, s, ds)
    ahead = ((s + length * ds) * (y.lam + length * affine.lam)).mean(-1, keepdim=True)
    centring = (ahead / gap).clamp(min=0) ** 3
    move, ds = direction(s * y.lam + ds * affine.lam - centring * gap)
    length = (0.99 * longest_step(y.lam, move.lam, s, ds)).clamp(max=1)
    return Point(*(a + length * b for a, b in zip(y, move, strict=True))), s + length * ds


class _System(NamedTuple):
    """`K = [Q + GᵀWG, Aᵀ; A, 0]` by the Cholesky factors of `H = Q + GᵀWG + ρAᵀA` and of `A H⁻¹Aᵀ`."""

    weights: Tensor  # (B, m), the diagonal of W
    penalty: Tensor  # ρ, (B, 1)
    upper: Tensor  # factor L of H
    half: Tensor  # L⁻¹Aᵀ
    lower: Tensor  # factor of the Schur complement

    @classmethod
    def factorised(cls, qp: Program, gram: Tensor, weights: Tensor) -> "_System":
        """With `gram = AᵀA`; entries of failed factors are NaN, or lead to NaN."""
        batch, n, p, _ = qp.sizes
        scale = 1 + qp.Q.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)
        squares = largest(qp.A.square().sum(-2)).unsqueeze(-1)
        penalty = scale / torch.where(squares > 0, squares, 1)
        ridge = 100 * torch.finfo(qp.Q.dtype).eps * scale  # keeps degenerate programs from stopping the factorisation
        H = qp.Q + qp.G.mT @ (weights.unsqueeze(-1) * qp.G) + penalty.unsqueeze(-1) * gram
        H = H + torch.diag_embed(ridge.expand(-1, n))
        L = _cholesky(H.expand(batch, n, n))
        half = torch.linalg.solve_triangular(L, qp.A.mT.expand(batch, n, p), upper=False)
        schur = half.mT @ half
        floor = 100 * torch.finfo(qp.Q.dtype).eps * schur.diagonal(dim1=-2, dim2=-1)
        return cls(weights, penalty, L, half, _cholesky(schur + torch.diag_embed(floor)))

    def solve(self, qp: Program, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """`(dz, dν)` with `K (dz, dν) = (r, e)`, refined once."""
        dz, dnu = self._solve_once(qp, r, e)
        curved = apply(qp.Q, dz) + apply(qp.G.mT, self.weights * apply(qp.G, dz))
        more = self._solve_once(qp, r - curved - apply(qp.A.mT, dnu), e - apply(qp.A, dz))
        return dz + more[0], dnu + more[1]

    def _solve_once(self, qp: Program, r: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        t = _forward(self.upper, r + self.penalty * apply(qp.A.mT, e))
        dnu = _backward(self.lower, _forward(self.lower, apply(self.half.mT, t) - e))
        return _backward(self.upper, t - apply(self.half, dnu)), dnu


def _cholesky(matrix: Tensor) -> Tensor:
    """The factor; NaN where there is none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0).reshape(-1, 1, 1), factor, torch.nan)


def _forward(L: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L, v.expand(len(L), -1).unsqueeze(-1), upper=False).squeeze(-1)


def _backward(L: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(L.mT, v.expand(len(L), -1).unsqueeze(-1), upper=True).squeeze(-1)


def tolerance(tol: float | None, dtype: torch.dtype) -> float:
    """`tol`, or that of the dtype."""
    return tol if tol is not None else {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 1e-2)


def check_tol(name: str, tol: float | None) -> None:
    """Raise unless `tol` is None or between 0 and 1."""
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"{name}(tol=...) needs a number between 0 and 1, or None for the dtype's own; got {tol!r}.")
