"""What happened in a solve: residuals, iterations, reason; and the warnings and errors that follow from it."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from implicitgrad.linalg import ErrorBound, Solution

OnUnconverged = Literal["warn", "raise", "ignore"]
_PACKAGE = str(Path(__file__).parent) + os.sep


class ConvergenceWarning(UserWarning):
    """An inner problem or a linear system was not solved to its tolerance, so derivatives are approximate."""


class ConvergenceError(RuntimeError):
    """The same under `on_unconverged="raise"`."""


@dataclass(frozen=True)
class LinearSolve:
    """One linear system with the Jacobian of a condition or its transpose.

    Attributes:
        kind: `"adjoint"` (`Aᵀu = v`, reverse mode) or `"tangent"` (`A u = v`, forward mode).
        solver: Class that produced the value.
        residual: `‖v - A u‖`, recomputed from its definition; the largest over right-hand sides.
        relative_residual: The same divided by `‖v‖`; no unit.
        iterations: Steps of the solver; 0 for a factorisation.
        products: Products with the matrix, one per right-hand side.
        right_hand_sides: How many systems were solved together.
        converged: Whether the relative residual met the tolerance for every right-hand side.
        reason: Which solver, and why it stopped.
        seconds: Wall time; on a GPU the time to queue the work, unless the solver had to wait for results.
        memory: Bytes of vectors and matrices held by the solver.
        error_bound: Bound on `‖u - u*‖` where the smallest eigenvalue is known or was estimated on the way.
        energy_error: Estimate from below of the error in the norm of the matrix, by conjugate gradients.
    """

    kind: Literal["adjoint", "tangent"]
    solver: str
    residual: float
    relative_residual: float
    iterations: int
    products: int
    right_hand_sides: int
    converged: bool
    reason: str
    seconds: float
    memory: int
    error_bound: ErrorBound | None = None
    energy_error: float | None = None

    @classmethod
    def of(
        cls, kind: Literal["adjoint", "tangent"], solution: Solution, bound: ErrorBound | None, seconds: float
    ) -> "LinearSolve":
        """The record of a `Solution` that took `seconds`."""
        return cls(
            kind=kind,
            solver=solution.solver,
            residual=solution.residual_norm.max().item(),
            relative_residual=solution.relative_residual.max().item(),
            iterations=solution.num_iter,
            products=solution.num_matvec,
            right_hand_sides=solution.residual_norm.numel(),
            converged=solution.converged,
            reason=solution.reason if solution.solver in solution.reason else f"{solution.solver}: {solution.reason}",
            seconds=seconds,
            memory=solution.memory,
            error_bound=bound,
            energy_error=solution.energy_error,
        )


@dataclass
class Report:
    """One solution made differentiable, and every linear system solved for its derivatives so far.

    Attributes:
        condition: Class name of the condition.
        size: Unknowns n in one problem.
        batch: Problems solved side by side (1 without `vmap`).
        route: How products with the Jacobian are made: `"retained graph"` or `"finite difference"`.
        support: Coordinates to which linear systems were restricted, the largest number over a batch; None for all.
        notes: What the condition found out about the solution: constraints that are weakly active, and the like.
        inner_residual: `‖residual(x, y)‖` at the returned `y`; the largest over a batch.
        inner_relative: The same divided by `‖∂residual/∂y · y‖`: for a linear condition, the relative error of `y`.
        inner_converged: Whether the relative residual met the tolerance.
        seconds: Wall time of evaluating the condition.
        solves: Records of linear solves, oldest first.
    """

    condition: str
    size: int = 0
    batch: int = 1
    route: str = "retained graph"
    support: int | None = None
    notes: list[str] = field(default_factory=list)
    inner_residual: float = float("nan")
    inner_relative: float = float("nan")
    inner_converged: bool = True
    seconds: float = 0.0
    solves: list[LinearSolve] = field(default_factory=list)

    @property
    def last(self) -> LinearSolve:
        """The newest linear solve.

        Raises:
            LookupError: no derivative has been asked for yet.
        """
        if not self.solves:
            raise LookupError("no linear system was solved yet: ask for a derivative (for example loss.backward())")
        return self.solves[-1]

    @property
    def adjoint_residual(self) -> float:
        """Relative residual of the newest linear solve."""
        return self.last.relative_residual

    @property
    def iterations(self) -> int:
        """Iterations of the newest linear solve."""
        return self.last.iterations

    @property
    def products(self) -> int:
        """Jacobian products over all linear solves."""
        return sum(solve.products for solve in self.solves)

    @property
    def reason(self) -> str:
        """Why the newest linear solve stopped."""
        return self.last.reason

    @property
    def converged(self) -> bool:
        """Whether the inner problem and every linear system met their tolerances."""
        return self.inner_converged and all(solve.converged for solve in self.solves)

    @property
    def memory(self) -> int:
        """Bytes held by the largest linear solve."""
        return max((solve.memory for solve in self.solves), default=0)

    def __str__(self) -> str:
        problems = f"{self.batch} x {self.size}" if self.batch > 1 else f"{self.size}"
        mark = "" if self.inner_converged else "  NOT CONVERGED"
        support = "" if self.support is None else f", restricted to a support of {self.support}"
        lines = [
            f"{self.condition}, {problems} unknowns{support}, products by {self.route}",
            f"  inner    residual {self.inner_residual:.1e}  relative {self.inner_relative:.1e}"
            f"  {1e3 * self.seconds:.1f} ms{mark}",
            *(f"  note     {note}" for note in self.notes),
        ]
        for solve in self.solves:
            mark = "" if solve.converged else "  NOT CONVERGED"
            count = f" x{solve.right_hand_sides}" if solve.right_hand_sides > 1 else ""
            bound = f"  error {solve.error_bound}" if solve.error_bound else ""
            lines.append(
                f"  {solve.kind:8s} residual {solve.residual:.1e}  relative {solve.relative_residual:.1e}{bound}"
                f"  {1e3 * solve.seconds:.1f} ms{mark}\n"
                f"           {solve.reason}{count}, {solve.iterations} iterations, {solve.products} products, "
                f"{_bytes(solve.memory)}"
            )
        return "\n".join(lines)


class Log(list[Report]):
    """Reports in the order of their solutions; printing shows them one below the other."""

    def __str__(self) -> str:
        return "\n".join(str(report) for report in self) or "no implicit solution was differentiated"


# A plain list, not a context variable: on a GPU, backward passes run in threads of autograd's own.
_open_logs: list[Log] = []


@contextmanager
def diagnostics() -> Iterator[Log]:
    """Collect a `Report` for every implicit solution made or differentiated inside the block.

    Example:
        >>> import torch, implicitgrad as ig
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> halve = ig.Stationary(lambda x, y: (y - x / 2) ** 2)
        >>> with diagnostics() as log:
        ...     ig.implicit_root(halve, x, torch.tensor(1.5)).backward()
        >>> log[-1].converged, log[-1].last.kind
        (True, 'adjoint')
    """
    log = Log()
    _open_logs.append(log)
    try:
        yield log
    finally:
        _open_logs[:] = [other for other in _open_logs if other is not log]


def publish(report: Report) -> None:
    """Add `report` to every open log that does not hold it yet."""
    for log in _open_logs:
        if not any(known is report for known in log):
            log.append(report)


def observed() -> bool:
    """Whether some log is open."""
    return bool(_open_logs)


@dataclass(frozen=True)
class Policy:
    """What to do about solves that miss their tolerance, and whose line of code to blame.

    Attributes:
        on_unconverged: `"warn"` (once per call site), `"raise"` or `"ignore"`.
        inner_tolerance: Largest relative inner residual that passes.
        site: File and line of the call outside this package.
    """

    on_unconverged: OnUnconverged = "warn"
    inner_tolerance: float = 1e-3
    site: tuple[str, int] = ("<unknown>", 0)

    def __post_init__(self) -> None:
        if self.on_unconverged not in ("warn", "raise", "ignore"):
            raise ValueError(f'on_unconverged must be "warn", "raise" or "ignore", got {self.on_unconverged!r}')
        if not self.inner_tolerance > 0:
            raise ValueError(f"inner_tolerance must be positive, got {self.inner_tolerance}")

    def judge_inner(self, report: Report) -> None:
        """Warn or raise when the inner problem was not solved to `inner_tolerance`."""
        if not report.inner_converged:
            self._complain(
                "inner",
                f"the inner solution does not satisfy its condition: {report.condition} residual "
                f"{report.inner_residual:.1e}, relative {report.inner_relative:.1e} > {self.inner_tolerance:.1e}. "
                "Derivatives are off by up to that times the condition number of the Jacobian. Solve the inner "
                "problem more accurately, correct the condition, or raise inner_tolerance.",
            )

    def judge_solve(self, solve: LinearSolve) -> None:
        """Warn or raise when a linear system was not solved to its tolerance."""
        if not solve.converged:
            self._complain(
                solve.kind,
                f"the {solve.kind} system was not solved: {solve.solver} stopped after {solve.iterations} iterations "
                f"with relative residual {solve.relative_residual:.1e} ({solve.reason}). "
                "Allow more iterations, use another linear solver, or loosen rtol.",
            )

    def _complain(self, kind: str, text: str) -> None:
        if self.on_unconverged == "raise":
            raise ConvergenceError(text)
        if self.on_unconverged == "warn":
            _warn_once(kind, text, *self.site)


_registries: dict[tuple[str, int, str], dict] = {}


def _warn_once(kind: str, text: str, filename: str, line: int) -> None:
    """Warn once per call site and kind, although the numbers in the text differ from time to time.

    The registry of `warnings` knows a warning by its text. Renaming the entry keeps that memory, and with it the
    rule that a change of filters makes a warning show again.
    """
    registry = _registries.setdefault((filename, line, kind), {})
    for key in [key for key in registry if key != "version"]:
        registry[(text, ConvergenceWarning, line)] = registry.pop(key)
    warnings.warn_explicit(text, ConvergenceWarning, filename, line, registry=registry)


def call_site() -> tuple[str, int]:
    """File and line of the innermost frame outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def check_finite(value: Tensor, what: str) -> None:
    """Raise unless every entry of `value` is finite.

    Raises:
        FloatingPointError: naming `what` and how many entries are not finite.
    """
    if not value.isfinite().all():
        bad = int((~value.isfinite()).sum())
        raise FloatingPointError(
            f"{what} has {bad} of {value.numel()} entries that are NaN or infinite; check the inner solution, the "
            "data and the loss for overflow, log(0) or a division by zero"
        )


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.1f} GB"
