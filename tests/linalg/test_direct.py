"""What is special to Cholesky and LU."""

import pytest
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg import LU, Cholesky, LinearOperator, LinearSolver

N = 15


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counted:
    """The products of a matrix, counted."""

    def __init__(self, matrix: Tensor, symmetric: bool):
        self.num_products = 0
        self.operator = LinearOperator(
            lambda v: self._product(matrix, v),
            matrix.shape[-1],
            rmatvec=lambda v: self._product(matrix.mT, v),
            symmetric=symmetric,
            dtype=matrix.dtype,
            device="cpu",
        )

    def _product(self, matrix: Tensor, v: Tensor) -> Tensor:
        self.num_products += 1
        return matrix @ v


@pytest.mark.parametrize("solver", [Cholesky(), LU()])
def test_factor_is_made_once_for_all_right_hand_sides_and_the_transpose(solver: LinearSolver):
    matrix = rows(N, N) + 10 * torch.eye(N, dtype=torch.float64)
    symmetric = isinstance(solver, Cholesky)
    matrix = matrix + matrix.mT if symmetric else matrix
    counted = Counted(matrix, symmetric)
    first = solver.solve(counted.operator, rows(N))
    assert (first.num_matvec, counted.num_products) == (N + 1, N + 1)
    for A, expected in [(counted.operator, matrix), (counted.operator.T, matrix.mT)]:
        b = rows(3, N, seed=1)
        solution = solver.solve(A, b)
        assert solution.num_matvec == 3
        torch.testing.assert_close(solution.value, torch.linalg.solve(expected, b.mT).mT)
    assert counted.num_products == N + 1 + 6


def test_factor_made_for_the_transpose_serves_the_operator():
    counted = Counted(rows(N, N), symmetric=False)
    LU().solve(counted.operator.T, rows(N))
    assert LU().solve(counted.operator, rows(N)).num_matvec == 1


def test_lu_solves_stacked_transposes():
    matrices, b = rows(3, N, N), rows(2, 3, N)
    solution = LU().solve(LinearOperator.from_dense(matrices).T, b)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrices.mT, b.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("eigenvalue", [-1.0, 0.0])
def test_cholesky_refuses_a_matrix_that_is_not_positive_definite(eigenvalue: float):
    A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, eigenvalue, 2.0])), symmetric=True)
    with pytest.raises(LinAlgError, match="Cholesky: .*not positive definite.*Use LU or MINRES"):
        Cholesky().solve(A, torch.ones(3))


def test_lu_refuses_a_matrix_that_is_exactly_singular():
    stacked = torch.stack([torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]])])
    with pytest.raises(LinAlgError, match="LU: .*is singular.*damped"):
        LU().solve(LinearOperator.from_dense(stacked), torch.ones(2, 2))


def test_lu_flags_a_matrix_that_is_nearly_singular():
    factor = rows(N, N - 1)
    nearly = factor @ rows(N - 1, N, seed=1) + 1e-15 * rows(N, N, seed=2)
    solution = LU().solve(LinearOperator.from_dense(nearly), rows(N))
    assert (solution.converged, solution.reason) == (False, "precision floor")
    residual = torch.linalg.vector_norm(rows(N) - nearly @ solution.value)
    torch.testing.assert_close(solution.residual_norm, residual, rtol=0.5, atol=0)  # itself at the rounding level


@pytest.mark.parametrize("solver", [Cholesky(), LU()])
def test_matrix_that_differs_from_the_products_is_noticed(solver: LinearSolver):
    A = LinearOperator(
        lambda v: 2 * v,
        3,
        dense=lambda: torch.eye(3, dtype=torch.float64),
        symmetric=True,
        dtype=torch.float64,
        device="cpu",
    )
    assert not solver.solve(A, rows(3)).converged


def test_refinement_repairs_a_slightly_wrong_matrix():
    exact = torch.diag(torch.linspace(1, 2, 3, dtype=torch.float64))
    A = LinearOperator(
        lambda v: exact @ v, 3, dense=lambda: exact * (1 + 1e-8), symmetric=True, dtype=torch.float64, device="cpu"
    )
    for solver in (Cholesky(), LU()):
        solution = solver.solve(A, rows(3))
        assert solution.converged
        assert solution.num_matvec == 2
        assert not solver.__class__(rtol=1e-16).solve(A, rows(3)).converged


@pytest.mark.parametrize("solver", [Cholesky(), LU()])
def test_non_finite_matrix_raises(solver: LinearSolver):
    A = LinearOperator.from_dense(torch.tensor([[1.0, float("inf")], [float("inf"), 1.0]]), symmetric=True)
    with pytest.raises(FloatingPointError, match="matrix of A has NaN or infinite entries"):
        solver.solve(A, torch.ones(2))
