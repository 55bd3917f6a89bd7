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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure, internals, tree
from implicitgrad.system import System


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
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple:
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
    def jvp(ctx: Any, _system: None, _y: None, *tangents: Tensor | None) -> Tensor:
        y, *inputs = ctx.saved_tensors
        return -_LinearSolve.apply(ctx.system, False, ctx.system.push(y, inputs, tangents), y, *inputs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, system: System, y: Tensor, *inputs: Tensor) -> tuple[Tensor, int]:
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
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple:
        u, y, *inputs = _saved(ctx)
        if cotangent is None:
            return (None,) * (4 + len(inputs))
        system, transposed = ctx.system, ctx.transposed
        s = _LinearSolve.apply(system, not transposed, cotangent, y, *inputs)
        if not any(ctx.needs_input_grad[3:]):
            return None, None, s, None, *[None] * len(inputs)
        # u = M⁻¹b with M = A or Aᵀ, so du = M⁻¹(db - dM u) and the cotangent of M u is -s
        through = lambda point, *values: system.product(point, values, u, transposed)
        return None, None, s, *tree.vjp(through, (y, *inputs), -s)

    @staticmethod
    @_batchable
    def jvp(ctx: Any, _system: None, _transposed: None, b: Tensor | None, *tangents: Tensor | None) -> Tensor:
        u, y, *inputs = ctx.saved_tensors
        system, transposed = ctx.system, ctx.transposed
        through = lambda point, *values: system.product(point, values, u, transposed)
        change = tree.jvp(through, (y, *inputs), tangents)
        return _LinearSolve.apply(system, transposed, -change if b is None else b - change, y, *inputs)

    @staticmethod
    def vmap(
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
