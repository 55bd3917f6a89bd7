"""Small models with data and loss, and dense matrices of them by roads that share nothing with the library."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import implicitgrad as ig
from implicitgrad import tree


class Problem(NamedTuple):
    """`loss(model(y, inputs), targets)`."""

    model: Callable
    loss: Callable[[Tensor, Tensor], Tensor]
    y: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor

    def objective(self, y: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.model(y, inputs), targets)

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(tokens, tokens, tokens)[0].mean(1))


def _mlp(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *extra, nn.Tanh(), nn.Linear(6, 3))


def _conv(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), *extra, nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


NETS = {
    "logistic": (lambda: nn.Linear(4, 3), (4,), F.cross_entropy),
    "mlp": (_mlp, (4,), F.cross_entropy),
    "mlp with mse": (_mlp, (4,), F.mse_loss),
    "conv": (_conv, (1, 6, 6), F.cross_entropy),
    "layer norm": (lambda: _mlp(nn.LayerNorm(6)), (4,), F.mse_loss),
    "group norm": (lambda: _conv(nn.GroupNorm(2, 4)), (1, 6, 6), F.binary_cross_entropy_with_logits),
    "attention": (Attention, (3, 4), F.cross_entropy),
    "sum of losses": (_mlp, (4,), nn.CrossEntropyLoss(reduction="sum")),
}


def problem(name: str, num: int = 9, dtype: torch.dtype = torch.float64) -> Problem:
    make, shape, loss = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double()
        inputs = torch.randn(num, *shape, dtype=torch.float64)
        scores = torch.randn(num, 3, dtype=torch.float64)
    targets = scores.argmax(1)
    if loss is F.mse_loss:
        targets = scores.to(dtype)
    if loss is F.binary_cross_entropy_with_logits:
        targets = (scores > 0).to(dtype)
    model = ig.functional(net.to(dtype))
    return Problem(model, loss, model.parameters(), inputs.to(dtype), targets)


def dense_hessian(p: Problem) -> Tensor:
    """Central differences of first-order gradients, extrapolated once: errors near 1e-11 of the largest entry."""
    flat, unravel = tree.ravel(p.y)

    def gradient(vector: Tensor) -> Tensor:
        leaf = vector.clone().requires_grad_()
        return torch.autograd.grad(p.objective(unravel(leaf), *p.data), leaf)[0]

    def difference(step: float) -> Tensor:
        units = step * torch.eye(len(flat), dtype=flat.dtype)
        return torch.stack([(gradient(flat + e) - gradient(flat - e)) / (2 * step) for e in units])

    return (4 * difference(2e-4) - difference(4e-4)) / 3


def dense_jacobian(p: Problem) -> Tensor:
    """One row per output, each by a graph of its own."""
    flat, unravel = tree.ravel(p.y)
    leaf = flat.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        outputs = p.model(unravel(leaf), p.inputs).flatten()
    return torch.stack([torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in outputs])


def dense_gauss_newton(p: Problem) -> Tensor:
    """JᵀHJ with H by the formula of the loss."""
    J, z = dense_jacobian(p), p.model(p.y, p.inputs)
    count, width = z.shape
    if p.loss is F.mse_loss:
        blocks = torch.eye(width, dtype=z.dtype).expand(count, -1, -1) * 2 / z.numel()
    elif p.loss is F.binary_cross_entropy_with_logits:
        blocks = torch.diag_embed(z.sigmoid() * (1 - z.sigmoid())) / z.numel()
    else:
        prob = z.softmax(1)
        blocks = torch.diag_embed(prob) - prob.unsqueeze(2) * prob.unsqueeze(1)
        blocks = blocks if isinstance(p.loss, nn.Module) else blocks / count
    return J.T @ torch.block_diag(*blocks) @ J


def single_gradients(p: Problem) -> Tensor:
    """(N, n): the gradient of the loss of each example alone, one after the other."""
    flat, unravel = tree.ravel(p.y)
    rows = []
    for i in range(len(p.inputs)):
        leaf = flat.clone().requires_grad_()
        value = p.objective(unravel(leaf), p.inputs[i : i + 1], p.targets[i : i + 1])
        rows.append(torch.autograd.grad(value, leaf)[0])
    return torch.stack(rows)


def vectors(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def assert_near(got: Tensor, wanted: Tensor, rtol: float) -> None:
    """Error relative to the largest entry."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=rtol * wanted.abs().max().item())
