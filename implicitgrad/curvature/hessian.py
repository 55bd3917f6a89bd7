"""The Hessian of a loss as an operator."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from implicitgrad import closure, tree
from implicitgrad.curvature import hvp
from implicitgrad.curvature.jacobian import linearize
from implicitgrad.curvature.point import Point
from implicitgrad.linalg import LinearOperator, check_operator
from implicitgrad.tree import Tree


def hessian(
    loss: Callable[..., Tensor],
    y: Tree,
    *data: Any,
    convex: bool = False,
    route: Literal["retained graph", "finite difference"] = "retained graph",
    check: bool = True,
) -> LinearOperator:
    """The exact Hessian `H = ∇²_yy loss(y, *data)` as a symmetric operator.

    The gradient is computed once with its graph; `H @ v` is one reverse pass through that graph, a block of right-hand
    sides one batched pass. User code runs in isolation: one dropout mask, buffers left alone, attention on the kernel
    that has a double backward. Modules enter by `implicitgrad.functional(net)`.

    Args:
        loss: `loss(y, *data)` returns a scalar tensor.
        y: Tree of tensors with n numbers, in the order of `tree.ravel`; `tree.slices` finds single leaves in it.
        data: Passed on, as constants.
        convex: Declares the loss convex in y, which makes zero a lower bound of the eigenvalues.
        route: `"finite difference"` for losses without double backward (compiled models, fused kernels): products from
            two gradients each, with a relative error `H.noise` of 1e-8 in float64 and 3e-4 in float32.
        check: Test the products as `check_operator` does, for three of them, and where custom autograd functions take
            part, compare one with a difference of two gradients.

    Returns:
        `H`, `(n, n)`. A product costs 0.9 (one hidden layer) to 2.5 gradients (convolutions), the set-up two gradients.
        The graph lives as long as the operator; it sees no later change of y.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype.
        ValueError: the loss is no scalar, does not depend on y, or its products contradict each other.
        RuntimeError: the loss lacks a double backward, wholly or in part; or a transform is active.
        FloatingPointError: NaN or infinity in the products.

    Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian"; by reverse over reverse mode, since forward
    mode has no rule for several losses.

    Example:
        >>> H = hessian(lambda y, c: (c * y**4).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
        >>> H @ torch.ones(2)
        tensor([12., 24.])
    """
    if route not in ("retained graph", "finite difference"):
        raise ValueError(f'route must be "retained graph" or "finite difference", got {route!r}')
    return hessian_at(Point("hessian", y, loss, data), loss, *data, convex=convex, route=route, check=check)


def hessian_at(
    point: Point,
    loss: Callable[..., Tensor],
    *data: Any,
    convex: bool,
    route: str = "retained graph",
    check: bool,
) -> LinearOperator:
    """`hessian` at a point that is already made."""
    constants = tree.map(closure.without_derivative, data)
    exact = route == "retained graph"
    gradient = hvp.marked_grad if exact else hvp.differenced_grad

    def flat_gradient(flat: Tensor) -> Tensor:
        return tree.ravel_like(point.y, gradient(lambda y: loss(y, *constants), point.unravel(flat)))

    noise = 0.0 if exact else hvp.noise(point.flat.dtype)
    linearization = linearize(point, flat_gradient, symmetric=True, noise=noise)
    operator = linearization.operator(point.isolation, 0.0 if convex else None)
    if check:
        check_second_derivatives(point, flat_gradient, linearization.scan if exact else None, operator)
    return operator


def check_second_derivatives(
    point: Point,
    gradient: Callable[[Tensor], Tensor],
    scan: closure.GraphScan | None,
    operator: LinearOperator,
) -> None:
    """Test products with the derivative of a gradient at `point`.

    torch skips what cannot be differentiated twice without a word, and a custom backward may compute outside torch
    altogether: where the graph shows either, a product is compared with a central difference.

    Args:
        point: Where the derivative was taken.
        gradient: Function of flat vectors that the operator is the derivative of.
        scan: What its graph shows; None to leave the comparison out.
        operator: Its derivative.

    Raises:
        RuntimeError: the double backward is missing or incomplete.
    """
    way_out = (
        "take a model that is not compiled, an operation with a differentiable backward, or for a Hessian "
        'route="finite difference"'
    )
    try:
        check_operator(operator)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"{point.name} needs a double backward, which failed ({error}); {way_out}") from error
    if scan is None or not (scan.dead_ends or scan.custom):
        return
    with point.evaluation():
        complete = not scan.dead_ends and hvp.agrees_with_difference(gradient, point.flat, operator)
    if complete:
        return
    raise RuntimeError(
        f"{point.name}: a custom autograd function takes part whose gradient cannot be differentiated again, and torch "
        f"would leave it out in silence; {way_out}"
    )
