"""First guesses from systems solved before."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.rows import any_row, row_dot, safe_row_norm

# An outer step may solve for several kinds of right-hand side.
NUM_STARTS = 4


class Start(NamedTuple):
    """A solved system, divided by |b| row by row."""

    b: Tensor
    x: Tensor


class Starts(NamedTuple):
    """The last few of them; immutable. Those superseded by a newer one that is like them are let go first."""

    known: tuple[Start, ...] = ()

    def guess(self, b: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The solution of the earlier system whose right-hand side is most like b, scaled row by row.

        The factor minimises |x - x*| in the norm of A, so that a start helps however A has been scaled since; one that
        is far off would cost digits. Costs a product. Rows more than 45° away from the earlier one start from zero;
        None if all of them are.
        """
        nearest = self._nearest(b)
        if nearest is None:
            return None
        index, cosine, norm = nearest
        x = torch.where(cosine.square() > 0.5, 1, 0) * self.known[index].x
        image = product(x)
        curvature = row_dot(x, image)
        unit = b / torch.where(norm > 0, norm, 1)
        return torch.where(curvature > 0, row_dot(unit, x) / curvature, 0) * norm * x

    def with_solution(self, b: Tensor, x: Tensor) -> "Starts":
        """The same with a further system."""
        nearest = self._nearest(b)
        others = tuple(start for i, start in enumerate(self.known) if nearest is None or i != nearest[0])
        norm = safe_row_norm(b)
        divisor = torch.where(norm > 0, norm, 1)
        return Starts((*others, Start(b / divisor, x / divisor))[-NUM_STARTS:])

    @property
    def nbytes(self) -> int:
        """Memory."""
        return sum(start.b.nbytes + start.x.nbytes for start in self.known)

    def _nearest(self, b: Tensor) -> tuple[int, Tensor, Tensor] | None:
        """Index, cosines with its right-hand sides, and |b| of each row; None if no row is like an earlier one."""
        same = lambda known: (known.shape, known.dtype, known.device) == (b.shape, b.dtype, b.device)
        alike = [i for i, start in enumerate(self.known) if same(start.b)]
        if not alike:
            return None
        norm = safe_row_norm(b)
        unit = b / torch.where(norm > 0, norm, 1)
        cosines = torch.stack([row_dot(unit, self.known[i].b) for i in alike])
        best = int(cosines.square().reshape(len(alike), -1).mean(1).argmax())
        if not any_row(cosines[best].square() > 0.5):
            return None
        return alike[best], cosines[best], norm
