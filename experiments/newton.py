"""Newton's method with a backtracking line search, for smooth strongly convex losses of a few hundred variables."""

from collections.abc import Callable

import torch
from torch import Tensor


def newton(
    loss: Callable[[Tensor], Tensor],
    hessian: Callable[[Tensor], Tensor],
    y: Tensor,
    gtol: float = 1e-10,
    max_iter: int = 100,
) -> Tensor:
    """The minimiser of `loss`, from `y <- y - s H(y)^-1 grad(y)` with the largest `s = 1, 1/2, 1/4, ...` that descends.

    Stops at a gradient norm of `gtol`, or after `max_iter` steps, or when rounding hides every further descent.
    One step costs one Hessian, one Cholesky factorisation and usually one evaluation of the loss.
    Source: Boyd and Vandenberghe, Convex Optimization, 2004, algorithm 9.5 with the line search of algorithm 9.2.

    Args:
        loss: maps `y` to a scalar.
        hessian: maps `y` to the matrix `(y.numel(), y.numel())`, symmetric and positive definite.
        y: where to start, any shape.
        gtol: absolute, in units of the gradient.
        max_iter: in Newton steps.
    """
    for _ in range(max_iter):
        value, gradient = _value_and_gradient(loss, y)
        if gradient.norm() <= gtol:
            break
        factor = torch.linalg.cholesky(hessian(y))
        direction = -torch.cholesky_solve(gradient.reshape(-1, 1), factor).reshape(y.shape)
        slope = (gradient * direction).sum()
        step = _line_search(loss, y, direction, value, slope)
        if step == 0.0:
            break
        y = y + step * direction
    return y


def _value_and_gradient(loss: Callable[[Tensor], Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        value = loss(y)
        (gradient,) = torch.autograd.grad(value, y)
    return value.detach(), gradient


def _line_search(loss: Callable[[Tensor], Tensor], y: Tensor, direction: Tensor, value: Tensor, slope: Tensor) -> float:
    # Near the solution the promised descent is smaller than the rounding error of the loss itself.
    rounding = 8 * torch.finfo(y.dtype).eps * value.abs()
    step = 1.0
    while step > 1e-8:
        if loss(y + step * direction) <= value + 1e-4 * step * slope + rounding:
            return step
        step /= 2
    return 0.0
