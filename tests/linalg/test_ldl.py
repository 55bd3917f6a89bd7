"""What is special to LDL, and the facts of torch.linalg that it rests on."""

import pytest
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg import LDL, LU, LinearOperator

N = 15


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def indefinite(*shape: int, seed: int = 0, hollow: bool = False) -> Tensor:
    """A symmetric matrix; a hollow one has a zero diagonal, so that every pivot is a block of two rows."""
    matrix = rows(*shape, seed=seed)
    matrix = matrix + matrix.mT
    return matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)) if hollow else matrix


def symmetric(matrix: Tensor) -> LinearOperator:
    return LinearOperator.from_dense(matrix, symmetric=True)


@pytest.mark.parametrize("hollow", [False, True])
@pytest.mark.parametrize("n", [2, 3, 8, N, 60])
def test_equals_a_dense_solve_on_indefinite_matrices(n: int, hollow: bool):
    for seed in range(10):
        matrix, b = indefinite(n, n, seed=seed, hollow=hollow), rows(2, n, seed=seed + 100)
        solution = LDL().solve(symmetric(matrix), b)
        assert solution.converged, solution.reason
        # the error is eps · cond(A) at most; the residual, checked by `converged`, is at 1e-10
        allowed = 1e-13 * torch.linalg.cond(matrix).item() * solution.value.norm().item()
        torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b.mT).mT, rtol=0, atol=allowed)


def test_solves_stacked_systems_with_pivots_of_their_own():
    matrices, b = torch.stack([indefinite(N, N), indefinite(N, N, seed=1, hollow=True)]), rows(3, 2, N)
    solution = LDL().solve(symmetric(matrices), b)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrices, b.unsqueeze(-1)).squeeze(-1))


def test_factor_is_made_once_for_all_right_hand_sides():
    num_products, matrix = [0], indefinite(N, N)

    def product(v: Tensor) -> Tensor:
        num_products[0] += 1
        return matrix @ v

    A = LinearOperator(product, N, symmetric=True, dtype=torch.float64, device="cpu")
    assert (LDL().solve(A, rows(N)).num_matvec, num_products[0]) == (N + 1, N + 1)
    assert (LDL().solve(A.T, rows(2, N)).num_matvec, num_products[0]) == (2, N + 3)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(3, 3),
        torch.ones(2, 2),
        torch.diag(torch.tensor([1.0, 0.0, -2.0])),
        torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        torch.stack([torch.eye(2), torch.ones(2, 2)]),
    ],
    ids=["zero", "rank one", "diagonal", "behind a block of two", "in a stack"],
)
def test_refuses_a_matrix_that_is_exactly_singular(matrix: Tensor):
    A = symmetric(matrix)
    with pytest.raises(LinAlgError, match=r"LDL: .*is singular.*damped"):
        LDL().solve(A, torch.ones(A.vector_shape))
    torch.testing.assert_close(LDL().solve(A.damped(10.0), torch.ones(A.vector_shape)).converged, True)


def test_flags_a_matrix_that_is_singular_up_to_rounding():
    factor = rows(N, N - 1)
    matrix = factor @ torch.diag(torch.linspace(-1, 1, N - 1, dtype=torch.float64)) @ factor.mT
    solution = LDL().solve(symmetric(matrix), rows(N))
    assert (solution.converged, solution.reason) == (False, "precision floor")
    truth = torch.linalg.vector_norm(rows(N) - matrix @ solution.value)
    torch.testing.assert_close(solution.residual_norm, truth, rtol=0.5, atol=0)  # itself at the rounding level


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_matrix_raises(bad: float):
    A = LinearOperator(
        lambda v: bad * v, 2, dense=lambda: torch.full((2, 2), bad), symmetric=True, dtype=torch.float32, device="cpu"
    )
    with pytest.raises(FloatingPointError, match="LDL: the matrix of A has NaN or infinite entries"):
        LDL().solve(A, torch.ones(2))


def test_takes_matrices_scaled_over_24_orders_of_magnitude():
    scale = torch.logspace(-6, 6, N, dtype=torch.float64)
    matrix = scale.unsqueeze(-1) * indefinite(N, N, hollow=True) * scale
    x = rows(N) / scale
    solution = LDL().solve(symmetric(matrix), matrix @ x)
    assert solution.converged, solution.reason
    torch.testing.assert_close(solution.value * scale, x * scale, rtol=0, atol=1e-8)


def test_refuses_what_is_not_symmetric_or_square():
    with pytest.raises(ValueError, match="LDL needs a symmetric operator.*Use LU"):
        LDL().solve(LinearOperator.from_dense(rows(N, N)), rows(N))


@pytest.mark.parametrize("hollow", [False, True])
def test_torch_reads_the_lower_triangle_only_and_reports_the_first_zero_pivot(hollow: bool):
    """What `LDL` rests on; torch calls both functions experimental."""
    matrix = indefinite(N, N, hollow=hollow)
    factor, pivots, info = torch.linalg.ldl_factor_ex(matrix.tril())
    assert not info.any()
    b = rows(N, 2)
    torch.testing.assert_close(torch.linalg.ldl_solve(factor, pivots, b), torch.linalg.solve(matrix, b))
    matrix[-1], matrix[:, -1] = 0, 0
    assert torch.linalg.ldl_factor_ex(matrix).info == N


def test_agrees_with_lu_on_a_saddle_point_system():
    eye, constraint = torch.eye(10, dtype=torch.float64), rows(4, 10)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    matrix = torch.cat([torch.cat([eye, constraint.mT], 1), torch.cat([constraint, zero], 1)])
    A, b = symmetric(matrix), rows(14)
    torch.testing.assert_close(LDL().solve(A, b).value, LU().solve(A, b).value)
