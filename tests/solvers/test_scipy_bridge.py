"""SciPy's methods and bounds, against other codes of SciPy and differences."""

import importlib
import warnings

import pytest
import torch
from scipy import optimize
from torch import Tensor

import implicitgrad as ig
from implicitgrad.solvers import ScipyLeastSquares, ScipyMinimize, ScipyRoot
from tests.solvers.inner_problems import DATA, INIT, RIDGE_LOSS, X, exact_ridge, flat, ridge_gradient


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


A, B = draw(40, 12, seed=1), draw(40, seed=2)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    return (A @ y - x).square().sum() / 2


METHODS = ["L-BFGS-B", "TNC", "SLSQP", "trust-constr", "BFGS", "CG", "Newton-CG", "trust-ncg", "trust-exact"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_minimize(method: str) -> None:
    y, info = ScipyMinimize(RIDGE_LOSS, method=method, tol=1e-6).run(X, INIT, *DATA)
    assert info.converged
    assert torch.allclose(flat(y), exact_ridge(X, *DATA), rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["hybr", "lm", "krylov", "broyden1", "anderson", "df-sane"])
def test_methods_of_root(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anderson's own matrices turn singular at the end
        y, info = ScipyRoot(ridge_gradient, method=method, tol=1e-7).run(X, INIT, *DATA)
    assert info.converged
    assert torch.allclose(flat(y), exact_ridge(X, *DATA), rtol=0, atol=1e-6)


BOUNDED = [
    ScipyMinimize(least_squares, bounds=(0.0, None), tol=1e-5),
    ScipyMinimize(least_squares, method="TNC", bounds=(torch.zeros(12).double(), None), tol=1e-3),
    ScipyMinimize(least_squares, method="SLSQP", bounds=(0.0, None), tol=1e-4),
    ScipyLeastSquares(lambda x, y: A @ y - x, bounds=(0.0, None), tol=1e-5),
    ScipyLeastSquares(lambda x, y: A @ y - x, method="dogbox", bounds=(0.0, None), tol=1e-7),
]


@pytest.mark.parametrize("solver", BOUNDED, ids=lambda solver: f"{type(solver).__name__} {solver.method}")
def test_non_negative_least_squares(solver) -> None:
    x = B.clone().requires_grad_()
    with ig.diagnostics() as log:
        y, info = solver(x, init=torch.ones(12).double())
        (got,) = torch.autograd.grad(y.sum(), x)
    want, _ = optimize.nnls(A.numpy(), B.numpy())
    assert info.converged and torch.allclose(y.detach(), torch.from_numpy(want), rtol=0, atol=solver.tol)
    support = torch.from_numpy(want) > 0
    assert 0 < support.sum() < 12
    # on the support the solution is the least-squares one: A_S⁺ x
    assert torch.allclose(got, torch.linalg.pinv(A[:, support]).sum(0), rtol=0, atol=1e-8)
    assert log[0].support == int(support.sum())


def test_bounds_may_depend_on_x_and_are_differentiated() -> None:
    loss = lambda x, y: (y["w"] - x["center"]).square().sum()
    solver = ScipyMinimize(loss, bounds=lambda x: ({"w": x["low"]}, {"w": x["low"] + x["width"]}))
    x = {
        "center": torch.tensor([0.0, 0.5, 9.0]).double().requires_grad_(),
        "low": torch.tensor([0.2, 0.2, 0.2]).double().requires_grad_(),
        "width": torch.tensor(2.0).double().requires_grad_(),
    }
    y, info = solver(x, init={"w": torch.zeros(3).double()})
    assert info.converged and torch.allclose(y["w"], torch.tensor([0.2, 0.5, 2.2]).double())
    got = torch.autograd.grad(y["w"].sum(), tuple(x.values()))
    assert torch.allclose(got[0], torch.tensor([0.0, 1.0, 0.0]).double())
    assert torch.allclose(got[1], torch.tensor([1.0, 0.0, 1.0]).double())
    assert got[2].item() == pytest.approx(1.0)


def test_starts_outside_of_the_bounds_are_moved_inside() -> None:
    for solver in BOUNDED:
        y, _ = solver.run(B, torch.full((12,), -5.0).double())
        assert (y >= 0).all()


def test_contradicting_bounds_raise() -> None:
    with pytest.raises(ValueError, match="lower is above upper for 2 entries"):
        ScipyMinimize(lambda x, y: (y - x).square().sum(), bounds=(1.0, 0.0)).run(torch.ones(2), torch.ones(2))


def test_options_of_the_method_come_first() -> None:
    solver = ScipyMinimize(lambda x, y: (y - x).pow(4).sum(), options={"maxiter": 2}, tol=1e-12)
    _, info = solver.run(torch.ones(2).double(), torch.full((2,), 9.0).double())
    assert info.num_iter == 2 and not info.converged and info.reason.startswith("SciPy: STOP")


def test_reason_is_that_of_scipy() -> None:
    _, info = ScipyRoot(lambda x, y: y**2 + x, max_iter=50).run(torch.ones(2).double(), torch.ones(2).double())
    assert not info.converged and info.reason.startswith("SciPy: The ") and info.residual_norm > 0.5


def test_missing_scipy_raises_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *arguments: object) -> object:
        if name.split(".")[0] == "scipy":
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
        return original(name, *arguments)

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"implicitgrad\[scipy\]"):
        ScipyMinimize(least_squares).run(B, torch.ones(12).double())
