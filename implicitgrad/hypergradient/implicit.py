"""The hypergradient of an upper loss by implicit differentiation, with an estimate of its error."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import closure, tree
from implicitgrad.binding import BoundCondition, Options
from implicitgrad.conditions import OptimalityCondition
from implicitgrad.hypergradient.certificate import Certificate
from implicitgrad.linalg import Auto, ErrorBound, LinearOperator, LinearSolver, Solution, certificate
from implicitgrad.linalg.certificate import NUM_EXACT_COLUMNS, inverse_norm, product_error, rounding
from implicitgrad.report import OnUnconverged, Report, check_finite
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and how far to trust it.

    Attributes:
        value: `dF(x, y(x))/dx`, a tree like `x`.
        error_estimate: Estimated Euclidean norm of the error of the uncorrected hypergradient, in its own units: from
            an inexact `y` and an inexact adjoint. An estimate, not a bound; infinite if a linear system was not solved.
        certificate: Bounds on the error of the uncorrected hypergradient, proven or estimated.
        inner_error_bound: `‖y - y*‖ ≤ ‖residual‖ / strong_convexity`, if the condition declares that constant.
        upper_value: `F(x, y)` at the given `y`.
        y: The inner solution as given.
        y_corrected: The same after one Newton step.
        report: Residuals, iterations and reasons.
    """

    value: Tree
    error_estimate: float
    certificate: Certificate
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
    curvature: Callable[..., LinearOperator] | None = None,
    correct: bool = False,
    dual_weighted: bool = False,
    lipschitz: float | None = None,
    on_unconverged: OnUnconverged = "warn",
    inner_tolerance: float = 1e-3,
) -> Hypergradient:
    """Gradient of `F(x, y(x))` where `y(x)` satisfies a condition, with an error estimate.

    `h = ∇ₓF - Bᵀu` with `Aᵀu = ∇_yF`, `A = ∂r/∂y`, `B = ∂r/∂x`, all at the given `y`. For the estimate one Newton step
    `y⁺ = y - A⁻¹r(y)` moves `y` towards the true solution, and there the adjoint is corrected by solving for what is
    left of its equation, `A⁺ᵀ(u⁺ - u) = ∇_yF⁺ - A⁺ᵀu`: `error_estimate = ‖h - h⁺‖`. It follows the true error closely
    where that is small, since `h⁺` is off by its square, and by the square of the linear solver's tolerance. The cost
    is three linear solves and two evaluations of the condition; a dense matrix is made twice.

    The certificate bounds the same error, `‖h - h(y)‖ ≤ ‖B‖ ‖A⁻¹‖ ‖∇_yF - Aᵀu‖` for the adjoint, at the
    cost of one product with `A` and 10 with `B` (as many as `x` has numbers, up to 8). It is rigorous when `‖A⁻¹‖` is
    known (the condition declares `strong_convexity`, or the matrix is dense) and `x` has at most 8 numbers.

    Args:
        upper: `F(x, y, *upper_data)`, a scalar.
        condition: What holds at `y`; a function of `(x, y, *data)`.
        x: Upper variable, a tree of floating point tensors.
        y: Inner solution, exact or not.
        data: Further arguments of the condition.
        upper_data: Further arguments of `upper`, for example the validation set.
        solver: For the linear systems; `Auto()` if None.
        curvature: Called as `curvature(x, y, *data)`, gives an operator on the flat `y` that takes the place of
            `∂r/∂y` in linear systems: Gauss-Newton, Fisher, K-FAC. The hypergradient is then an approximation, and
            `error_estimate` shows how good, infinite if corrections with it diverge; the certificate's residual is that
            of the true `∂r/∂y`.
        correct: Return `h⁺` in place of `h`; there is no certificate for it.
        dual_weighted: Solve one more system, loosely, for each of at most 8 numbers in `x`; not with `correct`. It
            corrects `h` for the residual of the adjoint and sharpens the certificate about tenfold.
        lipschitz: Lipschitz constant of the hypergradient as a function of `y`, if you know one; together with
            `strong_convexity` it certifies the error of `y`.
        on_unconverged: As in `implicit`.
        inner_tolerance: As in `implicit`; an inner solution that misses it is reported also when corrected.

    Returns:
        The hypergradient with its report.

    Raises:
        TypeError, ValueError, FloatingPointError: as `implicit_root`.
        ValueError: `upper` is no scalar, `lipschitz` is not positive, `dual_weighted` with more than 8 numbers in `x`,
            a linear solve shows that `strong_convexity` is too large, or `curvature` does not fit `y`.

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
    if lipschitz is not None and not 0 < lipschitz < math.inf:
        raise ValueError(f"lipschitz must be a positive number, got {lipschitz}")
    if correct and dual_weighted:
        raise ValueError("correct and dual_weighted improve the hypergradient in two ways; choose one")
    options = Options(solver, on_unconverged, inner_tolerance)
    first = _Point(upper, condition, x, y, data, upper_data, options, curvature, dual_weighted=dual_weighted)
    step = first.solve(first.residual, transposed=False).value
    y_corrected = first.bound.unravel(first.bound.flat - step)
    second = _Point(upper, condition, x, y_corrected, data, upper_data, options, curvature, start=first)
    difference = torch.cat([(a - b).reshape(-1) for a, b in zip(first.value, second.value, strict=True)])
    record = first.bound.system.record
    record.solves += second.bound.system.record.solves
    solved = all(solve.converged for solve in record.solves)
    strong_convexity = condition.strong_convexity
    error = torch.linalg.vector_norm(difference).item() * second.amplification
    return Hypergradient(
        value=first.rebuild(second.value if correct else first.value),
        error_estimate=error if solved else math.inf,
        certificate=_certificate(first, strong_convexity, lipschitz, correct),
        inner_error_bound=None if strong_convexity is None else record.inner_residual / strong_convexity,
        upper_value=first.upper_value,
        y=first.bound.y,
        y_corrected=y_corrected,
        report=record,
    )


def _certificate(
    point: "_Point", strong_convexity: float | None, lipschitz: float | None, correct: bool
) -> Certificate:
    if correct:
        return Certificate(None, None, ("a corrected hypergradient (bounds are for correct=False)",))
    inner, missing = None, list(point.missing)
    if strong_convexity is not None and lipschitz is not None:
        distance = point.bound.system.record.inner_residual / strong_convexity
        inner = ErrorBound(lipschitz * distance, True, "strong_convexity and lipschitz")
    else:
        missing.append("the error of y (needs strong_convexity of the condition, and lipschitz)")
    return Certificate(point.adjoint_bound, inner, tuple(missing))


class _Point:
    """The hypergradient at one `y`, its adjoint and what both were made from.

    Attributes:
        value: Leaf by leaf; corrected for the residual of the adjoint if `dual_weighted`.
        adjoint_bound: On the error that the inexact adjoint makes; for a first point only.
        missing: Why there is no such bound.
        amplification: By how much the error of an approximate curvature exceeds what one correction removes.
    """

    def __init__(
        self,
        upper: Callable[..., Tensor],
        condition: OptimalityCondition,
        x: Tree,
        y: Tree,
        data: tuple,
        upper_data: tuple,
        options: Options,
        curvature: Callable[..., LinearOperator] | None,
        *,
        start: "_Point | None" = None,
        dual_weighted: bool = False,
    ) -> None:
        leaves, self.rebuild = tree.flatten(x)
        for leaf in leaves:
            if not tree.is_differentiable(leaf):
                raise TypeError(f"x has a leaf of type {type(leaf).__name__}; every leaf must be a float tensor")
        if dual_weighted and sum(leaf.numel() for leaf in leaves) > NUM_EXACT_COLUMNS:
            raise ValueError(f"dual_weighted is for at most {NUM_EXACT_COLUMNS} numbers in x; leave it out")
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        x = self.rebuild(own)
        self.bound = BoundCondition(condition, x, y, tree.detach(data), options)
        with torch.enable_grad(), closure.Refusal(leaves, "x by a closure; use the condition's argument x"):
            self.bound.linearize_eagerly()
        system, flat, inputs = self.bound.system, self.bound.flat, self.bound.inputs
        self.residual = system.linearize(flat, inputs).value.detach()
        self._approximation = self._checked(curvature(tree.detach(x), self.bound.y, *data)) if curvature else None
        self.upper_value, direct, slope = self._upper_gradient(upper, x, own, upper_data)
        wanted = [i < len(own) for i in range(len(inputs))]
        with torch.no_grad():
            self.adjoint = self._adjoint(slope, start)
            products: Sequence[Tensor] = system.pullback(-self.adjoint, flat, inputs, wanted)
        self.value = [a + b for a, b in zip(direct, products[: len(own)], strict=True)]
        self.amplification = self._measure_curvature(slope, start)
        self.adjoint_bound: ErrorBound | None = None
        self.missing: list[str] = []
        if start is None:
            self._certify(slope, len(own), dual_weighted)
        for value in self.value:
            check_finite(value, "the hypergradient")

    def _adjoint(self, slope: Tensor, start: "_Point | None") -> Tensor:
        """`u` with `Aᵀu = slope`; with a start, that one corrected by solving for its residual."""
        system, flat, inputs = self.bound.system, self.bound.flat, self.bound.inputs
        if start is None:
            self._solution = self.solve(slope, transposed=True)
            return self._solution.value
        left = slope - system.product(flat, inputs, start.adjoint, transposed=True)
        rounding = 100 * torch.finfo(slope.dtype).eps * torch.linalg.vector_norm(slope)
        if torch.linalg.vector_norm(left) <= rounding:
            return start.adjoint
        return start.adjoint + self.solve(left, transposed=True).value

    def _measure_curvature(self, slope: Tensor, start: "_Point | None") -> float:
        """Note how well the adjoint of an approximate curvature fits the true one; `1 / (1 - ρ)` for a second point.

        Corrections `C⁻ᵀ(slope - Aᵀu)` form a geometric series with the signed ratio `ρ` of two residuals.
        """
        if self._approximation is None:
            return 1.0
        system, flat, inputs = self.bound.system, self.bound.flat, self.bound.inputs
        size = torch.linalg.vector_norm
        left = lambda u: slope - system.product(flat, inputs, u, transposed=True)
        if start is None:
            relative = (size(left(self.adjoint)) / size(slope).clamp(min=torch.finfo(slope.dtype).tiny)).item()
            system.record.notes.append(
                f"systems are solved with another curvature; true adjoint residual {relative:.1e}"
            )
            return 1.0
        before, after = left(start.adjoint), left(self.adjoint)
        if not before.any():
            return 1.0
        ratio = (torch.dot(before, after) / torch.dot(before, before)).item()
        return 1 / (1 - ratio) if size(after) < size(before) else math.inf

    def solve(self, b: Tensor, transposed: bool) -> Solution:
        """`A⁻¹b` or `A⁻ᵀb`, with the approximate `A` if there is one."""
        return self.bound.system.full_solve(b, self.bound.flat, self.bound.inputs, transposed, self._approximation)

    def _checked(self, approximation: LinearOperator) -> LinearOperator:
        flat = self.bound.flat
        if not isinstance(approximation, LinearOperator):
            raise TypeError(f"curvature(x, y, *data) must return a LinearOperator, got {type(approximation).__name__}")
        if approximation.vector_shape != flat.shape or approximation.dtype != flat.dtype:
            raise ValueError(f"curvature must act on the flat y, {tuple(flat.shape)} {flat.dtype}; got {approximation}")
        return approximation

    def _certify(self, slope: Tensor, num_leaves: int, dual_weighted: bool) -> None:
        """Bound the error of the hypergradient that comes from the adjoint; with dual weights, reduce it too."""
        system, flat, inputs = self.bound.system, self.bound.flat, self.bound.inputs
        with system.isolation():
            A = system.operator(flat, inputs)
            ritz_min = self._solution.ritz_min if self._approximation is None else None
            norm = inverse_norm(A, ritz_min)
            if norm is None:
                self.missing.append("the adjoint (nothing is known about the smallest eigenvalue)")
                return
            if A.noise > 0:
                self.missing.append("the adjoint (products are finite differences)")
                return
            graph = system.linearize(flat, inputs)
            B = graph.input_operator(graph.inputs[:num_leaves])
            residual = slope - (A.T @ self.adjoint).detach()
            unseen = rounding(A, slope, self._solution).item()
            size = torch.linalg.vector_norm(residual).item() + unseen
            if not dual_weighted:
                self.adjoint_bound = product_error(B, ErrorBound(norm.value * size, norm.rigorous, norm.source))
                return
            weighted = certificate.dual_weighted(A, B, residual, norm, Auto(rtol=0.1), unseen)
        self.adjoint_bound = weighted.bound
        sizes = [value.numel() for value in self.value]
        corrections = weighted.correction.split(sizes)
        self.value = [v - c.reshape(v.shape).to(v.dtype) for v, c in zip(self.value, corrections, strict=True)]

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
