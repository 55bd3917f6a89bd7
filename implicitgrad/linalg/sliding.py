"""The inverse of a damped sum over the last rows of a stream; with gradients as rows, dynamic M-FAC."""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count
from implicitgrad.linalg.lowrank import LowRankInverse
from implicitgrad.linalg.split_rows import empty_rows


@final
class SlidingWindow:
    r"""``F⁻¹`` of ``F = damping · I + weight · Σ gᵢ gᵢᵀ`` over the last `capacity` rows that were added.

    A new row costs one pass over the rows, for its products with them; everything else is m x m. The Cholesky factor is
    made when the inverse is next asked for, so several rows may be added at the price of one factorisation. Before the
    first row F is ``damping · I``; with fewer than `capacity` rows only these are read.

    Source: Frantar, Kurtic and Alistarh (2021), M-FAC, dynamic algorithm. Departures: a Cholesky factor in float64
    instead of an LU decomposition without pivoting and the coefficients of the recursion, no limits on m, and F⁻¹ times
    the newest row by the identity of `LowRankInverse.apply_span`, which saves a pass and two to four digits.

    Args:
        capacity: m, the most rows it holds.
        size: n, entries of a row.
        damping: λ > 0; may be assigned anew at any time.
        weight: > 0; None for the paper's 1 / capacity, also while there are fewer rows.
        blocks: as in `split_rows`; F is then block diagonal.
        devices: as in `split_rows`; vectors live on the first. None for the CPU.
        storage: dtype of the rows; vectors are in `dtype`, float32 for half precision.

    Attributes:
        dtype: of vectors.
        device: of vectors.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> window = SlidingWindow(capacity=2, size=3, damping=1.0)
        >>> for entry in (1.0, 2.0, 3.0):  # the third row takes the place of the first
        ...     index = window.add(torch.tensor([entry, 0.0, 0.0]))
        >>> window.apply(torch.ones(3))  # 1 / (1 + (4 + 9) / 2)
        tensor([0.1333, 1.0000, 1.0000])
    """

    def __init__(
        self,
        capacity: int,
        size: int,
        damping: float,
        weight: float | None = None,
        *,
        blocks: int | Sequence[int] | None = None,
        devices: Sequence[torch.device | str] = ("cpu",),
        storage: torch.dtype = torch.float32,
    ):
        check_count("SlidingWindow", "capacity", capacity)
        check_count("SlidingWindow", "size", size)
        self.capacity = capacity
        self.size = size
        self._rows = empty_rows(capacity, size, blocks=blocks, devices=devices, storage=storage)
        self.dtype = self._rows.dtype
        self.device = self._rows.device
        self._weight = 1 / capacity if weight is None else weight
        if not 0 < self._weight < math.inf:
            raise ValueError(f"SlidingWindow(weight=...) needs a positive number or None; got {weight}.")
        self._next = 0
        self._inverse: LowRankInverse | None = None
        self.damping = damping

    def __repr__(self) -> str:
        held = f"{self.num_rows} of {self.capacity} rows"
        return f"SlidingWindow({held}, size={self.size}, damping={self.damping:g}, {self._rows.storage})"

    @property
    def num_rows(self) -> int:
        """Rows held now."""
        return self._rows.num_rows

    @property
    def damping(self) -> float:
        """λ; a new one costs a factorisation at the next use."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"damping must be positive and finite; got {value}.")
        self._damping = float(value)
        self._inverse = None

    def add(self, g: Tensor) -> int:
        """Append g, ``(n,)``, or put it in the place of the oldest row; the index of its place. One pass.

        Raises:
            ValueError: g does not fit.
            FloatingPointError: NaN or infinity in g, or in its products with the rows; the window is unchanged then.
        """
        index = self._next
        self._write(index, g)
        self._next = (index + 1) % self.capacity
        return index

    def replace(self, i: int, g: Tensor) -> None:
        """Put g, ``(n,)``, in the place of row i; the order of age stays. One pass; raises like `add`."""
        if not 0 <= i < self.num_rows:
            raise ValueError(f"replace needs the index of one of the {self.num_rows} rows held; got {i}.")
        self._write(i, g)

    def apply(self, v: Tensor, refine: int = 0) -> Tensor:
        """``F⁻¹ v`` for ``(n,)`` or ``(k, n)``, see `LowRankInverse.apply`; to a row of the window use `apply_row`."""
        return self.inverse().apply(v, refine)

    def apply_row(self, i: int, refine: int = 0) -> Tensor:
        """``F⁻¹ gᵢ``, ``(n,)``, in one pass, see `LowRankInverse.apply_span`."""
        if not 0 <= i < self.num_rows:
            raise ValueError(f"apply_row needs the index of one of the {self.num_rows} rows held; got {i}.")
        unit = torch.zeros(self.num_rows, dtype=torch.float64, device=self.device)
        unit[i] = 1
        return self.inverse().apply_span(unit, refine)

    def update_apply(self, g: Tensor, refine: int = 0) -> Tensor:
        """`add` g, then ``F⁻¹ g``, ``(n,)``, with g in F (rounded to `storage`): two passes. Raises like `add`."""
        return self.apply_row(self.add(g), refine)

    def inverse(self) -> LowRankInverse:
        """F⁻¹ as of now: products, elements, operators. It shares the rows, and refuses to work once they change."""
        if self._inverse is None:
            self._inverse = LowRankInverse(self._rows, self._damping, self._weight)
        return self._inverse

    def state_dict(self) -> dict[str, Any]:
        """Rows, Gram matrices and numbers, for ``torch.save`` and ``torch.load(weights_only=True)``.

        The tensors are the window's own, as in `torch.nn.Module`: save or copy them before the next `add`.
        """
        return {
            "rows": list(self._rows.tensors),
            "gram": self._rows.gram_store,
            "exact": self._rows.exact,
            "num_rows": self.num_rows,
            "next": self._next,
            "damping": self._damping,
            "weight": self._weight,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy what `state_dict` returned; every later result is the same bit for bit.

        Raises:
            ValueError: the state is that of a window with another capacity, size, storage, blocks or devices count.
        """
        wanted = [(tuple(tensor.shape), tensor.dtype) for tensor in self._rows.tensors]
        found = [(tuple(tensor.shape), tensor.dtype) for tensor in state["rows"]]
        if wanted != found:
            raise ValueError(
                f"the state holds rows of (blocks, capacity, columns) {found}; this window has {wanted}. Make it with"
                f" the same capacity, size, blocks, storage and number of devices."
            )
        self._rows.restore(state["rows"], state["gram"], state["num_rows"], state["exact"])
        self._next, self._weight = state["next"], state["weight"]
        self.damping = state["damping"]

    def _write(self, i: int, g: Tensor) -> None:
        if g.shape != (self.size,) or g.dtype not in (self.dtype, self._rows.storage) or g.device != self.device:
            raise ValueError(
                f"a row must be ({self.size},) in {self.dtype} or {self._rows.storage} on {self.device}; got"
                f" {tuple(g.shape)} in {g.dtype} on {g.device}."
            )
        self._rows.write(i, g)
        self._inverse = None
