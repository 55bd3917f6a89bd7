"""Nothing goes wrong in silence: warnings, errors, estimates and reports say what happened and where."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.linalg import CG, GMRES, AsymmetryError, Auto, Cholesky, LinearSolver, Solution
from tests.cases import CONDITIONS, ConditionCase

RIDGE, LOGISTIC, AFFINE = CONDITIONS[0], CONDITIONS[1], CONDITIONS[2]
smooth = pytest.mark.parametrize("case", [RIDGE, LOGISTIC], ids=str)


def caught(run: Callable[[], object]) -> list[warnings.WarningMessage]:
    """Warnings that `run` gives under the filter that Python shows users by default: once per place."""
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("default")
        run()
    return [message for message in messages if issubclass(message.category, ig.ConvergenceWarning)]


def solution(case: ConditionCase, **options: object) -> tuple[Tensor, Tensor]:
    x = case.x.clone().requires_grad_()
    return x, ig.implicit(case.condition, **options)(case.exact)(x, *case.data)


# --- solves that did not converge -------------------------------------------------------------------------------------


@pytest.mark.parametrize("capped", [CG(max_iter=1), GMRES(max_iter=1)], ids=["CG", "GMRES"])
def test_a_capped_solver_warns_at_the_line_that_made_the_solution(capped: LinearSolver) -> None:
    def run() -> None:
        x = RIDGE.x.clone().requires_grad_()
        y = ig.implicit_root(RIDGE.condition, x, RIDGE.exact(x, *RIDGE.data), *RIDGE.data, solver=capped)  # here
        y.sum().backward()

    (warning,) = caught(run)
    source = Path(__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(source, 1) if text.endswith("# here"))
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert "adjoint" in str(warning.message) and "max_iter" in str(warning.message)


def test_a_loop_warns_once_per_call_site() -> None:
    y = RIDGE.exact(RIDGE.x, *RIDGE.data)

    def loop() -> None:
        for factor in (0.9, 1.1, 1.2):
            ig.implicit_root(RIDGE.condition, RIDGE.x.clone().requires_grad_(), factor * y, *RIDGE.data)
        ig.implicit_root(RIDGE.condition, RIDGE.x.clone().requires_grad_(), 0.9 * y, *RIDGE.data)

    assert len({(w.filename, w.lineno) for w in caught(loop)}) == len(caught(loop)) == 2


def test_a_tangent_that_did_not_converge_warns() -> None:
    fit = ig.implicit(RIDGE.condition, solver=CG(max_iter=1))(RIDGE.exact)
    run = lambda: torch.func.jvp(lambda x: fit(x, *RIDGE.data), (RIDGE.x,), (torch.ones(3),))
    assert any("tangent" in str(warning.message) for warning in caught(run))


def test_on_unconverged_raises_or_is_silent_if_told() -> None:
    x, y = solution(RIDGE, solver=CG(max_iter=1), on_unconverged="raise")
    with pytest.raises(ig.ConvergenceError, match="adjoint"):
        y.sum().backward()
    x, y = solution(RIDGE, solver=CG(max_iter=1), on_unconverged="ignore")
    assert caught(lambda: y.sum().backward()) == []
    assert x.grad is not None
    off = 1.1 * RIDGE.exact(RIDGE.x, *RIDGE.data)
    arguments = (RIDGE.condition, RIDGE.x.clone().requires_grad_(), off, *RIDGE.data)
    with pytest.raises(ig.ConvergenceError, match="inner"):
        ig.implicit_root(*arguments, on_unconverged="raise")
    assert caught(lambda: ig.implicit_root(*arguments, on_unconverged="ignore")) == []
    assert caught(lambda: ig.implicit_root(*arguments, inner_tolerance=0.5)) == []
    with pytest.raises(ValueError, match="on_unconverged"):
        ig.implicit_root(*arguments, on_unconverged="shout")
    with pytest.raises(ValueError, match="inner_tolerance"):
        ig.implicit(RIDGE.condition, inner_tolerance=-1.0)


@pytest.mark.parametrize("road", ["reverse", "grad", "jvp", "vmap"])
def test_an_inner_solution_off_by_a_tenth_warns_on_every_road(road: str) -> None:
    fit = ig.implicit(RIDGE.condition)(lambda *a: 1.1 * RIDGE.exact(*a))
    scalar = lambda x: fit(x, *RIDGE.data).sum()
    roads = {
        "reverse": lambda: scalar(RIDGE.x.clone().requires_grad_()),
        "grad": lambda: torch.func.grad(scalar)(RIDGE.x),
        "jvp": lambda: torch.func.jvp(scalar, (RIDGE.x,), (RIDGE.x,)),
        "vmap": lambda: torch.func.vmap(scalar)(RIDGE.x[None]),
    }
    assert any("inner solution" in str(warning.message) for warning in caught(roads[road]))


# --- the estimate of the error ----------------------------------------------------------------------------------------


def upper(x: Tensor, y: Tensor) -> Tensor:
    return (y - torch.tensor([0.3, -0.1, 0.2])).square().sum() + 0.1 * x.square().sum()


def true_hypergradient(case: ConditionCase) -> Tensor:
    return torch.func.grad(lambda x: upper(x, case.exact(x, *case.data)))(case.x)


@smooth
@pytest.mark.parametrize("linear", [Auto(), CG()], ids=["dense", "krylov"])
def test_hypergradient_equals_closed_form(case: ConditionCase, linear: LinearSolver) -> None:
    h = ig.hypergradient(upper, case.condition, case.x, case.exact(case.x, *case.data), *case.data, solver=linear)
    assert torch.allclose(h.value, true_hypergradient(case), rtol=1e-9, atol=0)
    assert h.error_estimate < 1e-9
    assert torch.equal(h.upper_value, upper(case.x, case.exact(case.x, *case.data)))


@smooth
@pytest.mark.parametrize("offset", [0.1, 1e-2, 1e-4])
def test_error_estimate_is_within_a_tenth_of_the_true_error(case: ConditionCase, offset: float) -> None:
    exact = true_hypergradient(case)
    arguments = (upper, case.condition, case.x, (1 + offset) * case.exact(case.x, *case.data), *case.data)
    rough = ig.hypergradient(*arguments, on_unconverged="ignore")
    error = torch.linalg.vector_norm(rough.value - exact).item()
    assert abs(rough.error_estimate / error - 1) < 0.1
    corrected = ig.hypergradient(*arguments, correct=True, on_unconverged="ignore")
    assert torch.linalg.vector_norm(corrected.value - exact) < error / 10
    assert corrected.error_estimate == pytest.approx(rough.error_estimate)


def test_hypergradient_with_an_inner_solution_off_by_a_tenth_warns() -> None:
    off = 1.1 * RIDGE.exact(RIDGE.x, *RIDGE.data)
    for correct in (False, True):
        run = lambda: ig.hypergradient(upper, RIDGE.condition, RIDGE.x, off, *RIDGE.data, correct=correct)  # noqa: B023
        (warning,) = caught(run)
        assert warning.filename == __file__


def test_strong_convexity_buys_a_bound() -> None:
    assert isinstance(RIDGE.condition, ig.Stationary)
    off = 1.1 * RIDGE.exact(RIDGE.x, *RIDGE.data)
    arguments = (RIDGE.x, off, *RIDGE.data)
    convex = replace(RIDGE.condition, strong_convexity=0.6)
    bound = ig.hypergradient(upper, convex, *arguments, on_unconverged="ignore").inner_error_bound
    assert bound is not None and bound >= torch.linalg.vector_norm(off / 11).item()
    assert ig.hypergradient(upper, RIDGE.condition, *arguments, on_unconverged="ignore").inner_error_bound is None
    with pytest.raises(ValueError, match="strong_convexity must be a positive number, got 0"):
        replace(convex, strong_convexity=0.0)


def test_upper_loss_that_uses_nothing_or_is_no_scalar_is_refused() -> None:
    y = RIDGE.exact(RIDGE.x, *RIDGE.data)
    with pytest.raises(ValueError, match="neither x nor y"):
        ig.hypergradient(lambda x, y: torch.tensor(1.0), RIDGE.condition, RIDGE.x, y, *RIDGE.data)
    with pytest.raises(ValueError, match="scalar"):
        ig.hypergradient(lambda x, y: y, RIDGE.condition, RIDGE.x, y, *RIDGE.data)
    only_x = ig.hypergradient(lambda x, y: x.sin().sum(), RIDGE.condition, RIDGE.x, y, *RIDGE.data)
    assert torch.allclose(only_x.value, RIDGE.x.cos(), rtol=1e-14)


# --- numbers gone bad -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["x", "data", "solution"])
@pytest.mark.parametrize("road", ["reverse", "grad", "vmap", "hypergradient"])
def test_nan_and_infinity_raise(bad: float, place: str, road: str) -> None:
    x, data, y = RIDGE.x.clone(), [value.clone() for value in RIDGE.data], RIDGE.exact(RIDGE.x, *RIDGE.data)
    {"x": x, "data": data[1], "solution": y}[place][1] = bad
    scalar = lambda x: ig.implicit_root(RIDGE.condition, x, y, *data).sum()
    roads = {
        "reverse": lambda: scalar(x.requires_grad_()).backward(),
        "grad": lambda: torch.func.grad(scalar)(x),
        "vmap": lambda: torch.func.vmap(scalar)(x[None]),
        "hypergradient": lambda: ig.hypergradient(upper, RIDGE.condition, x, y, *data),
    }
    with pytest.raises(FloatingPointError):
        roads[road]()


def test_nan_in_a_cotangent_raises() -> None:
    x, y = solution(RIDGE)
    with pytest.raises(FloatingPointError):
        (y * float("nan")).sum().backward()


def test_a_singular_jacobian_raises() -> None:
    flat = ig.Stationary(lambda x, y: (y.sum() - x).square())
    x = torch.tensor(2.0, requires_grad=True)
    y = ig.implicit_root(flat, x, torch.ones(2))
    # LinAlgError is a RuntimeError; a solver that returns something must at least warn
    with pytest.raises((RuntimeError, FloatingPointError, ig.ConvergenceWarning)):
        y[0].backward()


# --- false declarations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("road", ["reverse", "grad", "vmap", "hypergradient"])
def test_a_map_falsely_declared_symmetric_is_caught(road: str) -> None:
    false = ig.FixedPoint(AFFINE.condition.step, symmetric=True)
    y = AFFINE.exact(AFFINE.x, *AFFINE.data)
    scalar = lambda x: ig.implicit_root(false, x, y, *AFFINE.data).sum()
    roads = {
        "reverse": lambda: scalar(AFFINE.x.clone().requires_grad_()).backward(),
        "grad": lambda: torch.func.grad(scalar)(AFFINE.x),
        "vmap": lambda: torch.func.vmap(scalar)(AFFINE.x[None]),
        "hypergradient": lambda: ig.hypergradient(upper, false, AFFINE.x, y, *AFFINE.data),
    }
    with pytest.raises(AsymmetryError, match="symmetric"):
        roads[road]()


def test_a_solver_that_cannot_take_the_system_says_which_can() -> None:
    for solver in (CG(), Cholesky()):
        x, y = solution(AFFINE, solver=solver)
        with pytest.raises(ValueError, match="symmetric"):
            y.sum().backward()


# --- arguments of the wrong kind --------------------------------------------------------------------------------------


def shift(x: Tensor, y: Tensor, *data: Tensor) -> Tensor:
    return (y - x).square().sum()


def test_arguments_of_the_wrong_kind_are_refused_with_a_reason() -> None:
    condition, x = ig.Stationary(shift), torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="OptimalityCondition"):
        ig.implicit(shift)
    with pytest.raises(TypeError, match="OptimalityCondition"):
        ig.implicit_root(shift, x, x)
    with pytest.raises(TypeError, match="function"):
        ig.Stationary(3)
    with pytest.raises(TypeError, match="function"):
        ig.FixedPoint(torch.ones(2))
    with pytest.raises(TypeError, match="linear solver"):
        ig.implicit(condition, solver=torch.linalg.solve)
    with pytest.raises(TypeError, match="complex"):
        ig.implicit_root(condition, x, torch.ones(2, dtype=torch.complex128))
    with pytest.raises(TypeError, match="complex"):
        ig.implicit_root(condition, torch.ones(2, dtype=torch.complex128), torch.ones(2))
    with pytest.raises(TypeError, match="int64"):
        ig.implicit_root(condition, x, torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="mixes dtypes"):
        ig.implicit_root(condition, x, (torch.ones(2), torch.ones(2, dtype=torch.float32)))
    with pytest.raises(TypeError, match=r"float64.*float32|float32.*float64"):
        ig.implicit_root(ig.FixedPoint(lambda x, y: x), x, torch.ones(2, dtype=torch.float32))
    with pytest.raises(TypeError, match="complex"):
        ig.implicit_root(ig.Stationary(lambda x, y: (y * (x + 1j)).sum()), x, torch.ones(2))
    with pytest.raises(ValueError, match="scalar"):
        ig.implicit_root(ig.Stationary(lambda x, y: y - x), x, torch.ones(2))
    with pytest.raises(ValueError, match="scalar"):
        ig.implicit_root(ig.Stationary(lambda x, y: 1.0), x, torch.ones(2))
    for upper_variable in (x.detach(), x):
        with pytest.raises(ValueError, match="does not depend on y"):
            ig.implicit_root(ig.Stationary(lambda x, y: x.sum()), upper_variable, torch.ones(2)).sum().backward()
    with pytest.raises(ValueError, match="differ in structure"):
        ig.implicit_root(ig.FixedPoint(lambda x, y: {"a": x}), x, {"b": torch.ones(2)})
    with pytest.raises(ValueError, match="shape"):
        ig.implicit_root(ig.FixedPoint(lambda x, y: x[:, None]), x, torch.ones(2))
    with pytest.raises(ValueError, match="no leaves"):
        ig.implicit_root(condition, x, ())
    with pytest.raises(TypeError, match="aux"):
        ig.implicit(condition, has_aux=True)(lambda x: x)(x)


@pytest.mark.parametrize(
    "transform", [lambda f: f, torch.func.grad, torch.func.jacfwd], ids=["plain", "grad", "jacfwd"]
)
@pytest.mark.parametrize("result", ["array", "number", "none"])
def test_a_solver_that_returns_no_tensor_is_told_how_to(transform: Callable, result: str) -> None:
    values = {"array": lambda x: x.detach().numpy(), "number": lambda x: 1.0, "none": lambda x: None}
    fit = ig.implicit(ig.Stationary(shift))(values[result])
    with pytest.raises(TypeError, match="torch.as_tensor" if result != "none" else "NoneType"):
        transform(lambda x: fit(x).sum())(torch.ones(2, requires_grad=True))


def test_tensors_on_several_devices_are_refused() -> None:
    condition, here, there = ig.Stationary(shift), torch.ones(2, requires_grad=True), torch.ones(2, device="meta")
    for arguments in ((there.requires_grad_(), here), (here, here, there), (here, (here, there)), (there, here, there)):
        with pytest.raises(ValueError, match="device"):
            ig.implicit_root(condition, *arguments)
    weight = torch.ones(2, device="meta", requires_grad=True)
    with pytest.raises((ValueError, TypeError, RuntimeError), match="device|meta"):
        ig.implicit_root(ig.Stationary(lambda x, y: (y - x * weight).square().sum()), here, here)


# --- tensors that cannot be followed ----------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    """`a w`, opaque to everything but its own graph node."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, w: Tensor) -> Tensor:
        return a * w

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        a, w = ctx.saved_tensors
        return cotangent * w, cotangent * a

    @staticmethod
    def jvp(ctx, a_tangent: Tensor, w_tangent: Tensor) -> Tensor:
        a, w = ctx.saved_tensors
        return a_tangent * w + a * w_tangent


@pytest.mark.parametrize("form", ["stationary", "fixed point"])
@pytest.mark.parametrize("make", [lambda w: w, lambda w: w * w], ids=["leaf", "intermediate"])
@pytest.mark.parametrize(
    "road", ["eager", "eager twice", "grad", "jacrev", "jacfwd", "hessian", "vmap(grad)", "grad inside", "vmap inside"]
)
def test_a_tensor_hidden_in_a_custom_function_gets_its_gradient_or_raises(
    form: str, make: Callable[[Tensor], Tensor], road: str
) -> None:
    x, at = torch.tensor([1.3, 2.0]), torch.tensor([0.5, 0.9])

    def solve(w: Tensor, x: Tensor = x) -> Tensor:
        hidden = make(w)
        stationary = ig.Stationary(lambda x, y: (0.5 * y * y).sum() - Product.apply(x * y, hidden).sum())
        fixed_point = ig.FixedPoint(lambda x, y: 0.3 * y + 0.7 * Product.apply(x, hidden))
        return ig.implicit_root(stationary if form == "stationary" else fixed_point, x, x * hidden).square().sum()

    def exact(w: Tensor, x: Tensor = x) -> Tensor:
        return (x * make(w)).square().sum()

    def run(f: Callable[..., Tensor]) -> Tensor:
        w = at.clone().requires_grad_()
        if road == "eager":
            return torch.autograd.grad(f(w), w)[0]
        if road == "eager twice":
            (graph,) = torch.autograd.grad(f(w), w, create_graph=True)
            return torch.autograd.grad(graph.sum(), w)[0]
        if road == "grad inside":
            return torch.autograd.grad(torch.func.grad(lambda x: f(w, x))(x).sum(), w)[0]
        if road == "vmap inside":
            return torch.autograd.grad(torch.func.vmap(lambda x: f(w, x))(x[None]).sum(), w)[0]
        if road == "vmap(grad)":
            return torch.func.vmap(torch.func.grad(f))(at[None])
        return getattr(torch.func, road)(f)(at)

    try:
        got = run(solve)
    except RuntimeError as error:
        assert "closes over" in str(error), error
        return
    assert torch.allclose(got, run(exact), rtol=1e-8, atol=1e-8)


# --- diagnostics ------------------------------------------------------------------------------------------------------


def test_a_report_has_the_figures_of_a_solve() -> None:
    with ig.diagnostics() as log:
        x, y = solution(LOGISTIC, solver=CG())
        y.sum().backward()
    (report,) = log
    want = LOGISTIC.condition.residual(x.detach(), y.detach(), *LOGISTIC.data)
    assert report.condition == "Stationary" and (report.size, report.batch) == (3, 1)
    assert report.inner_residual == pytest.approx(torch.linalg.vector_norm(want).item(), abs=1e-16)
    assert report.converged and report.inner_converged and report.route == "retained graph"
    assert report.seconds > 0 and report.last.seconds > 0 and report.memory > 0
    hessian = torch.func.hessian(lambda y: LOGISTIC.condition.loss(x.detach(), y, *LOGISTIC.data))(y.detach())
    assert report.last.kind == "adjoint" and report.last.solver == "CG" and report.last.right_hand_sides == 1
    assert 1 <= report.iterations <= 6 and report.products >= report.iterations
    assert report.adjoint_residual < 1e-10 and report.last.residual < 1e-10 * 3**0.5 * 1.001
    assert hessian.shape == (3, 3)
    text = str(log)
    for word in ("Stationary", "3 unknowns", "inner", "adjoint", "CG", "iterations", "residual"):
        assert word in text
    assert str(log[-1]) in text and "NOT CONVERGED" not in text


def test_the_adjoint_residual_is_recomputed_from_its_definition() -> None:
    class Liar(LinearSolver):
        def solve(self, A, b: Tensor, x0: Tensor | None = None) -> Solution:
            honest = CG(max_iter=1).solve(A, b, x0)
            self.true = torch.linalg.vector_norm(b - A @ honest.value) / torch.linalg.vector_norm(b)
            return honest

    liar = Liar()
    with ig.diagnostics() as log:
        x, y = solution(RIDGE, solver=liar, on_unconverged="ignore")
        y.sum().backward()
    assert log[-1].adjoint_residual == pytest.approx(liar.true.item(), rel=1e-6)
    assert not log[-1].converged and "NOT CONVERGED" in str(log)


def test_logs_nest_and_close() -> None:
    with ig.diagnostics() as outer:
        x, y = solution(RIDGE)
        with ig.diagnostics() as inner:
            _, other = solution(LOGISTIC)
        y.sum().backward()
    other.sum().backward()
    assert len(outer) == 2 and len(inner) == 1 and inner[0] is outer[1]
    assert len(outer[0].solves) == 1
    solution(RIDGE)
    assert len(outer) == 2
    with ig.diagnostics() as empty:
        pass
    assert "no implicit solution" in str(empty)


def test_a_backward_pass_inside_the_block_is_logged_though_the_solution_was_made_outside() -> None:
    x, y = solution(RIDGE)
    with ig.diagnostics() as log:
        y.sum().backward()
    assert len(log) == 1 and log[0].last.kind == "adjoint"


def test_a_log_is_closed_after_an_error() -> None:
    with pytest.raises(KeyError), ig.diagnostics() as log:
        raise KeyError
    solution(RIDGE)
    assert len(log) == 0


def test_reports_of_batches_tangents_and_plain_calls() -> None:
    fit = ig.implicit(RIDGE.condition)(RIDGE.exact)
    with ig.diagnostics() as log:
        fit(RIDGE.x, *RIDGE.data)
    assert len(log) == 1 and log[0].inner_relative < 1e-14
    with pytest.raises(LookupError, match="derivative"):
        _ = log[0].last
    with ig.diagnostics() as log:
        torch.func.vmap(fit, (0, None, None))(RIDGE.x.expand(4, 3), *RIDGE.data)
    assert log[-1].batch == 4 and "4 x 3 unknowns" in str(log)
    with ig.diagnostics() as log:
        torch.func.jvp(lambda x: fit(x, *RIDGE.data), (RIDGE.x,), (torch.ones(3),))
    assert log[-1].last.kind == "tangent"
    with ig.diagnostics() as log:
        torch.func.jacrev(lambda x: fit(x, *RIDGE.data))(RIDGE.x)
    assert log[-1].last.right_hand_sides == 3


def test_repeated_backward_passes_agree_and_reuse_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    factorisations = []
    for name in ("cholesky", "cholesky_ex"):
        plain = getattr(torch.linalg, name)
        spy = lambda *a, plain=plain, **k: factorisations.append(1) or plain(*a, **k)
        monkeypatch.setattr(torch.linalg, name, spy)
    with ig.diagnostics() as log:
        x, y = solution(LOGISTIC)
        value = y.sin().sum()
        grads = [torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    (report,) = log
    assert len(report.solves) == 3 and len(factorisations) == 1
    with ig.diagnostics() as log:
        x, y = solution(LOGISTIC, solver=CG())
        value = y.sin().sum()
        for _ in range(2):
            torch.autograd.grad(value, x, retain_graph=True)
    assert log[0].solves[1].iterations == 0 < log[0].solves[0].iterations


# --- check_hypergradient ----------------------------------------------------------------------------------------------


def upper_of(x: Tensor, y: Tensor) -> Tensor:
    return upper(torch.zeros(()), y)


@pytest.mark.parametrize("case", CONDITIONS, ids=str)
def test_check_passes_where_all_is_right(case: ConditionCase, capsys: pytest.CaptureFixture) -> None:
    result = ig.check_hypergradient(upper_of, ig.implicit(case.condition)(case.exact), case.x, *case.data)
    assert result and result.passed and result.cause == ""
    assert "PASSED" in capsys.readouterr().out
    assert result.unrolled == pytest.approx(result.implicit, rel=1e-8)  # the exact solution leaves a graph
    assert result.differences == pytest.approx(result.implicit, rel=1e-5, abs=1e-8)


def test_check_passes_without_unrolled_values_and_prints_nothing_if_told(capsys: pytest.CaptureFixture) -> None:
    fit = ig.implicit(RIDGE.condition)(lambda *a: torch.from_numpy(RIDGE.exact(*a).detach().numpy()))
    result = ig.check_hypergradient(upper_of, fit, RIDGE.x, *RIDGE.data, verbose=False)
    assert result and result.unrolled == () and capsys.readouterr().out == ""


def test_check_catches_a_wrong_sign(capsys: pytest.CaptureFixture) -> None:
    wrong = ig.Stationary(lambda x, y, a, t: 0.5 * (a @ y - t).square().mean() - 0.05 * (x.exp() * y * y).sum())
    right = lambda x, a, t: torch.linalg.solve(a.T @ a / 5 + 0.1 * torch.diag(x.exp()), a.T @ t / 5)
    result = ig.check_hypergradient(upper_of, ig.implicit(wrong)(right), RIDGE.x, *RIDGE.data)
    assert not result and "sign" in result.cause
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("num_steps", [3, 10, 30])
def test_check_catches_an_early_stop(num_steps: int) -> None:
    def descend(x: Tensor, a: Tensor, t: Tensor) -> Tensor:
        y = torch.zeros(3)
        for _ in range(num_steps):
            y = y - 0.1 * (a.T @ (a @ y - t) / 5 + x.exp() * y)
        return y

    fit = ig.implicit(RIDGE.condition)(descend)
    result = ig.check_hypergradient(upper_of, fit, RIDGE.x, *RIDGE.data, verbose=False)
    assert not result and ("stops early" in result.cause or "hardly started" in result.cause)


def test_check_catches_an_ignored_argument() -> None:
    def fit_of(condition: ig.OptimalityCondition) -> ig.ImplicitSolver:
        def solve(x: dict, t: Tensor) -> Tensor:
            return t * x["shift"].sin() / (1 + x["penalty"].exp())

        return ig.implicit(condition)(solve)

    x = {"penalty": RIDGE.x, "shift": torch.tensor([1.0, 0.5, 0.2])}
    t = torch.tensor([1.0, 2.0, -1.0])
    loss = lambda x, y, t, s: 0.5 * (y - s * t).square().sum() + 0.5 * (x["penalty"].exp() * y * y).sum()
    right = ig.Stationary(lambda x, y, t: loss(x, y, t, x["shift"].sin()))
    assert ig.check_hypergradient(upper_of, fit_of(right), x, t, verbose=False)
    constant = x["shift"].sin()
    ignoring = ig.Stationary(lambda x, y, t: loss(x, y, t, constant))
    result = ig.check_hypergradient(upper_of, fit_of(ignoring), x, t, verbose=False)
    assert not result and "ignores" in result.cause and "shift" in result.cause
    detached = ig.Stationary(lambda x, y, t: loss({"penalty": x["penalty"].detach()}, y, t, x["shift"].detach().sin()))
    result = ig.check_hypergradient(upper_of, fit_of(detached), x, t, verbose=False)
    assert not result and "ignores" in result.cause


def test_check_catches_a_false_symmetry() -> None:
    false = ig.FixedPoint(AFFINE.condition.step, symmetric=True)
    result = ig.check_hypergradient(upper_of, ig.implicit(false)(AFFINE.exact), AFFINE.x, *AFFINE.data, verbose=False)
    assert not result and "symmetric" in result.cause


def test_check_catches_a_condition_of_another_problem() -> None:
    other = ig.Stationary(lambda x, y, a, t: (a @ y - t).abs().pow(3).mean() + (x.exp() * y * y).sum())
    result = ig.check_hypergradient(upper_of, ig.implicit(other)(RIDGE.exact), RIDGE.x, *RIDGE.data, verbose=False)
    assert not result and result.cause


def test_check_needs_a_decorated_solver() -> None:
    with pytest.raises(TypeError, match="decorated"):
        ig.check_hypergradient(upper_of, RIDGE.exact, RIDGE.x, *RIDGE.data)


def test_check_works_in_float32() -> None:
    data = [value.float() for value in RIDGE.data]
    fit = ig.implicit(RIDGE.condition)(RIDGE.exact)
    result = ig.check_hypergradient(lambda x, y: y.square().sum(), fit, RIDGE.x.float(), *data, verbose=False)
    assert result, str(result)
