"""Projections made of others: onto Cartesian products, and onto intersections."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitgrad import closure, internals, tree
from implicitgrad.below import batch_in_front
from implicitgrad.linalg import LSMR, LinearOperator
from implicitgrad.linalg.checks import check_count
from implicitgrad.linalg.rows import check_every
from implicitgrad.projections import checks
from implicitgrad.projections.nested_forward import refuse_nested_forward_mode
from implicitgrad.tree import Tree

Projection = Callable[..., Tree]


def cartesian(projections: Tree) -> Callable[[Tree], Tree]:
    """The projection onto a Cartesian product: each part of a tree by its own projection.

    Args:
        projections: Dicts, lists and tuples with functions as leaves; each takes the part of y at its place, which may
            be a tree itself.

    Raises:
        TypeError: something else than a function as a leaf.
        ValueError: in the call, y has other keys or another length.

    Example:
        >>> project = cartesian({"w": lambda w: w.clamp(min=0), "b": lambda b: b})
        >>> project({"w": torch.tensor([-1.0, 2.0]), "b": torch.tensor(-3.0)})
        {'w': tensor([0., 2.]), 'b': tensor(-3.)}
    """
    for leaf in tree.leaves(projections):
        if not callable(leaf):
            raise TypeError(f"cartesian needs a tree of functions, got a leaf of type {type(leaf).__name__}")
    return lambda y: _part_by_part(projections, y)


def _part_by_part(projections: Tree, y: Tree) -> Tree:
    if callable(projections):
        return projections(y)
    keyed = isinstance(projections, Mapping)
    want = sorted(projections, key=str) if keyed else len(projections)
    got = (sorted(y, key=str) if keyed else len(y)) if isinstance(y, type(projections)) else type(y).__name__
    if want != got:
        raise ValueError(f"cartesian has projections for {want} where y has {got}; give both the same structure")
    if keyed:
        return {key: _part_by_part(projections[key], part) for key, part in y.items()}
    parts = [_part_by_part(projection, part) for projection, part in zip(projections, y, strict=True)]
    return type(y)(parts) if type(y) in (tuple, list) else type(y)(*parts)  # the latter a named tuple


class DykstraInfo(NamedTuple):
    """What happened in a run of Dykstra's algorithm.

    Attributes:
        num_iter: Sweeps over all sets.
        residual_norm: Largest distance between the points of the last sweep, one on each set. If it is zero, the point
            is the projection: it lies in all sets, and y differs from it by a sum of normals.
        converged: Whether that met the tolerance.
        reason: In words.
    """

    num_iter: int
    residual_norm: float
    converged: bool
    reason: str


@dataclass(frozen=True)
class Dykstra:
    """The projection onto the intersection of closed convex sets, from projections onto each.

    `Dykstra(projections)(y)` runs sweeps `c_i = z + p_i, z ← P_i(c_i), p_i ← c_i - z` until all points of
    a sweep agree; linear convergence for polyhedral sets, slower where sets touch. It is differentiated implicitly, not
    unrolled: at the limit `P_1(c_1) = ... = P_m(c_m)` and `y = z + Σ p_i`, equations in the c_i whose linearisation
    LSMR solves with products of the projections' derivatives. Two Newton steps from the limit give derivatives up to
    third order where the projections have them. Where normals of the sets depend on each other the c_i are not unique;
    then the solution of least norm serves, which gives the right first derivatives.

    Attributes:
        projections: Two or more functions `P(y) -> z` on trees like y. They may close over tensors, say a radius; the
            result is differentiable in those as well.
        tol: On `DykstraInfo.residual_norm`, relative to the larger of 1 and ‖y‖; None for 1e-12 in float64, 1e-6 below.
        max_iter: Sweeps.

    Raises:
        ValueError: fewer than two projections.
        TypeError: something that is no function; y is no tree of floating point tensors of one dtype.
        FloatingPointError: NaN or infinity in y or in a projection.
        RuntimeError: in the call, no convergence: the sets do not meet, or `max_iter` is too small. `solve` tells. Or a
            tensor closed over whose gradient cannot be followed, inside a custom autograd function or compiled code.

    Source: Boyle and Dykstra (1986); Birgin and Raydan (2005) on stopping by the increments, whose test this is.

    Example:
        >>> project = Dykstra((lambda y: y.clamp(min=0), lambda y: y - (y.sum() - 1) / y.numel()))
        >>> project(torch.tensor([0.5, 1.2, -3.0], dtype=torch.float64))
        tensor([0.1500, 0.8500, 0.0000], dtype=torch.float64)
    """

    projections: Sequence[Projection]
    tol: float | None = None
    max_iter: int = 10_000

    def __post_init__(self) -> None:
        check_count("Dykstra", "max_iter", self.max_iter)
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"Dykstra needs tol > 0, got {self.tol}")
        if any(not callable(projection) for projection in self.projections):
            raise TypeError("Dykstra needs a sequence of functions P(y)")
        if len(self.projections) < 2:
            raise ValueError(f"Dykstra needs two or more projections, got {len(self.projections)}")

    def __call__(self, y: Tree) -> Tree:
        """The projection of y, a tree like it, differentiable in y and in what the projections close over."""
        flat, unravel = tree.ravel(y)
        flat = checks.checked("Dykstra", flat, {})
        meeting = _Meeting(self, unravel)
        with internals.without_forward_mode():
            meeting.hidden = closure.record(meeting.on_each, [flat])
        hidden = closure.shown(meeting.hidden)
        points = _Limit.apply(meeting, flat, *hidden)
        for _ in range(2):
            gap = meeting.residual(points, flat, *hidden)
            points = points - _LinearSolve.apply(meeting, False, gap, points, flat, *hidden)
        return unravel(meeting.project(0, points[0], hidden))

    def solve(self, y: Tree) -> tuple[Tree, DykstraInfo]:
        """The projection of y as plain numbers, and what happened."""
        flat, unravel = tree.ravel(tree.detach(y))
        meeting = _Meeting(self, unravel)
        points, info = meeting.sweep(checks.checked("Dykstra", flat, {}), [])
        return tree.detach(unravel(meeting.project(0, points[0], []))), info


class _Meeting:
    """Where the sets meet, as an equation `residual(c, y, *hidden) = 0` in the m points c `(m, n)` projected.

    Attributes:
        hidden: Tensors that the projections close over; those given in their place are used.
    """

    def __init__(self, options: Dykstra, unravel: Callable[[Tensor], Tree]) -> None:
        self.options = options
        self.unravel = unravel
        self.hidden: list[Tensor] = []

    def project(self, i: int, point: Tensor, given: Sequence[Tensor]) -> Tensor:
        at = self.unravel(point)
        with closure.Substitution(self.hidden[: len(given)], given):
            return tree.ravel_like(at, self.options.projections[i](at))

    def on_each(self, point: Tensor) -> Tensor:
        """A point projected onto each set."""
        return torch.stack([self.project(i, point, []) for i in range(len(self.options.projections))])

    def residual(self, points: Tensor, y: Tensor, *given: Tensor) -> Tensor:
        """Differences of the points on the sets, and what is missing in `y = z + Σ (c_i - z)`; `(m, n)`."""
        on_sets = torch.stack([self.project(i, point, given) for i, point in enumerate(points)])
        balance = on_sets[0] + (points - on_sets).sum(0) - y
        return torch.cat([on_sets[:1] - on_sets[1:], balance.unsqueeze(0)])

    @torch.no_grad()
    def sweep(self, y: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, DykstraInfo]:
        """The points c at the end of Dykstra's algorithm."""
        number = len(self.options.projections)
        tol = self.options.tol or (1e-12 if y.dtype == torch.float64 else 1e-6)
        allowed = tol * max(1.0, torch.linalg.vector_norm(y).item())
        z, increments, every = y, [torch.zeros_like(y)] * number, check_every(y)
        for sweep in range(1, self.options.max_iter + 1):
            points, on_sets = [], []
            for i in range(number):
                points.append(z + increments[i])
                z = self.project(i, points[i], given)
                increments[i] = points[i] - z
                on_sets.append(z)
            if sweep % every and sweep < self.options.max_iter:
                continue
            apart = max(torch.linalg.vector_norm(point - z).item() for point in on_sets)
            if not apart < torch.inf:
                raise FloatingPointError(f"Dykstra: NaN or infinity in sweep {sweep}; check each projection at y")
            if apart <= allowed:
                return torch.stack(points), DykstraInfo(sweep, apart, True, "converged")
        return torch.stack(points), DykstraInfo(sweep, apart, False, "max_iter reached")

    def check_complete(self, points: Tensor, given: Sequence[Tensor]) -> None:
        """Raise if a projection hangs on a tensor that requires a gradient and is not among those given."""
        with torch.enable_grad():
            values = [self.project(i, point, given) for i, point in enumerate(points)]
        depth = internals.num_transforms()
        if any(value.requires_grad or internals.level_of(value) > depth for value in values):
            raise RuntimeError(
                "a projection given to Dykstra closes over a tensor inside a custom autograd function or compiled "
                "code, where its gradient would be lost; let a torch call outside of that code receive it"
            )

    def solved(self, b: Tensor, points: Tensor, y: Tensor, given: Sequence[Tensor], transposed: bool) -> Tensor:
        """A least-norm solution of `A u = b` or `Aᵀu = b` with `A = ∂residual/∂c`, numbers only."""
        size = max(1.0, torch.linalg.vector_norm(y).item())
        # the residual at the limit is rounding, of which a singular system makes noise
        if not transposed and torch.linalg.vector_norm(b) <= torch.finfo(b.dtype).eps ** 0.5 * size:
            return torch.zeros_like(b)
        product = lambda forward: lambda v: self.product(points, y, given, v.reshape(b.shape), forward).reshape(-1)
        A = LinearOperator(product(False), b.numel(), rmatvec=product(True), dtype=b.dtype, device=b.device)
        return LSMR().solve(A.T if transposed else A, b.reshape(-1)).value.reshape(b.shape)

    def product(self, points: Tensor, y: Tensor, given: Sequence[Tensor], u: Tensor, transposed: bool) -> Tensor:
        at = lambda c: self.residual(c, y, *given)
        result = tree.vjp(at, (points,), u)[0] if transposed else tree.jvp(at, (points,), (u,))
        assert result is not None
        return result


class _Limit(torch.autograd.Function):
    """y, closed-over tensors ↦ the points c at the limit, as constants."""

    @staticmethod
    def forward(meeting: _Meeting, y: Tensor, *given: Tensor) -> Tensor:
        if not y.isfinite().all():  # under a transform
            return torch.full((len(meeting.options.projections), len(y)), torch.nan, dtype=y.dtype, device=y.device)
        y, given = tree.detach((y, given))
        points, info = meeting.sweep(y, given)
        if not info.converged:
            raise RuntimeError(
                f"Dykstra: {info.reason}, with points {info.residual_norm:.1e} apart; the sets may have no point in "
                "common, or need more sweeps: raise max_iter or tol; Dykstra(...).solve(y) returns what there is"
            )
        meeting.check_complete(points, given)
        return points

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.num_inputs

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, meeting: _Meeting, *tensors: Tensor) -> tuple[Tensor, int]:
        batch = batch_in_front(info.batch_size, in_dims[1:], tensors)
        return torch.stack([_Limit.apply(meeting, *example) for example in zip(*batch, strict=True)]), 0


class _LinearSolve(torch.autograd.Function):
    """b, c, y, closed-over tensors ↦ u with `A u = b`, or `Aᵀu = b` when transposed; `A = ∂residual/∂c`."""

    @staticmethod
    def forward(meeting: _Meeting, transposed: bool, b: Tensor, points: Tensor, y: Tensor, *given: Tensor) -> Tensor:
        if not points.isfinite().all():
            return b + torch.nan
        b, points, y, given = tree.detach((b, points, y, given))
        return meeting.solved(b, points, y, given, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.meeting, ctx.transposed = inputs[:2]
        ctx.save_for_backward(output, *inputs[3:])
        ctx.save_for_forward(output, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:
        u, points, y, *given = (internals.unwrapped_if_ended(value) for value in ctx.saved_tensors)
        s = _LinearSolve.apply(ctx.meeting, not ctx.transposed, cotangent, points, y, *given)
        if not any(ctx.needs_input_grad[3:]):
            return None, None, s, None, None, *[None] * len(given)
        through = lambda c, *values: ctx.meeting.product(c, y, values, u, ctx.transposed)
        at_points, *at_given = tree.vjp(through, (points, *given), -s)
        return None, None, s, at_points, None, *at_given

    @staticmethod
    def jvp(
        ctx: Any, _meeting: None, _transposed: None, b: Tensor, points_dot: Tensor, _y: Tensor, *dots: Any
    ) -> Tensor:
        refuse_nested_forward_mode()
        u, points, y, *given = ctx.saved_tensors
        through = lambda c, *values: ctx.meeting.product(c, y, values, u, ctx.transposed)
        change = tree.jvp(through, (points, *given), (points_dot, *dots))
        return _LinearSolve.apply(ctx.meeting, ctx.transposed, b - change, points, y, *given)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, meeting: _Meeting, transposed: bool, *tensors: Tensor) -> tuple[Tensor, int]:
        batch = batch_in_front(info.batch_size, in_dims[2:], tensors)
        rows = [_LinearSolve.apply(meeting, transposed, *example) for example in zip(*batch, strict=True)]
        return torch.stack(rows), 0
