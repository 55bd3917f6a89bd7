"""Influence scores by pyDVL."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, Tensor]

pydvl: Any
try:
    import pydvl  # pyright: ignore[reportMissingImports]
    from pydvl.influence.torch import CgInfluence, DirectInfluence  # pyright: ignore[reportMissingImports]
except ImportError:
    pydvl = None


def pydvl_scores(
    method: Literal["direct", "CG", "block CG"],
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    penalty: float,
    train: Batch,
    test: Batch,
) -> Tensor:
    """`⟨H⁻¹∇loss_t, ∇loss_i⟩ / N`, `(T, N)`, with pyDVL's own tolerances."""
    batches = DataLoader(TensorDataset(*train), batch_size=len(train[0]))
    if method == "direct":
        model = DirectInfluence(net, loss, regularization=penalty)
    else:
        model = CgInfluence(net, loss, regularization=penalty, solve_simultaneously=method == "block CG")
    return model.fit(batches).influences(*test, *train) / len(train[0])
