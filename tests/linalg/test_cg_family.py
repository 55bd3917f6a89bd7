"""What CG learns in passing, its recipes for preconditioners, and dot products of long rows."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from implicitgrad.linalg import CG, BlockCG, LinearOperator, Preconditioner
from implicitgrad.linalg import hindsight as hindsight_module
from implicitgrad.linalg.rows import row_dot, row_norm
from tests.linalg.matrices import SLOW, energy_norm, exact, krylov_basis, rows, symmetric, symmetric_matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(40,), (3, 40)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_extreme_ritz_values_equal_extreme_eigenvalues_once_cg_has_converged(
    dtype: torch.dtype, shape: tuple[int, ...], scale: float
):
    matrix = scale * symmetric_matrix(torch.logspace(-2, 1, 40))
    solution = CG(1e-10 if dtype == torch.float64 else 1e-5).solve(symmetric(matrix.to(dtype)), rows(*shape).to(dtype))
    # bisected to 1e-4; the smallest from above, the largest from below, up to rounding of the matrix in float32
    assert solution.ritz_min == pytest.approx(0.01 * scale, rel=3e-4)
    assert solution.ritz_max == pytest.approx(10 * scale, rel=3e-4)


def test_ritz_values_equal_eigenvalues_of_the_projected_matrix():
    matrix, b = symmetric_matrix(torch.logspace(-2, 1, 60)), rows(60)
    solution = CG(max_iter=7).solve(symmetric(matrix), b)
    basis = krylov_basis(matrix, b.unsqueeze(0), 7)
    projected = torch.linalg.eigvalsh(basis.mT @ matrix @ basis)
    assert solution.ritz_min == pytest.approx(projected[0].item(), rel=1e-4)
    assert solution.ritz_max == pytest.approx(projected[-1].item(), rel=1e-4)
    assert solution.ritz_min >= projected[0] * (1 - 1e-12)
    assert solution.ritz_max <= projected[-1] * (1 + 1e-12)


def test_ritz_values_are_the_extremes_over_all_right_hand_sides():
    """Each right-hand side lives in a part of the space of its own."""
    A = symmetric(torch.diag(torch.tensor([1.0, 2.0, 30.0, 40.0, 5.0, 6.0], dtype=torch.float64)))
    b = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1.0]])
    solution = CG().solve(A, b.double())
    assert solution.ritz_min == pytest.approx(1.0, rel=1e-4)
    assert solution.ritz_max == pytest.approx(40.0, rel=1e-4)


def test_ritz_values_of_stacked_systems_cover_all_of_them():
    matrices = torch.stack([symmetric_matrix(torch.linspace(1, 2, 8)), symmetric_matrix(torch.linspace(0.1, 7, 8))])
    solution = CG().solve(symmetric(matrices), rows(2, 8))
    assert (solution.ritz_min, solution.ritz_max) == pytest.approx((0.1, 7.0), rel=1e-3)


def test_ritz_values_and_energy_error_are_missing_where_they_would_mislead():
    matrix, b = symmetric_matrix(torch.linspace(1, 4, 20)), rows(20)
    preconditioned = CG(preconditioner=lambda r: r / matrix.diagonal()).solve(symmetric(matrix), b)
    assert (preconditioned.ritz_min, preconditioned.ritz_max) == (None, None)
    assert preconditioned.energy_error is not None
    indefinite = CG().solve(symmetric(matrix - 2 * torch.eye(20, dtype=torch.float64)), b)
    assert (indefinite.ritz_min, indefinite.ritz_max, indefinite.energy_error) == (None, None, None)
    assert CG().solve(symmetric(matrix), rows(257, 20)).ritz_min is None
    assert CG().solve(symmetric(matrix), b, exact(matrix, b.unsqueeze(0))[0]).energy_error is None


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-4])
def test_energy_error_is_an_estimate_from_below(rtol: float):
    """Evenly spaced logarithms of eigenvalues: convergence without jumps."""
    matrix, b = symmetric_matrix(SLOW), rows(4, 300)
    solution = CG(rtol).solve(symmetric(matrix), b)
    assert 0.5 <= solution.energy_error / energy_norm(matrix, solution.value - exact(matrix, b)) <= 1
    block = BlockCG(rtol).solve(symmetric(matrix), b)  # ten of its iterations see more, so less is missing
    assert 0.5 <= block.energy_error / energy_norm(matrix, block.value - exact(matrix, b)) <= 1.2


def test_energy_error_holds_in_float32_after_refinement_and_with_a_preconditioner():
    matrix, b = symmetric_matrix(SLOW), rows(300)
    single = CG(3e-6).solve(symmetric(matrix.float()), b.float())
    truth = energy_norm(matrix, single.value.double() - exact(matrix, b.unsqueeze(0)))
    assert 0.3 <= single.energy_error / truth <= 1.5
    scale = torch.logspace(-1, 1, 300, dtype=torch.float64)
    matrix = scale.unsqueeze(-1) * matrix * scale
    solution = CG(1e-3, preconditioner=lambda r: r / scale**2).solve(symmetric(matrix), b)
    assert 0.5 <= solution.energy_error / energy_norm(matrix, solution.value - exact(matrix, b.unsqueeze(0))) <= 1


def test_energy_error_is_in_the_units_of_the_caller():
    matrix, b = symmetric_matrix(SLOW), rows(300)
    plain = CG(1e-4).solve(symmetric(matrix), b)
    scaled = CG(1e-4).solve(symmetric(1e6 * matrix), 1e-9 * b)
    assert scaled.energy_error == pytest.approx(1e-12 * plain.energy_error, rel=1e-6)


def test_hindsight_of_long_solves_reads_their_last_part_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hindsight_module, "MAX_LENGTH", 30)
    matrix, b = symmetric_matrix(SLOW), rows(300)
    solution = CG(1e-4).solve(symmetric(matrix), b)
    assert solution.num_iter > 60
    assert 1e-3 <= solution.ritz_min < solution.ritz_max <= 1
    monkeypatch.undo()
    assert solution.energy_error == pytest.approx(CG(1e-4).solve(symmetric(matrix), b).energy_error, rel=1e-9)


@dataclass(frozen=True)
class Diagonal(Preconditioner):
    """The diagonal, by one product with the sum of the unit vectors of a diagonal matrix."""

    def build(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        diagonal = A @ torch.ones(A.size, dtype=A.dtype)
        return lambda r: r / diagonal

    def cost(self, A: LinearOperator) -> int:
        return 1


@pytest.mark.parametrize("solver", [CG, BlockCG])
def test_a_recipe_is_carried_out_once_per_operator_and_its_products_counted(solver: type):
    diagonal, count = torch.logspace(-4, 4, 30, dtype=torch.float64), [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return diagonal * v

    A = LinearOperator(product, 30, symmetric=True, dtype=torch.float64, device="cpu")
    solver = solver(preconditioner=Diagonal())
    first = solver.solve(A, rows(2, 30))
    assert (first.num_matvec, first.converged) == (count[0], True)
    again = solver.solve(A, rows(2, 30))
    assert again.num_matvec == first.num_matvec - 1
    assert torch.equal(again.value, first.value)
    assert first.num_iter <= 2


@pytest.mark.parametrize("shape", [(4_000_001,), (2, 700_001)])
def test_long_rows_keep_the_accuracy_of_float32(shape: tuple[int, ...]):
    """In one go the CPU's sum of 4 million squares is off by 3e-5 and more."""
    a = rows(*shape).float()
    truth = a.double().square().sum(-1, keepdim=len(shape) > 1)
    torch.testing.assert_close(row_dot(a, a).double(), truth, rtol=5e-6, atol=0)
    torch.testing.assert_close(row_norm(a).double(), truth.sqrt(), rtol=5e-6, atol=0)
