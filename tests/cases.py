"""What there is of each kind; an entry here inherits the contract tests of its kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from implicitgrad import FixedPoint, OptimalityCondition, Stationary
from implicitgrad.linalg import (
    CG,
    CGLS,
    GMRES,
    LDL,
    LSMR,
    LU,
    MINRES,
    Auto,
    BiCGSTAB,
    BlockCG,
    Chebyshev,
    Cholesky,
    LinearSolver,
    Neumann,
)


@dataclass(frozen=True)
class SolverCase:
    """A linear solver and what it demands of an operator.

    `needs` is one of: "definite", "symmetric", "square", and "contraction" for a spectral radius of I - A below one.
    `capped` is the same solver stopped after one iteration, for those that iterate.
    """

    solver: LinearSolver
    needs: Literal["definite", "symmetric", "square", "contraction"]
    capped: LinearSolver | None = None

    def __str__(self) -> str:
        chosen = ", ".join(f"{name}={value}" for name, value in vars(self.solver).items() if value is not None)
        return f"{type(self.solver).__name__}({chosen})"


SOLVERS = [
    SolverCase(CG(), "definite", capped=CG(max_iter=1)),
    SolverCase(BlockCG(), "definite", capped=BlockCG(max_iter=1)),
    SolverCase(MINRES(), "symmetric", capped=MINRES(max_iter=1)),
    SolverCase(GMRES(), "square", capped=GMRES(max_iter=1)),
    SolverCase(GMRES(restart=4), "contraction", capped=GMRES(max_iter=1)),
    SolverCase(BiCGSTAB(), "square", capped=BiCGSTAB(max_iter=1)),
    SolverCase(LSMR(), "square", capped=LSMR(max_iter=1)),
    SolverCase(CGLS(), "square", capped=CGLS(max_iter=1)),
    SolverCase(Neumann(num_terms=200), "contraction", capped=Neumann(num_terms=1)),
    SolverCase(Neumann(num_terms=200, step=None), "contraction", capped=Neumann(num_terms=1, step=None)),
    SolverCase(Chebyshev(), "definite", capped=Chebyshev(max_iter=1)),
    SolverCase(Cholesky(), "definite"),
    SolverCase(LDL(), "symmetric"),
    SolverCase(LU(), "square"),
    SolverCase(Auto(), "square"),
    SolverCase(Auto(dense_size=0), "square", capped=Auto(dense_size=0, max_iter=1)),
]


@dataclass(frozen=True)
class ConditionCase:
    """A condition, its exact solution and where to test it.

    `exact(x, *data)` gives the solution by torch operations that autograd and `torch.func` differentiate to any order,
    so it is the independent road. All tensors are float64. `meets` lists the demands of solvers (`SolverCase.needs`)
    that the Jacobian `∂residual/∂y` fulfils.
    """

    name: str
    condition: OptimalityCondition
    exact: Callable[..., Tensor]
    x: Tensor
    data: tuple[Tensor, ...]
    meets: frozenset[str]

    def __str__(self) -> str:
        return self.name


def _solve(matrix: Tensor, vector: Tensor) -> Tensor:
    """By the inverse: `vmap(jacfwd)` through `torch.linalg.solve` is wrong in torch 2.13."""
    return torch.linalg.inv(matrix) @ vector


def _newton(
    residual: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Tensor], start: Tensor, num_steps: int = 7
) -> Tensor:
    """Differentiable Newton steps; `k` of them past convergence have right derivatives up to order `2^k - 1`."""
    y = start
    for _ in range(num_steps):
        y = y - _solve(jacobian(y), residual(y))
    return y


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _ridge_loss(x: Tensor, y: Tensor, features: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (features @ y - target).square().mean() + 0.5 * (x.exp() * y.square()).sum()


def _ridge(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    gram = features.mT @ features / len(features) + torch.diag_embed(x.exp())
    return _solve(gram, features.mT @ target / len(features))


def _ridge_step(x: Tensor, y: Tensor, features: Tensor, target: Tensor) -> Tensor:
    return y - 0.4 * (features.mT @ (features @ y - target) / len(features) + x.exp() * y)


def _logistic_loss(x: Tensor, y: Tensor, features: Tensor, target: Tensor) -> Tensor:
    margins = (2 * target.sigmoid() - 1) * (features @ y)
    return torch.nn.functional.softplus(-margins).mean() + 0.5 * (x.exp() * y.square()).sum()


def _logistic(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    rows = (2 * target.sigmoid() - 1).unsqueeze(-1) * features
    sigmoid = lambda y: torch.sigmoid(-(rows @ y))
    return _newton(
        lambda y: x.exp() * y - rows.mT @ sigmoid(y) / len(rows),
        lambda y: (
            torch.diag_embed(x.exp()) + rows.mT @ ((sigmoid(y) * (1 - sigmoid(y))).unsqueeze(-1) * rows) / len(rows)
        ),
        torch.zeros_like(x),
    )


def _affine_step(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.tanh() * (weight @ y) + bias


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _solve(torch.eye(len(bias), dtype=bias.dtype) - x.tanh().unsqueeze(-1) * weight, bias)


def _tanh_step(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (weight @ y + x * bias).tanh()


def _tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    step = lambda y: (weight @ y + x * bias).tanh()
    return _newton(
        lambda y: y - step(y),
        lambda y: torch.eye(len(bias), dtype=bias.dtype) - (1 - step(y).square()).unsqueeze(-1) * weight,
        torch.zeros_like(bias),
    )


_regression = (_draw(5, 3, seed=1), _draw(5, seed=2))
_network = (0.3 * _draw(3, 3, seed=3), _draw(3, seed=4))
_upper = torch.tensor([-0.5, -0.2, 0.3], dtype=torch.float64)
_definite = frozenset({"definite", "symmetric", "square", "contraction"})
_general = frozenset({"square", "contraction"})

CONDITIONS = [
    ConditionCase("ridge", Stationary(_ridge_loss), _ridge, _upper, _regression, _definite),
    ConditionCase("logistic", Stationary(_logistic_loss), _logistic, _upper, _regression, _definite),
    ConditionCase("affine map", FixedPoint(_affine_step), _affine, _upper, _network, _general),
    ConditionCase("tanh map", FixedPoint(_tanh_step), _tanh, _upper, _network, _general),
    ConditionCase("gradient step", FixedPoint(_ridge_step, symmetric=True), _ridge, _upper, _regression, _definite),
]
