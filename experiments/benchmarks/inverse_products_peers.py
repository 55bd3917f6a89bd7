"""The systems of `inverse_products` as curvlinops and pyDVL solve them, by conjugate gradients.

Their stopping rules are worked around: curvlinops' default tolerance of 1 returns after 11 steps, and curvatures below
1e-10 would count as zero; pyDVL compares the residual norm with `rtol² |b_j|` for an entry `b_j`, or with `atol²`.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# relative tolerance -> the solution `(n,)`, and how many products it took
Solve = Callable[[float], tuple[Tensor, int]]
Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]

curvlinops: Any
pydvl: Any
try:
    import curvlinops  # pyright: ignore[reportMissingImports]
    from curvlinops.examples import IdentityLinearOperator  # pyright: ignore[reportMissingImports]
except ImportError:
    curvlinops = None
try:
    import pydvl  # pyright: ignore[reportMissingImports]
    from pydvl.influence.torch.operator import CgOperator, HessianOperator  # pyright: ignore[reportMissingImports]
except ImportError:
    pydvl = None


def curvlinops_cg(
    curvature: Literal["hessian", "gauss_newton"],
    net: nn.Module,
    loss: Loss,
    data: Batch,
    damping: float,
    b: Tensor,
) -> Solve:
    """curvlinops' operator, damped, and the inverse by its CG."""

    def solve(rtol: float) -> tuple[Tensor, int]:
        make = {"hessian": curvlinops.HessianLinearOperator, "gauss_newton": curvlinops.GGNLinearOperator}[curvature]
        params = list(net.parameters())
        A = make(net, loss, params, [data], num_data=len(data[0]))
        count = _count_calls(A, "_matmat")
        identity = IdentityLinearOperator([p.shape for p in params], b.device, b.dtype)
        inverse = curvlinops.CGInverseLinearOperator(
            A + damping * identity, tolerance=rtol, eps=1e-30, max_iter=2000, max_tridiag_iter=0
        )
        return inverse @ b, len(count)

    return solve


def pydvl_cg(net: nn.Module, loss: Loss, data: Iterable[Batch], damping: float, b: Tensor) -> Solve:
    """pyDVL's Hessian of the batches in `data`, and the inverse by its CG."""

    def solve(rtol: float) -> tuple[Tensor, int]:
        atol = (rtol * torch.linalg.vector_norm(b).item()) ** 0.5
        A = HessianOperator(net, loss, data)
        count = _count_calls(A, "apply")
        inverse = CgOperator(A, regularization=damping, rtol=0.0, atol=atol, maxiter=2000)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # maxiter reached
            return inverse.apply(b), len(count)

    return solve


def loader(data: Batch) -> DataLoader:
    """All examples as one batch, in the way that pyDVL's documentation hands over data."""
    return DataLoader(TensorDataset(*data), batch_size=len(data[0]))


def _count_calls(target: Any, name: str) -> list[None]:
    """A list that grows by one entry with every call of a method of `target`."""
    method, calls = getattr(target, name), []

    def counted(*args: Any) -> Any:
        calls.append(None)
        return method(*args)

    setattr(target, name, counted)
    return calls
