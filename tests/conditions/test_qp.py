"""Derivatives of quadratic programs in every matrix and vector, and what is said about the assumptions."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.conditions import KKT, QP
from implicitgrad.solvers import QPInteriorPoint

Problem = dict[str, Tensor]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(before)


def random_problem(n: int = 6, p: int = 2, m: int = 5, active: int = 2, seed: int = 0) -> tuple[Problem, dict]:
    """A problem with a known strictly complementary solution, and that solution."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    root, A, G, z, nu = normal(n, n), normal(p, n), normal(m, n), normal(n), normal(p)
    lam = torch.cat([0.5 + torch.rand(active, generator=draw), torch.zeros(m - active)])
    slack = torch.cat([torch.zeros(active), 0.5 + torch.rand(m - active, generator=draw)])
    Q = root @ root.mT / n + 0.1 * torch.eye(n) + (skew := normal(n, n) / 5) - skew.mT
    c = -((Q + Q.mT) @ z / 2 + A.mT @ nu + G.mT @ lam)
    problem = {"Q": Q, "c": c, "A": A, "b": A @ z, "G": G, "h": G @ z + slack}
    return problem, {"primal": z, "equality": nu, "inequality": lam}


ACTIVE = 2


def closed_form(problem: Problem) -> Tensor:
    """`(z, ν, λ)` by the inverse of the system of the active constraints, the first two inequalities."""
    Q = (problem["Q"] + problem["Q"].mT) / 2
    J = torch.cat([problem["A"], problem["G"][:ACTIVE]])
    top, bottom = torch.cat([Q, J.mT], -1), torch.cat([J, torch.zeros(len(J), len(J))], -1)
    right = torch.cat([-problem["c"], problem["b"], problem["h"][:ACTIVE]])
    u = torch.linalg.inv(torch.cat([top, bottom])) @ right
    return torch.cat([u, torch.zeros(len(problem["h"]) - ACTIVE)])


def implicit_form(problem: Problem, condition: ig.OptimalityCondition = QP()) -> Tensor:  # noqa: B008
    n, p = problem["A"].shape[1], len(problem["b"])
    z, nu, lam = closed_form({name: part.detach() for name, part in problem.items()}).split([n, p, len(problem["h"])])
    y = ig.implicit_root(condition, problem, {"primal": z, "equality": nu, "inequality": lam})
    return torch.cat([y["primal"], y["equality"], y["inequality"]])


def same(got: dict | Tensor, want: dict | Tensor, rtol: float = 1e-9) -> None:
    for a, b in zip(ig.tree.leaves(ig.tree.detach(got)), ig.tree.leaves(ig.tree.detach(want)), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians_in_every_part_equal_those_of_the_active_set_system(transform: Callable):
    problem, _ = random_problem()
    same(transform(implicit_form)(problem), transform(closed_form)(problem))


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
def test_second_derivatives_across_all_parts(outer: Callable):
    problem, _ = random_problem(n=3, p=1, m=3)
    twice = lambda f: outer(torch.func.grad(lambda problem: f(problem).sin().sum()))(problem)
    same(twice(implicit_form), twice(closed_form))


def test_gradcheck_against_finite_differences():
    problem, _ = random_problem(n=3, p=1, m=3)
    names = list(problem)
    fit = lambda *parts: implicit_form(dict(zip(names, parts, strict=True)))
    assert torch.autograd.gradcheck(fit, [problem[name].requires_grad_() for name in names], check_forward_ad=True)


def test_vmap_over_problems_with_different_active_sets():
    pairs = [random_problem(seed=seed, active=active) for seed, active in ((1, 0), (2, 1), (3, 4))]
    stack = lambda trees: {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}
    problems, ys = stack([problem for problem, _ in pairs]), stack([y for _, y in pairs])
    loss = lambda problem, y: ig.implicit_root(QP(), problem, y)["primal"].sin().sum()
    with ig.diagnostics() as log:
        got = torch.func.vmap(torch.func.grad(loss))(problems, ys)
    same(got, stack([torch.func.grad(loss)(problem, y) for problem, y in pairs]))
    assert log[-1].batch == 3 and log[-1].support == 6 + 2 + 4


def test_equals_kkt_with_the_same_functions():
    general = KKT(
        lambda x, z: z @ x["Q"] @ z / 2 + x["c"] @ z,
        lambda x, z: x["A"] @ z - x["b"],
        lambda x, z: x["G"] @ z - x["h"],
    )
    problem, y = random_problem()
    rough = ig.tree.map(lambda part: part + 0.1, y)
    same(QP().residual(problem, rough), general.residual(problem, rough), rtol=1e-13)
    same(
        torch.func.jacrev(implicit_form)(problem),
        torch.func.jacrev(lambda problem: implicit_form(problem, general))(problem),
    )


@pytest.mark.parametrize("linear", [None, ig.linalg.LDL(), ig.linalg.MINRES(), ig.linalg.LU()], ids=str)
def test_one_symmetric_system_on_the_active_set(linear: ig.linalg.LinearSolver | None):
    problem, y = random_problem(m=20)
    c = problem["c"].clone().requires_grad_()
    with ig.diagnostics() as log:
        root = ig.implicit_root(QP(), {**problem, "c": c}, y, solver=linear)
        (got,) = torch.autograd.grad(root["primal"].sum(), c)
    same(got, torch.func.grad(lambda c: closed_form({**problem, "c": c})[:6].sum())(problem["c"]))
    assert (log[-1].size, log[-1].support) == (28, 6 + 2 + ACTIVE)


@pytest.mark.parametrize("left_out", [("Q",), ("c",), ("A", "b"), ("G", "h"), ("A", "b", "G", "h")])
def test_parts_may_be_left_out(left_out: tuple[str, ...]):
    n = 3
    full = {"Q": torch.diag(torch.tensor([1.0, 2.0, 3.0])), "c": torch.tensor([-1.0, 2.0, -3.0])}
    full |= {"A": torch.ones(1, n), "b": torch.ones(1), "G": torch.eye(n), "h": torch.full((n,), 0.45)}
    problem = {name: part for name, part in full.items() if name not in left_out}
    y, _ = QPInteriorPoint().run(problem, None)
    cvxpy = pytest.importorskip("cvxpy")
    z = cvxpy.Variable(n)
    loss = cvxpy.Constant(0)
    if "Q" in problem:
        loss += cvxpy.quad_form(z, problem["Q"].numpy()) / 2
    if "c" in problem:
        loss += problem["c"].numpy() @ z
    constraints = [problem["A"].numpy() @ z == problem["b"].numpy()] if "A" in problem else []
    constraints += [problem["G"].numpy() @ z <= problem["h"].numpy()] if "G" in problem else []
    cvxpy.Problem(cvxpy.Minimize(loss), constraints).solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    torch.testing.assert_close(y["primal"], torch.as_tensor(z.value), rtol=0, atol=1e-7)
    assert ig.tree.ravel(QP().residual(problem, y))[0].abs().max() < 1e-14
    slope = torch.func.jacrev(lambda problem: ig.implicit_root(QP(), problem, y)["primal"])(problem)
    assert set(slope) == set(problem) and all(part.isfinite().all() for part in slope.values())


def test_parts_may_come_from_x_and_from_data():
    problem, y = random_problem()
    c = problem.pop("c")
    want = torch.func.jacrev(lambda c: closed_form({**problem, "c": c})[:6])(c)
    got = torch.func.jacrev(lambda c: ig.implicit_root(QP(), {"c": c}, y, problem)["primal"])(c)
    same(got, want)


# --- what is said about the assumptions, and wrong arguments ----------------------------------------------------------


def test_check_measures_the_known_solution():
    problem, y = random_problem()
    found = QP().check(problem, y)
    assert (found.num_active, found.num_inequalities) == (2, 5)
    assert (
        abs(
            found.complementarity
            - min(y["inequality"][:2].min(), (problem["h"] - problem["G"] @ y["primal"])[2:].min())
        )
        < 1e-14
    )
    assert found.infeasibility < 1e-14 and found.weakly_active == []
    rows = torch.nn.functional.normalize(torch.cat([problem["A"], problem["G"][:2]]), dim=-1)
    assert abs(found.independence - torch.linalg.svdvals(rows).min()) < 1e-13


def test_weakly_active_inequalities_and_dependent_rows_are_told():
    problem = {"Q": torch.eye(2), "c": -torch.ones(2), "G": torch.eye(2), "h": torch.ones(2)}
    y = {"primal": torch.ones(2), "inequality": torch.zeros(2)}
    assert QP().check(problem, y).weakly_active == ["inequality[0]", "inequality[1]"]
    twice = {**problem, "c": torch.tensor([-3.0, 0.0]), "G": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}
    y = {"primal": torch.tensor([1.0, 0.0]), "inequality": torch.ones(2)}
    assert any("LICQ" in note for note in QP().notes(twice, y))


def test_wrong_arguments_raise():
    problem, y = random_problem()
    for change, error, words in (
        ({"g": problem["G"]}, ValueError, "'g'"),
        ({"h": 3.0}, TypeError, "'h'"),
        ({"c": torch.zeros(4)}, ValueError, "c has shape"),
    ):
        with pytest.raises(error, match=words):
            QP().residual({**problem, **change}, y)
    with pytest.raises(ValueError, match="twice"):
        QP().residual(problem, y, {"c": problem["c"]})
    with pytest.raises(ValueError, match="together"):
        QP().residual({"c": problem["c"], "A": problem["A"]}, y)
    with pytest.raises(ValueError, match="objective"):
        QP().residual({"A": problem["A"], "b": problem["b"]}, y)
    with pytest.raises(TypeError, match="dicts"):
        QP().residual(problem["c"], y)
    with pytest.raises(ValueError, match="parts"):
        QP().residual(problem, {"primal": y["primal"]})
