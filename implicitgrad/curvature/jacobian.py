"""One evaluation of a residual, and every product with its Jacobian from that one graph."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from implicitgrad import closure
from implicitgrad.linalg import LinearOperator


class Linearization:
    """The residual `r(y, *inputs)` at one point together with its graph.

    Products with `A = ∂r/∂y` run backward through the retained graph, without evaluating `r` again: `Aᵀu` costs one
    reverse pass (for a gradient residual: one Hessian-vector product), `A v` of a map that is not symmetric two.

    Args:
        residual: Function of flat `y` `(*batch, n)` and tensors, with values `(*batch, n)`; row `i` of a batch
            depends on row `i` of `y` only.
        y: `(*batch, n)`.
        inputs: What else `r` depends on.
        tracked: Per input, whether `pullback` will be asked for its gradient.
        direct: Leaves that `residual` finds by itself; they stand for the last of the inputs.
        symmetric: Whether `A` is symmetric.
        noise: Relative error of the products beyond rounding. Noisy products come from a function of the graph that
            cannot take several cotangents at once.
    """

    def __init__(
        self,
        residual: Callable[..., Tensor],
        y: Tensor,
        inputs: Sequence[Tensor],
        *,
        tracked: Sequence[bool],
        direct: Sequence[Tensor] = (),
        symmetric: bool,
        noise: float = 0.0,
    ) -> None:
        with torch.enable_grad():
            self.leaf = y.detach().requires_grad_()
            self.y = self.leaf.view_as(self.leaf)  # the first node of this evaluation: a landmark in the graph
            split = len(inputs) - len(direct)
            self.inputs = [
                value.detach().requires_grad_() if wanted else value.detach()
                for value, wanted in zip(inputs[:split], tracked[:split], strict=True)
            ]
            self.value = residual(self.y, *self.inputs)
            self.inputs.extend(direct)
        self._batched_rows = noise == 0.0
        self._noise = noise
        self._symmetric = symmetric
        self._batch_shape = y.shape[:-1]

    @functools.cached_property
    def scan(self) -> closure.GraphScan:
        """What `r` hangs on beyond `y` and the inputs, and what lies on the way."""
        return closure.scan_graph(self.value, self.y, [self.leaf, *self.inputs])

    def operator(self) -> LinearOperator:
        """`A = ∂r/∂y` as a linear operator; it lives as long as this graph."""
        size = self.leaf.shape[-1]
        symmetric = self._symmetric
        return LinearOperator(
            self._transposed if symmetric else self._forward,
            size,
            rmatvec=self._transposed,
            matmat=self._transposed_rows if symmetric else None,
            rmatmat=self._transposed_rows,
            dense=self.dense,
            dense_cost=size,
            noise=self._noise,
            symmetric=symmetric,
            dtype=self.leaf.dtype,
            device=self.leaf.device,
            batch_shape=tuple(self._batch_shape),
        )

    def pullback(self, cotangent: Tensor, wrt: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Reverse product `cotangent · ∂r/∂wrt` through the retained graph; zeros where `r` ignores a tensor."""
        if not self.value.requires_grad:
            return tuple(torch.zeros_like(tensor) for tensor in wrt)
        return torch.autograd.grad(self.value, wrt, cotangent, retain_graph=True, materialize_grads=True)

    def dense(self) -> Tensor:
        """The matrix `A`, `(*batch, n, n)`: all its rows at once from the retained graph."""
        size = self.leaf.shape[-1]
        units = torch.eye(size, dtype=self.leaf.dtype, device=self.leaf.device)
        units = units.reshape(size, *[1] * len(self._batch_shape), size).expand(size, *self._batch_shape, size)
        return self._transposed_rows(units).movedim(0, -2)

    def _transposed(self, cotangent: Tensor) -> Tensor:
        return self.pullback(cotangent, [self.leaf])[0]

    def _transposed_rows(self, cotangents: Tensor) -> Tensor:
        if self._batched_rows and self.value.requires_grad:
            try:
                # vmap over the pullback: 18 times faster than `is_grads_batched` where the graph multiplies vectors by
                # a matrix, since it makes one matrix product of them
                at_once = self._rows_at_once()
                chunk = None if len(cotangents) <= at_once else at_once
                return torch.func.vmap(self._transposed, chunk_size=chunk)(cotangents)
            except RuntimeError:
                self._batched_rows = False  # an operation in the graph cannot be batched: one row at a time
        return torch.stack([self._transposed(row) for row in cotangents])

    def _rows_at_once(self) -> int:
        """So many cotangents that a block of them holds 2²² numbers: bounded memory at no loss of speed."""
        return max(1, 2**22 // max(1, self.leaf.numel()))

    def _forward(self, tangent: Tensor) -> Tensor:
        """`A v` by the transpose of the transpose: the reverse product is linear in its cotangent."""
        with torch.enable_grad():
            dual = torch.zeros_like(self.value).requires_grad_()
            (product,) = torch.autograd.grad(self.value, self.leaf, dual, create_graph=True, materialize_grads=True)
        if not product.requires_grad:
            return torch.zeros_like(tangent)
        return torch.autograd.grad(product, dual, tangent, materialize_grads=True)[0]
