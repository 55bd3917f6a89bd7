"""What is special to CG, MINRES, GMRES and Neumann; SciPy's iterates as the independent road."""

from itertools import pairwise

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicitgrad.linalg import CG, GMRES, MINRES, LinearOperator, Neumann

SCIPY = {
    "CG": lambda a, b, k: scipy.sparse.linalg.cg(a, b, rtol=1e-300, maxiter=k)[0],
    "MINRES": lambda a, b, k: scipy.sparse.linalg.minres(a, b, rtol=1e-300, maxiter=k)[0],
    "GMRES": lambda a, b, k: scipy.sparse.linalg.gmres(a, b, rtol=1e-300, restart=k, maxiter=1)[0],
}


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric_matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(rows(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = q @ torch.diag(eigenvalues.double()) @ q.mT
    return (matrix + matrix.mT) / 2


def symmetric(matrix: Tensor) -> LinearOperator:
    return LinearOperator.from_dense(matrix, symmetric=True)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize("solver", [CG, MINRES, GMRES])
def test_iterates_equal_those_of_scipy(solver: type, k: int):
    eigenvalues = torch.logspace(-1, 2, 40)
    if solver is MINRES:
        eigenvalues[::3] *= -1
    matrix, b = symmetric_matrix(eigenvalues), rows(40)
    if solver is GMRES:
        matrix = matrix + rows(40, 40, seed=1)
    A = LinearOperator.from_dense(matrix, symmetric=solver is not GMRES)
    ours = solver(max_iter=k).solve(A, b)
    theirs = torch.from_numpy(SCIPY[solver.__name__](matrix.numpy(), b.numpy(), k))
    assert ours.num_iter == k
    torch.testing.assert_close(ours.value, theirs, rtol=0, atol=1e-10 * theirs.norm().item())


def test_cg_needs_as_many_products_as_scipy():
    matrix, b = symmetric_matrix(torch.logspace(-1.5, 1.5, 100)), rows(100)
    count = [0]
    scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=1e-8, callback=lambda x: count.__setitem__(0, count[0] + 1))
    solution = CG(rtol=1e-8).solve(symmetric(matrix), b)
    assert solution.num_iter <= 1.02 * count[0]
    assert solution.num_matvec == solution.num_iter + 1  # one for the true residual


def test_cg_reports_negative_curvature_and_keeps_the_iterate_before_it():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, -0.1], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=torch.float64)
    solution = CG().solve(symmetric(matrix), b)
    assert (solution.reason, solution.converged) == ("negative curvature", False)
    before = CG(max_iter=solution.num_iter - 1).solve(symmetric(matrix), b)
    assert torch.equal(solution.value, before.value)
    torch.testing.assert_close(solution.residual_norm, (b - matrix @ solution.value).norm())


def test_cg_finds_negative_curvature_row_by_row():
    matrices = torch.stack([symmetric_matrix(torch.linspace(1, 2, 6)), symmetric_matrix(torch.linspace(-1, 2, 6))])
    b = rows(2, 6)
    solution = CG().solve(LinearOperator.from_dense(matrices, symmetric=True), b)
    assert solution.reason == "negative curvature"
    assert solution.relative_residual[0] <= 1e-10 < solution.relative_residual[1]
    torch.testing.assert_close(solution.value[0], torch.linalg.solve(matrices[0], b[0]))


def test_cg_refines_until_the_true_residual_meets_the_tolerance():
    """In float32 the recurrence claims 1e-5 before it is true."""
    A = symmetric(symmetric_matrix(torch.logspace(-1, 1.5, 200)).float())
    b = rows(200).float()
    unrefined = CG(rtol=1e-5, num_refinements=0).solve(A, b)
    refined = CG(rtol=1e-5).solve(A, b)
    assert (unrefined.converged, unrefined.reason) == (False, "num_refinements reached")
    assert refined.converged
    assert refined.num_matvec <= 1.2 * unrefined.num_matvec


@pytest.mark.parametrize("solver", [CG, MINRES, GMRES])
def test_reports_the_precision_floor(solver: type):
    A = symmetric(symmetric_matrix(torch.logspace(-3, 1, 50)).float())
    solution = solver(rtol=1e-7, max_iter=2000).solve(A, rows(50).float())
    assert not solution.converged
    assert solution.reason in ("precision floor", "stagnated")
    assert solution.num_iter < 2000
    assert solution.relative_residual < 1e-2


def test_cg_with_the_inverse_as_preconditioner_needs_one_iteration():
    matrix, b = symmetric_matrix(torch.logspace(-2, 2, 30)), rows(3, 30)
    inverse = torch.linalg.inv(matrix)
    solution = CG(preconditioner=lambda r: r @ inverse).solve(symmetric(matrix), b)
    assert solution.converged
    assert solution.num_iter <= 2
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b.mT).mT, rtol=1e-8, atol=1e-8)


def test_cg_preconditioned_by_the_diagonal_needs_fewer_iterations():
    scale = torch.logspace(-2, 2, 60, dtype=torch.float64)
    matrix, b = scale.unsqueeze(-1) * symmetric_matrix(torch.linspace(1, 4, 60)) * scale, rows(60)
    plain = CG(rtol=1e-8).solve(symmetric(matrix), b)
    jacobi = CG(rtol=1e-8, preconditioner=lambda r: r / matrix.diagonal()).solve(symmetric(matrix), b)
    assert jacobi.converged
    assert jacobi.num_iter < plain.num_iter / 2


def test_cg_names_a_preconditioner_that_is_not_positive_definite():
    A = symmetric(symmetric_matrix(torch.linspace(1, 4, 20)))
    solution = CG(preconditioner=lambda r: -r).solve(A, rows(20))
    assert (solution.reason, solution.converged) == ("preconditioner not positive definite", False)


def test_warm_start_near_the_solution_saves_iterations():
    matrix, b = symmetric_matrix(torch.logspace(-1, 1, 60)), rows(60)
    near = torch.linalg.solve(matrix, b) + 1e-6 * rows(60, seed=1)
    for solver in (CG(), MINRES()):
        assert solver.solve(symmetric(matrix), b, near).num_iter < 0.8 * solver.solve(symmetric(matrix), b).num_iter


def test_minres_residual_never_grows():
    eigenvalues = torch.cat([torch.linspace(-3, -0.2, 20), torch.linspace(0.1, 5, 30)])
    A, b = symmetric(symmetric_matrix(eigenvalues)), rows(50)
    residuals = [MINRES(max_iter=k).solve(A, b).residual_norm for k in range(1, 40, 3)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(residuals))


def test_minres_solves_a_singular_consistent_system():
    eigenvalues = torch.cat([torch.zeros(5), torch.linspace(-2, -1, 5), torch.linspace(1, 3, 10)])
    matrix = symmetric_matrix(eigenvalues)
    solution = MINRES().solve(symmetric(matrix), matrix @ rows(20))
    assert solution.converged
    expected = torch.linalg.lstsq(matrix, matrix @ rows(20), driver="gelsd").solution
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-8)  # the shortest solution


def test_minres_flags_a_singular_inconsistent_system_at_its_least_squares_residual():
    eigenvalues = torch.cat([torch.zeros(2), torch.linspace(-2, -1, 5), torch.linspace(1, 3, 10)])
    matrix, b = symmetric_matrix(eigenvalues), rows(17)
    solution = MINRES().solve(symmetric(matrix), b)
    assert (solution.reason, solution.converged) == ("singular to working precision", False)
    least = b - matrix @ torch.linalg.lstsq(matrix, b, driver="gelsd").solution
    torch.testing.assert_close(solution.residual_norm, least.norm(), rtol=1e-8, atol=0)


def test_gmres_ends_after_n_iterations_when_they_fit_in_one_cycle():
    for seed in range(5):
        matrix, b = rows(30, 30, seed=seed), rows(30, seed=seed + 50)
        solution = GMRES(restart=30, rtol=1e-8).solve(LinearOperator.from_dense(matrix), b)
        assert solution.converged
        assert solution.num_iter <= 30
        torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b), rtol=1e-5, atol=1e-5)


def test_gmres_solves_a_cyclic_shift_in_exactly_n_iterations_and_flags_stagnation_below():
    """Its residual stays at one until the very last iteration."""
    shift = LinearOperator.from_dense(torch.eye(20, dtype=torch.float64).roll(1, 0))
    b = torch.eye(20, dtype=torch.float64)[0]
    whole, restarted = GMRES(restart=20).solve(shift, b), GMRES(restart=10).solve(shift, b)
    assert (whole.converged, whole.num_iter) == (True, 20)
    assert (restarted.converged, restarted.reason, restarted.num_iter) == (False, "stagnated", 10)


@pytest.mark.parametrize("rank", [1, 3])
def test_gmres_ends_early_when_the_krylov_space_is_exhausted(rank: int):
    matrix = torch.eye(25, dtype=torch.float64) + rows(25, rank) @ rows(rank, 25, seed=1)
    solution = GMRES().solve(LinearOperator.from_dense(matrix), rows(2, 25))
    assert solution.converged
    assert solution.num_iter <= rank + 1


def test_gmres_flags_a_nilpotent_operator():
    nilpotent = LinearOperator.from_dense(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
    solution = GMRES().solve(nilpotent, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert (solution.converged, solution.reason) == (False, "stagnated")
    assert solution.value.isfinite().all()


def test_gmres_solves_the_transposed_system():
    matrix, b = rows(20, 20) + 5 * torch.eye(20, dtype=torch.float64), rows(20)
    solution = GMRES().solve(LinearOperator.from_dense(matrix).T, b)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix.mT, b))


@pytest.mark.parametrize("num_terms", [1, 2, 7])
def test_neumann_equals_the_written_out_series(num_terms: int):
    matrix, b = rows(8, 8), rows(8)
    solution = Neumann(num_terms, step=0.1).solve(LinearOperator.from_dense(matrix), b)
    power, total = b, torch.zeros_like(b)
    for _ in range(num_terms):
        total, power = total + 0.1 * power, power - 0.1 * matrix @ power
    torch.testing.assert_close(solution.value, total)
    assert (solution.num_iter, solution.num_matvec) == (num_terms, num_terms)
    assert solution.reason == "num_terms reached"


def test_neumann_with_a_guess_equals_gradient_descent_from_it():
    matrix, b, x = symmetric_matrix(torch.linspace(0.1, 1, 8)), rows(8), rows(8, seed=3)
    solution = Neumann(5, step=0.7).solve(symmetric(matrix), b, x)
    for _ in range(5):
        x = x - 0.7 * (matrix @ x - b)
    torch.testing.assert_close(solution.value, x)


@pytest.mark.parametrize("factor", [3.0, 1e30, 1e200])
def test_neumann_reports_divergence_before_it_overflows(factor: float):
    solution = Neumann(1000).solve(symmetric(factor * torch.eye(4, dtype=torch.float64)), rows(2, 4))
    assert (solution.reason, solution.converged) == ("diverged", False)
    assert solution.value.isfinite().all()
    assert solution.num_iter < 20


@pytest.mark.parametrize("factor", [3.0, 1e200])
def test_neumann_goes_on_for_rows_that_converge_beside_one_that_diverges(factor: float):
    eye, b = torch.eye(4, dtype=torch.float64), rows(2, 4)
    matrices = torch.stack([0.5 * eye, factor * eye])
    solution = Neumann(1000).solve(LinearOperator.from_dense(matrices, symmetric=True), b)
    assert solution.reason == "diverged"
    torch.testing.assert_close(solution.value[0], 2 * b[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: CG(max_iter=0),
        lambda: CG(max_iter=2.5),  # pyright: ignore[reportArgumentType]
        lambda: CG(num_refinements=-1),
        lambda: MINRES(max_iter=-1),
        lambda: GMRES(restart=0),
        lambda: Neumann(0),
        lambda: Neumann(3, step=0.0),
        lambda: Neumann(3, step=float("nan")),
    ],
)
def test_refuses_hyperparameters_out_of_range(make):
    with pytest.raises(ValueError, match="needs a"):
        make()
