"""Layers whose higher derivatives torch gets wrong without a word, written out in operations that it gets right.

Seen in torch 2.13 by central differences, in plain reverse mode: the double backward of `torch._weight_norm`, and the
third derivatives of layer norm, of batch norm in training mode and of instance norm, are off by 6 to 140 %.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from implicitgrad import internals


class Composites(TorchFunctionMode):
    """While active, calls of such layers run as composites; running statistics are not updated.

    Args:
        norms: Also the norms, whose second derivatives are right; slower, and needed only for third ones.
    """

    def __init__(self, *, norms: bool) -> None:
        super().__init__()
        self._replacements: dict[Any, Any] = {internals.weight_norm: _weight_norm}
        if norms:
            self._replacements |= {
                F.layer_norm: _layer_norm,
                F.batch_norm: _batch_norm,
                F.instance_norm: _instance_norm,
                torch.layer_norm: _torch_layer_norm,
                torch.native_layer_norm: _native_layer_norm,
                torch.batch_norm: _torch_batch_norm,
                torch.instance_norm: _torch_instance_norm,
            }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._replacements.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    other = [d for d in range(v.dim()) if dim == -1 or d != dim % v.dim()]
    return v * (g / v.square().sum(other, keepdim=True).sqrt())


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    normalized = _standardized(input, list(range(-len(normalized_shape), 0)), eps)
    return _affine(normalized, weight, bias)


def _torch_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _layer_norm(input, normalized_shape, weight, bias, eps)


def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(-len(normalized_shape), 0))
    mean = input.mean(dims, keepdim=True)
    rstd = ((input - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    return _affine((input - mean) * rstd, weight, bias), mean, rstd


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = [d for d in range(input.dim()) if d != 1]
    return _affine(_standardized(input, dims, eps), _per_channel(weight, input), _per_channel(bias, input))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    normalized = _standardized(input, list(range(2, input.dim())), eps)
    return _affine(normalized, _per_channel(weight, input), _per_channel(bias, input))


def _standardized(input: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = input - input.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = normalized if weight is None else normalized * weight
    return scaled if bias is None else scaled + bias


def _per_channel(values: Tensor | None, input: Tensor) -> Tensor | None:
    return None if values is None else values.reshape(-1, *[1] * (input.dim() - 2))
