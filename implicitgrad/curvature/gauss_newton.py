"""The generalised Gauss-Newton matrix of a loss behind a model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from implicitgrad.curvature.hessian import hessian_at
from implicitgrad.curvature.jacobian import values_and_jacobian
from implicitgrad.curvature.point import Point
from implicitgrad.linalg import LinearOperator
from implicitgrad.tree import Tree


def gauss_newton(
    model: Callable[[Tree, Any], Tree],
    loss: Callable[[Any, Any], Tensor],
    y: Tree,
    inputs: Any,
    targets: Any,
    *,
    convex: bool = True,
    check: bool = True,
) -> LinearOperator:
    """The generalised Gauss-Newton matrix `G = Jᵀ H J` as a symmetric operator.

    `J` is the Jacobian of the model's outputs in y, `H` the Hessian of the loss in the outputs: the Hessian of the loss
    in y without the curvature of the model. Positive semidefinite where the loss is convex in the outputs, however the
    model bends. A product is a reverse pass through each of three retained graphs: that of the reverse pass of the
    model (`J v`), that of the loss, and that of the model.

    Args:
        model: `model(y, inputs) -> outputs`, a tensor or a tree of tensors.
        loss: `loss(outputs, targets) -> scalar`, its reduction included: with a mean over N examples, G is a mean too.
        y: Tree of tensors with n numbers, in the order of `tree.ravel`.
        inputs: Handed to the model.
        targets: Handed to the loss.
        convex: Declares the loss convex in the outputs, as cross entropy, squared error, binary cross entropy, Huber
            and Poisson losses are; then zero is a lower bound of the eigenvalues of G. It cannot be found out in
            general; `check` tries one pair of vectors. Pass False for other losses.
        check: Test the products with J and H as `check_operator` does, for about three products with G.

    Returns:
        `G`, `(n, n)`. A product costs 0.9 to 2 gradients.

    Raises:
        TypeError: y or the outputs are no floating point tensors of one dtype.
        ValueError: the outputs do not depend on y, the loss not on the outputs, or products contradict each other.
        RuntimeError: the loss lacks a double backward in the outputs; or a transform is active.
        FloatingPointError: NaN or infinity in the products.

    Source: Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent", with the
    forward pass replaced by a second vector-Jacobian product.

    Example:
        >>> import torch
        >>> square = lambda outputs, targets: (outputs - targets).square().sum()
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> G = gauss_newton(lambda y, X: X @ y, square, torch.zeros(2), X, torch.ones(2))
        >>> torch.equal(G.to_dense(), 2 * X.T @ X)
        True
    """
    outputs, J = values_and_jacobian(Point("gauss_newton", y, model, inputs), model, inputs, check=check)
    H = output_hessian("gauss_newton", loss, outputs, targets, convex=convex, check=check)
    return sandwich(J, H)


def output_hessian(
    name: str, loss: Callable[[Any, Any], Tensor], outputs: Tree, targets: Any, *, convex: bool, check: bool
) -> LinearOperator:
    """The Hessian of `loss(outputs, targets)` in the outputs."""
    point = Point(f"{name}, the loss as a function of the outputs", outputs, loss, targets)
    return hessian_at(point, loss, targets, convex=convex, check=check)


def sandwich(J: LinearOperator, H: LinearOperator) -> LinearOperator:
    """`Jᵀ H J` for symmetric H; its eigenvalues are not negative if those of H are not."""

    def product(v: Tensor) -> Tensor:
        return J.T @ (H @ (J @ v))

    return LinearOperator(
        product,
        J.size,
        matmat=product,
        noise=2 * J.noise + H.noise,
        symmetric=True,
        eigenvalue_floor=None if H.eigenvalue_floor is None or H.eigenvalue_floor < 0 else 0.0,
        dtype=J.dtype,
        device=J.device,
    )
