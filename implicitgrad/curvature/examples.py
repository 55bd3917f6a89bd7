"""Data whose first dimension counts examples, and functions of single examples."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.curvature.point import Point
from implicitgrad.tree import Tree


def num_examples(name: str, *data: Tree) -> int:
    """The first dimension that all tensors in trees of data share.

    Raises:
        TypeError: something is no tensor.
        ValueError: first dimensions that differ, are zero, or are missing.
    """
    values = tree.leaves(data)
    if wrong := [type(value).__name__ for value in values if not isinstance(value, Tensor)]:
        raise TypeError(f"{name} needs tensors whose first dimension counts examples, got {wrong[0]}")
    counts = {len(value) if value.dim() else 0 for value in values}
    if len(counts) != 1 or 0 in counts:
        shapes = [tuple(value.shape) for value in values]
        raise ValueError(f"{name} needs one number of examples in the first dimension of every tensor, got {shapes}")
    return counts.pop()


def select(data: Tree, index: int | slice | list[int]) -> Tree:
    """One example or several."""
    return tree.map(lambda leaf: leaf[index], data)


def check_tensor(name: str, outputs: Tree) -> None:
    """Refuse outputs that are no single tensor.

    Raises:
        TypeError: with the type.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"{name} needs a model that returns one tensor (N, ...), got {type(outputs).__name__}; concatenate"
        )


def check_uncoupled(point: Point, model: Callable[[Tree, Any], Tensor], inputs: Tree) -> None:
    """Refuse a model whose output for an example changes with the others in the batch; two forward passes of 8.

    Raises:
        TypeError: the outputs are no tensor.
        ValueError: another number of outputs than inputs, or coupled ones.
    """
    few = list(range(min(8, num_examples(point.name, inputs))))
    outputs = []
    for index in (few, [0] * len(few)):
        with torch.no_grad(), point.isolation():  # the same random numbers for both
            outputs.append(model(point.y, select(inputs, index)))
    mixed, equal = outputs
    check_tensor(point.name, mixed)
    if mixed.dim() < 1 or len(mixed) != len(few):
        raise ValueError(
            f"{point.name} needs a model with outputs (N, ...) for N inputs, got {tuple(mixed.shape)} for {len(few)}"
        )
    if (mixed[0] - equal[0]).abs().max() > torch.finfo(point.flat.dtype).eps ** 0.5 * mixed[0].abs().max():
        raise ValueError(
            f"{point.name} needs a model that looks at each example alone, but an output changes with the others in the"
            " batch, as batch normalisation in training mode makes it; call net.eval() or use group normalisation"
        )


def by_example(
    point: Point, batchable: Callable[..., Tensor], eager: Callable[..., Tensor], data: tuple, at_once: int
) -> Iterator[Tensor]:
    """Results for all examples, in blocks: by `vmap` of one function, or by the other one after the other.

    Each evaluation starts from the same random state, so that dropout is one mask for all examples.
    """
    batched, single = torch.func.vmap(batchable, randomness="same"), eager
    batching = True
    count = num_examples(point.name, *data)
    for start in range(0, count, at_once):
        block = select(data, slice(start, start + at_once))
        if batching:
            try:
                result = _isolated(point, batched, block)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                batching = False  # an operation cannot be batched
            else:
                yield result
                continue
        yield torch.stack([_isolated(point, single, select(block, i)) for i in range(min(at_once, count - start))])


def _isolated(point: Point, fn: Callable[..., Tensor], arguments: tuple) -> Tensor:
    with point.isolation():
        return fn(*arguments).detach()
