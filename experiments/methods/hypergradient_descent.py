"""Gradient descent on the validation loss with implicit gradients."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.methods.method import Method, shared_only


class HypergradientDescent(Method):
    """A torch optimizer moves all log-penalties along the hypergradient, one step per inner solve.

    Args:
        num_features: `d`.
        start: the penalty of every feature at the first solve.
        optimizer: makes the optimizer from a list of tensors; one that steps without a closure.
    """

    def __init__(
        self, num_features: int, start: float, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    ) -> None:
        self._x = shared_only(math.log(start), num_features).requires_grad_()
        self._optimizer = optimizer([self._x])

    @property
    def num_penalties(self) -> int:
        return self._x.numel()

    def propose(self) -> Tensor:
        return self._x

    def observe(self, x: Tensor, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"x": self._x.detach(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self._x.copy_(state["x"])
        self._optimizer.load_state_dict(state["optimizer"])
