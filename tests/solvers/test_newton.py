"""Newton's method: its factor serves the backward pass, one factor several steps, and damping every start."""

from collections.abc import Callable

import pytest
import torch
from scipy import optimize
from torch import Tensor

import implicitgrad as ig
from implicitgrad.curvature import gauss_newton, hessian
from implicitgrad.linalg import CG, LU, Auto, Cholesky, LinearOperator, LinearSolver
from implicitgrad.solvers import GaussNewton, InnerSolver, LevenbergMarquardt, Newton, RegularizedNewton
from implicitgrad.solvers.last_factor import LastFactor

FACTORISATIONS = ["cholesky_ex", "lu_factor_ex", "ldl_factor_ex", "eigh", "inv_ex"]
N, M = 30, 60
TOL = 1e-12  # eigenvalues of the Hessians reach down to 0.01: solutions are good to 1e-10


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


FEATURES, LABELS = draw(M, N, seed=1), draw(M, seed=2).sign()
PENALTY = draw(N, seed=3) - 3


def logistic(x: Tensor, y: Tensor, features: Tensor) -> Tensor:
    margins = LABELS * (features @ y)
    return torch.nn.functional.softplus(-margins).mean() + 0.5 * (x.exp() * y.square()).sum()


def logistic_residuals(x: Tensor, y: Tensor, features: Tensor) -> list[Tensor]:
    """A nonlinear least-squares problem whose residuals do not vanish."""
    outputs = features @ y
    return [(outputs + 0.3 * outputs.sin() - LABELS) / M**0.5, (x / 2).exp() * y]


def half_square(x: Tensor, y: Tensor, features: Tensor) -> Tensor:
    fit, penalty = logistic_residuals(x, y, features)
    return (fit.square().sum() + penalty.square().sum()) / 2


def closed_form(loss: Callable[..., Tensor], y: Tensor, cotangent: Tensor) -> Tensor:
    """`-cotangent · H⁻¹ ∂²loss/∂y∂x` from dense matrices of `torch.func`."""
    H = torch.func.hessian(lambda y: loss(PENALTY, y, FEATURES))(y)
    mixed = torch.func.jacfwd(torch.func.grad(lambda y, x: loss(x, y, FEATURES)), argnums=1)(y, PENALTY)
    return -torch.linalg.solve(H, cotangent) @ mixed


def minimum(loss: Callable[..., Tensor], start: Tensor) -> Tensor:
    """By SciPy, and Newton's method on dense matrices from there."""
    fn = lambda y: loss(PENALTY, torch.from_numpy(y), FEATURES).item()
    y = torch.from_numpy(optimize.minimize(fn, start.numpy(), tol=1e-8).x)
    for _ in range(4):
        gradient, H = (d(lambda y: loss(PENALTY, y, FEATURES))(y) for d in (torch.func.grad, torch.func.hessian))
        y = y - torch.linalg.solve(H, gradient)
    return y


@pytest.fixture
def factorised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the factorisations made so far."""
    made: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        original = getattr(torch.linalg, name)

        def run(*arguments: object, **options: object) -> object:
            made.append(name)
            return original(*arguments, **options)

        return run

    for name in FACTORISATIONS:
        monkeypatch.setattr(torch.linalg, name, counted(name))
    return made


@pytest.mark.parametrize(
    ("solver", "loss"),
    [
        (Newton(logistic, tol=TOL), logistic),
        (Newton(logistic, system_solver=Cholesky(), tol=TOL), logistic),
        (Newton(logistic, refresh_every=3, tol=TOL), logistic),
        (RegularizedNewton(logistic, tol=TOL), logistic),
        (RegularizedNewton(logistic, refresh_every=3, tol=TOL), logistic),
        (GaussNewton(logistic_residuals, tol=TOL), half_square),
        (LevenbergMarquardt(logistic_residuals, tol=TOL), half_square),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, InnerSolver) else "",
)
def test_backward_pass_makes_no_factorisation_and_is_exact(
    solver: InnerSolver, loss: Callable[..., Tensor], factorised: list[str]
) -> None:
    want_y = minimum(loss, torch.zeros(N).double())
    cotangent = draw(N, seed=4)
    want = closed_form(loss, want_y, cotangent)
    factorised.clear()
    x = PENALTY.clone().requires_grad_()
    with ig.diagnostics() as log:
        y, info = solver(x, FEATURES, init=torch.zeros(N).double())
        assert info.converged and factorised
        factorised.clear()
        (got,) = torch.autograd.grad(y, x, cotangent)
    assert factorised == []
    assert torch.allclose(y, want_y, rtol=0, atol=1e-9)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    # the factor of JᵀJ leaves out second derivatives of residuals, a damped one a small multiple of the identity
    exact_factor = type(solver) is Newton and solver.refresh_every == 1
    assert log[0].last.iterations <= (4 if exact_factor else 25)


def test_factorisations_are_seen_by_the_count_above(factorised: list[str]) -> None:
    x = PENALTY.clone().requires_grad_()
    y, _ = Newton(logistic, linear_solver=Auto())(x, FEATURES, init=torch.zeros(N).double())
    factorised.clear()
    torch.autograd.grad(y.sum(), x)
    assert factorised == ["cholesky_ex"]


def test_jacobians_and_second_derivatives_use_the_factor_too(factorised: list[str]) -> None:
    solver = Newton(logistic, tol=1e-11)
    solve = lambda x: solver(x, FEATURES, init=torch.zeros(N).double())[0]
    want_y = minimum(logistic, torch.zeros(N).double())
    want = torch.stack([closed_form(logistic, want_y, row) for row in torch.eye(N).double()])
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(jacobian(solve)(PENALTY), want, rtol=1e-9, atol=1e-9)
    x = PENALTY.clone().requires_grad_()
    y = solve(x)
    factorised.clear()
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert factorised == []
    step = 1e-4 * torch.ones(N).double()
    ahead, behind = (torch.func.grad(lambda x: solve(x).sum())(PENALTY + sign * step).sum() for sign in (1, -1))
    assert second.sum().item() * 1e-4 == pytest.approx(((ahead - behind) / 2).item(), rel=1e-6)


def test_lazy_newton_makes_fewer_factors_and_ends_at_the_same_point(factorised: list[str]) -> None:
    start = torch.zeros(N).double()
    results = []
    for every in (1, 4):
        factorised.clear()
        y, info = Newton(logistic, refresh_every=every, tol=1e-10).run(PENALTY, start, FEATURES)
        results.append((y, info.num_iter, len(factorised)))
    (eager, eager_steps, eager_factors), (lazy, lazy_steps, lazy_factors) = results
    assert torch.allclose(eager, lazy, rtol=0, atol=1e-9)
    assert eager_factors == eager_steps and lazy_steps >= eager_steps
    assert lazy_factors < eager_factors and lazy_factors <= -(-lazy_steps // 4) + 1


def test_the_last_factor_keeps_no_graph_alive() -> None:
    import gc
    import weakref

    class Token:
        pass

    token = Token()
    alive = weakref.ref(token)

    def loss(x: Tensor, y: Tensor, token: Token = token) -> Tensor:
        return (y - x).square().sum() + y.pow(4).sum()

    gc.disable()
    try:
        _, info = Newton(loss).run(torch.ones(3), torch.zeros(3))
        del loss, token
        assert isinstance(info.linear_solver, LastFactor) and alive() is None
    finally:
        gc.enable()


def test_indefinite_hessians_are_damped_until_steps_go_down() -> None:
    loss = lambda x, y: (y**4 / 4 - x * y**2 / 2).sum()  # a maximum at 0, minima at ±sqrt(x)
    x = torch.tensor([1.0, 4.0]).double().requires_grad_()
    for solver in (Newton(loss), Newton(loss, system_solver=CG(rtol=0.1))):
        y, info = solver(x, init=torch.tensor([0.1, -0.2]).double())
        assert info.converged
        assert torch.allclose(y, torch.tensor([1.0, -2.0]).double(), atol=1e-8)
        (got,) = torch.autograd.grad(y.sum(), x)
        assert torch.allclose(got, torch.tensor([0.5, -0.25]).double(), atol=1e-8)
    y, info = RegularizedNewton(loss).run(x, torch.tensor([0.1, -0.2]).double())
    assert info.converged and torch.allclose(y.abs(), torch.tensor([1.0, 2.0]).double(), atol=1e-8)


def test_singular_start_of_a_convex_loss() -> None:
    loss = lambda x, y: torch.nn.functional.softplus(20 * (y - x)).sum() - 20 * 0.5 * (y - x).sum()
    x = torch.tensor([1.0, -1.0]).double().requires_grad_()  # at y = 9 the Hessian is 400 exp(-160)
    for solver in (RegularizedNewton(loss), Newton(loss)):
        y, info = solver(x, init=torch.full((2,), 9.0).double())
        assert info.converged and torch.allclose(y, x.detach(), atol=1e-9)
        assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.ones(2).double(), atol=1e-8)


def test_a_loss_with_a_bounded_domain_shortens_steps() -> None:
    loss = lambda x, y: (x * y - y.log()).sum()
    x = torch.tensor([0.5, 2.0, 100.0]).double().requires_grad_()
    y, info = Newton(loss)(x, init=torch.full((3,), 1.9).double())  # full steps would leave y > 0
    assert info.converged and torch.allclose(y, 1 / x.detach(), rtol=1e-9)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], -1 / x.detach() ** 2, rtol=1e-8)


def test_gauss_newton_curvature_of_a_model() -> None:
    model = lambda y, features: (features @ y).tanh()
    square = lambda outputs, targets: (outputs - targets).square().mean() / 2
    penalised = lambda x, y, features: square(model(y, features), LABELS) + x / 2 * y.square().sum()
    calls = []

    def curvature(x: Tensor, y: Tensor, features: Tensor) -> LinearOperator:
        calls.append(1)
        return gauss_newton(model, square, y, features, LABELS).damped(x.item())

    start = torch.zeros(N).double()
    solver = Newton(penalised, curvature=curvature, tol=1e-10)
    x = torch.tensor(0.1, dtype=torch.float64).requires_grad_()
    y, info = solver(x, FEATURES, init=start)
    exact, _ = Newton(penalised, tol=1e-12).run(x, start, FEATURES)
    assert info.converged and len(calls) == info.num_iter
    assert torch.allclose(y, exact, rtol=0, atol=1e-8)
    (got,) = torch.autograd.grad(y.sum(), x)
    H = hessian(lambda y: penalised(0.1, y, FEATURES), exact).to_dense()
    assert got.item() == pytest.approx(-torch.linalg.solve(H, exact).sum().item(), rel=1e-8)


@pytest.mark.parametrize("solver", [Auto(dense_size=0), CG(), LU()], ids=str)
def test_any_linear_solver_gives_the_steps(solver: LinearSolver) -> None:
    y, info = Newton(logistic, system_solver=solver, tol=1e-10).run(PENALTY, torch.zeros(N).double(), FEATURES)
    assert info.converged and info.linear_solver is None  # nothing to share: no Cholesky factor
    assert torch.allclose(y, minimum(logistic, torch.zeros(N).double()), rtol=0, atol=1e-8)


def test_many_unknowns_take_inexact_steps_without_a_matrix(factorised: list[str]) -> None:
    n = 800
    rows = draw(200, n, seed=5) / n**0.5
    loss = lambda x, y: torch.cosh(rows @ y - 1).sum() + (x * y.square()).sum() / 2
    x = torch.full((n,), 0.1, dtype=torch.float64).requires_grad_()
    y, info = Newton(loss, tol=1e-9)(x, init=torch.zeros(n).double())
    assert info.converged and info.num_iter < 25 and factorised == []
    want = (rows.mT @ torch.sinh(rows @ y.detach() - 1)).neg() / 0.1
    assert torch.allclose(y.detach(), want, rtol=0, atol=1e-7)
    (got,) = torch.autograd.grad(y.sum(), x)
    H = rows.mT @ (torch.cosh(rows @ y.detach() - 1).unsqueeze(-1) * rows) + 0.1 * torch.eye(n).double()
    assert torch.allclose(got, -torch.linalg.solve(H, torch.ones(n).double()) * y.detach(), rtol=1e-7, atol=1e-9)


def test_curvature_that_does_not_fit_raises() -> None:
    wrong = Newton(logistic, curvature=lambda x, y, features: LinearOperator.from_dense(torch.eye(3)))
    with pytest.raises(ValueError, match="symmetric LinearOperator on 30 numbers"):
        wrong.run(PENALTY, torch.zeros(N).double(), FEATURES)


def test_last_factor_falls_back_where_the_matrix_is_another_one() -> None:
    A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, -2.0]).double()), symmetric=True)
    solution = LastFactor(lambda r: r).solve(A, torch.ones(2).double())
    assert solution.converged
    assert torch.allclose(solution.value, torch.tensor([1.0, -0.5]).double())


def test_float32_factor_serves_the_backward_pass() -> None:
    x, start, features = PENALTY.float().requires_grad_(), torch.zeros(N), FEATURES.float()
    loss = lambda x, y, features: (
        torch.nn.functional.softplus(-LABELS.float() * (features @ y)).mean() + 0.5 * (x.exp() * y.square()).sum()
    )
    y, info = Newton(loss)(x, features, init=start)
    want_y = minimum(logistic, torch.zeros(N).double())
    (got,) = torch.autograd.grad(y.sum(), x)
    assert info.converged and torch.allclose(y.double(), want_y, rtol=0, atol=1e-3)
    # eigenvalues of the Hessian reach down to 0.02: residuals of 1e-5 mean errors of 5e-4
    assert torch.allclose(got.double(), closed_form(logistic, want_y, torch.ones(N).double()), rtol=0, atol=5e-3)
