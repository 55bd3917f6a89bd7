"""How well the assumptions behind derivatives of a conic program hold."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad import projections


class Regularity(NamedTuple):
    """How well the assumptions of `ConicProgram` hold at a point.

    Attributes:
        regularity: Smallest singular value of the Jacobian divided by the largest; no unit. At 0 the solution or its
            dual is not unique.
        num_undetermined: Singular values that are zero up to rounding: directions that the residual does not fix.
        margin: How far s - y is from the nearest kink of the projection: the distance for linear, second-order and
            semidefinite cones, a measure of it for exponential cones. At 0 the solution map has a kink there, and what
            is computed is one of its one-sided derivatives. Infinite without such cones.
        residual: Norm of the residual.
    """

    regularity: float
    num_undetermined: int
    margin: float
    residual: float

    def notes(self, margin_tol: float = 1e-6) -> list[str]:
        """The same in words, for a report."""
        found = [f"regularity {self.regularity:.1e}, distance to a kink {self.margin:.1e}"]
        if self.num_undetermined:
            found.append(
                f"the solution or its dual is not unique: {self.num_undetermined} directions are undetermined; drop "
                "redundant constraints, or solve linear systems in the least-squares sense"
            )
        if self.margin < margin_tol:
            found.append("strict complementarity fails (no derivative there, a one-sided one is used)")
        return found


def rank_tolerance(size: int, dtype: torch.dtype) -> float:
    """The share of the largest singular value of a matrix of this size below which one counts as zero."""
    return max(1e-11, 10 * size * torch.finfo(dtype).eps)


def distance_to_kink(kind: str, point: Tensor) -> Tensor:
    """How far rows `(count, length)` are from where the projection onto a cone of that kind has a kink."""
    if kind == "zero":
        return torch.full_like(point, torch.inf)
    if kind == "nonnegative":
        return point.abs()
    if kind == "second_order":
        norm = torch.linalg.vector_norm(point[..., 1:], dim=-1)
        return (point[..., 0].abs() - norm).abs() / 2**0.5
    if kind == "psd":
        return torch.linalg.eigvalsh(_unpacked(point)).abs()
    nearest = projections.exponential_cone(point)
    sizes = torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in (nearest, point - nearest)])
    u, v, w = point.unbind(-1)
    inside, polar = (w - v * (u / v).exp()).abs(), (torch.e * w + u * (v / u).exp()).abs()
    margin = torch.where(sizes[1] == 0, inside, torch.where(sizes[0] == 0, polar, sizes.amin(0)))
    return margin.nan_to_num(nan=0.0)  # on the flat part of the boundary


def _unpacked(rows: Tensor) -> Tensor:
    """Symmetric matrices `(count, k, k)`, zero above the diagonal, from `(count, k (k + 1) / 2)`."""
    size = (math.isqrt(8 * rows.shape[-1] + 1) - 1) // 2
    column, row = torch.triu_indices(size, size, device=rows.device)
    matrix = rows.new_zeros(*rows.shape[:-1], size, size)
    matrix[..., row, column] = torch.where(row == column, rows, rows / 2**0.5)
    return matrix
