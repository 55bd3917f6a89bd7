"""Solvers of SciPy on torch functions, with derivatives of their solutions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import OptimalityCondition, Root, Stationary
from implicitgrad.curvature import hessian
from implicitgrad.linalg import LinearOperator, LinearSolver
from implicitgrad.solvers.bounds import Bounds, bounded_minimum, check_bounds
from implicitgrad.solvers.bridge import Bridge, array
from implicitgrad.solvers.least_squares import half_square
from implicitgrad.solvers.objective import check_hyperparameters
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree

TAKE_PRODUCTS = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr")  # methods that ask for Hessian products
TAKE_HESSIAN = ("dogleg", "trust-exact")
STOP_ON_VALUES = ("L-BFGS-B", "SLSQP", "TNC")  # unless told not to
EPS = 2 * torch.finfo(torch.float64).eps  # the least that least_squares accepts


@dataclass(frozen=True)
class ScipyMinimize(InnerSolver):
    """Minimises a loss by `scipy.optimize.minimize`, within bounds if asked for.

    SciPy works on the CPU in float64; the loss and its derivatives are evaluated in the dtype and on the device of
    `init`. Methods that use second derivatives get them: Newton-CG, trust-ncg, trust-krylov and trust-constr as
    products, dogleg and trust-exact as a matrix.

    Line searches of SciPy compare values, which in float64 tell points apart down to a gradient of about 1e-8 times the
    scale of the loss, in float32 1e-4; Newton-CG ends there as well. `info` tells if `tol` was missed.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, differentiable in y.
        method: L-BFGS-B (default), TNC, SLSQP, trust-constr take bounds; BFGS, CG, Newton-CG, trust-ncg, trust-krylov,
            trust-exact, dogleg do not; see SciPy.
        bounds: `(lower, upper)`, each a number, None, or a tree like y of tensors that broadcast; or a function of
            `(x, *data)` that returns such a pair. The solution is differentiable in them.
        tol: Largest residual norm that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32. The
            residual is the gradient, and with bounds `y - projection(y - gradient)`. SciPy gets it as its own `tol`.
        max_iter: Iterations of SciPy's method.
        options: Further options of the method, which come first.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Source: SciPy; L-BFGS-B is Byrd, Lu, Nocedal and Zhu (1995).

    Raises:
        ImportError: SciPy is not installed.
        TypeError: `loss` is no function, or `bounds` is neither a pair nor a function.
        ValueError: a hyperparameter out of range; in a run, bounds that contradict each other, or what SciPy refuses.
        FloatingPointError: in a run, NaN or infinity at the start or the end.

    Example:
        >>> import torch
        >>> nearest = ScipyMinimize(lambda x, y: (y - x).square().sum(), bounds=(0.0, 1.0))
        >>> x = torch.tensor([0.5, 3.0], requires_grad=True)
        >>> y, info = nearest(x, init=torch.zeros(2))
        >>> y.detach().round(decimals=3), torch.autograd.grad(y.sum(), x)[0]
        (tensor([0.5000, 1.0000]), tensor([1., 0.]))
    """

    loss: Callable[..., Tensor]
    method: str = "L-BFGS-B"
    bounds: Bounds | None = None
    tol: float | None = None
    max_iter: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("ScipyMinimize", self.loss, self.tol, self.max_iter)
        if self.bounds is not None:
            check_bounds("ScipyMinimize", self.bounds)

    @property
    def condition(self) -> OptimalityCondition:
        """The gradient vanishes, or no step along it stays within the bounds."""
        return Stationary(self.loss) if self.bounds is None else bounded_minimum(self.loss, self.bounds)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        bridge = Bridge("ScipyMinimize", self.loss, self, self.tol, self.bounds, x, init, data)
        objective = bridge.objective

        def value_and_gradient(point: Any) -> tuple[Any, Any]:
            value, gradient = objective.value_and_gradient(bridge.vector(point))
            return value.item(), array(gradient)

        def solve(start: Tensor) -> Any:
            tol = bridge.tol / math.sqrt(len(start))  # most methods measure the largest entry of the gradient
            options: dict[str, Any] = {"maxfun" if self.method == "TNC" else "maxiter": self.max_iter}
            if self.method in STOP_ON_VALUES:
                options["ftol"] = EPS
            if self.method == "TNC":
                options["xtol"] = EPS
            if self.method == "L-BFGS-B":
                options["maxfun"] = 20 * self.max_iter
            return bridge.scipy.minimize(
                value_and_gradient,
                array(start),
                jac=True,
                method=self.method,
                bounds=bridge.limits and bridge.scipy.Bounds(*map(array, bridge.limits)),
                tol=tol,
                options=options | dict(self.options),
                **self._second_derivatives(bridge),
            )

        return bridge.run(solve, lambda y: objective.value(y).item())

    def _second_derivatives(self, bridge: "Bridge") -> dict[str, Callable[..., Any]]:
        def curvature(point: Any) -> LinearOperator:
            bridge.objective.num_evaluations += 1
            y, (x, *data) = bridge.objective.unravel(bridge.vector(point)), bridge.objective.constants
            return hessian(lambda y, x, *data: self.loss(x, y, *data), y, x, *data, check=False)

        if self.method in TAKE_PRODUCTS:
            return {"hessp": lambda point, v: array(curvature(point) @ bridge.vector(v))}
        if self.method in TAKE_HESSIAN:
            return {"hess": lambda point: array(curvature(point).to_dense())}
        return {}


@dataclass(frozen=True)
class ScipyRoot(InnerSolver):
    """Solves a system of equations by `scipy.optimize.root`.

    Args:
        function: `function(x, y, *data)`, a tree like y, zero at the solution.
        method: hybr (Powell's hybrid method) and lm get the Jacobian, n reverse passes each time; krylov, anderson,
            broyden1, df-sane work without one; see SciPy.
        tol: Largest norm of the function that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Iterations of SciPy's method; evaluations where it counts those.
        options: Further options of the method, which come first.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Source: SciPy; hybr is Powell (1970) as in MINPACK.

    Raises:
        ImportError: SciPy is not installed.
        TypeError: `function` is none.
        ValueError: a hyperparameter out of range; in a run, a tree that does not match y, or krylov on another dtype
            than float64.
        FloatingPointError: in a run, NaN or infinity at the start or the end.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 8.0], requires_grad=True)
        >>> y, info = ScipyRoot(lambda x, y: y**3 - x)(x, init=torch.ones(2))
        >>> y.detach().round(decimals=3), torch.autograd.grad(y.sum(), x)[0].round(decimals=3)
        (tensor([1., 2.]), tensor([0.3330, 0.0830]))
    """

    function: Callable[..., Tree]
    method: str = "hybr"
    tol: float | None = None
    max_iter: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("ScipyRoot", self.function, self.tol, self.max_iter)

    @property
    def condition(self) -> OptimalityCondition:
        """The function vanishes."""
        return Root(self.function)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        bridge = Bridge("ScipyRoot", self.function, self, self.tol, None, x, init, data)
        if self.method == "krylov" and bridge.objective.start.dtype != torch.float64:
            raise ValueError("method krylov takes differences with steps for float64; use hybr, or float64")
        like = lambda x, y, *data: tree.ravel_like(y, self.function(x, y, *data))

        def solve(start: Tensor) -> Any:
            counted = "maxfev" if self.method in ("hybr", "df-sane") else "maxiter"
            return bridge.scipy.root(
                bridge.values_of(like),
                array(start),
                jac=bridge.jacobian_of(like) if self.method in ("hybr", "lm") else None,
                method=self.method,
                tol=0.1 * bridge.tol,  # of the last step, for most methods
                options={counted: self.max_iter} | dict(self.options),
            )

        return bridge.run(solve, lambda y: None)


@dataclass(frozen=True)
class ScipyLeastSquares(InnerSolver):
    r"""Minimises $\frac{1}{2} \|r(y)\|^2$ by `scipy.optimize.least_squares`, within bounds if asked for.

    Args:
        residuals: `residuals(x, y, *data)`, a tensor or a tree of tensors with m numbers.
        method: trf and dogbox take bounds, lm does not; see SciPy.
        bounds: As in `ScipyMinimize`.
        tol: Largest residual norm of the condition that counts as solved, absolute: of Jᵀr, and with bounds of
            `y - projection(y - Jᵀr)`; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Evaluations of the residuals.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Source: SciPy; trf is Branch, Coleman and Li (1999).

    Raises:
        ImportError: SciPy is not installed.
        TypeError: `residuals` is no function, or `bounds` is neither a pair nor a function.
        ValueError: a hyperparameter out of range; in a run, bounds that contradict each other.
        FloatingPointError: in a run, NaN or infinity at the start or the end.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, -4.0], requires_grad=True)
        >>> y, info = ScipyLeastSquares(lambda x, y: 2 * y - x, bounds=(0.0, None))(x, init=torch.ones(2))
        >>> y.detach().abs().round(decimals=3), torch.autograd.grad(y.sum(), x)[0]
        (tensor([0.5000, 0.0000]), tensor([0.5000, 0.0000]))
    """

    residuals: Callable[..., Tree]
    method: str = "trf"
    bounds: Bounds | None = None
    tol: float | None = None
    max_iter: int = 1000
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_hyperparameters("ScipyLeastSquares", self.residuals, self.tol, self.max_iter)
        if self.bounds is not None:
            check_bounds("ScipyLeastSquares", self.bounds)

    @property
    def condition(self) -> OptimalityCondition:
        """The gradient of half the sum of squares vanishes, or no step along it stays within the bounds."""
        loss = half_square(self.residuals)
        return Stationary(loss) if self.bounds is None else bounded_minimum(loss, self.bounds)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        loss = half_square(self.residuals)
        bridge = Bridge("ScipyLeastSquares", loss, self, self.tol, self.bounds, x, init, data)
        flat = lambda x, y, *data: tree.ravel(self.residuals(x, y, *data))[0]

        def solve(start: Tensor) -> Any:
            return bridge.scipy.least_squares(
                bridge.values_of(flat),
                array(start),
                jac=bridge.jacobian_of(flat),
                method=self.method,
                bounds=tuple(map(array, bridge.limits)) if bridge.limits else (-math.inf, math.inf),
                ftol=EPS if self.method == "lm" else None,
                xtol=EPS if self.method == "lm" else None,
                # trf weighs entries by their distance to a bound
                gtol=max((1e-2 if bridge.limits else 1.0) * bridge.tol / math.sqrt(len(start)), EPS),
                max_nfev=self.max_iter,
            )

        return bridge.run(solve, lambda y: bridge.objective.value(y).item())
