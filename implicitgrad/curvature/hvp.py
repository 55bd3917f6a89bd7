"""Hessian-vector products where user code has no double backward: central differences of first-order gradients.

`(∇²_yy loss) u ≈ [∇_y loss(y + hu) - ∇_y loss(y - hu)] / 2h`, and likewise the mixed derivative from `∇_z loss` for
every other tensor `z`: one direction `u` in `y` serves all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure, internals, tree
from implicitgrad.isolation import RandomState
from implicitgrad.linalg import LinearOperator, irregular
from implicitgrad.tree import Tree


def noise(dtype: torch.dtype) -> float:
    """Relative error to expect of products by differences: eps^(1/2), 1.5e-8 in float64 and 3.5e-4 in float32."""
    return torch.finfo(dtype).eps ** 0.5


def differenced_grad(fn: Callable[[Tree], Tensor], point: Tree) -> Tree:
    """Gradient of a scalar function at `point` that can be differentiated once more, by central differences.

    The reverse product with a direction `u` costs two gradients. The step is `eps^(1/4) s / ‖u‖` with a scale `s`
    between `‖y‖` and 1: of three candidates the one whose products with half and full step agree best. The relative
    error on smooth losses is about 1e-8 in float64 and 1e-3 in float32.

    Raises:
        NotImplementedError: inside a `torch.func` transform, or when a second derivative of the result is asked for.
    """
    if internals.transforming():
        raise NotImplementedError(
            "the loss has no double backward, and finite differences do not work inside torch.func transforms; "
            "use .backward() or torch.autograd.grad, or replace the operation that lacks a double backward"
        )
    flat, unravel = tree.ravel(point)
    random = RandomState({torch.device("cpu"), flat.device})

    def scalar(vector: Tensor) -> Tensor:
        random.restore()  # the same dropout masks in every evaluation; the caller guards the present state
        return fn(unravel(vector))

    with torch.enable_grad():
        origin = flat.detach().requires_grad_()
        probe = origin.view_as(origin)
        value = scalar(probe)
        others = closure.scan_graph(value, probe, known=[origin]).leaves
    return unravel(_DifferencedGradient.apply(scalar, _step_scale(scalar, origin.detach()), flat, *others))


def _step_scale(scalar: Callable[[Tensor], Tensor], flat: Tensor) -> Tensor:
    """How far to step from `flat` `(n,)`, up to the factor for the dtype; 0-dimensional."""
    size = torch.linalg.vector_norm(flat)
    if not 0 < size.item() < 1:
        return torch.where(size > 0, size, torch.ones_like(size))
    direction = irregular(flat)

    def disagreement(scale: Tensor) -> Tensor:
        whole, half = (_difference(scalar, flat, factor * scale * direction, ())[0] for factor in (1.0, 0.5))
        return torch.linalg.vector_norm(whole - 2 * half) / torch.linalg.vector_norm(half)

    candidates = [size, size.sqrt(), torch.ones_like(size)]
    errors = torch.stack([disagreement(scale) for scale in candidates]).nan_to_num(nan=float("inf"))
    return candidates[int(errors.argmin())]


def _difference(
    scalar: Callable[[Tensor], Tensor], flat: Tensor, displacement: Tensor, others: Sequence[Tensor]
) -> list[Tensor]:
    """Central differences of the gradient in `flat` and in others, over a displacement times eps^(1/4)."""
    step = torch.finfo(flat.dtype).eps ** 0.25 * displacement
    ahead, behind = (_gradients(scalar, flat + sign * step, others) for sign in (1, -1))
    return [(plus - minus) / 2 for plus, minus in zip(ahead, behind, strict=True)]


def agrees_with_difference(fn: Callable[[Tensor], Tensor], y: Tensor, operator: LinearOperator) -> bool:
    """Whether a product with the derivative of `fn` at y `(*batch, n)` is near a central difference along the vector.

    The difference is right to `eps^(1/2)` where `fn` is smooth, to about `eps^(1/4)` across the kinks of a ReLU, which
    is allowed four times over; what torch leaves out of a graph is a good part of the product.
    """
    step = torch.finfo(y.dtype).eps ** 0.25
    size = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    direction = irregular(y) * torch.where(size > 0, size, torch.ones_like(size))
    with torch.no_grad():
        ahead, behind = (fn(y + sign * step * direction) for sign in (1, -1))
    change = (ahead - behind) / (2 * step)
    if operator.symmetric:
        product = operator @ direction
        error = torch.linalg.vector_norm(change - product)
        return bool(error <= 4 * step * torch.linalg.vector_norm(product))
    # the reverse product is the one that reverse mode needs; along the change itself nothing can hide from it
    square, inner = (change * change).sum(), ((operator.T @ change) * direction).sum()
    return bool((square - inner).abs() <= 4 * step * square)


def marked_grad(fn: Callable[[Tree], Tensor], point: Tree) -> Tree:
    """Gradient of a scalar function at `point`, like `tree.grad`, on a graph that shows custom functions of `fn`.

    A custom backward that computes outside torch leaves no trace on the graph of the gradient. Where custom functions
    take part in `fn`, the result therefore passes through one more, which changes nothing.
    """
    custom: list[bool] = []

    def watched(tree_point: Tree) -> Tensor:
        landmark = None  # what is older was not made by fn; inside a transform nothing is older
        if not internals.transforming():
            landmark = torch.zeros((), requires_grad=True).view(())
        value = fn(tree_point)
        if isinstance(value, Tensor):
            custom.append(closure.scan_graph(value, landmark, known=[]).custom)
        return value

    gradient = tree.grad(watched, point)
    return tree.map(_Mark.apply, gradient) if any(custom) else gradient


class _Mark(torch.autograd.Function):
    """The identity, as a node that `closure.scan_graph` counts as custom."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


class _DifferencedGradient(torch.autograd.Function):
    """`y, z ↦ ∇_y scalar(y; z)`, its transpose by central differences of `∇_(y, z) scalar` along the cotangent."""

    @staticmethod
    def forward(ctx: Any, scalar: Callable[[Tensor], Tensor], scale: Tensor, flat: Tensor, *others: Tensor) -> Tensor:
        ctx.scalar, ctx.scale, ctx.others = scalar, scale, others
        ctx.save_for_backward(flat)
        return _gradients(scalar, flat, ())[0]

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "second derivatives need a double backward that an operation in the loss does not have "
                "(a compiled model, a fused kernel); run the model eagerly or replace that operation"
            )
        (flat,) = ctx.saved_tensors
        size = torch.linalg.vector_norm(direction)
        stretch = torch.where(size > 0, ctx.scale / size, torch.ones_like(size))
        changes = _difference(ctx.scalar, flat, stretch * direction, ctx.others)
        return None, None, *(change / (torch.finfo(flat.dtype).eps ** 0.25 * stretch) for change in changes)


def _gradients(scalar: Callable[[Tensor], Tensor], flat: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        point = flat.detach().requires_grad_()
        return torch.autograd.grad(scalar(point), [point, *others], materialize_grads=True)
