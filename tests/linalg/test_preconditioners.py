"""Preconditioners against their formulas written out with dense matrices, and what they save."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from implicitgrad.linalg import (
    CG,
    GMRES,
    BiCGSTAB,
    BlockCG,
    Deflation,
    Jacobi,
    LinearOperator,
    LowRankInverse,
    Nystrom,
    Preconditioner,
    QuasiNewton,
)
from implicitgrad.linalg.recording import Recorder

N = 40
RECIPES = [Jacobi(), Jacobi(16), Nystrom(12), Deflation(12), QuasiNewton(12)]
FITTED = [Deflation(12), QuasiNewton(12)]

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)
every_fitted = pytest.mark.parametrize("recipe", FITTED, ids=str)
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def matrix_with(eigenvalues: Tensor, *batch: int) -> Tensor:
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(draw(*batch, n, n, seed=3))
    matrix = (q * eigenvalues) @ q.mT
    return (matrix + matrix.mT) / 2


def decaying(*batch: int, largest: float = 1e4) -> Tensor:
    """Ten eigenvalues up to the largest over 30 from one to two."""
    eigenvalues = torch.linspace(1, 2, N, dtype=torch.float64)
    eigenvalues[:10] = torch.logspace(1, 0, 10, base=largest, dtype=torch.float64).clamp(min=3)
    return matrix_with(eigenvalues, *batch)


def even(n: int = N) -> Tensor:
    return matrix_with(torch.linspace(1, 3, n, dtype=torch.float64))


def badly_scaled(decades: int = 6) -> Tensor:
    scale = torch.logspace(-decades / 2, decades / 2, N, dtype=torch.float64)
    return scale.unsqueeze(-1) * even() * scale


def operator_of(matrix: Tensor) -> LinearOperator:
    return LinearOperator.from_dense(matrix, symmetric=True, definite=True)


def counted(matrix: Tensor) -> tuple[LinearOperator, list[int]]:
    """Known by its products only, which are counted."""
    count = [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return matrix @ v

    return LinearOperator(product, len(matrix), symmetric=True, dtype=matrix.dtype, device="cpu"), count


def dense(P: Callable[[Tensor], Tensor], n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return P(torch.eye(n, dtype=dtype)).mT


def solve(matrix: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)


@every_recipe
@in_both_precisions
@pytest.mark.parametrize("matrix", [decaying(), badly_scaled()], ids=["decaying", "badly scaled"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_is_symmetric_positive_definite_and_of_the_size_of_the_inverse(
    recipe: Preconditioner, dtype: torch.dtype, matrix: Tensor, scale: float
):
    matrix = (scale * matrix).to(dtype)
    P = dense(recipe.build(operator_of(matrix)), dtype=dtype).double()
    eps = torch.finfo(dtype).eps
    assert (P - P.mT).abs().max() <= 10 * eps * P.abs().max()
    assert torch.linalg.eigvalsh((P + P.mT) / 2)[0] > 0
    # one lies within the spectrum of PA; 0.1 % for what float32 leaves of the Ritz values
    of_product = torch.linalg.eigvals(P @ matrix.double()).real
    assert of_product.min() <= 1.001
    assert of_product.max() >= 0.999


@every_recipe
def test_cost_is_the_number_of_products(recipe: Preconditioner):
    A, count = counted(decaying())
    assert recipe.cost(A) > 0
    recipe.build(A)
    assert count[0] == recipe.cost(A)


def test_exact_diagonal_of_a_remembered_matrix_costs_nothing():
    A, count = counted(decaying())
    A.to_dense()
    spent = count[0]
    assert Jacobi().cost(A) == 0
    Jacobi().build(A)
    assert count[0] == spent


@every_recipe
@in_both_precisions
def test_preconditioned_solve_equals_dense_solve(recipe: Preconditioner, dtype: torch.dtype):
    matrix, b = decaying(largest=100).to(dtype), draw(3, N, dtype=dtype)
    solution = CG(preconditioner=recipe).solve(operator_of(matrix), b)
    assert solution.converged, solution.reason
    # |x - x*| <= rtol |b| / smallest eigenvalue, which is 1
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}[dtype]
    torch.testing.assert_close(solution.value.double(), solve(matrix.double(), b.double()), rtol=0, atol=tolerance)


def test_jacobi_of_a_stack_equals_one_by_one():
    matrices, r = decaying(4), draw(3, 4, N)
    together = Jacobi().build(operator_of(matrices))(r)
    for i, matrix in enumerate(matrices):
        torch.testing.assert_close(together[:, i], Jacobi().build(operator_of(matrix))(r[:, i]))


def test_estimated_diagonals_and_sketches_serve_a_stack():
    dominant = torch.diag(torch.logspace(-3, 3, N, dtype=torch.float64)) + 1e-4
    for recipe, matrices in ((Jacobi(64), torch.stack([dominant, 2 * dominant])), (Nystrom(12), decaying(2))):
        A, b = operator_of(matrices), draw(3, 2, N)
        helped, bare = CG(1e-8, preconditioner=recipe).solve(A, b), CG(1e-8, max_iter=10 * N).solve(A, b)
        assert helped.converged, helped.reason
        assert helped.num_iter <= 0.5 * bare.num_iter
        residual = b - (matrices @ helped.value.unsqueeze(-1)).squeeze(-1)
        assert (residual.norm(dim=-1) <= 1e-8 * b.norm(dim=-1)).all()


@every_fitted
def test_fitted_recipe_refuses_a_stack_before_any_product(recipe: Preconditioner):
    def product(v: Tensor) -> Tensor:
        raise AssertionError

    A = LinearOperator(product, N, symmetric=True, dtype=torch.float64, device="cpu", batch_shape=(2,))
    with pytest.raises(ValueError, match=r"one system; got a stack of shape \(2,\).*Use Nystrom"):
        recipe.build(A)


@every_recipe
def test_refuses_an_operator_that_is_not_symmetric(recipe: Preconditioner):
    with pytest.raises(ValueError, match="needs a symmetric operator"):
        recipe.build(LinearOperator.from_dense(draw(N, N)))


@every_recipe
def test_nan_in_a_product_raises(recipe: Preconditioner):
    A = LinearOperator(lambda v: v * float("nan"), N, symmetric=True, dtype=torch.float64, device="cpu")
    with pytest.raises(FloatingPointError, match="NaN"):
        recipe.build(A)


@every_recipe
def test_leaves_its_argument_and_records_no_graph(recipe: Preconditioner):
    matrix, r = decaying().requires_grad_(), draw(2, N)
    before, P = r.clone(), recipe.build(operator_of(matrix))
    assert not P(r).requires_grad
    assert torch.equal(r, before)


@every_recipe
def test_is_built_once_per_operator_and_again_the_same(recipe: Preconditioner):
    A, count = counted(decaying())
    solver, r = CG(preconditioner=recipe), draw(N)
    first = solver.solve(A, r)
    second = solver.solve(A, r)
    assert first.num_matvec - second.num_matvec == recipe.cost(A)
    assert count[0] == first.num_matvec + second.num_matvec
    assert torch.equal(recipe.build(A)(r), recipe.build(A)(r))


# ---- Jacobi ----


def test_jacobi_is_the_inverse_diagonal():
    matrix, r = decaying(), draw(N)
    torch.testing.assert_close(Jacobi().build(operator_of(matrix))(r), r / matrix.diagonal())


def test_jacobi_undoes_any_scaling_of_the_unknowns():
    scaled, plain = badly_scaled(decades=12), even()
    # of D^-½ A D^-½, which is similar to P A, and symmetric
    spectra = [torch.linalg.eigvalsh(m / (m.diagonal().unsqueeze(-1) * m.diagonal()).sqrt()) for m in (scaled, plain)]
    torch.testing.assert_close(*spectra)
    P = Jacobi().build(operator_of(scaled))
    torch.testing.assert_close(torch.linalg.eigvals(P(scaled).mT).real.sort().values, spectra[1], rtol=1e-8, atol=0)


def test_jacobi_estimate_lies_within_its_standard_deviation():
    matrix, num_probes = decaying(), 64
    estimate = 1 / Jacobi(num_probes).build(operator_of(matrix))(torch.ones(N, dtype=torch.float64))
    variance = (matrix.square().sum(-1) - matrix.diagonal().square()) / num_probes
    # 40 entries within four standard deviations; the floor at the error moves an entry by one at most
    assert ((estimate - matrix.diagonal()).abs() <= 4 * variance.sqrt()).all()


def test_jacobi_takes_entries_lost_in_noise_for_as_large_as_the_noise():
    matrix = torch.ones(N, N, dtype=torch.float64) - torch.eye(N, dtype=torch.float64)  # the diagonal is zero
    P = Jacobi(16).build(LinearOperator.from_dense(matrix, symmetric=True))
    deviation = (N - 1) ** 0.5 / 4  # of a mean of 16
    assert 1 / P(torch.ones(N, dtype=torch.float64)).amax() > 0.4 * deviation


def test_jacobi_floors_and_absolute_values():
    matrix = torch.diag(torch.tensor([-4.0, 0.0, 2.0], dtype=torch.float64))
    ones = torch.ones(3, dtype=torch.float64)
    found = Jacobi().build(LinearOperator.from_dense(matrix, symmetric=True))(ones)
    torch.testing.assert_close(found[[0, 2]], torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert 0 < found[1] < torch.inf
    damped = LinearOperator(
        lambda v: torch.zeros_like(v), 3, symmetric=True, eigenvalue_floor=0.0, dtype=torch.float64, device="cpu"
    ).damped(0.5)
    torch.testing.assert_close(Jacobi().build(damped)(ones), 2 * ones)
    torch.testing.assert_close(Jacobi(16).build(damped)(ones), 2 * ones)
    nothing = LinearOperator(torch.zeros_like, 3, symmetric=True, dtype=torch.float64, device="cpu")
    assert torch.equal(Jacobi().build(nothing)(ones), ones)


# ---- Nyström ----


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_nystrom_equals_its_formula(damping: float):
    C = matrix_with(torch.logspace(0, -3, N, dtype=torch.float64))
    A = LinearOperator(
        lambda v: C @ v, N, symmetric=True, eigenvalue_floor=0.0, dtype=torch.float64, device="cpu"
    ).damped(damping)
    rank, seed = 6, 5
    omega = torch.randn(N, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    omega = torch.linalg.qr(omega).Q
    approximation = C @ omega @ torch.linalg.inv(omega.mT @ C @ omega) @ omega.mT @ C
    values, vectors = torch.linalg.eigh(approximation)
    values, U = values[-rank:], vectors[:, -rank:]
    flat = torch.eye(N, dtype=torch.float64) - U @ U.mT
    expected = U @ torch.diag(1 / (values + damping)) @ U.mT + flat / (values[0] + damping)
    P = dense(Nystrom(rank, seed=seed).build(A))
    # the inverse in `approximation` loses cond(ΩᵀCΩ) · eps ~ 1e-13; P is as large as 1 / values[0] ~ 1e1
    torch.testing.assert_close(P, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(dense(Nystrom(rank, damping=damping, seed=seed).build(A)), P, rtol=0, atol=0)


def test_nystrom_of_full_rank_is_the_inverse():
    matrix = decaying()
    P = dense(Nystrom(N).build(operator_of(matrix)))
    torch.testing.assert_close(P @ matrix, torch.eye(N, dtype=torch.float64), rtol=0, atol=1e-9)


def test_nystrom_finds_a_low_rank_matrix_and_its_damping():
    rows = draw(4, N)
    C = rows.mT @ rows
    A = LinearOperator(lambda v: C @ v, N, symmetric=True, eigenvalue_floor=0.0, dtype=torch.float64, device="cpu")
    damped = A.damped(1e-3)
    P = dense(Nystrom(5).build(damped))
    expected = torch.linalg.inv(C + 1e-3 * torch.eye(N, dtype=torch.float64))
    torch.testing.assert_close(P, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert CG(preconditioner=Nystrom(5)).solve(damped, draw(N)).num_iter <= 3


def test_nystrom_of_zero_and_of_an_indefinite_matrix_is_definite():
    zero = LinearOperator(torch.zeros_like, 5, symmetric=True, eigenvalue_floor=0.0, dtype=torch.float64, device="cpu")
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(dense(Nystrom(2).build(zero.damped(4.0)), 5), identity / 4)
    torch.testing.assert_close(dense(Nystrom(2).build(zero), 5), identity)
    indefinite = LinearOperator.from_dense(matrix_with(torch.linspace(-1, 1, N, dtype=torch.float64)), symmetric=True)
    assert torch.linalg.eigvalsh(dense(Nystrom(10).build(indefinite)))[0] > 0


# ---- fitted to pairs ----


def conjugate_pairs(matrix: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    recorder = Recorder(operator_of(matrix), count)
    CG(rtol=1e-14, max_iter=count, num_refinements=0).solve(recorder.operator, b)
    return recorder.pairs()


def test_recorder_keeps_the_first_products_although_the_solver_reuses_its_memory():
    matrix, b = decaying(), draw(2, N)
    vectors, images = conjugate_pairs(matrix, b, 4)
    assert vectors.shape == images.shape == (4, N)
    torch.testing.assert_close(images, vectors @ matrix, rtol=1e-12, atol=0)
    torch.testing.assert_close(vectors[:2], b / b.norm(dim=-1, keepdim=True))
    assert not torch.equal(vectors[2], vectors[0])


def test_deflation_with_exact_eigenvectors_is_its_formula():
    matrix = matrix_with(torch.logspace(-3, 3, N, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(matrix)
    chosen = torch.tensor([0, 1, N - 1])
    U, theta = vectors[:, chosen], values[chosen]
    P = dense(Deflation().fit(3 * U.mT, 3 * (matrix @ U).mT).product)
    s = theta.log().mean().exp()
    expected = U @ torch.diag(1 / theta) @ U.mT + (torch.eye(N, dtype=torch.float64) - U @ U.mT) / s
    torch.testing.assert_close(P, expected, rtol=1e-8, atol=1e-8)
    of_product = torch.linalg.eigvals(P @ matrix).real.sort().values
    rest = torch.cat((values[2:-1] / s, torch.ones(3, dtype=torch.float64))).sort().values
    torch.testing.assert_close(of_product, rest, rtol=1e-6, atol=0)


def test_deflation_leaves_out_ritz_vectors_that_say_nothing():
    matrix = torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64))
    v = torch.tensor([[0.9, 0.1]], dtype=torch.float64).sqrt()  # θ = 10.9, |A v - θ v| = 29.7
    torch.testing.assert_close(
        dense(Deflation().fit(v, v @ matrix).product, 2),
        torch.eye(2, dtype=torch.float64) / 10.9,
        rtol=1e-12,
        atol=1e-12,
    )


def lbfgs(vectors: Tensor, images: Tensor, gamma: Tensor) -> Tensor:
    """The inverse by the BFGS updates one after the other, as a matrix."""
    identity = torch.eye(vectors.shape[1], dtype=torch.float64)
    H = gamma * identity
    for s, y in zip(vectors, images, strict=True):
        rho = 1 / s.dot(y)
        left = identity - rho * torch.outer(s, y)
        H = left @ H @ left.mT + rho * torch.outer(s, s)
    return H


def test_quasi_newton_equals_bfgs_updates_for_conjugate_directions():
    matrix = matrix_with(torch.linspace(1, 20, N, dtype=torch.float64))
    vectors, images = conjugate_pairs(matrix, draw(N), 6)
    Q = torch.linalg.qr(vectors.mT).Q
    gamma = 1 / torch.linalg.eigvalsh(Q.mT @ matrix @ Q).log().mean().exp()
    P = dense(QuasiNewton().fit(vectors, images).product)
    torch.testing.assert_close(P, lbfgs(vectors, images, gamma), rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [0, 1, 2, 3, 1, 1]])
def test_quasi_newton_satisfies_every_secant_equation_in_any_order(order: list[int]):
    matrix = decaying()
    vectors = draw(4, N)[order]
    P = QuasiNewton().fit(vectors, vectors @ matrix).product
    torch.testing.assert_close(P(vectors @ matrix), vectors, rtol=0, atol=1e-7)
    reference = QuasiNewton().fit(draw(4, N), draw(4, N) @ matrix).product
    torch.testing.assert_close(dense(P), dense(reference), rtol=0, atol=1e-7)


@every_fitted
def test_pairs_of_a_solve_cut_the_next_one(recipe: Deflation | QuasiNewton):
    matrix, b = decaying(), draw(N)
    P = recipe.fit(*conjugate_pairs(matrix, b, 12)).product
    for right_hand_side in (b, draw(N, seed=1)):
        bare = CG().solve(operator_of(matrix), right_hand_side)
        with_pairs = CG(preconditioner=P).solve(operator_of(matrix), right_hand_side)
        assert with_pairs.converged
        assert with_pairs.num_iter <= 0.7 * bare.num_iter


@every_fitted
@pytest.mark.parametrize(
    ("vectors", "images", "error", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), ValueError, r"one shape \(m, n\); got \(2, 3, 4\)"),
        (torch.ones(2, 3), torch.ones(3, 3), ValueError, r"\(2, 3\) and \(3, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3), ValueError, "not zero"),
        (torch.eye(2, 3), -torch.eye(2, 3), ValueError, "no positive curvature.*MINRES"),
        (torch.eye(2, 3), torch.full((2, 3), torch.nan), FloatingPointError, "NaN"),
    ],
)
def test_refuses_pairs_that_do_not_fit(
    recipe: Deflation | QuasiNewton, vectors: Tensor, images: Tensor, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        recipe.fit(vectors, images)


def test_recorder_without_products_says_so():
    with pytest.raises(ValueError, match="no pairs were recorded"):
        Recorder(operator_of(decaying()), 3).pairs()


def test_recorder_frees_the_operator_without_the_garbage_collector():
    A = operator_of(decaying())
    watched = weakref.ref(A)
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        recorder = Recorder(A, 3)
        _ = recorder.operator @ draw(2, N)
        assert recorder.pairs()[0].shape == (2, N)
        del recorder, A
        assert watched() is None
    finally:
        gc.enable()


# ---- what they save ----


@pytest.mark.parametrize(
    ("recipe", "matrix"),
    [
        (Jacobi(), badly_scaled()),
        (Jacobi(64), torch.diag(torch.logspace(-3, 3, N, dtype=torch.float64)) + 1e-4),
        (Nystrom(12), decaying()),
        (Deflation(12), decaying()),
        (QuasiNewton(12), decaying()),
    ],
    ids=["exact diagonal", "estimated diagonal", "Nystrom", "Deflation", "QuasiNewton"],
)
def test_halves_the_iterations_on_the_problem_it_is_for(recipe: Preconditioner, matrix: Tensor):
    b = draw(N)
    bare = CG(rtol=1e-8, max_iter=10 * N).solve(operator_of(matrix), b)
    helped = CG(rtol=1e-8, preconditioner=recipe).solve(operator_of(matrix), b)
    assert helped.converged, helped.reason
    assert helped.num_iter <= 0.5 * bare.num_iter


def test_known_inverse_of_another_operator_is_a_preconditioner():
    """Low rank rows (M-FAC) and Kronecker factors come this way: the approximation B damped, and its inverse."""
    rows, rest = draw(6, N), 0.1 * matrix_with(torch.linspace(0.5, 1.5, N, dtype=torch.float64))
    A, b = operator_of(rows.mT @ rows + rest), draw(N)
    B = LowRankInverse(rows, damping=1.0).operator()
    inverse = B.damped(0.1 - 1.0).known_inverse
    assert inverse is not None
    helped, bare = CG(preconditioner=inverse).solve(A, b), CG().solve(A, b)
    assert helped.converged
    torch.testing.assert_close(helped.value, solve(A.to_dense(), b), rtol=0, atol=1e-7)
    assert helped.num_iter < bare.num_iter
    assert CG(preconditioner=LowRankInverse(rows, damping=0.1).apply).solve(A, b).num_iter == helped.num_iter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jacobi(8), "Jacobi.num_probes=....*at least 16; got 8"),
        (lambda: Nystrom(0), "Nystrom.rank=....*at least 1; got 0"),
        (lambda: Nystrom(2, damping=-1.0), "Nystrom.damping=....*at least 0.*got -1.0"),
        (lambda: Nystrom(2, damping=torch.inf), "finite.*got inf"),
        (lambda: Nystrom(N + 1).build(operator_of(decaying())), "rank <= n = 40.*Cholesky"),
        (lambda: Deflation(0), "Deflation.num_pairs=....*at least 1; got 0"),
        (lambda: QuasiNewton(0), "QuasiNewton.num_pairs=....*at least 1; got 0"),
    ],
)
def test_refuses_hyperparameters_out_of_range(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


MATRIX = torch.eye(N, dtype=torch.float64)


@pytest.mark.parametrize("solver", [CG, BlockCG])
@pytest.mark.parametrize(
    ("preconditioner", "message"),
    [
        (LinearOperator.from_dense(MATRIX, symmetric=True), r"got LinearOperator\(size=40.*\.known_inverse"),
        (MATRIX, "got Tensor.*lambda r: r @ P"),
        (Jacobi, r"got the class Jacobi.*Jacobi\(\)"),
        (3, "got int"),
    ],
    ids=["operator", "tensor", "class", "number"],
)
def test_conjugate_gradients_refuse_what_is_no_preconditioner(solver: type, preconditioner: object, message: str):
    with pytest.raises(ValueError, match=rf"{solver.__name__}\(preconditioner=\.\.\.\) needs .*{message}"):
        solver(preconditioner=preconditioner)


@pytest.mark.parametrize("solver", [GMRES, BiCGSTAB])
def test_a_class_is_no_right_preconditioner(solver: type):
    with pytest.raises(ValueError, match=r"needs a function r -> z; got <class .*Jacobi'>"):
        solver(preconditioner=Jacobi)
