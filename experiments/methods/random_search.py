"""Random search over one penalty shared by all features."""

import math
from typing import Any

import torch
from torch import Tensor

from experiments.methods.method import Method, shared_only


class RandomSearch(Method):
    """Draws penalties log-uniformly and independently.

    Source: Bergstra and Bengio, Random Search for Hyper-Parameter Optimization, 2012.

    Args:
        num_features: `d`.
        seed: of its own generator.
        smallest: low end of the range, a penalty, not its logarithm.
        largest: high end of the range.
    """

    def __init__(self, num_features: int, seed: int, smallest: float, largest: float) -> None:
        self._num_features = num_features
        self._low, self._high = math.log(smallest), math.log(largest)
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def num_penalties(self) -> int:
        return 1

    def propose(self) -> Tensor:
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        log_penalty = self._low + (self._high - self._low) * uniform.item()
        return shared_only(log_penalty, self._num_features)

    def observe(self, x: Tensor, loss: Tensor) -> None:
        """Learns nothing: each draw is independent."""

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
