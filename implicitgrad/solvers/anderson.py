"""Anderson acceleration of fixed-point iterations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.conditions import FixedPoint
from implicitgrad.linalg import LinearSolver
from implicitgrad.linalg.matrix import factor_dtype
from implicitgrad.linalg.rows import check_every
from implicitgrad.solvers.fixed_point import check_damping, checked_norm, movement
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree

# An extrapolation that makes the residual this much larger than the smallest so far is taken back.
GROWTH_LIMIT = 10.0


@dataclass(frozen=True)
class Anderson(InnerSolver):
    r"""Solves $y = step(x, y)$ by steps extrapolated from the last ones (Anderson acceleration, type II).

    With the residuals $f_k = step(y_k) - y_k$ and the differences $\Delta y$, $\Delta f$ of the last `memory` iterates,
    $y_{k+1} = y_k + \beta f_k - (\Delta y + \beta \Delta f) \gamma$ where γ minimises
    $\|f_k - \Delta f \gamma\|^2$. With all iterates kept and a linear step this is GMRES. Near a solution it seldom
    converges slower than the plain iteration, and often where that does not. A step that makes the residual ten times
    larger than the smallest so far, or not finite, is taken back: memory is cleared, β halved, and a plain step taken
    from the best iterate. The best iterate is returned.

    Costs one step and a QR decomposition of n by `memory` numbers per iteration, `O(n memory²)`, and
    `4 memory + 12` vectors of memory; on a device one number is read every 8 iterations. All of y is one system with
    one γ; `torch.func.vmap` over the solver gives each example its own.

    Args:
        step: `step(x, y, *data)` returns a tree like y.
        tol: Largest norm of `y - step(x, y)` that counts as solved, absolute; None for 1.5e-8 in float64, 3.5e-4 in
            float32.
        max_iter: Steps.
        memory: Differences kept.
        damping: β of extrapolated steps, in (0, 1]; 1 for none.
        regularization: λ in `‖f - ΔF γ‖² + λ ‖γ‖²` with the columns of ΔF scaled to norm one; None for the eps of the
            dtype. Larger values help where the step is noisy.
        symmetric: As in `FixedPoint`.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Source: Anderson (1965); Walker and Ni (2011), "Anderson acceleration for fixed-point iterations", problem (2.2) for
    γ by QR. Departures: scaled and regularised columns, after Scieur, d'Aspremont and Bach (2016); the safeguard.

    Raises:
        TypeError: `step` is no function.
        ValueError: a hyperparameter out of range; in a run, a step that returns no tree like y.
        FloatingPointError: in a run, NaN or infinity at the start, or wherever steps lead.

    Example:
        >>> import torch
        >>> solver = Anderson(lambda x, y: torch.cos(x * y))
        >>> x = torch.tensor([1.0, 0.5], requires_grad=True)
        >>> y, info = solver(x, init=torch.zeros(2))
        >>> y.detach().round(decimals=3), info.converged
        (tensor([0.7390, 0.9000]), True)
    """

    step: Callable[..., Tree]
    tol: float | None = None
    max_iter: int = 500
    memory: int = 5
    damping: float = 1.0
    regularization: float | None = None
    symmetric: bool = False
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("Anderson", self.step, self.tol, self.max_iter)
        check_damping("Anderson", self.damping)
        if not (isinstance(self.memory, int) and self.memory >= 1):
            raise ValueError(
                f"Anderson(memory=...) needs an integer of at least 1; got {self.memory!r}. FixedPointIteration "
                "has no memory."
            )
        if self.regularization is not None and not 0 < self.regularization < float("inf"):
            raise ValueError(
                f"Anderson(regularization=...) needs a positive number, or None for the dtype's own; got "
                f"{self.regularization!r}."
            )

    @property
    def condition(self) -> FixedPoint:
        """The step no longer moves y."""
        return FixedPoint(self.step, self.symmetric)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        problem = Objective("Anderson", self.step, x, init, data)
        y, tol, num_iter = problem.start, tolerance(self.tol, problem.start.dtype), 0
        every, damping = check_every(y), y.new_full((), self.damping)
        regularization = self.regularization or torch.finfo(y.dtype).eps
        change = movement(problem, self.step, y)
        best = _Best(y, change, torch.linalg.vector_norm(change))
        norm = checked_norm(problem, best.norm)
        history = _History(*y.new_zeros(2, self.memory, len(y)))
        plain = torch.ones_like(best.norm, dtype=torch.bool)
        while norm > tol and num_iter < self.max_iter:
            num_iter += 1
            ahead = history.extrapolated(y, change, damping, regularization)
            new = movement(problem, self.step, ahead)
            size = torch.linalg.vector_norm(new)
            # a plain step stands even if it leads uphill: a step may have to before it contracts
            failed = ~size.isfinite() | ~plain & (size > GROWTH_LIMIT * best.norm)
            history.extend(ahead - y, new - change, (num_iter - 1) % self.memory, failed)
            best = best.or_else(ahead, new, size)
            y, change = torch.where(failed, best.y, ahead), torch.where(failed, best.change, new)
            damping, plain = torch.where(failed, damping / 2, damping), failed
            if num_iter % every == 0 or num_iter == self.max_iter:
                norm = checked_norm(problem, best.norm)
        return problem.outcome(
            best.y, num_iter=num_iter, residual_norm=norm, tol=tol, reason="max_iter reached", value=None
        )


class _Best(NamedTuple):
    """The iterate with the smallest residual."""

    y: Tensor
    change: Tensor
    norm: Tensor

    def or_else(self, y: Tensor, change: Tensor, norm: Tensor) -> "_Best":
        better = norm < self.norm
        return _Best(*(torch.where(better, new, old) for new, old in zip((y, change, norm), self, strict=True)))


class _History(NamedTuple):
    """Differences of iterates and of their residuals, in rows `(memory, n)`; zero where there is none yet."""

    steps: Tensor
    changes: Tensor

    def extrapolated(self, y: Tensor, change: Tensor, damping: Tensor, regularization: float) -> Tensor:
        """The next iterate; a plain step where there is no history."""
        gamma = _least_squares(self.changes, change, regularization)
        return y + damping * change - gamma @ self.steps - damping * (gamma @ self.changes)

    def extend(self, step: Tensor, change: Tensor, row: int, failed: Tensor) -> None:
        """Put this pair in place of the oldest one; forget all where the step failed."""
        for matrix, new in zip(self, (step, change), strict=True):
            matrix[row] = new
            matrix.masked_fill_(failed, 0)


def _least_squares(rows: Tensor, right: Tensor, regularization: float) -> Tensor:
    """The γ `(m,)` that minimises `‖right - rowsᵀ γ‖² + regularization ‖scales γ‖²`; zero where a row is zero.

    Scales are the norms of the rows. By QR of the scaled system, stacked upon the regularisation, `right` as last
    column.
    """
    m, n = rows.shape
    lengths = torch.linalg.vector_norm(rows, dim=1)
    scales = torch.where(lengths > 0, 1 / lengths, 0.0)
    stacked = rows.new_zeros(m + 1, n + m, dtype=factor_dtype(rows.dtype))  # transposed
    torch.mul(rows, scales.unsqueeze(1), out=stacked[:m, :n])
    stacked[m, :n] = right
    stacked[:m, n:].diagonal().fill_(regularization**0.5)
    r = torch.linalg.qr(stacked.mT, mode="r").R
    solved = torch.linalg.solve_triangular(r[:m, :m], r[:m, m:], upper=True).squeeze(1)
    return scales * solved.to(rows.dtype)
