"""How well the assumptions behind derivatives of a constrained minimiser hold."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Qualification(NamedTuple):
    """How well the assumptions of `KKT` and `QP` hold at a point.

    Attributes:
        num_active: Inequalities taken as active.
        num_inequalities: All of them.
        independence: Smallest singular value of the normalised gradients of equalities and active inequalities; no
            unit. At 0 they are linearly dependent (LICQ fails); 1 if there are none.
        complementarity: Smallest `max(multiplier, slack)` of an inequality; infinite if there are none.
        infeasibility: Largest violation of a constraint.
        smallest_multiplier: Of the inequalities; a negative one belongs to no minimiser. 0 if there are none.
        weakly_active: Names of inequalities with multiplier and slack both below `active_tol`. The solution map has a
            kink there and no derivative; what is computed is one of its one-sided derivatives.
    """

    num_active: int
    num_inequalities: int
    independence: float
    complementarity: float
    infeasibility: float
    smallest_multiplier: float
    weakly_active: list[str]

    def notes(self, active_tol: float) -> list[str]:
        """The same in words, for a report."""
        found = [
            f"{self.num_active} of {self.num_inequalities} inequalities active, complementarity "
            f"{self.complementarity:.1e}, independence of active gradients {self.independence:.1e}, infeasibility "
            f"{self.infeasibility:.1e}"
        ]
        if self.weakly_active:
            found.append(f"weakly active (no derivative there, a one-sided one is used): {_listed(self.weakly_active)}")
        if self.independence < 1e-10:
            found.append("the gradients of active constraints are linearly dependent (LICQ fails): drop redundant ones")
        if self.infeasibility > active_tol:
            found.append(f"the point violates a constraint by {self.infeasibility:.1e}")
        if self.smallest_multiplier < -active_tol:
            found.append(f"a multiplier is negative ({self.smallest_multiplier:.1e}): this is no minimiser")
        return found


def qualify(
    equality: Tensor, inequality: Tensor, multipliers: Tensor, rows: Tensor, names: list[str], active_tol: float
) -> Qualification:
    """Measure the assumptions at one point.

    Args:
        equality: Values h, `(p,)`.
        inequality: Values g, `(m,)`.
        multipliers: Of the inequalities, `(m,)`.
        rows: Gradients of equalities, then of inequalities, `(p + m, n)`.
        names: Of the inequalities.
        active_tol: Multipliers and slacks below this are zero.
    """
    active = is_active(multipliers, inequality)
    chosen = rows[torch.cat([torch.ones_like(equality, dtype=torch.bool), active])]
    independence = 1.0
    if len(chosen):
        norms = torch.linalg.vector_norm(chosen, dim=-1, keepdim=True)
        values = torch.linalg.svdvals(chosen / torch.where(norms > 0, norms, 1))
        independence = values.min().item() if chosen.shape[0] <= chosen.shape[1] else 0.0
    margin = torch.maximum(multipliers, -inequality)
    violation = torch.cat([equality.abs(), inequality.clamp(min=0)])
    return Qualification(
        num_active=int(active.sum()),
        num_inequalities=len(inequality),
        independence=independence,
        complementarity=margin.min().item() if len(margin) else math.inf,
        infeasibility=violation.max().item() if len(violation) else 0.0,
        smallest_multiplier=multipliers.min().item() if len(multipliers) else 0.0,
        weakly_active=[name for name, small in zip(names, (margin < active_tol).tolist(), strict=True) if small],
    )


def is_active(multiplier: Tensor, value: Tensor) -> Tensor:
    """Which inequalities `value <= 0` hold with equality: those whose multiplier exceeds their slack."""
    return multiplier > -value


def check_active_tol(active_tol: float) -> None:
    """Raise unless `active_tol` is a positive number."""
    if not 0 < active_tol < math.inf:
        raise ValueError(f"active_tol must be a positive number, got {active_tol}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
