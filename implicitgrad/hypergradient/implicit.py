"""The hypergradient of an upper loss by implicit differentiation, with an estimate of its error."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import closure, tree
from implicitgrad.binding import BoundCondition, Options
from implicitgrad.conditions import OptimalityCondition
from implicitgrad.linalg import LinearSolver
from implicitgrad.report import OnUnconverged, Report, check_finite
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and how far to trust it.

    Attributes:
        value: `dF(x, y(x))/dx`, a tree like `x`.
        error_estimate: Estimated Euclidean norm of the error of the uncorrected hypergradient, in its own units: from
            an inexact `y` and an inexact adjoint. An estimate, not a bound; infinite if a linear system was not solved.
        inner_error_bound: `‖y - y*‖ ≤ ‖residual‖ / strong_convexity`, if that constant was given. A bound when the
            inner loss is strongly convex with it everywhere.
        upper_value: `F(x, y)` at the given `y`.
        y: The inner solution as given.
        y_corrected: The same after one Newton step.
        report: Residuals, iterations and reasons.
    """

    value: Tree
    error_estimate: float
    inner_error_bound: float | None
    upper_value: Tensor
    y: Tree
    y_corrected: Tree
    report: Report


def hypergradient(
    upper: Callable[..., Tensor],
    condition: OptimalityCondition,
    x: Tree,
    y: Tree,
    *data: Tree,
    upper_data: tuple = (),
    solver: LinearSolver | None = None,
    correct: bool = False,
    strong_convexity: float | None = None,
    on_unconverged: OnUnconverged = "warn",
    inner_tolerance: float = 1e-3,
) -> Hypergradient:
    """Gradient of `F(x, y(x))` where `y(x)` satisfies a condition, with an error estimate.

    `h = ∇ₓF - Bᵀu` with `Aᵀu = ∇_yF`, `A = ∂r/∂y`, `B = ∂r/∂x`, all at the given `y`. For the estimate one Newton step
    `y⁺ = y - A⁻¹r(y)` moves `y` towards the true solution, and there the adjoint is corrected by solving for what is
    left of its equation, `A⁺ᵀ(u⁺ - u) = ∇_yF⁺ - A⁺ᵀu`: `error_estimate = ‖h - h⁺‖`. It follows the true error closely
    where that is small, since `h⁺` is off by its square, and by the square of the linear solver's tolerance. The cost
    is three linear solves and two evaluations of the condition; a dense matrix is made twice.

    Args:
        upper: `F(x, y, *upper_data)`, a scalar.
        condition: What holds at `y`; a function of `(x, y, *data)`.
        x: Upper variable, a tree of floating point tensors.
        y: Inner solution, exact or not.
        data: Further arguments of the condition.
        upper_data: Further arguments of `upper`, for example the validation set.
        solver: For the linear systems; `Auto()` if None.
        correct: Return `h⁺` in place of `h`.
        strong_convexity: Constant `mu > 0` with `∇²_yy loss ⪰ mu I`, if known; buys `inner_error_bound`.
        on_unconverged: As in `implicit`.
        inner_tolerance: As in `implicit`; an inner solution that misses it is reported also when corrected.

    Returns:
        The hypergradient with its report.

    Raises:
        TypeError, ValueError, FloatingPointError: as `implicit_root`.
        ValueError: `upper` is no scalar, or `strong_convexity` is not positive.

    Source: Pedregosa (2016), "Hyperparameter optimization with approximate gradient", for `h`; the Newton-corrected
    estimate is this library's.

    Example:
        >>> import torch, implicitgrad as ig
        >>> ridge = ig.Stationary(lambda x, y: (y - 2).square() + x * y.square())
        >>> x = torch.tensor(1.0)
        >>> h = hypergradient(lambda x, y: y.square(), ridge, x, torch.tensor(1.0))  # y(x) = 2 / (1 + x)
        >>> h.value.item(), h.error_estimate
        (-1.0, 0.0)
    """
    if strong_convexity is not None and not strong_convexity > 0:
        raise ValueError(f"strong_convexity must be positive, got {strong_convexity}")
    options = Options(solver, on_unconverged, inner_tolerance)
    first = _Point(upper, condition, x, y, data, upper_data, options)
    step = first.bound.system.solve(first.residual, first.bound.flat, first.bound.inputs, transposed=False)
    y_corrected = first.bound.unravel(first.bound.flat - step)
    second = _Point(upper, condition, x, y_corrected, data, upper_data, options, start=first)
    difference = torch.cat([(a - b).reshape(-1) for a, b in zip(first.value, second.value, strict=True)])
    record = first.bound.system.record
    record.solves += second.bound.system.record.solves
    solved = all(solve.converged for solve in record.solves)
    return Hypergradient(
        value=first.rebuild(second.value if correct else first.value),
        error_estimate=torch.linalg.vector_norm(difference).item() if solved else math.inf,
        inner_error_bound=None if strong_convexity is None else record.inner_residual / strong_convexity,
        upper_value=first.upper_value,
        y=first.bound.y,
        y_corrected=y_corrected,
        report=record,
    )


class _Point:
    """The hypergradient at one `y`, its adjoint and what both were made from."""

    def __init__(
        self,
        upper: Callable[..., Tensor],
        condition: OptimalityCondition,
        x: Tree,
        y: Tree,
        data: tuple,
        upper_data: tuple,
        options: Options,
        start: "_Point | None" = None,
    ) -> None:
        leaves, self.rebuild = tree.flatten(x)
        for leaf in leaves:
            if not tree.is_differentiable(leaf):
                raise TypeError(f"x has a leaf of type {type(leaf).__name__}; every leaf must be a float tensor")
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        x = self.rebuild(own)
        self.bound = BoundCondition(condition, x, y, tree.detach(data), options)
        with torch.enable_grad(), closure.Refusal(leaves, "x by a closure; use the condition's argument x"):
            self.bound.linearize_eagerly()
        system, flat, inputs = self.bound.system, self.bound.flat, self.bound.inputs
        self.residual = system.linearize(flat, inputs).value.detach()
        self.upper_value, direct, slope = self._upper_gradient(upper, x, own, upper_data)
        wanted = [i < len(own) for i in range(len(inputs))]
        with torch.no_grad():
            self.adjoint = self._adjoint(slope, start)
            products: Sequence[Tensor] = system.pullback(-self.adjoint, flat, inputs, wanted)
        self.value = [a + b for a, b in zip(direct, products[: len(own)], strict=True)]
        for value in self.value:
            check_finite(value, "the hypergradient")

    def _adjoint(self, slope: Tensor, start: "_Point | None") -> Tensor:
        """`u` with `Aᵀu = slope`; with a start, that one corrected by solving for its residual."""
        system, flat, inputs = self.bound.system, self.bound.flat, self.bound.inputs
        if start is None:
            return system.solve(slope, flat, inputs, transposed=True)
        left = slope - system.product(flat, inputs, start.adjoint, transposed=True)
        rounding = 100 * torch.finfo(slope.dtype).eps * torch.linalg.vector_norm(slope)
        if torch.linalg.vector_norm(left) <= rounding:
            return start.adjoint
        return start.adjoint + system.solve(left, flat, inputs, transposed=True)

    def _upper_gradient(
        self, upper: Callable[..., Tensor], x: Tree, own: list[Tensor], upper_data: tuple
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """`F`, `∇ₓF` leaf by leaf and `∇_yF` as a vector."""
        with torch.enable_grad(), self.bound.system.isolation():
            flat = self.bound.flat.detach().requires_grad_()
            value = tree.scalar(upper(x, self.bound.unravel(flat), *upper_data), "the upper loss")
            if not value.requires_grad:
                raise ValueError("the upper loss depends on neither x nor y; it is called as upper(x, y, *upper_data)")
            *direct, slope = torch.autograd.grad(value, [*own, flat], materialize_grads=True)
        check_finite(value, "the upper loss")
        return value.detach(), direct, slope
