"""Solvers of quadratic programs against CVXPY, and derivatives of their solutions against finite differences."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.conditions import QP
from implicitgrad.solvers import InfeasibleError, QPInteriorPoint, QPPackage, solve_qp
from implicitgrad.solvers.qp_interior_point import SOLVED, interior_point
from implicitgrad.solvers.qp_program import Point, program
from implicitgrad.solvers.qp_reduced import Reduction

Problem = dict[str, Tensor]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(before)


def regular_problem(n: int, p: int, m: int, active: int, seed: int = 0) -> tuple[Problem, dict[str, Tensor]]:
    """A problem with a known strictly complementary solution, and that solution."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    root, A, G, z, nu = normal(n, n), normal(p, n), normal(m, n), normal(n), normal(p)
    lam = torch.cat([0.5 + torch.rand(active, generator=draw), torch.zeros(m - active)])
    slack = torch.cat([torch.zeros(active), 0.5 + torch.rand(m - active, generator=draw)])
    Q = root @ root.mT / n + 0.1 * torch.eye(n)
    problem = {"Q": Q, "c": -(Q @ z + A.mT @ nu + G.mT @ lam), "A": A, "b": A @ z, "G": G, "h": G @ z + slack}
    return problem, {"primal": z, "equality": nu, "inequality": lam}


def stacked(trees: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def batch(size: int = 4) -> tuple[Problem, dict[str, Tensor]]:
    pairs = [regular_problem(8, 3, 10, active, seed=active) for active in range(size)]
    return stacked([problem for problem, _ in pairs]), stacked([y for _, y in pairs])


def package(name: str) -> QPPackage:
    pytest.importorskip(name)
    pytest.importorskip("scipy")
    return QPPackage(name)  # type: ignore[arg-type]


SOLVERS = ["interior point", "clarabel", "osqp"]


def solver_named(name: str) -> QPInteriorPoint | QPPackage:
    return QPInteriorPoint() if name == "interior point" else package(name)


every_solver = pytest.mark.parametrize("name", SOLVERS)


# --- solutions --------------------------------------------------------------------------------------------------------


@every_solver
def test_finds_known_solutions_with_multipliers_up_to_rounding(name: str):
    problems, want = batch()
    y, info = solver_named(name).run(problems, None)
    for part in want:
        torch.testing.assert_close(y[part], want[part], rtol=0, atol=1e-11)
    assert info.converged and info.reason == "solved" and info.residual_norm < 1e-12 and info.num_iter > 1
    residuals = torch.func.vmap(QP().residual)(problems, y)
    norms = torch.stack([part.square().sum(-1) for part in residuals.values()]).sum(0).sqrt()
    assert abs(info.residual_norm - float(norms.max())) < 1e-13


def random_problems() -> list[Problem]:
    """Small ones of all kinds: some feasible, some not."""
    found = []
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        n, p, m = (int(k) for k in torch.randint(1, 10, (3,), generator=draw))
        normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: B023
        root = normal(n, n)
        problem = {"Q": root @ root.mT / n, "c": normal(n), "G": normal(m, n), "h": normal(m)}
        if seed % 2 and n > 1:
            problem |= {"A": normal(n // 2, n), "b": normal(n // 2)}
        found.append(problem)
    return found


@every_solver
def test_agrees_with_cvxpy_on_random_problems_feasible_or_not(name: str):
    cvxpy = pytest.importorskip("cvxpy")
    solver, verdicts = solver_named(name), []
    for problem in random_problems():
        z = cvxpy.Variable(len(problem["c"]))
        numbers = {part: value.numpy() for part, value in problem.items()}
        constraints = [numbers["G"] @ z <= numbers["h"]]
        if "A" in numbers:
            constraints.append(numbers["A"] @ z == numbers["b"])
        loss = cvxpy.quad_form(z, numbers["Q"], assume_PSD=True) / 2 + numbers["c"] @ z
        truth = cvxpy.Problem(cvxpy.Minimize(loss), constraints)
        truth.solve(solver="CLARABEL")
        y, info = solver.run(problem, None)
        feasible = truth.status == "optimal"
        verdicts.append(feasible)
        assert info.converged == feasible and info.reason == ("solved" if feasible else "primal infeasible")
        if feasible:
            # Clarabel's own tolerance is 1e-8 relative to the objective
            assert abs(info.value - truth.value) < 1e-6 * (1 + abs(truth.value))
            assert (problem["G"] @ y["primal"] - problem["h"]).max() < 1e-10
    assert 5 < sum(verdicts) < 35


@every_solver
def test_unbounded_and_infeasible_problems_are_told_apart(name: str):
    solver = solver_named(name)
    unbounded = {"Q": torch.diag(torch.tensor([1.0, 0.0])), "c": torch.tensor([0.0, -1.0])}
    unbounded |= {"G": torch.tensor([[1.0, 0.0]]), "h": torch.ones(1)}
    empty = {"Q": torch.eye(1), "G": torch.tensor([[1.0], [-1.0]]), "h": torch.tensor([0.0, -1.0])}
    for problem, status in ((unbounded, "dual infeasible (unbounded)"), (empty, "primal infeasible")):
        _, info = solver.run(problem, None)
        assert info.reason == status and not info.converged
        with pytest.raises(InfeasibleError, match=status.split(" (")[0]):
            solve_qp(problem, solver=solver)


@every_solver
def test_an_infeasible_problem_of_a_stack_is_named_and_leaves_the_others_alone(name: str):
    h = torch.tensor([[1.0, 1.0], [0.0, -1.0], [0.5, 1.0]])
    problem = {"Q": torch.eye(1), "c": torch.tensor([-2.0]), "G": torch.tensor([[1.0], [-1.0]]), "h": h}
    y, info = solver_named(name).run(problem, None)
    assert info.reason == "solved; primal infeasible: problems [1]" and not info.converged
    torch.testing.assert_close(y["primal"][[0, 2], 0], torch.tensor([1.0, 0.5]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear program", "redundant equality", "weakly active", "pinned", "scaled"])
def test_interior_point_on_degenerate_problems(kind: str):
    draw = torch.Generator().manual_seed(1)
    A = torch.randn(3, 8, generator=draw)
    z = torch.randn(8, generator=draw)
    eye = torch.eye(2)
    vertex = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    problem, want = {
        "linear program": ({"c": torch.tensor([-1.0, -2.0]), "G": vertex, "h": torch.tensor([1.0, 0.0, 0.0])}, [0, 1]),
        "redundant equality": (
            {"Q": torch.eye(8), "A": torch.cat([A, A[:1] + A[1:2]]), "b": torch.cat([A @ z, (A[:1] + A[1:2]) @ z])},
            torch.linalg.pinv(A) @ A @ z,
        ),
        "weakly active": ({"Q": eye, "c": torch.tensor([-1.0, 0.0]), "G": eye, "h": torch.ones(2)}, [1, 0]),
        "pinned": (
            {
                "Q": eye,
                "c": torch.tensor([-3.0, -3.0]),
                "G": torch.stack([eye[0], -eye[0]]),
                "h": torch.tensor([1.0, -1]),
            },
            [1, 3],
        ),
        "scaled": (
            {"Q": 1e6 * eye, "c": torch.tensor([-3e8, 2e8]), "G": eye, "h": torch.tensor([100.0, 1e4])},
            [100, -200],
        ),
    }[kind]
    y, info = QPInteriorPoint().run(problem, None)
    assert info.converged, info.reason
    torch.testing.assert_close(y["primal"], torch.as_tensor(want, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def dense_system(problem: Problem, active: Tensor) -> Tensor:
    """The matrix of `QP` on an active set, unit rows for the rest."""
    rows = torch.where(active.unsqueeze(-1), problem["G"], 0)
    J = torch.cat([problem["A"], rows])
    corner = torch.diag(torch.cat([torch.zeros(len(problem["b"])), (~active).double()]))
    return torch.cat([torch.cat([problem["Q"], J.mT], -1), torch.cat([J, corner], -1)])


def test_reduction_and_factors_equal_dense_matrices():
    problem, want = regular_problem(8, 3, 10, 4)
    qp, _ = program(problem)
    reduction = Reduction.of(qp)
    assert reduction is not None
    corner = torch.cat([torch.cat([problem["Q"], problem["A"].mT], -1), torch.nn.functional.pad(problem["A"], (0, 3))])
    inverse = torch.linalg.inv(corner)
    slope = problem["G"] @ inverse[:8, :8] @ problem["G"].mT
    torch.testing.assert_close(reduction.matrix[0], slope, rtol=1e-10, atol=1e-10)
    offset = problem["h"] - problem["G"] @ (inverse @ torch.cat([-problem["c"], problem["b"]]))[:8]
    torch.testing.assert_close(reduction.offset[0], offset, rtol=1e-10, atol=1e-10)
    active = want["inequality"] > 0
    columns = torch.randn(1, 21, 2, generator=torch.Generator().manual_seed(0))
    solved = torch.linalg.solve(dense_system(problem, active), columns)
    point = Point(*(part.unsqueeze(0) for part in want.values()))
    for factor in (reduction.active_set_factor(active.unsqueeze(0)), qp.active_set_factor(point)):
        torch.testing.assert_close(factor.inverse(columns), solved, rtol=1e-9, atol=1e-9)


def test_reduced_and_general_method_agree():
    problems, want = batch()
    qp, _ = program(problems)
    y, status, _ = interior_point(qp, 1e-9, 60)
    assert (status == SOLVED).all()
    for got, part in zip(y, want.values(), strict=True):
        torch.testing.assert_close(got, part, rtol=0, atol=1e-6)
    lam, s, num_iter = Reduction.of(qp).solve(1e-9, 60)
    assert num_iter < 15 and torch.equal(lam > s, want["inequality"] > 0)


def test_problems_that_the_reduction_cannot_solve_go_to_the_general_method():
    """One with dependent active constraints, whose active system is singular, beside a regular one."""
    G = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    problem = {"Q": torch.eye(2), "c": torch.tensor([[-3.0, -3.0], [0.5, -3.0]]), "G": G, "h": torch.ones(3)}
    y, info = QPInteriorPoint().run(problem, None)
    assert info.converged
    torch.testing.assert_close(y["primal"], torch.tensor([[1.0, 1.0], [-0.5, 1.0]]), rtol=0, atol=1e-8)


def test_leading_dimensions_broadcast():
    problem, _ = regular_problem(4, 1, 5, 2)
    shifts = torch.linspace(-0.3, 0.3, 6).reshape(3, 2, 1)
    many = {**problem, "c": problem["c"] + shifts, "h": problem["h"] + torch.tensor([[0.0], [0.2]])}
    y, info = solve_qp(many)
    assert info.converged and y["primal"].shape == (3, 2, 4) and y["inequality"].shape == (3, 2, 5)
    for i in range(3):
        for j in range(2):
            one, _ = solve_qp({**problem, "c": many["c"][i, j], "h": many["h"][j]})
            torch.testing.assert_close(y["primal"][i, j], one["primal"], rtol=0, atol=1e-12)


def test_float32_reaches_its_tolerance():
    problem, want = regular_problem(8, 3, 10, 4)
    y, info = solve_qp({name: part.float() for name, part in problem.items()})
    assert info.converged and y["primal"].dtype == torch.float32
    torch.testing.assert_close(y["primal"].double(), want["primal"], rtol=0, atol=1e-4)


def test_too_few_iterations_are_told():
    problem, _ = regular_problem(8, 3, 10, 4)
    _, info = QPInteriorPoint(max_iter=1).run(problem, None)
    assert not info.converged and info.reason == "max_iter reached"


# --- derivatives ------------------------------------------------------------------------------------------------------


def central_slope(problem: Problem, direction: Problem, weights: Tensor, solver, step: float = 1e-4) -> Tensor:
    """Derivative of `weights · z` along a direction, by differences of order four."""

    def value(t: float) -> Tensor:
        moved = {name: part + t * direction[name] for name, part in problem.items()}
        return (solver.run(moved, None)[0]["primal"] * weights).sum()

    return (8 * (value(step) - value(-step)) - value(2 * step) + value(-2 * step)) / (12 * step)


@every_solver
def test_gradients_in_every_part_equal_finite_differences_around_clarabel(name: str):
    problem, _ = regular_problem(30, 15, 30, 10)
    weights = torch.randn(30, generator=torch.Generator().manual_seed(3))
    leaves = {part: value.clone().requires_grad_() for part, value in problem.items()}
    y, _ = solve_qp(leaves, solver=solver_named(name))
    gradient = dict(zip(leaves, torch.autograd.grad(y["primal"] @ weights, list(leaves.values())), strict=True))
    for part, value in problem.items():
        draw = torch.Generator().manual_seed(4)
        direction = {other: torch.zeros_like(v) for other, v in problem.items()}
        direction[part] = torch.randn(value.shape, generator=draw) / value.numel() ** 0.5
        slope = central_slope(problem, direction, weights, package("clarabel"))
        # differences: rounding of 1e-14 over a step of 1e-4, and step⁴ times a fifth derivative
        assert abs((gradient[part] * direction[part]).sum() - slope) < 1e-8 * (1 + abs(slope))


@every_solver
def test_derivatives_use_the_factor_that_the_solver_left(name: str):
    problem, _ = regular_problem(8, 3, 10, 4)
    for parts in (problem, batch()[0]):
        leaves = {part: value.clone().requires_grad_() for part, value in parts.items()}
        with ig.diagnostics() as log:
            y, _ = solve_qp(leaves, solver=solver_named(name))
            (y["primal"].sum() + y["inequality"].sum()).backward()
        assert log[-1].last.solver == "ActiveSetFactor" and log[-1].last.relative_residual < 1e-12


def test_another_linear_solver_gives_the_same():
    problem, _ = regular_problem(8, 3, 10, 4)
    c = problem.pop("c")
    gradient = lambda solver: torch.func.grad(
        lambda c: solve_qp({**problem, "c": c}, solver=solver)[0]["primal"].sum()
    )(c)
    want = gradient(None)
    for linear in (ig.linalg.LDL(), ig.linalg.MINRES(), ig.linalg.LU()):
        torch.testing.assert_close(gradient(QPInteriorPoint(linear_solver=linear)), want, rtol=1e-8, atol=1e-9)


def test_a_factor_of_another_problem_is_noticed():
    """The true residual decides, so a stale factor costs time and not truth."""
    problem, y = regular_problem(8, 3, 10, 4)
    _, info = QPInteriorPoint().run(regular_problem(8, 3, 10, 4, seed=5)[0], None)
    slope = lambda solver: torch.func.grad(
        lambda c: ig.implicit_root(QP(), {**problem, "c": c}, y, solver=solver)["primal"].sum()
    )(problem["c"])
    torch.testing.assert_close(slope(info.linear_solver), slope(None), rtol=1e-10, atol=1e-11)


def test_a_stack_under_vmap_and_one_by_one_agree_in_every_mode():
    problems, _ = batch()
    alone = lambda problem: solve_qp(problem)[0]["primal"]
    total = lambda problem: alone(problem).sin().sum()
    together = torch.autograd.functional.jacobian(lambda c: solve_qp({**problems, "c": c})[0]["primal"], problems["c"])
    one_by_one = torch.stack(
        [torch.func.jacrev(lambda c: alone({**row, "c": c}))(row["c"]) for row in _rows(problems)]  # noqa: B023
    )
    torch.testing.assert_close(torch.einsum("bibj->bij", together), one_by_one, rtol=1e-9, atol=1e-10)
    slope = lambda c, row: alone({**row, "c": c})
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        stacked_form = torch.func.vmap(transform(slope))(problems["c"], problems)
        torch.testing.assert_close(stacked_form, one_by_one, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.func.vmap(alone)(problems), solve_qp(problems)[0]["primal"], rtol=0, atol=1e-12)
    hessians = torch.func.vmap(torch.func.hessian(lambda h, row: total({**row, "h": h})))(problems["h"], problems)
    for i, row in enumerate(_rows(problems)):
        want = torch.func.jacrev(torch.func.grad(lambda h: total({**row, "h": h})))(row["h"])  # noqa: B023
        torch.testing.assert_close(hessians[i], want, rtol=1e-8, atol=1e-9)


def _rows(problems: Problem) -> list[Problem]:
    return [{name: part[i] for name, part in problems.items()} for i in range(len(problems["c"]))]


def test_one_run_serves_all_problems_under_nested_vmap(monkeypatch: pytest.MonkeyPatch):
    problem, _ = regular_problem(4, 1, 5, 2)
    calls = []
    run = QPInteriorPoint.run
    monkeypatch.setattr(QPInteriorPoint, "run", lambda *arguments: calls.append(1) or run(*arguments))
    c = problem["c"] + 0.1 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    h = problem["h"] + torch.tensor([0.0, 0.1, 0.2]).unsqueeze(-1)
    fit = lambda c, h: solve_qp({**problem, "c": c, "h": h})[0]["primal"]
    nested = torch.func.vmap(torch.func.vmap(fit), in_dims=(0, None))(c, h)
    assert len(calls) == 1
    inside = torch.func.vmap(lambda c: fit(c, h))(c)  # a stack inside of a vmap
    want = torch.stack([torch.stack([fit(c[i, j], h[j]) for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(nested, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(inside, want, rtol=0, atol=1e-12)


def test_shared_parts_get_the_sum_of_gradients():
    problem, _ = regular_problem(4, 1, 5, 2)
    c = problem["c"] + 0.1 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    Q = problem["Q"].clone().requires_grad_()
    (got,) = torch.autograd.grad(solve_qp({**problem, "Q": Q, "c": c})[0]["primal"].sin().sum(), Q)
    want = sum(torch.autograd.grad(solve_qp({**problem, "Q": Q, "c": row})[0]["primal"].sin().sum(), Q)[0] for row in c)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_solvers_are_inner_solvers():
    problem, want = regular_problem(8, 3, 10, 4)
    c = problem.pop("c").requires_grad_()
    y, info = QPInteriorPoint()({"c": c}, problem, init=want)
    twin, _ = solve_qp({**problem, "c": c})
    assert info.converged and info.linear_solver is None
    got, same = (torch.autograd.grad(tree["primal"].sin().sum(), c)[0] for tree in (y, twin))
    torch.testing.assert_close(got, same, rtol=1e-10, atol=1e-12)


# --- wrong arguments --------------------------------------------------------------------------------------------------


def test_wrong_arguments_raise():
    problem, _ = regular_problem(4, 1, 5, 2)
    for change, error, words in (
        ({"c": torch.zeros(3)}, ValueError, "do not fit"),
        ({"c": torch.zeros(2, 4), "h": torch.zeros(3, 5)}, ValueError, "do not fit"),
        ({"b": torch.tensor(1.0)}, ValueError, "do not fit"),
        ({"c": torch.zeros(0, 4)}, ValueError, "no problems"),
        ({"c": torch.zeros(4, dtype=torch.float32)}, TypeError, "one floating point dtype"),
        ({"h": torch.full((5,), torch.inf)}, FloatingPointError, "part h"),
        ({"d": torch.zeros(1)}, ValueError, "'d'"),
    ):
        with pytest.raises(error, match=words):
            solve_qp({**problem, **change})
    with pytest.raises(TypeError, match="solver of quadratic programs"):
        solve_qp(problem, solver=ig.linalg.CG())  # type: ignore[arg-type]
    for make, words in (
        (lambda: QPInteriorPoint(tol=2.0), "tol"),
        (lambda: QPInteriorPoint(max_iter=0), "max_iter"),
        (lambda: QPPackage("gurobi"), "gurobi"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    import importlib

    def missing(name: str, *_):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"implicitgrad\[qp\]"):
        QPPackage().run(regular_problem(4, 1, 5, 2)[0], None)
