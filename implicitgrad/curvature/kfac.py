"""Kronecker-factored curvature of networks of affine layers: K-FAC and EKFAC."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from implicitgrad.curvature.fisher import Likelihood, empirical_cotangents, sampled_cotangents
from implicitgrad.curvature.layers import Evaluation, Network
from implicitgrad.curvature.minibatch import check_repeatable, shares_of, weighted_batches
from implicitgrad.curvature.point import Point
from implicitgrad.curvature.rows import gauss_newton_cotangents
from implicitgrad.linalg import LinearOperator
from implicitgrad.linalg.kronecker import KroneckerBlock, Spans, kronecker
from implicitgrad.linalg.matrix import factor_dtype

Kind = Literal["gauss_newton", "empirical", "sampled"]
Sharing = Literal["expand", "reduce"]
Sums: TypeAlias = defaultdict[Spans, Any]  # matrices by layer, zero to start with
Batch: TypeAlias = tuple[Evaluation, Tensor, float]  # evaluated, with cotangents (columns, N, *outputs), and weight

# Gradients of single examples in a matrix are formed so many numbers at a time.
NUMBERS_AT_ONCE = 2**22


def kfac(
    model: Network,
    loss: Callable[[Tensor, Any], Tensor] | Likelihood,
    y: Mapping[str, Tensor],
    inputs: Any,
    targets: Any = None,
    *,
    kind: Kind = "gauss_newton",
    corrected: bool = False,
    sharing: Sharing = "expand",
    zero_others: bool = False,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> LinearOperator:
    r"""The Kronecker-factored approximation of a curvature matrix, which knows its inverse at any damping.

    For every matrix ``[W b]`` of an affine layer with inputs a (with a 1 behind them for b) and gradients g in its
    outputs, one block $\left(\sum g g^\top\right) \otimes \left(\frac1N \sum a a^\top\right)$ stands for
    $\sum (g \otimes a) (g \otimes a)^\top$, sums over examples and over the columns of the root of the curvature in the
    model's outputs. Exact for one example, and for squared error behind linear layers; in general it takes inputs and
    gradients for independent, and different layers too.

    Layers are `nn.Linear` and `nn.Conv2d` without groups, used once or several times, also with tied weights.
    Subclasses of these are other layers. A layer at several positions (of a sequence, of an image, of several uses)
    has the gradient ``Σ g aᵀ`` over positions, and `sharing` says what becomes of the double sum:

    * "expand": each position is an example of its own. Exact for linear layers whose positions enter different terms
      of the loss: translation, segmentation.
    * "reduce": the mean of a and the sum of g over positions are taken first. Exact for linear layers whose outputs are
      averaged over positions: classification after pooling. Costs less.

    ``CG(preconditioner=A.damped(lam).known_inverse)`` pays where the factors come close to the matrix: a fifth of the
    iterations or fewer on softmax regression with features of very different scale. Elsewhere it can cost more: 1.5 to
    2.1 times as many on a 784-256-10 perceptron with 512 images, with ten times the damping 1.0 to 1.4 times
    (experiments/benchmarks/kfac_preconditioner.py). Compare.

    Args:
        model: ``implicitgrad.functional(net)``. Layers that couple examples (batch normalisation) belong in evaluation
            mode.
        loss: ``loss(outputs, targets) -> scalar``, see `gauss_newton_rows` and `empirical_fisher` for what is allowed;
            for "sampled" the name of a likelihood, see `sampled_fisher`.
        y: parameters by name, n numbers in the order of `tree.ravel`; others keep the values of the module.
        inputs: handed to the model.
        targets: handed to the loss; not read for "sampled".
        kind: which matrix is approximated, with its scale: `gauss_newton`, `empirical_fisher` or `sampled_fisher`.
        corrected: EKFAC, the best eigenvalues in the basis of the factors: mean squares of the gradients of single
            examples there. Never farther from the matrix in the Frobenius norm, at twice the cost.
        sharing: see above.
        zero_others: parameters of y in other layers get a zero block instead of a ValueError: damped, their part of an
            inverse is a division by the damping.
        num_samples: labels per example for "sampled".
        generator: draws them; by default a fresh one with seed 0.

    Returns:
        ``(n, n)``, positive semidefinite. The cost is a backward pass per column of the root (classes, samples, or
        one), ``O(p² + q²)`` per example and position for a layer ``(p, q)``, and its eigendecompositions, ``O(p³ +
        q³)``. A product, also with the inverse, costs ``4 p q (p + q)``.

    Raises:
        TypeError: `model` does not come from `implicitgrad.functional`, or returns no tensor; y is no dict of floating
            point tensors of one dtype; the loss does not fit `kind`.
        ValueError: an option out of range; no examples; y has parameters that no Kronecker factor covers, or that the
            module lacks; what the functions named above refuse.
        RuntimeError: inside a `torch.func` transform or inference mode.
        FloatingPointError: NaN or infinity in inputs or gradients.

    Source: Martens and Grosse (2015); Grosse and Martens (2016) for convolutions; Eschenhagen et al. (2023),
    "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures", for `sharing`; George et al.
    (2018) for `corrected`. Departures: the output curvature enters by all columns of its root instead of drawn labels,
    and damping is exact instead of split between the factors.

    Example:
        >>> import implicitgrad as ig
        >>> net, X, t = torch.nn.Linear(3, 2), torch.eye(3), torch.zeros(3, 2)
        >>> model, square = ig.functional(net), torch.nn.functional.mse_loss
        >>> A = kfac(model, square, model.parameters(), X, t)
        >>> (A.damped(0.1).known_inverse(A.damped(0.1) @ torch.ones(8)) - 1).abs().max() < 1e-5
        tensor(True)
    """
    return minibatch_kfac(
        model,
        loss,
        y,
        [(inputs, targets)],
        kind=kind,
        corrected=corrected,
        sharing=sharing,
        zero_others=zero_others,
        num_samples=num_samples,
        generator=generator,
    )


def minibatch_kfac(
    model: Network,
    loss: Callable[[Tensor, Any], Tensor] | Likelihood,
    y: Mapping[str, Tensor],
    batches: Iterable[tuple[Any, Any]],
    weights: Sequence[float] | Literal["mean"] | None = None,
    *,
    kind: Kind = "gauss_newton",
    corrected: bool = False,
    sharing: Sharing = "expand",
    zero_others: bool = False,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> LinearOperator:
    """`kfac` of the weighted sum of the curvature matrices of many batches, with one of them in memory.

    Not the sum of their K-FAC operators, which has no Kronecker factors, but one operator with the factors of all
    examples.

    Args:
        model: see `kfac`, like the other arguments that are not named here.
        loss: of a batch.
        y: parameters.
        batches: pairs of inputs and targets, like a list or a `DataLoader`; gone through once, once more with
            `corrected`, and once more for ``"mean"``.
        weights: of the batches, as in `minibatch_sum`: ``"mean"`` for a loss that is a mean over a batch and for both
            Fisher matrices, None for one that is a sum.
        kind: of matrix.
        corrected: EKFAC.
        sharing: of positions.
        zero_others: instead of an error.
        num_samples: for "sampled".
        generator: for "sampled".

    Returns:
        ``(n, n)``, see `kfac`.

    Raises:
        TypeError: see `kfac`; `batches` can be gone through only once, or a batch is no pair.
        ValueError: see `kfac`; no batches, or a number of weights other than that of batches.

    Example:
        >>> import implicitgrad as ig
        >>> model, square = ig.functional(torch.nn.Linear(3, 2)), torch.nn.functional.mse_loss
        >>> X, t, y = torch.randn(6, 3), torch.zeros(6, 2), model.parameters()
        >>> A = minibatch_kfac(model, square, y, [(X[:4], t[:4]), (X[4:], t[4:])], "mean")
        >>> torch.allclose(A @ torch.ones(8), kfac(model, square, y, X, t) @ torch.ones(8), atol=1e-5)
        True
    """
    _check_options(loss, kind, sharing)
    if not isinstance(y, Mapping):
        raise TypeError(f"kfac needs y as parameters by name, like model.parameters(); got {type(y).__name__}")
    point = Point("kfac", y, model, loss)
    check_repeatable("minibatch_kfac", batches)
    generator = torch.Generator(point.flat.device).manual_seed(0) if generator is None else generator
    shares = shares_of(batches, weights)

    def passes() -> Iterator[Batch]:
        for batch, weight in weighted_batches("minibatch_kfac", batches, shares):
            inputs, targets = _pair(batch)
            seen = Evaluation(model, point.y, inputs)
            if seen.uncovered and not zero_others:
                raise ValueError(
                    f"kfac has no Kronecker factors for the parameters {seen.uncovered}; leave them out of y, or pass"
                    f" zero_others=True for zero blocks."
                )
            if corrected or sharing == "reduce":
                seen.check_examples()
            yield seen, _cotangents(kind, loss, seen.outputs.detach(), targets, num_samples, generator), weight

    blocks = _blocks(passes(), sharing)
    if corrected:
        blocks = _corrected(passes(), blocks)
    return kronecker(list(blocks.values()), len(point.flat), point.flat.dtype)


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"minibatch_kfac needs batches (inputs, targets), got {type(batch).__name__}")
    inputs, targets = batch
    return inputs, targets


def _check_options(loss: object, kind: object, sharing: object) -> None:
    for got, known in ((kind, get_args(Kind)), (sharing, get_args(Sharing))):
        if got not in known:
            raise ValueError(f"kfac takes one of {known}; got {got!r}.")
    if (kind == "sampled") == callable(loss):
        wanted = f"one of the likelihoods {get_args(Likelihood)}" if kind == "sampled" else "loss(outputs, targets)"
        raise TypeError(f"kfac with kind={kind!r} takes {wanted} for its loss; got {loss!r}")


def _cotangents(
    kind: Kind, loss: Any, outputs: Tensor, targets: Any, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Columns of the root of the curvature in the outputs, ``(columns, N, *outputs)``."""
    if kind == "sampled":
        columns = sampled_cotangents("kfac", loss, outputs, num_samples, generator)
    else:
        columns_of = empirical_cotangents if kind == "empirical" else gauss_newton_cotangents
        columns = columns_of("kfac", loss, outputs, targets)
    return columns.movedim(1, 0)


def _blocks(batches: Iterable[Batch], sharing: Sharing) -> dict[Spans, KroneckerBlock]:
    """The factors of every layer."""
    lefts: Sums = defaultdict(float)
    rights: Sums = defaultdict(float)
    counts: Sums = defaultdict(float)
    for seen, columns, weight in batches:
        for layer in seen.layers:
            a = _merged(layer.activations(), sharing, torch.mean)
            rights[layer.spans] += a.mT @ a
            counts[layer.spans] += len(a)
        for column in columns:
            for layer, parts in zip(seen.layers, seen.backward(column), strict=True):
                g = _merged(parts, sharing, torch.sum)
                lefts[layer.spans] += weight * (g.mT @ g)
    return {spans: KroneckerBlock.of(lefts[spans], rights[spans] / counts[spans], spans) for spans in lefts}


def _corrected(batches: Iterable[Batch], blocks: dict[Spans, KroneckerBlock]) -> dict[Spans, KroneckerBlock]:
    """The blocks with mean squares of the gradients of single examples for eigenvalues."""
    squares: Sums = defaultdict(float)
    for seen, columns, weight in batches:
        for column in columns:
            for layer, g in zip(seen.layers, seen.backward(column), strict=True):
                spans = layer.spans
                squares[spans] += weight * _squares(blocks[spans], torch.cat(g, 1), torch.cat(layer.activations(), 1))
    return {spans: block._replace(eigenvalues=squares[spans]) for spans, block in blocks.items()}


def _merged(parts: Sequence[Tensor], sharing: Sharing, reduction: Callable[..., Tensor]) -> Tensor:
    """All positions as rows ``(N · positions, c)``, or those of an example reduced to one, ``(N, c)``."""
    if sharing == "expand":
        rows = torch.cat([part.flatten(0, 1) for part in parts])
    else:
        rows = reduction(torch.cat(list(parts), 1), 1)
    return rows.to(factor_dtype(rows.dtype))


def _squares(block: KroneckerBlock, g: Tensor, a: Tensor) -> Tensor:
    """Squares of the gradients ``Σ g aᵀ`` of single examples in the basis of a block, summed over examples, (p, q)."""
    g, a = g.to(block.left_basis.dtype) @ block.left_basis, a.to(block.right_basis.dtype) @ block.right_basis
    if g.shape[1] == 1:
        return g.squeeze(1).square().mT @ a.squeeze(1).square()
    at_once = max(1, NUMBERS_AT_ONCE // block.eigenvalues.numel())
    pairs = zip(g.split(at_once), a.split(at_once), strict=True)
    return torch.stack([(some_g.mT @ some_a).square().sum(0) for some_g, some_a in pairs]).sum(0)
