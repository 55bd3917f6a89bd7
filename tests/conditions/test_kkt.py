"""Constrained minimisers: derivatives in all modes, multipliers, and what is said about the assumptions."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.conditions import KKT
from tests import test_derivatives as contract
from tests.cases import ConditionCase, SolverCase


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(before)


# --- a problem with a curved active inequality, a linear equality and an inactive inequality --------------------------


def objective(x: Tensor, z: Tensor, features: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (features @ z - target).square().mean() + 0.5 * (x.exp() * z.square()).sum()


def equality(x: Tensor, z: Tensor, features: Tensor, target: Tensor) -> Tensor:
    return (features[0] @ z - target[0]).unsqueeze(0)


def inequality(x: Tensor, z: Tensor, features: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Away from a ball around (1, 1, 1) by more than the minimiser would like; and far inside of another one."""
    return {"near": 2.0 + 0.1 * target[1] - (z - 1).square().sum(), "far": (z.square() - 100).reshape(3, 1)}


def newton(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    """`(z, ν, λ)` of the active constraints by differentiable Newton steps, `(5,)`."""

    def residual(u: Tensor) -> Tensor:
        z, nu, lam = u[:3], u[3], u[4]
        slope = features.mT @ (features @ z - target) / len(features) + x.exp() * z
        stationarity = slope + nu * features[0] - 2 * lam * (z - 1)
        near = 2.0 + 0.1 * target[1] - (z - 1).square().sum()
        return torch.cat([stationarity, torch.stack([features[0] @ z - target[0], near])])

    def jacobian(u: Tensor) -> Tensor:
        z, lam = u[:3], u[4]
        hessian = features.mT @ features / len(features) + torch.diag_embed(x.exp() - 2 * lam)
        sides = torch.stack([features[0], -2 * (z - 1)], -1)
        return torch.cat([torch.cat([hessian, sides], -1), torch.cat([sides.mT, torch.zeros(2, 2)], -1)])

    u = torch.tensor([-0.1, -0.1, -0.1, 0.0, 0.1])
    for _ in range(12):
        u = u - torch.linalg.inv(jacobian(u)) @ residual(u)
    return u


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, DATA = torch.tensor([-0.5, -0.2, 0.3], dtype=torch.float64), (draw(5, 3, seed=1), draw(5, seed=2))
PRIMAL = ConditionCase(
    "recovered multipliers",
    KKT(objective, equality, inequality, recover_duals=True),
    lambda *arguments: newton(*arguments)[:3],
    X,
    DATA,
    frozenset({"square"}),
)
FULL = KKT(objective, equality, inequality)


def as_y(u: Tensor) -> dict:
    inactive = torch.zeros(3, 1, dtype=u.dtype)
    return {"primal": u[:3], "equality": u[3:4], "inequality": {"near": u[4], "far": inactive}}


def test_the_newton_oracle_found_a_minimiser_with_the_active_set_it_assumes():
    u = newton(X, *DATA)
    y = as_y(u)
    assert ig.tree.ravel(FULL.residual(X, y, *DATA))[0].abs().max() < 1e-13
    assert u[4] > 0.01
    scipy = pytest.importorskip("scipy.optimize")
    numbers = lambda value: lambda z: value(torch.as_tensor(z)).detach().numpy()
    found = scipy.minimize(
        numbers(lambda z: objective(X, z, *DATA)),
        u[:3].numpy() + 0.01,
        method="SLSQP",
        constraints=[
            {"type": "eq", "fun": numbers(lambda z: equality(X, z, *DATA))},
            {"type": "ineq", "fun": numbers(lambda z: -inequality(X, z, *DATA)["near"])},
        ],
        options={"ftol": 1e-14},
    )
    assert abs(found.x - u[:3].numpy()).max() < 1e-6


# --- derivatives ------------------------------------------------------------------------------------------------------

SQUARE = [
    SolverCase(solver, "square") for solver in (ig.linalg.Auto(), ig.linalg.LU(), ig.linalg.GMRES(), ig.linalg.LSMR())
]


@pytest.mark.parametrize("solver", SQUARE, ids=str)
def test_primal_form_meets_the_contract_of_conditions_with_every_solver(solver: SolverCase):
    contract.test_reverse_mode_equals_closed_form_in_every_argument(PRIMAL, solver)
    contract.test_forward_mode_equals_closed_form(PRIMAL, solver)
    contract.test_second_derivatives_in_three_mode_pairs_equal_closed_form(PRIMAL, solver)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jacfwd"])
def test_primal_form_under_functional_transforms(transform: str):
    contract.test_functional_transform_equals_closed_form(PRIMAL, ig.linalg.Auto(), transform)


@pytest.mark.parametrize("name", ["x batched", "one of two"])
def test_primal_form_under_vmap(name: str):
    contract.test_vmap_over_problems_and_its_derivatives_equal_closed_form(PRIMAL, *contract.BATCHES[name])


def test_primal_form_in_further_modes():
    contract.test_batched_cotangents_equal_closed_form(PRIMAL, ig.linalg.Auto())
    contract.test_third_derivatives_equal_closed_form(PRIMAL)
    contract.test_forward_over_forward_raises(PRIMAL)
    contract.test_declared_structure_is_that_of_the_jacobian(PRIMAL)


@ig.implicit(FULL)
def solve(x: Tensor, features: Tensor, target: Tensor) -> dict:
    return as_y(newton(x, features, target))


def flat(x: Tensor, *data: Tensor) -> Tensor:
    y = solve(x, *data)
    return torch.cat([y["primal"], y["equality"], y["inequality"]["near"].reshape(1)])


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_derivatives_of_point_and_multipliers_equal_those_of_newton(argument: int):
    at = (X, *DATA)
    for transform in (torch.func.jacrev, torch.func.jacfwd, lambda f, i: torch.func.jacfwd(torch.func.jacrev(f, i), i)):
        got, want = transform(flat, argument)(*at), transform(newton, argument)(*at)
        assert contract.close(got, want)


def test_derivatives_of_point_and_multipliers_over_a_batch():
    batch = X + 0.05 * torch.randn(4, 3)
    stacked = lambda f: torch.func.vmap(torch.func.jacrev(lambda x: f(x, *DATA)))(batch)
    assert contract.close(stacked(flat), stacked(newton))


@pytest.mark.parametrize("linear", [ig.linalg.LDL(), ig.linalg.MINRES(), ig.linalg.LU(), None], ids=str)
def test_symmetric_solvers_take_the_full_form_on_its_support(linear: ig.linalg.LinearSolver | None):
    x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
    with ig.diagnostics() as log:
        y = ig.implicit_root(FULL, x, as_y(newton(X, *DATA)), *DATA, solver=linear)
        (got,) = torch.autograd.grad(y["primal"].sin().sum() + y["equality"].sum(), x)
    u = newton(twin, *DATA)
    (want,) = torch.autograd.grad(u[:3].sin().sum() + u[3], twin)
    assert contract.close(got, want)
    assert log[-1].size == 8 and log[-1].support == 5


def test_an_inactive_inequality_contributes_exactly_zero_whatever_its_multiplier():
    x, hidden = X.clone().requires_grad_(), torch.tensor(3.0, requires_grad=True)
    loss = lambda x, z: (z - x).square().sum()
    condition = KKT(loss, inequality=lambda x, z: hidden * x[:1] * z[:1].exp() - 50)
    y = {"primal": X.clone(), "inequality": torch.tensor([1e-3])}
    z = ig.implicit_root(condition, x, y, on_unconverged="ignore")["primal"]
    gradient, other = torch.autograd.grad(z.sum(), [x, hidden])
    without = ig.implicit_root(ig.Stationary(loss), x, X.clone())
    assert other == 0 and torch.equal(gradient, torch.autograd.grad(without.sum(), x)[0])


def test_tensors_that_constraints_close_over_get_gradients():
    bound = torch.tensor([1.0], requires_grad=True)
    for recover in (False, True):
        condition = KKT(
            lambda x, z: (z - x).square().sum() / 2, inequality=lambda x, z: z[:1] - bound, recover_duals=recover
        )
        z = torch.tensor([1.0, 0.5])
        y = z if recover else {"primal": z, "inequality": torch.tensor([2.0])}
        root = ig.implicit_root(condition, torch.tensor([3.0, 0.5]), y)
        root = root if recover else root["primal"]
        (gradient,) = torch.autograd.grad(root @ torch.tensor([2.0, 5.0]), bound)
        assert contract.close(gradient, torch.tensor([2.0]))


def test_trees_for_the_point_and_for_constraints():
    def dot(z: dict) -> Tensor:
        return z["u"].square().sum() / 2 + z["v"].square().sum() / 2

    condition = KKT(
        lambda x, z: dot(z) - x * z["v"].sum(), lambda x, z: {"balance": z["u"].sum() - x, "last": z["v"][1]}
    )
    x = torch.tensor(2.0, requires_grad=True)
    z = {"u": torch.full((2, 2), 0.5), "v": torch.tensor([2.0, 0.0])}
    y = condition.complete(x, z)
    assert contract.close(y["equality"]["balance"], torch.tensor(-0.5))
    assert contract.close(y["equality"]["last"], torch.tensor(2.0))
    root = ig.implicit_root(condition, x, y)
    assert contract.close(
        torch.autograd.grad(root["primal"]["u"].sum() + root["primal"]["v"][0], x)[0], torch.tensor(2.0)
    )


def test_any_solver_that_returns_multipliers_or_completes_them():
    cvxpy = pytest.importorskip("cvxpy")
    features, target = DATA[0], DATA[1]

    def problem(x: Tensor) -> tuple:
        z = cvxpy.Variable(3)
        loss = cvxpy.sum_squares(features.numpy() @ z - target.numpy()) / 10
        loss += cvxpy.sum(cvxpy.multiply(x.exp().numpy(), cvxpy.square(z))) / 2
        constraints = [cvxpy.sum(z) == 1, z <= 0.35]
        tight = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13}
        cvxpy.Problem(cvxpy.Minimize(loss), constraints).solve(solver="CLARABEL", **tight)
        duals = [torch.as_tensor(constraint.dual_value).reshape(-1) for constraint in constraints]
        return torch.as_tensor(z.value), *duals

    arguments = (objective, lambda x, z, *_: (z.sum() - 1).reshape(1), lambda x, z, *_: z - 0.35)
    full, primal = KKT(*arguments), KKT(*arguments, recover_duals=True)
    with_duals = ig.implicit(full)(
        lambda x, *_: dict(zip(("primal", "equality", "inequality"), problem(x), strict=True))
    )
    completed = ig.implicit(full)(lambda x, *data: full.complete(x, problem(x)[0], *data))
    without = ig.implicit(primal)(lambda x, *_: problem(x)[0])
    solvers = [lambda x: with_duals(x, *DATA)["primal"], lambda x: completed(x, *DATA)["primal"]]
    jacobians = [torch.func.jacrev(f)(X) for f in (*solvers, lambda x: without(x, *DATA))]
    step = 1e-3
    unit = torch.eye(3) * step
    # a stencil of order four; Clarabel is good to about 1e-10 here, divided by the step
    wanted = torch.stack(
        [
            (8 * (problem(X + u)[0] - problem(X - u)[0]) - problem(X + 2 * u)[0] + problem(X - 2 * u)[0]) / (12 * step)
            for u in unit
        ],
        -1,
    )
    assert problem(X)[2].max() > 1e-2 and problem(X)[2].min() < 1e-6
    for got in jacobians:
        assert contract.close(got, wanted, 1e-6)
    y, least = with_duals(X, *DATA), completed(X, *DATA)
    for name in y:
        torch.testing.assert_close(least[name], y[name], rtol=1e-6, atol=1e-6)


# --- what is said about the assumptions -------------------------------------------------------------------------------


def nearest(constraint: Callable[[Tensor], Tensor], **options) -> KKT:
    return KKT(lambda x, z: (z - x).square().sum() / 2, inequality=lambda x, z: constraint(z), **options)


def test_check_measures_a_regular_point():
    found = nearest(lambda z: z - 1).check(
        torch.tensor([3.0, 0.25]), {"primal": torch.tensor([1.0, 0.25]), "inequality": torch.tensor([2.0, 0.0])}
    )
    assert (found.num_active, found.num_inequalities) == (1, 2)
    assert found.complementarity == 0.75 and found.infeasibility == 0.0 and found.smallest_multiplier == 0.0
    assert found.independence == 1.0 and found.weakly_active == []


@pytest.mark.parametrize("recover", [False, True])
def test_a_weakly_active_inequality_is_reported_by_name(recover: bool):
    condition = KKT(
        lambda x, z: (z - x).square().sum() / 2,
        inequality=lambda x, z: {"upper": z - 1, "lower": -z.sum()},
        recover_duals=recover,
    )
    z = torch.tensor([1.0, 1.0])
    y = {"primal": z, "inequality": {"upper": torch.tensor([2.0, 0.0]), "lower": torch.tensor(0.0)}}
    found = condition.check(torch.tensor([3.0, 1.0]), z if recover else y)
    assert found.weakly_active == ["inequality['upper'][1]"]
    notes = condition.notes(torch.tensor([3.0, 1.0]), z if recover else y)
    assert any("weakly active" in note and "inequality['upper'][1]" in note for note in notes)


def test_dependent_gradients_negative_multipliers_and_violations_are_told():
    twice = nearest(lambda z: torch.stack([z[0] - 1, 2 * z[0] - 2]))
    x, z = torch.tensor([3.0, 0.5]), torch.tensor([1.0, 0.5])
    found = twice.check(x, {"primal": z, "inequality": torch.tensor([1.0, 0.5])})
    assert found.independence < 1e-15
    assert any("LICQ" in note for note in found.notes(1e-6))
    with pytest.raises(torch.linalg.LinAlgError, match="linearly dependent"):
        twice.complete(x, z)
    found = nearest(lambda z: z - 1).check(x, {"primal": z + 0.5, "inequality": torch.tensor([2.0, -0.25])})
    assert found.infeasibility == 0.5 and found.smallest_multiplier == -0.25
    assert {"violates", "negative"} <= set(" ".join(found.notes(1e-6)).split())


def test_more_active_constraints_than_unknowns_are_dependent():
    found = nearest(lambda z: torch.stack([z[0] - 1, z[1] - 1, z.sum() - 2])).check(
        torch.tensor([3.0, 3.0]), {"primal": torch.ones(2), "inequality": torch.ones(3)}
    )
    assert found.independence == 0.0


def test_wrong_arguments_raise():
    with pytest.raises(TypeError, match="objective"):
        KKT(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inequality"):
        KKT(objective, inequality=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="active_tol"):
        KKT(objective, active_tol=0.0)
    condition = nearest(lambda z: z - 1)
    with pytest.raises(ValueError, match="recover_duals"):
        condition.residual(X, X)
    with pytest.raises(ValueError, match="one multiplier for every constraint"):
        condition.residual(X, {"primal": X, "inequality": torch.zeros(1)})
