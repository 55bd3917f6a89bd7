"""Multi-shift CG beside dense solves and SciPy's iterates."""

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicitgrad.linalg import CG, LinearOperator, MultiShiftCG
from tests.linalg.matrices import SLOW, rows, symmetric, symmetric_matrix

SHIFTS = (1e-1, 0.0, 10.0, 1e-3, 1e-1)


def shifted(matrix: Tensor, shift: float) -> Tensor:
    return matrix + shift * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


@pytest.mark.parametrize("shape", [(80,), (3, 80)])
def test_shifted_solutions_equal_dense_solves(shape: tuple[int, ...]):
    matrix, b = symmetric_matrix(torch.logspace(-3, 0, 80)), rows(*shape)
    if len(shape) > 1:
        b[1], b[2] = 0, 1e-9 * b[2]
    solution = MultiShiftCG(SHIFTS).solve(symmetric(matrix), b)
    assert solution.converged
    for shift, x, residual in zip(SHIFTS, solution.value, solution.residual_norm, strict=True):
        system = shifted(matrix, shift)
        torch.testing.assert_close(x, torch.linalg.solve(system, b.unsqueeze(-1)).squeeze(-1), rtol=1e-6, atol=1e-12)
        # products of one vector and of several round differently: by eps |A| |x|, and |A| <= 1 + shift
        rounding = torch.finfo(x.dtype).eps * (1 + abs(shift)) * x.norm(dim=-1).max().item()
        torch.testing.assert_close(residual, (b - x @ system).norm(dim=-1), rtol=0, atol=rounding)
    assert solution.residual_norm.shape == solution.relative_residual.shape == (5, *shape[:-1])
    assert (solution.relative_residual <= 1e-10).all()


def test_stacked_systems_with_shifts_equal_dense_solves():
    matrices, b = torch.stack([symmetric_matrix(torch.logspace(-e, 0, 20)) for e in (0, 2)]), rows(3, 2, 20)
    value = MultiShiftCG((0.5, 0.0)).solve(symmetric(matrices), b).value
    for i, shift in enumerate((0.5, 0.0)):
        expected = torch.linalg.solve(shifted(matrices, shift), b.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(value[i], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shifts", [(0.0,), (0.0, 1e-3, 1e-2, 1e-1, 1.0), (-5e-4, 0.0, 1e4)])
def test_a_sweep_costs_the_products_of_the_slowest_shift_and_one_residual_each(shifts: tuple[float, ...]):
    A, b = symmetric(symmetric_matrix(SLOW)), rows(300)
    sweep = MultiShiftCG(shifts).solve(A, b)
    slowest = max(CG().solve(A.damped(shift), b).num_matvec for shift in shifts)
    assert sweep.converged
    assert sweep.num_matvec <= slowest + len(shifts)


@pytest.mark.parametrize("num_iter", [1, 2, 10])
def test_shifted_iterates_equal_those_of_scipy(num_iter: int):
    matrix, b = symmetric_matrix(torch.logspace(-2, 0, 60)), rows(60)
    solution = MultiShiftCG(SHIFTS, rtol=1e-14, max_iter=num_iter).solve(symmetric(matrix), b)
    assert solution.reason == "max_iter reached at shift 0"
    for shift, x in zip(SHIFTS, solution.value, strict=True):
        theirs, _ = scipy.sparse.linalg.cg(shifted(matrix, shift).numpy(), b.numpy(), rtol=1e-14, maxiter=num_iter)
        torch.testing.assert_close(x, torch.from_numpy(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("every", [1, 8])
def test_converged_shifts_stand_still(every: int, monkeypatch: pytest.MonkeyPatch):
    """Their recurrences end in 0/0 if they go on."""
    monkeypatch.setattr("implicitgrad.linalg.multishift.check_every", lambda rows: every)
    A, b = symmetric(symmetric_matrix(SLOW)), rows(2, 300)
    alone, beside = MultiShiftCG((1e8,)).solve(A, b), MultiShiftCG((0.0, 1e8)).solve(A, b)
    assert beside.converged
    assert alone.num_iter <= 8 < 200 < beside.num_iter
    torch.testing.assert_close(beside.value[1], alone.value[0], rtol=1e-12, atol=0)


def test_negative_curvature_stops_the_smallest_shift_and_leaves_the_others():
    matrix, b = symmetric_matrix(torch.linspace(-0.1, 1, 80)), rows(80)
    solution = MultiShiftCG((0.5, 0.0, 0.2)).solve(symmetric(matrix), b)
    assert (solution.reason, solution.converged) == ("negative curvature at shift 0", False)
    assert solution.ritz_min is None
    for i, shift in ((0, 0.5), (2, 0.2)):
        torch.testing.assert_close(
            solution.value[i], torch.linalg.solve(shifted(matrix, shift), b), rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(solution.residual_norm[1], (b - matrix @ solution.value[1]).norm())
    assert solution.relative_residual[1] > 1e-10


def test_shifts_are_finished_to_the_true_tolerance_in_float32():
    matrix, b = symmetric_matrix(torch.logspace(-1, 1.5, 200)).float(), rows(200).float()
    shifts = (0.0, 0.01, 0.1, 1.0)
    solution = MultiShiftCG(shifts).solve(symmetric(matrix), b)
    assert solution.converged, solution.reason
    for shift, x in zip(shifts, solution.value.double(), strict=True):
        assert (b.double() - shifted(matrix.double(), shift) @ x).norm() <= 1.01e-5 * b.double().norm()


def test_ritz_values_of_a_sweep_are_those_without_shift():
    matrix, b = symmetric_matrix(torch.logspace(-1, 1, 60)), rows(60)
    solution = MultiShiftCG((3.0, -0.05)).solve(symmetric(matrix), b)
    assert (solution.ritz_min, solution.ritz_max) == pytest.approx((0.1, 10.0), rel=1e-3)


def test_a_sweep_of_a_zero_right_hand_side_costs_nothing():
    solution = MultiShiftCG((0.0, 1.0)).solve(symmetric(torch.eye(4)), torch.zeros(3, 4))
    assert torch.equal(solution.value, torch.zeros(2, 3, 4))
    assert (solution.num_matvec, solution.converged, tuple(solution.residual_norm.shape)) == (0, True, (2, 3))


def test_a_sweep_leaves_its_arguments_alone_and_records_no_graph():
    matrix, b = symmetric_matrix(torch.linspace(1, 2, 10)).requires_grad_(), rows(2, 10).requires_grad_()
    before = b.detach().clone()
    solution = MultiShiftCG((1.0, 0.0)).solve(LinearOperator.from_dense(matrix, symmetric=True), b)
    assert not solution.value.requires_grad
    assert torch.equal(b, before)


@pytest.mark.parametrize("shifts", [(), (0.0, float("inf")), (float("nan"),)])
def test_multi_shift_cg_refuses_shifts_that_are_none_or_not_finite(shifts: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"needs at least one shift, all finite"):
        MultiShiftCG(shifts)


@pytest.mark.parametrize("shift", [1.0, 0])
def test_multi_shift_cg_refuses_a_single_number(shift: float):
    with pytest.raises(ValueError, match=rf"needs a sequence of numbers; got {shift}"):
        MultiShiftCG(shift)


def test_multi_shift_cg_refuses_what_cg_refuses():
    with pytest.raises(ValueError, match="needs a symmetric operator"):
        MultiShiftCG((0.0,)).solve(LinearOperator.from_dense(rows(4, 4)), rows(4))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        MultiShiftCG((0.0,)).solve(symmetric(symmetric_matrix(torch.ones(4))), rows(4) / 0)
    nan = LinearOperator(lambda v: v * float("nan"), 4, symmetric=True, dtype=torch.float64, device="cpu")
    with pytest.raises(FloatingPointError, match="MultiShiftCG: NaN"):
        MultiShiftCG((0.0, 1.0)).solve(nan, rows(4))
