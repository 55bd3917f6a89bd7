"""The Gauss-Newton matrix of a small batch with its exact inverse at any damping."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.curvature.examples import check_tensor
from implicitgrad.curvature.jacobian import values_and_jacobian
from implicitgrad.curvature.layers import Evaluation, Network
from implicitgrad.curvature.point import Point
from implicitgrad.curvature.rows import gauss_newton_cotangents
from implicitgrad.linalg import LinearOperator, check_operator, irregular
from implicitgrad.linalg.kronecker import Spans, read_matrix, write_matrix
from implicitgrad.linalg.matrix import Product, matrix_of
from implicitgrad.tree import Tree

# Factors of this many dampings are kept.
NUM_FACTORS = 2


def exact_gauss_newton(
    model: Callable[[Tree, Any], Tensor],
    loss: Callable[[Tensor, Any], Tensor],
    y: Tree,
    inputs: Any,
    targets: Any,
    *,
    max_outputs: int = 4096,
) -> LinearOperator:
    r"""The matrix of `gauss_newton` for N examples with C outputs each, which knows its inverse at any damping.

    With the root $U = J^\top S$ of $G = J^\top H J = U U^\top$, where $S S^\top = H$ is the Hessian of the loss in the
    outputs, a system of the size of the batch stands for one of the size of y:

    $$(G + \lambda I)^{-1} v = (v - U (U^\top U + \lambda I)^{-1} U^\top v) / \lambda .$$

    The Gram matrix $U^\top U$ has m <= N C rows (N (C - 1) for cross entropy), is made at the first product with an
    inverse and serves every damping; its Cholesky factor serves one, of which the last two are kept. There are two
    roads to it:

    * Layers: for ``implicitgrad.functional(net)`` whose parameters in y belong to `nn.Linear` layers, each used once on
      vectors. Its block in the Gram matrix is $(D D^\top) \circ (X X^\top + 1)$ with inputs X and backpropagated
      columns D of S, so no gradient of a single example is formed. Products with U run over X and D in float64, and
      no autograd graph is kept: the only rounding to float32 is that of the answer.
    * Graph: for all other models, m products with J and m with Jᵀ. In float32 the rounding of these limits the residual
      for a general v to about ``1e-7 · |G| / λ``; a v in the range of J (the gradient of the loss) goes far below.

    Args:
        model: `model(y, inputs) -> outputs (N, ...)` with C numbers per example.
        loss: `loss(outputs, targets) -> scalar`, convex in the outputs and without terms across examples; its
            reduction is part of the matrix.
        y: tree of tensors with n numbers, in the order of `tree.ravel`.
        inputs: handed to the model.
        targets: handed to the loss.
        max_outputs: largest N C allowed. The Gram matrix has (N C)² numbers in float64, its factor costs (N C)³ / 3.

    Returns:
        `(n, n)`, positive semidefinite. Solve ``A.damped(lam)`` with `KnownInverse`.

    Raises:
        TypeError: y or the outputs are no floating point tensors of one dtype.
        ValueError: N C above `max_outputs`; losses of examples that depend on each other, or not convex in the outputs;
            in a product with the inverse: no damping, or a negative one.
        torch.linalg.LinAlgError: in a product with the inverse, a damping below the rounding of the Gram matrix.
        FloatingPointError: NaN or infinity in the products.

    Source: Duncan (1944) and Guttman (1946) for the identity; Ren and Goldfarb (2019), "Efficient subsampled
    Gauss-Newton and natural gradient methods for training neural networks", for its use and the Gram matrix of a layer.

    Example:
        >>> from implicitgrad.linalg import KnownInverse
        >>> square, X = torch.nn.functional.mse_loss, torch.tensor([[1.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
        >>> A = exact_gauss_newton(lambda y, X: X @ y, square, torch.zeros(3), X, torch.ones(2)).damped(0.1)
        >>> torch.allclose(KnownInverse().solve(A, A @ torch.ones(3)).value, torch.ones(3))
        True
    """
    point = Point("exact_gauss_newton", y, model, inputs)
    outputs, J = values_and_jacobian(point, model, inputs, check=False)
    check_tensor(point.name, outputs)
    if outputs.numel() > max_outputs:
        raise ValueError(
            f"exact_gauss_newton factorises a matrix of the size of the batch; got {outputs.numel()} outputs where"
            f" max_outputs={max_outputs} are allowed. Use gauss_newton with CG, fewer examples, or raise max_outputs."
        )
    cotangents = gauss_newton_cotangents(point.name, loss, outputs, targets)
    through_graph = J.T @ _output_root(cotangents)
    root = _layer_root(model, y, inputs, cotangents, through_graph) or _graph_root(through_graph)
    return _inverting(root, J.dtype)


class Root(NamedTuple):
    """U with ``G = U Uᵀ``, and how to make its Gram matrix ``UᵀU`` in float64."""

    U: LinearOperator  # (n, m)
    gram: Callable[[], Tensor]


def _inverting(root: Root, dtype: torch.dtype) -> LinearOperator:
    """``U Uᵀ`` as an operator on vectors of `dtype`, with its inverse by the Gram matrix of U."""
    U, gram = root.U, cache(root.gram)

    @lru_cache(maxsize=NUM_FACTORS)
    def factor(damping: float) -> Tensor:
        K = gram().clone()
        K.diagonal().add_(damping)
        L, info = torch.linalg.cholesky_ex(K)
        if info.item():
            raise LinAlgError(
                f"exact_gauss_newton: the damping {damping:.1e} is lost in the rounding of a Gram matrix with entries"
                f" up to {gram().abs().max().item():.1e}; use a larger one, or float64."
            )
        return L

    def product(v: Tensor) -> Tensor:
        return (U @ (U.T @ v.to(U.dtype))).to(dtype)

    def shifted_inverse(damping: float) -> Product:
        def inverse(v: Tensor) -> Tensor:
            rows = v.reshape(-1, v.shape[-1]).to(U.dtype)
            L = factor(damping)
            # two triangular solves are ten times faster than cholesky_solve, which copies the factor
            half = torch.linalg.solve_triangular(L, (U.T @ rows).mT.to(L.dtype), upper=False)
            z = torch.linalg.solve_triangular(L.mT, half, upper=True).mT.to(U.dtype)
            return ((rows - U @ z.contiguous()) / damping).to(dtype).view_as(v)

        return inverse

    return LinearOperator(
        product,
        U.num_rows,
        matmat=product,
        symmetric=True,
        eigenvalue_floor=0.0,
        shifted_inverse=shifted_inverse,
        dtype=dtype,
        device=U.device,
    )


def _output_root(cotangents: Tensor) -> LinearOperator:
    """S, block diagonal over the examples, with the cotangents ``(N, r, *outputs)`` for columns."""
    factors = cotangents.flatten(2) if cotangents.ndim > 2 else cotangents.unsqueeze(2)
    N, r, width = factors.shape
    forward = lambda w: (w.unflatten(-1, (N, 1, r)) @ factors).flatten(-3)
    backward = lambda u: (u.unflatten(-1, (N, 1, width)) @ factors.mT).flatten(-3)
    return LinearOperator(
        forward,
        N * r,
        num_rows=N * width,
        rmatvec=backward,
        matmat=forward,
        rmatmat=backward,
        dtype=factors.dtype,
        device=factors.device,
    )


def _graph_root(U: LinearOperator) -> Root:
    """U by reverse passes."""
    check_operator(U)

    def gram() -> Tensor:
        K = matrix_of(lambda block: U.T @ (U @ block), torch.empty(U.size, dtype=U.dtype, device=U.device)).double()
        return (K + K.mT) / 2

    return Root(U, gram)


def _layer_root(model: Any, y: Tree, inputs: Any, cotangents: Tensor, through_graph: LinearOperator) -> Root | None:
    """U by the layers of a network; None where these do not tell the whole story."""
    if isinstance(model, nn.Module) or not isinstance(model, Network):
        return None
    seen = Evaluation(model, y, inputs)
    single = all(
        len(layer.uses) == 1 and isinstance(module, nn.Linear) and value.ndim == 2
        for layer in seen.layers
        for module, value, _ in layer.uses
    )
    if seen.uncovered or not single:
        return None
    columns = [[parts[0] for parts in seen.backward(column)] for column in cotangents.unbind(1)]
    root = _root_of_layers(
        [layer.spans for layer in seen.layers],
        [layer.activations()[0].squeeze(1).double() for layer in seen.layers],
        [torch.cat(parts, 1).double() for parts in zip(*columns, strict=True)],
        through_graph.num_rows,
    )
    w = irregular(cotangents.new_empty(through_graph.size))
    expected = through_graph @ w
    error = torch.linalg.vector_norm(root.U @ w.double() - expected)
    # far apart where the layers couple the examples, as batch normalisation does in training mode
    return root if error <= torch.finfo(w.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected) else None


def _root_of_layers(spans: list[Spans], inputs: list[Tensor], gradients: list[Tensor], size: int) -> Root:
    """U for layers with inputs ``(N, q)``, and gradients ``(N, r, p)`` for the r columns of an example.

    In column (i, k) a layer has the matrix ``gradients[i, k] inputs[i]ᵀ``.
    """
    N, r, _ = gradients[0].shape
    layers = list(zip(spans, inputs, gradients, strict=True))

    def forward(w: Tensor) -> Tensor:
        out = w.new_zeros(*w.shape[:-1], size)
        for place, a, g in layers:
            s = torch.einsum("...nr,nrp->...np", w.unflatten(-1, (N, r)), g)
            write_matrix(s.mT @ a, place, out)
        return out

    def backward(v: Tensor) -> Tensor:
        out = v.new_zeros(*v.shape[:-1], N, r)
        for place, a, g in layers:
            out += torch.einsum("nrp,...np->...nr", g, a @ read_matrix(v, place, g.shape[-1]).mT)
        return out.flatten(-2)

    def gram() -> Tensor:
        K = gradients[0].new_zeros(N, r, N, r)
        for _, a, g in layers:
            rows = g.flatten(0, 1)
            K += (rows @ rows.mT).view(N, r, N, r) * (a @ a.mT).view(N, 1, N, 1)
        return K.view(N * r, N * r)

    U = LinearOperator(
        forward,
        N * r,
        num_rows=size,
        rmatvec=backward,
        matmat=forward,
        rmatmat=backward,
        dtype=gradients[0].dtype,
        device=gradients[0].device,
    )
    return Root(U, gram)
