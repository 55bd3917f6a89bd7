"""The rows of a low-rank matrix, cut by columns into blocks and over devices, with their Gram matrices."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple, final

import torch
from torch import Tensor

from implicitgrad import internals
from implicitgrad.linalg import tiles
from implicitgrad.linalg.checks import check_count
from implicitgrad.linalg.matrix import factor_dtype


class Range(NamedTuple):
    """Columns that lie together on one device: several blocks of one width, or a share of a single block."""

    columns: slice
    blocks: slice
    device: torch.device


class Part(NamedTuple):
    """The rows within a range."""

    rows: Tensor  # (b, m, s): b blocks of s columns
    columns: slice
    blocks: slice


def split_rows(
    rows: Tensor | Iterable[Tensor],
    *,
    blocks: int | Sequence[int] | None = None,
    devices: Sequence[torch.device | str] | None = None,
    storage: torch.dtype | None = None,
) -> "SplitRows":
    """Rows with their columns cut into blocks or spread over devices, or in another dtype.

    Args:
        rows: ``(m, n)``; kept without a copy where dtype and device allow it: do not change it in place afterwards. Or
            an iterable of chunks ``(m_j, n)``, each cut and stored before the next one is asked for; joining them takes
            the memory of the largest part once more.
        blocks: None for a single block; an integer s for blocks of s columns, the last one shorter if need be; or the
            sizes of all blocks, which add up to n.
        devices: where the columns go, see `SplitRows`; None for the device of the rows.
        storage: dtype of the stored rows; None for theirs.

    Raises:
        ValueError: shapes, sizes or dtypes that do not fit; no rows at all.

    Example:
        >>> rows = split_rows(torch.ones(2, 5), blocks=3)
        >>> [tuple(part.rows.shape) for part in rows.parts], rows.gram()[:, 0, 0].tolist()
        ([(1, 2, 3), (1, 2, 2)], [3.0, 2.0])
    """
    ranges: list[Range] = []
    chunks: list[list[Tensor]] = []
    for chunk in [rows] if isinstance(rows, Tensor) else rows:
        if chunk.ndim != 2 or not chunk.is_floating_point():
            raise ValueError(f"rows must be real, (m, n); got {chunk.dtype} of shape {tuple(chunk.shape)}.")
        if not ranges:
            storage = chunk.dtype if storage is None else storage
            ranges = _ranges(chunk.shape[1], blocks, [chunk.device] if devices is None else devices)
        elif chunk.shape[1] != ranges[-1].columns.stop:
            raise ValueError(f"all rows must have n = {ranges[-1].columns.stop} entries; got {tuple(chunk.shape)}.")
        chunks.append(_cut(chunk, ranges, storage))
    if not ranges:
        raise ValueError("split_rows got an empty iterable; it needs at least one chunk of rows (m_j, n).")
    tensors = chunks[0]
    if len(chunks) > 1:
        tensors = [torch.cat([chunk.pop(0) for chunk in chunks], dim=1) for _ in ranges]  # lets go of joined pieces
    return SplitRows(ranges, tensors, tensors[0].shape[1])


def empty_rows(
    capacity: int,
    size: int,
    *,
    blocks: int | Sequence[int] | None = None,
    devices: Sequence[torch.device | str],
    storage: torch.dtype,
) -> "SplitRows":
    """No rows yet, and room for `capacity` of them by `SplitRows.write`; arguments as for `split_rows`."""
    ranges = _ranges(size, blocks, devices)
    widths = [_shape(place) for place in ranges]
    tensors = [
        torch.zeros(count, capacity, width, dtype=storage, device=place.device)
        for (count, width), place in zip(widths, ranges, strict=True)
    ]
    rows = SplitRows(ranges, tensors, 0)
    rows.gram()
    return rows


@final
class SplitRows:
    """Rows gᵢ, ``(m, n)``, stored in parts, and the products with them; made by `split_rows` and `empty_rows`.

    *Blocks* cut the columns into ranges; products and Gram matrices exist once per block, ``B`` times. *Devices* share
    the columns: a single block is cut evenly, several blocks stay whole and go to the device in whose share of the
    columns they begin. Vectors, Gram matrices and sums over devices live on the first device.

    *Dtypes*: rows are stored in `storage`; vectors are in `dtype`, which is float32 for half precision and `storage`
    otherwise. Half precision rows are converted tile by tile, so all sums are those of the *rounded* rows, to float32
    accuracy. Gram matrices are float64: sums of tiles computed in `dtype`, or float64 throughout once `gram` was asked
    for ``exact=True``.

    Attributes:
        size: n.
        num_rows: m, the rows in use.
        num_blocks: B.
        storage: dtype of the stored rows.
        dtype: of vectors.
        device: of vectors.
    """

    def __init__(self, ranges: list[Range], tensors: list[Tensor], num_rows: int):
        self.ranges = ranges
        self.tensors = tensors  # (b, capacity, s) each
        self.num_rows = num_rows
        self.size: int = ranges[-1].columns.stop
        self.num_blocks: int = ranges[-1].blocks.stop
        self.storage = tensors[0].dtype
        if not self.storage.is_floating_point:
            raise ValueError(f"rows need a real floating dtype for storage; got {self.storage}.")
        self.dtype = factor_dtype(self.storage)
        self.device = ranges[0].device
        self._num_writes = 0
        self.exact = False
        self.gram_store: Tensor | None = None  # (B, capacity, capacity)
        self._gram_version: tuple[int, ...] = ()  # of the rows it belongs to

    @property
    def version(self) -> tuple[int, ...]:
        """Another one after every change of the rows, also in place by whoever shares their memory."""
        return self._num_writes, *(internals.num_changes(tensor) for tensor in self.tensors)

    @property
    def parts(self) -> list[Part]:
        """The rows in use."""
        return [
            Part(tensor[:, : self.num_rows], place.columns, place.blocks)
            for tensor, place in zip(self.tensors, self.ranges, strict=True)
        ]

    def products(self, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``<gᵢ, v>`` in every block: ``(k, n) -> (B, k, m)``, float64; computed in `dtype`. One pass."""
        out = v.new_zeros(self.num_blocks, v.shape[0], self.num_rows, dtype=torch.float64)
        for part in self.parts:
            here = v[:, part.columns].to(part.rows.device)
            out[part.blocks] += tiles.products(part.rows, here, dtype or self.dtype).to(self.device)
        return out

    def mixture(
        self, weights: Tensor, v: Tensor | None = None, beta: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """``beta v + Σ weightsᵢ gᵢ`` with weights ``(B, k, m)``: ``(k, n)``; computed in `dtype`. One pass.

        None for v stands for zero.
        """
        if v is None:
            beta, v = 0.0, torch.zeros((), dtype=self.dtype, device=self.device).expand(weights.shape[1], self.size)
        pieces = []
        for part in self.parts:
            device = part.rows.device
            base, here = v[:, part.columns].to(device), weights[part.blocks].to(device)
            pieces.append(tiles.mixture(part.rows, here, base, beta, dtype or self.dtype).to(self.device))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def gram(self, exact: bool = False) -> Tensor:
        """Gram matrices ``<gᵢ, gⱼ>``, float64 ``(B, m, m)``; remembered, and kept up to date by `write`.

        With `exact` products are made in float64, here and in every later `write`, at two to four times the cost.
        """
        return self._current_store(exact)[:, : self.num_rows, : self.num_rows]

    def _current_store(self, exact: bool = False) -> Tensor:
        if self.gram_store is None or self._gram_version != self.version or exact and not self.exact:
            capacity, used = self.tensors[0].shape[1], self.num_rows
            self.exact = self.exact or exact
            self.gram_store = self._square_zeros(capacity)
            self.gram_store[:, :used, :used] = self.divided_gram(None, self.exact)
            self._gram_version = self.version
        return self.gram_store

    def divided_gram(self, divisor: Tensor | None, exact: bool = False) -> Tensor:
        """``Σ_c gᵢ_c gⱼ_c / divisor_c`` in every block, float64 ``(B, m, m)``; divisor ``(n,)``, None for ones."""
        out = self._square_zeros(self.num_rows)
        dtype = torch.float64 if exact else self.dtype
        for part in self.parts:
            here = None if divisor is None else divisor[part.columns].to(part.rows.device)
            out[part.blocks] += tiles.gram(part.rows, here, dtype).to(self.device)
        return out

    def transformed(self, triangular: Tensor, divisor: Tensor | None) -> "SplitRows":
        """Rows ``T G`` with lower triangular T ``(B, m, m)``, columns divided by `divisor`; stored in `dtype`."""
        tensors = []
        for part in self.parts:
            device = part.rows.device
            tensor = tiles.transformed(part.rows, triangular[part.blocks].to(device), self.dtype)
            if divisor is not None:
                tensor /= divisor[part.columns].to(device).view(len(tensor), 1, -1)
            tensors.append(tensor)
        return SplitRows(self.ranges, tensors, self.num_rows)

    def column(self, i: int) -> tuple[Tensor, int]:
        """Entry i of every row, ``(m,)``, and the block it lies in."""
        part = next(part for part in self.parts if i < part.columns.stop)
        block, entry = divmod(i - part.columns.start, part.rows.shape[2])
        return part.rows[block, :, entry].to(self.device), part.blocks.start + block

    def write(self, i: int, g: Tensor) -> None:
        """Row i becomes g, ``(n,)``, rounded to `storage`; ``i = num_rows`` appends one. One pass over the rows.

        For rows made by `empty_rows`: those of `split_rows` may be the caller's own tensor.

        Raises:
            FloatingPointError: NaN or infinity in g, or in its products with the rows; nothing has changed then.
        """
        rounded = g.detach().to(self.storage).unsqueeze(0)
        row = SplitRows(self.ranges, _cut(rounded, self.ranges, self.storage), 1)
        products = self.products(rounded.to(self.dtype), torch.float64 if self.exact else None)[:, 0]
        square = row.divided_gram(None, self.exact)[:, 0, 0]
        if not torch.stack([products.isfinite().all(), square.isfinite().all()]).all():
            raise FloatingPointError(
                f"row {i} has NaN or infinite entries, or its products overflow {self.dtype}; it was not stored. Skip"
                f" this gradient, or scale it down."
            )
        gram = self._current_store()
        for tensor, piece in zip(self.tensors, row.tensors, strict=True):
            tensor[:, i] = piece[:, 0]
        self.num_rows = max(self.num_rows, i + 1)
        gram[:, i, : products.shape[1]] = gram[:, : products.shape[1], i] = products
        gram[:, i, i] = square
        self._num_writes += 1
        self._gram_version = self.version

    def restore(self, tensors: list[Tensor], gram: Tensor, num_rows: int, exact: bool) -> None:
        """Copy the state of rows of the same layout."""
        for mine, other in zip(self.tensors, tensors, strict=True):
            mine.copy_(other)
        self.gram_store = gram.to(self.device, copy=True)
        self.num_rows, self.exact = num_rows, exact
        self._num_writes += 1
        self._gram_version = self.version

    def _square_zeros(self, m: int) -> Tensor:
        return torch.zeros(self.num_blocks, m, m, dtype=torch.float64, device=self.device)


def _ranges(size: int, blocks: int | Sequence[int] | None, devices: Sequence[torch.device | str]) -> list[Range]:
    if not devices:
        raise ValueError("rows need at least one device; got an empty list. None takes that of the rows.")
    places = [torch.empty(0, device=device).device for device in devices]  # with their index, as tensors carry it
    sizes, count = _sizes(size, blocks), len(places)
    if len(sizes) == 1:
        bounds = [-(-size * share // count) for share in range(count + 1)]
        cuts = zip(bounds[:-1], bounds[1:], places, strict=True)
        return [Range(slice(start, stop), slice(0, 1), device) for start, stop, device in cuts if stop > start]
    starts = list(accumulate(sizes, initial=0))
    shares = [start * count // size for start in starts[:-1]]
    ranges, block = [], 0
    for (_, share), group in groupby(zip(sizes, shares, strict=True)):
        stop = block + len(list(group))
        ranges.append(Range(slice(starts[block], starts[stop]), slice(block, stop), places[share]))
        block = stop
    return ranges


def _sizes(size: int, blocks: int | Sequence[int] | None) -> list[int]:
    if size < 1:
        raise ValueError(f"rows need at least one column; got n = {size}.")
    if blocks is None:
        return [size]
    if isinstance(blocks, int):
        check_count("split_rows", "blocks", blocks)
        return [blocks] * (size // blocks) + [size % blocks] * (size % blocks > 0)
    if min(blocks, default=0) < 1 or sum(blocks) != size:
        raise ValueError(f"blocks must be positive sizes that add up to n = {size}; got {list(blocks)}.")
    return list(blocks)


def _shape(place: Range) -> tuple[int, int]:
    """How many blocks, and their width."""
    count = place.blocks.stop - place.blocks.start
    return count, (place.columns.stop - place.columns.start) // count


def _cut(rows: Tensor, ranges: list[Range], storage: torch.dtype | None) -> list[Tensor]:
    """``(m, n)`` as one ``(b, m, s)`` per range; views where dtype and device are the same."""
    return [
        rows.detach()[:, place.columns].unflatten(1, _shape(place)).transpose(0, 1).to(place.device, storage)
        for place in ranges
    ]
