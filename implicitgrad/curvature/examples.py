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
    counts = {value.shape[0] if value.dim() else -1 for value in values}
    shapes = [tuple(value.shape) for value in values]
    if len(counts) != 1 or -1 in counts:
        raise ValueError(f"{name} needs one number of examples in the first dimension of every tensor, got {shapes}")
    if 0 in counts:
        raise ValueError(f"{name} got no examples, but tensors of shapes {shapes}; leave empty batches out")
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


def check_mean(
    point: Point, model: Callable[[Tree, Any], Tree], loss: Callable[[Tree, Tree], Tensor], inputs: Tree, targets: Tree
) -> None:
    """Refuse an objective that is not the mean of its values on single examples; two forward passes.

    Raises:
        TypeError: outputs or targets are no tensors.
        ValueError: a model that couples the examples, or draws random numbers for each; a loss of another kind.
        FloatingPointError: NaN or infinity in the derivative of the loss.
    """
    y, count = point.unravel(point.flat), num_examples(point.name, inputs, targets)

    def one(example: Tree) -> Tensor:
        return tree.ravel(model(y, tree.map(lambda leaf: leaf.unsqueeze(0), example)))[0]

    with torch.no_grad(), point.isolation():
        outputs = model(y, inputs)
    num_examples(f"{point.name} (inputs and outputs of the model)", inputs, outputs)
    with point.isolation():
        _, kinds = single_gradients(point.name, loss, outputs, targets)
    if "mean" not in kinds:
        raise ValueError(
            f"{point.name}: the loss of all examples is not the mean of their single losses; use the mean over examples"
            " as reduction, without class weights, ignored labels and terms across examples"
        )
    together = torch.func.vmap(lambda output: tree.ravel(output)[0])(outputs)
    with torch.no_grad():
        alone = torch.cat(list(by_example(point, one, one, (inputs,), count)))
    allowed = torch.finfo(alone.dtype).eps ** 0.5 * torch.linalg.vector_norm(alone)
    if not torch.linalg.vector_norm(together - alone) <= allowed:
        raise ValueError(
            f"{point.name} needs a model that looks at each example alone, but outputs change with the others in the"
            " batch; call net.eval() for dropout and batch normalisation"
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


def single_gradients(
    name: str, loss: Callable[[Tree, Tree], Tensor], outputs: Tree, targets: Tree
) -> tuple[Tree, set[str]]:
    """Derivatives of the losses of single examples in their outputs, like `outputs`, and what the loss is of these.

    The latter is read off the derivative of the whole loss: "mean" or "sum" where that is the derivative of the mean or
    of the sum of the single losses, both for one example, neither for class weights, ignored labels and terms across
    examples.

    Raises:
        TypeError: outputs or targets are no floating point tensors of one dtype, or no tensors.
        ValueError: first dimensions that differ or are zero; the loss is no scalar, or does not depend on the outputs.
        FloatingPointError: NaN or infinity in the derivative of the whole loss.
    """
    count = num_examples(name, outputs, targets)
    tree.check_vector_space(tree.leaves(outputs), f"{name}: the output of the model")

    def gradient(output: Tree, target: Tree) -> Tree:
        target = tree.map(lambda leaf: leaf.unsqueeze(0), target)
        return tree.grad(lambda z: loss(tree.map(lambda leaf: leaf.unsqueeze(0), z), target), output)

    try:
        single = torch.func.vmap(gradient)(outputs, targets)
    except RuntimeError:  # an operation in the loss cannot be batched
        each = [gradient(select(outputs, i), select(targets, i)) for i in range(count)]
        single = tree.map(lambda *gradients: torch.stack(gradients), *each)
    single = tree.detach(single)
    whole = tree.ravel(tree.grad(lambda z: loss(z, targets), outputs))[0].detach()
    if not whole.isfinite().all():
        raise FloatingPointError(f"{name}: the derivative of the loss in the outputs has NaN or infinite entries")
    flat = tree.ravel_like(outputs, single)
    allowed = torch.finfo(flat.dtype).eps ** 0.5 * torch.linalg.vector_norm(flat)
    scales = {"mean": count, "sum": 1}
    return single, {kind for kind, scale in scales.items() if torch.linalg.vector_norm(whole * scale - flat) <= allowed}


def _isolated(point: Point, fn: Callable[..., Tensor], arguments: tuple) -> Tensor:
    with point.isolation():
        return fn(*arguments).detach()
