"""Differentiable solutions of CVXPY problems."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from implicitgrad import internals, tree
from implicitgrad.conditions import ConicProgram
from implicitgrad.convex.canonical import Canonical
from implicitgrad.convex.least_norm import LeastNorm
from implicitgrad.curvature.jacobian import values_and_jacobian
from implicitgrad.curvature.point import Point
from implicitgrad.implicit import implicit
from implicitgrad.linalg import LinearSolver
from implicitgrad.optional import require
from implicitgrad.report import OnUnconverged

DEFAULT_OPTIONS = {"CLARABEL": {}, "SCS": {"eps_abs": 1e-9, "eps_rel": 1e-9}}
NUM_REFINEMENTS = 3
REFINED = 1e-13  # a residual below this times the size of the data is rounding
PROPERTY_TOL = 1e-6  # relative, how far a value may be from what its parameter was declared to be


def from_cvxpy(
    problem: Any,
    parameters: Sequence[Any],
    variables: Sequence[Any],
    *,
    solver: str = "CLARABEL",
    solver_options: Mapping[str, Any] | None = None,
    linear_solver: LinearSolver | None = None,
    on_unconverged: OnUnconverged = "warn",
) -> "ConvexLayer":
    """The solution of a CVXPY problem as a differentiable function of its parameters.

    CVXPY brings the problem into the form of `ConicProgram`, whose matrices are affine functions of the parameters, and
    a solver solves it; at most three Newton steps on the condition's residual bring the solution to working precision.
    Derivatives of every order follow from the condition, in reverse and forward mode and under `vmap`; all of this is
    done in float64.

    Where the canonical form has no unique solution or dual (CVXPY adds variables, and those of inactive constraints are
    free) linear systems are solved in the least-norm sense: right for variables that are unique themselves. For others
    the system has no solution, which its residual tells (see `on_unconverged`).

    Args:
        problem: A `cvxpy.Problem` that follows the rules of disciplined parametrised programming (DPP), of linear,
            second-order, semidefinite and exponential cones.
        parameters: All of its parameters, in the order in which tensors will be given.
        variables: Those of its variables that are wanted.
        solver: `"CLARABEL"` or `"SCS"`.
        solver_options: Handed to the solver, such as `{"max_iter": 500}`.
        linear_solver: For the derivatives; None for LU, and least norm by a singular value decomposition where the
            matrix is singular.
        on_unconverged: As in `implicit`.

    Returns:
        A function of one tensor per parameter, each of the shape of its parameter, or with a batch dimension in front:
        a tuple of one tensor per variable, with the batch in front if there is one.

    Raises:
        ImportError: CVXPY is not installed.
        TypeError: no CVXPY objects.
        ValueError: not DPP, parameters or variables that are not those of the problem, integer or complex variables,
            other cones, or another solver.

    Source: Agrawal, Amos, Barratt, Boyd, Diamond and Kolter (2019), "Differentiable convex optimization layers".
    Departures: a residual without homogenisation, Newton refinement after Busseti, Moursi and Boyd (2019), quadratic
    objectives kept, systems solved by factorisation.

    Example:
        >>> import cvxpy as cp, torch
        >>> z, target = cp.Variable(2), cp.Parameter(2)
        >>> nearest = from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(z - target)), [z <= 1]), [target], [z])
        >>> point = torch.tensor([3.0, 0.5], requires_grad=True)
        >>> nearest(point)[0].sum().backward()
        >>> print([round(slope, 4) for slope in point.grad.tolist()])
        [0.0, 1.0]
    """
    cvxpy = require("cvxpy", extra="cvxpy")
    _check_arguments(cvxpy, problem, parameters, variables, solver)
    canonical = Canonical(cvxpy, problem, parameters, variables, solver)
    options = {**DEFAULT_OPTIONS[solver], **(solver_options or {})}
    return ConvexLayer(canonical, parameters, options, linear_solver or LeastNorm(), on_unconverged)


class ConvexLayer:
    """The solution of a convex problem as a function of its parameters; made by `from_cvxpy`.

    Attributes:
        program: The condition that holds at the canonical solution.
    """

    def __init__(
        self,
        canonical: "Canonical",
        parameters: Sequence[Any],
        options: Mapping[str, Any],
        linear_solver: LinearSolver,
        on_unconverged: OnUnconverged,
    ) -> None:
        self.program = canonical.program
        self._canonical = canonical
        self._parameters = list(parameters)
        self._options = options
        self._solve = implicit(self.program, solver=linear_solver, on_unconverged=on_unconverged)(self._run)

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Solve for these parameter values.

        Raises:
            SolverStatusError: infeasible, unbounded, or not solved.
            TypeError: no floating point tensors of one dtype.
            ValueError: shapes or devices that do not fit, or values that the declared properties of a parameter
                (nonneg, PSD, ...) forbid; the latter are not checked inside `torch.func` transforms.
        """
        in_dims = self._checked(values)
        if all(dim is None for dim in in_dims):
            return self._one(*values)
        return torch.func.vmap(self._one, in_dims=in_dims)(*values)

    def canonical(self, *values: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The arguments `x` and `data` of `program` for one problem."""
        return self._canonical.data(values)

    def _one(self, *values: Tensor) -> tuple[Tensor, ...]:
        z = self._solve(*self._canonical.data(values))["primal"]
        return self._canonical.variables(z, values[0].dtype)

    def _run(self, x: dict[str, Tensor], pattern: dict[str, Tensor]) -> dict[str, Tensor]:
        y = self._canonical.solve(x, self._options)
        return _refined(self.program, x, y, pattern)

    def _checked(self, values: Sequence[Tensor]) -> tuple[int | None, ...]:
        """Where the batch dimension of each value is."""
        if len(values) != len(self._parameters):
            raise ValueError(f"{len(self._parameters)} parameters are wanted, got {len(values)} tensors")
        for value, parameter in zip(values, self._parameters, strict=True):
            _check_value(value, parameter, values[0])
        in_dims = tuple(0 if v.dim() > p.ndim else None for v, p in zip(values, self._parameters, strict=True))
        sizes = {len(value) for value, dim in zip(values, in_dims, strict=True) if dim == 0}
        if len(sizes) > 1 or 0 in sizes:
            raise ValueError(f"batches need one size above zero, got {sorted(sizes)}")
        if not internals.transforming():
            for value, parameter, dim in zip(values, self._parameters, in_dims, strict=True):
                for one in [value] if dim is None else value:
                    _check_declared(one, parameter)
        return in_dims


def _refined(
    program: ConicProgram, x: dict[str, Tensor], y: dict[str, Tensor], pattern: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The same solution to working precision, by Newton steps as long as they help."""
    residual = lambda y: program.residual(x, y, pattern)
    size = lambda v: torch.linalg.vector_norm(tree.ravel_like(y, v))
    enough = REFINED * (1 + torch.linalg.vector_norm(x["c"]) + torch.linalg.vector_norm(x["b"]) + size(y))
    best, smallest = y, torch.inf
    for i in range(NUM_REFINEMENTS + 1):
        value, A = values_and_jacobian(Point("from_cvxpy", y, residual, ()), residual, check=False)
        if size(value) < smallest:
            best, smallest = y, size(value)
        if best is not y or smallest <= enough or i == NUM_REFINEMENTS:
            break
        flat, unravel = tree.ravel(y)
        y = unravel(flat - LeastNorm().solve(A, tree.ravel_like(y, value)).value)
    return best


def _check_arguments(
    cvxpy: ModuleType, problem: Any, parameters: Sequence[Any], variables: Sequence[Any], solver: str
) -> None:
    if solver not in DEFAULT_OPTIONS:
        raise ValueError(f"from_cvxpy works with the solvers {', '.join(DEFAULT_OPTIONS)}, got {solver!r}")
    if not isinstance(problem, cvxpy.Problem):
        raise TypeError(f"from_cvxpy needs a cvxpy.Problem, got {type(problem).__name__}")
    kinds = [("parameters", parameters, cvxpy.Parameter), ("variables", variables, cvxpy.Variable)]
    for name, given, kind in kinds:
        for one in given:
            if not isinstance(one, kind):
                raise TypeError(f"from_cvxpy needs {name} as a sequence of cvxpy.{kind.__name__}, got {one!r}")
            if one.id not in {known.id for known in getattr(problem, name)()}:
                raise ValueError(f"{one!r} is not among the {name} of the problem; leave it out")
        if not given or len({one.id for one in given}) < len(given):
            raise ValueError(f"from_cvxpy needs one or more different {name}, got {list(given)}")
    missing = [one.name() for one in problem.parameters() if one.id not in {given.id for given in parameters}]
    if missing:
        raise ValueError(f"parameters of the problem are missing: {', '.join(missing)}; give all of them")
    if problem.is_mixed_integer():
        raise ValueError("the problem has integer variables: its solution is no differentiable function of parameters")
    for one in (*problem.variables(), *problem.parameters()):
        if one.is_complex():
            raise ValueError(f"{one.name()} is complex; write real and imaginary parts as real variables")


def _check_value(value: Tensor, parameter: Any, first: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"parameter {parameter.name()} needs a floating point tensor, got {got}")
    if value.dtype != first.dtype:
        raise TypeError(f"parameters need one dtype, got {first.dtype} and {value.dtype}; convert one of them")
    if value.device != first.device:
        raise ValueError(f"parameters need one device, got {first.device} and {value.device}; move one of them")
    shape = tuple(value.shape)
    if shape != parameter.shape and shape[1:] != parameter.shape:
        raise ValueError(
            f"parameter {parameter.name()} needs shape {parameter.shape}, or that with a batch dimension in front; got "
            f"{shape}"
        )


def _check_declared(value: Tensor, parameter: Any) -> None:
    """Raise unless one value is finite and has the properties that its parameter was declared with.

    Raises:
        FloatingPointError: NaN or infinity.
        ValueError: naming the parameter and the properties.
    """
    if not value.isfinite().all():
        raise FloatingPointError(f"parameter {parameter.name()} got NaN or infinity; find out where it arose")
    declared = [name for name, wanted in parameter.attributes.items() if wanted is not None and wanted is not False]
    if not declared:
        return
    plain = value.detach().cpu().double()
    nearest = parameter.project(plain.numpy())
    nearest = torch.tensor(nearest.toarray() if hasattr(nearest, "toarray") else nearest).reshape(plain.shape)
    if (nearest - plain).abs().max() > PROPERTY_TOL * plain.abs().max():
        raise ValueError(
            f"parameter {parameter.name()} was declared {', '.join(declared)}, but its value lies "
            f"{(nearest - plain).abs().max():.1e} off"
        )
