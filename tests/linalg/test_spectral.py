"""Lanczos, eigenvalues, condition numbers, densities, traces and diagonals against dense matrices and SciPy."""

import importlib
from itertools import pairwise

import numpy
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from implicitgrad.linalg.density import spectral_density
from implicitgrad.linalg.lanczos import lanczos, ritz
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.spectral import (
    condition_number,
    extreme_eigenvalues,
    per_block_top_eigenvalue,
    top_eigenvalues,
)
from implicitgrad.linalg.trace import diagonal, per_block_trace, trace

N = 30
SPECTRA = {
    "spread": torch.linspace(-1, 3, N, dtype=torch.float64),
    "decaying": torch.logspace(2, -6, N, dtype=torch.float64),
    "three values": torch.tensor([5.0, 2.0, -1.0], dtype=torch.float64).repeat(N // 3),
    "low rank": torch.cat([torch.linspace(1, 2, 5), torch.zeros(N - 5)]).double(),
    "identity": torch.ones(N, dtype=torch.float64),
    "zero": torch.zeros(N, dtype=torch.float64),
}
every_spectrum = pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA.keys())
BLOCKS = {"first": slice(0, 12), "second": slice(12, 20), "third": slice(20, N)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_with(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(draw(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = q @ torch.diag(eigenvalues) @ q.mT
    return (matrix + matrix.mT) / 2


def symmetric(matrix: Tensor) -> LinearOperator:
    return LinearOperator.from_dense(matrix, symmetric=True)


def counting(matrix: Tensor, counted: list[int], **declared: bool) -> LinearOperator:
    def product(v: Tensor) -> Tensor:
        counted[0] += 1
        return (matrix @ v.unsqueeze(-1)).squeeze(-1)

    batch_shape = tuple(matrix.shape[:-2])
    return LinearOperator(
        product, matrix.shape[-1], batch_shape=batch_shape, dtype=matrix.dtype, device="cpu", **declared
    )


def tridiagonal(alphas: Tensor, betas: Tensor) -> Tensor:
    return torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)


@every_spectrum
@pytest.mark.parametrize("num_steps", [1, 12, N, N + 7])
@pytest.mark.parametrize("rhythm", [1, 8], ids=["looks at every step", "never waits"])
def test_lanczos_relation_holds(eigenvalues: Tensor, num_steps: int, rhythm: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.import_module("implicitgrad.linalg.lanczos"), "check_every", lambda rows: rhythm)
    matrix = matrix_with(eigenvalues)
    process = lanczos(symmetric(matrix), num_steps)
    basis = process.basis
    assert basis is not None
    assert process.num_matvec == len(process.alphas) == len(process.betas) == len(basis) == min(num_steps, N)
    scale = 1e-13 * max(1, matrix.abs().max().item())
    torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(
        basis @ matrix @ basis.mT, tridiagonal(process.alphas, process.betas), rtol=0, atol=scale
    )
    left_over = matrix @ basis.mT - basis.mT @ tridiagonal(process.alphas, process.betas)
    torch.testing.assert_close(left_over[:, :-1], torch.zeros(N, len(basis) - 1).double(), rtol=0, atol=scale)
    torch.testing.assert_close(left_over[:, -1].norm(), process.betas[-1], rtol=1e-10, atol=scale)


def test_lanczos_goes_on_where_the_start_spans_an_invariant_subspace():
    start = torch.zeros(4, dtype=torch.float64)
    start[:2] = 1
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    process = lanczos(symmetric(matrix), 4, start)
    assert process.betas[1] == 0
    torch.testing.assert_close(ritz(process).values, matrix.diagonal())


def test_lanczos_without_reorthogonalisation_finds_the_ends_and_holds_no_basis():
    matrix = matrix_with(torch.logspace(-2, 2, 200).double())
    process = lanczos(symmetric(matrix), 150, reorthogonalise=False)
    assert process.basis is None
    values = ritz(process).values  # with copies of the converged ones
    assert (values > 100 * (1 - 1e-12)).sum() > 1
    torch.testing.assert_close(values[[0, -1]], torch.tensor([1e-2, 1e2]).double(), rtol=0.2, atol=0)
    torch.testing.assert_close(values[-1].item(), 100.0, rtol=1e-7, atol=0)
    assert values[0] > 1e-2 - 1e-12


def test_lanczos_of_a_stack_equals_one_by_one():
    matrices = torch.stack([matrix_with(SPECTRA[name]) for name in ("spread", "identity", "three values")])
    start = draw(3, N, seed=5)
    together = lanczos(symmetric(matrices), 9, start)
    assert together.num_matvec == 9
    assert together.basis is not None
    for i, matrix in enumerate(matrices):
        alone = ritz(lanczos(symmetric(matrix), 9, start[i]))
        # the continuation is random, so only what the start determines can agree: the ends of the spectrum
        torch.testing.assert_close(ritz(together).values[i, [0, -1]], alone.values[[0, -1]], rtol=1e-12, atol=1e-12)
        basis = together.basis[:, i]
        torch.testing.assert_close(basis @ basis.mT, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e30])
def test_float32_at_any_scale(scale: float):
    matrix = (scale * matrix_with(SPECTRA["spread"])).float()
    found = top_eigenvalues(symmetric(matrix), 2)
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)[:2]
    assert found.values.dtype == found.vectors.dtype == torch.float32
    torch.testing.assert_close(found.values.double() / scale, exact / scale, rtol=1e-5, atol=0)


def test_bfloat16_is_worked_on_in_float32():
    matrix = matrix_with(SPECTRA["spread"]).bfloat16()
    found = extreme_eigenvalues(symmetric((matrix + matrix.mT) / 2))
    assert found.largest.dtype == torch.float32
    assert abs(found.largest - 3) < 0.03  # one rounding to bfloat16 is 0.004, relative


@pytest.mark.parametrize(("which", "scipys"), [("largest", "LA"), ("smallest", "SA"), ("magnitude", "LM")])
def test_top_eigenvalues_equal_those_of_scipy(which, scipys: str):
    matrix = matrix_with(torch.cat([torch.linspace(-1, 1, 94), torch.tensor([-9, -7, -5, 4, 6, 8])]).double())
    found = top_eigenvalues(symmetric(matrix), 3, which)
    theirs = scipy.sparse.linalg.eigsh(matrix.numpy(), 3, which=scipys, return_eigenvectors=False)
    wanted = sorted(theirs, key={"LA": lambda v: -v, "SA": lambda v: v, "LM": lambda v: -abs(v)}[scipys])
    torch.testing.assert_close(found.values, torch.tensor(numpy.array(wanted)))
    torch.testing.assert_close(found.vectors @ matrix, found.values.unsqueeze(-1) * found.vectors, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.vectors @ found.vectors.mT, torch.eye(3, dtype=torch.float64))


@every_spectrum
def test_all_eigenvalues_with_their_multiplicity(eigenvalues: Tensor):
    found = top_eigenvalues(symmetric(matrix_with(eigenvalues)), N)
    wanted = eigenvalues.sort(descending=True).values
    torch.testing.assert_close(found.values, wanted, rtol=1e-12, atol=1e-13 * max(1, wanted[0].item()))


@pytest.mark.parametrize("num_steps", [3, 8, 15])
def test_residuals_are_the_true_ones_and_bound_the_error(num_steps: int):
    matrix = matrix_with(torch.linspace(0, 1, 200).double().square())
    found = top_eigenvalues(symmetric(matrix), 3, num_steps=num_steps)
    true = (found.vectors @ matrix - found.values.unsqueeze(-1) * found.vectors).norm(dim=-1)
    torch.testing.assert_close(found.residuals, true, rtol=1e-8, atol=1e-14)
    distance = (found.values.unsqueeze(-1) - torch.linalg.eigvalsh(matrix)).abs().amin(-1)
    assert (distance <= found.residuals).all()
    assert found.num_matvec == num_steps


def test_eigenpairs_of_a_stack_are_a_block_of_vectors():
    matrices = torch.stack([matrix_with(SPECTRA["spread"]), matrix_with(-SPECTRA["spread"], seed=1)])
    found = top_eigenvalues(symmetric(matrices), 2)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(matrices).flip(-1)[:, :2].mT)
    assert found.vectors.shape == (2, 2, N)
    images = symmetric(matrices) @ found.vectors
    torch.testing.assert_close(images, found.values.unsqueeze(-1) * found.vectors, rtol=0, atol=1e-10)


def test_extreme_eigenvalues_approach_the_spectrum_from_within():
    eigenvalues = torch.logspace(-3, 1, 200).double()
    A = symmetric(matrix_with(eigenvalues))
    seen = [extreme_eigenvalues(A, steps) for steps in (5, 20, 80, 200)]
    for coarse, fine in pairwise(seen):
        assert coarse.smallest > fine.smallest > eigenvalues[0] - 1e-12
        assert coarse.largest <= fine.largest + 1e-12 <= eigenvalues[-1] + 2e-12
    torch.testing.assert_close(seen[-1].smallest, eigenvalues[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(seen[2].largest, eigenvalues[-1], rtol=1e-9, atol=0)
    assert abs(seen[1].largest - eigenvalues[-1]) <= seen[1].largest_residual < 0.1


@pytest.mark.parametrize("shape", [(N, N), (40, N), (N, 40)])
def test_condition_number_equals_the_dense_one(shape: tuple[int, int]):
    matrix = draw(*shape)
    found = condition_number(LinearOperator.from_dense(matrix))
    exact = torch.linalg.cond(matrix)
    torch.testing.assert_close(found.value, exact, rtol=1e-8, atol=0)
    assert found.complete  # as many steps as unknowns
    assert found.num_matvec == 2 * N


def test_condition_number_of_a_definite_operator_comes_from_below():
    factor = draw(80, 60)
    J = LinearOperator.from_dense(factor)
    A = (J.T @ J).damped(0.5)
    exact = torch.linalg.cond(factor.mT @ factor + 0.5 * torch.eye(60, dtype=torch.float64))
    coarse, fine = condition_number(A, 10), condition_number(A, 60)
    assert coarse.num_matvec == 10
    assert coarse.value < exact and not coarse.complete and fine.complete
    torch.testing.assert_close(fine.value, exact, rtol=1e-9, atol=0)


def test_condition_number_of_indefinite_and_singular_operators():
    indefinite = torch.linspace(-1, 3, N).double()  # its smallest absolute value, 0.034, lies inside
    found = condition_number(symmetric(matrix_with(indefinite)))
    torch.testing.assert_close(found.value, 3 / indefinite.abs().min(), rtol=1e-9, atol=0)
    singular = LinearOperator.from_dense(torch.diag(torch.tensor([0.0, 1.0, 2.0])).double())
    assert condition_number(singular).value == torch.inf


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_trace_is_exact_with_as_many_products_as_unknowns(method, batch: tuple[int, ...]):
    matrix, counted = draw(*batch, N, N), [0]
    found = trace(counting(matrix, counted), N, method)
    torch.testing.assert_close(found.value, matrix.diagonal(dim1=-2, dim2=-1).sum(-1))
    assert counted[0] == found.num_matvec == N
    assert (found.standard_error == 0).all()


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_trace_is_unbiased_and_its_error_is_what_it_says(method):
    """300 independent estimates: a mean of zero within 4 standard errors, a spread of the size stated."""
    matrices = matrix_with(torch.logspace(0, -2, 80).double()).expand(300, 80, 80)
    found = trace(LinearOperator.from_dense(matrices, symmetric=True), 30, method)
    exact = matrices[0].trace()
    error = found.value - exact
    assert error.mean().abs() < 4 * error.std() / 300**0.5
    stated = found.standard_error.square().mean().sqrt()
    assert 0.8 < error.std() / stated < 1.25  # three standard errors of a spread from 300 samples, each from 10


def test_hutchplusplus_has_less_variance_than_hutchinson_on_a_decaying_spectrum():
    matrices = matrix_with(1 / torch.arange(1, 101).double().square()).expand(100, 100, 100)
    A = LinearOperator.from_dense(matrices, symmetric=True)
    spread = {method: trace(A, 30, method).value.std() for method in ("hutch++", "hutchinson")}
    assert spread["hutch++"] < 0.1 * spread["hutchinson"]


@pytest.mark.parametrize("nonsymmetric", [False, True])
def test_hutchplusplus_is_exact_for_low_rank(nonsymmetric: bool):
    left = draw(100, 4)
    matrix = left @ (draw(100, 4, seed=1) if nonsymmetric else left).mT
    found = trace(LinearOperator.from_dense(matrix), 15)
    torch.testing.assert_close(found.value, matrix.trace(), rtol=1e-11, atol=0)
    assert found.standard_error < 1e-11
    assert found.num_matvec == 15


def test_trace_counts_products_and_keeps_blocks_small(monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("implicitgrad.linalg.sampling")
    counted, matrix = [0], draw(N, N)
    whole = trace(counting(matrix, counted), 20)
    assert counted[0] == whole.num_matvec == 18  # three times six
    monkeypatch.setattr(module, "NUMBERS_PER_BLOCK", 2 * N)  # two vectors at a time
    parts = diagonal(counting(matrix, counted), 9), diagonal(counting(matrix, counted), exact=True)
    assert [part.num_matvec for part in parts] == [9, N]
    torch.testing.assert_close(parts[1].value, matrix.diagonal())


def test_diagonal_is_unbiased_with_the_known_variance():
    matrix = matrix_with(SPECTRA["spread"])
    matrices = matrix.expand(200, N, N)
    found = diagonal(LinearOperator.from_dense(matrices), 10)
    error = found.value - matrix.diagonal()
    variance = (matrix.square().sum(-1) - matrix.diagonal().square()) / 10
    assert (error.mean(0).abs() < 4 * (variance / 200).sqrt()).all()
    torch.testing.assert_close(found.standard_error.square().mean(0), variance, rtol=0.2, atol=0)


def test_diagonal_of_a_diagonal_matrix_needs_no_luck():
    found = diagonal(symmetric(torch.diag(SPECTRA["spread"])), 2)
    torch.testing.assert_close(found.value, SPECTRA["spread"])
    assert (found.standard_error == 0).all()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_exact_diagonal(batch: tuple[int, ...]):
    matrix, counted = draw(*batch, 70, 70), [0]
    A = counting(matrix, counted)
    found = diagonal(A, exact=True)
    assert torch.equal(found.value, matrix.diagonal(dim1=-2, dim2=-1))
    assert counted[0] == found.num_matvec == 70
    A.to_dense()
    assert diagonal(A, exact=True).num_matvec == 0


def test_per_block_traces_share_products_and_hold_within_their_errors():
    matrix, counted = matrix_with(SPECTRA["spread"]), [0]
    found = per_block_trace(counting(matrix, counted, symmetric=True), BLOCKS, num_probes=400)
    assert counted[0] == found["first"].num_matvec == 400
    for name, block in BLOCKS.items():
        exact = matrix[block, block].trace()
        assert (found[name].value - exact).abs() < 4 * found[name].standard_error
        off_diagonal = matrix[block].square().sum() - matrix[block].diagonal(block.start).square().sum()
        # entries A_ij and A_ji within the block have the same signs, so they add up before they are squared
        within = matrix[block, block].square().sum() - matrix[block, block].diagonal().square().sum()
        expected = ((off_diagonal + within) / 400).sqrt()
        torch.testing.assert_close(found[name].standard_error, expected, rtol=0.15, atol=0)


def test_per_block_top_eigenvalues_are_those_of_the_blocks():
    matrix = matrix_with(SPECTRA["spread"])
    found = per_block_top_eigenvalue(symmetric(matrix), BLOCKS, "smallest")
    for name, block in BLOCKS.items():
        values, vectors = torch.linalg.eigh(matrix[block, block])
        torch.testing.assert_close(found[name].values, values[:1])
        torch.testing.assert_close((found[name].vectors[0] @ vectors[:, 0]).abs().item(), 1.0)


@pytest.mark.parametrize("block", [slice(0, N + 1), slice(4, 4), slice(-3, N), slice(0, 4, 2), slice(3, None)])
def test_refuses_blocks_outside_of_the_operator(block: slice):
    A = symmetric(torch.eye(N, dtype=torch.float64))
    for find in (per_block_trace, per_block_top_eigenvalue):
        with pytest.raises(ValueError, match="'w' is slice"):
            find(A, {"w": block})


def test_refuses_blocks_that_are_no_slices():
    A = symmetric(torch.eye(N, dtype=torch.float64))
    for find in (per_block_trace, per_block_top_eigenvalue):
        for block in ([0, 1], 3, torch.tensor([0, 1])):
            with pytest.raises(ValueError, match=f"{find.__name__} needs blocks slice.*'w' is"):
                find(A, {"w": block})
        with pytest.raises(TypeError, match=f"{find.__name__} needs blocks by name.*got list"):
            find(A, [slice(0, 2)])


def test_density_has_mass_one_and_the_moments_of_the_spectrum():
    """For a diagonal matrix zᵀAᵏz is tr Aᵏ for all signs z, so the quadrature is exact up to degree 2 m - 1."""
    eigenvalues = torch.linspace(-1, 3, 60).double() ** 3
    found = spectral_density(symmetric(torch.diag(eigenvalues)), num_steps=4, num_probes=3)
    for power in range(8):
        moments = (found.weights * found.nodes**power).sum(-1)
        torch.testing.assert_close(moments, eigenvalues.pow(power).mean().expand(3), rtol=1e-10, atol=1e-12)
    eighth = (found.weights * found.nodes**8).sum(-1)
    assert not torch.allclose(eighth, eigenvalues.pow(8).mean(), rtol=1e-6)
    torch.testing.assert_close(torch.trapezoid(found.density, found.grid).item(), 1.0, rtol=1e-5, atol=0)
    mean = torch.trapezoid(found.density * found.grid, found.grid)
    torch.testing.assert_close(mean, eigenvalues.mean(), rtol=1e-4, atol=1e-4)
    assert found.num_matvec == 12


def test_moments_of_a_full_matrix_within_their_errors():
    matrix = matrix_with(SPECTRA["spread"])
    found = spectral_density(symmetric(matrix), num_steps=10, num_probes=60)
    for power in range(1, 5):
        moments = (found.weights * found.nodes**power).sum(-1)
        error = moments.mean() - SPECTRA["spread"].pow(power).mean()
        assert error.abs() < 4 * moments.std() / 60**0.5


def test_density_equals_the_smoothed_eigenvalues():
    eigenvalues = SPECTRA["spread"]
    grid = torch.linspace(-2, 4, 50).double()
    wanted = torch.distributions.Normal(eigenvalues, 0.2).log_prob(grid.unsqueeze(-1)).exp().mean(-1)
    exact = spectral_density(symmetric(torch.diag(eigenvalues)), grid=grid, width=0.2)
    torch.testing.assert_close(exact.density, wanted)
    assert exact.standard_error.max() < 1e-12
    found = spectral_density(symmetric(matrix_with(eigenvalues)), num_probes=100, grid=grid, width=0.2)
    assert ((found.density - wanted).abs() < 4 * found.standard_error).all()
    assert found.standard_error.max() < 0.1 * wanted.max()


@pytest.mark.parametrize("factor", [0.0, 1e-12, -7.0, 1e12])
def test_density_of_a_multiple_of_the_identity(factor: float):
    found = spectral_density(symmetric(factor * torch.eye(N, dtype=torch.float64)), num_steps=5)
    torch.testing.assert_close(torch.trapezoid(found.density, found.grid).item(), 1.0, rtol=1e-5, atol=0)
    assert found.width == pytest.approx(0.01 * abs(factor) or 1.0)


CALLS = {
    "lanczos": lambda A, g: lanczos(A, 5, generator=g).alphas,
    "top_eigenvalues": lambda A, g: top_eigenvalues(A, num_steps=5, generator=g).values,
    "extreme_eigenvalues": lambda A, g: extreme_eigenvalues(A, 5, g).largest,
    "condition_number": lambda A, g: condition_number(A, 5, g).value,
    "spectral_density": lambda A, g: spectral_density(A, 5, generator=g).nodes,
    "trace": lambda A, g: trace(A, 9, generator=g).value,
    "diagonal": lambda A, g: diagonal(A, 5, g).value,
    "per_block_trace": lambda A, g: per_block_trace(A, BLOCKS, generator=g)["first"].value,
    "per_block_top_eigenvalue": lambda A, g: per_block_top_eigenvalue(A, BLOCKS, "largest", 3, g)["first"].values,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@every_call
def test_the_generator_is_the_only_source_of_randomness(call):
    A = symmetric(matrix_with(SPECTRA["spread"]))
    before = torch.get_rng_state()
    first, again = call(A, None), call(A, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    seeded = [call(A, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


@every_call
def test_records_no_graph_and_leaves_the_matrix_alone(call):
    matrix = matrix_with(SPECTRA["spread"]).requires_grad_()
    before = matrix.detach().clone()
    assert not call(symmetric(matrix), None).requires_grad
    assert torch.equal(matrix, before)


@every_call
def test_products_that_alias_their_argument(call):
    def same(v: Tensor) -> Tensor:
        return v

    aliasing = LinearOperator(same, N, matmat=same, symmetric=True, dtype=torch.float64, device="cpu")
    copying = symmetric(torch.eye(N, dtype=torch.float64))
    torch.testing.assert_close(call(aliasing, None), call(copying, None))


@every_call
@pytest.mark.parametrize("good_products", [0, 3])
def test_products_that_turn_nan_raise(call, good_products: int):
    left = [good_products]

    def product(v: Tensor) -> Tensor:
        left[0] -= 1
        return v * (1 if left[0] >= 0 else float("nan"))

    A = LinearOperator(product, N, symmetric=True, dtype=torch.float64, device="cpu")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        call(A, None)


def test_nan_names_the_function_that_was_called():
    nan = symmetric(torch.full((N, N), float("nan"), dtype=torch.float64))
    for find in (trace, diagonal, per_block_trace):
        with pytest.raises(FloatingPointError, match=f"^{find.__name__}: NaN"):
            find(nan, **({"blocks": BLOCKS} if find is per_block_trace else {}))


@pytest.mark.parametrize(
    "name", ["lanczos", "top_eigenvalues", "extreme_eigenvalues", "spectral_density", "per_block_top_eigenvalue"]
)
def test_refuses_an_operator_that_is_not_declared_symmetric(name: str):
    with pytest.raises(ValueError, match=f"{name} needs a symmetric operator; got .* Use "):
        CALLS[name](LinearOperator.from_dense(draw(N, N)), None)


@pytest.mark.parametrize("name", ["trace", "diagonal", "per_block_trace"])
def test_refuses_a_rectangular_operator(name: str):
    with pytest.raises(ValueError, match=f"{name} needs a square operator"):
        CALLS[name](LinearOperator.from_dense(draw(N, N + 1)), None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: lanczos(A, 0), r"num_steps=\.\.\."),
        (lambda A: lanczos(A, 3, torch.zeros(N, dtype=torch.float64)), "start that is not zero"),
        (lambda A: lanczos(A, 3, torch.ones(N + 1)), r"start of shape \(30,\)"),
        (lambda A: top_eigenvalues(A, 0), r"k=\.\.\."),
        (lambda A: top_eigenvalues(A, N + 1), "at most n = 30; got 31"),
        (lambda A: top_eigenvalues(A, 5, num_steps=4), r"num_steps=\.\.\..*at least 5"),
        (lambda A: top_eigenvalues(A, which="LA"), "one of largest, smallest, magnitude; got 'LA'"),
        (lambda A: trace(A, 5), r"num_matvec=\.\.\..*at least 6"),
        (lambda A: trace(A, method="exact"), r'"hutch\+\+" or "hutchinson"'),
        (lambda A: diagonal(A, 1), r"num_probes=\.\.\..*at least 2"),
        (lambda A: spectral_density(A, num_probes=1), r"num_probes=\.\.\..*at least 2"),
        (lambda A: spectral_density(A, width=0.0), "width=.*positive"),
        (lambda A: spectral_density(symmetric(torch.eye(2).expand(3, 2, 2))), "one system"),
    ],
)
def test_refuses_arguments_out_of_range(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(symmetric(torch.eye(N, dtype=torch.float64)))


def test_lanczos_refuses_a_start_with_nan():
    with pytest.raises(FloatingPointError, match="in the start"):
        lanczos(symmetric(torch.eye(2)), 2, torch.tensor([1.0, float("nan")]))
