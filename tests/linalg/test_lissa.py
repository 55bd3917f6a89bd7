"""LiSSA against dense inverses and the Neumann series, with samples of a ridge regression."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from implicitgrad.linalg.lissa import LiSSA
from implicitgrad.linalg.neumann import Neumann
from implicitgrad.linalg.operator import LinearOperator

N, EXAMPLES, BATCH, DAMPING = 6, 40, 8, 0.3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FEATURES = draw(EXAMPLES, N, seed=3)


def minibatch(generator: torch.Generator) -> LinearOperator:
    batch = FEATURES[torch.randint(EXAMPLES, (BATCH,), generator=generator)]
    product = lambda v: v @ batch.mT @ batch / BATCH + DAMPING * v
    return LinearOperator(product, N, matmat=product, symmetric=True, definite=True, dtype=batch.dtype, device="cpu")


MATRIX = FEATURES.mT @ FEATURES / EXAMPLES + DAMPING * torch.eye(N, dtype=torch.float64)
A = LinearOperator.from_dense(MATRIX, symmetric=True)


def always(operator: LinearOperator) -> Callable[[torch.Generator], LinearOperator]:
    return lambda generator: operator


def symmetric(matrix: Tensor) -> LinearOperator:
    return LinearOperator.from_dense(matrix, symmetric=True)


def test_with_a_sample_that_is_the_matrix_it_equals_the_neumann_series():
    b, x0 = draw(N), draw(N, seed=1)
    for start in (None, x0):
        solution = LiSSA(always(A), num_terms=7, scale=4.0).solve(A, b, start)
        torch.testing.assert_close(solution.value, Neumann(7, step=1 / 4.0).solve(A, b, start).value)
        assert (solution.num_iter, solution.num_matvec) == (7, 4 * 7 + 1 + (start is not None))


def test_expectation_of_a_short_run_is_the_truncated_series():
    b = draw(N)
    found = LiSSA(minibatch, num_terms=5, num_repeats=400, scale=6.0).estimate(A, b)
    series = Neumann(5, step=1 / 6.0).solve(A, b).value
    assert ((found.value - series).abs() < 4 * found.standard_error).all()
    assert (found.standard_error < 0.1 * series.norm()).all()
    assert found.num_matvec == 5 * 400


def test_expectation_of_a_long_run_is_the_dense_solution():
    b = draw(2, N)
    found = LiSSA(minibatch, num_terms=150, num_repeats=60).estimate(A, b)
    exact = torch.linalg.solve(MATRIX, b.mT).mT
    assert ((found.value - exact).abs() < 4 * found.standard_error).all()
    assert (found.standard_error.norm(dim=-1) < 0.1 * exact.norm(dim=-1)).all()


def test_standard_error_is_of_the_right_size():
    b = draw(N)
    exact = torch.linalg.solve(MATRIX, b)
    runs = [LiSSA(minibatch, 60, num_repeats=8, scale=4.0, seed=1000 * seed).estimate(A, b) for seed in range(24)]
    errors = torch.stack([run.value - exact for run in runs])
    stated = torch.stack([run.standard_error for run in runs]).square().mean(0).sqrt()
    ratio = (errors.square().mean(0).sqrt() / stated).mean()
    assert 0.75 < ratio < 1.33  # 24 runs of six entries


def test_solution_is_the_estimate_with_its_true_residual():
    b = 1e-3 * draw(2, N)
    solver = LiSSA(minibatch, num_terms=100)
    solution, estimate = solver.solve(A, b), solver.estimate(A, b)
    torch.testing.assert_close(solution.value, estimate.value)
    residual = (b - solution.value @ MATRIX).norm(dim=-1)
    torch.testing.assert_close(solution.residual_norm, residual)
    torch.testing.assert_close(solution.relative_residual, residual / b.norm(dim=-1))
    assert not solution.converged
    shown = re.fullmatch(
        r"num_terms reached \(scale (\S+), relative standard error (\S+)\)",
        solution.reason,
    )
    assert shown
    relative = (estimate.standard_error.norm(dim=-1) / estimate.value.norm(dim=-1)).max().item()
    assert float(shown[2]) == pytest.approx(relative, rel=0.05)  # two digits are shown


def test_automatic_scale_is_the_largest_eigenvalue_of_five_samples_and_counted():
    generator = torch.Generator().manual_seed(0)
    largest = max(torch.linalg.eigvalsh(minibatch(generator).to_dense())[-1].item() for _ in range(5))
    solution = LiSSA(minibatch, num_terms=10).solve(A, draw(N))
    shown = re.search(r"scale (\S+),", solution.reason)
    assert shown
    assert float(shown[1]) == pytest.approx(largest, rel=0.005)  # three digits are shown
    assert solution.num_matvec == 5 * N + 4 * 10 + 1  # n Lanczos steps, as n < 20: exact


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_units_do_not_matter_to_the_automatic_scale(factor: float):
    scaled = lambda generator: factor * minibatch(generator)
    b = draw(N)
    solution = LiSSA(scaled, num_terms=50).solve(factor * A, b)
    torch.testing.assert_close(factor * solution.value, LiSSA(minibatch, num_terms=50).solve(A, b).value)


def test_converged_only_if_the_true_residual_meets_the_tolerance():
    b = draw(N)
    exact_samples = LiSSA(always(A), num_terms=400).solve(A, b)
    assert exact_samples.converged
    assert exact_samples.relative_residual <= 1e-10
    assert exact_samples.reason.startswith("converged")
    loose = LiSSA(minibatch, num_terms=150, rtol=0.5).solve(A, b)
    assert loose.converged and loose.relative_residual <= 0.5
    other = LiSSA(always(2 * A), num_terms=400).solve(A, b)  # samples of another matrix, without any spread
    assert not other.converged
    assert other.relative_residual == pytest.approx(0.5)


def test_a_guess_that_solves_the_system_is_kept():
    b = draw(N)
    solution = LiSSA(minibatch, num_terms=10).solve(A, b, torch.linalg.solve(MATRIX, b))
    assert (solution.num_iter, solution.num_matvec, solution.reason) == (0, 1, "converged")


@pytest.mark.parametrize("scale", [0.5, 0.1, 1e-30])
def test_reports_divergence_where_the_scale_is_too_small(scale: float):
    solver = LiSSA(always(A), num_terms=1000, scale=scale)
    solution = solver.solve(A, draw(N))
    assert not solution.converged
    assert solution.reason.startswith("diverged: a sample has eigenvalues outside of [0, 2 scale]")
    assert solution.value.isfinite().all()
    assert solution.num_iter < 1000
    with pytest.raises(FloatingPointError, match="LiSSA: diverged.*larger scale"):
        solver.estimate(A, draw(N))


def test_reports_divergence_of_indefinite_samples():
    indefinite = symmetric(torch.diag(torch.tensor([-0.5, 1.0, 2.0])))
    solution = LiSSA(always(indefinite), num_terms=1000).solve(indefinite, torch.ones(3))
    assert solution.reason.startswith("diverged")
    assert not solution.converged


@pytest.mark.parametrize("slow", [1e-5, 0.0])
def test_slow_growth_within_the_bound_is_not_divergence(slow: float):
    """x grows to b / 1e-5 or for ever, one step at a time, although nothing is wrong."""
    matrix = torch.diag(torch.tensor([slow, 1.0], dtype=torch.float64))
    solution = LiSSA(always(symmetric(matrix)), num_terms=1000, scale=1.0).solve(
        symmetric(matrix), torch.ones(2).double()
    )
    assert solution.reason.startswith("num_terms reached")
    assert solution.value[0] == pytest.approx(1000, rel=0.01)


def test_a_row_that_diverges_does_not_stop_those_beside_it():
    matrices = torch.stack([torch.eye(4).double(), 9 * torch.eye(4).double()])
    stack, b = symmetric(matrices), draw(2, 4)
    solution = LiSSA(always(stack), num_terms=100, scale=1.0).solve(stack, b)
    assert solution.reason.startswith("diverged")
    torch.testing.assert_close(solution.value[0], b[0])


def test_rows_stand_still_between_divergence_tests(monkeypatch: pytest.MonkeyPatch):
    """On a GPU divergence is tested every 8 terms only."""
    stack, b = symmetric(torch.stack([torch.eye(4).double(), 1e20 * torch.eye(4).double()])), draw(2, 4)
    solver = LiSSA(always(stack), num_terms=100, scale=1.0)
    often = solver.solve(stack, b)
    monkeypatch.setattr("implicitgrad.linalg.lissa.check_every", lambda rows: 8)
    seldom = solver.solve(stack, b)
    assert torch.equal(seldom.value, often.value)
    assert seldom.reason == often.reason


def test_stack_with_several_right_hand_sides_and_an_automatic_scale_each():
    stack, b = symmetric(torch.stack([MATRIX, 1e3 * MATRIX])), draw(3, 2, N)
    b[1] = 0
    solution = LiSSA(always(stack), num_terms=400).solve(stack, b)
    assert solution.converged
    torch.testing.assert_close(solution.value, torch.linalg.solve(stack.to_dense(), b.unsqueeze(-1)).squeeze(-1))


def test_seed_decides_and_the_global_random_state_is_left_alone():
    b, before = draw(N), torch.get_rng_state()
    solve = lambda seed: LiSSA(minibatch, num_terms=10, seed=seed).solve(A, b).value
    assert torch.equal(solve(0), solve(0))
    assert not torch.equal(solve(0), solve(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_records_no_graph_and_leaves_its_arguments_alone():
    features = FEATURES.clone().requires_grad_()
    sample = always(LinearOperator.from_dense(features.mT @ features))
    b, x0 = draw(N).requires_grad_(), draw(N, seed=1).requires_grad_()
    kept = b.detach().clone(), x0.detach().clone()
    solution = LiSSA(sample, num_terms=3, scale=100.0).solve(A, b, x0)
    assert not solution.value.requires_grad
    assert torch.equal(b, kept[0]) and torch.equal(x0, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype):
    lower = LinearOperator.from_dense(((MATRIX + MATRIX.mT) / 2).to(dtype), symmetric=True)
    b = draw(N).to(dtype)
    solution = LiSSA(always(lower), num_terms=300).solve(lower, b)
    assert solution.value.dtype == dtype
    assert solution.relative_residual < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


def test_zero_right_hand_side_costs_nothing():
    zero = torch.zeros(N, dtype=torch.float64)
    assert LiSSA(minibatch, 10).solve(A, zero).num_matvec == 0
    assert torch.equal(LiSSA(minibatch, 10).estimate(A, zero).standard_error, zero)


def test_samples_that_turn_nan_raise():
    broken = LinearOperator(lambda v: v * float("nan"), N, symmetric=True, dtype=torch.float64, device="cpu")
    for scale in (None, 1.0):
        with pytest.raises(FloatingPointError, match="LiSSA: NaN or infinity"):
            LiSSA(always(broken), 10, scale=scale).solve(A, draw(N))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (always(symmetric(torch.eye(N + 1).double())), "samples like A"),
        (always(symmetric(torch.eye(N))), "samples like A.*float32"),
        (always(LinearOperator.from_dense(draw(N, N))), "needs symmetric samples.*Set the scale"),
        (always(symmetric(-torch.eye(N).double())), "no positive eigenvalue"),
    ],
)
def test_refuses_samples_that_do_not_fit(sample, message: str):
    with pytest.raises(ValueError, match=message):
        LiSSA(sample, 10).solve(A, draw(N))


@pytest.mark.parametrize(
    "fields",
    [{"num_terms": 0}, {"num_repeats": 1}, {"scale": 0.0}, {"scale": float("inf")}, {"rtol": 2.0}, {"sample": A}],
)
def test_refuses_hyperparameters_out_of_range(fields: dict):
    with pytest.raises(ValueError, match="needs a"):
        LiSSA(**{"sample": minibatch, "num_terms": 5, **fields})
