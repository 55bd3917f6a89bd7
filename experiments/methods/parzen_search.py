"""Random search over all log-penalties, steered by Parzen density estimates of the good and the bad draws."""

import math
from typing import Any

import torch
from torch import Tensor

from experiments.methods.method import Method


class ParzenSearch(Method):
    """A tree-structured Parzen estimator (TPE) on a box, which is to say without a tree.

    After `num_startup` uniform draws, coordinate by coordinate: estimate the density `l` of the best draws and the
    density `g` of the others, draw `num_candidates` values from `l`, keep the one with the largest `l / g`.
    Source: Bergstra, Bardenet, Bengio and Kégl, Algorithms for Hyper-Parameter Optimization, 2011, section 4.
    A kernel is as wide as the larger gap to its neighbours, but not narrower than the range over the number of kernels
    (or over 100). Departures, for brevity: kernels are not renormalised at the ends of the range, and draws outside
    are clamped to it.

    Args:
        num_features: `d`.
        seed: of its own generator.
        smallest: low end of the shared term's range, a penalty, not its logarithm.
        largest: high end of the shared term's range.
        spread: a feature's own entry lies in `[-spread, spread]`, in units of log-penalty.
        num_startup: uniform draws before the densities are used.
        num_candidates: draws from `l` per coordinate.
        best_fraction: share of the draws that count as good, no unit.
    """

    def __init__(
        self,
        num_features: int,
        seed: int,
        smallest: float,
        largest: float,
        spread: float,
        num_startup: int,
        num_candidates: int,
        best_fraction: float,
    ) -> None:
        self._low = torch.tensor([math.log(smallest)] + [-spread] * num_features, dtype=torch.float64)
        self._high = torch.tensor([math.log(largest)] + [spread] * num_features, dtype=torch.float64)
        self._num_startup = num_startup
        self._num_candidates = num_candidates
        self._best_fraction = best_fraction
        self._generator = torch.Generator().manual_seed(seed)
        self._xs = self._low.new_empty(0, 1 + num_features)
        self._losses = self._low.new_empty(0)

    @property
    def num_penalties(self) -> int:
        return len(self._low)

    def propose(self) -> Tensor:
        if len(self._losses) < self._num_startup:
            uniform = torch.rand(self._low.shape, generator=self._generator, dtype=self._low.dtype)
            return self._low + (self._high - self._low) * uniform
        order = self._losses.argsort()
        num_good = math.ceil(self._best_fraction * len(order))
        good, bad = self._xs[order[:num_good]], self._xs[order[num_good:]]
        candidates = self._draw(good)
        score = self._log_density(candidates, good) - self._log_density(candidates, bad)
        return candidates.gather(0, score.argmax(0, keepdim=True))[0]

    def observe(self, x: Tensor, loss: Tensor) -> None:
        self._xs = torch.cat([self._xs, x[None]])
        self._losses = torch.cat([self._losses, loss[None]])

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "xs": self._xs, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._xs, self._losses = state["xs"], state["losses"]

    def _kernels(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        """Centres and widths `(n + 1, 1 + d)`: one kernel per draw, and one as wide as the range to keep exploring."""
        full_width = self._high - self._low
        centres = torch.cat([xs, (self._low + self._high)[None] / 2])
        in_order, order = centres.sort(0)
        gaps = torch.cat([self._low[None], in_order, self._high[None]]).diff(dim=0)
        widths = torch.empty_like(centres).scatter(0, order, torch.maximum(gaps[:-1], gaps[1:]))
        widths = widths.clamp(min=full_width / min(100, len(centres)))
        widths[-1] = full_width
        return centres, widths

    def _draw(self, xs: Tensor) -> Tensor:
        centres, widths = self._kernels(xs)
        shape = (self._num_candidates, centres.shape[1])
        chosen = torch.randint(len(centres), shape, generator=self._generator)
        noise = torch.randn(shape, generator=self._generator, dtype=xs.dtype)
        draws = centres.gather(0, chosen) + widths.gather(0, chosen) * noise
        return draws.clamp(self._low, self._high)

    def _log_density(self, values: Tensor, xs: Tensor) -> Tensor:
        """Up to a constant, the log-density at `values: (m, 1 + d)`, coordinate by coordinate: `(m, 1 + d)`."""
        centres, widths = self._kernels(xs)
        z = (values[:, None] - centres) / widths
        return (-0.5 * z**2 - widths.log()).logsumexp(1) - math.log(len(centres))
