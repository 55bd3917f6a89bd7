"""Grid search over one penalty shared by all features."""

import math
from typing import Any

import torch
from torch import Tensor

from experiments.methods.method import Method, shared_only


class GridSearch(Method):
    """Tries `num_points` penalties, evenly spaced in their logarithm.

    They are visited in the order of a golden-ratio sequence, which covers the whole range early: swept from one end,
    the curve against inner solves would show where the sweep began.

    Args:
        num_features: `d`.
        num_points: size of the grid; after the last point it starts over.
        smallest: low end of the grid, a penalty, not its logarithm.
        largest: high end of the grid.
    """

    def __init__(self, num_features: int, num_points: int, smallest: float, largest: float) -> None:
        self._num_features = num_features
        grid = torch.linspace(math.log(smallest), math.log(largest), num_points, dtype=torch.float64)
        golden_ratio = (1 + math.sqrt(5)) / 2
        self._grid = grid[(torch.arange(num_points) * golden_ratio).frac().argsort().argsort()]
        self._num_tried = 0

    @property
    def num_penalties(self) -> int:
        return 1

    def propose(self) -> Tensor:
        log_penalty = self._grid[self._num_tried % len(self._grid)]
        return shared_only(log_penalty.item(), self._num_features)

    def observe(self, x: Tensor, loss: Tensor) -> None:
        self._num_tried += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_tried": self._num_tried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_tried = state["num_tried"]
