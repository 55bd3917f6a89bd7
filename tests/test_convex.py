"""Differentiable CVXPY problems: gradients equal finite differences of tightly solved problems, in all modes."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.convex import SolverStatusError, from_cvxpy
from implicitgrad.convex.least_norm import LeastNorm

SOLVERS = ["CLARABEL", "SCS"]


@dataclass(frozen=True)
class Case:
    """A problem, its parameters, its variables, and values for the parameters."""

    name: str
    make: Callable[[], tuple[cp.Problem, list[Any], list[Any]]]
    values: Callable[[], list[Tensor]]


def linear_program() -> tuple[cp.Problem, list[Any], list[Any]]:
    x, c, A, b = cp.Variable(6), cp.Parameter(6), cp.Parameter((4, 6)), cp.Parameter(4)
    return cp.Problem(cp.Minimize(c @ x), [A @ x >= b, x >= 0]), [c, A, b], [x]


def quadratic_program() -> tuple[cp.Problem, list[Any], list[Any]]:
    x, Q, A, b = cp.Variable(5), cp.Parameter((5, 5)), cp.Parameter((4, 5)), cp.Parameter(4)
    objective = cp.sum_squares(Q @ x) + cp.sum(x)
    return cp.Problem(cp.Minimize(objective), [A @ x <= b, x[0] - x[1] == 1]), [Q, A, b], [x]


def robust_least_squares() -> tuple[cp.Problem, list[Any], list[Any]]:
    x, A, b, rho = cp.Variable(4), cp.Parameter((7, 4)), cp.Parameter(7), cp.Parameter(nonneg=True)
    return cp.Problem(cp.Minimize(cp.norm(A @ x - b) + rho * cp.norm(x))), [A, b, rho], [x]


def portfolio() -> tuple[cp.Problem, list[Any], list[Any]]:
    """The last constraint is not active, and leaves the variables that CVXPY adds for it free."""
    x, mean, root = cp.Variable(5), cp.Parameter(5), cp.Parameter((5, 5))
    limits: list[Any] = [cp.norm(root @ x) <= 0.5, cp.sum(x) == 1, x >= 0, cp.norm(x, 1) <= 10]
    return cp.Problem(cp.Maximize(mean @ x), limits), [mean, root], [x]


def max_cut() -> tuple[cp.Problem, list[Any], list[Any]]:
    X, W = cp.Variable((4, 4), PSD=True), cp.Parameter((4, 4))
    return cp.Problem(cp.Maximize(cp.trace(W @ X)), [cp.diag(X) == 1]), [W], [X]


def nearest_correlation() -> tuple[cp.Problem, list[Any], list[Any]]:
    X, C = cp.Variable((4, 4), symmetric=True), cp.Parameter((4, 4))
    return cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [X >> 0, cp.diag(X) == 1]), [C], [X]


def entropy() -> tuple[cp.Problem, list[Any], list[Any]]:
    x, c, A, b = cp.Variable(4), cp.Parameter(4), cp.Parameter((2, 4)), cp.Parameter(2)
    limits: list[Any] = [cp.sum(x) == 1, A @ x <= b]
    return cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) + c @ x), limits), [c, A, b], [x]


def logistic() -> tuple[cp.Problem, list[Any], list[Any]]:
    x, A, penalty = cp.Variable(3), cp.Parameter((5, 3)), cp.Parameter(nonneg=True)
    loss = cp.sum(cp.logistic(A @ x)) + penalty * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(loss)), [A, penalty], [x]


CASES = [
    Case("linear program", linear_program, lambda: [torch.rand(6) + 0.1, torch.rand(4, 6), torch.rand(4)]),
    Case("quadratic program", quadratic_program, lambda: [torch.randn(5, 5), torch.rand(4, 5), torch.rand(4) - 0.8]),
    Case("robust least squares", robust_least_squares, lambda: [torch.randn(7, 4), torch.randn(7), torch.tensor(0.3)]),
    Case("portfolio", portfolio, lambda: [torch.rand(5), torch.eye(5) + 0.1 * torch.randn(5, 5)]),
    Case("max-cut relaxation", max_cut, lambda: [(W := torch.randn(4, 4)) + W.mT]),
    Case("nearest correlation", nearest_correlation, lambda: [torch.randn(4, 4)]),
    Case("entropy", entropy, lambda: [torch.randn(4), (A := torch.rand(2, 4)), A.sum(1) / 4 - 0.01]),
    Case("logistic regression", logistic, lambda: [torch.randn(5, 3), torch.tensor(0.3)]),
]


def differences(fn: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, step: float = 1e-4) -> Tensor:
    """Derivative along a direction by central differences of fourth order."""
    values = [fn(x + k * step * direction) for k in (-2, -1, 1, 2)]
    return (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * step)


# --- what must hold ---------------------------------------------------------------------------------------------------


def test_cases_have_dense_and_sparse_matrices() -> None:
    sparse = {tuple(from_cvxpy(*case.make()).canonical(*case.values())[1]) for case in CASES}
    assert sparse >= {(), ("A_index", "P_index")}


PAIRS = [(case, "CLARABEL") for case in CASES]
PAIRS += [(case, "SCS") for case in CASES if case.make in (portfolio, max_cut, entropy)]


@pytest.mark.parametrize(("case", "solver"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_derivatives_equal_finite_differences(case: Case, solver: str) -> None:
    layer, values = from_cvxpy(*case.make(), solver=solver), case.values()
    (y,) = layer(*values)
    weights = torch.randn(y.shape)
    for i, value in enumerate(values):
        alone = lambda t, i=i: layer(*values[:i], t, *values[i + 1 :])[0]
        gradient = torch.func.grad(lambda t, alone=alone: (alone(t) * weights).sum())(value)
        direction = torch.randn(value.shape)
        want = differences(alone, value, direction)
        scale = max(1.0, want.abs().max())
        got = torch.func.jvp(alone, (value,), (direction,))[1]
        # solutions are refined to some 1e-13, which the step magnifies by 1e4; 1e-5 is asked for
        assert (got - want).abs().max() < 1e-7 * scale
        assert abs((gradient * direction).sum() - (got * weights).sum()) < 1e-10 * scale


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_are_those_of_cvxpy(case: Case) -> None:
    problem, parameters, variables = case.make()
    values = case.values()
    (y,) = from_cvxpy(problem, parameters, variables)(*values)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.value = value.numpy()
    best = problem.solve(solver="CLARABEL")
    # Clarabel stops at a gap of 1e-8, which puts variables off by up to its square root
    assert torch.allclose(y, torch.tensor(variables[0].value), rtol=0, atol=1e-3)
    variables[0].save_value(y.numpy())
    assert problem.objective.value == pytest.approx(best, abs=1e-6)
    assert max([constraint.violation().max() for constraint in problem.constraints], default=0.0) < 1e-10


@pytest.mark.parametrize(
    ("constraints", "objective", "status"),
    [
        (lambda x, c: [x >= 1, x <= 0], lambda x, c: c @ x, "infeasible"),
        (lambda x, c: [x <= 1], lambda x, c: c @ x, "unbounded"),
    ],
    ids=["infeasible", "unbounded"],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_problem_without_solution_raises_with_the_status(
    constraints: Callable, objective: Callable, status: str, solver: str
) -> None:
    x, c = cp.Variable(2), cp.Parameter(2)
    layer = from_cvxpy(cp.Problem(cp.Minimize(objective(x, c)), constraints(x, c)), [c], [x], solver=solver)
    for call in (lambda: layer(torch.ones(2)), lambda: layer(torch.ones(3, 2))):
        with pytest.raises(SolverStatusError, match=f"{solver}.*{status}") as caught:
            call()
        assert caught.value.status == status


def test_solver_that_gives_up_raises_with_its_status() -> None:
    problem, parameters, variables = entropy()
    layer = from_cvxpy(problem, parameters, variables, solver_options={"max_iter": 2})
    with pytest.raises(SolverStatusError, match="MaxIterations") as caught:
        layer(*CASES[6].values())
    assert caught.value.status == "user_limit"


# --- orders, modes, batches, dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [robust_least_squares, nearest_correlation])
def test_first_and_second_derivatives_pass_gradcheck(make: Callable) -> None:
    case = next(case for case in CASES if case.make is make)
    layer = from_cvxpy(*make())
    values = [value.requires_grad_() for value in case.values()]
    solution = lambda *values: layer(*values)[0]
    assert torch.autograd.gradcheck(solution, values, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(solution, values, fast_mode=True)


def test_entropy_problem_is_softmax() -> None:
    x, c = cp.Variable(4), cp.Parameter(4)
    constraints: list[Any] = [cp.sum(x) == 1]
    layer = from_cvxpy(cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) + c @ x), constraints), [c], [x])
    values = torch.randn(4)
    assert torch.allclose(layer(values)[0], values.softmax(0), rtol=0, atol=1e-13)
    assert torch.allclose(
        torch.func.jacrev(torch.func.jacrev(lambda c: layer(c)[0]))(values),
        torch.func.jacrev(torch.func.jacrev(lambda c: c.softmax(0)))(values),
        rtol=0,
        atol=1e-11,
    )


def test_batch_gives_what_single_problems_give() -> None:
    layer = from_cvxpy(*robust_least_squares())
    A, b, rho = torch.randn(3, 7, 4), torch.randn(7), torch.rand(3) / 2
    inputs = [value.requires_grad_() for value in (A, b, rho)]
    (together,) = layer(*inputs)
    singly = torch.stack([layer(A[i], b, rho[i])[0] for i in range(3)])
    assert torch.allclose(together, singly, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y in (together, singly)]
    assert all(torch.allclose(*pair, rtol=0, atol=1e-11) for pair in zip(*gradients, strict=True))


def test_several_variables_and_all_attributes_come_back_in_shape() -> None:
    """Every variable has a closed form: entries of parameters, or of the inverse of one."""
    D, Y, z = cp.Variable((3, 3), diag=True), cp.Variable((2, 3)), cp.Variable(3, nonneg=True)
    S = cp.Variable((3, 3), symmetric=True)
    G, Q, H = cp.Parameter((3, 3)), cp.Parameter((3, 3), PSD=True), cp.Parameter((3, 3), diag=True)
    squares = cp.sum_squares(D - G) + cp.sum_squares(Y - G[:2]) + cp.sum_squares(S - G)
    problem = cp.Problem(cp.Minimize(squares + cp.quad_form(z, Q) - 2 * cp.sum(H @ z)))
    layer = from_cvxpy(problem, [Q, G, H], [S, z, D, Y])
    g, h = torch.randn(3, 3), torch.diag(torch.rand(3) + 1)
    q = torch.diag(torch.rand(3) + 1) + 0.1

    def exact(q: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        q = (q + q.mT) / 2
        return (g + g.mT) / 2, torch.linalg.inv(q) @ h.diagonal(), g.diagonal().diag_embed(), g[:2]

    for i in range(4):
        got, want = (torch.func.jacrev(lambda *v, f=f: f(*v)[i], (0, 1, 2))(q, g, h) for f in (layer, exact))  # noqa: B023
        assert all(torch.allclose(*pair, rtol=0, atol=1e-11) for pair in zip(got, want, strict=True))
        assert torch.allclose(layer(q, g, h)[i], exact(q, g, h)[i], rtol=0, atol=1e-12)


def test_problem_without_constraints_is_solved() -> None:
    x, A, b = cp.Variable(3), cp.Parameter((5, 3)), torch.randn(5)
    layer = from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b.numpy()))), [A], [x])
    value = torch.randn(5, 3)
    got, want = (lambda A: layer(A)[0]), lambda A: torch.linalg.pinv(A) @ b
    assert torch.allclose(torch.func.jacrev(got)(value), torch.func.jacrev(want)(value), rtol=0, atol=1e-11)


def test_single_precision_goes_in_and_comes_out() -> None:
    layer = from_cvxpy(*logistic())
    values = [value.float().requires_grad_() for value in CASES[7].values()]
    (y,) = layer(*values)
    gradients = torch.autograd.grad(y.sum(), values)
    assert {y.dtype, *(gradient.dtype for gradient in gradients)} == {torch.float32}
    precise = [value.detach().double().requires_grad_() for value in values]
    want = torch.autograd.grad(layer(*precise)[0].sum(), precise)
    assert all(torch.allclose(a.double(), b, rtol=1e-6) for a, b in zip(gradients, want, strict=True))


# --- solutions that are not unique ------------------------------------------------------------------------------------


def test_a_variable_that_is_not_unique_is_told_and_a_unique_one_is_right() -> None:
    x, free, c = cp.Variable(2), cp.Variable(), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [free >= 0, free <= 1])
    layer = from_cvxpy(problem, [c], [x, free], on_unconverged="raise")
    c_value = torch.tensor([1.0, 2.0], requires_grad=True)
    y, loose = layer(c_value)
    (gradient,) = torch.autograd.grad(y[0], c_value, retain_graph=True)
    assert torch.allclose(gradient, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-14)
    with pytest.raises(ig.ConvergenceError, match=r"singular, of rank \d+ of"):
        loose.backward()


def test_report_tells_how_regular_the_solution_is() -> None:
    problem, parameters, variables = portfolio()
    values = [value.requires_grad_() for value in CASES[3].values()]
    with ig.diagnostics() as log:
        from_cvxpy(problem, parameters, variables)(*values)[0].sum().backward()
    assert log[-1].converged and log[-1].support is not None and log[-1].support < log[-1].size
    assert "not unique" in str(log[-1]) and "singular" in log[-1].reason


def test_least_norm_equals_inverse_and_pseudo_inverse() -> None:
    regular = torch.randn(6, 6)
    singular = torch.randn(6, 4) @ torch.randn(4, 6)
    for matrix in (regular, singular, torch.stack([regular, singular])):
        inverse = torch.linalg.pinv(matrix, rtol=1e-10)
        for M, pseudo in ((matrix, inverse), (matrix.mT, inverse.mT)):
            A = ig.linalg.LinearOperator.from_dense(matrix)
            b = (M @ torch.randn(6, 1)).squeeze(-1)  # in the range
            solution = LeastNorm().solve(A if M is matrix else A.T, b)
            assert solution.converged
            assert torch.allclose(solution.value, (pseudo @ b.unsqueeze(-1)).squeeze(-1), rtol=0, atol=1e-9)
    A = ig.linalg.LinearOperator.from_dense(singular)
    assert "rank 4 of 6" in LeastNorm().solve(A, torch.ones(6)).reason
    assert not LeastNorm().solve(A, torch.ones(6)).converged
    assert LeastNorm().solve(A, torch.zeros(6)).converged


# --- errors -----------------------------------------------------------------------------------------------------------


def test_wrong_problems_are_refused() -> None:
    x, p, q = cp.Variable(2), cp.Parameter(2), cp.Parameter(2)
    simple = cp.Problem(cp.Minimize(cp.sum_squares(x - p)))
    other = cp.Variable(2)
    with pytest.raises(ValueError, match="not DPP"):
        from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x)), [cp.multiply(p, q) @ x >= 1]), [p, q], [x])
    with pytest.raises(TypeError, match="cvxpy.Problem"):
        from_cvxpy(x, [p], [x])
    with pytest.raises(TypeError, match="cvxpy.Parameter"):
        from_cvxpy(simple, [x], [x])
    with pytest.raises(ValueError, match="not among the variables"):
        from_cvxpy(simple, [p], [other])
    with pytest.raises(ValueError, match="not among the parameters"):
        from_cvxpy(simple, [p, q], [x])
    with pytest.raises(ValueError, match="one or more"):
        from_cvxpy(simple, [p, p], [x])
    with pytest.raises(ValueError, match=f"missing: {q.name()}"):
        from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x - p - q))), [p], [x])
    with pytest.raises(ValueError, match="CLARABEL, SCS"):
        from_cvxpy(simple, [p], [x], solver="OSQP")
    with pytest.raises(ValueError, match="integer"):
        whole = cp.Variable(2, integer=True)
        from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(whole - p))), [p], [whole])
    with pytest.raises(ValueError, match="complex"):
        wave = cp.Variable(2, complex=True)
        from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(wave - p))), [p], [wave])
    with pytest.raises(ValueError, match="power cones"):
        power = cp.PowCone3D(x[0], x[1], cp.sum(p), 0.3)
        from_cvxpy(cp.Problem(cp.Minimize(cp.sum(x)), [power]), [p], [x])


def test_wrong_values_are_refused() -> None:
    layer = from_cvxpy(*robust_least_squares())
    A, b, rho = torch.randn(7, 4), torch.randn(7), torch.tensor(0.3)
    with pytest.raises(ValueError, match="3 parameters"):
        layer(A, b)
    with pytest.raises(ValueError, match=r"\(7, 4\).*batch.*got \(4, 7\)"):
        layer(A.mT, b, rho)
    with pytest.raises(ValueError, match="one size"):
        layer(torch.stack([A, A]), torch.stack([b, b, b]), rho)
    with pytest.raises(TypeError, match="floating point"):
        layer(A, b, 0.3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="one dtype"):
        layer(A, b.float(), rho)
    with pytest.raises(ValueError, match="nonneg"):
        layer(A, b, -rho)
    with pytest.raises(FloatingPointError, match="NaN"):
        layer(A, b * torch.nan, rho)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ImportError, match=r"implicitgrad\[cvxpy\]"):
        from_cvxpy(None, [], [])
