"""What is special to first-order solvers: any optimizer, stalls, domains, scales."""

import pytest
import torch
from scipy import optimize
from torch import Tensor

from implicitgrad.solvers import LBFGS, GradientDescent, TorchOptim
from implicitgrad.solvers.line_search import backtrack, wolfe

START = torch.tensor([3.0, -1.0]).double()


def bowl(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum() + 0.1 * y.pow(4).sum()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda y: torch.optim.Adam(y, lr=0.05),
        lambda y: torch.optim.AdamW(y, lr=0.05, weight_decay=0.0),
        lambda y: torch.optim.RMSprop(y, lr=0.001, momentum=0.5),
        lambda y: torch.optim.Rprop(y),
        lambda y: torch.optim.Adagrad(y, lr=1.0),
        lambda y: torch.optim.LBFGS(y, lr=0.5, max_iter=1, tolerance_grad=0.0, tolerance_change=0.0),
        lambda y: torch.optim.SGD([{"params": y[:1], "lr": 0.1}, {"params": y[1:], "lr": 0.2}], momentum=0.3),
    ],
)
def test_any_optimizer_of_torch_reaches_the_minimum(optimizer) -> None:
    solver = TorchOptim(lambda x, y: bowl(x, torch.stack([y["a"], y["b"]])), optimizer, tol=1e-6, max_iter=4000)
    x = torch.tensor([1.0, 2.0]).double()
    y, info = solver.run(x, {"a": START[0], "b": START[1]})
    found = torch.stack([y["a"], y["b"]])
    assert info.converged and 0 < info.num_iter < 4000
    assert (2 * (found - x) + 0.4 * found**3).norm() < 2e-6


def test_an_optimizer_that_stops_moving_ends_the_loop() -> None:
    solver = TorchOptim(bowl, lambda y: torch.optim.SGD(y, lr=0.0), max_iter=100)
    _, info = solver.run(torch.zeros(2).double(), START)
    assert not info.converged and info.num_iter < 10 and info.reason == "the optimizer no longer moves"


def test_divergence_raises() -> None:
    with pytest.raises(FloatingPointError, match="smaller steps"):
        TorchOptim(bowl, lambda y: torch.optim.SGD(y, lr=10.0)).run(torch.zeros(2).double(), START)


def test_an_optimizer_of_the_wrong_kind_raises() -> None:
    with pytest.raises(TypeError, match="Optimizer"):
        TorchOptim(bowl, lambda y: None).run(torch.zeros(2).double(), START)  # pyright: ignore


def test_barzilai_borwein_steps_need_far_fewer_iterations_than_plain_gradient_steps() -> None:
    scales = torch.logspace(0, 2, 20).double()
    loss = lambda x, y: (scales * (y - x).square()).sum() / 2
    plain = TorchOptim(loss, lambda y: torch.optim.SGD(y, lr=1e-2), tol=1e-6, max_iter=5000)
    x, start = torch.ones(20).double(), torch.zeros(20).double()
    _, fast = GradientDescent(loss, tol=1e-6).run(x, start)
    _, slow = plain.run(x, start)
    assert fast.converged and slow.converged and 10 * fast.num_iter < slow.num_iter


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("make", [GradientDescent, LBFGS])
def test_scale_of_the_loss_does_not_matter(make, scale: float) -> None:
    solver = make(lambda x, y: scale * bowl(x, y), tol=1e-9 * scale)
    y, info = solver.run(torch.ones(2).double(), START)
    assert info.converged and info.num_iter < 60
    assert (2 * (y - 1) + 0.4 * y**3).abs().max() < 1e-8


def test_lbfgs_on_many_variables() -> None:
    n = 2000
    curvature = torch.logspace(-1, 2, n).double()
    loss = lambda x, y: (curvature * (y - x).square()).sum() / 2 + torch.cosh(y).log().sum()
    x = torch.linspace(-1, 1, n).double().requires_grad_()
    y, info = LBFGS(loss, tol=1e-8)(x, init=torch.zeros(n).double())
    assert info.converged and info.num_iter < 300
    assert (curvature * (y - x) + y.tanh()).norm() <= 1.01e-8
    (got,) = torch.autograd.grad(y.sum(), x)
    with torch.no_grad():
        want = curvature / (curvature + 1 - y.tanh() ** 2)
    assert torch.allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("make", [GradientDescent, LBFGS])
def test_steps_out_of_the_domain_are_shortened(make) -> None:
    loss = lambda x, y: (100 * x * y - y.log()).sum()
    y, info = make(loss).run(torch.tensor([1.0]).double(), torch.tensor([0.4]).double())
    assert info.converged and y.item() == pytest.approx(0.01)


def test_lbfgs_takes_no_more_gradients_than_scipy_and_reaches_tighter_tolerances() -> None:
    n = 50
    loss = lambda x, y: (100 * (y[1:] - y[:-1] ** 2).square() + (x - y[:-1]).square()).sum() + 1000
    start = torch.tensor([-1.2, 1.0]).double().repeat(n // 2)
    y, info = LBFGS(loss, tol=1e-9, max_iter=2000).run(torch.tensor(1.0).double(), start)
    result = optimize.minimize(
        lambda y: torch.func.grad_and_value(lambda y: loss(1.0, y))(torch.from_numpy(y))[::-1],
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 0.0, "gtol": 1e-10, "maxcor": 20, "maxiter": 2000, "maxfun": 5000},
    )
    assert info.converged and torch.allclose(y.abs(), torch.ones(n).double(), atol=1e-2)
    assert info.num_evaluations < 1.5 * result.nfev
    assert info.residual_norm < torch.from_numpy(result.jac).norm()


def test_backtracking_takes_the_first_step_that_decreases_sufficiently() -> None:
    y, direction = torch.tensor([1.0]).double(), torch.tensor([-2.0]).double()
    value = lambda y: y.square().sum()
    assert backtrack(value, y, direction, reference=1.0, slope=-4.0, step=8.0) == 0.5
    assert backtrack(value, y, -direction, reference=1.0, slope=-4.0) is None
    assert backtrack(lambda y: y.log().sum(), y, direction, reference=0.0, slope=-2.0) == 0.25  # NaN and -inf before


def test_wolfe_steps_lengthen_and_shorten() -> None:
    y, direction = torch.tensor([1.0]).double(), torch.tensor([-1.0]).double()
    square = lambda y: (y.square().sum(), 2 * y)
    for first in (1e-3, 0.3, 1.0, 1e3):
        step, value, gradient = wolfe(square, y, direction, reference=1.0, slope=-2.0, step=first)  # pyright: ignore
        assert value == (1 - step) ** 2 <= 1 - 2e-4 * step and gradient @ direction >= 0.9 * -2.0
        assert torch.equal(gradient, 2 * (y - step))
    assert wolfe(square, y, -direction, reference=1.0, slope=-2.0) is None
    line = lambda y: (y.sum(), torch.ones(1).double())  # unbounded below
    assert wolfe(line, y, direction, reference=1.0, slope=-1.0) is None
