"""Hypergradients as other PyTorch libraries compute them: TorchOpt itself, and conjugate gradients as in hypertorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

torchopt: Any
try:
    import torchopt  # pyright: ignore[reportMissingImports]
except ImportError:
    torchopt = None

Loss = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> scalar


def torchopt_solution(loss: Loss, solve: Callable | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """`(y, x) -> y`, with TorchOpt's implicit derivative in x attached; the idiom of its documentation.

    Args:
        loss: inner loss.
        solve: one of `torchopt.linear_solve`; its default, conjugate gradients on the normal equation to 1e-5, if None.
    """
    optimality = torch.func.grad(lambda y, x: loss(x, y))
    return torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)(lambda y, x: y)


def hypertorch_cg(upper: Loss, loss: Loss, x: Tensor, y: Tensor, lr: float = 1e-3, rtol: float = 1e-10) -> Tensor:
    """The hypergradient with the structure of hypertorch's `CG`, whose contract is a fixed point map.

    With `map(x, y) = y - lr ∇_y loss` it solves `(I - ∂map/∂yᵀ) u = ∇_y upper` by products through one retained graph
    and adds `uᵀ ∂map/∂x` to `∇ₓ upper`. Written afresh, with one departure: hypertorch's solver returns the iterate
    before the last, this one the last.

    Source: Grazzi, Franceschi, Pontil, Salzo (2020), "On the iteration complexity of hypergradient computation".
    """
    y = y.detach().requires_grad_()
    direct, slope = torch.autograd.grad(upper(x, y), [x, y], materialize_grads=True)
    (gradient,) = torch.autograd.grad(loss(x, y), y, create_graph=True)
    mapped = y - lr * gradient

    def product(v: Tensor) -> Tensor:
        return v - torch.autograd.grad(mapped, y, v, retain_graph=True)[0]

    u = _conjugate_gradients(product, slope, rtol)
    return direct + torch.autograd.grad(mapped, x, u)[0]


def _conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, rtol: float) -> Tensor:
    """Hestenes and Stiefel (1952), stopped at `rtol` or after 10 n iterations."""
    u, r, p = torch.zeros_like(b), b.clone(), b.clone()
    square = r.dot(r)
    target = rtol**2 * square
    for _ in range(10 * b.numel()):
        if square <= target:
            break
        q = product(p)
        step = square / p.dot(q)
        u, r = u + step * p, r - step * q
        square, before = r.dot(r), square
        p = r + (square / before) * p
    return u
