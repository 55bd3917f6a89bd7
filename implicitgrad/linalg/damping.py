"""The diagonal that a low-rank matrix is added to."""

import math
from typing import final

import torch
from torch import Tensor


@final
class Damping:
    """A positive diagonal D: a number λ times the identity, or n numbers.

    ``D⁻¹ u = scale * u / divisor``. Where D is a number, `divisor` is None, and `scale` can be multiplied into
    something smaller than u; for a vector `scale` is one, and the division costs a pass of its own.

    Args:
        value: λ, or ``(n,)`` in `dtype` on `device`.
        size: n.
        dtype: of vectors.
        device: of vectors.

    Raises:
        ValueError: not positive, not finite, or a vector that does not fit.
    """

    def __init__(self, value: float | Tensor, size: int, dtype: torch.dtype, device: torch.device):
        self.value: float | Tensor
        if isinstance(value, Tensor) and value.ndim > 0:
            if (value.shape, value.dtype, value.device) != ((size,), dtype, device):
                raise ValueError(
                    f"damping must be a number or ({size},) in {dtype} on {device}; got {tuple(value.shape)} in"
                    f" {value.dtype} on {value.device}."
                )
            self.value = self.divisor = value.detach().clone()
            self.scale = 1.0
            self.lowest, self.highest = torch.stack(self.divisor.aminmax()).tolist()
        else:
            self.value = self.lowest = self.highest = float(value)
            self.scale, self.divisor = 1 / self.value if self.value else math.nan, None
        if not 0 < self.lowest <= self.highest < math.inf:
            raise ValueError(f"damping must be positive and finite; got values from {self.lowest} to {self.highest}.")
        self._size = size

    def divide(self, v: Tensor) -> Tensor:
        """``u / divisor``, so D⁻¹ u up to `scale`."""
        return v if self.divisor is None else v / self.divisor

    def reciprocal(self, i: int | None = None) -> float | Tensor:
        """Entry i of the diagonal of D⁻¹; None for all, a number if they are one."""
        if self.divisor is None:
            return self.scale
        return 1 / (self.divisor if i is None else self.divisor[i])

    def logdet(self) -> float:
        """log det D."""
        if self.divisor is None:
            return -self._size * math.log(self.scale)
        return self.divisor.double().log().sum().item()
