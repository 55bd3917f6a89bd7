"""A solver chosen from size, declared structure, number of right-hand sides, and how the first attempt goes."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg.bicgstab import BiCGSTAB
from implicitgrad.linalg.block_cg import BlockCG
from implicitgrad.linalg.cg import CG
from implicitgrad.linalg.checks import check_count, check_rtol, default_rtol
from implicitgrad.linalg.cholesky import Cholesky
from implicitgrad.linalg.gmres import GMRES
from implicitgrad.linalg.jacobi import Jacobi
from implicitgrad.linalg.known_inverse import KnownInverse
from implicitgrad.linalg.lu import LU
from implicitgrad.linalg.minres import MINRES
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.preconditioner import Preconditioner
from implicitgrad.linalg.solver import LinearSolver, Solution

DENSE_SIZE = 500
# A matrix is worth its n products up to this multiple of dense_size, where iterating would take a third as many.
RELUCTANT_FACTOR = 4
# Right-hand sides share a matrix: with so many products for each, a third of what iterating usually takes, it pays.
PRODUCTS_PER_ROW = 10
# CG runs bare for so long before anything is spent on speeding it up.
FIRST_ITERATIONS = 200
# The test of a preconditioner: the condition number seen in so many iterations has to fall by this factor, so that the
# number of iterations, its root, falls by a fifth.
PROBE_ITERATIONS, PROBE_GAIN = 20, 1.25**2
PROBE = Jacobi(num_probes=16)
# Block CG shares one Krylov space between right-hand sides; below this number its bookkeeping costs more.
FEWEST_FOR_A_BLOCK = 4
# Bytes above which the basis of GMRES gives way to BiCGSTAB.
LARGEST_BASIS = 2 * 1024**3


@dataclass(frozen=True)
class Auto(LinearSolver):
    """Solves any system with the solver that suits its size, its declared structure and its right-hand sides.

    In this order:

    1. An operator that knows its inverse uses it, if the residual agrees.
    2. Up to `dense_size` unknowns, or four times that with n / 10 right-hand sides: Cholesky; LU if the matrix is not
       symmetric or not positive definite.
    3. Symmetric: CG, or block CG from 4 right-hand sides on; MINRES if it meets negative curvature. After 200
       iterations without an end: the dense matrix, if n is at most four times `dense_size` and going on would take more
       than n / 3 products; otherwise the condition number is measured with and without a diagonal preconditioner
       (Jacobi), which is kept if it saves a fifth of the iterations; that test costs 58 products.
    4. Not symmetric: GMRES, or BiCGSTAB where its basis would need more than 2 GB; if GMRES ends without success, LU up
       to four times `dense_size`, BiCGSTAB above.

    `Solution.solver` names the solver that produced the value, `Solution.reason` what was chosen and why; `num_iter`
    and `num_matvec` count failed attempts too. What was found out about an operator is remembered with it.

    The default for `dense_size` comes from logistic regression with 5 n examples and damping 1e-3, one right-hand side,
    one CPU thread (experiments/benchmarks/dense_crossover.py): matrix and Cholesky took 0.6 ms where CG took 9.8 at
    n = 50, 5 against 24 at 200, 33 against 47 at 400, 246 against 245 at 800, 2.0 s against 1.1 s at 1600. With damping
    1e-2 the crossing lay near 300, with 1e-4 near 1000. Further right-hand sides cost a factor one product each.

    Args:
        rtol: handed to the chosen solver.
        max_iter: handed to the chosen solver if it iterates.
        dense_size: largest n for which the matrix is written down at once.

    Raises:
        ValueError: a hyperparameter out of range.
        torch.linalg.LinAlgError: in `solve`, the matrix of a small system is exactly singular.

    Example:
        >>> import torch
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, -2.0])), symmetric=True)
        >>> Auto().solve(A, torch.ones(2)).reason
        'LU (n = 2 <= dense_size = 500; Cholesky found the matrix not positive definite): converged'
    """

    rtol: float | None = None
    max_iter: int | None = None
    dense_size: int = DENSE_SIZE

    def __post_init__(self) -> None:
        check_rtol("Auto", self.rtol)
        check_count("Auto", "max_iter", self.max_iter)
        check_count("Auto", "dense_size", self.dense_size, at_least=0)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        trail = _Trail()
        if A.known_inverse is not None:
            attempt = trail.add(KnownInverse(self.rtol).solve(A, b, x0))
            if attempt.converged:
                return trail.end("the operator knows its inverse")
            trail.note("the inverse that the operator knows left a residual")
            if x0 is None and bool((attempt.relative_residual < 1).all()):
                x0 = attempt.value
        findings = A.remember(Auto, _Findings)
        if A.size <= self.dense_size:
            return self._solve_directly(A, b, x0, trail.note(f"n = {A.size} <= dense_size = {self.dense_size}"))
        if A.size <= RELUCTANT_FACTOR * self.dense_size:
            if findings.dense:
                return self._solve_directly(A, b, x0, trail.note("the matrix is there from an earlier solve"))
            if _num_rows(A, b) >= max(FEWEST_FOR_A_BLOCK, A.size / PRODUCTS_PER_ROW):
                findings.dense = True
                return self._solve_directly(A, b, x0, trail.note(f"{_num_rows(A, b)} right-hand sides share a matrix"))
        trail.note(f"n = {A.size} > dense_size = {self.dense_size}")
        if A.symmetric:
            return self._solve_symmetric(A, b, x0, trail, findings)
        return self._solve_general(A, b, x0, trail, findings)

    def _solve_directly(self, A: LinearOperator, b: Tensor, x0: Tensor | None, trail: "_Trail") -> Solution:
        if not A.symmetric:
            trail.add(LU(self.rtol).solve(A, b, x0))
            return trail.end("not symmetric")
        cost = A.dense_cost
        try:
            trail.add(Cholesky(self.rtol).solve(A, b, x0))
            return trail.end("symmetric")
        except LinAlgError:
            solution = LU(self.rtol).solve(A, b, x0)
        # the failed attempt made the matrix that LU found remembered
        trail.add(replace(solution, num_matvec=solution.num_matvec + cost))
        return trail.end("Cholesky found the matrix not positive definite", separator="; ")

    def _solve_symmetric(
        self, A: LinearOperator, b: Tensor, x0: Tensor | None, trail: "_Trail", findings: "_Findings"
    ) -> Solution:
        budget = min(10 * A.size, 2000) if self.max_iter is None else self.max_iter
        if findings.preconditioner is not None:
            trail.add(self._cg(A, b, budget, findings.preconditioner).solve(A, b, x0))
            return trail.end("symmetric, diagonal preconditioner kept from an earlier solve")
        bare = self._cg(A, b, min(budget, FIRST_ITERATIONS))
        attempt = trail.add(bare.solve(A, b, x0))
        why = "symmetric" if isinstance(bare, CG) else f"symmetric, {_num_rows(A, b)} right-hand sides"
        if attempt.reason == "negative curvature":
            trail.note(f"CG met negative curvature after {attempt.num_iter} iterations")
            trail.add(MINRES(self.rtol, self.max_iter).solve(A, b, x0))
            return trail.end()
        if attempt.converged or attempt.reason != "max_iter reached" or budget <= FIRST_ITERATIONS:
            return trail.end(why)
        rtol = default_rtol(A) if self.rtol is None else self.rtol
        trail.note(f"{why}, CG left {attempt.relative_residual.max():.0e} after {attempt.num_iter} iterations")
        if A.size <= RELUCTANT_FACTOR * self.dense_size and _products_left(attempt, rtol) > A.size / 3:
            findings.dense = True
            return self._solve_directly(A, b, None, trail)
        cost = 0
        if findings.gain is None:
            findings.gain, cost = _gain(A, b), PROBE.cost(A) + 2 * (PROBE_ITERATIONS + 1)
            findings.preconditioner = PROBE if findings.gain > PROBE_GAIN else None
        trail.note(f"a diagonal preconditioner divides the condition number by {findings.gain:.2g}")
        rest = self._cg(A, b, budget - attempt.num_iter, findings.preconditioner).solve(A, b, attempt.value)
        trail.add(replace(rest, num_matvec=rest.num_matvec + cost))
        return trail.end("kept" if findings.preconditioner else "dropped", separator=": ")

    def _cg(
        self, A: LinearOperator, b: Tensor, max_iter: int, preconditioner: Preconditioner | None = None
    ) -> LinearSolver:
        solver = BlockCG if _num_rows(A, b) >= FEWEST_FOR_A_BLOCK else CG
        return solver(rtol=self.rtol, max_iter=max_iter, preconditioner=preconditioner)

    def _solve_general(
        self, A: LinearOperator, b: Tensor, x0: Tensor | None, trail: "_Trail", findings: "_Findings"
    ) -> Solution:
        gmres, bicgstab = GMRES(self.rtol, max_iter=self.max_iter), BiCGSTAB(self.rtol, max_iter=self.max_iter)
        if (gmres.restart + 1) * b.nbytes > LARGEST_BASIS:
            trail.add(bicgstab.solve(A, b, x0))
            return trail.end(f"not symmetric, a basis for GMRES would take {gmres.restart + 1} times b")
        attempt = trail.add(gmres.solve(A, b, x0))
        if attempt.converged or attempt.reason not in ("stagnated", "max_iter reached") or self.max_iter is not None:
            return trail.end("not symmetric")
        trail.note(f"not symmetric, GMRES {attempt.reason} at {attempt.relative_residual.max():.0e}")
        if A.size <= RELUCTANT_FACTOR * self.dense_size:
            findings.dense = True
            return self._solve_directly(A, b, None, trail)
        trail.add(bicgstab.solve(A, b, attempt.value))
        return trail.end()


@dataclass
class _Findings:
    """What earlier solves found out about an operator."""

    dense: bool = False
    gain: float | None = None  # of the diagonal preconditioner, once that was tried
    preconditioner: Preconditioner | None = None


@dataclass
class _Trail:
    """The attempts at one system and the reasons for each."""

    attempts: list[Solution] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, solution: Solution) -> Solution:
        self.attempts.append(solution)
        return solution

    def note(self, text: str) -> "_Trail":
        self.notes.append(text)
        return self

    def end(self, text: str = "", separator: str = ", ") -> Solution:
        """The best attempt, with the costs of all and what was chosen and why."""
        rank = lambda solution: (not solution.converged, solution.relative_residual.max().item())
        best = min(reversed(self.attempts), key=rank)
        why = "; ".join(self.notes) + (separator if self.notes and text else "") + text
        return replace(
            best,
            num_iter=sum(attempt.num_iter for attempt in self.attempts),
            num_matvec=sum(attempt.num_matvec for attempt in self.attempts),
            memory=max(attempt.memory for attempt in self.attempts),
            reason=f"{best.solver} ({why}): {best.reason}",
        )


def _num_rows(A: LinearOperator, b: Tensor) -> int:
    """How many right-hand sides each system has."""
    return 1 if b.ndim == len(A.vector_shape) else len(b)


def _products_left(solution: Solution, rtol: float) -> float:
    """Products that an unfinished solve would still take if the residual went on falling as it did."""
    end = solution.relative_residual.max().item()
    return solution.num_matvec * math.log(end / rtol) / -math.log(end) if end < 1 else math.inf


def _gain(A: LinearOperator, b: Tensor) -> float:
    """By what factor the diagonal preconditioner lowers the condition number that a few iterations see."""
    row = b if b.ndim == len(A.vector_shape) else b[0]
    root = A.remember(PROBE, lambda: PROBE.build(A))(torch.ones_like(row)).sqrt()
    scaled = LinearOperator(
        lambda v: root * (A @ (root * v)),
        A.size,
        symmetric=True,
        dtype=A.dtype,
        device=A.device,
        batch_shape=A.batch_shape,
    )
    return _condition_seen(A, row) / _condition_seen(scaled, root * row)


def _condition_seen(A: LinearOperator, b: Tensor) -> float:
    solution = CG(rtol=torch.finfo(A.dtype).tiny, max_iter=PROBE_ITERATIONS).solve(A, b)
    if solution.ritz_min is None or solution.ritz_max is None or solution.ritz_min <= 0:
        return math.inf
    return solution.ritz_max / solution.ritz_min
