"""What is special to LSMR and CGLS; the pseudo-inverse and SciPy's iterates as independent roads."""

from itertools import pairwise

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicitgrad.linalg import CGLS, LSMR, LinearOperator, least_squares

SHAPES = [(60, 20), (20, 60), (30, 30)]
SOLVERS = [LSMR, CGLS]

every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide", "square"])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_of(shape: tuple[int, int], singular_values: Tensor) -> Tensor:
    left, right = (torch.linalg.qr(rows(side, min(shape), seed=side))[0] for side in shape)
    return left @ torch.diag(singular_values.double()) @ right.mT


def conditioned(shape: tuple[int, int], condition: float = 10.0, rank: int | None = None) -> Tensor:
    """Singular values from 1 down to 1 / condition, the last of them replaced by zeros beyond `rank`."""
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), min(shape))
    values[rank:] *= 0 if rank is not None else 1
    return matrix_of(shape, values)


def shortest(matrix: Tensor, b: Tensor, damping: float = 0.0, x0: Tensor | None = None) -> Tensor:
    """The minimiser nearest to x0, by the pseudo-inverse of the rows of A above those of √damping · I."""
    n = matrix.shape[-1]
    stacked = torch.cat([matrix, damping**0.5 * torch.eye(n, dtype=matrix.dtype)])
    target = torch.cat([b, b.new_zeros(n)])
    start = b.new_zeros(n) if x0 is None else x0
    return start + torch.linalg.pinv(stacked, rtol=1e-12) @ (target - stacked @ start)


def normal_residual(matrix: Tensor, b: Tensor, x: Tensor, damping: float = 0.0) -> Tensor:
    return (matrix.mT @ (b - matrix @ x) - damping * x).norm()


@every_solver
@every_shape
@pytest.mark.parametrize("rank", [None, 7], ids=["full rank", "rank 7"])
@pytest.mark.parametrize("damping", [0.0, 0.05])
@pytest.mark.parametrize("consistent", [True, False])
def test_equals_the_pseudo_inverse(solver, shape, rank, damping, consistent):
    matrix = conditioned(shape, rank=rank)
    b = matrix @ rows(shape[1]) if consistent else rows(shape[0], seed=1)
    solution = solver(damping=damping).solve(LinearOperator.from_dense(matrix), b)
    assert solution.converged, solution.reason
    reachable = damping == 0 and (consistent or rank is None and shape[0] <= shape[1])
    assert solution.reason == ("consistent" if reachable else "least squares")
    # normal residual 1e-10 |r|, magnified by at most (|A| / smallest singular value)² = 100
    x = shortest(matrix, b, damping)
    torch.testing.assert_close(solution.value, x, rtol=0, atol=1e-8 * x.norm().item())


@every_solver
@every_shape
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_residuals_are_the_true_ones(solver, shape, damping):
    matrix, b = conditioned(shape), 1e3 * rows(3, shape[0])
    solution = solver(damping=damping, rtol=1e-3).solve(LinearOperator.from_dense(matrix), b)
    assert solution.value.shape == (3, shape[1])
    for i in range(3):
        x = solution.value[i]
        residual = (b[i] - matrix @ x).norm()
        torch.testing.assert_close(solution.residual_norm[i], residual, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(solution.relative_residual[i], residual / b[i].norm(), rtol=1e-9, atol=1e-15)
        slope = normal_residual(matrix, b[i], x, damping)
        torch.testing.assert_close(solution.normal_residual[i], slope, rtol=1e-9, atol=1e-10)


@every_solver
@every_shape
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_any_start_leads_to_the_minimiser_nearest_to_it(solver, shape, damping):
    """The damping acts on x, not on x - x0: SciPy's lsmr and lsqr differ there."""
    matrix, b, x0 = conditioned(shape), rows(shape[0]), rows(shape[1], seed=5)
    solution = solver(damping=damping).solve(LinearOperator.from_dense(matrix), b, x0)
    assert solution.converged, solution.reason
    torch.testing.assert_close(solution.value, shortest(matrix, b, damping, x0), rtol=0, atol=1e-8)


@every_solver
@every_shape
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_start_at_the_minimiser_needs_no_iterations(solver, shape, damping):
    matrix, b = conditioned(shape), rows(2, shape[0])
    x0 = torch.stack([shortest(matrix, row, damping) for row in b])
    solution = solver(damping=damping).solve(LinearOperator.from_dense(matrix), b, x0)
    assert (solution.converged, solution.num_iter) == (True, 0)


@every_solver
@every_shape
def test_several_right_hand_sides_of_any_size_equal_one_by_one(solver, shape):
    A = LinearOperator.from_dense(conditioned(shape))
    b = rows(4, shape[0]) * torch.tensor([1.0, 1e-9, 0.0, 1e9], dtype=torch.float64).unsqueeze(-1)
    together = solver().solve(A, b)
    assert together.converged, together.reason
    assert torch.equal(together.value[2], torch.zeros(shape[1], dtype=torch.float64))
    for row, x in zip(b, together.value, strict=True):
        alone = solver().solve(A, row).value
        torch.testing.assert_close(x, alone, rtol=0, atol=1e-8 * alone.norm().item())


@every_solver
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_stacked_rectangular_systems_take_several_right_hand_sides(solver, damping):
    matrices = torch.stack([conditioned((60, 20)), rows(60, 20), conditioned((60, 20), rank=5)])
    b, x0 = rows(2, 3, 60), rows(2, 3, 20)
    solution = solver(damping=damping).solve(LinearOperator.from_dense(matrices), b, x0)
    assert solution.converged, solution.reason
    assert solution.residual_norm.shape == solution.normal_residual.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            x = shortest(matrices[j], b[i, j], damping, x0[i, j])
            torch.testing.assert_close(solution.value[i, j], x, rtol=0, atol=1e-8)


@every_shape
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_lsmr_iterates_equal_those_of_scipy(shape, k, damping):
    matrix, b = conditioned(shape), rows(shape[0])
    ours = LSMR(max_iter=k, damping=damping).solve(LinearOperator.from_dense(matrix), b)
    theirs = scipy.sparse.linalg.lsmr(matrix.numpy(), b.numpy(), damp=damping**0.5, atol=0, btol=0, conlim=0, maxiter=k)
    x = torch.from_numpy(theirs[0])
    assert (ours.num_iter, ours.num_matvec) == (k, 2 * k + 3)
    torch.testing.assert_close(ours.value, x, rtol=0, atol=1e-12 * x.norm().item())


@every_shape
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_cgls_iterates_equal_those_of_scipys_lsqr(shape, k, damping):
    matrix, b = conditioned(shape), rows(shape[0])
    ours = CGLS(max_iter=k, damping=damping).solve(LinearOperator.from_dense(matrix), b)
    theirs = scipy.sparse.linalg.lsqr(
        matrix.numpy(), b.numpy(), damp=damping**0.5, atol=0, btol=0, conlim=0, iter_lim=k
    )
    x = torch.from_numpy(theirs[0])
    assert ours.num_iter == k
    torch.testing.assert_close(ours.value, x, rtol=0, atol=1e-12 * x.norm().item())


@every_shape
@pytest.mark.parametrize("consistent", [True, False])
def test_lsmr_needs_about_as_many_iterations_as_scipy(shape, consistent):
    matrix = conditioned(shape, condition=1e3)
    b = matrix @ rows(shape[1]) if consistent else rows(shape[0], seed=1)
    theirs = scipy.sparse.linalg.lsmr(matrix.numpy(), b.numpy(), atol=1e-8, btol=1e-8, conlim=0, maxiter=5000)
    solution = LSMR(rtol=1e-8).solve(LinearOperator.from_dense(matrix), b)
    assert solution.converged, solution.reason
    # SciPy takes the Frobenius norm for |A| and adds btol to the tolerance, so it stops a little earlier
    assert solution.num_iter <= 1.15 * theirs[2]


@every_shape
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_normal_residual_of_lsmr_and_both_objectives_never_grow(shape, damping):
    A, b = LinearOperator.from_dense(conditioned(shape, condition=100.0)), rows(shape[0])
    for solver in SOLVERS:
        runs = [solver(max_iter=k, damping=damping).solve(A, b) for k in range(1, 16)]
        objectives = [run.residual_norm.square() + damping * run.value.square().sum() for run in runs]
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(objectives))
        if solver is LSMR:
            slopes = [run.normal_residual for run in runs]
            assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(slopes))


@every_shape
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_running_estimates_of_lsmr_are_the_true_norms(shape, damping, monkeypatch: pytest.MonkeyPatch):
    """Of the residual by smoothing, of the normal residual by the recurrence, and |A| from below."""
    seen, matrix, b = [], conditioned(shape), rows(shape[0])
    original = least_squares._Problem.scaled

    def spied(self, unit: Tensor, margin: float) -> least_squares.System:
        def solved(size: Tensor, slope: Tensor, norm: Tensor) -> Tensor:
            seen.append((size, slope * unit, norm * unit))
            return size < 0

        return original(self, unit, margin)._replace(solved=solved)

    monkeypatch.setattr(least_squares._Problem, "scaled", spied)
    A = LinearOperator.from_dense(matrix)
    LSMR(max_iter=12, damping=damping).solve(A, b)
    monkeypatch.undo()
    for k, (size, slope, norm) in enumerate(seen, start=1):
        truth = LSMR(max_iter=k, damping=damping).solve(A, b)
        objective = (truth.residual_norm.square() + damping * truth.value.square().sum()).sqrt()
        torch.testing.assert_close(size * b.norm(), objective, rtol=1e-9, atol=0)
        torch.testing.assert_close(slope * b.norm(), truth.normal_residual, rtol=1e-6, atol=0)
        assert norm <= (1 + damping) ** 0.5 * (1 + 1e-12)
    assert len(seen) == 12
    assert norm > 0.5


@every_solver
@every_shape
def test_never_forms_the_normal_matrix(solver, shape):
    """At cond(A) = 1e7 the solution of AᵀA x = Aᵀb has no digit left."""
    matrix = matrix_of(shape, torch.cat([torch.linspace(1, 2, min(shape) - 2), torch.tensor([1e-4, 1e-7])]))
    x = matrix.mT @ torch.linalg.pinv(matrix.mT, rtol=1e-12) @ rows(shape[1])  # in the row space
    solution = solver(rtol=1e-14).solve(LinearOperator.from_dense(matrix), matrix @ x)
    assert (solution.value - x).norm() <= 1e-5 * x.norm()
    gram = torch.linalg.lstsq(matrix.mT @ matrix, matrix.mT @ (matrix @ x), driver="gelsd").solution
    assert (gram - x).norm() > 1e-3 * x.norm()


@every_solver
@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_a_loose_tolerance_takes_no_small_singular_value_for_zero(solver, rtol):
    """After two iterations what is left of b lies along a singular value of 1e-5: a solution by least squares?"""
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-5], dtype=torch.float64))
    b = torch.ones(4, dtype=torch.float64)
    solution = solver(rtol=rtol).solve(LinearOperator.from_dense(matrix), b)
    assert (solution.converged, solution.reason) == (True, "consistent")
    torch.testing.assert_close(solution.value, b / matrix.diagonal(), rtol=rtol, atol=0)
    tall = LinearOperator.from_dense(torch.cat([matrix, 0 * matrix[:1]]))
    solution = solver(rtol=rtol).solve(tall, torch.ones(5, dtype=torch.float64))
    assert (solution.converged, solution.reason) == (True, "least squares")  # as asked: backward error rtol


@every_solver
def test_flags_the_end_of_the_iterations(solver):
    matrix, b = conditioned((30, 30), condition=1e4), rows(30)
    solution = solver(max_iter=5).solve(LinearOperator.from_dense(matrix), b)
    assert (solution.converged, solution.reason, solution.num_iter) == (False, "max_iter reached", 5)


@every_solver
@pytest.mark.parametrize("shape", [(20, 60), (30, 30)], ids=["wide", "square"])
def test_flags_the_precision_floor(solver, shape):
    """|x| = 1e9 |b|: products with x carry errors of about eps · 1e9 = 2e-7 |b|, above the tolerance of 1e-10."""
    matrix = matrix_of(shape, torch.cat([torch.ones(min(shape) - 1), torch.tensor([1e-9])]))
    solution = solver().solve(LinearOperator.from_dense(matrix), rows(shape[0]))
    assert (solution.converged, solution.reason) == (False, "precision floor")
    assert 1e-10 < solution.relative_residual < 1e-6
    assert solution.num_iter < 100


@every_solver
@every_shape
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("damping", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale_of_the_operator_does_not_matter(solver, shape, scale, damping, dtype):
    matrix, b = conditioned(shape).to(dtype), rows(shape[0]).to(dtype)
    solution = solver(damping=damping * scale**2).solve(LinearOperator.from_dense(scale * matrix), b)
    assert solution.converged, solution.reason
    expected = shortest(matrix.double(), b.double(), damping)
    tolerance = (1e-8 if dtype == torch.float64 else 1e-3) * expected.norm().item()
    torch.testing.assert_close((solution.value * scale).double(), expected, rtol=0, atol=tolerance)


@every_solver
def test_takes_columns_scaled_over_24_orders_of_magnitude_with_an_honest_flag(solver):
    """Backward error: a solution of a system that differs from A by rtol |A|, which says nothing of small columns."""
    matrix = conditioned((60, 20)) * torch.logspace(-12, 12, 20, dtype=torch.float64)
    b = rows(60)
    solution = solver().solve(LinearOperator.from_dense(matrix), b)
    x, norm = solution.value, torch.linalg.matrix_norm(matrix, 2)
    holds = normal_residual(matrix, b, x) <= 1e-10 * norm * (b - matrix @ x).norm()
    assert solution.converged == holds


@every_solver
def test_zero_operator_and_a_right_hand_side_off_the_range(solver):
    b = torch.ones(4, dtype=torch.float64)
    solution = solver().solve(LinearOperator.from_dense(torch.zeros(4, 3, dtype=torch.float64)), b)
    assert (solution.converged, solution.reason, solution.num_iter) == (True, "least squares", 0)
    assert torch.equal(solution.value, torch.zeros(3, dtype=torch.float64))
    matrix = torch.eye(4, 3, dtype=torch.float64)
    solution = solver().solve(LinearOperator.from_dense(matrix), torch.eye(4, dtype=torch.float64)[3])
    assert (solution.converged, solution.reason, solution.residual_norm.item()) == (True, "least squares", 1.0)


@every_solver
def test_zero_right_hand_side_costs_nothing_and_has_the_shape_of_x(solver):
    A = LinearOperator.from_dense(rows(6, 4))
    solution = solver(damping=0.1).solve(A, torch.zeros(2, 6, dtype=torch.float64), rows(2, 4))
    assert torch.equal(solution.value, torch.zeros(2, 4, dtype=torch.float64))
    assert (solution.converged, solution.num_matvec, solution.reason) == (True, 0, "zero right-hand side")
    assert torch.equal(solution.normal_residual, torch.zeros(2, dtype=torch.float64))


@every_solver
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5)])
def test_one_row_or_one_column(solver, shape):
    matrix, b = rows(*shape), rows(shape[0], seed=1)
    solution = solver().solve(LinearOperator.from_dense(matrix), b)
    assert solution.converged, solution.reason
    torch.testing.assert_close(solution.value, shortest(matrix, b))


@every_solver
def test_counts_the_products_of_both_kinds(solver):
    matrix, counted = conditioned((60, 20)), [0, 0]

    def product(which: int, matrix: Tensor, v: Tensor) -> Tensor:
        counted[which] += 1
        return matrix @ v

    A = LinearOperator(
        lambda v: product(0, matrix, v),
        20,
        num_rows=60,
        rmatvec=lambda u: product(1, matrix.mT, u),
        dtype=torch.float64,
        device="cpu",
    )
    for damping in (0.0, 0.1):
        counted[:] = [0, 0]
        assert solver(damping=damping).solve(A, rows(2, 60), rows(2, 20)).num_matvec == sum(counted)
        assert counted[0] == counted[1]


@every_solver
def test_solves_the_transposed_system(solver):
    matrix, b = conditioned((60, 20)), rows(20)
    solution = solver().solve(LinearOperator.from_dense(matrix).T, b)
    torch.testing.assert_close(solution.value, shortest(matrix.mT, b), rtol=0, atol=1e-8)


@every_solver
def test_rows_stand_still_between_convergence_tests(solver, monkeypatch: pytest.MonkeyPatch):
    """On a GPU convergence is tested every 8 iterations only; the answer must not depend on it."""
    A = LinearOperator.from_dense(conditioned((60, 20)))
    b = rows(3, 60) * torch.tensor([1.0, 0.0, 1e-8], dtype=torch.float64).unsqueeze(-1)
    b[2] = 1e-8 * A.to_dense() @ rows(20)
    often = solver(damping=0.01).solve(A, b)
    for name in ("lsmr", "cgls"):
        monkeypatch.setattr(f"implicitgrad.linalg.{name}.check_every", lambda rows: 8)
    seldom = solver(damping=0.01).solve(A, b)
    assert seldom.converged, seldom.reason
    torch.testing.assert_close(seldom.value, often.value, rtol=1e-9, atol=0)


@every_solver
def test_refuses_an_operator_without_transposed_product(solver):
    A = LinearOperator(lambda v: v[..., :2], 3, num_rows=2, dtype=torch.float64, device="cpu")
    with pytest.raises(ValueError, match=rf"{solver.__name__} needs products with Aᵀ.*rmatvec"):
        solver().solve(A, torch.ones(2, dtype=torch.float64))


@every_solver
def test_refuses_tensors_that_do_not_fit(solver):
    A = LinearOperator.from_dense(rows(6, 4))
    with pytest.raises(ValueError, match=r"b of shape \(6,\).*got \(4,\)"):
        solver().solve(A, torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x0 like b: \(4,\).*got \(6,\)"):
        solver().solve(A, torch.ones(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64))
    with pytest.raises(FloatingPointError, match="NaN or infinity in b or x0"):
        solver().solve(A, torch.full((6,), torch.nan, dtype=torch.float64))


@every_solver
@pytest.mark.parametrize("good_products", [0, 1, 2, 3, 4])
def test_products_that_turn_nan_raise(solver, good_products: int):
    matrix, left = rows(6, 4), [good_products]

    def product(matrix: Tensor, v: Tensor) -> Tensor:
        left[0] -= 1
        return matrix @ v if left[0] >= 0 else torch.nan * (matrix @ v)

    A = LinearOperator(
        lambda v: product(matrix, v),
        4,
        num_rows=6,
        rmatvec=lambda u: product(matrix.mT, u),
        dtype=torch.float64,
        device="cpu",
    )
    with pytest.raises(FloatingPointError, match=f"{solver.__name__}: NaN or infinity"):
        solver().solve(A, rows(6))


@every_solver
@pytest.mark.parametrize(
    ("field", "value"),
    [("damping", -1e-3), ("damping", float("nan")), ("damping", "1"), ("max_iter", 0), ("rtol", 1.0)],
)
def test_refuses_hyperparameters_out_of_range(solver, field: str, value: object):
    with pytest.raises(ValueError, match=f"{solver.__name__}\\({field}=.*needs a.*got"):
        solver(**{field: value})
