"""Numbers computed below all functional transforms: solvers, searches and iterations without a derivative of their own.

What runs here sees plain tensors and may branch on their values. Whoever asks for the numbers gives them a derivative:
by a formula in them, or by the condition that they satisfy.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Algorithm = Callable[..., tuple[Tensor, ...]]
# (again, batch size, in_dims, tensors) -> outputs with the batch in front; `again` is `computed` with one vmap less
BatchRule = Callable[[Algorithm, int, Sequence[int | None], Sequence[Tensor]], tuple[Tensor, ...]]


def whole_batch(again: Algorithm, size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> tuple:
    """One call for a batch, whose dimension comes first in every tensor."""
    return again(*batch_in_front(size, in_dims, tensors))


def by_example(again: Algorithm, size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> tuple:
    """One call per example."""
    examples = []
    for i in range(size):
        examples.append(
            again(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)))
        )
    return tuple(torch.stack(outputs) for outputs in zip(*examples, strict=True))


def batch_in_front(size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Arguments of a `vmap` rule with the batch as first dimension of each."""
    return [
        tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]


def computed(algorithm: Algorithm, *tensors: Tensor, batch_rule: BatchRule = whole_batch) -> tuple[Tensor, ...]:
    """`algorithm(*tensors)` on plain tensors, as constants.

    Args:
        algorithm: Returns new tensors. Under the default rule it takes any number of batch dimensions in front, the
            same for all tensors, and is called once for the whole batch.
        tensors: Its arguments.
        batch_rule: What `vmap` does.

    Example:
        >>> count = lambda y: ((y > 0).sum(-1),)
        >>> torch.func.vmap(lambda y: computed(count, y)[0])(torch.tensor([[1.0, 2.0], [-1.0, 3.0]]))
        tensor([2, 1])
    """
    return _Below.apply(algorithm, batch_rule, *tensors)


class _Below(torch.autograd.Function):
    @staticmethod
    def forward(algorithm: Algorithm, batch_rule: BatchRule, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(algorithm(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.num_inputs, ctx.num_outputs = len(inputs), len(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.num_inputs

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[None, ...]:
        return (None,) * ctx.num_outputs

    @staticmethod
    def vmap(info: Any, in_dims: tuple, algorithm: Algorithm, batch_rule: BatchRule, *tensors: Tensor) -> tuple:
        again = functools.partial(_Below.apply, algorithm, batch_rule)
        outputs = batch_rule(again, info.batch_size, in_dims[2:], tensors)
        return outputs, (0,) * len(outputs)
