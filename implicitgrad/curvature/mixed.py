"""The mixed second derivative of a loss as a rectangular operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure, tree
from implicitgrad.curvature import hvp
from implicitgrad.curvature.hessian import check_second_derivatives
from implicitgrad.curvature.point import Point
from implicitgrad.curvature.pullback import Pullback, retained_operator
from implicitgrad.linalg import LinearOperator
from implicitgrad.tree import Tree


def mixed_derivative(loss: Callable[..., Tensor], x: Tree, y: Tree, *data: Any, check: bool = True) -> LinearOperator:
    """The mixed derivative `B = ∂²loss / ∂y ∂x` as an operator: a row per number in y, a column per number in x.

    How the gradient in y moves with x, and so what couples the levels of a bilevel problem: with the Hessian A in y,
    the solution moves by `dy = -A⁻¹ B dx`. One graph holds both gradients: `B @ v` is a reverse pass from `∇_x loss`
    to y, `B.T @ u` one from `∇_y loss` to x.

    Args:
        loss: `loss(x, y, *data)` returns a scalar tensor.
        x: Tree of tensors with n_x numbers.
        y: Tree of tensors with n_y numbers, of the same dtype and on the same device.
        data: Passed on, as constants.
        check: Test the products as `check_operator` does, for three of them; custom autograd functions as in `hessian`.

    Returns:
        `B`, `(n_y, n_x)`, zero where the loss separates x from y. Products cost up to 2.5 gradients; the graph lives as
        long as the operator.

    Raises:
        TypeError: x or y are no trees of floating point tensors of one dtype.
        ValueError: the loss is no scalar or depends on neither; x and y on different devices.
        RuntimeError: the loss lacks a double backward, wholly or in part; or a transform is active.
        FloatingPointError: NaN or infinity in the products.

    Example:
        >>> B = mixed_derivative(lambda x, y: x.exp() @ y, torch.zeros(2), torch.ones(2))
        >>> B @ torch.tensor([1.0, 2.0])
        tensor([1., 2.])
    """
    upper, lower = (Point(f"mixed_derivative in {name}", side, loss, data) for name, side in (("x", x), ("y", y)))
    tree.check_vector_space([upper.flat, lower.flat], "mixed_derivative: the pair (x, y)")
    constants = tree.map(closure.without_derivative, data)

    def gradients(flat_x: Tensor, flat_y: Tensor) -> tuple[Tensor, Tensor]:
        pair = upper.unravel(flat_x), lower.unravel(flat_y)
        in_x, in_y = hvp.marked_grad(lambda both: loss(*both, *constants), pair)
        return tree.ravel_like(upper.y, in_x), tree.ravel_like(lower.y, in_y)

    with upper.evaluation(), torch.enable_grad():
        leaves = [point.flat.detach().requires_grad_() for point in (upper, lower)]
        views = [leaf.view_as(leaf) for leaf in leaves]  # the first nodes of this evaluation
        in_x, in_y = gradients(*views)
    to_y, to_x = Pullback(in_x, leaves[1]), Pullback(in_y, leaves[0])
    operator = retained_operator(lambda: to_y, to_x, context=upper.isolation)
    if check:
        scan = closure.scan_graph(in_y, views[0], leaves)
        check_second_derivatives(upper, lambda flat_x: gradients(flat_x, lower.flat)[1], scan, operator)
    return operator
