"""One evaluation of a function, and every product with its Jacobian from that one graph."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure, tree
from implicitgrad.curvature.point import Point
from implicitgrad.curvature.pullback import Pullback, retained_operator
from implicitgrad.linalg import LinearOperator, check_operator
from implicitgrad.tree import Tree


class Linearization:
    """The values `r(y, *inputs)` of a function at one point together with their graph.

    Products with `A = ∂r/∂y` run backward through the retained graph, without evaluating `r` again: `Aᵀu` costs one
    reverse pass (for a gradient: one Hessian-vector product), and so does `A v` of a map that is not symmetric, after
    a first one that costs two and keeps a second graph.

    Args:
        residual: Function of flat `y` `(*batch, n)` and tensors, with values `(*batch, m)`; row `i` of a batch
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
        self._backward = Pullback(self.value, self.leaf, batched=noise == 0.0)
        self._noise = noise
        self._symmetric = symmetric

    @functools.cached_property
    def scan(self) -> closure.GraphScan:
        """What `r` hangs on beyond `y` and the inputs, and what lies on the way."""
        return closure.scan_graph(self.value, self.y, [self.leaf, *self.inputs])

    def operator(
        self,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        eigenvalue_floor: float | None = None,
    ) -> LinearOperator:
        """`A = ∂r/∂y` as a linear operator; it lives as long as this graph.

        Args:
            context: In which products run.
            eigenvalue_floor: A proven lower bound on the eigenvalues of a symmetric `A`.
        """
        backward = self._backward
        return retained_operator(
            (lambda: backward) if self._symmetric else (lambda: backward.transpose),
            backward,
            context=context,
            noise=self._noise,
            symmetric=self._symmetric,
            eigenvalue_floor=eigenvalue_floor,
        )

    def input_operator(self, wrt: Sequence[Tensor]) -> LinearOperator:
        """`B = ∂r/∂wrt` for one problem: n rows, a column for every number in the given inputs."""
        with torch.enable_grad():
            dual = torch.zeros_like(self.value).requires_grad_()
            parts: Sequence[Tensor] = [torch.zeros_like(tensor) for tensor in wrt]
            if self.value.requires_grad:
                parts = torch.autograd.grad(self.value, wrt, dual, create_graph=True, materialize_grads=True)
            forward = Pullback(_joined(parts, dual.dtype), dual)
        return LinearOperator(
            forward,
            forward.value.numel(),
            num_rows=self.leaf.shape[-1],
            rmatvec=lambda u: _joined(self.pullback(u, wrt), dual.dtype),
            dtype=dual.dtype,
            device=dual.device,
        )

    def dense(self) -> Tensor:
        """The matrix `A`, `(*batch, m, n)`: all its rows at once from the retained graph."""
        return self._backward.matrix()

    def pullback(self, cotangent: Tensor, wrt: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Reverse product `cotangent · ∂r/∂wrt` through the retained graph; zeros where `r` ignores a tensor."""
        if not self.value.requires_grad:
            return tuple(torch.zeros_like(tensor) for tensor in wrt)
        return torch.autograd.grad(self.value, wrt, cotangent, retain_graph=True, materialize_grads=True)


def linearize(
    point: Point, residual: Callable[[Tensor], Tensor], *, symmetric: bool, noise: float = 0.0
) -> Linearization:
    """`residual` at `point` with its graph, evaluated in isolation.

    Raises:
        TypeError: values of another dtype or device than y.
    """
    with point.evaluation():
        made = Linearization(residual, point.flat, [], tracked=[], symmetric=symmetric, noise=noise)
    value = made.value
    if (value.dtype, value.device) != (point.flat.dtype, point.flat.device):
        raise TypeError(
            f"{point.name}: y is {point.flat.dtype} on {point.flat.device}, what is computed from it {value.dtype} on "
            f"{value.device}; convert data and y to one dtype and device (under autocast: outside of it)"
        )
    return made


def jacobian(fn: Callable[..., Tree], y: Tree, *data: Any, check: bool = True) -> LinearOperator:
    """The Jacobian `J = ∂fn/∂y` at y as an operator of m rows and n columns.

    Both products come from one retained graph: `J.T @ u` is a reverse pass, `J @ v` a reverse pass through the graph of
    that one, which works wherever double backward does. `J.T @ J` is known to be positive semidefinite.

    Args:
        fn: `fn(y, *data)` returns a tensor, or a tree of tensors, with m numbers; `tree.ravel` gives their order.
        y: Tree of tensors with n numbers, in the order of `tree.ravel`.
        data: Passed on, as constants.
        check: Test the products as `check_operator` does, for three of them.

    Returns:
        `J`, `(m, n)`. Each product costs 1 to 2.5 gradients; the graph lives as long as the operator, and is twice as
        large from the first `J @ v` on.

    Raises:
        TypeError: y or the values are no floating point tensors of one dtype.
        ValueError: `fn` does not depend on y, or the products contradict each other.
        FloatingPointError: NaN or infinity in the products.

    Source: the double vector-Jacobian product is from Townsend (2017), "A new trick for calculating Jacobian vector
    products"; here its first pass is kept.

    Example:
        >>> J = jacobian(lambda y: torch.stack([y.sum(), (y * y).sum()]), torch.tensor([1.0, 2.0, 3.0]))
        >>> J @ torch.ones(3), J.T @ torch.tensor([0.0, 1.0])
        (tensor([ 3., 12.]), tensor([2., 4., 6.]))
    """
    return values_and_jacobian(Point("jacobian", y, fn, data), fn, *data, check=check)[1]


def values_and_jacobian(point: Point, fn: Callable[..., Tree], *data: Any, check: bool) -> tuple[Tree, LinearOperator]:
    """What `fn(y, *data)` returns, detached, and its Jacobian."""
    constants = tree.map(closure.without_derivative, data)
    values: list[Tree] = []

    def flat_fn(flat: Tensor) -> Tensor:
        values[:] = [fn(point.unravel(flat), *constants)]
        _check_numbers(point, values[0])
        return tree.ravel(values[0])[0]

    linearization = linearize(point, flat_fn, symmetric=False)
    if not linearization.value.requires_grad:
        raise ValueError(f"{point.name}: the function does not depend on y; check the order of arguments: (y, *data)")
    operator = linearization.operator(point.isolation)
    if check:
        check_operator(operator)
    return tree.detach(values[0]), operator


def _check_numbers(point: Point, values: Tree) -> None:
    shapes = [tuple(value.shape) for value in tree.leaves(values) if isinstance(value, Tensor)]
    if shapes and all(0 in shape for shape in shapes):
        raise ValueError(f"{point.name}: the function returned tensors of shapes {shapes}; were there no examples?")
    tree.check_vector_space(tree.leaves(values), f"{point.name}: what the function returns")


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.reshape(-1).to(dtype) for part in parts])
