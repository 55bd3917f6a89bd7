"""Bind a condition to its arguments: trees, and tensors closed over, become an equation on flat vectors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure, internals, report, tree
from implicitgrad.conditions import OptimalityCondition
from implicitgrad.isolation import Isolation
from implicitgrad.linalg import Auto, LinearSolver
from implicitgrad.report import OnUnconverged, Policy, Report, call_site
from implicitgrad.surroundings import look_around
from implicitgrad.system import System
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class Options:
    """How derivatives of a solution are computed; the fields are those of `implicit`."""

    solver: LinearSolver | None
    on_unconverged: OnUnconverged
    inner_tolerance: float

    def __post_init__(self) -> None:
        if self.solver is not None and not isinstance(self.solver, LinearSolver):
            raise TypeError(
                f"solver must be a linear solver such as implicitgrad.linalg.CG(), got {type(self.solver).__name__}; "
                "the inner solver is the decorated function"
            )
        self.policy()

    def policy(self) -> Policy:
        """The rules about solves that miss their tolerance, with the call that asked for them."""
        return Policy(self.on_unconverged, self.inner_tolerance, call_site())


class BoundCondition:
    """A condition at one solution, as the equation `r(flat y, *inputs) = 0`.

    Args:
        condition: What holds at `y`.
        x: Upper variable.
        y: Lower variable; it is detached.
        data: Further arguments.
        options: How to solve and what to report.

    Attributes:
        y: The detached tree.
        flat: The same as a vector `(n,)`.
        unravel: From vectors to trees like `y`.
        inputs: Tensors among `x` and `data` in order, then closed-over tensors once they are known.
        system: The equation with its linear systems.

    Raises:
        TypeError: `condition` is none, or tensors of a kind that cannot be used.
        ValueError: tensors on several devices.
    """

    def __init__(self, condition: OptimalityCondition, x: Tree, y: Tree, data: tuple, options: Options) -> None:
        check_condition(condition)
        self.y = tree.map(closure.without_derivative, y)
        tree.check_vector_space(tree.leaves(self.y), "the solution y")
        self.flat, self.unravel = tree.ravel(self.y)
        values, rebuild = tree.flatten((x, data))
        self._arguments = _Arguments(values, rebuild)
        self.inputs: list[Tensor] = self._arguments.tensors()
        _check_inputs(self.flat, self.inputs)
        point = self.y  # the function must not refer to this object: a cycle would keep graphs alive
        self._notes = lambda: condition.notes(x, point, *data)
        twin = condition.first_order_twin()
        self.system = System(
            _flat_residual(condition, self.y, self.unravel, self._arguments),
            support=_flat_support(condition, self.y, self.unravel, self._arguments),
            symmetric_on_support=condition.symmetric_on_support,
            first_order_residual=twin and _flat_residual(twin, self.y, self.unravel, self._arguments),
            symmetric=condition.symmetric,
            eigenvalue_floor=condition.strong_convexity,
            probe=not condition.symmetric_by_construction,
            solver=options.solver or Auto(),
            policy=options.policy(),
            record=Report(type(condition).__name__, route=condition.route),
            isolation=Isolation(self.flat.device, look_around(condition, x, data)),
            transformed=internals.transforming() or internals.in_dual_level(),
        )

    def linearize_eagerly(self) -> None:
        """Evaluate the condition once on the graph that backward passes will use, and find what it closes over."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("torch.inference_mode forbids the derivatives needed here; use torch.no_grad")
        report.check_finite(self.flat, "the inner solution y")
        self.system.judge(self.flat, self.inputs)
        if report.observed():
            with torch.no_grad(), self.system.isolation():
                self.system.record.notes[:] = self._notes()
        linearization = self.system.linearize(self.flat, self.inputs)
        if not linearization.scan.older and not (linearization.scan.leaves and internals.following_calls()):
            self._capture(linearization.scan.leaves)
            linearization.inputs.extend(self._arguments.captured)
            self.system.direct = self._arguments.captured
            return
        # intermediate results: exchange them for leaves, so that no path is counted twice; inside the evaluation of
        # another condition: leaves on the graph may only stand for the tensors that user code refers to
        self.find_closed_over()
        self.system.restart()
        with self.system.isolation():
            scan = self.system.linearize(self.flat, self.inputs).scan
        if scan.leaves or scan.older:
            raise RuntimeError(
                "the condition closes over an intermediate result inside a custom autograd function or compiled code, "
                "where its gradient cannot be followed; pass that tensor as an argument: in x, or in data"
            )

    def find_closed_over(self) -> None:
        """Run the condition once to see the tensors it closes over, and make them explicit inputs."""
        with self.system.isolation(), internals.without_forward_mode():
            self._capture(closure.record(self.system.residual, [self.flat, *self.inputs]))

    def _capture(self, tensors: Sequence[Tensor]) -> None:
        self._arguments.captured = list(tensors)
        self.inputs = self._arguments.tensors() + self._arguments.captured


class _Arguments:
    """The leaves of `(x, data)`, and closed-over tensors: what a residual depends on besides `y`."""

    def __init__(self, values: list[Any], rebuild: Callable[[Sequence[Any]], Tree]) -> None:
        self._values, self._rebuild = values, rebuild
        self._places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        self.captured: list[Tensor] = []

    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves, in order."""
        return [self._values[i] for i in self._places]

    def split(self, inputs: Sequence[Tensor]) -> tuple[Tree, Sequence[Tensor]]:
        """`(x, data)` with other tensors, and what stands for closed-over ones."""
        values = list(self._values)
        for i, value in zip(self._places, inputs, strict=False):
            values[i] = value
        return self._rebuild(values), inputs[len(self._places) :]


def _flat_residual(
    condition: OptimalityCondition, y: Tree, unravel: Callable[[Tensor], Tree], arguments: _Arguments
) -> Callable[..., Tensor]:
    """`(flat y, *inputs) -> flat residual` of a condition; it refers to no system: cycles would keep graphs alive."""

    def residual(flat: Tensor, *inputs: Tensor) -> Tensor:
        (x, data), captured = arguments.split(inputs)
        with closure.Substitution(arguments.captured[: len(captured)], captured) as substitution:
            result = tree.ravel_like(y, condition.residual(x, unravel(flat), *data))
        if result.dtype != flat.dtype or result.device != flat.device:
            raise TypeError(
                f"the residual is {result.dtype} on {result.device} but y is {flat.dtype} on {flat.device}; "
                "convert x, data and y to one dtype and device"
            )
        substitution.check_complete(result, (flat, *inputs))
        return result

    return residual


def _flat_support(
    condition: OptimalityCondition, y: Tree, unravel: Callable[[Tensor], Tree], arguments: _Arguments
) -> Callable[..., Tensor | None]:
    """`(flat y, *inputs) -> flat booleans` of a condition, or None."""

    def support(flat: Tensor, *inputs: Tensor) -> Tensor | None:
        (x, data), captured = arguments.split(inputs)
        with closure.Substitution(arguments.captured[: len(captured)], captured):
            mask = condition.support(x, unravel(flat), *data)
        return None if mask is None else tree.ravel_like(y, mask)

    return support


def check_condition(condition: object) -> None:
    """Raise unless `condition` is an `OptimalityCondition`."""
    if not isinstance(condition, OptimalityCondition):
        raise TypeError(
            f"condition must be an OptimalityCondition, got {type(condition).__name__}; wrap a loss as "
            "Stationary(loss) or a step as FixedPoint(step)"
        )


def _check_inputs(flat: Tensor, inputs: Sequence[Tensor]) -> None:
    for value in inputs:
        if value.is_complex():
            raise TypeError(f"an argument is complex ({value.dtype}); pass real and imaginary parts as real tensors")
        if value.device != flat.device and value.dim() > 0 and value.is_floating_point():
            raise ValueError(
                f"y is on {flat.device} but an argument of shape {tuple(value.shape)} is on {value.device}; "
                "move x, y and data to one device"
            )
