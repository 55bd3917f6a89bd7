"""Dynamic M-FAC as an optimizer: each gradient times the inverse Fisher matrix of the last gradients."""

import math
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg import SlidingWindow


@final
class MFAC(torch.optim.Optimizer):
    r"""Gradient descent in the metric of the last gradients.

    With g the gradient of a group of parameters w, all of them as one vector:

        g ← g + weight_decay · w
        F = damping · I + 1/num_grads · Σ gᵢ gᵢᵀ   over the last num_grads gradients, this one included
        v ← momentum · v + (1 - momentum) · F⁻¹ g
        w ← w - lr · v

    Each group has a window of its own: gradients of two groups are not coupled. A step costs two passes over the
    window, which is num_grads times the parameters in memory.

    A parameter without a gradient counts as one with gradient zero and stays where it is; a group without any gradient
    takes no step. A new `damping` in `param_groups` holds from the next step on.

    Source: Frantar, Kurtic and Alistarh (2021), M-FAC, and their published code: averaged momentum on the
    preconditioned gradient; weight decay as part of the gradient and so of the window; a weight of 1/num_grads also
    while there are fewer gradients. Departures: groups, closures, `state_dict`.

    Args:
        params: parameters or groups; a group is of one dtype, on one device.
        lr: learning rate. F⁻¹ g is up to num_grads / |g| long, so good rates fall as the window grows.
        momentum: in [0, 1).
        weight_decay: not negative.
        num_grads: gradients in the window.
        damping: λ > 0. Steps grow as gradients fall, until |g|² is about num_grads · damping: one that is far too low
            throws a network that has nearly converged out again.

    Raises:
        ValueError: an argument out of range; a group of several dtypes or devices, or of complex numbers.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = MFAC([w], lr=0.1, num_grads=1, damping=1.0)
        >>> (w * torch.tensor([3.0, 0.0])).sum().backward()
        >>> optimizer.step()  # 3 / (1 + 3²) of the learning rate
        >>> w.detach()
        tensor([0.9700, 1.0000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        num_grads: int = 512,
        damping: float = 1e-5,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "num_grads": num_grads,
            "damping": damping,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """One step of all groups, and what `closure` returned.

        Raises:
            ValueError: a sparse gradient.
            FloatingPointError: NaN or infinity in a gradient, or gradients so large that the damping is lost beside
                them in float64. No parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [group for group in self.param_groups if any(p.grad is not None for p in group["params"])]
        gradients = [_flat_gradient(group) for group in active]
        directions = [self._direction(group, gradient) for group, gradient in zip(active, gradients, strict=True)]
        for group, direction in zip(active, directions, strict=True):
            pieces = direction.split([p.numel() for p in group["params"]])
            for p, piece in zip(group["params"], pieces, strict=True):
                if p.grad is not None:
                    p.add_(piece.view_as(p), alpha=-group["lr"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Windows included; for ``torch.save`` and ``torch.load(weights_only=True)``.

        As in `torch.optim`, tensors are the optimizer's own: save or copy them before the next step.
        """
        packed = super().state_dict()
        packed["state"] = {
            key: {**entry, "window": entry["window"].state_dict()} for key, entry in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly as the optimizer that `state_dict` was taken from.

        Raises:
            ValueError: the groups are others.
        """
        # apart from the rest, for the base class would round the float64 in a window to the parameters' dtype
        windows = {key: entry["window"] for key, entry in state_dict["state"].items()}
        others = {key: {"velocity": entry["velocity"]} for key, entry in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": others})
        for group, packed in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if packed["params"][0] in windows:
                window = _new_window(group)
                window.load_state_dict(windows[packed["params"][0]])
                self.state[group["params"][0]]["window"] = window

    def _direction(self, group: dict[str, Any], gradient: Tensor) -> Tensor:
        """v after this gradient; a group's state is kept with its first parameter."""
        state = self.state[group["params"][0]]
        if not state:
            state["window"] = _new_window(group)
            state["velocity"] = torch.zeros_like(gradient)
        if state["window"].damping != group["damping"]:
            state["window"].damping = group["damping"]
        try:
            direction = state["window"].update_apply(gradient)
        except LinAlgError as error:
            raise FloatingPointError(
                f"a gradient of norm {gradient.norm():.1e} is too large for damping={group['damping']:g}: if the"
                " training diverges, lower lr, else raise the damping."
            ) from error
        return state["velocity"].lerp_(direction.to(gradient.dtype), 1 - group["momentum"])


def _flat_gradient(group: dict[str, Any]) -> Tensor:
    pieces = []
    for p in group["params"]:
        if p.grad is None:
            pieces.append(p.new_zeros(p.numel()))
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(f"MFAC needs dense gradients; got one in layout {p.grad.layout}. Use sparse=False.")
        pieces.append(p.grad.add(p, alpha=group["weight_decay"]).flatten())
    return torch.cat(pieces)


def _new_window(group: dict[str, Any]) -> SlidingWindow:
    first = group["params"][0]
    size = sum(p.numel() for p in group["params"])
    return SlidingWindow(group["num_grads"], size, group["damping"], devices=[first.device], storage=first.dtype)


def _check(group: dict[str, Any]) -> None:
    for name, most in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
        if not 0 <= group[name] < most:
            raise ValueError(f"MFAC needs {name} in [0, {most}); got {group[name]}.")
    if not isinstance(group["num_grads"], int) or group["num_grads"] < 1:
        raise ValueError(f"MFAC needs num_grads to be an integer of at least 1; got {group['num_grads']!r}.")
    if not 0 < group["damping"] < math.inf:
        raise ValueError(f"MFAC needs a positive damping; got {group['damping']}.")
    kinds = {(p.dtype, p.device) for p in group["params"]}
    if len(kinds) > 1 or not all(p.is_floating_point() for p in group["params"]):
        raise ValueError(
            f"MFAC needs real parameters of one dtype on one device in a group; got {sorted(map(str, kinds))}. Make a"
            " group for each."
        )
