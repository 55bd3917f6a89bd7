"""Problems with known solutions, for every solver in float64: x, y and data are trees."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import solvers, tree
from implicitgrad.linalg import CG
from implicitgrad.solvers import InnerSolver
from tests.cases import CONDITIONS

RIDGE, LOGISTIC = CONDITIONS[:2]
INIT = {"tail": torch.full((1,), 3.0, dtype=torch.float64), "head": torch.tensor([[2.0, -2.0]], dtype=torch.float64)}
X = {"log_penalty": RIDGE.x}
DATA = ({"features": RIDGE.data[0], "target": RIDGE.data[1]},)


def flat(y: dict) -> Tensor:
    return torch.cat([y["head"].reshape(-1), y["tail"]])


def as_tree(y: Tensor) -> dict:
    return {"tail": y[2:], "head": y[:2].reshape(1, 2)}


def on_trees(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of plain `(x, y, features, target)` as one of trees."""
    return lambda x, y, data: function(x["log_penalty"], flat(y), data["features"], data["target"])


def ridge_residuals(x: dict, y: dict, data: dict) -> dict:
    """Half their squares are the ridge loss."""
    fit = (data["features"] @ flat(y) - data["target"]) / len(data["target"]) ** 0.5
    return {"fit": fit, "penalty": (x["log_penalty"] / 2).exp() * flat(y)}


def ridge_gradient(x: dict, y: dict, data: dict) -> dict:
    """A system of equations with the ridge solution."""
    rest = (data["features"] @ flat(y) - data["target"]) / len(data["target"])
    return as_tree(data["features"].mT @ rest + x["log_penalty"].exp() * flat(y))


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """Zero at `(x, x²)`."""
    return (x - y[0]).square() + 100 * (y[1] - y[0].square()).square()


def rosenbrock_residuals(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x - y[0], 10 * (y[1] - y[0].square())]) * 2**0.5


def plain(x: dict, data: dict) -> tuple[Tensor, Tensor, Tensor]:
    return x["log_penalty"], data["features"], data["target"]


def exact_ridge(x: dict, data: dict) -> Tensor:
    return RIDGE.exact(*plain(x, data))


def exact_logistic(x: dict, data: dict) -> Tensor:
    return LOGISTIC.exact(*plain(x, data))


@dataclass(frozen=True)
class Case:
    """A solver, what it is made for, and the closed form of that.

    `make(**hyperparameters)` returns the solver of the ridge problem (or the logistic one) on trees. `tol` is what it
    can reach: line searches of SciPy compare values, which tell points apart up to a gradient of about 1e-8 only.
    """

    name: str
    make: Callable[..., InnerSolver]
    exact: Callable[..., Tensor]
    tol: float = 1e-10

    def __str__(self) -> str:
        return self.name


def _momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.4, momentum=0.5)


_LOSS_SOLVERS: dict[str, Callable[..., InnerSolver]] = {
    "TorchOptim": lambda loss, **options: solvers.TorchOptim(loss, _momentum, **options),
    "GradientDescent": solvers.GradientDescent,
    "GradientDescent, monotone": lambda loss, **options: solvers.GradientDescent(loss, memory=1, **options),
    "LBFGS": solvers.LBFGS,
    "Newton": solvers.Newton,
    "Newton, lazy": lambda loss, **options: solvers.Newton(loss, refresh_every=3, **options),
    "Newton, inexact": lambda loss, **options: solvers.Newton(loss, system_solver=CG(rtol=0.1), **options),
    "RegularizedNewton": solvers.RegularizedNewton,
    "RegularizedNewton, lazy": lambda loss, **options: solvers.RegularizedNewton(loss, refresh_every=3, **options),
    "ScipyMinimize, L-BFGS-B": solvers.ScipyMinimize,
    "ScipyMinimize, BFGS": lambda loss, **options: solvers.ScipyMinimize(loss, method="BFGS", **options),
    "ScipyMinimize, trust-exact": lambda loss, **options: solvers.ScipyMinimize(loss, method="trust-exact", **options),
}
_RESIDUAL_SOLVERS: dict[str, Callable[..., InnerSolver]] = {
    "GaussNewton": solvers.GaussNewton,
    "LevenbergMarquardt": solvers.LevenbergMarquardt,
    "ScipyLeastSquares, trf": solvers.ScipyLeastSquares,
    "ScipyLeastSquares, lm": lambda fn, **options: solvers.ScipyLeastSquares(fn, method="lm", **options),
}
_ROOT_SOLVERS: dict[str, Callable[..., InnerSolver]] = {
    "ScipyRoot, hybr": solvers.ScipyRoot,
    "ScipyRoot, krylov": lambda fn, **options: solvers.ScipyRoot(fn, method="krylov", **options),
}


def _case(
    name: str, problem: str, solver: Callable[..., InnerSolver], function: Callable[..., object], exact: Callable
) -> Case:
    tol = {"ScipyMinimize, BFGS": 1e-8, "ScipyMinimize, L-BFGS-B": 1e-8}
    return Case(f"{name}, {problem}", lambda **options: solver(function, **options), exact, tol.get(name, 1e-10))


_CURVED = {name: _LOSS_SOLVERS[name] for name in _LOSS_SOLVERS if "Newton" in name or name in ("LBFGS", "TorchOptim")}
RIDGE_LOSS, LOGISTIC_LOSS = on_trees(RIDGE.condition.loss), on_trees(LOGISTIC.condition.loss)  # pyright: ignore
CASES = [
    *(_case(name, "ridge", make, RIDGE_LOSS, exact_ridge) for name, make in _LOSS_SOLVERS.items()),
    *(_case(name, "logistic", make, LOGISTIC_LOSS, exact_logistic) for name, make in _CURVED.items()),
    *(_case(name, "ridge", make, ridge_residuals, exact_ridge) for name, make in _RESIDUAL_SOLVERS.items()),
    *(_case(name, "ridge", make, ridge_gradient, exact_ridge) for name, make in _ROOT_SOLVERS.items()),
]
ROSENBROCK = [
    *(
        Case(name, lambda make=make, **options: make(rosenbrock, **options), None)
        for name, make in _LOSS_SOLVERS.items()  # pyright: ignore
        if name != "TorchOptim"  # momentum would take 1e5 steps
    ),
    *(
        Case(name, lambda make=make, **options: make(rosenbrock_residuals, **options), None)  # pyright: ignore
        for name, make in _RESIDUAL_SOLVERS.items()
    ),
]


def to(dtype: torch.dtype, *trees: object) -> list:
    return [tree.map(lambda leaf: leaf.to(dtype, copy=True), value) for value in trees]
