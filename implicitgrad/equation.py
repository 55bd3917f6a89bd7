"""Derivatives of the solution of `r(y, *inputs) = 0`, of every order and in every mode, on flat vectors.

With `A = ∂r/∂y` and `B = ∂r/∂inputs` the implicit function theorem gives `dy = -A⁻¹ B d(inputs)`. Two nodes suffice:

* `_Root` is the solution. Backward it solves `Aᵀu = v` and returns `-Bᵀu`; forward it returns `-A⁻¹ (B t)`.
* `_LinearSolve` is `u = A⁻¹b` or `A⁻ᵀb` as a function of `b`, `y` and the inputs. Its own derivatives are linear solves
  with the same matrix, and derivatives of products with it. `_Root` uses it for its solves, so each order of
  differentiation finds the next one ready.

Numbers are only ever computed in the `forward` of these nodes, on plain tensors below all functional transforms, so
solvers may branch on values. `vmap` reaches them as a stack of independent systems, batched cotangents as several
right-hand sides of one system.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure, internals, report, tree
from implicitgrad.curvature import hvp
from implicitgrad.curvature.jacobian import Linearization
from implicitgrad.isolation import Isolation
from implicitgrad.linalg import AsymmetryError, LinearOperator, LinearSolver, check_symmetric
from implicitgrad.report import LinearSolve, Policy, Report


class System:
    """One equation `r(y, *inputs) = 0` at its solution, with what its linear systems share.

    The graph of the residual, the dense matrix, its factor and the newest solutions are made once and serve all
    right-hand sides, both transposes and all orders of differentiation.

    Args:
        residual: `(y, *inputs) -> r`, all flat: `y` and `r` of shape `(*batch_shape, n)`.
        first_order_residual: The same from first-order derivatives of user code, tried when double backward is missing.
        symmetric: Whether `A` is declared symmetric.
        probe: Whether that declaration is to be tested.
        solver: Solves systems with `A`.
        policy: What to do when something has not converged.
        record: Filled in as things happen.
        isolation: Context in which user code runs.
        batch_shape: Independent problems stacked in front, one dimension per `vmap`.
    """

    def __init__(
        self,
        residual: Callable[..., Tensor],
        *,
        first_order_residual: Callable[..., Tensor] | None,
        symmetric: bool,
        probe: bool,
        solver: LinearSolver,
        policy: Policy,
        record: Report,
        isolation: Isolation,
        batch_shape: tuple[int, ...] = (),
    ) -> None:
        self.residual = residual
        self.record = record
        self.direct: list[Tensor] = []  # closed-over leaves, the last of the inputs: the residual finds them by itself
        self._first_order_residual = first_order_residual
        self._symmetric = symmetric
        self._probe = probe
        self._solver = solver
        self._policy = policy
        self.isolation = isolation
        self._batch_shape = batch_shape
        self._linearization: Linearization | None = None
        self._operator: LinearOperator | None = None
        self._starts: dict[bool, tuple[Tensor, Tensor]] = {}
        self._stacks: dict[tuple[int | None, ...], System] = {}

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
                    noise=0.0 if self.record.route == "retained graph" else hvp.noise(y.dtype),
                )
        return self._linearization

    def release(self) -> None:
        """Forget the graph and all that hangs on it; factors of the dense matrix stay."""
        self._linearization = None
        if self._operator is not None:
            self._operator = self._operator.without_graph()

    def restart(self) -> None:
        """Forget everything computed at this solution."""
        self._linearization = self._operator = None

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
        # near a solution of zero a relative error means nothing: an absolute one of sqrt(eps) passes too
        gain = torch.where(size > 0, size / torch.linalg.vector_norm(y, dim=-1), torch.ones_like(size))
        passes = (relative <= self._policy.inner_tolerance) | (norm <= torch.finfo(y.dtype).eps ** 0.5 * gain)
        record = self.record
        record.size, record.batch = y.shape[-1], norm.numel()
        record.inner_residual, record.inner_relative = norm.max().item(), relative.max().item()
        record.inner_converged = bool(passes.all())
        record.seconds = time.perf_counter() - start
        report.publish(record)
        self._policy.judge_inner(record)

    def _first_product(self, y: Tensor, inputs: Sequence[Tensor]) -> tuple[Linearization, Tensor]:
        """The graph and `A y`, which scales the residual and shows whether the double backward works at all."""
        try:
            linearization, product = self._graph_product(y, inputs)
            if self._can_difference and self._misleads(linearization, product, inputs):
                raise RuntimeError("the loss has a part that cannot be differentiated twice")
            return linearization, product
        except RuntimeError as error:  # includes NotImplementedError
            if not self._can_difference:
                raise
            try:
                return self._by_differences(y, inputs)
            except RuntimeError:
                raise error from None

    @property
    def _can_difference(self) -> bool:
        return self._first_order_residual is not None and not self._batch_shape

    def _misleads(self, linearization: Linearization, product: Tensor, inputs: Sequence[Tensor]) -> bool:
        """Whether second derivatives through the graph are incomplete: torch skips dead ends without a word."""
        if linearization.scan.dead_ends:
            return True
        if not linearization.scan.custom:
            return False
        y, rough = linearization.leaf.detach(), torch.finfo(product.dtype).eps ** 0.25
        with torch.no_grad():
            ahead, behind = (self._value((1 + sign * rough) * y, inputs) for sign in (1, -1))
        change = ahead - behind
        error = torch.linalg.vector_norm(change / (2 * rough) - product)
        return bool(error > 10 * rough * torch.linalg.vector_norm(product))

    def _value(self, y: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        with self.isolation():
            return self.residual(y, *inputs)

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
            operator = linearization.operator()
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

    def solve(self, b: Tensor, y: Tensor, inputs: Sequence[Tensor], transposed: bool) -> Tensor:
        """Numbers only: `A⁻¹b` or, transposed, `A⁻ᵀb` for `b` of shape `(*rows, *batch_shape, n)`."""
        began = time.perf_counter()
        with self.isolation():
            if self._operator is None:
                self._graph_operator(self.linearize(y, inputs))
            assert self._operator is not None
            block = b if b.dim() == y.dim() else b.reshape(-1, *y.shape)
            flipped = transposed and not self._symmetric
            operator = self._operator.T if flipped else self._operator
            other = self._starts.get(not transposed) if self._symmetric else None
            start = _scaled_start(self._starts.get(transposed, other), block)
            solution = self._solver.solve(operator, block, start)
        self._starts[transposed] = (block, solution.value)
        solve = LinearSolve.of("adjoint" if transposed else "tangent", solution, time.perf_counter() - began)
        self.record.solves.append(solve)
        report.publish(self.record)
        self._policy.judge_solve(solve)
        return solution.value.reshape(b.shape)

    def start_from(self, other: "System") -> None:
        """Let the linear systems start from the solutions of a system nearby."""
        self._starts = dict(other._starts)

    def pullback(self, cotangent: Tensor, y: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list:
        """`cotangent · ∂r/∂inputs` for the wanted inputs, None for the rest; differentiable when gradients are on."""
        chosen = [i for i, want in enumerate(wanted) if want]
        if torch.is_grad_enabled() or internals.transforming() and self._linearization is None:
            products = self._differentiable_pullback(cotangent, y, inputs, chosen)
        else:
            with self.isolation():
                linearization = self.linearize(y, inputs)
                products = linearization.pullback(cotangent, [linearization.inputs[i] for i in chosen])
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
            return self.residual(y, *full)

        with self.isolation(), self.isolation.layers(higher=True):
            return tree.vjp(restricted, [inputs[i] for i in chosen], cotangent)

    def push(self, y: Tensor, inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
        """`∂r/∂inputs · tangents`, differentiable."""
        with self.isolation(), self.isolation.layers(higher=True):
            return tree.jvp(self.residual, (y, *inputs), (None, *tangents))

    def product(self, y: Tensor, inputs: Sequence[Tensor], u: Tensor, transposed: bool) -> Tensor:
        """`A u` or `Aᵀu` as a differentiable function of `y`, inputs and `u`; leading rows of `u` one by one."""
        if u.dim() > y.dim():
            return torch.func.vmap(lambda row: self.product(y, inputs, row, transposed))(u)
        at_inputs = lambda point: self.residual(point, *inputs)  # noqa: E731
        with self.isolation(), self.isolation.layers(higher=True):
            if transposed or self._symmetric:
                (result,) = tree.vjp(at_inputs, (y,), u)
                assert result is not None
                return result
            return tree.jvp(at_inputs, (y,), (u,))

    def batched(self, in_dims: Sequence[int | None], size: int) -> "System":
        """The stack of systems that one `vmap` over `y` and the inputs asks for; `in_dims` has `y` first."""
        key = tuple(in_dims)
        if key not in self._stacks:
            self._stacks[key] = System(
                torch.func.vmap(self.residual, in_dims=key, randomness="same"),
                first_order_residual=None,
                symmetric=self._symmetric,
                probe=self._probe,
                solver=self._solver,
                policy=self._policy,
                record=self.record,
                isolation=self.isolation,
                batch_shape=(size, *self._batch_shape),
            )
        return self._stacks[key]

    @property
    def batch_dim(self) -> int:
        """Where the dimension of the outermost `vmap` stands, counted from the end."""
        return -1 - len(self._batch_shape)


def root(system: System, y: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The solution `y` as a differentiable function of `inputs`."""
    return _Root.apply(system, y, *closure.shown(inputs))


def _saved(ctx: Any) -> list[Tensor]:
    """Saved tensors; those of a functional transform that has ended, as `torch.func.vjp` leaves them, unwrapped."""
    return [internals.unwrapped_if_ended(value) for value in ctx.saved_tensors]


def _batchable(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Let a `backward` or `jvp` receive the batched tensors of `is_grads_batched`.

    That option still runs on an older kind of batched tensor, which no custom function knows. Such cotangents or
    tangents are handed to `torch.func.vmap` instead, and the results back.
    """

    @functools.wraps(rule)
    def wrapped(ctx: Any, *arguments: Tensor | None) -> Any:
        batches = {i: v for i, v in enumerate(arguments) if v is not None and internals.is_old_batch(v)}
        if not batches:
            return rule(ctx, *arguments)
        level = internals.old_batch_level()
        rows = [internals.rows_of_old_batch(batch, level) for batch in batches.values()]
        results: list[Any] = []

        def one(*row: Tensor) -> list[Tensor]:
            full = list(arguments)
            for i, value in zip(batches, row, strict=True):
                full[i] = value
            results[:] = [rule(ctx, *full)]
            return [leaf for leaf in tree.leaves(results) if leaf is not None]

        stacked = iter(torch.func.vmap(one)(*rows))
        return tree.map(lambda leaf: leaf if leaf is None else internals.old_batch_of(next(stacked), level), results)[0]

    return wrapped


class _Root(torch.autograd.Function):
    """`inputs ↦ y` with `r(y, *inputs) = 0`."""

    @staticmethod
    def forward(system: System, y: Tensor, *inputs: Tensor) -> Tensor:
        if system._linearization is None:
            system.judge(y, inputs)
            _check_nothing_hidden(system)
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.system = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, *inputs[2:])
        ctx.save_for_forward(output, *inputs[2:])

    @staticmethod
    @_batchable
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple:  # type: ignore[override]
        y, *inputs = _saved(ctx)
        if cotangent is None:
            return (None,) * (2 + len(inputs))
        u = _LinearSolve.apply(ctx.system, True, cotangent, y, *inputs)
        wanted = [want and tree.is_differentiable(v) for want, v in zip(ctx.needs_input_grad[2:], inputs, strict=True)]
        products = ctx.system.pullback(-u, y, inputs, wanted)
        if not torch.is_grad_enabled():
            ctx.system.release()
        return None, None, *products

    @staticmethod
    @_batchable
    def jvp(ctx: Any, _system: None, _y: None, *tangents: Tensor | None) -> Tensor:  # type: ignore[override]
        y, *inputs = ctx.saved_tensors
        return -_LinearSolve.apply(ctx.system, False, ctx.system.push(y, inputs, tangents), y, *inputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, system: System, y: Tensor, *inputs: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        y, stacked, dims = _stack_first(info.batch_size, in_dims[1:], y, inputs)
        return _Root.apply(system.batched(dims, info.batch_size), y, *stacked), 0


class _LinearSolve(torch.autograd.Function):
    """`b, y, inputs ↦ A⁻¹b`, or `A⁻ᵀb` when transposed."""

    @staticmethod
    def forward(system: System, transposed: bool, b: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
        return system.solve(b, y, inputs, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.system, ctx.transposed = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, *inputs[3:])
        ctx.save_for_forward(output, *inputs[3:])

    @staticmethod
    @_batchable
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple:  # type: ignore[override]
        u, y, *inputs = _saved(ctx)
        if cotangent is None:
            return (None,) * (4 + len(inputs))
        system, transposed = ctx.system, ctx.transposed
        s = _LinearSolve.apply(system, not transposed, cotangent, y, *inputs)
        if not any(ctx.needs_input_grad[3:]):
            return None, None, s, None, *[None] * len(inputs)
        # u = M⁻¹b with M = A or Aᵀ, so du = M⁻¹(db - dM u) and the cotangent of M u is -s
        through = lambda point, *values: system.product(point, values, u, transposed)  # noqa: E731
        return None, None, s, *tree.vjp(through, (y, *inputs), -s)

    @staticmethod
    @_batchable
    def jvp(ctx: Any, _system: None, _transposed: None, b: Tensor | None, *tangents: Tensor | None) -> Tensor:  # type: ignore[override]
        u, y, *inputs = ctx.saved_tensors
        system, transposed = ctx.system, ctx.transposed
        through = lambda point, *values: system.product(point, values, u, transposed)  # noqa: E731
        change = tree.jvp(through, (y, *inputs), tangents)
        return _LinearSolve.apply(system, transposed, -change if b is None else b - change, y, *inputs)

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: tuple, system: System, transposed: bool, b: Tensor, y: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, int]:
        size, b_dim, dims = info.batch_size, in_dims[2], in_dims[3:]
        if all(dim is None for dim in dims):  # one system, several right-hand sides
            return _LinearSolve.apply(system, transposed, b.movedim(b_dim, 0), y, *inputs), 0
        y, stacked, dims = _stack_first(size, dims, y, inputs)
        b = b.unsqueeze(0).expand(size, *b.shape) if b_dim is None else b.movedim(b_dim, 0)
        place = system.batch_dim - 1
        u = _LinearSolve.apply(system.batched(dims, size), transposed, b.movedim(0, place), y, *stacked)
        return u.movedim(place, 0), 0


def _stack_first(
    size: int, dims: Sequence[int | None], y: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[int | None]]:
    """Batch dimensions in front; `y` always has one."""
    y = y.unsqueeze(0).expand(size, *y.shape) if dims[0] is None else y.movedim(dims[0], 0)
    moved = [v if dim is None else v.movedim(dim, 0) for v, dim in zip(inputs, dims[1:], strict=True)]
    return y, moved, [0, *(None if dim is None else 0 for dim in dims[1:])]


def _scaled_start(known: tuple[Tensor, Tensor] | None, b: Tensor) -> Tensor | None:
    """An earlier solution scaled to fit `b` as well as it can: exact where `b` is a multiple of the earlier one."""
    if known is None or known[0].shape != b.shape:
        return None
    earlier, solution = known
    energy = (earlier * earlier).sum(-1, keepdim=True)
    overlap = (b * earlier).sum(-1, keepdim=True)
    return torch.where(energy > 0, overlap / energy, torch.zeros_like(energy)) * solution


def _check_nothing_hidden(system: System) -> None:
    """Raise if the residual hangs on a tensor that is not among its inputs, whose gradient would be lost."""
    linearization = system._linearization
    assert linearization is not None
    if linearization.scan.leaves or linearization.scan.older:
        shapes = [tuple(tensor.shape) for tensor in linearization.scan.leaves] or "unknown, an intermediate result"
        raise RuntimeError(
            f"the condition closes over tensors (shapes: {shapes}) that require gradients but cannot be followed "
            "through a functional transform, since a custom autograd function or compiled code uses them; pass them "
            "as arguments: in x, or in data"
        )
