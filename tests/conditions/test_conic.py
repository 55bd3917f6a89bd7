"""Conic programs: the residual vanishes at solutions of other solvers, derivatives equal closed forms."""

import math
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import scipy.sparse
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad import projections
from implicitgrad.conditions import QP, ConicProgram

Data = dict[str, Tensor]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(before)


CONES = {
    "linear": ConicProgram(zero=2, nonnegative=6),
    "second-order": ConicProgram(zero=1, second_order=(3, 3, 4)),
    "semidefinite": ConicProgram(psd=(3, 2, 2)),
    "exponential": ConicProgram(exponential=4),
    "all": ConicProgram(zero=1, nonnegative=3, second_order=(3,), psd=(3,), exponential=2),
}
every_cone = pytest.mark.parametrize("program", CONES.values(), ids=CONES.keys())


def project(program: ConicProgram, v: Tensor) -> Tensor:
    """Onto the product of cones, one after the other."""
    kinds = [(projections.zero_cone, program.zero), (lambda v: v.clamp(min=0), program.nonnegative)]
    kinds += [(projections.second_order_cone, length) for length in program.second_order]
    kinds += [(projections.packed_psd_cone, size * (size + 1) // 2) for size in program.psd]
    kinds += [(projections.exponential_cone, 3)] * program.exponential
    parts = v.split([length for _, length in kinds])
    return torch.cat([onto(part) if len(part) else part for (onto, _), part in zip(kinds, parts, strict=True)])


def random_program(program: ConicProgram, num_variables: int = 5, seed: int = 0) -> tuple[Data, Data]:
    """A program with a known solution: for any v, `Π(v)` and `Π(v) - v` are complementary points of K and its dual."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    z, v, A = normal(num_variables), 2 * normal(program.num_rows), normal(program.num_rows, num_variables)
    s = project(program, v)
    root = normal(num_variables, num_variables)
    P = root @ root.mT / num_variables + 0.1 * torch.eye(num_variables)
    return {"P": P, "c": -P @ z - A.mT @ (s - v), "A": A, "b": A @ z + s}, {"primal": z, "dual": s - v}


def flat(y: Data) -> Tensor:
    return torch.cat([y["primal"], y["dual"]])


def jacobian(program: ConicProgram, x: Data, y: Data) -> Tensor:
    n = len(y["primal"])
    point = lambda v: flat(program.residual(x, {"primal": v[:n], "dual": v[n:]}))
    return torch.func.jacrev(point)(flat(y))


@every_cone
def test_residual_vanishes_at_solutions_and_nowhere_near(program: ConicProgram) -> None:
    x, y = random_program(program)
    assert flat(program.residual(x, y)).norm() < 1e-13
    for moved in ("primal", "dual"):
        for seed in range(3):
            step = torch.randn(y[moved].shape, generator=torch.Generator().manual_seed(seed))
            near = {**y, moved: y[moved] + 1e-3 * step / step.norm()}
            assert flat(program.residual(x, near)).norm() > 1e-6


def to_clarabel(clarabel: ModuleType, program: ConicProgram) -> list:
    cones = [clarabel.ZeroConeT(program.zero), clarabel.NonnegativeConeT(program.nonnegative)]
    cones += [clarabel.SecondOrderConeT(length) for length in program.second_order]
    return cones + [clarabel.ExponentialConeT() for _ in range(program.exponential)]


@pytest.mark.parametrize("name", ["linear", "second-order", "exponential"])
def test_residual_vanishes_at_the_solution_of_clarabel(name: str) -> None:
    clarabel = pytest.importorskip("clarabel")
    program = CONES[name]
    x, y = random_program(program, seed=1)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    P, A = (scipy.sparse.csc_matrix(x[key].numpy()) for key in ("P", "A"))
    P = scipy.sparse.triu(P).tocsc()
    solver = clarabel.DefaultSolver(P, x["c"].numpy(), A, x["b"].numpy(), to_clarabel(clarabel, program), settings)
    found = solver.solve()
    got = {"primal": torch.tensor(found.x), "dual": torch.tensor(found.z)}
    # a gap of 1e-12 leaves duals of cones the square root of it
    assert flat(program.residual(x, got)).norm() < 1e-6
    assert (got["primal"] - y["primal"]).norm() < 1e-6


@every_cone
def test_derivatives_equal_differences_of_solutions(program: ConicProgram) -> None:
    """Neighbouring solutions come from the chord method, with a Jacobian by finite differences."""
    x, y = random_program(program, num_variables=12, seed=2)
    assert program.check(x, y).regularity > 1e-4 and program.check(x, y).margin > 1e-2
    n, units = len(y["primal"]), 1e-6 * torch.eye(len(flat(y)))
    value = lambda v, x=x: flat(program.residual(x, {"primal": v[:n], "dual": v[n:]}))
    slopes = torch.stack([(value(flat(y) + unit) - value(flat(y) - unit)) / 2e-6 for unit in units], -1)

    def solve(x: Data) -> Tensor:
        v = flat(y)
        for _ in range(8):
            v = v - torch.linalg.solve(slopes, value(v, x))
        assert value(v, x).norm() < 1e-12
        return v

    weights = torch.linspace(-1, 1, len(units))
    for name, tensor in x.items():
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
        moved = [solve({**x, name: tensor + step * direction}) for step in (-2e-4, -1e-4, 1e-4, 2e-4)]
        want = (8 * (moved[2] - moved[1]) - (moved[3] - moved[0])) / 12e-4
        fit = lambda t, name=name: flat(ig.implicit_root(program, {**x, name: t}, y))
        got = torch.func.jvp(fit, (tensor,), (direction,))[1]
        # differences are good to some 1e-12 / 1e-4, and to the fourth power of the step
        assert (got - want).norm() < 1e-7 * want.norm()
        gradient = torch.func.grad(lambda t, fit=fit: fit(t) @ weights)(tensor)
        assert (gradient * direction).sum() == pytest.approx((got @ weights).item(), rel=1e-9)


# the program, its data but for c, the last entries of c, and the exact solution as a function of the first
Family = tuple[ConicProgram, Data, Tensor, Callable[[Tensor], Data]]


def softmax_program(c: Tensor) -> Family:
    """`min cᵀx + 1ᵀt` subject to `(-t, x, 1)` in exponential cones and `1ᵀx = 1`: the minimiser is softmax(-c)."""
    n = len(c)
    A = torch.zeros(1 + 3 * n, 2 * n)
    A[0, :n] = 1
    for i in range(n):
        A[1 + 3 * i, n + i], A[2 + 3 * i, i] = 1, -1
    b = torch.cat([torch.ones(1), torch.tensor([0.0, 0.0, 1.0]).repeat(n)])

    def exact(c: Tensor) -> Data:
        x = torch.softmax(-c, 0)
        dual = torch.stack([-torch.ones_like(x), -1 - x.log(), x], -1).reshape(-1)
        return {"primal": torch.cat([x, x * x.log()]), "dual": torch.cat([torch.logsumexp(-c, 0).reshape(1) - 1, dual])}

    return ConicProgram(zero=1, exponential=n), {"A": A, "b": b}, torch.ones(n), exact


def ball_program(c: Tensor) -> Family:
    """`min cᵀx` subject to `‖x‖ <= 1`."""
    A = torch.cat([torch.zeros(1, len(c)), -torch.eye(len(c))])
    b = torch.cat([torch.ones(1), torch.zeros(len(c))])
    exact = lambda c: {"primal": -c / c.norm(), "dual": torch.cat([c.norm().reshape(1), c])}
    return ConicProgram(second_order=(len(c) + 1,)), {"A": A, "b": b}, torch.ones(0), exact


def eigenvector_program(c: Tensor) -> Family:
    """`min <C, X>` subject to `tr X = 1`, `X ⪰ 0` for a 2 × 2 matrix C: the projector onto its lowest eigenvector."""
    trace = torch.tensor([1.0, 0.0, 1.0])
    A, b = torch.cat([trace[None], -torch.eye(3)]), torch.cat([torch.ones(1), torch.zeros(3)])

    def exact(c: Tensor) -> Data:
        # C = [[a, g], [g, d]] as (a, √2 g, d); its traceless part has the eigenvalues ± r
        half = (c[0] - c[2]) / 2
        r = (half.square() + c[1].square() / 2).sqrt()
        lowest = (c[0] + c[2]) / 2 - r
        away = torch.stack([half, c[1], -half]) / r
        return {"primal": (trace - away) / 2, "dual": torch.cat([-lowest.reshape(1), c - lowest * trace])}

    return ConicProgram(zero=1, psd=(2,)), {"A": A, "b": b}, torch.ones(0), exact


@pytest.mark.parametrize("make", [softmax_program, ball_program, eigenvector_program])
def test_derivatives_of_both_orders_in_all_modes_equal_closed_form(make: Callable) -> None:
    c = torch.tensor([0.3, -0.7, 1.1])
    program, data, rest, exact = make(c)
    fit = ig.implicit(program)(lambda x, data: exact(x["c"][: len(c)]))
    got, want = (lambda c: flat(fit({"c": torch.cat([c, rest])}, data))), lambda c: flat(exact(c))
    assert flat(program.residual({"c": torch.cat([c, rest])}, exact(c), data)).norm() < 1e-14
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(transform(got)(c), transform(want)(c), rtol=0, atol=1e-11)
    mixed = [lambda f: torch.func.jacrev(torch.func.jacrev(f)), lambda f: torch.func.jacfwd(torch.func.jacrev(f))]
    for twice in mixed:
        assert torch.allclose(twice(got)(c), twice(want)(c), rtol=0, atol=1e-10)
    batch = torch.stack([c, c + 0.2, 2 * c])
    every = lambda f: torch.func.vmap(torch.func.jacrev(f))(batch)
    assert torch.allclose(every(got), every(want), rtol=0, atol=1e-11)


def test_sparse_matrices_give_what_dense_ones_give() -> None:
    program = CONES["all"]
    x, y = random_program(program)
    x["A"] = x["A"] * (x["A"].abs() > 0.5)
    index = {f"{name}_index": x[name].nonzero().mT for name in ("A", "P")}
    sparse = {**x, **{name: x[name][tuple(index[f"{name}_index"])] for name in ("A", "P")}}
    assert torch.allclose(flat(program.residual(sparse, y, index)), flat(program.residual(x, y)), rtol=0, atol=1e-13)
    assert torch.allclose(jacobian(program, {**sparse, **index}, y), jacobian(program, x, y), rtol=0, atol=1e-13)


def test_linear_cones_give_the_symmetric_systems_and_derivatives_of_qp() -> None:
    program = CONES["linear"]
    x, y = random_program(program)
    qp = {"Q": x["P"], "c": x["c"], "A": x["A"][:2], "b": x["b"][:2], "G": x["A"][2:], "h": x["b"][2:]}
    same = {"primal": y["primal"], "equality": y["dual"][:2], "inequality": y["dual"][2:]}
    grads, supports = [], []
    for condition, problem, solution in ((program, x, y), (QP(), qp, same)):
        problem["c"] = problem["c"].clone().requires_grad_()
        with ig.diagnostics() as log:
            z = ig.implicit_root(condition, problem, solution, solver=ig.linalg.LDL())["primal"]
            grads.append(torch.autograd.grad(z.sin().sum(), problem["c"])[0])
        supports.append(log[-1].support)
    assert program.symmetric_on_support and supports[0] == supports[1] < 5 + 8
    assert torch.allclose(*grads, rtol=0, atol=1e-13)


def test_cones_without_active_constraint_are_left_out() -> None:
    """In the interior of every cone only the objective counts."""
    program = ConicProgram(nonnegative=2, second_order=(3, 3), exponential=1)
    s = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 3.0, -1.0, 1.0, 0.1, 1.0, 5.0])
    A = torch.linspace(-1, 1, 22).reshape(11, 2)
    c = torch.tensor([0.5, -1.0], requires_grad=True)
    x = {"P": torch.tensor([[2.0, 0.3], [0.3, 1.0]]), "c": c, "A": A}
    z = -torch.linalg.solve(x["P"], c.detach())
    x["b"] = A @ z + s
    with ig.diagnostics() as log:
        found = ig.implicit_root(program, x, {"primal": z, "dual": torch.zeros(11)})
        (gradient,) = torch.autograd.grad(found["primal"].sum() + found["dual"].sum(), c)
    assert log[-1].support == 2
    assert torch.allclose(gradient, -torch.linalg.inv(x["P"]).sum(0))


def test_check_tells_regular_from_degenerate() -> None:
    program = ConicProgram(nonnegative=1)
    x = {"P": torch.eye(1), "c": -torch.ones(1), "A": torch.ones(1, 1), "b": torch.ones(1)}
    weak = program.check(x, {"primal": torch.ones(1), "dual": torch.zeros(1)})
    assert weak.margin == 0.0 and "strict complementarity fails" in weak.notes()[-1]
    x["c"] = -3 * torch.ones(1)
    strict = program.check(x, {"primal": torch.ones(1), "dual": 2 * torch.ones(1)})
    assert strict.margin == 2.0 and strict.residual == 0.0 and len(strict.notes()) == 1
    # [1, 1; 1, 0] has the eigenvalues (1 ± √5) / 2
    assert strict.regularity == pytest.approx((math.sqrt(5) - 1) / (math.sqrt(5) + 1))
    twice = {**x, "A": torch.ones(2, 1), "b": torch.ones(2)}
    redundant = ConicProgram(nonnegative=2)
    y = {"primal": torch.ones(1), "dual": torch.ones(2)}
    assert redundant.check(twice, y).num_undetermined == 1
    assert any("not unique: 1 directions" in note for note in redundant.notes(twice, y))


@pytest.mark.parametrize("name", ["linear", "second-order", "semidefinite"])
def test_no_kink_is_nearer_than_the_margin(name: str) -> None:
    """Within the margin the projection's Jacobian has the same numbers of eigenvalues 0 and 1."""
    program = CONES[name]
    x, y = random_program(program, seed=4)
    margin, v = program.check(x, y).margin, x["b"] - x["A"] @ y["primal"] - y["dual"]
    counts = set()
    for seed in range(20):
        step = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed))
        D = torch.func.jacrev(lambda v: project(program, v))(v + 0.99 * margin * step / step.norm())
        values = torch.linalg.eigvalsh((D + D.mT) / 2)
        counts.add((int((values < 1e-9).sum()), int((values > 1 - 1e-9).sum())))
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, y: (torch.ones(2), y), TypeError, "dicts of P, c"),
        (lambda x, y: ({**x, "G": x["A"]}, y), ValueError, "'G'"),
        (lambda x, y: ({**x, "b": 1.0}, y), TypeError, "b as a tensor"),
        (lambda x, y: ({"c": x["c"], "A": x["A"]}, y), ValueError, "b is missing"),
        (lambda x, y: ({**x, "A": x["A"].mT}, y), ValueError, r"A has shape \(5, 8\)"),
        (lambda x, y: ({**x, "c": x["c"][None]}, y), ValueError, "vmap"),
        (lambda x, y: (x, {"primal": y["primal"]}), ValueError, "dual"),
        (lambda x, y: (x, {**y, "dual": y["dual"][1:]}), ValueError, "7 entries.*8 rows"),
    ],
)
def test_wrong_parts_are_named(change: Callable, error: type[Exception], words: str) -> None:
    program = CONES["linear"]
    with pytest.raises(error, match=words):
        program.residual(*change(*random_program(program)))
    x, y = random_program(program)
    with pytest.raises(ValueError, match="twice"):
        program.residual(x, y, {"b": x["b"]})


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"zero": -1}, ValueError), ({"zero": 1.0}, TypeError), ({"psd": (0,)}, ValueError), ({"psd": [2]}, TypeError)],
)
def test_wrong_cones_are_refused(fields: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(fields))):
        ConicProgram(**fields)
