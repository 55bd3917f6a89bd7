"""Proximal, projected, mirror and block coordinate descent against scikit-learn, SciPy, CVXPY and closed forms."""

from collections.abc import Callable, Iterator

import cvxpy
import numpy as np
import pytest
import scipy.optimize
import sklearn.linear_model
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import implicitgrad as ig
from implicitgrad import projections, prox, solvers, tree
from implicitgrad.solvers import (
    AcceleratedProjectedGradient,
    AcceleratedProximalGradient,
    BlockCoordinateDescent,
    InnerSolver,
    MirrorGradientDescent,
    mirror_descent,
    proximal_gradient,
)
from tests.solvers import test_contract as contract
from tests.solvers.inner_problems import LOGISTIC_LOSS, RIDGE_LOSS, Case, exact_logistic, exact_ridge


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
    return torch.allclose(torch.as_tensor(got), torch.as_tensor(want), rtol=tolerance, atol=tolerance)


def half_square(x: Tensor, y: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (A @ y - b).square().sum() / len(b)


def shrink(x: Tensor, y: Tensor, scaling: Tensor, *data: Tensor) -> Tensor:
    return prox.l1(y, x.exp(), scaling)


# --- the contract of inner solvers, without and with blocks -----------------------------------------------------------

MAKERS: dict[str, Callable[..., InnerSolver]] = {
    "proximal": lambda loss, **options: AcceleratedProximalGradient(loss, lambda x, y, s, data: y, **options),
    "projected": lambda loss, **options: AcceleratedProjectedGradient(loss, lambda x, y, data: y, **options),
    "mirror": lambda loss, **options: MirrorGradientDescent(loss, lambda x, v, data: v, lambda y: y, **options),
    "blocks": lambda loss, **options: BlockCoordinateDescent(
        loss, {"head": lambda x, y, s, data: y, "tail": lambda x, y, s, data: y}, **options
    ),
}
CASES = [
    Case(f"{name}, {problem}", lambda loss=loss, make=make, **options: make(loss, **options), exact)
    for name, make in MAKERS.items()
    for problem, loss, exact in (("ridge", RIDGE_LOSS, exact_ridge), ("logistic", LOGISTIC_LOSS, exact_logistic))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_solution_and_gradients_equal_the_closed_form(case: Case) -> None:
    contract.test_solution_and_gradients_equal_the_closed_form(case)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
@pytest.mark.parametrize(
    "claim",
    [
        contract.test_transforms_equal_the_closed_form,
        contract.test_warm_start_saves_iterations,
        contract.test_float32,
        contract.test_a_run_that_ends_early_says_so_with_the_true_residual,
        contract.test_nan_raises_and_arguments_stay,
        contract.test_gradients_of_the_run_are_not_recorded,
    ],
    ids=lambda claim: claim.__name__,
)
def test_contract(claim: Callable[[Case], None], case: Case) -> None:
    claim(case)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_evaluations_of_the_loss_are_counted(make: Callable[..., InnerSolver]) -> None:
    calls = []

    def loss(x: dict, y: dict, data: dict) -> Tensor:
        calls.append(1)
        return RIDGE_LOSS(x, y, data)

    _, info = make(loss, tol=1e-8).run(contract.X, contract.INIT, *contract.DATA)
    assert info.num_evaluations == len(calls) > 0


# --- sparse regression ------------------------------------------------------------------------------------------------


def lasso_problem() -> tuple[Tensor, Tensor, float]:
    A = draw(100, 200)
    b = A[:, ::20] @ draw(10, seed=1) + 0.1 * draw(100, seed=2)
    return A, b, 0.1


def sklearn_lasso(A: Tensor, b: Tensor, penalty: float) -> Tensor:
    # alpha of scikit-learn belongs to the mean of squares over two, like the loss here
    model = sklearn.linear_model.Lasso(alpha=penalty, fit_intercept=False, tol=1e-14, max_iter=100_000)
    return torch.as_tensor(model.fit(A.numpy(), b.numpy()).coef_)


def test_lasso_and_its_derivative_equal_scikit_learn() -> None:
    A, b, penalty = lasso_problem()
    solver = AcceleratedProximalGradient(half_square, shrink, tol=1e-12, symmetric_on_support=True)
    x = torch.tensor(penalty).log().requires_grad_()
    with ig.diagnostics() as log:
        y, info = solver(x, A, b, init=torch.zeros(200))
        weights = draw(200, seed=3)
        (got,) = torch.autograd.grad((y * weights).sum(), x)
    assert info.converged
    want = sklearn_lasso(A, b, penalty)
    assert near(y, want, 1e-7)  # scikit-learn's duality gap of 1e-14
    assert 5 < int((y != 0).sum()) == log[-1].support < 100
    h = 1e-4  # the path is linear in the penalty, x its logarithm: differences are good to h²
    ahead, behind = (sklearn_lasso(A, b, penalty * np.exp(s)) for s in (h, -h))
    assert near(got, ((ahead - behind) / (2 * h) * weights).sum(), 1e-6)


def test_momentum_and_restarts_pay() -> None:
    A, b = draw(80, 60) * torch.logspace(0, 0.7, 60), draw(80, seed=1)
    solver = AcceleratedProximalGradient(half_square, shrink, tol=1e-7)
    _, info = solver.run(torch.tensor(0.1).log(), torch.zeros(60), A, b)
    H = A.mT @ A / 80
    step, y = 1 / torch.linalg.matrix_norm(H, 2), torch.zeros(60)
    for plain in range(10_000):
        new = prox.l1(y - step * (H @ y - A.mT @ b / 80), 0.1, step)
        if plain % 50 == 0 and (y - prox.l1(y - (H @ y - A.mT @ b / 80), 0.1)).norm() <= 1e-7:
            break
        y = new
    assert info.converged and info.num_iter < plain / 3


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_iterations_do_not_depend_on_the_units_of_the_loss(scale: float) -> None:
    A, b, penalty = lasso_problem()
    loss = lambda x, y: scale * half_square(x, y, A, b)
    threshold = lambda x, y, s: prox.l1(y, scale * penalty, s)
    solver = AcceleratedProximalGradient(loss, threshold, tol=1e-9 * scale if scale < 1 else 1e-9, max_iter=400)
    y, info = solver.run(torch.zeros(()), torch.zeros(200))
    assert info.converged  # 54 iterations at 1, and up to 25 more to find the step
    assert near(y, sklearn_lasso(A, b, penalty), 1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_blocks_solve_the_lasso_with_intercept_as_scikit_learn(exact: bool) -> None:
    A, b = draw(60, 20), draw(60, seed=1) + 30
    model = sklearn.linear_model.Lasso(alpha=0.2, tol=1e-14, max_iter=100_000).fit(A.numpy(), b.numpy())
    predict = lambda y: A @ y["coef"] + 10 * y["intercept"]
    loss = lambda x, y: 0.5 * (predict(y) - b).square().mean()
    solver = BlockCoordinateDescent(
        loss,
        {"intercept": lambda x, leaf, s: leaf, "coef": shrink},
        minimizers={"coef": None, "intercept": lambda x, y: (b - A @ y["coef"]).mean() / 10} if exact else None,
        tol=1e-10,
    )
    x = torch.tensor(0.2).log().requires_grad_()
    y, info = solver(x, init={"coef": torch.zeros(20), "intercept": torch.zeros(())})
    assert info.converged and list(y) == ["coef", "intercept"]
    assert near(y["coef"], model.coef_, 1e-7) and near(10 * y["intercept"], model.intercept_, 1e-7)
    (got,) = torch.autograd.grad(10 * y["intercept"], x)
    support = torch.as_tensor(model.coef_ != 0)
    centred = (A - A.mean(0))[:, support]
    slope = -0.2 * torch.linalg.solve(centred.mT @ centred / 60, torch.as_tensor(model.coef_[support]).sign())
    assert near(got, -A.mean(0)[support] @ slope, 1e-8)


def test_exact_minimisers_make_gauss_seidel_sweeps() -> None:
    matrix, b = draw(7, 5), draw(7, seed=1)
    H, right = matrix.mT @ matrix, matrix.mT @ b
    loss = lambda x, y: 0.5 * (matrix[:, :2] @ y["u"] + matrix[:, 2:] @ y["v"] - b).square().sum()
    keep = lambda x, leaf, s: leaf
    left = lambda x, y: torch.linalg.solve(H[:2, :2], right[:2] - H[:2, 2:] @ y["v"])
    below = lambda x, y: torch.linalg.solve(H[2:, 2:], right[2:] - H[2:, :2] @ y["u"])
    start = {"u": torch.zeros(2), "v": torch.ones(3)}
    make = lambda **options: BlockCoordinateDescent(
        loss, {"u": keep, "v": keep}, {"u": left, "v": below}, tol=1e-12, **options
    )
    lower = torch.block_diag(H[:2, :2], H[2:, 2:])
    lower[2:, :2] = H[2:, :2]
    y = torch.cat([start["u"], start["v"]])
    for _ in range(3):
        y = y + torch.linalg.solve(lower, right - H @ y)
    three, info = make(max_iter=3).run(torch.zeros(()), start)
    assert info.num_iter == 3 and not info.converged and near(torch.cat([three["u"], three["v"]]), y, 1e-12)
    end, info = make().run(torch.zeros(()), start)
    assert info.converged and near(torch.cat([end["u"], end["v"]]), torch.linalg.solve(H, right), 1e-10)


# --- constraints ------------------------------------------------------------------------------------------------------


def test_nonnegative_least_squares_equals_scipy_and_its_pseudoinverse() -> None:
    A, b = draw(60, 40), draw(60, seed=1).requires_grad_()
    solver = AcceleratedProjectedGradient(
        half_square, lambda x, y, *data: projections.non_negative(y), tol=1e-13, symmetric_on_support=True
    )
    with ig.diagnostics() as log:
        y, info = solver(torch.zeros(()), A, b, init=torch.zeros(40))
        weights = draw(40, seed=2)
        (got,) = torch.autograd.grad((y * weights).sum(), b)
    want, _ = scipy.optimize.nnls(A.numpy(), b.detach().numpy())
    assert info.converged and near(y, want, 1e-10)
    support = torch.as_tensor(want > 0)
    assert 5 < int(support.sum()) == log[-1].support < 40
    assert near(got, torch.linalg.pinv(A[:, support]).mT @ weights[support], 1e-10)


def test_least_squares_on_the_simplex_equals_cvxpy_and_its_kkt_system() -> None:
    A, b = draw(30, 25), draw(30, seed=1).requires_grad_()
    variable = cvxpy.Variable(25)
    objective = cvxpy.sum_squares(A.numpy() @ variable - b.detach().numpy()) / 60
    cvxpy.Problem(cvxpy.Minimize(objective), [variable >= 0, cvxpy.sum(variable) == 1]).solve(
        solver="CLARABEL", tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13
    )
    want = torch.as_tensor(variable.value)
    weights = draw(25, seed=2)
    support = want > 1e-6
    k = int(support.sum())
    system = torch.zeros(k + 1, k + 1)
    system[:k, :k], system[k, :k], system[:k, k] = A[:, support].mT @ A[:, support], 1, 1
    right = torch.cat([weights[support], torch.zeros(1)])
    slope = A[:, support] @ torch.linalg.solve(system, right)[:k]
    start = torch.full((25,), 1 / 25)
    solver = AcceleratedProjectedGradient(half_square, lambda x, y, *data: projections.simplex(y), tol=1e-13)
    y, info = solver(torch.zeros(()), A, b, init=start)
    assert info.converged and near(y, want, 1e-7)  # what Clarabel reaches
    assert near(torch.autograd.grad((y * weights).sum(), b)[0], slope, 1e-10)
    mirror = MirrorGradientDescent(half_square, lambda x, v, *data: v.softmax(0), tol=1e-12, max_iter=20_000)
    exponentiated, info = mirror.run(torch.zeros(()), start, A, b)
    assert info.converged and near(exponentiated, y.detach(), 1e-9)


def test_entropy_on_the_simplex_equals_the_softmax_to_second_order() -> None:
    loss = lambda x, y: sum((x[k] * y[k]).sum() + (y[k] * y[k].log()).sum() for k in y)
    solver = MirrorGradientDescent(loss, tol=1e-13)
    start = {"b": torch.full((2,), 0.2), "a": torch.full((3,), 0.2)}
    costs = draw(5)
    split = lambda c: {"a": c[:3], "b": c[3:]}
    weighted = lambda p: (p * torch.arange(1.0, 6.0)).sum()
    got = lambda c: weighted(torch.cat([v for _, v in sorted(solver(split(c), init=start)[0].items())]))
    exact = lambda c: weighted((-c).softmax(0))
    assert near(got(costs), exact(costs), 1e-12)
    assert near(torch.func.grad(got)(costs), torch.func.grad(exact)(costs), 1e-10)
    assert near(torch.func.hessian(got)(costs), torch.func.hessian(exact)(costs), 1e-9)


def test_another_mirror_map_where_the_gradient_is_not_lipschitz() -> None:
    loss = lambda x, y: (x * y - y.log()).sum()  # y = 1/x
    burg = MirrorGradientDescent(loss, lambda x, v: -1 / v, lambda y: -1 / y, step=0.1, tol=1e-11)
    x = torch.tensor([0.01, 1.0, 30.0], requires_grad=True)
    y, info = burg(x, init=torch.ones(3))
    assert info.converged and near(y, 1 / x.detach(), 1e-9)
    assert near(torch.autograd.grad(y.sum(), x)[0], -1 / x.detach().square(), 1e-8)


def test_mirror_descent_reaches_a_vertex_without_nan() -> None:
    solver = MirrorGradientDescent(lambda x, y: (x * y).sum() + 0 * y.square().sum(), tol=1e-12)
    y, info = solver.run(torch.tensor([3.0, 1.0, 2.0]), torch.full((3,), 1 / 3))
    assert info.converged and near(y, torch.tensor([0.0, 1.0, 0.0]), 1e-12)
    _, again = solver.run(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 0.0]))  # 0 · log 0
    assert again.converged and again.num_iter == 0


# --- how runs go and end ----------------------------------------------------------------------------------------------


def test_steps_that_leave_the_domain_of_the_loss_are_shortened() -> None:
    loss = lambda x, y: (x * y - y.log()).sum()  # NaN for negative y
    solver = AcceleratedProximalGradient(loss, lambda x, y, s: y, tol=1e-10, step=100.0)
    y, info = solver.run(torch.tensor([0.1, 2.0]), torch.ones(2))
    assert info.converged and near(y, torch.tensor([10.0, 0.5]), 1e-8)


def test_a_loss_without_a_passing_step_ends_with_a_reason() -> None:
    y, info = AcceleratedProximalGradient(lambda x, y: -y.abs().sqrt().sum(), lambda x, y, s: y.clamp(-1, 1)).run(
        torch.zeros(()), torch.full((2,), 0.5)
    )
    assert info.converged and near(y.abs(), torch.ones(2), 1e-12)  # not convex, but at the border of its set
    kink = lambda x, y: torch.where(y >= 0, y, -y).sum()  # at 0 the gradient is 1, and -1 after any step
    for solver in (
        AcceleratedProximalGradient(kink, lambda x, y, s: y),
        MirrorGradientDescent(kink, lambda x, v: v, lambda y: y),
        BlockCoordinateDescent(kink, lambda x, y, s: y),
    ):
        y, info = solver.run(torch.zeros(()), torch.zeros(1))
        assert not info.converged and "no step passes" in info.reason
        assert y.item() == 0 and info.residual_norm == 1


def test_nan_from_a_prox_raises() -> None:
    solver = AcceleratedProximalGradient(half_square, lambda x, y, s, *data: y * torch.nan)
    with pytest.raises(FloatingPointError, match="prox"):
        solver.run(torch.zeros(()), torch.zeros(4), draw(5, 4), draw(5))
    block = BlockCoordinateDescent(half_square, lambda x, y, s, *data: y * torch.nan)
    with pytest.raises(FloatingPointError, match="prox"):
        block.run(torch.zeros(()), torch.zeros(4), draw(5, 4), draw(5))
    with pytest.raises(FloatingPointError, match="positive numbers"):
        MirrorGradientDescent(half_square, lambda x, v, *data: v.softmax(0)).run(
            torch.zeros(()), -torch.ones(4), draw(5, 4), draw(5)
        )


class Reads(TorchFunctionMode):
    """Counts transfers of numbers to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__)
        return func(*args, **(kwargs or {}))


def test_numbers_are_read_every_few_iterations_only_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    A, b = draw(30, 10), draw(30, seed=1)
    plain = lambda x, y, s, *data: y
    for module, solver in (
        (proximal_gradient, AcceleratedProximalGradient(half_square, plain, tol=1e-12)),
        (mirror_descent, MirrorGradientDescent(half_square, lambda x, v, *data: v, lambda y: y, tol=1e-12)),
    ):
        often, _ = solver.run(torch.zeros(()), torch.zeros(10), A, b)
        monkeypatch.setattr(module, "check_every", lambda rows: 8)
        with Reads() as reads:
            seldom, info = solver.run(torch.zeros(()), torch.zeros(10), A, b)
        assert info.converged and info.num_iter % 8 == 0 and info.num_iter >= 16
        assert reads.count <= info.num_iter // 8 + 5  # init (twice), loss and residual there, and the loss at the end
        assert near(often, seldom, 1e-11)


def test_the_random_state_and_modules_stay() -> None:
    torch.manual_seed(0)
    net = contract.Noisy()
    inputs = draw(16, 3)
    loss = lambda x, y: torch.func.functional_call(net, y, inputs).square().mean()
    init = {name: value.detach().clone() for name, value in net.named_parameters()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    runs = [
        AcceleratedProximalGradient(loss, lambda x, y, s: prox.l1(y, 0.01, s), max_iter=5).run(torch.zeros(()), init)[0]
        for _ in range(2)
    ]
    BlockCoordinateDescent(loss, tree.map(lambda _: lambda x, y, s: y, init), max_iter=2).run(torch.zeros(()), init)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, runs), strict=True))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: AcceleratedProximalGradient(3, shrink), TypeError, "function of"),  # pyright: ignore
        (lambda: AcceleratedProximalGradient(half_square, None), TypeError, "prox"),  # pyright: ignore
        (lambda: AcceleratedProximalGradient(half_square, shrink, step=0.0), ValueError, "step"),
        (lambda: AcceleratedProjectedGradient(half_square, "box"), TypeError, "projection"),  # pyright: ignore
        (lambda: AcceleratedProjectedGradient(half_square, torch.relu, tol=-1.0), ValueError, "tol"),
        (lambda: MirrorGradientDescent(half_square, mirror_map=1), TypeError, "mirror_map"),  # pyright: ignore
        (lambda: MirrorGradientDescent(half_square, max_iter=0), ValueError, "max_iter"),
        (lambda: BlockCoordinateDescent(half_square, {"a": 1}), TypeError, "prox"),
        (lambda: BlockCoordinateDescent(half_square, {"a": shrink}, {"a": 1}), TypeError, "minimizer"),
    ],
)
def test_wrong_hyperparameters_raise_at_construction(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_prox_of_the_wrong_shape_raises() -> None:
    solver = solvers.AcceleratedProximalGradient(half_square, lambda x, y, s, *data: y[:-1])
    with pytest.raises(ValueError, match="like y"):
        solver.run(torch.zeros(()), torch.zeros(4), draw(5, 4), draw(5))
    with pytest.raises(ValueError, match="differ in structure"):
        BlockCoordinateDescent(lambda x, y: y["a"].sum(), {"b": shrink}).run(torch.zeros(()), {"a": torch.zeros(2)})
