"""Products with a Jacobian backward through a graph that is kept."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from implicitgrad import internals
from implicitgrad.linalg import LinearOperator


class Pullback:
    """`u ↦ Aᵀu` with `A = ∂value/∂leaf`, through the graph between the two, which stays.

    `torch.autograd.grad` and never `.backward(create_graph=True)`, which ties parameters and their gradients into a
    cycle that no reference count resolves.

    Args:
        value: `(*batch, m)`.
        leaf: `(*batch, n)`.
        batched: Whether the graph may be asked for several cotangents at once.
    """

    def __init__(self, value: Tensor, leaf: Tensor, batched: bool = True) -> None:
        self.value, self.leaf = value, leaf
        self._batched = batched

    def __call__(self, cotangent: Tensor) -> Tensor:
        """`Aᵀu`, `(*batch, n)`; zeros where the value ignores the leaf."""
        if not self.value.requires_grad:
            return torch.zeros_like(self.leaf)
        return torch.autograd.grad(self.value, self.leaf, cotangent, retain_graph=True, materialize_grads=True)[0]

    def rows(self, cotangents: Tensor) -> Tensor:
        """The same for a block `(k, *batch, m)` of cotangents."""
        if self._batched and self.value.requires_grad:
            try:
                # vmap over the pullback: 18 times faster than `is_grads_batched` where the graph multiplies vectors by
                # a matrix, since it makes one matrix product of them
                at_once = self._rows_at_once
                chunk = None if len(cotangents) <= at_once else at_once
                return torch.func.vmap(self.__call__, chunk_size=chunk)(cotangents)
            except RuntimeError:
                self._batched = False  # an operation in the graph cannot be batched: one row at a time
        return torch.stack([self(row) for row in cotangents])

    def matrix(self) -> Tensor:
        """`A`, `(*batch, m, n)`: all its rows from m reverse passes."""
        *batch, size = self.value.shape
        units = torch.eye(size, dtype=self.value.dtype, device=self.value.device)
        units = units.reshape(size, *[1] * len(batch), size).expand(size, *batch, size)
        return self.rows(units).movedim(0, -2)

    @functools.cached_property
    def transpose(self) -> "Pullback":
        """`v ↦ A v`: the reverse product is linear in its cotangent, so it has a reverse product of its own.

        Keeps a second graph, that of one reverse pass.
        """
        with torch.enable_grad():
            dual = torch.zeros_like(self.value).requires_grad_()
            if not self.value.requires_grad:
                return Pullback(torch.zeros_like(self.leaf), dual)
            (product,) = torch.autograd.grad(self.value, self.leaf, dual, create_graph=True, materialize_grads=True)
        return Pullback(product, dual, self._batched)

    @functools.cached_property
    def _rows_at_once(self) -> int:
        """So many cotangents that no tensor of a block has more than 2²² numbers: bounded memory, no loss of speed."""
        return max(1, 2**22 // max(self.leaf.numel(), _width(self.value)))


def _width(value: Tensor) -> int:
    """Numbers in the largest gradient on its way back from `value`."""
    widest = value.numel()
    stack: list[Any] = [value.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        widest = max([widest, *internals.gradient_sizes(node)])
        new = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= new
        stack.extend(new)
    return widest


def retained_operator(
    forward: Callable[[], Pullback],
    backward: Pullback,
    *,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    noise: float = 0.0,
    symmetric: bool = False,
    eigenvalue_floor: float | None = None,
) -> LinearOperator:
    """The operator A of two pullbacks; it holds their graphs, and dropping it frees them.

    Args:
        forward: Returns `v ↦ A v` when it is first needed; `backward` itself where A is symmetric.
        backward: `u ↦ Aᵀu`.
        context: In which products run.
        noise: Relative error of the products beyond rounding.
        symmetric: Declares A = Aᵀ.
        eigenvalue_floor: A proven lower bound on the eigenvalues of a symmetric A.
    """
    *batch, num_rows = backward.value.shape
    size = backward.leaf.shape[-1]

    def dense() -> Tensor:
        with context():
            return backward.matrix() if num_rows <= size else forward().matrix().mT

    def within(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(v: Tensor) -> Tensor:
            with context():
                return product(v)

        return run

    return LinearOperator(
        within(lambda v: forward()(v)),
        size,
        num_rows=num_rows,
        rmatvec=within(backward),
        matmat=within(lambda rows: forward().rows(rows)),
        rmatmat=within(backward.rows),
        dense=dense,
        dense_cost=min(num_rows, size),
        noise=noise,
        symmetric=symmetric,
        eigenvalue_floor=eigenvalue_floor,
        dtype=backward.leaf.dtype,
        device=backward.leaf.device,
        batch_shape=tuple(batch),
    )
