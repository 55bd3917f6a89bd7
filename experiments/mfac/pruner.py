"""Which weights of a network to set to zero, and how to change the others: optimal brain surgeon, and by magnitude."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from implicitgrad.linalg import LowRankInverse, split_rows

Choose = Callable[[Tensor], Tensor]


class Rule(Protocol):
    """A way to rank weights and to make up for those that go."""

    def prune(self, w: Tensor, rows: Callable[[], Tensor], choose: Choose) -> tuple[Tensor, Tensor]:
        """The weights with some of them set to zero, and the mask of these.

        Args:
            w: weights, `(n,)`, not changed.
            rows: gradients at w, `(m, n)`.
            choose: from what each weight is worth, `(n,)`, to the mask of those that go.
        """
        ...


@dataclass(frozen=True)
class Magnitude:
    """Prunes the smallest weights and leaves the others as they are."""

    def prune(self, w: Tensor, rows: Callable[[], Tensor], choose: Choose) -> tuple[Tensor, Tensor]:
        gone = choose(w.abs())
        return w.masked_fill(gone, 0), gone


@dataclass(frozen=True)
class BrainSurgeon:
    """Prunes the weights with the lowest `wᵢ² / 2(F⁻¹)ᵢᵢ`, the rise of a quadratic loss with curvature F.

    F is the damped empirical Fisher matrix `damping · I + 1/m Σ gᵢ gᵢᵀ` of the remaining weights, with gradients of
    batches as rows. The others change in one of two ways; with Q the weights that go and R those that stay,

        joint:  w_R ← w_R + (F_RR)⁻¹ F_RQ w_Q            the minimum of the quadratic loss with w_Q = 0
        single: w ← w - Σ_{i in Q} wᵢ / (F⁻¹)ᵢᵢ F⁻¹ eᵢ     then w_Q ← 0

    `single` adds the moves for pruning each weight alone, as if the others in Q stayed; the two agree for one weight.
    `joint` costs a second factorisation, m² n operations.

    Source: Hassibi and Stork (1993), Optimal brain surgeon; Frantar, Kurtic and Alistarh (2021), M-FAC, whose published
    code has `single`, blocks of remaining weights, and the ranking over all layers. `joint` over all pruned weights is
    exact only for the change; the ranking still looks at each weight alone, unlike the groups of Kurtic et al. (2022),
    The optimal BERT surgeon.

    Args:
        damping: λ.
        compensation: as above.
        block_size: F keeps this many consecutive weights coupled; None for all.

    Raises:
        ValueError: another compensation.
    """

    damping: float
    compensation: Literal["joint", "single"]
    block_size: int | None = None

    def __post_init__(self):
        if self.compensation not in ("joint", "single"):
            raise ValueError(f'compensation must be "joint" or "single"; got {self.compensation!r}.')

    def prune(self, w: Tensor, rows: Callable[[], Tensor], choose: Choose) -> tuple[Tensor, Tensor]:
        G = rows()
        F = self._fisher(G)
        diagonal = F.diagonal()
        gone = choose(w.square() / (2 * diagonal))
        if self.compensation == "single":
            change = F.apply(torch.where(gone, -w / diagonal, 0))
        else:
            pull = F.product(torch.where(gone, w, 0)).masked_fill(gone, 0)  # F_RQ w_Q
            # zero columns in place of Q: that matrix is F_RR beside a multiple of the identity
            change = self._fisher(G.masked_fill(gone, 0)).apply(pull, refine=1)
        return (w + change).masked_fill(gone, 0), gone

    def _fisher(self, G: Tensor) -> LowRankInverse:
        return LowRankInverse(split_rows(G, blocks=self.block_size), self.damping, 1 / len(G))


class Prunable:
    """The weights of linear and convolutional layers of a network as one vector; all other parameters stay as they are.

    Args:
        network: changed by `prune` and `apply_mask`.
        scope: "network" ranks all weights together; "layer" gives each layer the same sparsity.

    Raises:
        ValueError: there are no such layers; another scope.
    """

    def __init__(self, network: nn.Module, scope: Literal["network", "layer"] = "network"):
        if scope not in ("network", "layer"):
            raise ValueError(f'scope must be "network" or "layer"; got {scope!r}.')
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        weights: list[Tensor] = [layer.weight for layer in network.modules() if isinstance(layer, kinds)]
        self.parameters = list(dict.fromkeys(weights))  # a shared weight once
        if not self.parameters:
            raise ValueError("nothing to prune: the network has neither linear nor convolutional layers.")
        sizes = [p.numel() for p in self.parameters]
        self.groups = sizes if scope == "layer" else [sum(sizes)]
        self.kept = torch.ones(sum(sizes), dtype=torch.bool, device=self.parameters[0].device)

    @property
    def sparsity(self) -> float:
        """Share of pruned weights."""
        return 1 - float(self.kept.double().mean())

    def prune(self, rule: Rule, rows: Callable[[], Tensor], sparsity: float, num_steps: int = 1) -> None:
        """Raise the sparsity in steps that each keep the same share, with scores made anew in each.

        Args:
            rule: ranks and changes the weights.
            rows: gradients at the present weights, `(m, n)`; called at most once per step.
            sparsity: share of weights that are zero in the end, rounded to whole weights.
            num_steps: the more, the better scores of single weights hold for many.

        Raises:
            ValueError: a sparsity below the present one, or of 1 and more; no steps.
        """
        start, rounding = 1 - self.sparsity, len(self.groups) / len(self.kept)
        if not 1 - start - rounding <= sparsity < 1:
            raise ValueError(f"the sparsity is {1 - start:.4f} and can rise to below 1; got {sparsity}.")
        if num_steps < 1:
            raise ValueError(f"pruning needs at least one step; got num_steps={num_steps}.")
        for step in range(1, num_steps + 1):
            density = start * ((1 - sparsity) / start) ** (step / num_steps)
            w, before = self._vector(), self.kept
            choose = partial(self._lowest, density=density)
            w[before], gone = rule.prune(w[before], lambda: rows()[:, self.kept], choose)
            self.kept = before.clone()
            self.kept[before] = ~gone
            self._assign(w)

    def apply_mask(self) -> None:
        """Set what was pruned back to zero; after each step of an optimizer."""
        self._assign(self._vector())

    def _lowest(self, scores: Tensor, density: float) -> Tensor:
        """The mask within the remaining weights of those that go, so that each group keeps its rounded share."""
        gone = []
        remaining = [int(kept.sum()) for kept in self.kept.split(self.groups)]
        for size, part in zip(self.groups, scores.split(remaining), strict=True):
            mask = torch.zeros_like(part, dtype=torch.bool)
            num_gone = max(0, len(part) - round(size * density))
            mask[part.argsort(stable=True)[:num_gone]] = True
            gone.append(mask)
        return torch.cat(gone)

    def _vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @torch.no_grad()
    def _assign(self, w: Tensor) -> None:
        masked = w * self.kept
        for p, piece in zip(self.parameters, masked.split([p.numel() for p in self.parameters]), strict=True):
            p.copy_(piece.view_as(p))
