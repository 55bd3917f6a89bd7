"""What every inner solver promises, in float64 against closed forms."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import implicitgrad as ig
from implicitgrad import solvers, tree
from implicitgrad.linalg import MINRES
from implicitgrad.solvers import InnerSolver, SolverInfo
from tests.solvers.inner_problems import CASES, DATA, INIT, ROSENBROCK, Case, X, as_tree, flat, to

every_case = pytest.mark.parametrize("case", CASES, ids=str)
ridge_only = pytest.mark.parametrize("case", [case for case in CASES if "ridge" in case.name], ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return torch.allclose(got, want, rtol=tolerance, atol=tolerance)


def weighted(y: Tensor) -> Tensor:
    return (y.sin() * torch.arange(1, 4).to(y)).sum()


def residual_norm(solver: InnerSolver, x: object, y: object, *data: object) -> float:
    parts = [leaf.detach().square().sum() for leaf in tree.leaves(solver.condition.residual(x, y, *data))]
    return torch.stack(parts).sum().sqrt().item()


@every_case
def test_solution_and_gradients_equal_the_closed_form(case: Case) -> None:
    solver = case.make(tol=case.tol)
    leaves = [X["log_penalty"], DATA[0]["features"], DATA[0]["target"]]
    results = []
    for exact in (False, True):
        penalty, features, target = own = [leaf.clone().requires_grad_() for leaf in leaves]
        x, data = {"log_penalty": penalty}, {"features": features, "target": target}
        if exact:
            y = case.exact(x, data)
        else:
            solution, info = solver(x, data, init=INIT)
            assert info.converged and info.reason == "converged" and info.residual_norm <= case.tol
            assert list(solution) == list(INIT)
            y = flat(solution)
        results.append((y, *torch.autograd.grad(weighted(y), own)))
    # Jacobians here have eigenvalues from 0.7 to 3, so solutions are as good as their residuals; derivatives by ten
    assert all(near(got, want, 100 * case.tol) for got, want in zip(*results, strict=True))


@every_case
def test_transforms_equal_the_closed_form(case: Case) -> None:
    solver = case.make(tol=case.tol)
    scalar = lambda penalty, init: weighted(flat(solver({"log_penalty": penalty}, *DATA, init=init)[0]))
    exact = lambda penalty: weighted(case.exact({"log_penalty": penalty}, *DATA))
    at = X["log_penalty"]
    assert near(torch.func.hessian(scalar)(at, INIT), torch.func.hessian(exact)(at), 1000 * case.tol)
    assert near(torch.func.jacfwd(scalar)(at, INIT), torch.func.grad(exact)(at), 100 * case.tol)
    several = torch.stack([at, at + 0.3])
    starts = tree.map(lambda leaf: torch.stack([leaf, -leaf]), INIT)
    got = torch.func.vmap(torch.func.grad(scalar))(several, starts)
    assert near(got, torch.func.vmap(torch.func.grad(exact))(several), 100 * case.tol)


@every_case
def test_eager_forward_mode_equals_the_closed_form(case: Case) -> None:
    at, direction = X["log_penalty"], torch.tensor([1.0, -2.0, 0.5]).double()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(at, direction)
        y, info = case.make(tol=case.tol)({"log_penalty": dual}, *DATA, init=INIT)
        got = forward_ad.unpack_dual(weighted(flat(y))).tangent
    assert info.converged
    exact = lambda penalty: weighted(case.exact({"log_penalty": penalty}, *DATA))
    assert near(got, torch.func.grad(exact)(at) @ direction, 100 * case.tol)


def test_info_under_vmap_is_the_worst_of_all_examples() -> None:
    solver = solvers.GradientDescent(lambda x, y: (x * y.square()).sum() + (y - 1).square().sum(), tol=1e-9)
    infos = []

    def solve(x: Tensor) -> Tensor:
        y, info = solver(x, init=torch.zeros(2).double())
        infos.append(info)
        return y

    xs = torch.tensor([[0.0, 0.0], [1.0, 50.0], [0.0, 3.0]]).double()
    torch.func.vmap(solve)(xs)
    alone = [solver.run(x, torch.zeros(2).double())[1] for x in xs]
    assert infos[0].num_iter == max(info.num_iter for info in alone) > min(info.num_iter for info in alone)
    assert infos[0].residual_norm == max(info.residual_norm for info in alone)
    assert infos[0].num_evaluations == sum(info.num_evaluations for info in alone)
    assert infos[0].value is None and alone[0].value is not None


@ridge_only
def test_a_tensor_that_the_condition_closes_over_is_differentiated_in_transforms(case: Case) -> None:
    def solve(penalty: Tensor) -> Tensor:
        data = {"features": DATA[0]["features"], "target": penalty * DATA[0]["target"]}
        solver = case.make(tol=case.tol)
        closing = _closing_over(solver, data)
        return weighted(flat(closing(X, init=INIT)[0]))

    def exact(penalty: Tensor) -> Tensor:
        data = {"features": DATA[0]["features"], "target": penalty * DATA[0]["target"]}
        return weighted(case.exact(X, data))

    at = torch.tensor(1.3).double()
    want = torch.func.grad(exact)(at)
    assert near(torch.func.grad(solve)(at), want, 100 * case.tol)
    eager = at.clone().requires_grad_()
    assert near(torch.autograd.grad(solve(eager), eager)[0], want, 100 * case.tol)


def _closing_over(solver: InnerSolver, data: dict) -> InnerSolver:
    """The same solver with the data inside its function."""
    from dataclasses import fields, replace

    name = fields(solver)[0].name  # pyright: ignore
    function = getattr(solver, name)
    return replace(solver, **{name: lambda x, y: function(x, y, data)})  # pyright: ignore


@every_case
def test_warm_start_saves_iterations(case: Case) -> None:
    solver = case.make(tol=1e-8)
    cold, far = solver.run(X, INIT, *DATA)
    _, none = solver.run(X, cold, *DATA)
    assert none.num_iter == 0 and none.converged and far.num_iter > 0
    nearby = {"log_penalty": X["log_penalty"] + 1e-5}
    _, few = solver.run(nearby, cold, *DATA)
    assert few.converged
    # what Newton's method solves in a step or two takes as many from nearby; SciPy's hybr grows its trust region first
    assert few.num_iter < far.num_iter or far.num_iter <= 2 or "hybr" in case.name


@every_case
def test_float32(case: Case) -> None:
    x, init, data = to(torch.float32, X, INIT, DATA[0])
    x["log_penalty"].requires_grad_()
    solver = case.make(tol=None if case.tol < 1e-8 else 1e-4)
    if "ScipyRoot, krylov" in case.name:
        with pytest.raises(ValueError, match="float64"):
            solver.run(x, init, data)
        return
    y, info = solver(x, data, init=init)
    assert info.converged and {leaf.dtype for leaf in tree.leaves(y)} == {torch.float32}
    (got,) = torch.autograd.grad(weighted(flat(y)), x["log_penalty"])
    assert got.dtype == torch.float32
    exact = lambda penalty: weighted(case.exact({"log_penalty": penalty}, *DATA))
    # the default tolerance in float32 is 1e-5
    assert near(got.double(), torch.func.grad(exact)(X["log_penalty"]), 1e-4 if case.tol < 1e-8 else 1e-3)


@every_case
def test_a_run_that_ends_early_says_so_with_the_true_residual(case: Case) -> None:
    solver = case.make(tol=1e-300, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy's own
        y, info = solver.run(X, INIT, *DATA)
    assert not info.converged and info.reason not in ("", "converged")
    assert info.residual_norm == pytest.approx(residual_norm(solver, X, y, *DATA), rel=1e-12)
    assert not any(leaf.requires_grad for leaf in tree.leaves(y))


def test_a_bad_solution_warns_when_it_is_made_differentiable() -> None:
    solver = solvers.GradientDescent(lambda x, y: (y - x).square().sum() + y.square().sum() ** 2, max_iter=1)
    with pytest.warns(ig.ConvergenceWarning, match="does not satisfy its condition"):
        _, info = solver(torch.ones(2).requires_grad_(), init=torch.full((2,), 5.0))
    assert not info.converged


@every_case
def test_nan_raises_and_arguments_stay(case: Case) -> None:
    solver = case.make()
    x, init, data = to(torch.float64, X, INIT, DATA[0])
    before = [leaf.clone() for leaf in tree.leaves((x, init, data))]
    solver(x, data, init=init)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves((x, init, data)), strict=True))
    wrong = tree.map(lambda leaf: leaf * torch.nan, init)
    with pytest.raises(FloatingPointError):
        solver(x, data, init=wrong)
    data["target"][1] = torch.nan
    with pytest.raises(FloatingPointError):
        solver(x, data, init=init)


@every_case
def test_gradients_of_the_run_are_not_recorded(case: Case) -> None:
    x, init, data = to(torch.float64, X, INIT, DATA[0])
    for leaf in tree.leaves((x, init, data)):
        leaf.requires_grad_()
    y, info = case.make().run(x, init, data)
    assert not any(leaf.requires_grad for leaf in tree.leaves(y))
    y, info = case.make()(x, data, init=init)
    torch.autograd.grad(weighted(flat(y)), tree.leaves((x, data)))
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(weighted(flat(case.make()(x, data, init=init)[0])), init["head"])


@ridge_only
def test_evaluations_are_counted(case: Case) -> None:
    calls = []
    solver = case.make(tol=1e-8)
    closing = _counting(solver, calls)
    _, info = closing.run(X, INIT, *DATA)
    assert info.num_evaluations == len(calls) > 0


def _counting(solver: InnerSolver, calls: list) -> InnerSolver:
    from dataclasses import fields, replace

    name = fields(solver)[0].name  # pyright: ignore
    function = getattr(solver, name)

    def counted(*arguments: object) -> object:
        calls.append(1)
        return function(*arguments)

    return replace(solver, **{name: counted})  # pyright: ignore


@pytest.mark.parametrize("case", ROSENBROCK, ids=str)
def test_rosenbrock_from_its_usual_start(case: Case) -> None:
    solver = case.make(tol=1e-9, max_iter=5000)
    x = torch.tensor(1.0).double().requires_grad_()
    y, info = solver(x, init=torch.tensor([-1.2, 1.0]).double())
    assert info.converged
    # the smallest eigenvalue of the Hessian is 0.4: y is good to 2.5e-9
    assert near(y, torch.ones(2).double(), 1e-8)
    assert torch.autograd.grad(y[1], x)[0].item() == pytest.approx(2.0, abs=1e-6)  # of x²


class Noisy(nn.Module):
    """Dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


@pytest.mark.parametrize(
    "make",
    [
        lambda loss: solvers.TorchOptim(loss, lambda y: torch.optim.Adam(y, lr=0.01), max_iter=5),
        lambda loss: solvers.GradientDescent(loss, max_iter=5),
        lambda loss: solvers.LBFGS(loss, max_iter=5),
        lambda loss: solvers.Newton(loss, max_iter=3),
        lambda loss: solvers.RegularizedNewton(loss, max_iter=3),
        lambda loss: solvers.ScipyMinimize(loss, max_iter=5),
    ],
)
def test_modules_and_the_random_state_are_left_alone(make) -> None:
    torch.manual_seed(3)
    net = Noisy().double()
    inputs, targets = torch.randn(16, 3).double(), torch.randn(16, 1).double()

    def loss(x: Tensor, y: dict) -> Tensor:
        return (torch.func.functional_call(net, y, inputs) - targets).square().mean() + sum(
            x * leaf.square().sum() for leaf in y.values()
        )

    init = {name: value.detach().clone() for name, value in net.named_parameters()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    solver = make(loss)
    first, info = solver.run(torch.tensor(0.1).double(), init)
    second, _ = solver.run(torch.tensor(0.1).double(), init)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(value.grad is None for value in net.parameters())
    # one mask for the whole run, the same for the next one: values descend, and runs repeat
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(first), tree.leaves(second), strict=True))
    with torch.random.fork_rng():
        assert info.value is not None and info.value < loss(torch.tensor(0.1).double(), init).item()


def test_linear_solver_of_the_derivative_is_the_one_asked_for() -> None:
    case = CASES[0]
    penalty = X["log_penalty"].clone().requires_grad_()
    with ig.diagnostics() as log:
        y, _ = case.make(linear_solver=MINRES())({"log_penalty": penalty}, *DATA, init=INIT)
        weighted(flat(y)).backward()
    assert log[0].last.solver == "MINRES"


def test_no_gradients_and_no_transform_gives_plain_numbers() -> None:
    with torch.no_grad():
        y, info = CASES[0].make()({"log_penalty": X["log_penalty"].clone().requires_grad_()}, *DATA, init=INIT)
    assert isinstance(info, SolverInfo) and info.linear_solver is None
    assert not any(leaf.requires_grad for leaf in tree.leaves(y))


def test_as_tree_undoes_flat() -> None:
    assert torch.equal(flat(as_tree(flat(INIT))), flat(INIT))


def square(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: solvers.GradientDescent(3), TypeError, "function of"),  # pyright: ignore
        (lambda: solvers.GradientDescent(square, tol=0.0), ValueError, "tol"),
        (lambda: solvers.GradientDescent(square, max_iter=0), ValueError, "max_iter"),
        (lambda: solvers.GradientDescent(square, memory=0), ValueError, "memory"),
        (lambda: solvers.LBFGS(square, history_size=0), ValueError, "history_size"),
        (lambda: solvers.LBFGS(square, tol=float("nan")), ValueError, "tol"),
        (lambda: solvers.TorchOptim(square, "adam"), TypeError, "optimizer"),  # pyright: ignore
        (lambda: solvers.Newton(square, refresh_every=0), ValueError, "refresh_every"),
        (lambda: solvers.Newton(square, system_solver="lu"), TypeError, "linear solver"),  # pyright: ignore
        (lambda: solvers.Newton(square, curvature=torch.eye(2)), TypeError, "curvature"),  # pyright: ignore
        (lambda: solvers.RegularizedNewton(square, lipschitz=0.0), ValueError, "lipschitz"),
        (lambda: solvers.GaussNewton(None), TypeError, "function of"),  # pyright: ignore
        (lambda: solvers.LevenbergMarquardt(square, max_iter=-1), ValueError, "max_iter"),
        (lambda: solvers.ScipyMinimize(square, bounds=3.0), TypeError, "pair"),  # pyright: ignore
        (lambda: solvers.Bisection(square, bounds=(0.0, 1.0, 2.0)), TypeError, "pair"),  # pyright: ignore
        (lambda: solvers.AugmentedLagrangian(square, square, penalty=-1.0), ValueError, "penalty"),
        (lambda: solvers.AugmentedLagrangian(square, None), TypeError, "function of"),  # pyright: ignore
    ],
)
def test_wrong_hyperparameters_raise_at_construction(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("make", [solvers.GradientDescent, solvers.LBFGS, solvers.Newton, solvers.ScipyMinimize])
def test_wrong_losses_and_starts_raise_in_a_run(make) -> None:
    x = torch.ones(2)
    with pytest.raises(ValueError, match="scalar"):
        make(lambda x, y: y - x)(x, init=torch.zeros(2))
    with pytest.raises(ValueError, match="does not depend on y"):
        make(lambda x, y: x.sum())(x, init=torch.zeros(2))
    with pytest.raises(TypeError, match="floating point"):
        make(square)(x, init=torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="init"):
        make(square)(x)
