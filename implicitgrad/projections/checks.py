"""What every projection asks of its point and its parameters, in one place."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad import internals


class Claim(NamedTuple):
    """What parameters must fulfil.

    Attributes:
        holds: Boolean tensor, `()`.
        otherwise: The message if not, made only then.
    """

    holds: Tensor
    otherwise: Callable[[], str]


def number(name: str, field: str, value: float | Tensor, like: Tensor) -> Tensor:
    """The parameter `field` of projection `name` as a tensor `()` of the dtype and on the device of `like`.

    Raises:
        TypeError: neither a number nor a tensor.
        ValueError: a tensor with dimensions.
    """
    if isinstance(value, Tensor):
        if value.dim() > 0:
            raise ValueError(
                f"{name} needs a number or a 0-dimensional tensor as {field}, got shape {tuple(value.shape)}; for many "
                "points use torch.func.vmap"
            )
        return value.to(like)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} needs a number or a 0-dimensional tensor as {field}, got {type(value).__name__}")
    return like.new_full((), value)


def not_negative(name: str, field: str, value: Tensor) -> Claim:
    """The claim that the number `value` is not negative."""
    return Claim(value >= 0, lambda: f"{name} needs {field} >= 0, got {value.item()}; the set is empty otherwise")


def array(name: str, field: str, value: Tensor, shape: tuple[int | None, ...], like: Tensor) -> Tensor:
    """`value`, once it is known to have this shape, where None stands for any length, and to go with `like`.

    Raises:
        TypeError: no tensor, or of another dtype than `like`.
        ValueError: of another shape, or on another device.
    """
    wanted = "(" + ", ".join("any" if length is None else str(length) for length in shape) + ")"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} needs a tensor {field} of shape {wanted}, got {type(value).__name__}")
    if value.dim() != len(shape) or any(b not in (None, a) for a, b in zip(value.shape, shape, strict=True)):
        raise ValueError(f"{name} needs {field} of shape {wanted}, got {tuple(value.shape)}")
    if value.dtype != like.dtype:
        raise TypeError(f"{name} needs {field} in {like.dtype} like y, got {value.dtype}; convert one of them")
    if value.device != like.device:
        raise ValueError(f"{name} needs {field} on {like.device} like y, got {value.device}; move one of them")
    return value


def checked(name: str, y: Tensor, parameters: Mapping[str, Tensor], claims: Sequence[Claim] = ()) -> Tensor:
    """`y`, once it and `parameters` are known to be finite and `claims` to hold. One transfer from the device.

    Values cannot be read inside a `torch.func` transform or compiled code. There the result is `y` where all is well
    and NaN elsewhere, which every projection hands on.

    Raises:
        FloatingPointError: NaN or infinity in `y` or `parameters`.
        ValueError: a claim does not hold.
    """
    values = {**parameters, "y": y}
    flags = torch.stack([*(value.isfinite().all() for value in values.values()), *(claim.holds for claim in claims)])
    if internals.transforming() or torch.compiler.is_compiling():
        return torch.where(flags.all(), y, torch.nan)
    if all(held := flags.tolist()):
        return y
    for field, finite in zip(values, held, strict=False):
        if not finite:
            raise FloatingPointError(f"{name} got NaN or infinity in {field}; find out where it arose")
    broken = held.index(False) - len(values)
    raise ValueError(claims[broken].otherwise())
