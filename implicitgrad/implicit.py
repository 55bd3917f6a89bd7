"""Make the solution of an inner problem differentiable: a decorator for solvers, and its twin for solutions at hand."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure, internals, tree
from implicitgrad.below import by_example, computed
from implicitgrad.binding import BoundCondition, Options, check_condition
from implicitgrad.conditions import OptimalityCondition
from implicitgrad.equation import root
from implicitgrad.linalg import LinearSolver
from implicitgrad.report import OnUnconverged, observed
from implicitgrad.tree import Tree


def implicit(
    condition: OptimalityCondition,
    *,
    solver: LinearSolver | None = None,
    has_aux: bool = False,
    on_unconverged: OnUnconverged = "warn",
    inner_tolerance: float = 1e-3,
) -> Callable[[Callable[..., Any]], "ImplicitSolver"]:
    """Decorate any inner solver `fit(x, *data) -> y` so that its result can be differentiated.

    The solver runs on detached tensors with gradients enabled; it may use loops, `torch.optim`, SciPy, scikit-learn,
    CVXPY. Its own operations are never differentiated: `dy/dx = -(∂r/∂y)⁻¹ ∂r/∂x` with `r` the condition's residual.
    Derivatives of every order reach `x`, `data`, and whatever tensors and module weights the condition closes over.

    Args:
        condition: What holds at the result, as a function of `(x, y, *data)`.
        solver: For the linear systems; `Auto()` if None.
        has_aux: The solver returns `(y, aux)`; `aux` is handed through undifferentiated.
        on_unconverged: `"warn"` once per call site, `"raise"` a `ConvergenceError`, or `"ignore"`, when the inner
            solution or a linear system misses its tolerance.
        inner_tolerance: Largest residual relative to `‖∂r/∂y · y‖` that passes; no unit.

    Returns:
        A decorator; the decorated function takes the solver's arguments, by position.

    Example:
        >>> import torch, implicitgrad as ig
        >>> @ig.implicit(ig.Stationary(lambda x, y, t: (y - t).square().sum() + x * y.square().sum()))
        ... def shrink(x, t):
        ...     return t / (1 + x)
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> torch.autograd.grad(shrink(x, torch.tensor([4.0])), x)[0].item()
        -1.0
    """
    check_condition(condition)
    options = Options(solver, on_unconverged, inner_tolerance)

    def decorate(inner: Callable[..., Any]) -> ImplicitSolver:
        return ImplicitSolver(condition, inner, has_aux, options)

    return decorate


def implicit_root(
    condition: OptimalityCondition,
    x: Tree,
    y: Tree,
    *data: Tree,
    solver: LinearSolver | None = None,
    on_unconverged: OnUnconverged = "warn",
    inner_tolerance: float = 1e-3,
) -> Tree:
    """The solution `y` at hand, made differentiable: `implicit` without a decorator.

    Args:
        condition: What holds at `y`.
        x: Upper variable, a tree.
        y: Lower variable at the solution, a tree of floating point tensors; it is detached.
        data: Further arguments of the condition; trees whose tensors get gradients if they require them.
        solver: As in `implicit`.
        on_unconverged: As in `implicit`.
        inner_tolerance: As in `implicit`.

    Returns:
        A tree like `y` with the same values.

    Raises:
        TypeError: complex or integer `y`, mixed dtypes in `y`, or something that is no condition.
        ValueError: tensors on several devices, or a residual whose structure differs from that of `y`.
        FloatingPointError: NaN or infinity in `y`, in the residual or in a linear solve.
        NotImplementedError: two nested forward-mode transforms.

    Example:
        >>> import torch, implicitgrad as ig
        >>> x = torch.tensor(9.0, requires_grad=True)
        >>> y = ig.implicit_root(ig.FixedPoint(lambda x, y: (y + x / y) / 2), x, torch.tensor(3.0))
        >>> torch.autograd.grad(y, x)[0].item()  # 1 / (2 sqrt(x))
        0.1666...
    """
    return _attach(condition, x, y, data, Options(solver, on_unconverged, inner_tolerance))


class ImplicitSolver:
    """An inner solver whose result is differentiable; made by `implicit`.

    Attributes:
        condition: What holds at the result.
        inner: The undecorated solver.
    """

    def __init__(
        self, condition: OptimalityCondition, inner: Callable[..., Any], has_aux: bool, options: Options
    ) -> None:
        functools.update_wrapper(self, inner)
        self.condition = condition
        self.inner = inner
        self.has_aux = has_aux
        self.options = options

    def __get__(self, instance: object, owner: type | None = None) -> "ImplicitSolver":
        """Bind like a function, so that methods can be decorated; the condition does not see the instance."""
        if instance is None:
            return self
        return ImplicitSolver(self.condition, types.MethodType(self.inner, instance), self.has_aux, self.options)

    def __reduce__(self) -> str:
        """Pickle by name, like the function that this stands for."""
        return self.inner.__qualname__

    def __call__(self, x: Tree, *data: Tree) -> Any:
        """Run the inner solver and attach its derivative."""
        y, aux = self.solve(x, *data)
        y = _attach(self.condition, x, y, data, self.options)
        return (y, aux) if self.has_aux else y

    def solve(self, x: Tree, *data: Tree) -> tuple[Tree, Any]:
        """`(y, aux)` without derivatives; `aux` is None unless `has_aux`."""
        solve = _solve_below_transforms if internals.transforming() else _solve_detached
        return solve(self.inner, self.has_aux, (x, *data))


def _solve_detached(inner: Callable[..., Any], has_aux: bool, arguments: tuple) -> tuple[Tree, Any]:
    plain = tree.map(closure.without_derivative, arguments)
    with torch.enable_grad():
        result = inner(*plain)
    if not has_aux:
        return tree.detach(result), None
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"has_aux=True needs a solver that returns (y, aux), got {type(result).__name__}")
    return tree.detach(result[0]), tree.detach(result[1])


def _solve_below_transforms(inner: Callable[..., Any], has_aux: bool, arguments: tuple) -> tuple[Tree, Any]:
    """Run the solver on the plain tensors beneath all transforms; under `vmap`, once for every example."""
    values, rebuild = tree.flatten(arguments)
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    run = _Run(inner, has_aux, values, rebuild, places)
    outputs = computed(run, *closure.shown([values[i] for i in places]), batch_rule=by_example)
    return run.assemble(outputs)


class _Run:
    """One call of an inner solver: how flat tensors become its arguments, and its result flat tensors."""

    def __init__(
        self,
        inner: Callable[..., Any],
        has_aux: bool,
        values: list[Any],
        rebuild: Callable[[Sequence[Any]], Any],
        places: Sequence[int],
    ) -> None:
        self._inner, self._has_aux = inner, has_aux
        self._values, self._rebuild, self._places = values, rebuild, places
        self._result: tuple[list[Any], Callable[[Sequence[Any]], Any], list[int]] | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = list(self._values)
        for i, tensor in zip(self._places, tensors, strict=True):
            values[i] = tensor
        leaves, rebuild = tree.flatten(_solve_detached(self._inner, self._has_aux, self._rebuild(values)))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._result = (leaves, rebuild, places)
        return tuple(leaves[i].clone() for i in places)

    def assemble(self, outputs: Sequence[Tensor]) -> tuple[Tree, Any]:
        assert self._result is not None
        leaves, rebuild, places = self._result
        leaves = list(leaves)
        for i, output in zip(places, outputs, strict=True):
            leaves[i] = output
        return rebuild(leaves)


def _attach(condition: OptimalityCondition, x: Tree, y: Tree, data: tuple, options: Options) -> Tree:
    """The nodes that make `y` differentiable."""
    bound = BoundCondition(condition, x, y, data, options)
    _refuse_nested_forward_mode()
    if internals.transforming() or internals.in_dual_level():
        bound.find_closed_over()
        return bound.unravel(root(bound.system, bound.flat, bound.inputs))
    if not torch.is_grad_enabled() and not observed():
        return tree.map(torch.clone, bound.y)
    bound.linearize_eagerly()
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in bound.inputs):
        return tree.map(torch.clone, bound.y)
    return bound.unravel(root(bound.system, bound.flat, bound.inputs))


def _refuse_nested_forward_mode() -> None:
    if internals.num_forward_transforms() > 1:
        raise NotImplementedError(
            "forward mode over forward mode (jacfwd of jacfwd, jvp of jvp) is silently wrong through custom autograd "
            "functions in torch; use torch.func.hessian or jacfwd(jacrev(...))"
        )
