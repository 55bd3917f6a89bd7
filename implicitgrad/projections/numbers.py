"""Numbers computed below all transforms: searches and iterations that have no derivative of their own.

A projection finds what it needs by an algorithm that may branch on values, then writes its point as a formula in these
numbers, the argument and the parameters, which torch differentiates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicitgrad import internals

Algorithm = Callable[..., tuple[Tensor, ...]]


def computed(algorithm: Algorithm, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`algorithm(*tensors)` on plain tensors, as constants.

    Args:
        algorithm: Takes any number of batch dimensions in front, the same for all tensors, and returns new tensors
            with them. Under `vmap` it is called once for the whole batch.
        tensors: Its arguments.

    Example:
        >>> count = lambda y: ((y > 0).sum(-1),)
        >>> torch.func.vmap(lambda y: computed(count, y)[0])(torch.tensor([[1.0, 2.0], [-1.0, 3.0]]))
        tensor([2, 1])
    """
    return _Computed.apply(algorithm, *tensors)


def batch_in_front(size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Arguments of a `vmap` rule with the batch as first dimension of each."""
    return [
        tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]


def refuse_nested_forward_mode() -> None:
    """Raise where torch drops a term of custom autograd functions.

    Raises:
        NotImplementedError: inside two nested forward-mode transforms.
    """
    if internals.num_forward_transforms() > 1:
        raise NotImplementedError(
            "forward mode over forward mode (jacfwd of jacfwd, jvp of jvp) is silently wrong through custom autograd "
            "functions in torch; use torch.func.hessian or jacfwd(jacrev(...))"
        )


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(algorithm: Algorithm, *tensors: Tensor) -> tuple[Tensor, ...]:
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
    def vmap(info: Any, in_dims: tuple, algorithm: Algorithm, *tensors: Tensor) -> tuple:
        outputs = _Computed.apply(algorithm, *batch_in_front(info.batch_size, in_dims[1:], tensors))
        return outputs, (0,) * len(outputs)
