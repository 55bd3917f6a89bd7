"""Curvature matrices of a model as a product `rowsᵀ rows`, with the rows written down.

For methods that need the factor itself: M-FAC and other Woodbury inverses, exact Gauss-Newton. Rows are gradients of
single examples, made in blocks by `torch.func.vmap`; a model with operations that have no batching rule runs one
example after the other. Either way the model sees each example alone, and dropout is one mask for all of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitgrad import closure, tree
from implicitgrad.curvature.examples import by_example, check_uncoupled, num_examples
from implicitgrad.curvature.fisher import Likelihood, empirical_cotangents, sampled_cotangents
from implicitgrad.curvature.gauss_newton import output_hessian
from implicitgrad.curvature.jacobian import linearize
from implicitgrad.curvature.point import Point
from implicitgrad.linalg import irregular
from implicitgrad.linalg.matrix import factor_dtype
from implicitgrad.tree import Tree


def empirical_rows(
    model: Callable[[Tree, Any], Tensor],
    loss: Callable[[Tensor, Any], Tensor],
    y: Tree,
    inputs: Any,
    targets: Any,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Gradients `gᵢ / √N` of the losses of single examples as rows: `rowsᵀ rows` is the `empirical_fisher`.

    It is the same matrix for a model without dropout. In training mode the rows of all examples see one mask, while
    `empirical_fisher` runs the model on the batch, with a mask for each.

    Args:
        model: `model(y, inputs) -> outputs (N, ...)`, each output from its own example.
        loss: `loss(outputs, targets) -> scalar`, the mean or the sum of its values on single examples.
        y: Tree of tensors with d numbers, in the order of `tree.ravel`.
        inputs: Tensor, or tree of tensors, with first dimension N.
        targets: The same.
        chunk_size: Examples at a time; by default as many as have 2²² numbers in their rows.

    Returns:
        `(N, d)`. Costs about two gradients of the whole loss on the CPU, N d numbers and those of a chunk.

    Raises:
        TypeError: y or the outputs are no floating point tensors, inputs or targets no tensors.
        ValueError: first dimensions differ; outputs depend on other examples too; a loss as in `empirical_fisher`.

    Example:
        >>> half = lambda outputs, targets: (outputs - targets).square().sum() / 2
        >>> X, t = torch.ones(4, 1), torch.tensor([1.0, 1.0, 1.0, 3.0])
        >>> empirical_rows(lambda y, X: X @ y, half, torch.ones(1), X, t).T
        tensor([[ 0.,  0.,  0., -1.]])
    """
    name = "empirical_rows"
    num_examples(name, inputs, targets)
    cotangents = lambda outputs: empirical_cotangents(name, loss, outputs, targets)
    return _rows(Point(name, y, model, inputs, loss), model, inputs, cotangents, chunk_size)


def sampled_rows(
    model: Callable[[Tree, Any], Tensor],
    likelihood: Likelihood,
    y: Tree,
    inputs: Any,
    *,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Gradients `gᵢₛ / √(N S)` for labels drawn from the model: `rowsᵀ rows` is the `sampled_fisher`.

    With the same generator state and a model without dropout, it is the same matrix; see `empirical_rows`.

    Args:
        model: `model(y, inputs) -> outputs (N, ...)`, each output from its own example.
        likelihood: Distribution of the labels given the outputs, see `sampled_fisher`.
        y: Tree of tensors with d numbers, in the order of `tree.ravel`.
        inputs: Tensor, or tree of tensors, with first dimension N.
        num_samples: S.
        generator: Draws the labels; by default a fresh one with seed 0.
        chunk_size: Examples at a time; by default as many as have 2²² numbers in their rows.

    Returns:
        `(N S, d)`, the S rows of an example beside each other.

    Raises:
        TypeError: y or the outputs are no floating point tensors, inputs no tensors.
        ValueError: outputs depend on other examples too; an unknown likelihood, outputs of a shape that it does not
            have, `num_samples` below one.
    """
    name = "sampled_rows"
    cotangents = lambda outputs: sampled_cotangents(name, likelihood, outputs, num_samples, generator)
    return _rows(Point(name, y, model, inputs), model, inputs, cotangents, chunk_size)


def gauss_newton_rows(
    model: Callable[[Tree, Any], Tensor],
    loss: Callable[[Tensor, Any], Tensor],
    y: Tree,
    inputs: Any,
    targets: Any,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Rows `Sᵢᵀ Jᵢ` with `Sᵢ Sᵢᵀ` the Hessian of the loss in the outputs of example i: `rowsᵀ rows = gauss_newton`.

    The square root S is made from the eigenvalues of these C by C Hessians, in float64, so it is exact for every
    convex loss; directions in which the loss of no example is curved are left out. Cross entropy has rank C - 1,
    squared error and binary cross entropy rank C. With dropout in training mode the matrix is another one: the rows of
    all examples see one mask, while `gauss_newton` runs the model on the batch, with a mask for each.

    Outputs in half precision, and targets of their dtype, are handed to the loss in float32.

    Args:
        model: `model(y, inputs) -> outputs (N, ...)` with C numbers per example, each output from its own example.
        loss: `loss(outputs, targets) -> scalar`, convex in the outputs and without terms across examples; its
            reduction is part of the matrix.
        y: Tree of tensors with d numbers, in the order of `tree.ravel`.
        inputs: Tensor, or tree of tensors, with first dimension N.
        targets: Handed to the loss with all outputs.
        chunk_size: Examples at a time; by default as many as have 2²² numbers in their rows.

    Returns:
        `(N r, d)` with `r <= C`, the r rows of an example beside each other. Costs r + 1 gradients of the whole loss.

    Raises:
        TypeError: y or the outputs are no floating point tensors, inputs no tensors.
        ValueError: outputs or losses of an example depend on other examples; the loss is not convex in the outputs, or
            not curved at all.

    Example:
        >>> square = lambda outputs, targets: (outputs - targets).square().mean()
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> rows = gauss_newton_rows(lambda y, X: X @ y, square, torch.zeros(2), X, torch.ones(2))
        >>> torch.equal(rows.T @ rows, X.T @ X)
        True
    """
    name = "gauss_newton_rows"
    cotangents = lambda outputs: gauss_newton_cotangents(name, loss, outputs, targets)
    return _rows(Point(name, y, model, inputs, loss), model, inputs, cotangents, chunk_size)


def gauss_newton_cotangents(name: str, loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Any) -> Tensor:
    """Columns of square roots of the Hessians of the loss in the outputs of one example, `(N, r, *outputs)`.

    In half precision eigenvalues would drown in rounding as soon as there are some classes: that is done in float32.

    Raises:
        ValueError: no examples; these are not all second derivatives of the loss, have negative eigenvalues, or vanish.
    """
    num_examples(name, outputs)
    dtype = outputs.dtype
    outputs, targets = tree.map(lambda leaf: _widened(leaf, dtype), (outputs, targets))
    H = output_hessian(name, loss, outputs, targets, convex=False, check=True)
    count, width = len(outputs), outputs[0].numel()
    # one product per output gives a column of every block, as long as there are blocks
    units = torch.eye(width, dtype=outputs.dtype, device=outputs.device).repeat(1, count)
    blocks = (H @ units).unflatten(1, (count, width)).movedim(1, 0)
    probe = irregular(outputs.flatten())
    by_blocks = (probe.view(count, 1, width) @ blocks).flatten()
    # rounding leaves far less than this, terms across examples far more
    if not torch.linalg.vector_norm(H @ probe - by_blocks) <= 1e-3 * torch.linalg.vector_norm(by_blocks):
        raise ValueError(f"{name}: the loss has second derivatives across examples; use a sum or mean of single losses")
    values, vectors = torch.linalg.eigh(blocks.double())
    eps, largest = torch.finfo(outputs.dtype).eps, values.abs().max()
    # where a softmax is saturated its small curvature is the difference of two large numbers, hence the wide margin
    if not values.min() >= -(eps**0.4) * largest:
        raise ValueError(
            f"{name}: the loss is not convex in the outputs, its Hessian has the eigenvalue {values.min().item():.1e};"
            " a square root needs one without negative eigenvalues"
        )
    kept = (values > width * eps * largest).any(0)
    if not kept.any():
        raise ValueError(f"{name}: the loss is not curved in the outputs anywhere; its Gauss-Newton matrix is zero")
    roots = vectors[..., kept] * values[:, None, kept].clamp(min=0).sqrt()
    return roots.mT.to(dtype).reshape(count, -1, *outputs.shape[1:])


def _widened(leaf: Any, dtype: torch.dtype) -> Any:
    """A tensor of this dtype in float32 or better; everything else as it is."""
    return leaf.to(factor_dtype(dtype)) if isinstance(leaf, Tensor) and leaf.dtype == dtype else leaf


def _rows(
    point: Point,
    model: Callable[[Tree, Any], Tensor],
    inputs: Any,
    cotangents_of: Callable[[Tensor], Tensor],
    chunk_size: int | None,
) -> Tensor:
    """`cᵢₖ · ∂outputsᵢ/∂y` as rows `(N r, d)`, for cotangents `(N, r, *outputs)` made of all outputs."""
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(f"{point.name}: chunk_size must be an integer of at least 1 or None, got {chunk_size!r}")
    count = num_examples(point.name, inputs)
    constants = tree.map(closure.without_derivative, inputs)
    check_uncoupled(point, model, constants)

    def one(flat: Tensor, single: Any) -> Tensor:
        return model(point.unravel(flat), tree.map(lambda leaf: leaf.unsqueeze(0), single)).squeeze(0)

    def pulled(single: Any, cotangents: Tensor) -> Tensor:
        pullback = torch.func.vjp(lambda flat: one(flat, single), point.flat)[1]
        return torch.func.vmap(pullback)(cotangents)[0]

    def pulled_eagerly(single: Any, cotangents: Tensor) -> Tensor:
        graph = linearize(point, lambda flat: one(flat, single).flatten(), symmetric=False).operator(point.isolation)
        return graph.T @ cotangents.flatten(1)

    size = len(point.flat)
    forward = lambda single: one(point.flat, single)
    with torch.no_grad():
        at_once = chunk_size or max(1, 2**22 // size)
        outputs = torch.cat(list(by_example(point, forward, forward, (constants,), at_once)))
    with point.isolation():
        cotangents = cotangents_of(outputs)
    rows = point.flat.new_empty(count, cotangents.shape[1], size)
    at_once = chunk_size or max(1, 2**22 // rows[0].numel())
    done = 0
    for block in by_example(point, pulled, pulled_eagerly, (constants, cotangents), at_once):
        rows[done : done + len(block)] = block
        done += len(block)
    return rows.flatten(0, 1)
