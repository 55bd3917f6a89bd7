"""What is special to block CG; minimisers over the block Krylov space as the independent road."""

import pytest
import torch
from torch import Tensor

from implicitgrad.linalg import CG, BlockCG, LinearOperator
from tests.linalg.matrices import SLOW, exact, krylov_basis, minimisers, rows, symmetric, symmetric_matrix


def test_block_cg_needs_a_third_of_the_products_of_as_many_cgs():
    A, b = symmetric(symmetric_matrix(SLOW)), rows(8, 300)
    block = BlockCG(1e-8).solve(A, b)
    assert block.converged
    assert block.num_matvec <= sum(CG(1e-8).solve(A, row).num_matvec for row in b) / 3


@pytest.mark.parametrize("num_iter", [1, 2, 5])
def test_block_iterates_minimise_over_the_block_krylov_space(num_iter: int):
    matrix, b = symmetric_matrix(torch.logspace(-2, 0, 60)), rows(4, 60)
    ours = BlockCG(max_iter=num_iter).solve(symmetric(matrix), b).value
    best = minimisers(matrix, b, krylov_basis(matrix, b, num_iter))
    torch.testing.assert_close(ours, best, rtol=0, atol=1e-10 * best.norm().item())


@pytest.mark.parametrize("num_iter", [1, 2, 5])
def test_preconditioned_block_iterates_minimise_over_the_preconditioned_space(num_iter: int):
    matrix, b = symmetric_matrix(torch.logspace(-2, 0, 60)), rows(4, 60)
    factor = torch.linalg.cholesky(symmetric_matrix(torch.logspace(0, 1, 60), seed=1))  # P = factor factorᵀ
    ours = BlockCG(max_iter=num_iter, preconditioner=lambda r: r @ factor @ factor.mT).solve(symmetric(matrix), b).value
    basis = factor @ krylov_basis(factor.mT @ matrix @ factor, b @ factor, num_iter)
    best = minimisers(matrix, b, basis)
    torch.testing.assert_close(ours, best, rtol=0, atol=1e-10 * best.norm().item())


def test_block_cg_of_one_right_hand_side_is_cg():
    A = symmetric(symmetric_matrix(SLOW))
    for b in (rows(300), rows(1, 300)):
        block, cg = BlockCG().solve(A, b), CG().solve(A, b)
        assert torch.equal(block.value, cg.value)
        assert block.num_matvec == cg.num_matvec
        assert (block.ritz_min, block.ritz_max) == (cg.ritz_min, cg.ritz_max)


DEPENDENT = {
    "duplicates": lambda b: torch.cat([b, b, -2 * b]),
    "combinations": lambda b: torch.cat([b[:1] + b[1:2], b, b.sum(0, keepdim=True)]),
    "zeros": lambda b: torch.cat([0 * b[:1], b, 0 * b]),
    "nearly equal": lambda b: torch.cat([b, b + 1e-12 * rows(3, 40, seed=9)]),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_right_hand_sides_cost_no_products(name: str):
    matrix, b = symmetric_matrix(torch.logspace(-1, 1, 40)), rows(3, 40)
    many = DEPENDENT[name](b)
    independent, solution = BlockCG().solve(symmetric(matrix), b), BlockCG().solve(symmetric(matrix), many)
    assert solution.converged, solution.reason
    torch.testing.assert_close(solution.value, exact(matrix, many), rtol=0, atol=1e-8)
    # one true residual for each further right-hand side; three products for an iteration more by rounding
    assert solution.num_matvec <= independent.num_matvec + len(many) - 3 + 3


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nearly_dependent_right_hand_sides_are_solved_to_the_tolerance(size: float, dtype: torch.dtype):
    matrix, b = symmetric_matrix(torch.logspace(-1, 1, 40)), rows(2, 40)
    many = torch.cat([b, b + size * rows(2, 40, seed=5)]).to(dtype)
    solution = BlockCG().solve(symmetric(matrix.to(dtype)), many)
    assert solution.converged, solution.reason
    residual = (many.double() - solution.value.double() @ matrix.to(dtype).double()).norm(dim=-1)
    assert (residual <= (1.01e-10 if dtype == torch.float64 else 1.01e-5) * many.double().norm(dim=-1)).all()


def test_more_right_hand_sides_than_unknowns():
    matrix, b = symmetric_matrix(torch.logspace(-3, 3, 6)), rows(20, 6)
    solution = BlockCG().solve(symmetric(matrix), b)
    assert solution.converged
    assert solution.num_matvec <= 2 * 6 + 2 * 20  # two runs at most, each with a true residual
    torch.testing.assert_close(solution.value, exact(matrix, b), rtol=0, atol=1e-6)


def test_directions_of_eigenvectors_end_after_one_iteration():
    diagonal = torch.linspace(1, 10, 30, dtype=torch.float64)
    b = torch.cat([torch.eye(30, dtype=torch.float64)[:3], rows(1, 30)])
    b[3, :3] = 0
    solution = BlockCG(1e-8).solve(symmetric(torch.diag(diagonal)), b)
    alone = CG(1e-8).solve(symmetric(torch.diag(diagonal)), b[3])
    assert solution.converged
    assert solution.num_matvec == alone.num_matvec + 3 + 3  # one iteration and one true residual for the other three


def test_solved_right_hand_sides_cost_no_products():
    matrix, b = symmetric_matrix(SLOW), rows(4, 300)
    x0 = exact(matrix, b)
    x0[2] = 0
    warm = BlockCG(1e-8).solve(symmetric(matrix), b, x0)
    assert warm.converged
    assert warm.num_matvec <= CG(1e-8).solve(symmetric(matrix), b[2]).num_matvec + 8  # true residuals, before and after


def test_stacked_systems_have_blocks_of_their_own():
    matrices = torch.stack([symmetric_matrix(torch.logspace(-e, 0, 20), seed=e) for e in (0, 1, 3)])
    b = rows(4, 3, 20)
    b[1, 0], b[2, 0], b[:, 1] = b[0, 0], 0, b[:, 1] * 1e-9
    solution = BlockCG().solve(symmetric(matrices), b)
    assert solution.converged, solution.reason
    for i, matrix in enumerate(matrices):
        alone = BlockCG().solve(symmetric(matrix), b[:, i])
        torch.testing.assert_close(
            solution.value[:, i], alone.value, rtol=1e-6, atol=1e-7 * alone.value.abs().max().item()
        )
        torch.testing.assert_close(solution.residual_norm[:, i], (b[:, i] - solution.value[:, i] @ matrix).norm(dim=-1))


def test_block_cg_reports_negative_curvature_and_keeps_the_iterates_before_it():
    matrix, b = symmetric_matrix(torch.cat([torch.linspace(0.5, 2, 29), torch.tensor([-0.1])])), rows(4, 30)
    solution = BlockCG().solve(symmetric(matrix), b)
    assert (solution.reason, solution.converged, solution.energy_error) == ("negative curvature", False, None)
    before = BlockCG(max_iter=solution.num_iter - 1).solve(symmetric(matrix), b)
    assert torch.equal(solution.value, before.value)
    torch.testing.assert_close(solution.residual_norm, (b - solution.value @ matrix).norm(dim=-1))


def test_block_cg_finds_negative_curvature_system_by_system():
    matrices = torch.stack([symmetric_matrix(torch.linspace(1, 2, 6)), symmetric_matrix(torch.linspace(-1, 2, 6))])
    b = rows(2, 2, 6)
    solution = BlockCG().solve(symmetric(matrices), b)
    assert solution.reason == "negative curvature"
    assert (solution.relative_residual[:, 0] <= 1e-10).all()
    assert (solution.relative_residual[:, 1] > 1e-10).all()
    torch.testing.assert_close(solution.value[:, 0], exact(matrices[0], b[:, 0]))


@pytest.mark.parametrize("name", ["negative", "indefinite", "singular", "zero"])
def test_block_cg_names_a_preconditioner_that_is_not_positive_definite(name: str):
    signs = {"negative": -torch.ones(20), "indefinite": torch.linspace(-1, 1, 20), "zero": torch.zeros(20)}
    b = rows(3, 20)
    if name == "singular":
        signs["singular"] = (torch.arange(20) >= 4).double()
        b[:, 4:] = 0
    A = symmetric(symmetric_matrix(torch.linspace(1, 4, 20)))
    solution = BlockCG(preconditioner=lambda r: r * signs[name]).solve(A, b)
    assert (solution.reason, solution.converged) == ("preconditioner not positive definite", False)
    assert solution.value.isfinite().all()


@pytest.mark.parametrize("solver", [CG, BlockCG])
def test_a_preconditioner_that_returns_nan_raises(solver: type):
    A, left = symmetric(symmetric_matrix(torch.linspace(1, 4, 20))), [2]

    def precondition(r: Tensor) -> Tensor:
        left[0] -= 1
        return r if left[0] else r * float("nan")

    with pytest.raises(FloatingPointError, match="NaN"):
        solver(preconditioner=precondition).solve(A, rows(3, 20))


def test_block_cg_refines_in_float32():
    A, b = symmetric(symmetric_matrix(torch.logspace(-1, 1.5, 200)).float()), rows(6, 200).float()
    unrefined, refined = BlockCG(1e-5, num_refinements=0).solve(A, b), BlockCG(1e-5).solve(A, b)
    assert (unrefined.reason, refined.converged) == ("num_refinements reached", True)
    assert refined.num_matvec <= 1.3 * unrefined.num_matvec


def test_block_cg_in_bfloat16():
    A, b = symmetric(symmetric_matrix(torch.linspace(0.5, 1.5, 12)).bfloat16()), rows(3, 12).bfloat16()
    assert (BlockCG().solve(A, b).relative_residual <= 0.03).all()  # one rounding to bfloat16 is 0.004


def test_block_rows_stand_still_between_convergence_tests(monkeypatch: pytest.MonkeyPatch):
    A, b = symmetric(symmetric_matrix(torch.logspace(-1, 1, 40))), rows(5, 40)
    b[3], b[4] = b[0], 0
    b[1] *= 1e-8
    often = BlockCG().solve(A, b)
    monkeypatch.setattr("implicitgrad.linalg.block_cg.check_every", lambda rows: 8)
    seldom = BlockCG().solve(A, b)
    assert seldom.converged
    torch.testing.assert_close(seldom.value, often.value, rtol=1e-7, atol=0)
    assert seldom.num_matvec <= often.num_matvec + 7 * 5


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 4)])
def test_nan_names_block_cg_also_where_cg_does_the_work(shape: tuple[int, ...]):
    nan = LinearOperator(lambda v: v * float("nan"), 4, symmetric=True, dtype=torch.float64, device="cpu")
    with pytest.raises(FloatingPointError, match="^BlockCG: NaN"):
        BlockCG().solve(nan, rows(*shape))


@pytest.mark.parametrize("name", ["rtol", "max_iter", "num_refinements"])
def test_block_cg_refuses_hyperparameters_out_of_range(name: str):
    with pytest.raises(ValueError, match=rf"BlockCG\({name}=\.\.\.\) needs"):
        BlockCG(**{name: -1})
