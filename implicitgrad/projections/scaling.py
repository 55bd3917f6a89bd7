"""Scaling a positive matrix to given row and column sums, in the log domain.

`log P = scores + f + g` with row sums a and column sums b; this is entropic optimal transport in units of the
regularisation. The row potential f is eliminated: for every g there is one f in closed form that makes the rows right,
and g maximises the concave function `<a, f(g)> + <b, g>`, whose gradient is what the columns lack.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg import CG, LinearOperator
from implicitgrad.linalg.rows import any_row, check_every

EASY = 200.0  # a span of scores for which Newton's method converges from a few sweeps
ROUGH = 1e-2  # marginal error at which the next, larger scores are taken up
WARM_UP = 2  # sweeps before Newton's method
MAX_HALVINGS = 12  # of a Newton step; what is shorter gains less than a sweep
DROPPED = 0.1  # entries of the plan left out of the Hessian add up to less than this times the marginal error


class Scaling(NamedTuple):
    """A scaled matrix in the log domain, and how it was found.

    Attributes:
        f: `(*batch, n)`.
        g: `(*batch, m)`, of mean zero.
        error: Largest over the batch of `(|P1 - a|₁ + |Pᵀ1 - b|₁) / |a|₁`, computed at the end.
        num_sweeps: Sinkhorn iterations, each one pass over rows and one over columns.
        num_newton: Newton steps.
        num_evaluations: Evaluations of the plan, in line searches above all; each costs as much as a sweep.
    """

    f: Tensor
    g: Tensor
    error: float
    num_sweeps: int
    num_newton: int
    num_evaluations: int


def scale(scores: Tensor, a: Tensor, b: Tensor, *, tol: float, max_iter: int, newton: bool) -> Scaling:
    """Potentials for which the marginals are right up to `tol`, or what was reached after `max_iter`.

    Args:
        scores: `(*batch, n, m)`, logarithm of the matrix.
        a: `(*batch, n)`, positive.
        b: `(*batch, m)`, positive, of the same sum.
        tol: On the marginal error relative to the mass.
        max_iter: Sweeps and evaluations together.
        newton: Newton steps with a sparse Hessian instead of sweeps alone.

    Source: Cuturi (2013) and Schmitzer (2019) for sweeps; Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao,
    Ying (2024), "Accelerating Sinkhorn algorithms with sparse Newton iterations", for Newton. Departures: rows are
    eliminated, which halves the system; entries are kept by the marginal error, not to a fixed density, so that steps
    converge superlinearly; scores grow by factors of two, each problem begun at the potentials of the one before, which
    takes the place of most sweeps; a sweep follows each step that has not halved the error.

    Raises:
        FloatingPointError: NaN or infinity in a Newton system.
    """
    spent = _Spent(max_iter)
    if newton:
        state = _by_newton(scores, a, b, tol, spent)
    else:
        state = _by_sweeps(scores, a, b, torch.zeros_like(b), tol, spent)
    mean = state.g.mean(-1, keepdim=True)
    rows = (state.plan.sum(-1) - a).abs().sum(-1) / a.sum(-1)
    error = (state.error + rows).max().item() if state.error.numel() else 0.0
    return Scaling(state.f + mean, state.g - mean, error, spent.sweeps, spent.newton, spent.evaluations)


class _Spent:
    """A budget of sweeps and evaluations, and what went where."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.sweeps = self.newton = self.evaluations = 0

    @property
    def left(self) -> int:
        return max(self.budget - self.sweeps - self.evaluations, 0)


class _State(NamedTuple):
    """The plan at g with right rows: potentials, entries, what the columns lack, and what is maximised."""

    f: Tensor
    g: Tensor
    plan: Tensor
    lack: Tensor
    value: Tensor
    error: Tensor


def _evaluated(scores: Tensor, a: Tensor, b: Tensor, g: Tensor, spent: _Spent) -> _State:
    spent.evaluations += 1
    shifted = scores + g.unsqueeze(-2)
    f = a.log() - shifted.logsumexp(-1)
    plan = shifted.add_(f.unsqueeze(-1)).exp_()
    lack = b - plan.sum(-2)
    value = (a * f).sum(-1) + (b * g).sum(-1)
    return _State(f, g, plan, lack, value, lack.abs().sum(-1) / b.sum(-1))


def _by_sweeps(
    scores: Tensor, a: Tensor, b: Tensor, g: Tensor, tol: float, spent: _Spent, most: int | None = None
) -> _State:
    """Sinkhorn iterations until the columns are right, at most so many."""
    log_a, log_b, mass, every = a.log(), b.log(), b.sum(-1), check_every(scores)
    for i in range(1, (spent.left if most is None else min(most, spent.left)) + 1):
        spent.sweeps += 1
        f = log_a - (scores + g.unsqueeze(-2)).logsumexp(-1)
        after = log_b - (scores + f.unsqueeze(-1)).logsumexp(-2)
        error = (b * (g - after).expm1()).abs().sum(-1) / mass  # column sums at g are b exp(g - after)
        done = error <= tol
        g = torch.where(done.unsqueeze(-1), g, after)
        if i % every == 0 and not any_row(~done):
            break
    return _evaluated(scores, a, b, g, spent)


def _by_newton(scores: Tensor, a: Tensor, b: Tensor, tol: float, spent: _Spent) -> _State:
    """Newton's method along a sequence of growing scores."""
    span = (scores.amax((-2, -1)) - scores.amin((-2, -1))).max().item() if scores.numel() else 0.0
    num_doublings = max(0, math.ceil(math.log2(max(span, EASY) / EASY)))
    start = torch.zeros_like(b)
    for i in range(num_doublings, -1, -1):
        part, aim = scores / 2**i, tol if i == 0 else max(tol, ROUGH)
        state = _by_sweeps(part, a, b, start, aim, spent, WARM_UP)
        while spent.left and any_row(state.error > aim):
            before, state = state.error, _newton_step(part, a, b, state, aim, spent)
            if any_row((state.error > before / 2) & (state.error > aim)):
                state = _by_sweeps(part, a, b, state.g, aim, spent, 1)
        start = 2 * state.g
    return state


def _newton_step(scores: Tensor, a: Tensor, b: Tensor, state: _State, tol: float, spent: _Spent) -> _State:
    """A step that raises the value, as long as it may be; none where even a short one does not."""
    spent.newton += 1
    direction = _direction(a, state)
    slope = (direction * state.lack).sum(-1)
    slack = 10 * torch.finfo(b.dtype).eps * state.value.abs()
    # potentials differ by no more than the scores; a longer step comes from a nearly singular Hessian
    reach = scores.amax((-2, -1)) - scores.amin((-2, -1))
    length = (reach / direction.abs().amax(-1)).clamp(max=1)
    resting = (state.error <= tol) | ~length.isfinite()
    length = torch.where(resting, 0, length)
    for _ in range(MAX_HALVINGS):
        trial = _evaluated(scores, a, b, state.g + length.unsqueeze(-1) * direction, spent)
        enough = trial.value >= state.value + 1e-4 * length * slope - slack
        poor = ~(enough | (trial.error <= state.error / 2) | resting)
        if not any_row(poor):
            return trial
        length = torch.where(poor, length / 2, length)
    return _evaluated(scores, a, b, state.g + torch.where(poor, 0, length).unsqueeze(-1) * direction, spent)


def _direction(a: Tensor, state: _State) -> Tensor:
    """Newton's direction by CG, with the entries of the plan that matter for the error at hand.

    The Hessian is minus `diag(Pᵀ1) - Pᵀ diag(1/a) P`. The diagonal is that of the whole plan, so that what is left out
    of the second term keeps it positive semidefinite.
    """
    n, m = state.plan.shape[-2:]
    smallest = DROPPED * state.error * a.sum(-1) / (n * m)
    plan = state.plan.reshape(-1, n, m)
    which, rows, columns = (plan > smallest.reshape(-1, 1, 1)).nonzero().unbind(1)
    entries = plan[which, rows, columns]
    rows, columns = which * n + rows, which * m + columns
    shares = entries / a.reshape(-1)[rows]
    diagonal = state.plan.sum(-2)

    def gathered(values: Tensor, places: Tensor, like: Tensor) -> Tensor:
        return torch.zeros_like(like).reshape(-1).index_add_(0, places, values).reshape(like.shape)

    def product(v: Tensor) -> Tensor:
        through = gathered(shares * v.reshape(-1)[columns], rows, a).reshape(-1)
        return diagonal * v - gathered(entries * through[rows], columns, v)

    own = diagonal - gathered(entries * shares, columns, diagonal)
    own = own.clamp(min=torch.finfo(a.dtype).eps * diagonal.amax(-1, keepdim=True))
    options = {"dtype": a.dtype, "device": a.device, "batch_shape": tuple(a.shape[:-1])}
    A = LinearOperator(product, m, symmetric=True, eigenvalue_floor=0.0, **options)
    # steps of superlinear convergence need no more; the error is one number for all, as the tolerance is
    rtol = min(0.1, max(state.error.max().item() ** 0.5, 1e-8))
    direction = CG(rtol, num_refinements=0, preconditioner=lambda r: r / own).solve(A, state.lack).value
    return direction - direction.mean(-1, keepdim=True)  # a shift of g changes nothing
