"""Everything this library asks of torch that torch does not export, in one place, under names that say what it is for.

Written against torch 2.13; a new torch is checked here first.
"""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._ops import HigherOrderOperator
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether the caller runs inside a `torch.func` transform (grad, vjp, jvp, vmap)."""
    return torch._C._are_functorch_transforms_active()


def num_transforms() -> int:
    """How many `torch.func` transforms are open; the innermost has this level, the outermost level 1."""
    return len(_functorch.get_interpreter_stack() or ())


def num_forward_transforms() -> int:
    """How many of them are forward mode."""
    stack = _functorch.get_interpreter_stack() or ()
    return sum(level.key() == _functorch.TransformType.Jvp for level in stack)


def level_of(tensor: Tensor) -> int:
    """Level of the transform that wraps `tensor`; below 1 if none does, or one that has ended."""
    return _functorch.maybe_get_level(tensor)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a `torch.func` transform, open or ended, wraps `tensor`."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """What the outermost wrapper of `tensor` holds."""
    return _functorch.get_unwrapped(tensor)


def unwrapped_if_ended(tensor: Tensor) -> Tensor:
    """`tensor` without wrappers of transforms that have ended."""
    return _functorch.unwrap_if_dead(tensor)


def is_old_batch(tensor: Tensor) -> bool:
    """Whether `tensor` is of the batched kind that `is_grads_batched` still uses, which is not that of `torch.func`."""
    return _functorch.is_legacy_batchedtensor(tensor)


def old_batch_level() -> int:
    """Level of the innermost such batching."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def rows_of_old_batch(tensor: Tensor, level: int) -> Tensor:
    """The plain tensor behind such a batch, batch dimension in front."""
    return torch._remove_batch_dim(tensor, level, 1, 0)


def old_batch_of(rows: Tensor, level: int) -> Tensor:
    """The reverse of `rows_of_old_batch`."""
    return torch._add_batch_dim(rows, 0, level)


def in_dual_level() -> bool:
    """Whether a forward-mode level (`torch.autograd.forward_ad.dual_level`) is open."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether `tensor` is a dual number of the forward-mode level open now."""
    if not in_dual_level():
        return False
    with forward_ad._set_fwd_grad_enabled(True):  # otherwise tangents are invisible
        return forward_ad.unpack_dual(tensor).tangent is not None


def primal(tensor: Tensor) -> Tensor:
    """A dual number of the forward-mode level open now without its tangent."""
    return forward_ad.unpack_dual(tensor).primal


def without_forward_mode() -> AbstractContextManager[object]:
    """Context in which operations compute no tangents."""
    return forward_ad._set_fwd_grad_enabled(False)


def following_calls() -> bool:
    """Whether a mode follows torch calls, as during the evaluation of a condition."""
    return torch._C._len_torch_function_stack() > 0


def in_backward() -> bool:
    """Whether the caller runs as part of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def is_custom_function(func: object) -> bool:
    """Whether a followed call is that of a custom autograd function under a transform."""
    return isinstance(func, HigherOrderOperator)


weight_norm = torch._weight_norm


def num_changes(tensor: Tensor) -> int:
    """How often the memory of `tensor` was written to in place, through any view; not counted for inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def gradient_sizes(node: Any) -> list[int]:
    """How many numbers each gradient has that arrives at a node of the graph."""
    return [torch.Size(meta.shape).numel() for meta in node._input_metadata]
