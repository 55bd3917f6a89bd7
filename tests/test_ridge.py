"""Ridge regression with one penalty per feature, at a real size: the closed form is the judge."""

import pytest
import torch
from torch import Tensor

import implicitgrad as ig

N, D = 500, 200


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    return {"X": random(N, D), "t": random(N), "X_val": random(300, D), "t_val": random(300), "x": 0.3 * random(D)}


def ridge(x: Tensor, y: Tensor, X: Tensor, t: Tensor) -> Tensor:
    return 0.5 * ((X @ y - t) ** 2).mean() + 0.5 * (x.exp() * y**2).sum()


def closed_form(x: Tensor, X: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.inv(X.T @ X / len(t) + x.exp().diag()) @ (X.T @ t / len(t))


def validation(data: dict[str, Tensor], y: Tensor) -> Tensor:
    return 0.5 * ((data["X_val"][:, : len(y)] @ y - data["t_val"]) ** 2).mean()


def test_default_settings_give_the_closed_form_with_200_penalties(data: dict[str, Tensor]) -> None:
    x = data["x"].clone().requires_grad_()
    y = closed_form(x, data["X"], data["t"])
    (exact,) = torch.autograd.grad(validation(data, y), x)
    implicit = ig.implicit_root(ig.Stationary(ridge), x, y, data["X"], data["t"])
    (got,) = torch.autograd.grad(validation(data, implicit), x)
    assert torch.linalg.vector_norm(got - exact) < 1e-9 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("offset", [1e-1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("solver", [ig.linalg.Auto(), ig.linalg.CG()], ids=["dense", "krylov"])
def test_error_estimate_equals_the_true_error(
    data: dict[str, Tensor], offset: float, solver: ig.linalg.LinearSolver
) -> None:
    x = data["x"].clone().requires_grad_()
    y = closed_form(x, data["X"], data["t"])
    (exact,) = torch.autograd.grad(validation(data, y), x, retain_graph=True)
    direction = torch.linspace(-1, 1, D, dtype=torch.float64)
    off = y.detach() + offset * y.detach().norm() * direction / direction.norm()
    h = ig.hypergradient(
        lambda x, y: validation(data, y),
        ig.Stationary(ridge),
        x,
        off,
        data["X"],
        data["t"],
        solver=solver,
        on_unconverged="ignore",
    )
    error = torch.linalg.vector_norm(h.value - exact).item()
    # the loss is quadratic in y, so the Newton-corrected point is exact up to the linear solver's 1e-10
    assert h.error_estimate == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    "second",
    [
        torch.func.hessian,
        lambda f: torch.func.jacrev(torch.func.jacrev(f)),
        lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
        lambda f: lambda x: torch.autograd.functional.hessian(f, x),
    ],
    ids=["forward over reverse", "reverse over reverse", "reverse over forward", "eager"],
)
def test_second_derivatives_with_5_penalties_equal_those_of_the_closed_form(data: dict[str, Tensor], second) -> None:
    X, t, x = data["X"][:40, :5], data["t"][:40], data["x"][:5]
    fit = ig.implicit(ig.Stationary(ridge))(closed_form)
    got = second(lambda x: validation(data, fit(x, X, t)))(x)
    exact = torch.autograd.functional.hessian(lambda x: validation(data, closed_form(x, X, t)), x)
    assert (got - exact).abs().max() < 1e-8 * exact.abs().max()
