"""Jacobians of constrained and non-smooth problems of some hundred unknowns, around solutions of other packages.

Each solution comes from scikit-learn, SciPy or CVXPY to rounding or nearly so; the Jacobian is compared with central
differences of that solver. With a step of 1e-5 these are good to 1e-9 or better relative to their size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad import projections, prox, tree
from implicitgrad.conditions import BlockProximalGradient, ProjectedGradient, ProximalGradient

np = pytest.importorskip("numpy")
sklearn_models = pytest.importorskip("sklearn.linear_model")
STEP = 1e-5


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A condition, a solver of somebody else's, and where to differentiate.

    Attributes:
        name: What it is called.
        condition: Holds at the solution.
        solve: `(x, *data) -> y`, by another package.
        arguments: `(x, *data)`.
        support: What the report must say, from the solution; None for a system that is not restricted.
    """

    name: str
    condition: ig.OptimalityCondition
    solve: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    support: Callable[[Tensor], int] | None = None

    def __str__(self) -> str:
        return self.name


def _squares(x: Tensor, y: Tensor, features: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (features @ y - target).square().sum() / len(features)


def _nonzeros(y: Tensor) -> int:
    return int((y != 0).sum())


def _regression(n: int, d: int, outputs: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    features, weights = draw(n, d, seed=seed), torch.zeros(d, *outputs)
    weights[:10] = 2 * draw(10, *outputs, seed=seed + 1)
    return features, features @ weights + 0.5 * draw(n, *outputs, seed=seed + 2)


def _lasso() -> Problem:
    def solve(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
        model = sklearn_models.Lasso(alpha=x.exp().item(), fit_intercept=False, tol=1e-15, max_iter=10**5)
        return torch.as_tensor(model.fit(features.numpy(), target.numpy()).coef_)

    nearest = lambda x, y, scaling, *data: prox.l1(y, x.exp(), scaling)
    condition = ProximalGradient(_squares, nearest, step=0.2, symmetric_on_support=True)
    return Problem("lasso", condition, solve, (torch.tensor(-2.0), *_regression(150, 200)), _nonzeros)


def _elastic_net() -> Problem:
    def solve(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
        first, second = x.exp().tolist()
        both = first + second
        model = sklearn_models.ElasticNet(both, l1_ratio=first / both, fit_intercept=False, tol=1e-15, max_iter=10**5)
        return torch.as_tensor(model.fit(features.numpy(), target.numpy()).coef_)

    nearest = lambda x, y, scaling, *data: prox.elastic_net(y, *x.exp(), scaling)
    condition = ProximalGradient(_squares, nearest, step=0.2, symmetric_on_support=True)
    return Problem("elastic net", condition, solve, (torch.tensor([-2.0, -3.0]), *_regression(150, 200)), _nonzeros)


def _group_lasso() -> Problem:
    def solve(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
        model = sklearn_models.MultiTaskLasso(x.exp().item(), fit_intercept=False, tol=1e-15, max_iter=10**5)
        return torch.as_tensor(model.fit(features.numpy(), target.numpy()).coef_.T.copy())

    rows = torch.func.vmap(prox.group_lasso, in_dims=(0, None, None))
    condition = ProximalGradient(_squares, lambda x, y, scaling, *data: rows(y, x.exp(), scaling), step=0.2)
    return Problem("group lasso", condition, solve, (torch.tensor(-1.2), *_regression(150, 70, (3,))), _nonzeros)


def _non_negative_least_squares() -> Problem:
    optimize = pytest.importorskip("scipy.optimize")

    def solve(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
        ridge = (len(features) * x.exp()).sqrt() * torch.eye(200)
        stacked = torch.cat([features, ridge]), torch.cat([target, torch.zeros(200)])
        return torch.as_tensor(optimize.nnls(*(part.numpy() for part in stacked))[0])

    loss = lambda x, y, *data: _squares(x, y, *data) + 0.5 * x.exp() * y.square().sum()
    condition = ProjectedGradient(
        loss, lambda x, y, *data: projections.non_negative(y), step=0.2, symmetric_on_support=True
    )
    return Problem("non-negative", condition, solve, (torch.tensor(-4.0), *_regression(250, 200)), _nonzeros)


def _ridge_on_the_simplex() -> Problem:
    cvxpy = pytest.importorskip("cvxpy")
    y = cvxpy.Variable(200)

    def solve(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
        loss = cvxpy.sum_squares(features.numpy() @ y - target.numpy()) / (2 * len(features))
        penalty = x.exp().item() / 2 * cvxpy.sum_squares(y)
        return _polished(cvxpy.Problem(cvxpy.Minimize(loss + penalty), [y >= 0, cvxpy.sum(y) == 1]), y)

    loss = lambda x, y, *data: _squares(x, y, *data) + 0.5 * x.exp() * y.square().sum()
    condition = ProjectedGradient(loss, lambda x, y, *data: projections.simplex(y), step=0.2)
    positive = lambda y: int((y > 1e-9).sum())
    features, weights = draw(250, 200, seed=3), torch.zeros(200)
    weights[:30] = 1 / 30
    target = features @ weights + 0.1 * draw(250, seed=4)
    return Problem("simplex", condition, solve, (torch.tensor(-3.0), features, target), positive)


def _multiclass_svm() -> Problem:
    """Dual of Crammer and Singer: rows of y on the simplex, weights `featuresᵀ (labels - y) / x`."""
    cvxpy = pytest.importorskip("cvxpy")
    labels = torch.eye(3)[torch.arange(70) % 3]
    y = cvxpy.Variable((70, 3))

    def loss(x: Tensor, y: Tensor, features: Tensor) -> Tensor:
        weights = features.mT @ (labels - y) / x.exp()
        return x.exp() / 2 * weights.square().sum() - (y * (1 - labels)).sum()

    def solve(x: Tensor, features: Tensor) -> Tensor:
        weights = features.numpy().T @ (labels.numpy() - y) / x.exp().item()
        value = x.exp().item() / 2 * cvxpy.sum_squares(weights) - cvxpy.sum(cvxpy.multiply(y, 1 - labels.numpy()))
        return _polished(cvxpy.Problem(cvxpy.Minimize(value), [y >= 0, cvxpy.sum(y, axis=1) == 1]), y)

    rows = torch.func.vmap(projections.simplex)
    condition = ProjectedGradient(loss, lambda x, y, *data: rows(y), step=0.2)
    features = draw(70, 100, seed=5) + 2 * labels @ draw(3, 100, seed=6)
    # a row at a corner of its simplex cannot move at all
    moving = lambda y: int(((y > 1e-9) & (y < 1 - 1e-9)).sum())
    return Problem("multiclass SVM", condition, solve, (torch.tensor(5.0), features), moving)


def _polished(problem, variable) -> Tensor:
    """By OSQP, which solves for the active constraints that it found directly: to rounding."""
    problem.solve(solver="OSQP", eps_abs=1e-7, eps_rel=1e-7, max_iter=10**5, polishing=True)
    return torch.as_tensor(np.array(variable.value))


def _logistic_with_intercept() -> Problem:
    features, target = _regression(150, 200)
    labels = (target + 1).sign()

    def solve(x: Tensor, features: Tensor) -> dict[str, Tensor]:
        model = sklearn_models.LogisticRegression(C=(-x).exp().item(), solver="newton-cg", tol=1e-14, max_iter=1000)
        model.fit(features.numpy(), labels.numpy() > 0)
        return {"coef": torch.as_tensor(model.coef_[0]), "intercept": torch.as_tensor(model.intercept_[0])}

    def loss(x: Tensor, y: dict[str, Tensor], features: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-labels * (features @ y["coef"] + y["intercept"])).sum()

    condition = BlockProximalGradient(
        loss,
        {
            "coef": lambda x, y, scaling, *data: prox.ridge(y, x.exp(), scaling),
            "intercept": lambda x, y, scaling, *data: prox.zero(y),
        },
        {"coef": 0.02, "intercept": 0.05},
    )
    return Problem("logistic with intercept", condition, solve, (torch.tensor(0.5), features))


PROBLEMS = [
    _lasso,
    _elastic_net,
    _group_lasso,
    _non_negative_least_squares,
    _ridge_on_the_simplex,
    _multiclass_svm,
    _logistic_with_intercept,
]


@pytest.mark.parametrize("make", PROBLEMS, ids=lambda make: make.__name__.strip("_"))
def test_jacobian_equals_differences_of_another_solver(make: Callable[[], Problem]) -> None:
    problem = make()
    y = problem.solve(*problem.arguments)
    flat = lambda y: tree.ravel(y)[0]
    assert len(flat(y)) >= 200
    fit = ig.implicit(problem.condition, on_unconverged="raise", inner_tolerance=1e-9)(problem.solve)
    arguments = [value.clone().requires_grad_() for value in problem.arguments]
    cotangent = draw(len(flat(y)), seed=20)
    with ig.diagnostics() as log:
        slopes = torch.autograd.grad((flat(fit(*arguments)) * cotangent).sum(), arguments, materialize_grads=True)
    assert log[-1].support == (None if problem.support is None else problem.support(y))
    for seed, movable in enumerate(([0], range(len(arguments)))):
        tangents = tuple(
            draw(*value.shape, seed=seed + i) * (0.1 if i in movable else 0.0)
            for i, value in enumerate(problem.arguments)
        )
        _, got = torch.func.jvp(lambda *a: flat(fit(*a)), problem.arguments, tangents)
        ahead, behind = (
            flat(problem.solve(*(v + sign * STEP * t for v, t in zip(problem.arguments, tangents, strict=True))))
            for sign in (1, -1)
        )
        want = (ahead - behind) / (2 * STEP)
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
        reverse = sum((slope * tangent).sum() for slope, tangent in zip(slopes, tangents, strict=True))
        assert abs(reverse - cotangent @ got) <= 1e-9 * (cotangent * got).abs().sum()
