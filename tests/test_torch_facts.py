"""Operations whose second derivatives are missing, wrong or fatal on some route in torch: right here, or a clear error.

Each case is a loss of `(x, y)` that is made stationary at a given `y` by a linear term. The reference uses first-order
gradients only: their central differences give `A` and `B`, and the implicit function theorem the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import implicitgrad as ig

N = 12


@dataclass(frozen=True)
class Operation:
    name: str
    build: Callable[[], Callable[[Tensor], Tensor]]  # makes a function from (6, N) features to (6, k) outputs
    functional: bool = True  # torch.func routes work; else they must raise
    random: bool = False  # draws random numbers, which torch forbids inside the vmap of jacrev and jacfwd


def _module(make: Callable[[], nn.Module], train: bool = True) -> Callable[[], Callable[[Tensor], Tensor]]:
    def build() -> Callable[[Tensor], Tensor]:
        net = make().train(train)
        net_fn = ig.functional(net)
        params = net_fn.parameters()
        return lambda h: net_fn(params, h)

    return build


def _plain(fn: Callable[[Tensor], Tensor]) -> Callable[[], Callable[[Tensor], Tensor]]:
    return lambda: fn


_target = torch.linspace(-1, 1, 6 * N, dtype=torch.float64).reshape(6, N)
_labels = torch.tensor([0, 3, 1, 2, 5, 4])


class _Sequence(nn.Module):
    """Runs a sequence layer on rows as one sequence and drops extra outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        out = self.layer(h.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(N, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        h = h.unsqueeze(0)
        return self.attention(h, h, h, need_weights=False)[0].squeeze(0)


class _OnceOnly(torch.autograd.Function):
    """A kernel with a hand-written gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        return g * h.cos()


OPERATIONS = [
    Operation("hand-written mse", _plain(lambda h: ((h - _target) ** 2).mean(-1))),
    Operation("mse_loss", _plain(lambda h: F.mse_loss(h, _target).reshape(1))),
    Operation("cross_entropy", _plain(lambda h: F.cross_entropy(h, _labels).reshape(1))),
    Operation("bce_with_logits", _plain(lambda h: F.binary_cross_entropy_with_logits(h, _target.sigmoid()).reshape(1))),
    Operation("softplus", _plain(F.softplus)),
    Operation("smooth_l1", _plain(lambda h: F.smooth_l1_loss(h, _target, beta=5.0).reshape(1))),
    Operation("huber", _plain(lambda h: F.huber_loss(h, _target, delta=5.0).reshape(1))),
    Operation(
        "kl_div",
        _plain(lambda h: F.kl_div(h.log_softmax(-1), _target.log_softmax(-1), log_target=True, reduction="sum")[None]),
    ),
    *[Operation(f.__name__, _plain(f)) for f in (F.relu, F.gelu, F.silu, F.elu, torch.sigmoid, torch.tanh)],
    Operation("conv and pooling", _module(lambda: nn.Sequential(nn.Conv1d(6, 4, 3), nn.Tanh(), nn.AvgPool1d(2)))),
    Operation("group norm", _module(lambda: nn.GroupNorm(3, N))),
    Operation("layer norm", _module(lambda: nn.LayerNorm(N))),
    Operation("batch norm in training mode", _module(lambda: nn.BatchNorm1d(N))),
    Operation("embedding-like product", _plain(lambda h: F.embedding(_labels, h))),
    Operation("gru", _module(lambda: _Sequence(nn.GRU(N, 5, batch_first=True)))),
    Operation("lstm", _module(lambda: _Sequence(nn.LSTM(N, 5, batch_first=True)))),
    Operation("weight norm held fixed", _module(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(N, 4)))),
    Operation("weight norm", _plain(lambda h: torch._weight_norm(h, torch.ones(6, 1, dtype=h.dtype), 0))),
    Operation("dropout", _module(lambda: nn.Sequential(nn.Linear(N, N), nn.Dropout(0.5), nn.Tanh())), random=True),
    Operation(
        "scaled_dot_product_attention",
        _plain(lambda h: F.scaled_dot_product_attention(h[None, None], h[None, None], h[None, None])[0, 0]),
    ),
    Operation("multi-head attention", _module(_SelfAttention)),
    Operation(
        "transformer layer",
        _module(lambda: _Sequence(nn.TransformerEncoderLayer(N, 2, 16, dropout=0.1, batch_first=True))),
        random=True,
    ),
    Operation(
        "transformer layer without dropout",
        _module(lambda: _Sequence(nn.TransformerEncoderLayer(N, 2, 16, dropout=0.0, batch_first=True))),
    ),
    Operation("cdist", _plain(lambda h: torch.cdist(h, _target)), functional=False),
    Operation("once differentiable kernel", _plain(_OnceOnly.apply), functional=False),
    Operation(
        "checkpoint",
        _plain(lambda h: checkpoint(lambda h: h.sin().exp(), h, use_reentrant=False)),
        functional=False,
    ),
]


@dataclass
class Problem:
    """A loss with a stationary point at `y`, and its derivative there by differences of first-order gradients."""

    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        return torch.autograd.grad(self.loss(x, y), y)[0].detach()

    def differences(self, fn: Callable[[Tensor], Tensor], point: Tensor, step: float = 1e-4) -> Tensor:
        """Fourth-order central differences of `fn`, one column per coordinate of `point`."""
        columns = []
        for unit in torch.eye(len(point), dtype=point.dtype):
            near = fn(point + step * unit) - fn(point - step * unit)
            far = fn(point + 2 * step * unit) - fn(point - 2 * step * unit)
            columns.append((8 * near - far) / (12 * step))
        return torch.stack(columns, -1)

    def jacobian(self) -> Tensor:
        """`dy/dx`, `(N, 3)`."""
        a = self.differences(lambda y: self.gradient(self.x, y), self.y)
        b = self.differences(lambda x: self.gradient(x, self.y), self.x)
        return -torch.linalg.solve(a, b)


def _problem(operation: Operation) -> Problem:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        features, mix = torch.randn(6, N), torch.randn(3, N)
        apply = operation.build()
        y, x = torch.randn(N), torch.tensor([0.3, -0.2, 0.5])
    finally:
        torch.set_default_dtype(torch.float32)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        h = features * (1 + 0.3 * y + 0.1 * (x @ mix))
        return apply(h).sin().sum() + 4 * (y * y).sum() + 0.1 * (x @ mix * y * y).sum()

    problem = Problem(loss, x, y)
    slope = problem.gradient(x, y)
    return Problem(lambda x, y: loss(x, y) - slope @ y, x, y)


def _solution(problem: Problem, **options) -> Callable[[Tensor], Tensor]:
    return lambda x: ig.implicit_root(ig.Stationary(problem.loss), x, problem.y, **options)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_reverse_mode_equals_differences_of_first_order_gradients(operation: Operation) -> None:
    problem = _problem(operation)
    x = problem.x.clone().requires_grad_()
    y = _solution(problem)(x)
    rows = [torch.autograd.grad(y[i], x, retain_graph=True)[0] for i in range(N)]
    error = (torch.stack(rows) - problem.jacobian()).abs().max() / problem.jacobian().abs().max()
    # where double backward is missing, the products themselves are central differences, good to about 1e-7
    assert error < (1e-8 if operation.name not in ("cdist", "once differentiable kernel") else 1e-6)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("mode", ["jacrev", "jacfwd"])
def test_functional_transforms_are_right_or_raise(operation: Operation, mode: str) -> None:
    problem = _problem(operation)
    transform = getattr(torch.func, mode)
    if not operation.functional or operation.random:
        with pytest.raises(RuntimeError, match="random" if operation.random else None):
            transform(_solution(problem))(problem.x)
        return
    error = (transform(_solution(problem))(problem.x) - problem.jacobian()).abs().max()
    assert error < 1e-8 * problem.jacobian().abs().max()


SECOND_ORDER = [operation for operation in OPERATIONS if operation.functional]


@pytest.mark.parametrize("operation", SECOND_ORDER, ids=lambda operation: operation.name)
def test_second_derivatives_equal_differences_of_first_ones(operation: Operation) -> None:
    problem = _problem(operation)
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)

    def slope(x: Tensor, create_graph: bool = False) -> Tensor:
        """Gradient of `weights · y` at the solution near `y`, found by Newton's method on differences."""
        y = problem.y.clone()
        for _ in range(4):
            step = problem.differences(lambda y: problem.gradient(x.detach(), y), y)
            y = y - torch.linalg.solve(step, problem.gradient(x.detach(), y))
        y = ig.implicit_root(ig.Stationary(problem.loss), x, y)
        return torch.autograd.grad(weights @ y, x, create_graph=create_graph)[0]

    x = problem.x.clone().requires_grad_()
    exact = torch.stack([torch.autograd.grad(g, x, retain_graph=True)[0] for g in slope(x, create_graph=True)])
    reference = problem.differences(lambda x: slope(x.requires_grad_()), problem.x, step=1e-3)
    # two levels of differences and kinks of ReLU nearby leave the reference good to about 1e-8
    assert (exact - reference).abs().max() < 1e-6 * reference.abs().max()
