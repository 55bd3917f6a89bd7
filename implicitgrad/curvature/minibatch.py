"""Curvature of a loss over many minibatches, with the graph of one of them in memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.linalg import LinearOperator, check_operator


def minibatch_sum(
    make_operator: Callable[[Any], LinearOperator],
    batches: Iterable[Any],
    weights: Sequence[float] | Literal["mean"] | None = None,
    *,
    retain: bool = False,
    check: bool = True,
) -> LinearOperator:
    """The operator `Σ_b w_b A_b` with `A_b = make_operator(batch)`, rebuilt batch by batch in every product.

    Each product goes once through the batches, makes one operator at a time, and lets it go before the next one: the
    memory of one graph, whatever their number. Ask for all right-hand sides in one block, since a block costs one pass.

    Args:
        make_operator: Returns the operator of one batch, say `lambda batch: hessian(loss, y, *batch, check=False)`;
            with its own check each would cost three products more, every time.
        batches: Can be gone through again and again, like a list or a `DataLoader`; with `shuffle=True` only if the sum
            does not depend on the order: no `drop_last`, no random augmentation.
        weights: w_b in the order of the batches; None for ones, which suits losses that are sums; `"mean"` for shares
            of the number of examples, the first dimension of the first tensor in a batch, which makes losses that are
            means over a batch one over all examples.
        retain: Keep all operators with their graphs: half the time per product or less, and memory for every batch.
        check: Test the products as `check_operator` does, for three passes.

    Returns:
        The sum, with what its terms declare: symmetry, noise, and an `eigenvalue_floor` of zero where neither theirs
        nor a weight is negative.

    Raises:
        TypeError: `batches` can be gone through only once, a batch without a tensor under `weights="mean"`, or
            `make_operator` returns something else.
        ValueError: no batches, terms that differ in shape or declared structure, a number of weights other than that of
            batches, or a sum that comes out differently a second time.

    Example:
        >>> from implicitgrad.curvature import hessian
        >>> y, X = torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> make = lambda batch: hessian(lambda y, X: (X @ y).square().mean() / 2, y, batch, check=False)
        >>> torch.allclose(minibatch_sum(make, [X[:2], X[2:]], "mean").to_dense(), X.T @ X / 3)
        True
    """
    check_repeatable("minibatch_sum", batches)
    shares = shares_of(batches, weights)
    if retain:
        batches, make_operator = [make_operator(batch) for batch in batches], lambda operator: operator
    operator = _sum(make_operator, batches, shares)
    if check:
        check_operator(operator)
    return operator


def check_repeatable(name: str, batches: Iterable[Any]) -> None:
    """Refuse an iterator, which is used up by the first pass.

    Raises:
        TypeError: with the type.
    """
    if iter(batches) is batches:
        raise TypeError(
            f"{name} goes through the batches several times, but got {type(batches).__name__}, which can be gone "
            "through only once; pass a list or a DataLoader"
        )


def shares_of(batches: Iterable[Any], weights: Sequence[float] | Literal["mean"] | None) -> list[float] | None:
    """The weights as numbers; None for ones."""
    if weights is None:
        return None
    if not isinstance(weights, str):
        return [float(weight) for weight in weights]
    if weights != "mean":
        raise ValueError(f'weights must be numbers, "mean" or None, got {weights!r}')
    sizes = []
    for batch in batches:
        tensors = [leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if not tensors:
            raise TypeError(
                'weights="mean" counts examples in the first tensor of a batch, but found none; pass numbers'
            )
        sizes.append(len(tensors[0]))
    return [size / sum(sizes) for size in sizes]


def weighted_batches(name: str, batches: Iterable[Any], shares: list[float] | None) -> Iterator[tuple[Any, float]]:
    """Every batch with its weight.

    Raises:
        ValueError: no batches, or another number of them than of weights.
    """
    count = 0
    for count, batch in enumerate(batches, start=1):
        if shares is not None and count > len(shares):
            break
        yield batch, 1.0 if shares is None else shares[count - 1]
    if count == 0 or shares is not None and count != len(shares):
        wanted = "at least one" if shares is None else f"{len(shares)}, one per weight"
        raise ValueError(f"{name} got {count} batches (or more) in a pass; wanted {wanted}")


class _Kind(NamedTuple):
    """What all terms of a sum must have in common."""

    size: int
    num_rows: int
    batch_shape: tuple[int, ...]
    symmetric: bool
    semidefinite: bool
    has_transpose: bool
    noise: float
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, A: LinearOperator) -> "_Kind":
        if not isinstance(A, LinearOperator):
            raise TypeError(f"minibatch_sum: make_operator must return a LinearOperator, got {type(A).__name__}")
        semidefinite = A.eigenvalue_floor is not None and A.eigenvalue_floor >= 0
        structure = A.symmetric, semidefinite, A.T.has_product, A.noise
        return cls(A.size, A.num_rows, A.batch_shape, *structure, A.dtype, A.device)


def _sum(
    make_operator: Callable[[Any], LinearOperator], batches: Iterable[Any], shares: list[float] | None
) -> LinearOperator:
    """`Σ_b w_b A_b` for any number of passes through the batches."""
    first, _ = next(weighted_batches("minibatch_sum", batches, shares))
    kind = _Kind.of(make_operator(first))

    def part(batch: Any, apply: Callable[[LinearOperator], Tensor]) -> Tensor:
        term = make_operator(batch)  # lives as long as this call
        if _Kind.of(term) != kind:
            raise ValueError(f"minibatch_sum needs terms of one kind; got {kind} and {_Kind.of(term)}")
        return apply(term)

    def total(apply: Callable[[LinearOperator], Tensor]) -> Tensor:
        parts = (weight * part(batch, apply) for batch, weight in weighted_batches("minibatch_sum", batches, shares))
        result = next(parts)
        for value in parts:
            result += value
        return result

    product = lambda v: total(lambda term: term @ v)
    transposed = (lambda v: total(lambda term: term.T @ v)) if kind.has_transpose else None
    return LinearOperator(
        product,
        kind.size,
        num_rows=kind.num_rows,
        rmatvec=transposed,
        matmat=product,
        rmatmat=transposed,
        dense=lambda: total(lambda term: term.to_dense()),
        dense_cost=kind.size,
        noise=kind.noise,
        symmetric=kind.symmetric,
        eigenvalue_floor=0.0 if kind.semidefinite and min(shares or [1.0]) >= 0 else None,
        dtype=kind.dtype,
        device=kind.device,
        batch_shape=kind.batch_shape,
    )
