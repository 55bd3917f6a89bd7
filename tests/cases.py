"""What there is of each kind; an entry here inherits the contract tests of its kind."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from implicitgrad import FixedPoint, OptimalityCondition, Stationary, projections, prox
from implicitgrad.conditions import (
    BlockProximalGradient,
    MirrorDescent,
    ProjectedGradient,
    ProximalGradient,
    Root,
)
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


def _squares(x: Tensor, y: Tensor, features: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (features @ y - target).square().mean()


def _moments(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return features.mT @ features / len(features), features.mT @ target / len(features)


def _lasso(x: Tensor, features: Tensor, target: Tensor, ridge: float = 0.0) -> Tensor:
    """With the signs that the solution has at `_sparse`; also of the elastic net."""
    gram, moment = _moments(features, target)
    some = torch.eye(3, dtype=gram.dtype)[:, [0, 2]]
    pull = moment - x.exp() * torch.tensor([1.0, 0.0, -1.0], dtype=gram.dtype)
    return some @ _solve(some.mT @ gram @ some + ridge * torch.eye(2, dtype=gram.dtype), some.mT @ pull)


def _upper_bound(x: Tensor) -> Tensor:
    return 0.5 + 0.1 * x.sin()


def _bounded_ridge(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    """With the first coordinate at its upper bound, as at `_sparse`."""
    gram, moment = _moments(features, target)
    one, rest = torch.eye(3, dtype=gram.dtype).split([1, 2], dim=1)
    gram = gram + torch.diag_embed(x.exp())
    held = one @ (one.mT @ _upper_bound(x))
    return held + rest @ _solve(rest.mT @ gram @ rest, rest.mT @ (moment - gram @ held))


def _entropic_loss(x: Tensor, y: Tensor, features: Tensor, target: Tensor) -> Tensor:
    return _squares(x, y, features, target) + ((x + y.log() - 1) * y).sum()


def _entropic(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    gram, moment = _moments(features, target)
    log = _newton(
        lambda log: gram @ log.exp() - moment + x + log,
        lambda log: gram * log.exp().unsqueeze(-2) + torch.eye(3, dtype=gram.dtype),
        torch.zeros_like(x),
    )
    return log.exp()


def _tanh_equation(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return y.atanh() - weight @ y - x * bias


_regression = (_draw(5, 3, seed=1), _draw(5, seed=2))
_network = (0.3 * _draw(3, 3, seed=3), _draw(3, seed=4))
_mixing = (5**0.5 * torch.linalg.qr(_draw(5, 3, seed=5))[0] + 0.3 * _draw(5, 3, seed=6)).contiguous()
# moments (2, 0.1, -3): far from where a coordinate of a sparse or bounded solution would be let go
_sparse = (_mixing, _mixing @ _solve(_moments(_mixing, _mixing[:, 0])[0], _mixing.new_tensor([2.0, 0.1, -3.0])))
_upper = torch.tensor([-0.5, -0.2, 0.3], dtype=torch.float64)
_definite = frozenset({"definite", "symmetric", "square", "contraction"})
_general = frozenset({"square", "contraction"})

CONDITIONS = [
    ConditionCase("ridge", Stationary(_ridge_loss), _ridge, _upper, _regression, _definite),
    ConditionCase("logistic", Stationary(_logistic_loss), _logistic, _upper, _regression, _definite),
    ConditionCase("affine map", FixedPoint(_affine_step), _affine, _upper, _network, _general),
    ConditionCase("tanh map", FixedPoint(_tanh_step), _tanh, _upper, _network, _general),
    ConditionCase("gradient step", FixedPoint(_ridge_step, symmetric=True), _ridge, _upper, _regression, _definite),
    ConditionCase(
        "bounded ridge",
        ProjectedGradient(_ridge_loss, lambda x, y, *data: projections.box(y, -9.0, _upper_bound(x)), step=0.4),
        _bounded_ridge,
        _upper,
        _sparse,
        _general,
    ),
    ConditionCase(
        "lasso",
        ProximalGradient(
            _squares, lambda x, y, scaling, *data: prox.l1(y, x.exp(), scaling), step=0.6, symmetric_on_support=True
        ),
        _lasso,
        _upper,
        _sparse,
        _general,
    ),
    ConditionCase(
        "elastic net",
        BlockProximalGradient(
            _squares,
            lambda x, y, scaling, *data: prox.elastic_net(y, x.exp(), 0.5, scaling),
            step=torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64),
        ),
        functools.partial(_lasso, ridge=0.5),
        _upper,
        _sparse,
        _general,
    ),
    ConditionCase(
        "entropic mirror",
        MirrorDescent(_entropic_loss, lambda x, v, *data: v.exp(), torch.log, step=0.5),
        _entropic,
        _upper,
        _regression,
        _general,
    ),
    ConditionCase("tanh root", Root(_tanh_equation), _tanh, _upper, _network, frozenset({"square"})),
]
