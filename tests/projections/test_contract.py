"""What every projection promises, over the sets of `tests/projections/sets.py`."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import implicitgrad as ig
from implicitgrad import projections
from tests.projections.sets import SETS, SetCase, near

every_set = pytest.mark.parametrize("case", SETS, ids=str)
every_convex_set = pytest.mark.parametrize("case", [case for case in SETS if case.convex], ids=str)
ROUNDING = 1e-12  # for points of size one and products of some ten numbers

seeds, sizes = st.integers(0, 10**6), st.integers(1, 9)
scales = st.sampled_from([1e-3, 0.1, 1.0, 30.0])
few_examples = settings(max_examples=25, deadline=None)


def point(case: SetCase, n: int, seed: int, scale: float, tied: bool) -> tuple[Tensor, ...]:
    """A point of any size, on a grid if `tied`, and parameters."""
    y, *parameters = case.example(n, seed)
    y = scale * y
    return (y * 4).round() / 4 if tied else y, *parameters


@every_set
@pytest.mark.parametrize("n", [1, 2, 6])
def test_equals_cvxpy(case: SetCase, n: int) -> None:
    for seed in range(3 if case.convex else 1):
        y, *parameters = case.example(n, seed)
        # Clarabel ends at a relative gap of 1e-11; the squared distance to its point is that small
        assert near(case.project(y, *parameters), case.nearest(y, *parameters), 1e-6)


@every_set
@few_examples
@given(n=sizes, seed=seeds, scale=scales, tied=st.booleans())
def test_result_is_feasible_and_stays(case: SetCase, n: int, seed: int, scale: float, tied: bool) -> None:
    y, *parameters = point(case, n, seed, scale, tied)
    z = case.project(y, *parameters)
    size = ROUNDING * (1 + y.abs().amax() + condition(case, *parameters))
    assert case.violation(z, *parameters) <= size
    assert (case.project(z, *parameters) - z).abs().amax() <= size


@every_convex_set
@few_examples
@given(n=sizes, seed=seeds, scale=scales, tied=st.booleans())
def test_result_is_optimal_and_not_expansive(case: SetCase, n: int, seed: int, scale: float, tied: bool) -> None:
    y, *parameters = point(case, n, seed, scale, tied)
    other = point(case, n, seed + 1, scale, tied)[0]
    z, there = case.project(y, *parameters), case.project(other, *parameters)
    size = ROUNDING * (1 + y.abs().amax() + other.abs().amax() + condition(case, *parameters)) ** 2
    assert (y - z) @ (there - z) <= size  # the residual is normal to the set
    assert (z - there).norm() <= (y - other).norm() + size


def condition(case: SetCase, *parameters: Tensor) -> float:
    """How much larger than the rounding error of a product that of a solution may be; 1 but for drawn matrices.

    Square for polyhedra, whose active rows may be as badly conditioned as any n of them.
    """
    matrices = [p for p in parameters if p.dim() == 2 and len(p)]
    if not matrices:
        return 1.0
    worst = float(torch.linalg.cond(torch.cat(matrices)[: matrices[0].shape[1]]))
    assume(worst < 1e4)
    return worst**2


@pytest.mark.parametrize("case", [case for case in SETS if not case.convex], ids=str)
@few_examples
@given(n=st.integers(1, 6), seed=seeds)
def test_no_other_point_of_a_set_that_is_not_convex_is_nearer(case: SetCase, n: int, seed: int) -> None:
    y, *parameters = case.example(n, seed)
    others = [case.project(case.example(n, other)[0], *parameters) for other in range(seed + 1, seed + 20)]
    nearest = (y - case.project(y, *parameters)).norm()
    assert all(nearest <= (y - other).norm() + ROUNDING for other in others)


@every_set
def test_gradcheck_passes_in_the_point_and_all_parameters(case: SetCase) -> None:
    arguments = case.example(3, 1)  # no entry is near a kink
    infinite = [value.isinf() for value in arguments]  # constants: differences of infinity are none
    finite = [torch.where(mask, 7.0, value).requires_grad_() for mask, value in zip(infinite, arguments, strict=True)]
    project = lambda *values: case.project(
        *(torch.where(mask, torch.inf, value) for mask, value in zip(infinite, values, strict=True))
    )
    flags = {"check_batched_grad": True, "atol": 1e-7}
    assert torch.autograd.gradcheck(project, finite, check_forward_ad=True, check_batched_forward_grad=True, **flags)
    assert torch.autograd.gradgradcheck(project, finite, check_fwd_over_rev=True, check_rev_over_rev=True, **flags)


@every_set
def test_transforms_agree_with_each_other_and_with_a_loop(case: SetCase) -> None:
    examples = [case.example(5, seed) for seed in (1, 2, 3)]
    batch = [torch.stack(values) for values in zip(*examples, strict=True)]
    one = examples[0]
    numbers = tuple(range(len(one)))
    curve = lambda *values: (case.project(*values) * torch.arange(1.0, 6.0, dtype=torch.float64)).sin().sum()
    vmap, grad, jacrev, jacfwd = torch.func.vmap, torch.func.grad, torch.func.jacrev, torch.func.jacfwd

    def close(got: object, want: object) -> None:
        for a, b in zip(ig.tree.leaves(got), ig.tree.leaves(want), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)

    close(vmap(case.project)(*batch), torch.stack([case.project(*values) for values in examples]))
    shared = (0, *(None for _ in one[1:]))
    close(vmap(case.project, shared)(batch[0], *one[1:]), torch.stack([case.project(y, *one[1:]) for y in batch[0]]))
    loop = [torch.stack(parts) for parts in zip(*(grad(curve, numbers)(*values) for values in examples), strict=True)]
    close(vmap(grad(curve, numbers))(*batch), loop)
    close(grad(lambda *values: vmap(curve)(*values).sum(), numbers)(*batch), loop)
    close(vmap(jacfwd(case.project))(*batch), vmap(jacrev(case.project))(*batch))
    hessian = torch.func.hessian(curve, numbers)(*one)  # forward over reverse
    close(jacfwd(jacfwd(curve, numbers), numbers)(*one), hessian)
    close(jacrev(jacrev(curve, numbers), numbers)(*one), hessian)
    close(jacrev(jacfwd(curve, numbers), numbers)(*one), hessian)
    nested = vmap(lambda y: vmap(lambda *rest: case.project(y, *rest))(*batch[1:])) if len(one) > 1 else None
    if nested is not None:
        want = [torch.stack([case.project(y, *values[1:]) for values in examples]) for y in batch[0]]
        close(nested(batch[0]), torch.stack(want))


@every_convex_set
def test_derivative_in_every_parameter_equals_differences_of_solutions_by_clarabel(case: SetCase) -> None:
    arguments = case.example(5, 1)
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in arguments]
    directions = [torch.where(value.isinf(), 0.0, way) for value, way in zip(arguments, directions, strict=True)]
    _, slope = torch.func.jvp(lambda *values: case.project(*values), tuple(arguments), tuple(directions))
    moved = lambda t: case.nearest(*(value + t * way for value, way in zip(arguments, directions, strict=True)))
    h = 1e-3  # of fourth order: an error near h⁴, and 1e-7 of Clarabel over h
    difference = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    assert (slope - difference).abs().amax() <= 1e-4 * (1 + slope.abs().amax())


@every_set
def test_a_tree_is_one_point(case: SetCase) -> None:
    y, *parameters = case.example(6, 0)
    split = lambda flat: {"w": flat[:4].reshape(2, 2), "b": (flat[4:],)}
    parts = [split(p) if i in case.like_y else p for i, p in enumerate(parameters)]
    got, want = case.project(split(y), *parts), case.project(y, *parameters)
    assert torch.equal(got["w"], want[:4].reshape(2, 2)) and torch.equal(got["b"][0], want[4:])


@every_set
def test_float32_in_and_out_and_arguments_stay(case: SetCase) -> None:
    arguments = case.example(6, 0)
    single = tuple(value.float() for value in arguments)
    before = [value.clone() for value in single]
    got = case.project(*single)
    assert got.dtype == torch.float32
    assert near(got.double(), case.project(*arguments), 1e-5)  # conditions up to a hundred
    assert all(torch.equal(a, b) for a, b in zip(single, before, strict=True))


@every_set
def test_strided_points_and_leaves_with_graph_are_taken(case: SetCase) -> None:
    y, *parameters = case.example(6, 0)
    strided = torch.stack([y, y], 1)[:, 0].requires_grad_()
    got = case.project(strided, *parameters)
    assert torch.equal(got.detach(), case.project(y, *parameters))
    got.sum().backward()


@every_set
def test_bad_points_raise(case: SetCase) -> None:
    y, *parameters = case.example(4, 0)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="in y"):
            case.project(torch.cat([y[:3], y.new_tensor([bad])]), *parameters)
    with pytest.raises(TypeError, match="floating point"):
        case.project(torch.ones(4, dtype=torch.int64), *parameters)
    with pytest.raises(ValueError, match="empty"):
        case.project(y[:0], *(p[:0] if i in case.like_y else p for i, p in enumerate(parameters)))


@every_set
def test_nan_under_vmap_spoils_its_own_point_only_or_raises(case: SetCase) -> None:
    y, *parameters = case.example(4, 0)
    batch = torch.stack([y, torch.where(torch.arange(4) == 2, torch.nan, y)])
    project = torch.func.vmap(lambda point: case.project(point, *parameters))
    if "polyhedron" in case.name:  # its active set is found below the transform, where values can be read
        with pytest.raises(FloatingPointError):
            project(batch)
        return
    got = project(batch)
    assert torch.equal(got[0], case.project(y, *parameters)) and got[1].isnan().all()


# --- inside of an implicit solution -----------------------------------------------------------------------------------

TARGET = torch.tensor([0.9, -0.3, 0.4, 0.1], dtype=torch.float64)
MATRIX = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, -1.0, 0.5]], dtype=torch.float64)
INSIDE = {
    "simplex": lambda z, radius: projections.simplex(z, radius),
    "polyhedron": lambda z, radius: projections.polyhedron(z, G=MATRIX, h=torch.stack([radius, radius / 4])),
    "box_section": lambda z, radius: projections.box_section(z, 0.0, 0.7, 1.0, radius),
}


@pytest.mark.parametrize("name", INSIDE)
def test_solution_of_a_constrained_problem_is_differentiable_in_all_modes(name: str) -> None:
    """`min 1/2 Σ x_i (z_i - target_i)²` over the set, as the fixed point of projected gradient steps."""
    step = lambda x, y, radius: INSIDE[name](y - 0.5 * x * (y - TARGET), radius)

    def solve(x: Tensor, radius: Tensor) -> Tensor:
        y = torch.zeros_like(TARGET)
        for _ in range(60):  # contracts by 0.65 and better
            y = step(x, y, radius)
        return y

    x, radius = torch.tensor([1.0, 1.4, 0.7, 1.1], dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    fit = ig.implicit(ig.FixedPoint(step))(solve)
    want = torch.func.jacrev(solve, (0, 1))(x, radius)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert all(near(a, b, 1e-9) for a, b in zip(jacobian(fit, (0, 1))(x, radius), want, strict=True))
    batched = torch.func.vmap(torch.func.jacrev(fit), (0, None))(torch.stack([x, 1.1 * x]), radius)
    assert near(batched[0], want[0], 1e-9)
