"""Which constraints bind at the nearest point of a polyhedron, for many points at once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.rows import check_every

# Squared distance from the span of the active rows below which a row of norm one counts as combined from them, and the
# share of an active row in it below which it has none. The inverse of a Gram matrix is of no use beyond.
DEPENDENT = 1e-13


class ActiveRows(torch.autograd.Function):
    """Rows of `C` that hold with equality at the projection of `y` onto `{z : C z = d in the first p, C z <= d}`.

    `apply(y, C, d, num_equal)` for `y: (n,)`, `C: (m, n)` with rows of norm one, `d: (m,)`, p = `num_equal`, returns
    `(m,)` booleans, without derivative. The rows are linearly independent, with nonnegative multipliers, and the point
    of `C z = d` on them that is nearest to y is the projection.

    A custom function, since its `forward` runs below all transforms, where values can be read.
    """

    @staticmethod
    def forward(y: Tensor, C: Tensor, d: Tensor, num_equal: int) -> Tensor:
        for value, field in ((y, "y"), (C, "A or G"), (d, "b or h")):
            if not value.isfinite().all():
                raise FloatingPointError(f"polyhedron got NaN or infinity in {field}; find out where it arose")
        batch = torch.broadcast_shapes(y.shape[:-1], C.shape[:-2], d.shape[:-1])
        points = lambda value: value.double().expand(*batch, -1).reshape(-1, value.shape[-1])
        C = C.double()
        one_for_all = C[..., 0, 0].numel() == 1
        C = C.reshape(C.shape[-2:]) if one_for_all else C.expand(*batch, -1, -1).flatten(0, -3)
        return _active_rows(_problem(points(y), C, points(d), num_equal)).reshape(*batch, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple:
        return None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, y: Tensor, C: Tensor, d: Tensor, num_equal: int) -> tuple[Tensor, int]:
        first = lambda value, dim: value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
        y, C, d = (first(value, dim) for value, dim in zip((y, C, d), in_dims, strict=False))
        return ActiveRows.apply(y, C, d, num_equal), 0


class _Problem(NamedTuple):
    """What stays the same for B points with m constraints each.

    Attributes:
        y: `(B, n)`.
        C: Rows of norm one, `(B, m, n)`, or `(m, n)` if they are the same for all points.
        d: `(B, m)`.
        equal: Which rows are equalities, `(m,)`.
        size: Of the numbers that the gaps `C z - d` are differences of, `(B, 1)`.
    """

    y: Tensor
    C: Tensor
    d: Tensor
    equal: Tensor
    size: Tensor

    def tolerance(self, multipliers: Tensor, times: float = 1) -> Tensor:
        """What a gap may be by rounding errors, or a number of `times` that, `(B, 1)`; never a true violation."""
        sizes = self.size + multipliers.abs().sum(1, keepdim=True)
        return torch.minimum(100 * times * torch.finfo(self.y.dtype).eps * sizes, 1e-8 * self.size)


def _problem(y: Tensor, C: Tensor, d: Tensor, num_equal: int) -> _Problem:
    size = torch.linalg.vector_norm(y, dim=1, keepdim=True) + d.abs().amax(1, keepdim=True)
    return _Problem(y, C, d, torch.arange(d.shape[1], device=d.device) < num_equal, size)


class _State(NamedTuple):
    """Where the method stands.

    Attributes:
        gap: `C z - d` at the present point z, `(B, m)`.
        multipliers: u with `z = y - Cᵀ u`, `(B, m)`; zero outside of active rows and the entering one.
        active: `(B, m)`.
        inverse: Of the Gram matrix of the active rows, zero up to rounding elsewhere, `(B, m, m)`.
        entering: The row that is on its way to become active, `(B, 1)`; -1 if the next is to be chosen.
        passed: Rows that need no further look: equalities that had one, and others combined from active rows, `(B, m)`.
        empty: Where the constraints contradict each other, `(B, 1)`.
    """

    gap: Tensor
    multipliers: Tensor
    active: Tensor
    inverse: Tensor
    entering: Tensor
    passed: Tensor
    empty: Tensor


class _Move(NamedTuple):
    """A step of the method: the multiplier of `row` rises by `length`, the active constraints stay equalities.

    Attributes:
        row: That wants to become active, `(B, 1)`.
        multipliers: Those of the state, freed of rounding errors, `(B, m)`.
        gap: That goes with them, `(B, m)`.
        share: Of the active rows in `row`, `(B, m)`: by how much their multipliers fall with its own.
        slope: By how much the gaps fall with it, `(B, m)`.
        distance: Squared, of `row` from the span of the active rows, `(B, 1)`.
        length: `(B, 1)`.
        enters: Whether `row` becomes active, `(B, 1)`.
        leaves: Whether the row `leaving` becomes inactive first, `(B, 1)`.
        leaving: `(B, 1)`.
        passes: Whether `row` is done with, `(B, 1)`.
        empty: Whether no point fulfils `row` together with the active rows, `(B, 1)`.
    """

    row: Tensor
    multipliers: Tensor
    gap: Tensor
    share: Tensor
    slope: Tensor
    distance: Tensor
    length: Tensor
    enters: Tensor
    leaves: Tensor
    leaving: Tensor
    passes: Tensor
    empty: Tensor


def _active_rows(problem: _Problem) -> Tensor:
    """The active rows at the end, `(B, m)`."""
    batch, m = problem.d.shape
    gap = (problem.y.unsqueeze(1) @ problem.C.mT).squeeze(1) - problem.d
    no_row, no_point = torch.zeros_like(gap, dtype=torch.bool), torch.zeros_like(gap[:, :1], dtype=torch.bool)
    state = _State(
        gap=gap,
        multipliers=torch.zeros_like(gap),
        active=no_row,
        inverse=gap.new_zeros(batch, m, m),
        entering=torch.full_like(no_point, -1, dtype=torch.long),
        passed=no_row,
        empty=no_point,
    )
    for step in range(20 * m + 100):
        row, busy = _next_row(state, problem)
        if step % check_every(gap) == 0 and not busy.any():
            break
        state = _after(state, problem.equal, _move(state, problem, row, busy))
    if state.empty.any():
        raise ValueError(
            "polyhedron needs constraints that some point fulfils, but the set is empty for "
            f"{int(state.empty.sum())} of {batch} points; relax b or h"
        )
    end = _move(state, problem, row, torch.zeros_like(busy))
    gap = torch.where(state.active, end.gap.abs(), end.gap)
    exact = (gap <= 1e-7 * problem.size) & (
        problem.equal | (end.multipliers >= -1e-7 * end.multipliers.abs().amax(1, True))
    )
    if busy.any() or not exact.all():
        raise RuntimeError(
            f"polyhedron: {int((busy | ~exact).any(1).sum())} of {batch} points did not come out to 1e-7 within {step} "
            "steps, since rows are almost combinations of others; remove such rows"
        )
    return state.active


def _next_row(state: _State, problem: _Problem) -> tuple[Tensor, Tensor]:
    """The row to make active, `(B, 1)`: equalities first, then what is violated most; and where there is one."""
    violation = state.gap.masked_fill(state.active | state.passed, -torch.inf)
    violation = violation.masked_fill(problem.equal & ~state.passed, torch.inf)
    worst, row = violation.max(1, keepdim=True)
    pending = state.entering >= 0
    return torch.where(pending, state.entering, row), ~state.empty & (
        pending | (worst > problem.tolerance(state.multipliers))
    )


def _move(state: _State, problem: _Problem, row: Tensor, busy: Tensor) -> _Move:
    """The step that `row` calls for, of length zero where nothing is to be done."""
    each = torch.arange(len(row), device=row.device)
    C, entering = problem.C, problem.C[row.squeeze(1)] if problem.C.ndim == 2 else problem.C[each, row.squeeze(1)]
    # Products with C, not its Gram matrix, and a step of refinement keep rounding errors, and those left in the inverse
    # by updates, out of what is decided here. One for the entering row, one for the point itself.
    vectors = torch.stack([entering, problem.y - (state.multipliers.unsqueeze(1) @ C).squeeze(1)], 1)  # (B, 2, n)
    sides = torch.stack([torch.zeros_like(problem.d), problem.d], 1)
    active, coefficients, rest = state.active.unsqueeze(1), torch.zeros_like(sides), vectors
    for _ in range(2):
        coefficients = coefficients + active * ((active * (rest @ C.mT - sides)) @ state.inverse)
        rest = vectors - coefficients @ C
    (share, correction), (slope, gap) = coefficients.unbind(1), (rest @ C.mT - sides).unbind(1)
    multipliers = state.multipliers + correction
    violated, distance = gap.gather(1, row), rest[:, 0].square().sum(1, keepdim=True)
    independent, is_equal = distance > DEPENDENT, problem.equal[row]
    full = torch.where(independent, violated / torch.where(independent, distance, 1), torch.inf)
    falls = state.active & ~problem.equal & (share > DEPENDENT)
    partial, leaving = torch.where(falls, multipliers / share, torch.inf).min(1, keepdim=True)
    # combined from active rows, none of which could give way: it agrees with them, up to their errors, or nothing does
    settled = busy & ~independent & (is_equal | partial.isinf())
    empty = settled & (violated.abs() > problem.tolerance(multipliers, times=1e4))
    moves = busy & ~settled
    return _Move(
        row=row,
        multipliers=multipliers,
        gap=gap,
        share=share,
        slope=slope,
        distance=distance,
        length=torch.where(moves, torch.minimum(full, partial), 0),
        enters=moves & (full <= partial),
        leaves=moves & (full > partial),
        leaving=leaving,
        passes=busy & is_equal | settled,
        empty=empty,
    )


def _after(state: _State, equal: Tensor, move: _Move) -> _State:
    """The state after a move; overwrites the inverse."""
    none = torch.zeros_like(state.active)
    unit, gone = none.scatter(1, move.row, True), none.scatter(1, move.leaving, move.leaves)
    active = (state.active | unit & move.enters) & ~gone
    # a row enters the inverse by a block elimination, and leaves it by the reverse: a product of one vector either way
    removed = state.inverse.take_along_dim(move.leaving.unsqueeze(2), 1).squeeze(1)
    vector = torch.where(move.leaves, removed, move.share - unit.to(move.share))
    pivot = torch.where(move.leaves, -removed.gather(1, move.leaving), move.distance)
    weight = torch.where(move.enters | move.leaves, 1 / pivot, 0)
    return _State(
        gap=(move.gap - move.length * move.slope).masked_fill(active, 0),
        multipliers=(move.multipliers + move.length * (unit.to(move.share) - move.share)).masked_fill(gone, 0),
        active=active,
        inverse=state.inverse.baddbmm_((weight * vector).unsqueeze(2), vector.unsqueeze(1)),
        entering=torch.where(move.leaves, move.row, -1),
        passed=state.passed & (equal | (move.length == 0)) | unit & move.passes,
        empty=state.empty | move.empty,
    )
