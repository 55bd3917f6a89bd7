"""What every method of choosing penalties offers."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Method(ABC):
    """Proposes log-penalties, one vector per inner solve, and learns from the validation loss each one gave.

    A vector is `x: (1 + d,)`: the entry that all features share, then one entry per feature.
    """

    @property
    @abstractmethod
    def num_penalties(self) -> int:
        """How many entries of `x` this method moves."""

    @abstractmethod
    def propose(self) -> Tensor:
        """The next `x: (1 + d,)`; it requires a gradient if `observe` will call `backward`."""

    @abstractmethod
    def observe(self, x: Tensor, loss: Tensor) -> None:
        """Takes in the validation loss, a scalar, of the `x` proposed last. May change that `x` in place."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as tensors, numbers, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where `state_dict` was taken."""


def shared_only(log_penalty: float, num_features: int) -> Tensor:
    """The vector `(1 + d,)` that gives each feature the same penalty."""
    x = torch.zeros(1 + num_features, dtype=torch.float64)
    x[0] = log_penalty
    return x
