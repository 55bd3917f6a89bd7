"""Fixed-point iteration and Anderson acceleration against closed forms, the secant method and dense solves."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad import tree
from implicitgrad.linalg import BiCGSTAB, Neumann
from implicitgrad.solvers import Anderson, FixedPointIteration, InnerSolver, anderson, fixed_point
from tests.solvers import test_contract as contract
from tests.solvers.inner_problems import Case, exact_ridge, ridge_gradient
from tests.solvers.test_proximal import Reads


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return torch.allclose(got, want, rtol=tolerance, atol=tolerance)


def contraction(size: int, norm: float) -> Tensor:
    matrix = draw(size, size)
    return norm * matrix / torch.linalg.matrix_norm(matrix, 2)


def linear(x: Tensor, y: Tensor, M: Tensor) -> Tensor:
    return M @ y + x


SOLVERS = {
    "plain": FixedPointIteration,
    "damped": lambda step, **options: FixedPointIteration(step, damping=0.7, **options),
    "Anderson": Anderson,
    "Anderson(2), damped": lambda step, **options: Anderson(step, memory=2, damping=0.5, **options),
}
every_solver = pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)


def ridge_step(x: dict, y: dict, data: dict) -> dict:
    """A gradient step; the Hessian's eigenvalues lie between 0.7 and 3."""
    return tree.map(lambda now, slope: now - 0.4 * slope, y, ridge_gradient(x, y, data))


CASES = [
    Case(name, lambda make=make, **options: make(ridge_step, **options), exact_ridge) for name, make in SOLVERS.items()
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "claim",
    [
        contract.test_solution_and_gradients_equal_the_closed_form,
        contract.test_transforms_equal_the_closed_form,
        contract.test_warm_start_saves_iterations,
        contract.test_float32,
        contract.test_a_run_that_ends_early_says_so_with_the_true_residual,
        contract.test_nan_raises_and_arguments_stay,
        contract.test_gradients_of_the_run_are_not_recorded,
        contract.test_evaluations_are_counted,
        contract.test_a_tensor_that_the_condition_closes_over_is_differentiated_in_transforms,
    ],
    ids=lambda claim: claim.__name__,
)
def test_contract(claim: Callable[[Case], None], case: Case) -> None:
    claim(case)


@every_solver
def test_solution_and_gradient_of_an_unsymmetric_step_equal_the_dense_solve(make: Callable[..., InnerSolver]) -> None:
    M, x = contraction(30, 0.8).requires_grad_(), draw(30, seed=1).requires_grad_()
    weights = draw(30, seed=2)
    y, info = make(linear, tol=1e-12)(x, M, init=torch.zeros(30))
    exact = torch.linalg.solve(torch.eye(30) - M, x)
    assert info.converged and near(y, exact, 1e-10)
    got, want = (torch.autograd.grad((v * weights).sum(), (x, M)) for v in (y, exact))
    assert all(near(a, b, 1e-9) for a, b in zip(got, want, strict=True))


def test_iterates_of_the_plain_iteration_are_powers_of_the_step() -> None:
    M, x = contraction(5, 0.9), draw(5, seed=1)
    y, info = FixedPointIteration(linear, max_iter=7, tol=1e-14).run(x, torch.zeros(5), M)
    want = sum(torch.linalg.matrix_power(M, k) @ x for k in range(7))
    assert info.num_iter == 7 and info.num_evaluations == 8 and near(y, want, 1e-13)
    damped, _ = FixedPointIteration(linear, max_iter=1, tol=1e-14, damping=0.25).run(x, torch.ones(5), M)
    assert near(damped, 0.75 * torch.ones(5) + 0.25 * linear(x, torch.ones(5), M), 1e-14)


def test_damping_makes_an_oscillation_converge() -> None:
    step = lambda x, y: -2 * y + x
    y, info = FixedPointIteration(step, damping=0.5).run(torch.tensor([3.0]), torch.zeros(1))
    assert info.converged and near(y, torch.ones(1), 1e-7)
    with pytest.raises(FloatingPointError, match="damp"):
        FixedPointIteration(step, max_iter=5000).run(torch.tensor([3.0]), torch.zeros(1))


def test_anderson_with_full_memory_solves_a_linear_system_in_n_steps_where_the_plain_iteration_diverges() -> None:
    M, x = 3 * draw(8, 8), draw(8, seed=1)
    assert torch.linalg.eigvals(M).abs().max() > 2
    y, info = Anderson(linear, memory=8, tol=1e-8).run(x, torch.zeros(8), M)
    # one plain step, and n extrapolated ones, as GMRES; two more for rounding
    assert info.converged and info.num_iter <= 11
    assert near(y, torch.linalg.solve(torch.eye(8) - M, x), 1e-7)


def test_anderson_with_one_difference_is_the_secant_method() -> None:
    step = lambda x, y: torch.cos(x * y)
    iterates = [0.0, 1.0]  # the first step is plain: cos 0
    residual = lambda y: torch.cos(torch.tensor(y)).item() - y
    for k in range(1, 4):
        slope = (residual(iterates[k]) - residual(iterates[k - 1])) / (iterates[k] - iterates[k - 1])
        iterates.append(iterates[k] - residual(iterates[k]) / slope)
        y, info = Anderson(step, memory=1, max_iter=k + 1, tol=1e-15).run(torch.tensor(1.0), torch.tensor(0.0))
        # the regularisation of eps moves the secant by as much
        assert info.num_iter == k + 1 and y.item() == pytest.approx(iterates[-1], abs=1e-12)


def test_the_least_squares_problem_has_the_regularised_solution() -> None:
    rows, right, strength = draw(4, 9) * torch.tensor([1.0, 1e-6, 1e3, 0.0]).unsqueeze(1), draw(9, seed=1), 1e-3
    got = anderson._least_squares(rows, right, strength)
    scaled = torch.nn.functional.normalize(rows, dim=1)
    gamma = torch.linalg.solve(scaled @ scaled.mT + strength * torch.eye(4), scaled @ right)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    assert got[3] == 0 and near(got[:3] * lengths[:3], gamma[:3], 1e-12)


def test_anderson_needs_fewer_steps_on_a_slow_contraction() -> None:
    Q = torch.linalg.qr(draw(60, 60))[0]
    M = torch.eye(60) - Q @ torch.diag(torch.linspace(0.01, 1, 60)) @ Q.mT
    x, start = draw(60, seed=1), torch.zeros(60)
    _, plain = FixedPointIteration(linear, tol=1e-8, max_iter=5000).run(x, start, M)
    _, few = Anderson(linear, tol=1e-8).run(x, start, M)
    _, fewer = Anderson(linear, tol=1e-8, memory=20).run(x, start, M)
    assert plain.converged and few.converged and fewer.converged
    assert fewer.num_iter < few.num_iter < plain.num_iter / 4


def test_bad_extrapolations_are_taken_back() -> None:
    wild = lambda x, y: 2 * torch.cos(3 * y)  # the plain iteration is chaotic
    start = torch.linspace(0, 8, 20)
    y, info = Anderson(wild, tol=1e-10).run(torch.zeros(()), start)
    assert info.converged and (wild(None, y) - y).norm() <= 1e-10
    _, loose = FixedPointIteration(wild, tol=1e-10).run(torch.zeros(()), start)
    assert not loose.converged and loose.reason == "max_iter reached"
    partial = lambda x, y: x - 3 * y.log()  # NaN for negative y, where the plain iteration arrives in two steps
    y, info = Anderson(partial, tol=1e-12).run(torch.tensor([2.0]), torch.tensor([0.5]))
    assert info.converged and near(y + 3 * y.log(), torch.tensor([2.0]), 1e-11)
    with pytest.raises(FloatingPointError):
        FixedPointIteration(partial).run(torch.tensor([2.0]), torch.tensor([0.5]))


def test_the_best_iterate_is_returned() -> None:
    M, x = 1.5 * draw(12, 12), draw(12, seed=1)
    sizes = []
    for k in range(1, 12):
        y, info = Anderson(linear, memory=3, max_iter=k, tol=1e-14).run(x, torch.zeros(12), M)
        assert info.residual_norm == pytest.approx((linear(x, y, M) - y).norm().item(), rel=1e-9)
        sizes.append(info.residual_norm)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("module", "make"), [(fixed_point, FixedPointIteration), (anderson, Anderson)])
def test_convergence_is_tested_every_few_iterations_only_on_a_device(
    module, make: Callable[..., InnerSolver], monkeypatch: pytest.MonkeyPatch
) -> None:
    M, x = contraction(20, 0.95), draw(20, seed=1)
    often, _ = make(linear, tol=1e-11).run(x, torch.zeros(20), M)
    monkeypatch.setattr(module, "check_every", lambda rows: 8)
    with Reads() as reads:
        seldom, info = make(linear, tol=1e-11).run(x, torch.zeros(20), M)
    assert info.converged and info.num_iter % 8 == 0 and info.num_iter >= 16
    assert reads.count <= info.num_iter // 8 + 2  # init and the residual there
    assert near(often, seldom, 1e-9)


def test_vmap_gives_each_example_its_own_run() -> None:
    M, xs = contraction(6, 0.9), draw(3, 6, seed=1)
    solve = lambda x: Anderson(linear, tol=1e-12)(x, M, init=torch.zeros(6))[0]
    got = torch.func.vmap(torch.func.jacrev(solve))(xs)
    assert near(got, torch.linalg.inv(torch.eye(6) - M).expand(3, 6, 6), 1e-9)


def test_the_linear_solver_of_the_derivative_is_the_one_asked_for() -> None:
    M, x = contraction(6, 0.5), draw(6, seed=1).requires_grad_()
    for linear_solver in (BiCGSTAB(), Neumann(num_terms=100)):
        with ig.diagnostics() as log:
            y, _ = Anderson(linear, tol=1e-12, linear_solver=linear_solver)(x, M, init=torch.zeros(6))
            (got,) = torch.autograd.grad(y.sum(), x)
        assert log[-1].last.solver == type(linear_solver).__name__
        assert near(got, torch.linalg.inv(torch.eye(6) - M).sum(0), 1e-9)


@every_solver
def test_modules_and_the_random_state_are_left_alone(make: Callable[..., InnerSolver]) -> None:
    torch.manual_seed(3)
    net, inputs = contract.Noisy(), draw(16, 3, seed=1)
    step = lambda x, y: 0.1 * net(inputs + y)[:, :1].expand(16, 3)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    first, second = (make(step, max_iter=4).run(torch.zeros(()), torch.zeros(16, 3))[0] for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FixedPointIteration(3), TypeError, "function of"),  # pyright: ignore
        (lambda: FixedPointIteration(linear, damping=0.0), ValueError, "damping"),
        (lambda: FixedPointIteration(linear, damping=1.5), ValueError, "damping"),
        (lambda: FixedPointIteration(linear, tol=0.0), ValueError, "tol"),
        (lambda: Anderson(linear, memory=0), ValueError, "memory"),
        (lambda: Anderson(linear, regularization=0.0), ValueError, "regularization"),
        (lambda: replace(Anderson(linear), max_iter=0), ValueError, "max_iter"),
    ],
)
def test_wrong_hyperparameters_raise_at_construction(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@every_solver
def test_a_step_that_returns_no_tree_like_y_raises(make: Callable[..., InnerSolver]) -> None:
    with pytest.raises(ValueError, match="like y"):
        make(lambda x, y: y.sum())(torch.zeros(()), init=torch.zeros(3))
