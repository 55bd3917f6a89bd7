"""Proximal operators against CVXPY, their optimality condition, Moreau's identity and finite differences."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from implicitgrad import projections, prox


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A proximal operator `prox(y, *penalties, scaling)` and its function `value(z, *penalties)`.

    `shape` is that of one point; `penalties` has the shapes of its parameters for a point of six numbers.
    """

    name: str
    prox: Callable[..., Tensor]
    value: Callable[..., Tensor]
    penalties: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...] = (6,)
    positive: bool = False

    def __str__(self) -> str:
        return self.name

    def arguments(self, seed: int) -> list[Tensor]:
        sizes = [0.2 + draw(*shape, seed=seed + 10 + i).abs() for i, shape in enumerate(self.penalties)]
        return [2 * draw(*self.shape, seed=seed), *sizes, torch.tensor(0.7)]


def _nuclear(z: Tensor, penalty: Tensor) -> Tensor:
    return penalty * torch.linalg.svdvals(z).sum()


CASES = [
    Case("l1", prox.l1, lambda z, p: (p * z.abs()).sum(), ((6,),)),
    Case("non_negative_l1", prox.non_negative_l1, lambda z, p: (p * z).sum(), ((6,),), positive=True),
    Case("elastic_net", prox.elastic_net, lambda z, p, q: (p * z.abs() + q / 2 * z**2).sum(), ((6,), (6,))),
    Case("ridge", prox.ridge, lambda z, p: (p / 2 * z**2).sum(), ((6,),)),
    Case("non_negative_ridge", prox.non_negative_ridge, lambda z, p: (p / 2 * z**2).sum(), ((6,),), positive=True),
    Case("group_lasso", prox.group_lasso, lambda z, p: p * z.norm(), ((),)),
    Case("l_infinity", prox.l_infinity, lambda z, p: p * z.abs().max(), ((),)),
    Case("nuclear_norm", prox.nuclear_norm, _nuclear, ((),), shape=(4, 3)),
    Case("total_variation", prox.total_variation, lambda z, p: (p * z.diff().abs()).sum(), ((5,),)),
    Case("log_barrier", prox.log_barrier, lambda z, p: -(p * z.log()).sum(), ((6,),), positive=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
seeds = st.integers(0, 10**6)
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


# --- values -----------------------------------------------------------------------------------------------------------


def _cvxpy_value(name: str, cvxpy, z, p, q):
    weighted = lambda weights, terms: cvxpy.sum(cvxpy.multiply(weights, terms))
    return {
        "l1": lambda: weighted(p, cvxpy.abs(z)),
        "non_negative_l1": lambda: weighted(p, cvxpy.abs(z)),
        "elastic_net": lambda: weighted(p, cvxpy.abs(z)) + weighted(q, cvxpy.square(z)) / 2,
        "ridge": lambda: weighted(p, cvxpy.square(z)) / 2,
        "non_negative_ridge": lambda: weighted(p, cvxpy.square(z)) / 2,
        "group_lasso": lambda: p * cvxpy.norm2(z),
        "l_infinity": lambda: p * cvxpy.norm_inf(z),
        "nuclear_norm": lambda: p * cvxpy.normNuc(z),
        "total_variation": lambda: weighted(p, cvxpy.abs(cvxpy.diff(z))),
        "log_barrier": lambda: -weighted(p, cvxpy.log(z)),
    }[name]()


@every_case
def test_value_equals_cvxpy(case: Case) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    for seed in (0, 1):
        y, p, *q, scaling = case.arguments(seed)
        z = cvxpy.Variable(case.shape)
        value = _cvxpy_value(case.name, cvxpy, z, p.numpy(), q[0].numpy() if q else None)
        objective = cvxpy.sum_squares(z - y.numpy()) / 2 + scaling.item() * value
        problem = cvxpy.Problem(cvxpy.Minimize(objective), [z >= 0] if case.positive else [])
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        # the objective is 1-strongly convex: a gap of 1e-10 leaves the minimiser off by up to √2e-10
        assert (case.prox(y, p, *q, scaling) - torch.as_tensor(z.value)).abs().max() < 1.5e-5


@every_case
@few
@given(seed=seeds)
def test_optimality_condition_holds(case: Case, seed: int) -> None:
    """`s g(w) ≥ s g(z) + ⟨y - z, w - z⟩` for all w says that z is the proximal point of y."""
    y, *penalties, scaling = case.arguments(seed)
    z = case.prox(y, *penalties, scaling)
    assert not case.positive or bool((z >= 0).all())
    for i in range(8):
        w = z + 10.0 ** -(i % 4) * draw(*case.shape, seed=seed + 100 + i)
        w = w.abs() if case.positive else w
        gap = scaling * (case.value(w, *penalties) - case.value(z, *penalties)) - ((y - z) * (w - z)).sum()
        assert gap > -1e-13 * (1 + y.abs().sum())


@every_case
@few
@given(seed=seeds)
def test_map_is_firmly_nonexpansive(case: Case, seed: int) -> None:
    """`⟨P(a) - P(b), a - b⟩ ≥ ‖P(a) - P(b)‖²`."""
    a, *parameters = case.arguments(seed)
    b = a + 10.0 ** -(seed % 5) * draw(*case.shape, seed=seed + 1)
    change = case.prox(a, *parameters) - case.prox(b, *parameters)
    assert (change * (a - b)).sum() >= change.square().sum() - 1e-14


@few
@given(seed=seeds)
def test_moreau_identity_with_the_projection_onto_the_dual_ball(seed: int) -> None:
    y = 2 * draw(7, seed=seed)
    t = draw(1, seed=seed + 1).abs()[0]
    pairs = [
        (prox.l1, projections.linf_ball),
        (prox.l_infinity, projections.l1_ball),
        (prox.group_lasso, projections.l2_ball),
    ]
    for operator, ball in pairs:
        both = lambda y, t, operator=operator, ball=ball: operator(y, t) + ball(y, t)
        assert (both(y, t) - y).abs().max() < 1e-14
        in_y, in_t = torch.func.jacrev(both, (0, 1))(y, t)
        assert (in_y - torch.eye(7)).abs().max() < 1e-14 and in_t.abs().max() < 1e-14


def test_zero_is_the_identity_and_a_projection_ignores_the_scaling() -> None:
    y = {"a": draw(3, seed=0), "b": draw(2, 2, seed=1)}
    assert all(torch.equal(prox.zero(y)[key], y[key]) for key in y)
    onto = prox.prox_from_projection(lambda x, y, shift: projections.box(y, shift, x))
    x, shift = torch.tensor(0.5), torch.tensor(-0.5)
    for scaling in (0.1, 10.0):
        assert torch.equal(onto(x, y["a"], scaling, shift), y["a"].clamp(-0.5, 0.5))
    with pytest.raises(TypeError, match=r"function \(x, y, \*data\)"):
        prox.prox_from_projection(3)


# --- derivatives ------------------------------------------------------------------------------------------------------


@every_case
def test_derivatives_in_point_penalty_and_scaling_in_all_modes(case: Case) -> None:
    arguments = [value.requires_grad_() for value in case.arguments(3)]
    assert torch.autograd.gradcheck(
        case.prox, arguments, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(case.prox, arguments, check_fwd_over_rev=True, check_rev_over_rev=True)
    plain, numbers = [value.detach() for value in arguments], tuple(range(len(arguments)))
    scalar = lambda *a: case.prox(*a).sin().sum()
    reverse, forward = torch.func.jacrev, torch.func.jacfwd
    hessian = torch.func.hessian(scalar, numbers)(*plain)
    for transform in (reverse(reverse(scalar, numbers), numbers), reverse(forward(scalar, numbers), numbers)):
        for got, want in zip(_entries(transform(*plain)), _entries(hessian), strict=True):
            assert (got - want).abs().max() < 1e-12
    third = torch.func.grad(lambda *a: torch.func.hessian(scalar)(*a).sin().sum())(*plain)
    step = 1e-5 * draw(*case.shape, seed=5)
    curvature = lambda y: torch.func.hessian(scalar)(y, *plain[1:]).sin().sum()
    difference = (curvature(plain[0] + step) - curvature(plain[0] - step)) / 2
    assert abs((third * step).sum() - difference) < 1e-12  # the error of a difference is its step squared


def _entries(block: tuple) -> list[Tensor]:
    return [entry for row in block for entry in row]


@every_case
def test_vmap_over_points_and_parameters_equals_a_loop(case: Case) -> None:
    rows = [case.arguments(seed) for seed in (1, 2, 3)]
    stacked = [torch.stack(values) for values in zip(*rows, strict=True)]
    scalar = lambda *a: case.prox(*a).sin().sum()
    derivative = torch.func.grad(scalar, tuple(range(len(stacked))))
    got = torch.func.vmap(case.prox)(*stacked)
    assert (got - torch.stack([case.prox(*row) for row in rows])).abs().max() < 1e-14
    slopes = zip(
        torch.func.vmap(derivative)(*stacked), zip(*(derivative(*row) for row in rows), strict=True), strict=True
    )
    assert all((a - torch.stack(b)).abs().max() < 1e-14 for a, b in slopes)
    shared = (0, *[None] * (len(stacked) - 1))
    got = torch.func.vmap(torch.func.hessian(scalar), shared)(stacked[0], *rows[0][1:])
    want = torch.stack([torch.func.hessian(scalar)(row[0], *rows[0][1:]) for row in rows])
    assert (got - want).abs().max() < 1e-13


SPARSE = [case for case in CASES if case.name in ("l1", "non_negative_l1", "elastic_net", "non_negative_ridge")]


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_rows_of_the_derivative_are_zero_exactly_where_the_point_is_held(case: Case) -> None:
    y, *parameters = case.arguments(0)
    held = case.prox(y, *parameters) == 0
    assert 0 < held.sum() < 6
    rows = torch.func.jacrev(case.prox)(y, *parameters)
    assert torch.equal(rows.any(1), ~held)
    assert torch.equal(rows, torch.diag(rows.diag()))


@pytest.mark.parametrize("case", [case for case in CASES if not case.positive], ids=str)
def test_penalty_zero_is_the_identity_with_its_derivative(case: Case) -> None:
    y, *penalties, scaling = case.arguments(0)
    none = [torch.zeros_like(penalty) for penalty in penalties]
    for point in (y, torch.zeros_like(y), torch.ones_like(y)):
        assert (case.prox(point, *none, scaling) - point).abs().max() < 1e-15
        rows = torch.func.jacrev(case.prox)(point, *none, scaling).reshape(point.numel(), -1)
        assert (rows - torch.eye(point.numel())).abs().max() < 1e-15


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "log_barrier"], ids=str)
def test_point_zero_stays_with_finite_derivatives(case: Case) -> None:
    y, *parameters = case.arguments(0)
    scalar = lambda *a: case.prox(*a).sin().sum()
    assert not case.prox(torch.zeros_like(y), *parameters).any()
    assert all(slope.isfinite().all() for slope in torch.func.jacrev(case.prox, (0, 1))(0 * y, *parameters))
    assert torch.func.hessian(scalar)(0 * y, *parameters).isfinite().all()


# --- trees, types, errors ---------------------------------------------------------------------------------------------


def test_trees_go_leaf_by_leaf_with_penalties_for_all_or_for_each() -> None:
    y = {"a": draw(4, seed=0), "b": (draw(4, seed=1), draw(4, seed=2))}
    each = {"b": (torch.tensor(0.2), 0.3), "a": torch.tensor(0.1)}
    for operator in (prox.l1, prox.ridge, prox.group_lasso, prox.total_variation, prox.log_barrier):
        got = operator(y, each, 0.5)
        assert torch.equal(got["a"], operator(y["a"], 0.1, 0.5))
        assert torch.equal(got["b"][1], operator(y["b"][1], 0.3, 0.5))
        got = operator(y, 0.2, scaling={"a": 1.0, "b": (2.0, 3.0)})
        assert torch.equal(got["b"][0], operator(y["b"][0], 0.2, 2.0))
    assert list(prox.l_infinity(y, 0.2)) == ["a", "b"]
    flat = torch.cat([y["a"], *y["b"]])
    assert torch.equal(torch.cat([prox.l_infinity(y, 0.2)["b"][0]]), prox.l_infinity(flat, 0.2)[4:8])


@every_case
def test_dtype_is_kept_and_arguments_are_not_changed(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        arguments = [value.to(dtype) for value in case.arguments(0)]
        before = [value.clone() for value in arguments]
        z = case.prox(*arguments)
        assert z.dtype == dtype and z.shape == case.shape
        assert (z.double() - case.prox(*case.arguments(0))).abs().max() < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
        assert case.prox(arguments[0], *[0.5] * len(case.penalties)).dtype == dtype


@every_case
def test_single_number_and_strided_points_are_right(case: Case) -> None:
    one = torch.tensor([[1.5]]) if len(case.shape) == 2 else torch.tensor([1.5])
    z = case.prox(one, *[1.0] * len(case.penalties))
    size = case.value(z, *[torch.tensor(1.0)] * len(case.penalties))
    for other in (z - 1e-3, z + 1e-3):
        value = case.value(other, *[torch.tensor(1.0)] * len(case.penalties))
        assert size + (z - one).square().sum() / 2 <= value + (other - one).square().sum() / 2
    y, *parameters = case.arguments(0)
    strided = torch.stack([y, y], -1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(case.prox(strided, *parameters), case.prox(y, *parameters))


@every_case
def test_wrong_arguments_raise_and_become_nan_under_transforms(case: Case) -> None:
    y, *parameters = case.arguments(0)
    wrong = torch.tensor(-1.0)
    for at in range(1, len(parameters) + 1):
        arguments = [y, *parameters]
        arguments[at] = wrong
        with pytest.raises(ValueError, match=f"{case.name} needs .* got -1"):
            case.prox(*arguments)
        assert torch.func.vmap(case.prox)(*(value.unsqueeze(0) for value in arguments)).isnan().any()
    with pytest.raises(FloatingPointError, match="NaN or infinity in y"):
        case.prox(y * torch.nan, *parameters)
    assert torch.func.vmap(lambda y: case.prox(y, *parameters))((y * torch.nan).unsqueeze(0)).isnan().all()
    with pytest.raises(TypeError):
        case.prox(torch.ones(case.shape, dtype=torch.long), *parameters)
    with pytest.raises(TypeError):
        case.prox(y, "large", *parameters[1:])
    with pytest.raises(ValueError):
        case.prox(y, torch.ones(17), *parameters[1:])
    with pytest.raises(ValueError, match="empty"):
        case.prox(y[:0], *[1.0] * len(parameters))


def test_shapes_that_are_no_point_raise() -> None:
    with pytest.raises(ValueError, match="matrices, got shape"):
        prox.nuclear_norm(draw(3, seed=0))
    with pytest.raises(ValueError, match="vectors, got shape"):
        prox.total_variation(draw(3, 3, seed=0))
    with pytest.raises(ValueError, match="log_barrier needs penalty > 0, got 0"):
        prox.log_barrier(draw(3, seed=0), 0.0)
