"""Conditions made of projections and proximal operators: support, steps, geometry, errors."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad import projections, prox
from implicitgrad.conditions import (
    BlockProximalGradient,
    MirrorDescent,
    NewtonFixedPoint,
    ProjectedGradient,
    ProximalGradient,
    Root,
)
from tests import test_derivatives as contract
from tests.cases import CONDITIONS, ConditionCase, SolverCase


@pytest.fixture(autouse=True)
def float64_and_seed() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def case_named(name: str) -> ConditionCase:
    return next(case for case in CONDITIONS if case.name == name)


# --- Newton's fixed point ---------------------------------------------------------------------------------------------


def _logistic_gradient(x: Tensor, y: Tensor, features: Tensor, target: Tensor) -> Tensor:
    rows = (2 * target.sigmoid() - 1).unsqueeze(-1) * features
    return x.exp() * y - rows.mT @ torch.sigmoid(-(rows @ y)) / len(rows)


# Not among CONDITIONS: at the solution its Jacobian is the identity, and so symmetric, but around it is not.
LOGISTIC = case_named("logistic")
NEWTON = ConditionCase(
    "Newton",
    NewtonFixedPoint(_logistic_gradient),
    LOGISTIC.exact,
    LOGISTIC.x,
    LOGISTIC.data,
    frozenset({"square", "contraction"}),
)


def test_newton_fixed_point_has_the_derivatives_of_the_root() -> None:
    linear = SolverCase(ig.linalg.GMRES(), "square")
    contract.test_reverse_mode_equals_closed_form_in_every_argument(NEWTON, linear)
    contract.test_forward_mode_equals_closed_form(NEWTON, linear)
    contract.test_second_derivatives_in_three_mode_pairs_equal_closed_form(NEWTON, linear)
    contract.test_vmap_over_problems_and_its_derivatives_equal_closed_form(NEWTON, (0, None, 0), linear.solver)
    contract.test_batched_cotangents_equal_closed_form(NEWTON, linear.solver)


def test_newton_fixed_point_has_right_third_derivatives() -> None:
    contract.test_third_derivatives_equal_closed_form(NEWTON)
    contract.test_nested_vmap_and_its_gradient_equal_closed_form(NEWTON)


def test_newton_residual_is_the_distance_to_the_solution_and_its_jacobian_the_identity() -> None:
    y = NEWTON.exact(NEWTON.x, *NEWTON.data)
    away = 1e-4 * torch.randn(3)
    residual = NEWTON.condition.residual(NEWTON.x, y + away, *NEWTON.data)
    assert (residual - away).abs().max() < 1e-7  # the error is quadratic in the distance
    jacobian = torch.func.jacrev(lambda y: NEWTON.condition.residual(NEWTON.x, y, *NEWTON.data))(y)
    assert (jacobian - torch.eye(3)).abs().max() < 1e-13


def test_newton_and_root_reach_weights_behind_a_closure_and_trees() -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    x = torch.tensor([5.0, 7.0], requires_grad=True)
    equations = lambda x, y: {"b": weight * y["b"] - y["a"] * x, "a": y["a"] * weight - x.sin()}
    want_a = x.sin() / weight
    want = want_a + want_a * x / weight
    exact = torch.autograd.grad(want.sum(), [x, weight])
    y = {"a": (x.sin() / weight).detach(), "b": (want - want_a).detach()}
    for condition in (Root(equations), NewtonFixedPoint(equations)):
        solution = ig.implicit_root(condition, x, y)
        got = torch.autograd.grad((solution["a"] + solution["b"]).sum(), [x, weight])
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(got, exact, strict=True))


def test_root_declared_symmetric_is_solved_by_cholesky_and_tested() -> None:
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for bend, fine in ((0.0, True), (0.5, False)):
        general = matrix + torch.tensor([[0.0, bend], [0.0, 0.0]])
        condition = Root(lambda x, y, general=general: general @ y - x, symmetric=True)
        attempt = functools.partial(
            ig.implicit_root, condition, x, torch.linalg.solve(general, x.detach()), solver=ig.linalg.Cholesky()
        )
        if fine:
            (got,) = torch.autograd.grad(attempt().sum(), x)
            assert (got - torch.linalg.inv(matrix).sum(0)).abs().max() < 1e-12
        else:
            with pytest.raises(ig.linalg.AsymmetryError, match="Root is declared symmetric"):
                attempt()


# --- mirror descent ---------------------------------------------------------------------------------------------------


def _quadratic(x: Tensor, y: Tensor, matrix: Tensor) -> Tensor:
    return 0.5 * y @ (matrix @ matrix.mT + torch.eye(5)) @ y - x @ y


def _simplex_solution(x: Tensor, matrix: Tensor) -> Tensor:
    """All entries positive: `H y + τ = x`, `Σ y = 1`."""
    bordered = torch.ones(6, 6)
    bordered[:5, :5] = matrix @ matrix.mT + torch.eye(5)
    bordered[5, 5] = 0
    return torch.linalg.solve(bordered, torch.cat([x, torch.ones(1)]))[:5]


def test_mirror_descent_on_the_simplex_agrees_with_projected_gradient_and_the_closed_form() -> None:
    x, matrix = 0.3 * torch.rand(5), 0.3 * torch.randn(5, 5)
    y = _simplex_solution(x, matrix)
    assert bool((y > 0.01).all())
    mirror = MirrorDescent(_quadratic, lambda x, v, *data: v.softmax(0), torch.log, step=0.5)
    straight = ProjectedGradient(_quadratic, lambda x, y, *data: projections.simplex(y), step=0.5)
    for condition in (mirror, straight):
        assert condition.residual(x, y, matrix).abs().max() < 1e-14
        fit = ig.implicit(condition)(_simplex_solution)
        rows = torch.func.jacrev(fit, (0, 1))(x, matrix)
        for at, row in enumerate(rows):
            arguments = [x, matrix]
            direction = torch.randn_like(arguments[at])
            ends = []
            for sign in (1, -1):
                arguments[at] = (x, matrix)[at] + sign * 1e-5 * direction
                ends.append(_simplex_solution(*arguments))
            want = (ends[0] - ends[1]) / 2e-5
            assert ((row.flatten(1) @ direction.flatten()) - want).abs().max() < 1e-9
    hessians = [
        torch.func.hessian(lambda x, c=c: ig.implicit_root(c, x, y, matrix).square().sum())(x)
        for c in (mirror, straight)
    ]
    assert (hessians[0] - hessians[1]).abs().max() < 1e-10


# --- support ----------------------------------------------------------------------------------------------------------

point = torch.tensor([0.9, -2.0, 0.3, 0.05, -0.4, 0.0])
MAPS = {
    "non-negative": (projections.non_negative, [1, 0, 1, 1, 0, None]),
    "box": (lambda v: projections.box(v, -1.0, 0.25), [0, 0, 0, 1, 1, 1]),
    "simplex": (projections.simplex, [1, 0, 1, 0, 0, 0]),
    "corner of the simplex": (lambda v: projections.simplex(9 * v), [0, 0, 0, 0, 0, 0]),
    "l1 ball": (lambda v: projections.l1_ball(v, 2.0), [1, 1, 0, 0, 0, 0]),
    "l2 ball": (projections.l2_ball, [1, 1, 1, 1, 1, 1]),
    "l1": (lambda v: prox.l1(v, 0.35), [1, 1, 0, 0, 1, 0]),
    "one free": (lambda v: prox.l1(v, torch.tensor([0.35] * 5 + [0.0])), [1, 1, 0, 0, 1, 1]),
    "elastic net": (lambda v: prox.elastic_net(v, 0.35, 2.0), [1, 1, 0, 0, 1, 0]),
    "groups": (lambda v: torch.func.vmap(prox.group_lasso)(v.reshape(3, 2)).flatten(), [1, 1, 0, 0, 0, 0]),
    "total variation": (lambda v: prox.total_variation(v, 0.1), [1, 1, 1, 1, 1, 1]),
    "l infinity": (lambda v: prox.l_infinity(v, 0.5), [1, 1, 1, 1, 1, 1]),
    "zero": (prox.zero, [1, 1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize(("nearest", "expected"), MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_support_is_where_rows_of_the_derivative_are_not_zero(
    nearest: Callable[[Tensor], Tensor], expected: list, dtype: torch.dtype
) -> None:
    condition = ProjectedGradient(lambda x, y: 0.5 * (y - x).square().sum(), lambda x, y: nearest(y))
    x = point.to(dtype)
    got = condition.support(x, x, *())
    assert got.dtype == torch.bool and got.shape == x.shape
    rows = torch.func.jacrev(nearest)(x).ne(0).any(1)
    assert torch.equal(got, rows)
    assert all(want is None or bool(want) == bool(have) for want, have in zip(expected, got, strict=True))
    assert torch.equal(torch.func.vmap(condition.support)(x[None], x[None])[0], got)


def _soft(x: Tensor, target: Tensor) -> Tensor:
    return prox.l1(target, x.exp())


LASSO = ProximalGradient(
    lambda x, y, target: 0.5 * (y - target).square().sum(), lambda x, y, s, target: prox.l1(y, x.exp(), s), step=0.5
)


def test_report_shows_the_support_and_systems_are_solved_on_it_alone() -> None:
    x, target = torch.tensor(0.0, requires_grad=True), torch.randn(300)
    with ig.diagnostics() as log:
        y = ig.implicit(LASSO, solver=ig.linalg.GMRES())(_soft)(x, target)
        (slope,) = torch.autograd.grad(y.sum(), x)
    assert log[-1].support == int((target.abs() > 1).sum()) < 150
    assert "restricted to a support of" in str(log[-1])
    assert abs(slope + y.sign().sum()) < 1e-10


def test_support_does_not_trust_small_numbers_that_a_solver_leaves() -> None:
    x, target = torch.tensor(0.0, requires_grad=True), torch.tensor([3.0, 0.5, -0.2])
    rough = _soft(x, target).detach() + 1e-7 * torch.randn(3)
    with ig.diagnostics() as log:
        y = ig.implicit_root(LASSO, x, rough, target)
        (slope,) = torch.autograd.grad(y.sum(), x)
    assert log[-1].support == 1 and abs(slope + 1) < 1e-10


@pytest.mark.parametrize("penalty", [-30.0, 3.0], ids=["everything", "nothing"])
def test_full_and_empty_support_give_right_derivatives(penalty: float) -> None:
    x, target = torch.tensor(penalty), torch.tensor([3.0, 0.5, -0.2])
    fit = ig.implicit(LASSO)(_soft)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        got, want = (transform(solve, (0, 1))(x, target) for solve in (fit, _soft))
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, want, strict=True))


def test_problems_of_one_batch_may_have_different_supports() -> None:
    x, targets = torch.tensor([-2.0, 0.0, 0.5, 3.0]), torch.randn(4, 40)
    fit = ig.implicit(LASSO)(_soft)
    with ig.diagnostics() as log:
        got = torch.func.vmap(torch.func.jacrev(fit, (0, 1)))(x, targets)
    want = torch.func.vmap(torch.func.jacrev(_soft, (0, 1)))(x, targets)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, want, strict=True))
    assert log[-1].batch == 4 and log[-1].support == int((_soft(x[0], targets[0]) != 0).sum())


def test_declared_symmetric_on_the_support_lets_cholesky_and_cg_solve() -> None:
    case = case_named("lasso")
    assert case.condition.symmetric_on_support
    exact = torch.func.jacrev(lambda x: case.exact(x, *case.data))(case.x)
    for solver in (ig.linalg.Cholesky(), ig.linalg.CG()):
        fit = ig.implicit(case.condition, solver=solver)(case.exact)
        assert (torch.func.jacrev(lambda x: fit(x, *case.data))(case.x) - exact).abs().max() < 1e-10  # noqa: B023
    general = ProximalGradient(case.condition.loss, case.condition.prox, case.condition.step)
    with pytest.raises(ValueError, match="symmetric"):
        fit = ig.implicit(general, solver=ig.linalg.Cholesky())(case.exact)
        torch.func.jacrev(lambda x: fit(x, *case.data))(case.x)


# --- what does not matter, and errors ---------------------------------------------------------------------------------


def test_derivatives_do_not_depend_on_the_step() -> None:
    case = case_named("lasso")
    loss, nearest = case.condition.loss, case.condition.prox
    exact = torch.func.jacrev(lambda x: case.exact(x, *case.data))(case.x)
    for condition in (
        ProximalGradient(loss, nearest, step=0.01),
        ProximalGradient(loss, nearest, step=3.0),
        BlockProximalGradient(loss, nearest, step=torch.tensor([0.01, 1.0, 3.0])),
        BlockProximalGradient(loss, nearest, step=0.3),
    ):
        fit = ig.implicit(condition)(case.exact)
        assert (torch.func.jacrev(lambda x: fit(x, *case.data))(case.x) - exact).abs().max() < 1e-10  # noqa: B023


def test_projection_as_prox_gives_the_same_condition() -> None:
    case = case_named("bounded ridge")
    given = case.condition
    same = ProximalGradient(given.loss, prox.prox_from_projection(given.projection), given.step)
    y = case.exact(case.x, *case.data) + 0.1
    assert torch.equal(given.residual(case.x, y, *case.data), same.residual(case.x, y, *case.data))
    assert torch.equal(given.support(case.x, y, *case.data), same.support(case.x, y, *case.data))


def test_blocks_are_matched_by_key_with_steps_of_their_own() -> None:
    loss = lambda x, y: 0.5 * ((y["a"] - 3 * x).square().sum() + (y["b"] - y["a"]).square().sum())
    condition = BlockProximalGradient(
        loss,
        {"b": lambda x, y, s: prox.zero(y), "a": lambda x, y, s: prox.l1(y, x, s)},
        {"b": torch.tensor([0.2, 0.4]), "a": 0.3},
    )
    x = torch.tensor([1.0, 0.1], requires_grad=True)  # b = a, so a is the soft threshold of 3 x by x: 2 x
    y = {"a": 2 * x.detach(), "b": 2 * x.detach()}
    solution = ig.implicit_root(condition, x, y)
    (slope,) = torch.autograd.grad((solution["a"] + 10 * solution["b"]).sum(), x)
    assert (slope - 22).abs().max() < 1e-10
    assert condition.support(x, y)["b"].all()
    with pytest.raises(ValueError, match="structure"):
        condition.residual(x, {"a": x, "b": x, "c": x})


def test_wrong_arguments_raise_at_construction() -> None:
    loss, near = (lambda x, y: y.sum()), (lambda x, y, *rest: y)
    for build in (
        lambda: ProjectedGradient(3, near),
        lambda: ProximalGradient(loss, None),
        lambda: BlockProximalGradient(loss, {"a": near, "b": 1.0}),
        lambda: MirrorDescent(loss, near, "log"),
        lambda: Root(torch.eye(2)),
        lambda: NewtonFixedPoint(0),
    ):
        with pytest.raises(TypeError, match="needs a function"):
            build()
    with pytest.raises(TypeError, match="number as step"):
        ProjectedGradient(loss, near, step=torch.tensor(1.0))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive finite step"):
            ProximalGradient(loss, near, step=wrong)
        with pytest.raises(ValueError, match="positive finite step"):
            BlockProximalGradient(loss, near, step=torch.tensor([1.0, wrong]))


def test_a_point_that_is_no_solution_is_reported() -> None:
    x, target = torch.tensor(0.0, requires_grad=True), torch.tensor([3.0, 0.5, -0.2])
    with pytest.raises(ig.ConvergenceError, match="ProximalGradient residual"):
        ig.implicit_root(LASSO, x, torch.tensor([1.0, 1.0, 1.0]), target, on_unconverged="raise")
    with pytest.raises(FloatingPointError):
        ig.implicit_root(LASSO, x, torch.tensor([torch.nan, 1.0, 1.0]), target)
