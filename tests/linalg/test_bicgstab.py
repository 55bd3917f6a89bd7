"""What is special to BiCGSTAB, and the preconditioning on the right that it shares with GMRES."""

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicitgrad.linalg import GMRES, BiCGSTAB, LinearOperator
from implicitgrad.linalg.jacobi import Jacobi

N = 40
RIGHT_PRECONDITIONED = pytest.mark.parametrize("solver", [BiCGSTAB, GMRES])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near_identity(n: int = N, seed: int = 0) -> Tensor:
    """Eigenvalues on a circle of radius 1/2 about 1, so that the stabilising cosine stays above its bound."""
    return torch.eye(n, dtype=torch.float64) + 0.5 * torch.linalg.qr(rows(n, n, seed=seed))[0]


def game(n: int, friction: float) -> Tensor:
    """Jacobian of simultaneous gradients in a two-player game: rotation with a little friction."""
    eye, coupling = torch.eye(n // 2, dtype=torch.float64), rows(n // 2, n // 2)
    return torch.cat([torch.cat([friction * eye, coupling], 1), torch.cat([-coupling.mT, friction * eye], 1)])


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_iterates_equal_those_of_scipy(k: int):
    matrix, b = near_identity(), rows(N)
    ours = BiCGSTAB(max_iter=k).solve(LinearOperator.from_dense(matrix), b)
    theirs = torch.from_numpy(scipy.sparse.linalg.bicgstab(matrix.numpy(), b.numpy(), rtol=1e-300, maxiter=k)[0])
    assert ours.num_iter == k
    assert ours.num_matvec == 2 * k + 1  # one for the true residual
    torch.testing.assert_close(ours.value, theirs, rtol=0, atol=1e-12 * theirs.norm().item())


def test_longer_steps_and_restarts_solve_a_game_that_scipy_does_not():
    """Eigenvalues near the imaginary axis: the step that minimises the residual along s is short."""
    matrix, b = game(60, friction=0.3), rows(60)
    assert scipy.sparse.linalg.bicgstab(matrix.numpy(), b.numpy(), rtol=1e-6, maxiter=1000)[1] != 0
    solution = BiCGSTAB(rtol=1e-6, max_iter=1000).solve(LinearOperator.from_dense(matrix), b)
    assert solution.converged, solution.reason
    assert (matrix @ solution.value - b).norm() <= 1e-6 * b.norm()


def test_breakdown_restarts_from_the_true_residual():
    """The product of shadow and residual is exactly zero at the second step of the first cycle."""
    matrix = torch.tensor([[-2.0, -2.0, 0.0], [0.0, -2.0, 1.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)
    r = b - (b @ b) / (b @ matrix @ b) * (matrix @ b)
    r = r - (r @ matrix @ r) / (matrix @ r).square().sum() * (matrix @ r)
    assert (b @ r).abs() <= 1e-16 < r.norm()
    solution = BiCGSTAB().solve(LinearOperator.from_dense(matrix), b)
    assert solution.converged, solution.reason
    assert solution.num_matvec == 2 * solution.num_iter + 2  # two cycles, each with its true residual
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64),
        torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64),
        torch.eye(20, dtype=torch.float64).roll(1, 0),
        rows(30, 30) - rows(30, 30).mT,
    ],
    ids=["rotation", "nilpotent", "cyclic shift", "skew-symmetric"],
)
def test_flags_systems_whose_first_step_is_undefined(matrix: Tensor):
    b = torch.eye(len(matrix), dtype=torch.float64)[-1]
    solution = BiCGSTAB().solve(LinearOperator.from_dense(matrix), b)
    assert (solution.converged, solution.reason) == (False, "stagnated")
    assert torch.equal(solution.value, torch.zeros_like(b))
    assert solution.relative_residual == 1


def test_keeps_the_best_iterate_of_a_solve_that_does_not_converge():
    """Its residuals jump up and down: the answer after more iterations is never the worse one."""
    A, b = LinearOperator.from_dense(rows(60, 60)), rows(60)
    residuals = [BiCGSTAB(max_iter=k).solve(A, b).relative_residual.item() for k in range(1, 30)]
    assert residuals == sorted(residuals, reverse=True)
    assert max(residuals) <= 1


def test_rows_that_break_down_leave_the_others_alone():
    eye = torch.eye(N, dtype=torch.float64)
    stack = torch.stack([near_identity(), eye.roll(1, 0), 2 * eye])
    b = eye[-1].expand(3, N)
    solution = BiCGSTAB().solve(LinearOperator.from_dense(stack), b)
    assert solution.reason == "stagnated"
    torch.testing.assert_close(solution.value[0], torch.linalg.solve(stack[0], b[0]))
    torch.testing.assert_close(solution.value[2], b[2] / 2)


@RIGHT_PRECONDITIONED
def test_with_the_inverse_as_preconditioner_needs_one_iteration(solver: type[BiCGSTAB | GMRES]):
    matrix, b = rows(N, N), rows(3, N, seed=1)
    inverse = torch.linalg.inv(matrix)
    solution = solver(preconditioner=lambda r: r @ inverse.mT).solve(LinearOperator.from_dense(matrix), b)
    assert solution.converged, solution.reason
    assert solution.num_iter <= 2  # one, and a refinement: the inverse is exact up to cond(A) · eps
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b.mT).mT, rtol=0, atol=1e-8)


@RIGHT_PRECONDITIONED
def test_preconditioned_by_the_diagonal_needs_fewer_iterations(solver: type[BiCGSTAB | GMRES]):
    scale = torch.logspace(-3, 3, N, dtype=torch.float64)
    matrix, b = near_identity() * scale, rows(N)
    A = LinearOperator.from_dense(matrix)
    jacobi = solver(preconditioner=lambda r: r / matrix.diagonal()).solve(A, b)
    assert jacobi.converged, jacobi.reason
    assert jacobi.num_iter < solver().solve(A, b).num_iter / 2
    assert (matrix @ jacobi.value - b).norm() <= 1e-10 * b.norm()  # on the right: the residual is that of A x = b


@RIGHT_PRECONDITIONED
def test_preconditioned_start_counts(solver: type[BiCGSTAB | GMRES]):
    matrix, b = near_identity(), rows(N)
    near = torch.linalg.solve(matrix, b) + 1e-8 * rows(N, seed=2)
    solution = solver(preconditioner=lambda r: 2 * r).solve(LinearOperator.from_dense(matrix), b, near)
    assert solution.converged
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b), rtol=0, atol=1e-9)
    assert solution.num_iter < solver().solve(LinearOperator.from_dense(matrix), b).num_iter


def test_default_number_of_iterations_is_enough_for_gmres_with_restarts():
    """444 iterations in 15 cycles of 30, where n = 40."""
    matrix, b = game(N, friction=0.3), rows(N)
    solution = GMRES().solve(LinearOperator.from_dense(matrix), b)
    assert solution.converged, solution.reason
    assert 10 * N < solution.num_iter < 1000


@RIGHT_PRECONDITIONED
@pytest.mark.parametrize("max_iter", [0, -1, 2.5])
def test_refuses_hyperparameters_out_of_range(solver: type[BiCGSTAB | GMRES], max_iter: int):
    with pytest.raises(ValueError, match="max_iter.*integer of at least 1"):
        solver(max_iter=max_iter)


@RIGHT_PRECONDITIONED
def test_refuses_a_recipe_for_conjugate_gradients(solver: type[BiCGSTAB | GMRES]):
    with pytest.raises(ValueError, match=r"preconditioner=\.\.\..*needs a function.*recipe\.build\(A\)"):
        solver(preconditioner=Jacobi())  # pyright: ignore[reportArgumentType]
