"""The automatic step of the Neumann series, and Chebyshev's acceleration of it."""

import importlib
import math
import re

import pytest
import torch
from torch import Tensor

from implicitgrad.linalg.cg import CG
from implicitgrad.linalg.chebyshev import Chebyshev
from implicitgrad.linalg.neumann import Neumann
from implicitgrad.linalg.operator import LinearOperator

N = 40
AUTOMATIC = [Neumann(2000, step=None), Chebyshev()]
both = pytest.mark.parametrize("solver", AUTOMATIC, ids=["Neumann", "Chebyshev"])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric_matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(rows(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = q @ torch.diag(eigenvalues.double()) @ q.mT
    return (matrix + matrix.mT) / 2


def symmetric(matrix: Tensor) -> LinearOperator:
    return LinearOperator.from_dense(matrix, symmetric=True)


def counting(matrix: Tensor, counted: list[int]) -> LinearOperator:
    def product(v: Tensor) -> Tensor:
        counted[0] += 1
        return matrix @ v

    return LinearOperator(product, len(matrix), symmetric=True, dtype=matrix.dtype, device="cpu")


@both
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_converges_at_any_scale_of_a_definite_operator(solver, scale: float, dtype: torch.dtype):
    matrix, b = symmetric_matrix(torch.linspace(0.05, 1, N)), rows(N)
    solution = solver.solve(symmetric((scale * matrix).to(dtype)), b.to(dtype))
    assert solution.converged, solution.reason
    tolerance = 1e-8 if dtype == torch.float64 else 2e-3  # the condition, 20, times a hundredfold rtol
    torch.testing.assert_close(
        solution.value.double() * scale, torch.linalg.solve(matrix, b), rtol=0, atol=tolerance * b.norm().item()
    )


@pytest.mark.parametrize("spectrum", ["crowded at the top", "crowded at the bottom", "far apart"])
def test_automatic_step_is_just_below_the_best_safe_one(spectrum: str):
    ramp = torch.linspace(0, 1, 200)
    eigenvalues = {
        "crowded at the top": 3 - 2.9 * ramp.pow(3),
        "crowded at the bottom": 0.1 + 2.9 * ramp.pow(3),
        "far apart": 3 * 0.9 ** (200 * ramp),
    }[spectrum]
    solution = Neumann(3, step=None).solve(symmetric(symmetric_matrix(eigenvalues)), rows(200))
    shown = re.fullmatch(r"num_terms reached \(step (\S+)\)", solution.reason)
    assert shown
    assert 0.75 / 3 < float(shown[1]) < 1 / 3  # 1 / λ_max less 5 % and the residual of 20 steps


@both
def test_the_spectrum_is_looked_at_once_per_operator_and_counted(solver):
    matrix, counted = symmetric_matrix(torch.linspace(0.5, 1, N)), [0]
    A = counting(matrix, counted)
    first = solver.solve(A, rows(N))
    assert counted[0] == first.num_matvec
    second = solver.solve(A, rows(N, seed=1))
    assert counted[0] == first.num_matvec + second.num_matvec
    spent_beside_iterations = second.num_matvec - second.num_iter  # the true residual
    assert first.num_matvec - first.num_iter == 20 + spent_beside_iterations
    assert first.reason == second.reason


@both
def test_a_zero_right_hand_side_and_a_solved_guess_need_no_look(solver):
    matrix, counted = symmetric_matrix(torch.linspace(0.5, 1, N)), [0]
    A, b = counting(matrix, counted), rows(N)
    assert solver.solve(A, 0 * b).num_matvec == counted[0] == 0
    assert solver.solve(A, b, torch.linalg.solve(matrix, b)).num_matvec == counted[0] == 1


@both
def test_each_system_of_a_stack_has_its_own_interval(solver):
    scales = torch.tensor([1e-6, 1.0, 1e6]).double()
    matrices = scales.view(3, 1, 1) * symmetric_matrix(torch.linspace(0.1, 1, N))
    b = rows(2, 3, N)
    solution = solver.solve(symmetric(matrices), b)
    assert solution.converged, solution.reason
    exact = torch.linalg.solve(matrices, b.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(solution.value * scales.view(3, 1), exact * scales.view(3, 1), rtol=0, atol=1e-7)
    assert re.search(r"steps 9\.\d+e-07 to 9\.\d+e\+05|between 5e-08 and 1\.05e\+06", solution.reason)


def test_automatic_step_of_an_operator_that_is_not_symmetric_is_one():
    matrix, b = torch.eye(8).double() - 0.1 * rows(8, 8), rows(8)
    automatic = Neumann(5, step=None).solve(LinearOperator.from_dense(matrix), b)
    plain = Neumann(5).solve(LinearOperator.from_dense(matrix), b)
    assert torch.equal(automatic.value, plain.value)
    assert automatic.num_matvec == plain.num_matvec
    assert automatic.reason == "num_terms reached (step 1)"


@pytest.mark.parametrize("eigenvalues", [[-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]])
def test_neumann_reports_an_operator_without_positive_eigenvalue(eigenvalues: list[float]):
    solution = Neumann(100, step=None).solve(symmetric(torch.diag(torch.tensor(eigenvalues))), torch.ones(3))
    assert not solution.converged
    assert solution.reason.startswith("no positive eigenvalue")
    assert torch.equal(solution.value, torch.zeros(3))


def test_neumann_with_automatic_step_reports_an_indefinite_operator():
    solution = Neumann(1000, step=None).solve(symmetric(torch.diag(torch.tensor([-1.0, 2.0, 3.0]))), torch.ones(3))
    assert not solution.converged
    assert solution.reason.startswith("diverged")
    assert solution.value.isfinite().all()


@both
def test_a_hopeless_system_does_not_stop_those_beside_it(solver):
    good = symmetric_matrix(torch.linspace(0.5, 1, 6))
    b = rows(2, 6)
    solution = solver.solve(symmetric(torch.stack([-good, good])), b)
    assert not solution.converged
    assert re.match("no positive eigenvalue|negative curvature", solution.reason)
    torch.testing.assert_close(solution.value[1], torch.linalg.solve(good, b[1]), rtol=0, atol=1e-8)
    assert torch.equal(solution.value[0], torch.zeros(6, dtype=torch.float64))


def chebyshev_polynomial(degree: int, x: Tensor) -> Tensor:
    """cos(k arccos x), and cosh(k arcosh x) beyond one."""
    return torch.where(
        x.abs() <= 1,
        torch.cos(degree * torch.arccos(x.clamp(-1, 1))),
        x.sign() ** degree * torch.cosh(degree * torch.arccosh(x.abs().clamp_min(1))),
    )


@pytest.mark.parametrize("degree", [1, 2, 3, 10])
@pytest.mark.parametrize("bounds", [(0.1, 1.0), (0.3, 0.9), (0.05, 2.0)], ids=["tight", "inside", "outside"])
def test_chebyshev_residual_is_the_chebyshev_polynomial(degree: int, bounds: tuple[float, float]):
    eigenvalues = torch.linspace(0.1, 1, N).double()
    matrix, b = symmetric_matrix(eigenvalues), rows(N)
    solution = Chebyshev(max_iter=degree, bounds=bounds).solve(symmetric(matrix), b)
    assert (solution.num_iter, solution.num_matvec, solution.reason) == (degree, degree, "max_iter reached")
    low, high = bounds
    place = lambda value: (high + low - 2 * value) / (high - low)
    decay = chebyshev_polynomial(degree, place(eigenvalues)) / chebyshev_polynomial(
        degree, place(torch.zeros(1, dtype=torch.float64))
    )
    q, _ = torch.linalg.qr(rows(N, N))
    residual = q @ (decay * (q.mT @ b))
    torch.testing.assert_close(b - matrix @ solution.value, residual, rtol=0, atol=1e-12)


def test_chebyshev_needs_the_square_root_of_what_neumann_needs():
    A, b = symmetric(symmetric_matrix(torch.linspace(0.002, 1, 200))), rows(200)
    chebyshev = Chebyshev(rtol=1e-6).solve(A, b)
    neumann = Neumann(20000, step=None, rtol=1e-6).solve(A, b)
    cg = CG(rtol=1e-6).solve(A, b)
    assert chebyshev.converged and neumann.converged
    condition = 500
    bound = math.log(2e6) * math.sqrt(condition) / 2  # iterations with exact bounds
    assert chebyshev.num_iter < 2 * bound
    assert cg.num_iter < chebyshev.num_iter < neumann.num_iter / 8


def test_chebyshev_starts_from_the_proven_floor():
    """With 20 steps the smallest Ritz value lies far above the smallest eigenvalue; the damping does not."""
    factor = torch.diag(torch.logspace(0, -4, 300).double())
    J = LinearOperator.from_dense(factor)
    damped, b = (J.T @ J).damped(1e-3), rows(300)
    solution = Chebyshev(rtol=1e-8).solve(damped, b)
    assert solution.converged
    assert "between 0.001 and 1.05" in solution.reason
    undeclared = LinearOperator.from_dense(factor.mT @ factor + 1e-3 * torch.eye(300).double(), symmetric=True)
    assert "between 0.001 " not in Chebyshev(rtol=1e-8).solve(undeclared, b).reason


@pytest.mark.parametrize("value", [3.0, 1e-9])
def test_chebyshev_with_equal_bounds_needs_one_iteration_for_a_multiple_of_the_identity(value: float):
    b = rows(2, 5)
    solution = Chebyshev(bounds=(value, value)).solve(symmetric(value * torch.eye(5).double()), b)
    torch.testing.assert_close(solution.value, b / value)
    assert solution.converged


@pytest.mark.parametrize("bounds", [(0.01, 0.05), (1e-9, 1e-8)])
def test_chebyshev_reports_divergence(bounds: tuple[float, float]):
    solution = Chebyshev(bounds=bounds).solve(symmetric(symmetric_matrix(torch.linspace(0.1, 1, N))), rows(2, N))
    assert (solution.reason, solution.converged) == ("diverged", False)
    assert solution.value.isfinite().all()
    assert solution.num_iter < 50


def test_chebyshev_goes_on_for_rows_that_converge_beside_one_that_diverges():
    eye, b = torch.eye(4, dtype=torch.float64), rows(2, 4)
    matrices = torch.stack([0.5 * eye, 3 * eye])
    solution = Chebyshev(bounds=(0.4, 0.6)).solve(symmetric(matrices), b)
    assert solution.reason == "diverged"
    torch.testing.assert_close(solution.value[0], 2 * b[0])


def test_chebyshev_reports_negative_curvature():
    matrix = symmetric_matrix(torch.linspace(-0.1, 1, N))
    solution = Chebyshev().solve(symmetric(matrix), rows(N))
    assert not solution.converged
    assert solution.reason.startswith("negative curvature")


def test_chebyshev_is_linear_in_the_right_hand_side():
    A, b, c = symmetric(symmetric_matrix(torch.linspace(0.1, 1, N))), rows(N), rows(N, seed=1)
    solve = lambda right: Chebyshev(max_iter=5).solve(A, right).value
    torch.testing.assert_close(solve(2 * b - 3 * c), 2 * solve(b) - 3 * solve(c))


@both
def test_rows_stand_still_between_convergence_tests(solver, monkeypatch: pytest.MonkeyPatch):
    """On a GPU convergence is tested every 8 iterations only; the answer must not depend on it."""
    matrices = torch.stack([symmetric_matrix(torch.linspace(low, 1, N)) for low in (0.02, 0.7, -1.0)])
    b = rows(2, 3, N) * torch.tensor([1.0, 1e-9]).view(2, 1, 1)
    b[1, 0] = 0
    often = solver.solve(symmetric(matrices), b)
    for name in ("neumann", "chebyshev", "lanczos"):
        monkeypatch.setattr(importlib.import_module(f"implicitgrad.linalg.{name}"), "check_every", lambda rows: 8)
    seldom = solver.solve(symmetric(matrices), b)
    torch.testing.assert_close(seldom.value, often.value, rtol=1e-7, atol=0)
    assert seldom.reason == often.reason


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chebyshev(max_iter=0),
        lambda: Chebyshev(bounds=(0.0, 1.0)),
        lambda: Chebyshev(bounds=(2.0, 1.0)),
        lambda: Chebyshev(bounds=(1.0, math.inf)),
        lambda: Chebyshev(bounds=(float("nan"), 1.0)),
        lambda: Neumann(3, step=-1.0),
    ],
)
def test_refuses_hyperparameters_out_of_range(make):
    with pytest.raises(ValueError, match="needs a"):
        make()
