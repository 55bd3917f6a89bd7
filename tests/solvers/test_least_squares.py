"""Gauss-Newton and Levenberg-Marquardt on a curve with residuals that do not vanish."""

import pytest
import torch
from scipy import optimize
from torch import Tensor

from implicitgrad.linalg import CG
from implicitgrad.solvers import GaussNewton, InnerSolver, LevenbergMarquardt, ScipyLeastSquares

TIMES = torch.linspace(0, 4, 30).double()
OBSERVED = 2 * (-0.7 * TIMES).exp() + 0.3 * (9 * TIMES).sin()
INIT = {"size": torch.tensor(1.0).double(), "rate": torch.tensor(1.0).double()}


def decay(x: Tensor, y: dict, times: Tensor, observed: Tensor) -> dict:
    """A decay, with a ridge on its rate."""
    return {"fit": y["size"] * (-y["rate"] * times).exp() - observed, "ridge": x * y["rate"]}


SOLVERS = [
    GaussNewton(decay, tol=1e-11),
    LevenbergMarquardt(decay, tol=1e-11),
    LevenbergMarquardt(decay, tol=1e-11, system_solver=CG(rtol=1e-2)),
    ScipyLeastSquares(decay, tol=1e-7),
    ScipyLeastSquares(decay, method="lm", tol=1e-7),
]


def by_scipy(x: float, observed: Tensor) -> Tensor:
    t, o = TIMES.numpy(), observed.numpy()

    def residuals(y):
        import numpy

        return numpy.append(y[0] * numpy.exp(-y[1] * t) - o, x * y[1])

    result = optimize.least_squares(residuals, [1.0, 1.0], xtol=1e-15, ftol=1e-15, gtol=1e-15, jac="3-point")
    return torch.from_numpy(result.x)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_curve_fit_equals_scipy_and_gradients_equal_differences(solver: InnerSolver) -> None:
    x = torch.tensor(0.5).double().requires_grad_()
    observed = OBSERVED.clone().requires_grad_()
    y, info = solver(x, TIMES, observed, init=INIT)
    assert info.converged and info.value is not None
    found = torch.stack([y["size"], y["rate"]])
    assert torch.allclose(found, by_scipy(0.5, OBSERVED), rtol=0, atol=1e-7)
    fit = decay(x, y, TIMES, observed)
    assert info.value == pytest.approx((fit["fit"].square().sum() + fit["ridge"] ** 2).item() / 2, rel=1e-12)
    gradients = torch.autograd.grad(y["size"] * y["rate"], (x, observed))
    product = lambda x, o: by_scipy(x, o).prod().item()
    # SciPy ends at a step of 1e-8 or so, differences over 1e-3 are good to 1e-5
    slope = (product(0.501, OBSERVED) - product(0.499, OBSERVED)) / 2e-3
    assert gradients[0].item() == pytest.approx(slope, rel=1e-4)
    direction = TIMES.cos()
    ahead, behind = (product(0.5, OBSERVED + sign * 1e-3 * direction) for sign in (1, -1))
    assert (gradients[1] @ direction).item() == pytest.approx((ahead - behind) / 2e-3, rel=1e-4)


def test_second_derivatives_of_residuals_enter_the_derivative() -> None:
    """`½ (y² - x)² + ½ (y - 1)²`: the Gauss-Newton matrix would give another slope."""
    residuals = lambda x, y: torch.stack([y**2 - x, y - 1])
    for solver in (GaussNewton(residuals, tol=1e-12), LevenbergMarquardt(residuals, tol=1e-12)):
        x = torch.tensor(3.0).double().requires_grad_()
        y, info = solver(x, init=torch.tensor(1.0).double())
        assert info.converged
        at = y.item()
        (got,) = torch.autograd.grad(y, x)
        assert got.item() == pytest.approx(2 * at / (6 * at**2 - 2 * 3.0 + 1), rel=1e-9)
        assert abs(got.item() - 2 * at / (4 * at**2 + 1)) > 0.005


def test_rank_deficient_jacobian_is_damped() -> None:
    residuals = lambda x, y: torch.stack([y[0] + y[1] - x, 2 * (y[0] + y[1]) - 2 * x])
    x = torch.tensor(3.0).double()
    for solver in (GaussNewton(residuals), LevenbergMarquardt(residuals)):
        y, info = solver.run(x, torch.tensor([1.0, 0.0]).double())
        assert info.converged and y.sum().item() == pytest.approx(3.0)


def test_levenberg_marquardt_stays_put_where_nothing_helps() -> None:
    solver = LevenbergMarquardt(lambda x, y: (y - x).abs() + 1, tol=1e-12, max_iter=500)  # a kink at the minimum
    _, info = solver.run(torch.tensor([0.3]).double(), torch.tensor([5.0]).double())
    assert not info.converged and ("precision floor" in info.reason or info.reason == "max_iter reached")
