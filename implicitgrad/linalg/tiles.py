"""Products with blocks of rows ``(b, m, s)`` (b blocks, m rows, s columns) in a dtype that may be another than theirs.

A vector beside them is ``(k, b * s)``, right-hand sides first, blocks one after the other. Rows in another dtype are
converted tile by tile, so nothing of the size of the rows is ever made.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers of a tile that is converted: few enough for a cache, enough to hide the calls. Products sum up over tiles of
# few rows and many columns: in float64, with rows of 256 x 200 000 in float32 on one CPU core, they took 2.5 times the
# time of unconverted ones so, 5 times with tiles of all rows, and 3.5 times with tiles of 2¹⁷ numbers.
TILE_ON_CPU, TILE_ELSEWHERE = 2**19, 2**24
HEIGHT = 8
# Rows of a symmetric or triangular matrix at a time; the half that is known is skipped: 0.68 times the time at m = 512.
STEP = 128


class Tile(NamedTuple):
    """Some columns of some blocks."""

    rows: Tensor  # (b', m, s')
    blocks: slice  # which b' of the b blocks
    columns: slice  # which of the b * s entries of a vector


def products(rows: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """``<gᵢ, v>`` block by block: rows ``(b, m, s)`` and v ``(k, b * s)`` to float64 ``(b, k, m)``."""
    if rows.dtype == dtype:
        return _products(rows, v).double()
    b, m, _ = rows.shape
    out = rows.new_zeros(b, v.shape[0], m, dtype=torch.float64)
    for tile in _tiles(rows, HEIGHT):
        here = v[:, tile.columns].to(dtype)
        for start in range(0, m, HEIGHT):
            part = tile.rows[:, start : start + HEIGHT].to(dtype)
            out[tile.blocks, :, start : start + HEIGHT] += _products(part, here)
    return out


def mixture(rows: Tensor, weights: Tensor, v: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """``beta v + Σ weightsᵢ gᵢ``: rows ``(b, m, s)``, weights ``(b, k, m)`` and v ``(k, b * s)`` to a tensor like v."""
    weights = weights.to(dtype)
    if rows.dtype == dtype:
        return _mixture(rows, weights, v, beta)
    out = v.new_empty(v.shape)
    for tile in _tiles(rows, HEIGHT):
        here = beta * v[:, tile.columns].to(dtype)
        for start in range(0, rows.shape[1], HEIGHT):
            part = tile.rows[:, start : start + HEIGHT].to(dtype)
            here = _mixture(part, weights[tile.blocks, :, start : start + HEIGHT], here, 1.0)
        out[:, tile.columns] = here
    return out


def gram(rows: Tensor, divisor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``Σ_c gᵢ_c gⱼ_c / divisor_c`` for every block, float64 ``(b, m, m)``; divisor ``(b * s,)``, None for ones."""
    b, m, _ = rows.shape
    out = rows.new_zeros(b, m, m, dtype=torch.float64)
    for tile in _tiles(rows, m):
        part = tile.rows.to(dtype)
        other = part if divisor is None else part / _by_blocks(divisor[tile.columns].to(dtype).unsqueeze(0), part)
        for start in range(0, m, STEP):
            stop = start + STEP
            out[tile.blocks, start:stop, :stop] += other[:, start:stop] @ part[:, :stop].mT
    return out.tril() + out.tril(-1).mT


def transformed(rows: Tensor, triangular: Tensor, dtype: torch.dtype) -> Tensor:
    """``T G`` block by block with lower triangular T ``(b, m, m)``: ``(b, m, s)`` in `dtype`."""
    triangular, m = triangular.to(dtype), rows.shape[1]
    out = torch.empty_like(rows, dtype=dtype)
    for tile in _tiles(rows, m):
        part, first = tile.rows.to(dtype), tile.columns.start - tile.blocks.start * rows.shape[2]
        target = out[tile.blocks, :, first : first + part.shape[2]]
        for start in range(0, m, STEP):
            stop = start + STEP
            target[:, start:stop] = triangular[tile.blocks, start:stop, :stop] @ part[:, :stop]
    return out


def _tiles(rows: Tensor, height: int) -> Iterator[Tile]:
    """Whole blocks, as many as fit, or columns of one block, if `height` rows at a time are to be a tile."""
    b, _, s = rows.shape
    width = max(1, (TILE_ON_CPU if rows.device.type == "cpu" else TILE_ELSEWHERE) // max(1, height))
    step = max(1, width // s)
    for first in range(0, b, step):
        last = min(first + step, b)
        for start in range(0, s, width):
            stop = min(start + width, s)
            columns = slice(first * s + start, (last - 1) * s + stop)
            yield Tile(rows[first:last, :, start:stop], slice(first, last), columns)


def _by_blocks(v: Tensor, rows: Tensor) -> Tensor:
    """``(k, b * s) -> (b, k, s)``, a view."""
    return v.unflatten(1, (rows.shape[0], rows.shape[2])).transpose(0, 1)


def _products(rows: Tensor, v: Tensor) -> Tensor:
    if rows.shape[0] > 1:
        return _by_blocks(v, rows) @ rows.mT
    if v.shape[0] == 1:  # a matrix-vector product is up to twice as fast as a product with one column
        return torch.mv(rows[0], v[0]).expand(1, 1, -1)
    return (v @ rows[0].mT).unsqueeze(0)


def _mixture(rows: Tensor, weights: Tensor, v: Tensor, beta: float) -> Tensor:
    # one fused pass: the separate sum cost a third of the time at m = 64
    if rows.shape[0] > 1:
        return torch.baddbmm(_by_blocks(v, rows), weights, rows, beta=beta).transpose(0, 1).flatten(1)
    if v.shape[0] == 1:
        return torch.addmv(v[0], rows[0].mT, weights[0, 0], beta=beta).unsqueeze(0)
    return torch.addmm(v, weights[0], rows[0], beta=beta)
