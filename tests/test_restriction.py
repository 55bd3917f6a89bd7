"""Linear systems of sparse solutions are solved on the support alone, and derivatives do not notice."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.linalg import CG, LU, Cholesky

N, D = 30, 12


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    X = torch.randn(N, D, generator=draw)
    return X, X[:, :4] @ torch.tensor([2.0, -1.5, 1.0, 0.7]) + 0.1 * torch.randn(N, generator=draw)


@dataclass(frozen=True)
class Lasso(ig.OptimalityCondition):
    """`y = soft(y - s ∇f(y), s exp(x))` with `f = ‖X y - t‖² / 2N`, `s = 0.1`."""

    restricted: bool = True
    symmetric_on_support = True

    def residual(self, x: Tensor, y: Tensor, X: Tensor, t: Tensor) -> Tensor:
        moved = y - 0.1 * X.T @ (X @ y - t) / N
        return y - moved.sign() * (moved.abs() - 0.1 * x.exp()).clamp(min=0)

    def support(self, x: Tensor, y: Tensor, X: Tensor, t: Tensor) -> Tensor | None:
        return y != 0 if self.restricted else None


def solve(x: Tensor, X: Tensor, t: Tensor) -> Tensor:
    y = torch.zeros(D)
    for _ in range(20_000):
        moved = y - 0.1 * X.T @ (X @ y - t) / N
        y = moved.sign() * (moved.abs() - 0.1 * x.exp()).clamp(min=0)
    return y


def closed_form(x: Tensor, X: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """On the support of y, with its signs."""
    S = y != 0
    gram = X[:, S].T @ X[:, S] / N
    inside = torch.linalg.inv(gram) @ (X[:, S].T @ t / N - x.exp() * y[S].sign())
    return torch.zeros(D).index_put((S.nonzero().squeeze(-1),), inside)


PENALTY = torch.tensor(-1.5, dtype=torch.float64)


@pytest.mark.parametrize("solver", [None, CG(), Cholesky(), LU()], ids=str)
def test_gradients_equal_those_of_the_closed_form(solver):
    X, t = data()
    y = solve(PENALTY, X, t)
    assert 2 <= int((y != 0).sum()) < D
    inputs = [PENALTY.clone().requires_grad_(), X.clone().requires_grad_(), t.clone().requires_grad_()]
    with ig.diagnostics() as log:
        root = ig.implicit_root(Lasso(), inputs[0], y, *inputs[1:], solver=solver)
        got = torch.autograd.grad(root.square().sum(), inputs)
    wanted = torch.autograd.grad(closed_form(*inputs, y).square().sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert log[-1].support == int((y != 0).sum())
    assert f"support of {log[-1].support}" in str(log)


def test_whole_and_restricted_systems_agree_in_every_mode():
    X, t = data()
    y = solve(PENALTY, X, t)
    root = lambda restricted: lambda x: ig.implicit_root(Lasso(restricted), x, y, X, t)
    for transform in (
        torch.func.jacrev,
        torch.func.jacfwd,
        lambda f: torch.func.jacrev(torch.func.jacrev(f)),
        lambda f: torch.func.jacfwd(torch.func.jacrev(f)),
    ):
        whole, restricted = transform(root(False))(PENALTY), transform(root(True))(PENALTY)
        torch.testing.assert_close(restricted, whole, rtol=1e-8, atol=1e-10)


def test_a_stack_of_problems_has_a_support_each():
    X, t = data()
    penalties = torch.tensor([-3.0, -1.5, -0.5])
    ys = torch.stack([solve(x, X, t) for x in penalties])
    assert len({int((y != 0).sum()) for y in ys}) > 1
    slope = lambda x, y: torch.func.grad(lambda x: ig.implicit_root(Lasso(), x, y, X, t).square().sum())(x)
    wanted = torch.stack([slope(x, y) for x, y in zip(penalties, ys, strict=True)])
    with ig.diagnostics() as log:
        got = torch.func.vmap(slope)(penalties, ys)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    assert log[-1].support == max(int((y != 0).sum()) for y in ys)


def test_an_empty_support_needs_no_system():
    X, t = data()
    x = torch.tensor(5.0, requires_grad=True)
    with ig.diagnostics() as log:
        ig.implicit_root(Lasso(), x, torch.zeros(D), X, t).sum().backward()
    assert x.grad == 0 and log[-1].support == 0 and log[-1].last.converged


def test_a_false_claim_about_symmetry_is_found_out():
    rotation = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])

    class Twisted(ig.OptimalityCondition):
        symmetric_on_support = True

        def residual(self, x, y):
            return rotation @ y - x

        def support(self, x, y):
            return torch.tensor([True, True, False])

    x = torch.tensor([1.0, 1.0, 0.0], requires_grad=True)
    y = ig.implicit_root(Twisted(), x, torch.linalg.solve(rotation, x.detach()))
    with pytest.raises(ValueError, match="leave that declaration out"):
        y[0].backward()
