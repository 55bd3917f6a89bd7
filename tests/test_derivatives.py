"""Derivatives of implicit solutions in every mode and order equal those of a closed form.

The contract runs over `CONDITIONS` and `SOLVERS` of `tests/cases.py`; a case brings its exact solution, which autograd
differentiates by itself. 1e-8 is the accuracy promised for linear solvers that stop at a relative residual of 1e-10.
"""

import functools
import gc
import pickle
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import implicitgrad as ig
from tests.cases import CONDITIONS, SOLVERS, ConditionCase, SolverCase

PROMISED = 1e-8
Fit = Callable[..., Tensor]


def close(got: Tensor, want: Tensor, tolerance: float = PROMISED) -> bool:
    """Whether the largest difference is below `tolerance` times the largest entry."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


def decorated(case: ConditionCase, solver: ig.linalg.LinearSolver | None = None) -> Fit:
    return ig.implicit(case.condition, solver=solver)(case.exact)


PAIRS = [
    pytest.param(case, solver, id=f"{case}-{solver}")
    for case in CONDITIONS
    for solver in SOLVERS
    if solver.needs in case.meets
]
every_pair = pytest.mark.parametrize(("case", "solver"), PAIRS)
every_condition = pytest.mark.parametrize("case", CONDITIONS, ids=str)
# one solver that factorises and one that iterates: how solvers are called does not depend on more than that
two_solvers = pytest.mark.parametrize("linear", [ig.linalg.Auto(), ig.linalg.GMRES()], ids=["dense", "krylov"])


# --- the contract: every condition with every solver that takes it ----------------------------------------------------


@every_pair
def test_reverse_mode_equals_closed_form_in_every_argument(case: ConditionCase, solver: SolverCase) -> None:
    weights = torch.randn(case.exact(case.x, *case.data).shape)
    grads = []
    for fit in (decorated(case, solver.solver), case.exact):
        arguments = [value.clone().requires_grad_() for value in (case.x, *case.data)]
        (fit(*arguments) * weights).sum().backward()
        grads.append([value.grad for value in arguments])
    assert all(close(got, want) for got, want in zip(*grads, strict=True))


@every_pair
def test_forward_mode_equals_closed_form(case: ConditionCase, solver: SolverCase) -> None:
    arguments = (case.x, *case.data)
    tangents = tuple(torch.randn_like(value) for value in arguments)
    fit = decorated(case, solver.solver)
    value, slope = torch.func.jvp(case.exact, arguments, tangents)
    got_value, got_slope = torch.func.jvp(fit, arguments, tangents)
    assert close(got_value, value) and close(got_slope, slope)
    with fwd.dual_level():
        duals = [fwd.make_dual(value, tangent) for value, tangent in zip(arguments, tangents, strict=True)]
        assert close(fwd.unpack_dual(fit(*duals)).tangent, slope)


@every_pair
def test_second_derivatives_in_three_mode_pairs_equal_closed_form(case: ConditionCase, solver: SolverCase) -> None:
    def scalar(fit: Fit) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, last: fit(x, *case.data[:-1], last).sin().sum()

    both = (0, 1)
    arguments = (case.x, case.data[-1])
    fit, exact = scalar(decorated(case, solver.solver)), scalar(case.exact)
    hessian = pytree.tree_leaves(torch.func.hessian(exact, both)(*arguments))
    reverse = torch.func.jacrev
    for transform in (
        lambda f: torch.func.hessian(f, both),  # forward over reverse
        lambda f: reverse(reverse(f, both), both),
        lambda f: reverse(torch.func.jacfwd(f, both), both),
    ):
        got = pytree.tree_leaves(transform(fit)(*arguments))
        assert all(close(a, b) for a, b in zip(got, hessian, strict=True))
    eager = pytree.tree_leaves(torch.autograd.functional.hessian(fit, arguments))
    assert all(close(a, b) for a, b in zip(eager, hessian, strict=True))


# --- transforms, for every condition ----------------------------------------------------------------------------------


def batch_of(value: Tensor, size: int = 3) -> Tensor:
    return value + 0.1 * torch.randn(size, *value.shape)


@every_condition
@two_solvers
@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jacfwd"])
def test_functional_transform_equals_closed_form(
    case: ConditionCase, linear: ig.linalg.LinearSolver, transform: str
) -> None:
    def run(fit: Fit) -> tuple[Tensor, ...]:
        arguments, numbers = (case.x, *case.data), tuple(range(1 + len(case.data)))
        if transform == "grad":
            return torch.func.grad(lambda *a: fit(*a).sin().sum(), numbers)(*arguments)
        if transform == "vjp":
            value, pullback = torch.func.vjp(fit, *arguments)
            return pullback(torch.ones_like(value))
        return getattr(torch.func, transform)(fit, numbers)(*arguments)

    assert all(close(a, b) for a, b in zip(run(decorated(case, linear)), run(case.exact), strict=True))


DENSE, KRYLOV = ig.linalg.Auto(), ig.linalg.GMRES()
BATCHES = {
    "x batched": ((0, None, None), DENSE),
    "data batched": ((None, 0, 0), DENSE),
    "both": ((0, 0, 0), DENSE),
    "one of two": ((0, None, 0), DENSE),
    "one of two, krylov": ((0, None, 0), KRYLOV),
}


@every_condition
@pytest.mark.parametrize(("in_dims", "linear"), BATCHES.values(), ids=BATCHES.keys())
def test_vmap_over_problems_and_its_derivatives_equal_closed_form(
    case: ConditionCase, in_dims: tuple[int | None, ...], linear: ig.linalg.LinearSolver
) -> None:
    arguments = tuple(v if d is None else batch_of(v) for v, d in zip((case.x, *case.data), in_dims, strict=True))
    numbers = tuple(range(len(arguments)))
    tangents = tuple(torch.randn_like(value) for value in arguments)

    def run(fit: Fit) -> list[Tensor]:
        scalar = lambda *a: fit(*a).sin().sum()
        stacked = torch.func.vmap(fit, in_dims)
        return pytree.tree_leaves(
            [
                stacked(*arguments),
                torch.func.vmap(torch.func.grad(scalar, numbers), in_dims)(*arguments),
                torch.func.grad(lambda *a: stacked(*a).sin().sum(), numbers)(*arguments),
                torch.func.jvp(stacked, arguments, tangents),
                torch.func.vmap(torch.func.jacrev(fit), in_dims)(*arguments),
                torch.func.vmap(torch.func.jacfwd(fit), in_dims)(*arguments),
                torch.func.jacrev(stacked)(*arguments),
                torch.func.jacfwd(stacked)(*arguments),
                torch.func.vmap(torch.func.hessian(scalar), in_dims)(*arguments),
            ]
        )

    assert all(close(a, b) for a, b in zip(run(decorated(case, linear)), run(case.exact), strict=True))


@every_condition
def test_backward_through_vmap_reaches_leaves_outside(case: ConditionCase) -> None:
    in_dims = (0, *(None for _ in case.data))
    grads = []
    for fit in (decorated(case), case.exact):
        x = torch.stack([case.x, case.x + 0.2]).requires_grad_()
        data = [value.clone().requires_grad_() for value in case.data]
        (first,) = torch.autograd.grad(torch.func.vmap(fit, in_dims)(x, *data).sin().sum(), x, create_graph=True)
        grads.append([first, *torch.autograd.grad(first.square().sum(), [x, *data])])
    assert all(close(a, b) for a, b in zip(*grads, strict=True))


@every_condition
def test_nested_vmap_and_its_gradient_equal_closed_form(case: ConditionCase) -> None:
    x, first = batch_of(case.x, 2), batch_of(case.data[0], 3)

    def run(fit: Fit) -> tuple[Tensor, Tensor, Tensor]:
        one = lambda x, first: fit(x, first, *case.data[1:])
        grad = torch.func.grad(lambda x, first: one(x, first).sin().sum())
        twice = lambda fn: torch.func.vmap(torch.func.vmap(fn, (None, 0)), (0, None))
        outer = torch.func.grad(lambda x: twice(one)(x, first).sin().sum())(x)
        return twice(one)(x, first), twice(grad)(x, first), outer

    assert all(close(a, b) for a, b in zip(run(decorated(case)), run(case.exact), strict=True))


@every_condition
@two_solvers
def test_batched_cotangents_equal_closed_form(case: ConditionCase, linear: ig.linalg.LinearSolver) -> None:
    rows = []
    for fit in (decorated(case, linear), case.exact):
        arguments = [value.clone().requires_grad_() for value in (case.x, *case.data)]
        y = fit(*arguments)
        units = torch.eye(y.numel())
        first = torch.autograd.grad(y, arguments, units, is_grads_batched=True, create_graph=True)
        (x_row,) = torch.autograd.grad(first[0][1].sum(), arguments[0], retain_graph=True)
        second = torch.autograd.grad(first[0], arguments[0], torch.eye(9).reshape(9, 3, 3), is_grads_batched=True)
        rows.append([*first, x_row, *second])
    assert all(close(a, b) for a, b in zip(*rows, strict=True))


@every_condition
def test_third_derivatives_equal_closed_form(case: ConditionCase) -> None:
    direction = torch.randn_like(case.x)

    def functional(fit: Fit) -> Tensor:
        along = lambda t: fit(case.x + t * direction, *case.data).sin().sum()
        return torch.func.grad(torch.func.grad(torch.func.grad(along)))(case.x.new_zeros(()))

    def eager(fit: Fit) -> Tensor:
        x = case.x.clone().requires_grad_()
        value = fit(x, *case.data).sin().sum()
        for _ in range(3):
            (value,) = (torch.autograd.grad(value, x, create_graph=True)[0] @ direction).reshape(1)
        return value.detach()

    want = functional(case.exact)
    assert close(functional(decorated(case)), want) and close(eager(decorated(case)), want)


GRADCHECKS = [(case, ig.linalg.Auto()) for case in CONDITIONS] + [(case, ig.linalg.GMRES()) for case in CONDITIONS[-2:]]


@pytest.mark.parametrize(("case", "linear"), GRADCHECKS, ids=lambda value: str(value).split("(")[0])
def test_gradcheck_and_gradgradcheck_pass_with_every_flag(case: ConditionCase, linear: ig.linalg.LinearSolver) -> None:
    fit = lambda x, last: decorated(case, linear)(x, *case.data[:-1], last)
    arguments = (case.x.clone().requires_grad_(), case.data[-1].clone().requires_grad_())
    # an iterative solver starts from the last solution, so equal right-hand sides agree to its rtol of 1e-10 only
    flags = {"check_batched_grad": True, "nondet_tol": 0.0 if linear == ig.linalg.Auto() else PROMISED}
    assert torch.autograd.gradcheck(fit, arguments, check_forward_ad=True, check_batched_forward_grad=True, **flags)
    assert torch.autograd.gradgradcheck(fit, arguments, check_fwd_over_rev=True, check_rev_over_rev=True, **flags)


@every_condition
def test_forward_over_forward_raises(case: ConditionCase) -> None:
    fit = lambda x: decorated(case)(x, *case.data)
    with pytest.raises(NotImplementedError, match="hessian"):
        torch.func.jacfwd(torch.func.jacfwd(fit))(case.x)
    push = lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]
    with pytest.raises(NotImplementedError):
        push(push(fit))(case.x)
    with pytest.raises(NotImplementedError):
        push(torch.func.vmap(push(fit)))(batch_of(case.x))


@every_condition
def test_declared_structure_is_that_of_the_jacobian(case: ConditionCase) -> None:
    y = case.exact(case.x, *case.data)
    assert case.condition.residual(case.x, y, *case.data).abs().max() < 1e-14
    a = torch.func.jacrev(lambda y: case.condition.residual(case.x, y, *case.data))(y)
    symmetric = bool((a - a.mT).abs().max() < 1e-14)
    holds = {
        "symmetric": symmetric,
        "definite": symmetric and bool((torch.linalg.eigvals(a).real > 0).all()),
        "contraction": bool((torch.linalg.eigvals(torch.eye(len(a)) - a).abs() < 1).all()),
        "square": True,
    }
    assert {kind for kind, value in holds.items() if value} == set(case.meets)


# --- where tensors may come from: arguments, closures, modules --------------------------------------------------------
# One condition in two forms, `x y = right(...)`, so that every part of the right side can be hidden in a closure.

X, TARGET = torch.tensor([1.3, 2.0], dtype=torch.float64), torch.tensor([0.4, -0.7], dtype=torch.float64)


def stationary(right: Callable[..., Tensor]) -> ig.OptimalityCondition:
    """`x y = right(x, *data)` as a stationary point."""
    return ig.Stationary(lambda x, y, *data: (0.5 * x * y * y - y * right(x, *data)).sum())


def fixed_point(right: Callable[..., Tensor]) -> ig.OptimalityCondition:
    """The same as a fixed point."""
    return ig.FixedPoint(lambda x, y, *data: y - 0.3 * (x * y - right(x, *data)))


both_forms = pytest.mark.parametrize("form", [stationary, fixed_point])
Form = Callable[[Callable[..., Tensor]], ig.OptimalityCondition]


def derivatives(f: Callable[[Tensor], Tensor], at: Tensor) -> dict[str, Tensor]:
    """First and second derivatives of a scalar function on every road there is."""
    x = at.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x)
    (graph,) = torch.autograd.grad(f(x), x, create_graph=True)
    (second,) = torch.autograd.grad(graph.sum(), x)
    with fwd.dual_level():
        dual = fwd.unpack_dual(f(fwd.make_dual(at, torch.ones_like(at)))).tangent
    value, pullback = torch.func.vjp(f, at)
    return {
        "reverse": first,
        "reverse with a graph": graph.detach(),
        "reverse twice": second,
        "dual numbers": dual,
        "grad": torch.func.grad(f)(at),
        "vjp": pullback(torch.ones_like(value))[0],
        "jacfwd": torch.func.jacfwd(f)(at),
        "jvp": torch.func.jvp(f, (at,), (torch.ones_like(at),))[1],
        "hessian": torch.func.hessian(f)(at),
        "jacrev(jacfwd)": torch.func.jacrev(torch.func.jacfwd(f))(at),
        "vmap(grad)": torch.func.vmap(torch.func.grad(f))(torch.stack([at, at + 0.1])),
        "grad(vmap)": torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(torch.stack([at, at + 0.1])),
        "jvp(vmap)": torch.func.jvp(torch.func.vmap(f), (at[None],), (torch.ones_like(at)[None],))[1],
    }


def disagreements(f: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor], at: Tensor = X) -> list[str]:
    """Names of the roads on which two functions have different derivatives."""
    want, wrong = derivatives(exact, at), []
    got: dict[str, Tensor] = {}
    for name in want:
        if not got:
            got = derivatives(f, at)
        if got[name].shape != want[name].shape or not (got[name] - want[name]).abs().max() < PROMISED:
            wrong.append(name)
    return wrong


@dataclass(frozen=True)
class Closure:
    """`solve(form, x)` gives a solution whose condition picks up `x` in a certain way, `exact(x)` the closed form."""

    name: str
    solve: Callable[[Form, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]


def _root(form: Form, right: Callable[..., Tensor], x: Tensor, y: Tensor, *data: Tensor) -> Tensor:
    return ig.implicit_root(form(right), x, y, *data).sum()


def _of_list(form: Form, x: Tensor) -> Tensor:
    parts = [x * x, x.sin()]
    return _root(form, lambda a: torch.stack(parts).sum(0), x, (x * x + x.sin()) / x)


def _of_view(form: Form, x: Tensor) -> Tensor:
    row = (x * x).reshape(1, 2)
    return _root(form, lambda a: row.T[:, 0], x, x.detach())


def _of_keyword(form: Form, x: Tensor) -> Tensor:
    square = x * x
    return _root(form, lambda a: torch.mul(input=square, other=torch.ones(2)), x, x)


def _filled_in_place(form: Form, x: Tensor) -> Tensor:
    square = x * x
    return _root(form, lambda a: torch.zeros_like(a).add_(square), x, x)


def _local(make: Callable[[Tensor], Tensor]) -> Callable[[Form, Tensor], Tensor]:
    def solve(form: Form, x: Tensor) -> Tensor:
        hidden = make(x)
        return _root(form, lambda a: hidden * TARGET, x, hidden * TARGET / x)

    return solve


def _of_solution(form: Form, x: Tensor) -> Tensor:
    inner = ig.implicit_root(form(lambda a: a.sin()), x, x.sin() / x)
    return _root(form, lambda a: inner * TARGET, x, inner * TARGET / x)


CLOSURES = [
    Closure("explicit", lambda form, x: _root(form, lambda a: a.sin(), x, x.sin() / x), lambda x: (x.sin() / x).sum()),
    Closure(
        "x also as data",
        lambda form, x: _root(form, lambda a, t: t.sin(), x, x.sin() / x, x),
        lambda x: (x.sin() / x).sum(),
    ),
    Closure(
        "data depends on x",
        lambda form, x: _root(form, lambda a, t: t.sin(), x, (2 * x).sin() / x, 2 * x),
        lambda x: ((2 * x).sin() / x).sum(),
    ),
    Closure("intermediate result", _local(torch.sin), lambda x: (x.sin() * TARGET / x).sum()),
    Closure("view", _local(lambda x: x.exp()[:]), lambda x: (x.exp() * TARGET / x).sum()),
    Closure("reduced", _local(lambda x: x.sin() * x.sum()), lambda x: (x.sin() * x.sum() * TARGET / x).sum()),
    Closure("list", _of_list, lambda x: ((x * x + x.sin()) / x).sum()),
    Closure("transposed view", _of_view, lambda x: x.sum() + 0 * (x * x).sum()),
    Closure("keyword", _of_keyword, lambda x: x.sum() + 0 * (x * x).sum()),
    Closure("filled in place", _filled_in_place, lambda x: x.sum() + 0 * (x * x).sum()),
    Closure("x itself", lambda form, x: _root(form, lambda a: x.sin(), x, x.sin() / x), lambda x: (x.sin() / x).sum()),
    Closure(
        "data itself", lambda form, x: _root(form, lambda a, t: t * x.sin(), x, x.sin(), x), lambda x: x.sin().sum()
    ),
    Closure("another solution", _of_solution, lambda x: (x.sin() / x * TARGET / x).sum()),
]


@both_forms
@pytest.mark.parametrize("closure", CLOSURES, ids=lambda closure: closure.name)
def test_derivatives_reach_what_the_condition_picks_up(form: Form, closure: Closure) -> None:
    if closure.name == "filled in place":  # torch.func.vmap refuses to write a batched tensor into a plain one
        x = X.clone().requires_grad_()
        (got,) = torch.autograd.grad(closure.solve(form, x), x, create_graph=True)
        assert close(got, torch.ones(2)) and close(torch.func.grad(lambda x: closure.solve(form, x))(X), torch.ones(2))
        return
    assert disagreements(lambda x: closure.solve(form, x), closure.exact) == []


@both_forms
def test_an_intermediate_result_passed_and_closed_over_counts_twice(form: Form) -> None:
    def solve(x: Tensor) -> Tensor:
        scaled = 2 * x
        return ig.implicit_root(form(lambda a: scaled.sin()), scaled, scaled.sin() / scaled).sum()

    assert disagreements(solve, lambda x: ((2 * x).sin() / (2 * x)).sum()) == []


@both_forms
def test_vmap_inside_the_condition_is_right_or_raises(form: Form) -> None:
    def explicit(x: Tensor) -> Tensor:
        right = lambda a, t: torch.func.vmap(lambda ai, ti: ti.sin() * ai / ai)(a, t)
        return ig.implicit_root(form(right), x, x.sin() / x, x).sum()

    def hidden(x: Tensor) -> Tensor:
        sine = x.sin()
        right = lambda a: torch.func.vmap(lambda ai, si: si * ai / ai)(a, sine)
        return ig.implicit_root(form(right), x, sine / x).sum()

    exact = lambda x: (x.sin() / x).sum()
    assert disagreements(explicit, exact) == []
    for transform, at in (
        (torch.func.grad, X),
        (torch.func.jacfwd, X),
        (lambda f: torch.func.vmap(torch.func.grad(f)), X[None]),
    ):
        try:
            got = transform(hidden)(at)
        except RuntimeError:
            continue
        assert close(got, transform(exact)(at))


@both_forms
def test_closed_over_tensors_of_an_outer_level_get_gradients(form: Form) -> None:
    weight = torch.tensor([0.5, 0.9], requires_grad=True)
    solve = lambda x: ig.implicit_root(form(lambda a: weight), x, weight / x).sum()
    exact = lambda x: (weight / x).sum()
    roads = {
        "vmap": lambda f: torch.func.vmap(f)(torch.stack([X, X + 0.1])).sum(),
        "grad": lambda f: torch.func.grad(f)(X).sum(),
        "vmap(grad)": lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([X, X + 0.1])).sum(),
        "jvp": lambda f: torch.func.jvp(f, (X,), (torch.ones(2),))[1],
    }
    wrong = []
    for name, road in roads.items():
        (want,) = torch.autograd.grad(road(exact), weight)
        for graph in (False, True):
            (got,) = torch.autograd.grad(road(solve), weight, create_graph=graph)
            if not close(got, want):
                wrong.append((name, graph))
    assert wrong == []


@both_forms
@pytest.mark.parametrize("wrap", ["direct", "functional"])
def test_weights_of_a_module_in_the_condition_get_gradients(form: Form, wrap: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    condition = form(lambda a: net(a))
    if wrap == "functional":
        net_fn, params = ig.functional(net), dict(net.named_parameters())
        condition = form(lambda a: net_fn(params, a))
    x = X.clone().requires_grad_()
    weights = [x, *net.parameters()]
    solved = ig.implicit_root(condition, x, net(x) / x)
    first = torch.autograd.grad(solved.sin().sum(), weights, create_graph=True)
    second = torch.autograd.grad(sum(part.square().sum() for part in first), weights)
    exact = torch.autograd.grad((net(x) / x).sin().sum(), weights, create_graph=True)
    exact_second = torch.autograd.grad(sum(part.square().sum() for part in exact), weights)
    plain = torch.autograd.grad(ig.implicit_root(condition, x, net(x) / x).sin().sum(), weights)
    for got, want in ((first, exact), (second, exact_second), (plain, exact)):
        assert all(close(a, b) for a, b in zip(got, want, strict=True))
    if wrap == "functional":
        named = {name: value.detach() for name, value in net.named_parameters()}
        y = net(X).detach() / X
        hidden = lambda p: ig.implicit_root(form(lambda a: net_fn(p, a)), X, y).sin().sum()
        closed = lambda p: (torch.func.functional_call(net, p, X) / X).sin().sum()
        got, want = (pytree.tree_leaves(torch.func.hessian(solve)(named)) for solve in (hidden, closed))
        assert all((a - b).abs().max() < PROMISED for a, b in zip(got, want, strict=True))


@both_forms
def test_closed_over_dual_numbers_carry_their_tangents(form: Form) -> None:
    with fwd.dual_level():
        hidden = fwd.make_dual(X.sin(), X.cos())
        y = ig.implicit_root(form(lambda a: hidden), X, X.sin() / X)
        assert close(fwd.unpack_dual(y).tangent, X.cos() / X)


@both_forms
def test_arguments_that_cannot_be_differentiated_pass_through(form: Form) -> None:
    index, flags = torch.tensor([1, 0]), torch.tensor([True, False])
    seen = []

    def right(a: Tensor, t: Tensor, power: int, nothing: None, name: str, index: Tensor, options: dict) -> Tensor:
        seen.append((power, nothing, name, index.dtype, options["flags"].dtype, options["on"]))
        return t[index] ** power * options["flags"].to(a.dtype).add(1)

    def solution(x: Tensor, t: Tensor, *rest: object) -> Tensor:
        return right(x, t, *rest) / x

    fit = ig.implicit(form(right))(solution)
    rest = (3, None, "name", index, {"flags": flags, "on": True})
    for road in (fit, solution):
        t = TARGET.clone().requires_grad_()
        x = X.clone().requires_grad_()
        road(x, t, *rest).sum().backward()
        if road is fit:
            got = x.grad, t.grad
    assert close(got[0], x.grad) and close(got[1], t.grad)
    scalar = lambda road: lambda x, t: road(x, t, *rest).sin().sum()
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        assert close(transform(scalar(fit))(X, TARGET), transform(scalar(solution))(X, TARGET))
    batch = torch.stack([X, X + 1])
    in_dims = (0, None, None, None, None, None, None)
    assert close(torch.func.vmap(fit, in_dims)(batch, TARGET, *rest), solution(batch, TARGET, *rest))
    assert set(seen) == {(3, None, "name", torch.int64, torch.bool, True)}


# --- trees ------------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["w", "b"])


@dataclass
class Registered:
    w: Tensor
    b: Tensor


class Node:
    def __init__(self, w: Tensor, b: Tensor) -> None:
        self.w, self.b = w, b


pytree.register_dataclass(Registered)
pytree.register_pytree_node(
    Node,
    lambda node: ([node.w, node.b], None),
    lambda values, _: Node(*values),
    flatten_with_keys_fn=lambda node: (
        [(pytree.GetAttrKey("w"), node.w), (pytree.GetAttrKey("b"), node.b)],
        None,
    ),
)


@dataclass(frozen=True)
class Kind:
    """How to make a tree of a vector `w` and a scalar `b`, and take it apart."""

    name: str
    make: Callable[[Tensor, Tensor], object]
    take: Callable[[object], tuple[Tensor, Tensor]]

    def __str__(self) -> str:
        return self.name


KINDS = [
    Kind("tuple", lambda w, b: (w, b), tuple),
    Kind("list", lambda w, b: [w, b], tuple),
    Kind("dict", lambda w, b: {"w": w, "b": b}, lambda t: (t["w"], t["b"])),
    Kind("dict, other order", lambda w, b: {"b": b, "w": w}, lambda t: (t["w"], t["b"])),
    Kind("ordered dict", lambda w, b: OrderedDict(b=b, w=w), lambda t: (t["w"], t["b"])),
    Kind("named tuple", Pair, tuple),
    Kind("dataclass", Registered, lambda t: (t.w, t.b)),
    Kind("registered node", Node, lambda t: (t.w, t.b)),
    Kind("nested", lambda w, b: {"z": [{"q": w}], "a": (b,)}, lambda t: (t["z"][0]["q"], t["a"][0])),
]
VECTOR, SCALAR = torch.tensor([1.3, 0.6], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)


def two_leaves(x_kind: Kind, y_kind: Kind, step_kind: Kind | None) -> Callable[[Tensor, Tensor], Tensor]:
    """A scalar function of the solution `y.w = x.w², y.b = x.b Σ x.w`; a fixed point if `step_kind` is given."""

    def loss(x: object, y: object) -> Tensor:
        (w, b), (u, v) = x_kind.take(x), y_kind.take(y)
        return (0.5 * u * u - u * w * w).sum() + 0.5 * v * v - v * b * w.sum()

    def step(x: object, y: object) -> object:
        (w, b), (u, v) = x_kind.take(x), y_kind.take(y)
        shear = 0.1 * (v - b * w.sum())
        return step_kind.make(0.5 * u + 0.5 * w * w + shear, 0.2 * v + 0.8 * b * w.sum())

    @ig.implicit(ig.Stationary(loss) if step_kind is None else ig.FixedPoint(step))
    def fit(x: object) -> object:
        w, b = x_kind.take(x)
        return y_kind.make(w * w, b * w.sum())

    def scalar(w: Tensor, b: Tensor) -> Tensor:
        x = x_kind.make(w, b)
        y = fit(x)
        assert type(y) is type(y_kind.make(w, b))
        u, v = y_kind.take(y)
        return u.sin().sum() * v.cos()

    return scalar


def _tree_exact(w: Tensor, b: Tensor) -> Tensor:
    return (w * w).sin().sum() * (b * w.sum()).cos()


def _check_tree(scalar: Callable[[Tensor, Tensor], Tensor]) -> None:
    w, b = VECTOR.clone().requires_grad_(), SCALAR.clone().requires_grad_()
    for got, want in zip(
        torch.autograd.grad(scalar(w, b), [w, b]), torch.autograd.grad(_tree_exact(w, b), [w, b]), strict=True
    ):
        assert close(got, want)
    batch = torch.stack([VECTOR, VECTOR + 1]), torch.stack([SCALAR, SCALAR + 1])
    both = (0, 1)
    for transform, at in (
        (torch.func.jacfwd, (VECTOR, SCALAR)),
        (torch.func.hessian, (VECTOR, SCALAR)),
        (lambda f, numbers: torch.func.vmap(torch.func.grad(f, numbers)), batch),
    ):
        got, want = (pytree.tree_leaves(transform(f, both)(*at)) for f in (scalar, _tree_exact))
        assert all(close(a, c) for a, c in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("place", ["x", "y"])
@pytest.mark.parametrize("form", ["stationary", "fixed point"])
def test_trees_of_every_kind_have_right_derivatives(kind: Kind, place: str, form: str) -> None:
    x_kind, y_kind = (kind, KINDS[2]) if place == "x" else (KINDS[2], kind)
    _check_tree(two_leaves(x_kind, y_kind, None if form == "stationary" else y_kind))


def test_dict_keys_in_another_order_are_matched_by_key() -> None:
    _check_tree(two_leaves(KINDS[2], KINDS[2], step_kind=KINDS[3]))
    _check_tree(two_leaves(KINDS[3], KINDS[3], step_kind=KINDS[4]))


# --- solvers of every sort --------------------------------------------------------------------------------------------

REGRESSION = CONDITIONS[0]


def _torch_optim(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    y = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [y], max_iter=200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (features @ y - target).square().mean() + 0.5 * (x.exp() * y.square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return y


def _gradient_descent(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    y = torch.zeros(3)
    for _ in range(300):
        y -= 0.4 * (features.T @ (features @ y - target) / 5 + x.exp() * y)
    return y


def _scipy(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    optimize = pytest.importorskip("scipy.optimize")
    a, b, penalty = features.numpy(), target.numpy(), x.exp().numpy()

    def loss(y):  # value and gradient by hand
        rest = a @ y - b
        return 0.5 * (rest**2).mean() + 0.5 * (penalty * y**2).sum(), a.T @ rest / 5 + penalty * y

    result = optimize.minimize(loss, [0.0] * 3, jac=True, method="BFGS", options={"gtol": 1e-12})
    return torch.as_tensor(result.x)


def _sklearn(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    linear_model = pytest.importorskip("sklearn.linear_model")
    root = (x.exp() * 5).sqrt()  # one penalty per feature: rescale the features
    model = linear_model.Ridge(alpha=1.0, fit_intercept=False, solver="cholesky")
    model.fit((features / root).numpy(), target.numpy())
    return torch.as_tensor(model.coef_) / root


def _cvxpy(x: Tensor, features: Tensor, target: Tensor) -> Tensor:
    cvxpy = pytest.importorskip("cvxpy")
    y = cvxpy.Variable(3)
    loss = cvxpy.sum_squares(features.numpy() @ y - target.numpy()) / 10
    penalty = cvxpy.sum(cvxpy.multiply(x.exp().numpy(), cvxpy.square(y))) / 2
    cvxpy.Problem(cvxpy.Minimize(loss + penalty)).solve(solver="CLARABEL", tol_gap_abs=1e-14, tol_gap_rel=1e-14)
    return torch.as_tensor(y.value)


@pytest.mark.parametrize("inner", [_torch_optim, _gradient_descent, _scipy, _sklearn, _cvxpy])
def test_any_inner_solver_gives_the_derivatives_of_the_closed_form(inner: Callable[..., Tensor]) -> None:
    fit = ig.implicit(REGRESSION.condition)(inner)
    found = inner(REGRESSION.x, *REGRESSION.data).detach()
    distance = (found - REGRESSION.exact(REGRESSION.x, *REGRESSION.data)).abs().max()
    # derivatives are as good as the solution: interior points stop near 1e-7, the others near rounding
    tolerance = max(PROMISED, 100 * float(distance))
    assert tolerance < 1e-5
    scalar = lambda solve: lambda x, t: solve(x, REGRESSION.data[0], t).sin().sum()
    at = (REGRESSION.x, REGRESSION.data[1])
    eager = [value.clone().requires_grad_() for value in at]
    got, want = (torch.autograd.grad(scalar(solve)(*eager), eager) for solve in (fit, REGRESSION.exact))
    assert all(close(a, b, tolerance) for a, b in zip(got, want, strict=True))
    for transform in (torch.func.grad, torch.func.hessian):
        got, want = (transform(scalar(solve))(*at) for solve in (fit, REGRESSION.exact))
        assert close(got, want, tolerance)


def test_aux_is_handed_through_also_under_transforms() -> None:
    @ig.implicit(REGRESSION.condition, has_aux=True)
    def fit(x: Tensor, *data: Tensor) -> tuple[Tensor, dict]:
        y = REGRESSION.exact(x, *data)
        return y, {"steps": 7, "path": (y * x).sum(), "name": "direct"}

    x = REGRESSION.x.clone().requires_grad_()
    y, aux = fit(x, *REGRESSION.data)
    assert aux["steps"] == 7 and aux["name"] == "direct" and not aux["path"].requires_grad
    exact = lambda x: REGRESSION.exact(x, *REGRESSION.data).sin().sum()
    assert close(torch.autograd.grad(y.sin().sum(), x)[0], torch.func.grad(exact)(REGRESSION.x))

    def scalar(x: Tensor) -> tuple[Tensor, Tensor]:
        y, aux = fit(x, *REGRESSION.data)
        return y.sin().sum(), aux["path"]

    got, path = torch.func.grad(scalar, has_aux=True)(REGRESSION.x)
    assert close(got, torch.func.grad(exact)(REGRESSION.x)) and close(path, aux["path"])
    batch = torch.stack([REGRESSION.x, REGRESSION.x + 0.1])
    got, paths = torch.func.vmap(torch.func.grad(scalar, has_aux=True))(batch)
    assert close(got, torch.func.vmap(torch.func.grad(exact))(batch)) and close(paths[0], aux["path"])
    slope, _ = torch.func.jacfwd(scalar, has_aux=True)(REGRESSION.x)
    assert close(slope, torch.func.grad(exact)(REGRESSION.x))


def test_methods_can_be_decorated() -> None:
    class Model:
        scale = 2.0

        @ig.implicit(ig.Stationary(lambda x, y: (y - x).square().sum()))
        def fit(self, x: Tensor) -> Tensor:
            """Fits."""
            return x * self.scale / 2

    x = X.clone().requires_grad_()
    assert close(torch.autograd.grad(Model().fit(x).sum(), x)[0], torch.ones(2))
    assert Model.fit.__doc__ == "Fits." and Model.fit.__name__ == "fit"


# --- composition, graphs, layouts -------------------------------------------------------------------------------------


def test_solutions_chain() -> None:
    def chain(solve: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y = solve(x, x.sin())
            return solve(x + y, y).sum()

        return run

    exact = lambda x, b: b / x
    fit = ig.implicit(fixed_point(lambda a, b: b))(exact)
    assert disagreements(chain(fit), chain(exact)) == []


sinc = ig.implicit(ig.Stationary(lambda w, z: (0.5 * w * z * z - z * w.sin()).sum()))(lambda w: w.sin() / w)


def _sinc_exact(w: Tensor) -> Tensor:
    return w.sin() / w


def _nested_loss(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: (0.5 * (4 + x) * y * y + y * inner(x)).sum() + 0.3 * inner(3 + y).sum()


def _nested_exact(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for _ in range(8):  # Newton steps with the derivatives of sin(w)/w written out
        w = 3 + y
        slope = (w.cos() * w - w.sin()) / w**2
        bend = -w.sin() / w - 2 * slope / w
        y = y - ((4 + x) * y + _sinc_exact(x) + 0.3 * slope) / (4 + x + 0.3 * bend)
    return y


def test_a_solution_inside_a_condition_is_differentiated_through_twice() -> None:
    fit = ig.implicit(ig.Stationary(_nested_loss(sinc)))(_nested_exact)
    grads = []
    for solve in (fit, _nested_exact):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(solve(x).sum(), x, create_graph=True)
        grads.append((first, torch.autograd.grad(first.sum(), x)[0]))
    assert close(grads[0][0], grads[1][0]) and close(grads[0][1], grads[1][1])


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian"])
def test_a_solution_inside_a_condition_under_transforms(transform: str) -> None:
    fit = ig.implicit(ig.Stationary(_nested_loss(sinc)))(_nested_exact)
    got, want = (getattr(torch.func, transform)(lambda x: solve(x).sum())(X) for solve in (fit, _nested_exact))  # noqa: B023
    assert close(got, want)


def test_hypergradient_goes_through_a_solution_in_the_upper_loss() -> None:
    condition = stationary(lambda x: x.square())
    got = ig.hypergradient(lambda x, y: sinc(3 + y).sum(), condition, X, X)
    assert close(got.value, torch.func.grad(lambda x: _sinc_exact(3 + x).sum())(X))


@both_forms
def test_graphs_can_be_kept_extended_and_used_again(form: Form) -> None:
    fit = ig.implicit(form(lambda a: a.sin()))(_sinc_exact)
    x = X.clone().requires_grad_()
    value = fit(x).sum()
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (graph,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(graph.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(graph.sum(), x, retain_graph=True)
    (last,) = torch.autograd.grad(value, x)
    assert torch.equal(first, graph) and torch.equal(second, again) and torch.equal(first, last)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, x)


@both_forms
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_a_solver_changes_nothing(form: Form, reentrant: bool) -> None:
    fit = ig.implicit(form(lambda a: a.sin()))(_sinc_exact)
    x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
    checkpoint(lambda x: fit(x.exp()).cos().sum(), x, use_reentrant=reentrant).backward()
    _sinc_exact(twin.exp()).cos().sum().backward()
    assert close(x.grad, twin.grad)


@both_forms
@pytest.mark.parametrize("argument", ["x", "data", "closed over"])
def test_change_in_place_between_forward_and_backward_raises(form: Form, argument: str) -> None:
    x, data, hidden = (value.clone().requires_grad_() for value in (X, TARGET, X.sin()))
    y = ig.implicit_root(form(lambda a, t: t * hidden * hidden), x, (data * hidden * hidden / x), data)
    with torch.no_grad():
        {"x": x, "data": data, "closed over": hidden}[argument].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), [x, data, hidden])


@both_forms
def test_strided_expanded_empty_and_single_leaves_are_right(form: Form) -> None:
    exact = lambda x, t: x.sin() * t / x
    fit = ig.implicit(form(lambda a, t: a.sin() * t))(exact)
    block = torch.rand(4, 4) + 1
    strided = block.t()[:2, ::2]
    assert not strided.is_contiguous()
    for x, t in ((strided, block.t()[2:, ::2]), (torch.tensor([1.3]), torch.tensor([0.4])), (X[0], TARGET[0])):
        got, want = (torch.func.hessian(lambda x: f(x, t).sin().sum())(x) for f in (fit, exact))  # noqa: B023
        assert close(got, want)
        leaf = x.detach().requires_grad_()
        assert close(torch.autograd.grad(fit(leaf, t).sum(), leaf)[0], torch.func.grad(lambda x: exact(x, t).sum())(x))  # noqa: B023
    single = torch.tensor(1.3, requires_grad=True)
    got, want = (torch.autograd.grad(f(single.expand(3), torch.arange(3.0)).sum(), single)[0] for f in (fit, exact))
    assert close(got, want)
    nothing = torch.zeros(0, requires_grad=True)
    y = ig.implicit_root(form(lambda a, e: a.sin() + e.sum()), X, X.sin() / X, nothing)
    assert torch.autograd.grad(y.sum(), nothing)[0].shape == (0,)


def test_threads_do_not_disturb_each_other() -> None:
    fit = ig.implicit(fixed_point(lambda a: a.sin()))(_sinc_exact)

    def error(shift: int) -> float:
        torch.set_default_dtype(torch.float64)
        x = (X + 0.01 * shift).requires_grad_()
        (first,) = torch.autograd.grad(fit(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        first = first.detach()
        exact, at = torch.func.grad(lambda x: _sinc_exact(x).sum()), x.detach()
        return ((first - exact(at)).abs() + (second - torch.func.jacrev(exact)(at).sum(0)).abs()).max().item()

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(error, range(40))) < PROMISED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_arguments_is_kept(dtype: torch.dtype) -> None:
    x, *data = (value.clone().to(dtype).requires_grad_() for value in (REGRESSION.x, *REGRESSION.data))
    y = decorated(REGRESSION)(x, *data)
    (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert {y.dtype, first.dtype, second.dtype} == {dtype}
    exact = lambda x: REGRESSION.exact(x, *REGRESSION.data).sin().sum()
    # float32: a few hundred roundings of 6e-8 through an ill-placed sum
    tolerance = 1e-5 if dtype == torch.float32 else PROMISED
    assert close(first.double(), torch.func.grad(exact)(REGRESSION.x), tolerance)
    assert close(second.double(), torch.func.hessian(exact)(REGRESSION.x).sum(0), tolerance)


def test_value_is_that_of_the_solver_and_plain_without_gradients() -> None:
    for case in CONDITIONS:
        want = case.exact(case.x, *case.data)
        assert torch.equal(decorated(case)(case.x, *case.data), want)
        assert not decorated(case)(case.x, *case.data).requires_grad
        x = case.x.clone().requires_grad_()
        assert torch.equal(decorated(case)(x, *case.data), want)
        with torch.no_grad():
            assert not decorated(case)(x, *case.data).requires_grad
        with torch.inference_mode():
            assert torch.equal(decorated(case)(x, *case.data), want)


def test_unrolling_a_long_loop_agrees() -> None:
    def unrolled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        step = functools.partial(torch.addmv, bias)
        y = torch.zeros_like(bias)
        for _ in range(60):
            y = step(weight, y).sub(bias).add(x * bias).tanh()
        return y

    case = CONDITIONS[3]
    fit = ig.implicit(case.condition)(unrolled)
    got, want = (torch.func.hessian(lambda x: f(x, *case.data).sum())(case.x) for f in (fit, unrolled))  # noqa: B023
    assert close(got, want)


def test_a_condition_around_another_condition_that_closes_over_a_leaf() -> None:
    x = torch.tensor([1.3, 2.0])

    def solve(w: Tensor) -> Tensor:
        inner = ig.Stationary(lambda a, z: (z - w.sin() * a).square().sum())

        def loss(x: Tensor, y: Tensor) -> Tensor:
            z = ig.implicit_root(inner, y, w.sin() * y)
            return (y - x).square().sum() + z.square().sum()

        return ig.implicit_root(ig.Stationary(loss), x, x / (1 + w.sin() ** 2)).sum()

    assert disagreements(solve, lambda w: (x / (1 + w.sin() ** 2)).sum(), torch.tensor([0.5, 0.9])) == []


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_outlives_the_result(backward: bool) -> None:
    class Token:
        pass

    token = Token()
    alive = weakref.ref(token)
    x = torch.tensor([2.0, 3.0], requires_grad=True)

    def loss(x: Tensor, y: Tensor, token: Token = token) -> Tensor:
        return (y - x).square().sum()

    gc.disable()  # reference counts alone must do it, or graphs would pile up on a device
    try:
        y = ig.implicit_root(ig.Stationary(loss), x, x.detach())
        if backward:
            y.sum().backward()
        del y, loss, token
        assert alive() is None
    finally:
        gc.enable()


@ig.implicit(ig.Stationary(lambda x, y: (y - x).square().sum()))
def identity(x: Tensor) -> Tensor:
    return x.clone()


def test_a_decorated_function_pickles_by_name() -> None:
    assert pickle.loads(pickle.dumps(identity)) is identity
