"""What the linear systems at one solution of `r(y, *inputs) = 0` share: graph, route, operator, factor, starts."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from implicitgrad import internals, report, tree
from implicitgrad.curvature import hvp
from implicitgrad.curvature.jacobian import Linearization
from implicitgrad.isolation import Isolation
from implicitgrad.linalg import AsymmetryError, LinearOperator, LinearSolver, Solution, check_symmetric
from implicitgrad.linalg.certificate import check_floor, solution_error
from implicitgrad.report import ConvergenceError, LinearSolve, Policy, Report
from implicitgrad.restriction import Restriction


class System:
    """One equation `r(y, *inputs) = 0` at its solution, with what its linear systems share.

    The graph of the residual, the dense matrix, its factor and the newest solutions are made once and serve all
    right-hand sides, both transposes and all orders of differentiation.

    Args:
        residual: `(y, *inputs) -> r`, all flat: `y` and `r` of shape `(*batch_shape, n)`.
        support: `(y, *inputs) -> booleans (*batch_shape, n)`, or None if systems are not to be restricted.
        symmetric_on_support: Whether the Jacobian is symmetric there.
        first_order_residual: The same from first-order derivatives of user code, tried when double backward is missing.
        symmetric: Whether `A` is declared symmetric.
        eigenvalue_floor: A lower bound on the eigenvalues of a symmetric `A` that the user vouches for.
        probe: Whether that declaration is to be tested.
        solver: Solves systems with `A`.
        policy: What to do when something has not converged.
        record: Filled in as things happen.
        isolation: Context in which user code runs.
        transformed: Whether functional transforms will differentiate user code again, which needs a double backward.
        batch_shape: Independent problems stacked in front, one dimension per `vmap`.
    """

    def __init__(
        self,
        residual: Callable[..., Tensor],
        *,
        support: Callable[..., Tensor | None] = lambda *_: None,
        symmetric_on_support: bool = False,
        first_order_residual: Callable[..., Tensor] | None,
        symmetric: bool,
        eigenvalue_floor: float | None,
        probe: bool,
        solver: LinearSolver,
        policy: Policy,
        record: Report,
        isolation: Isolation,
        transformed: bool = False,
        batch_shape: tuple[int, ...] = (),
    ) -> None:
        self.residual = residual
        self.record = record
        self.direct: list[Tensor] = []  # closed-over leaves, the last of the inputs: the residual finds them by itself
        self._support, self._symmetric_on_support = support, symmetric_on_support
        self._restriction: Restriction | None = None
        self._first_order_residual = first_order_residual
        self._symmetric = symmetric
        self._eigenvalue_floor = eigenvalue_floor
        self._probe = probe
        self._solver = solver
        self._policy = policy
        self.isolation = isolation
        self._transformed = transformed
        self._batch_shape = batch_shape
        self._linearization: Linearization | None = None
        self._operator: LinearOperator | None = None
        self._starts: dict[bool, tuple[Tensor, Tensor]] = {}
        self._stacks: dict[tuple[int | None, ...], System] = {}
        self._reference: tuple[Tensor, Tensor] | None = None  # the residual when first seen, and how far it may stray

    def linearize(self, y: Tensor, inputs: Sequence[Tensor]) -> Linearization:
        """The residual's graph at this solution, made on first need and after `release`; call it in isolation."""
        if self._linearization is None:
            with self.isolation.layers(higher=False):
                self._linearization = Linearization(
                    self.residual,
                    y,
                    inputs,
                    tracked=[value.requires_grad for value in inputs],
                    direct=self.direct,
                    symmetric=self._symmetric,
                    noise=self._noise(y),
                )
            self._check_unchanged(self._linearization.value)
        return self._linearization

    def release(self) -> None:
        """Forget the graph and all that hangs on it; factors of the dense matrix stay."""
        self._linearization = self._restriction = None
        if self._operator is not None:
            self._operator = self._operator.without_graph()

    def restart(self) -> None:
        """Forget everything computed at this solution."""
        self._linearization = self._operator = self._restriction = None

    def judge(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        """Measure the residual at `y` and report it; take the finite-difference route if double backward is missing.

        Raises:
            FloatingPointError: the residual is NaN or infinite.
            ConvergenceError: the residual is too large and the policy says so.
        """
        start = time.perf_counter()
        linearization, scale = self._first_product(y, inputs)
        report.check_finite(linearization.value, "the residual at the inner solution")
        norm = torch.linalg.vector_norm(linearization.value.detach(), dim=-1)
        size = torch.linalg.vector_norm(scale, dim=-1)
        relative = torch.where(norm > 0, norm / size, torch.zeros_like(norm))
        # near a solution of zero a relative error means nothing: an absolute one of eps^(3/4) passes too
        gain = torch.where(size > 0, size / torch.linalg.vector_norm(y, dim=-1), torch.ones_like(size))
        passes = (relative <= self._policy.inner_tolerance) | (norm <= torch.finfo(y.dtype).eps ** 0.75 * gain)
        # rounding strays by far less, unless large terms cancel near a solution of zero: hence a scale of at least one
        stray = torch.finfo(y.dtype).eps ** 0.5 * (norm + size).max().clamp(min=1)
        self._reference = linearization.value.detach(), stray
        record = self.record
        record.size, record.batch = y.shape[-1], norm.numel()
        record.inner_residual, record.inner_relative = norm.max().item(), relative.max().item()
        record.inner_converged = bool(passes.all())
        record.seconds = time.perf_counter() - start
        report.publish(record)
        self._policy.judge_inner(record)

    def _check_unchanged(self, value: Tensor) -> None:
        """Raise if the residual at this solution is not what it was: user code no longer means the same function.

        Raises:
            RuntimeError: naming what may have changed.
        """
        if self._reference is None or internals.transforming():
            return
        earlier, allowed = self._reference
        if bool(torch.linalg.vector_norm(value.detach() - earlier) > allowed):
            raise RuntimeError(
                "the condition has changed since the solution was made: a variable that it closes over was rebound, "
                "data was changed in place, or a module switched between train() and eval(); pass what changes as "
                "data, or differentiate before changing it"
            )

    def _evaluated(self, y: Tensor, *inputs: Tensor) -> Tensor:
        """The residual, evaluated again."""
        value = self.residual(y, *inputs)
        self._check_unchanged(value)
        return value

    def _first_product(self, y: Tensor, inputs: Sequence[Tensor]) -> tuple[Linearization, Tensor]:
        """The graph and `A y`, which scales the residual and shows whether the double backward works at all."""
        try:
            linearization, product = self._graph_product(y, inputs)
            self._check_second_derivatives(linearization, inputs)
            return linearization, product
        except (torch.OutOfMemoryError, ConvergenceError):
            raise
        except RuntimeError as error:  # includes NotImplementedError
            if not self._can_difference:
                raise
            try:
                return self._by_differences(y, inputs)
            except RuntimeError:
                raise error from None

    def _check_second_derivatives(self, linearization: Linearization, inputs: Sequence[Tensor]) -> None:
        """Compare a product with a difference of residuals where custom functions take part in a gradient.

        torch skips places that cannot be differentiated twice without a word, and a custom backward may compute
        outside torch altogether.

        Raises:
            RuntimeError: second derivatives through the graph are incomplete.
        """
        if self._noise(linearization.leaf) > 0:
            return
        scan = linearization.scan
        # a gradient needs every function twice; another residual may need it only once
        wrong = scan.dead_ends and self._symmetric and not self._probe
        if not wrong and (scan.dead_ends or scan.custom):
            fn = lambda y: self.residual(y, *inputs)
            with self.isolation():
                operator = self._graph_operator(linearization)
                wrong = not hvp.agrees_with_difference(fn, linearization.leaf.detach(), operator)
        if wrong:
            raise RuntimeError(
                "the condition contains a custom autograd function whose gradient cannot be differentiated again, and "
                "torch would leave it out in silence; use reverse mode of a Stationary condition outside of torch.func "
                "transforms, where finite differences take over, or give the function a differentiable backward"
            )

    @property
    def _can_difference(self) -> bool:
        return self._first_order_residual is not None and not self._batch_shape and not self._transformed

    def _noise(self, y: Tensor) -> float:
        return 0.0 if self.record.route == "retained graph" else hvp.noise(y.dtype)

    def _by_differences(self, y: Tensor, inputs: Sequence[Tensor]) -> tuple[Linearization, Tensor]:
        """The same with first-order derivatives of user code only."""
        assert self._first_order_residual is not None
        self.residual = self._first_order_residual
        self.restart()
        self.record.route = "finite difference"
        return self._graph_product(y, inputs)

    def _graph_product(self, y: Tensor, inputs: Sequence[Tensor]) -> tuple[Linearization, Tensor]:
        with self.isolation():
            linearization = self.linearize(y, inputs)
            return linearization, self._graph_operator(linearization) @ y

    def _graph_operator(self, linearization: Linearization) -> LinearOperator:
        if self._operator is None:
            operator = linearization.operator(eigenvalue_floor=self._eigenvalue_floor)
            if self._symmetric and self._probe:
                self._check_symmetric(operator)
                self._probe = False
            self._operator = operator
        return self._operator

    def _check_symmetric(self, operator: LinearOperator) -> None:
        try:
            check_symmetric(operator)
        except AsymmetryError:
            raise AsymmetryError(
                f"{self.record.condition} is declared symmetric, but the Jacobian of its residual is not: <u, Av> and "
                f"<v, Au> differ by {operator.symmetry_defect():.1e} relative to their size for random u and v; "
                "construct it with symmetric=False"
            ) from None

    def operator(self, y: Tensor, inputs: Sequence[Tensor]) -> LinearOperator:
        """`A` at this solution, on the shared graph or through its remembered matrix; use it in isolation."""
        if self._operator is None:
            self._graph_operator(self.linearize(y, inputs))
        assert self._operator is not None
        return self._operator

    def solve(self, b: Tensor, y: Tensor, inputs: Sequence[Tensor], transposed: bool) -> Tensor:
        """Numbers only: `A⁻¹b` or, transposed, `A⁻ᵀb` for `b` of shape `(*rows, *batch_shape, n)`."""
        return self.full_solve(b, y, inputs, transposed).value.reshape(b.shape)

    def full_solve(
        self,
        b: Tensor,
        y: Tensor,
        inputs: Sequence[Tensor],
        transposed: bool,
        approximation: LinearOperator | None = None,
    ) -> Solution:
        """The same with all that the solver tells, `b` as one block; with another operator in place of `A` if given."""
        began = time.perf_counter()
        with self.isolation():
            operator = self.operator(y, inputs) if approximation is None else approximation
            block = b if b.dim() == y.dim() else b.reshape(-1, *y.shape)
            other = self._starts.get(not transposed) if self._symmetric else None
            start = _scaled_start(self._starts.get(transposed, other), block)
            restriction = self._restricted(operator, y, inputs)
            if restriction is not None:
                solution, bound = restriction.solve(self._solver, block, transposed, start), None
            else:
                operator = operator.T if transposed else operator
                solution = self._solver.solve(operator, block, start)
                check_floor(operator, solution)
                exact = approximation is None
                bound = solution_error(operator, block, solution, dense=False) if exact else None
        if solution.converged:  # an unfinished solve must not depend on what was solved before
            self._starts[transposed] = (block, solution.value)
        solve = LinearSolve.of("adjoint" if transposed else "tangent", solution, bound, time.perf_counter() - began)
        self.record.solves.append(solve)
        report.publish(self.record)
        self._policy.judge_solve(solve)
        return solution

    def _restricted(self, operator: LinearOperator, y: Tensor, inputs: Sequence[Tensor]) -> Restriction | None:
        if self._restriction is None:
            mask = self._support(y, *inputs)
            if mask is None or bool(mask.all()):
                self._support = lambda *_: None
                return None
            self._restriction = Restriction(operator, mask, self._symmetric or self._symmetric_on_support)
            self.record.support = self._restriction.size
        return self._restriction

    def pullback(self, cotangent: Tensor, y: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list:
        """`cotangent · ∂r/∂inputs` for the wanted inputs, None for the rest; differentiable when gradients are on."""
        chosen = [i for i, want in enumerate(wanted) if want]
        graph = self._linearization
        if not torch.is_grad_enabled() and graph is None and not internals.transforming():
            with self.isolation():
                graph = self.linearize(y, inputs)
        if torch.is_grad_enabled() or graph is None or not all(graph.inputs[i].requires_grad for i in chosen):
            products = self._differentiable_pullback(cotangent, y, inputs, chosen)
        else:
            with self.isolation():
                products = graph.pullback(cotangent, [graph.inputs[i] for i in chosen])
        result: list[Tensor | None] = [None] * len(inputs)
        for i, product in zip(chosen, products, strict=True):
            result[i] = product
        return result

    def _differentiable_pullback(
        self, cotangent: Tensor, y: Tensor, inputs: Sequence[Tensor], chosen: Sequence[int]
    ) -> Sequence[Tensor | None]:
        def restricted(*parts: Tensor) -> Tensor:
            full = list(inputs)
            for i, part in zip(chosen, parts, strict=True):
                full[i] = part
            return self._evaluated(y, *full)

        with self.isolation(), self.isolation.layers(higher=True):
            return tree.vjp(restricted, [inputs[i] for i in chosen], cotangent)

    def push(self, y: Tensor, inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
        """`∂r/∂inputs · tangents`, differentiable."""
        with self.isolation(), self.isolation.layers(higher=True):
            return tree.jvp(self._evaluated, (y, *inputs), (None, *tangents))

    def product(self, y: Tensor, inputs: Sequence[Tensor], u: Tensor, transposed: bool) -> Tensor:
        """`A u` or `Aᵀu` as a differentiable function of `y`, inputs and `u`; leading rows of `u` one by one."""
        if u.dim() > y.dim():
            return torch.func.vmap(lambda row: self.product(y, inputs, row, transposed))(u)
        at_inputs = lambda point: self._evaluated(point, *inputs)
        with self.isolation(), self.isolation.layers(higher=True):
            if transposed or self._symmetric:
                (result,) = tree.vjp(at_inputs, (y,), u)
                assert result is not None
                return result
            return tree.jvp(at_inputs, (y,), (u,))

    def batched(self, in_dims: Sequence[int | None], size: int) -> "System":
        """The stack of systems that one `vmap` over `y` and the inputs asks for; `in_dims` has `y` first."""
        key = (size, *in_dims)
        if key not in self._stacks:
            self._stacks[key] = System(
                torch.func.vmap(self.residual, in_dims=tuple(in_dims), randomness="same"),
                support=_stacked(self._support, tuple(in_dims), size),
                symmetric_on_support=self._symmetric_on_support,
                first_order_residual=None,
                symmetric=self._symmetric,
                eigenvalue_floor=self._eigenvalue_floor,
                probe=self._probe,
                solver=self._solver,
                policy=self._policy,
                record=self.record,
                isolation=self.isolation,
                transformed=True,
                batch_shape=(size, *self._batch_shape),
            )
        return self._stacks[key]

    @property
    def batch_dim(self) -> int:
        """Where the dimension of the outermost `vmap` stands, counted from the end."""
        return -1 - len(self._batch_shape)


def _stacked(support: Callable[..., Tensor | None], in_dims: tuple, size: int) -> Callable[..., Tensor | None]:
    """The support of every problem in a stack; those without one have all coordinates in it."""

    def of_stack(y: Tensor, *inputs: Tensor) -> Tensor | None:
        none = False

        def one(*arguments: Tensor) -> Tensor:
            nonlocal none
            mask = support(*arguments)
            none = mask is None
            return torch.ones_like(arguments[0], dtype=torch.bool) if mask is None else mask

        masks = torch.func.vmap(one, in_dims=in_dims, randomness="same")(y, *inputs)
        return None if none else masks

    return of_stack


def _scaled_start(known: tuple[Tensor, Tensor] | None, b: Tensor) -> Tensor | None:
    """An earlier solution scaled to fit `b` as well as it can: exact where `b` is a multiple of the earlier one."""
    if known is None or known[0].shape != b.shape:
        return None
    earlier, solution = known
    tiny = torch.finfo(b.dtype).tiny
    sizes = [v.abs().amax(-1, keepdim=True).clamp(min=tiny) for v in (b, earlier)]
    new, old = b / sizes[0], earlier / sizes[1]  # so that no square overflows
    overlap = (new * old).sum(-1, keepdim=True) / (old * old).sum(-1, keepdim=True).clamp(min=tiny)
    return overlap * (sizes[0] / sizes[1]) * solution
