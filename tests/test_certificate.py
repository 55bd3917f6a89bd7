"""Bounds on errors hold, are called rigorous only when proven, and are as tight as they are said to be."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.linalg import CG, GMRES, LU, Auto, Cholesky, LinearOperator, Neumann, certificate
from tests.cases import CONDITIONS

RIDGE, AFFINE = CONDITIONS[0], CONDITIONS[2]
N, Q = 60, 4


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def semidefinite(seed: int) -> Tensor:
    """Eigenvalues that decay like 1/k², up to 1."""
    q = torch.linalg.qr(draw(N, N, seed=seed))[0]
    return (q / torch.arange(1, N + 1, dtype=torch.float64) ** 2) @ q.mT


def by_products(matrix: Tensor, floor: float | None = None) -> LinearOperator:
    return LinearOperator(
        lambda v: v @ matrix,
        len(matrix),
        symmetric=True,
        eigenvalue_floor=floor,
        dtype=matrix.dtype,
        device="cpu",
    )


TRIALS = [
    (seed, damping, rtol)
    for seed, damping in enumerate([1e-4, 1e-3, 1e-2, 1e-1, 1.0] * 4)
    for rtol in (1e-1, 1e-2, 1e-4, 1e-6)
]


def test_damped_semidefinite_operators_give_bounds_that_are_never_violated():
    ratios = []
    for seed, damping, rtol in TRIALS:
        A, b = by_products(semidefinite(seed), floor=0.0).damped(damping), draw(N, seed=seed + 100)
        solution = CG(rtol=rtol).solve(A, b)
        bound = certificate.solution_error(A, b, solution)
        error = torch.linalg.vector_norm(solution.value - torch.linalg.solve(A.to_dense(), b)).item()
        assert bound is not None and bound.rigorous and bound.source == "eigenvalue floor"
        assert error <= bound.value
        ratios.append(bound.value / error)
    assert torch.tensor(ratios).median() < 50


def test_bounds_from_ritz_values_are_called_estimates():
    for seed, damping, rtol in TRIALS:
        A, b = by_products(semidefinite(seed)).damped(damping), draw(N, seed=seed + 100)
        solution = CG(rtol=rtol).solve(A, b)
        bound = certificate.solution_error(A, b, solution)
        assert bound is not None and not bound.rigorous and bound.source == "Ritz values"
        assert str(bound).startswith("<~")


@pytest.mark.parametrize("solver", [Cholesky(), LU(), Auto()])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_norm_of_a_dense_inverse_is_bounded_within_a_factor_of_root_n(solver, batch: tuple[int, ...]):
    matrix = draw(*batch, N, N, seed=1)
    matrix = matrix @ matrix.mT / N + 0.01 * torch.eye(N, dtype=torch.float64)
    A, b = LinearOperator.from_dense(matrix, symmetric=True), draw(*batch, N, seed=2)
    norm = certificate.inverse_norm(A, None)
    exact = torch.linalg.matrix_norm(torch.linalg.inv(matrix), 2).max().item()
    assert norm is not None and norm.rigorous and exact <= norm.value <= exact * N**0.5
    solution = solver.solve(A, b)
    bound = certificate.solution_error(A, b, solution)
    error = torch.linalg.vector_norm(solution.value - torch.linalg.solve(matrix, b), dim=-1).max()
    assert bound is not None and error <= bound.value


def test_inverse_of_a_singular_matrix_has_no_bound():
    A = LinearOperator.from_dense(torch.zeros(2, 2), symmetric=True)
    norm = certificate.inverse_norm(A, None)
    assert norm is not None and norm.value == float("inf")


def test_nothing_known_means_no_bound():
    matrix = torch.eye(N, dtype=torch.float64) + 0.1 * semidefinite(0)
    A = LinearOperator(lambda v: v @ matrix, N, rmatvec=lambda v: v @ matrix.mT, dtype=matrix.dtype, device="cpu")
    for solver in (GMRES(), Neumann(20)):
        assert certificate.solution_error(A, draw(N, seed=0), solver.solve(A, draw(N, seed=0))) is None


@pytest.mark.parametrize(("rows", "columns", "rigorous"), [(N, 5, True), (3, N, True), (N, 30, False)])
def test_norm_of_a_rectangular_operator(rows: int, columns: int, rigorous: bool):
    matrix = draw(rows, columns, seed=5)
    norm = certificate.norm_bound(LinearOperator.from_dense(matrix))
    exact = torch.linalg.matrix_norm(matrix, 2).item()
    assert norm.rigorous == rigorous
    assert exact <= norm.value <= exact * max(min(rows, columns) ** 0.5 if rigorous else 1.25, 1.0)


def test_dual_weights_correct_the_product_and_bound_what_is_left():
    cuts, tightness = [], []
    for seed, damping, rtol in TRIALS:
        dense = semidefinite(seed) + damping * torch.eye(N, dtype=torch.float64)
        A = by_products(semidefinite(seed), floor=0.0).damped(damping)
        columns, s = draw(N, Q, seed=seed + 200), draw(N, seed=seed + 300)
        B = LinearOperator.from_dense(columns)
        solution = CG(rtol=rtol).solve(A, s)
        exact = columns.mT @ torch.linalg.solve(dense, s)
        plain_error = torch.linalg.vector_norm(exact - columns.mT @ solution.value).item()
        norm = certificate.inverse_norm(A, None)
        assert norm is not None
        weighted = certificate.dual_weighted(A, B, s - dense @ solution.value, norm, CG(rtol=0.1))
        error = torch.linalg.vector_norm(exact - columns.mT @ solution.value - weighted.correction).item()
        assert error <= weighted.bound.value and weighted.bound.rigorous
        plain = certificate.product_error(B, certificate.solution_error(A, s, solution))  # pyright: ignore
        assert plain_error <= plain.value and plain.rigorous
        cuts.append(plain_error / error)
        tightness.append(weighted.bound.value / plain_error)
    assert torch.tensor(cuts).median() >= 5
    assert torch.tensor(tightness).median() <= 3


def test_dual_weighted_bounds_hold_down_to_rounding():
    """Condition 1e3 and an adjoint to 1e-3: the bound is of the size of rounding, and still one."""
    q = torch.linalg.qr(draw(30, 30, seed=0))[0]
    matrix = (q * torch.logspace(0, 3, 30, dtype=torch.float64)) @ q.mT
    matrix = (matrix + matrix.mT) / 2
    for seed in range(20):
        columns, c, x = draw(30, 3, seed=seed + 1), draw(30, seed=seed + 100), draw(3, seed=seed + 200)
        condition = ig.Stationary(
            lambda x, y, m=matrix, B=columns: 0.5 * y @ m @ y - y @ (B @ x), strong_convexity=0.99
        )
        y = torch.linalg.solve(matrix, columns @ x)
        h = ig.hypergradient(lambda x, y, c=c: c @ y, condition, x, y, solver=CG(rtol=1e-3), dual_weighted=True)
        error = torch.linalg.vector_norm(h.value - columns.mT @ torch.linalg.solve(matrix, c)).item()
        assert h.certificate.adjoint is not None and error <= h.certificate.adjoint.value


def test_noisy_products_and_ill_conditioned_matrices_prove_nothing():
    matrix = torch.diag(torch.linspace(0.01, 1, 6, dtype=torch.float64))
    noisy = matrix + 1e-3 * draw(6, 6, seed=0)
    A = LinearOperator(
        lambda v: v @ noisy.mT, 6, rmatvec=lambda v: v @ noisy, noise=1e-3, dtype=torch.float64, device="cpu"
    )
    b = torch.ones(6, dtype=torch.float64)
    solution = LU(rtol=1e-12).solve(A, b)
    bound = certificate.solution_error(A, b, solution)
    assert bound is not None and not bound.rigorous and bound.value > 0.1
    index = torch.arange(8.0)
    hilbert = 1 / (index.unsqueeze(-1) + index + 1)
    norm = certificate.inverse_norm(LinearOperator.from_dense(hilbert, symmetric=True), None)
    exact = torch.linalg.matrix_norm(torch.linalg.inv(hilbert.double()), 2).item()
    assert norm is not None and norm.value >= 0.999 * exact


def test_a_floor_that_is_too_high_is_found_out():
    matrix = semidefinite(0) + 0.1 * torch.eye(N, dtype=torch.float64)
    A, b = by_products(matrix, floor=0.2), draw(N, seed=1)
    with pytest.raises(ValueError, match=r"declared to be at least 2.000e-01.* is 1\.\d+e-01"):
        certificate.check_floor(A, CG().solve(A, b))
    certificate.check_floor(by_products(matrix, floor=0.1), CG().solve(by_products(matrix, floor=0.1), b))
    for floor, solver in ((0.2, Cholesky()), (0.1, Cholesky())):
        A = by_products(matrix, floor=floor)
        solution = solver.solve(A, b)
        if floor == 0.2:
            with pytest.raises(ValueError, match="declared to be at least 2.000e-01"):
                certificate.check_floor(A, solution)
        else:
            certificate.check_floor(A, solution)


# --- the certificate of a hypergradient -------------------------------------------------------------------------------


def upper(x: Tensor, y: Tensor) -> Tensor:
    return (y - torch.tensor([0.3, -0.1, 0.2])).square().sum() + 0.1 * x.square().sum()


def exact_hypergradient() -> Tensor:
    return torch.func.grad(lambda x: upper(x, RIDGE.exact(x, *RIDGE.data)))(RIDGE.x)


@pytest.mark.parametrize("declared", [False, True])
def test_an_unfinished_adjoint_is_bounded_and_corrected(declared: bool):
    assert isinstance(RIDGE.condition, ig.Stationary)
    condition = replace(RIDGE.condition, strong_convexity=0.6) if declared else RIDGE.condition
    y = RIDGE.exact(RIDGE.x, *RIDGE.data)
    arguments = (upper, condition, RIDGE.x, y, *RIDGE.data)
    plain = ig.hypergradient(*arguments, solver=CG(rtol=0.3, max_iter=1), on_unconverged="ignore")
    weighted = ig.hypergradient(
        *arguments, solver=CG(rtol=0.3, max_iter=1), dual_weighted=True, on_unconverged="ignore"
    )
    error = torch.linalg.vector_norm(plain.value - exact_hypergradient()).item()
    left = torch.linalg.vector_norm(weighted.value - exact_hypergradient()).item()
    for h, size in ((plain, error), (weighted, left)):
        assert h.certificate.adjoint is not None
        assert h.certificate.adjoint.rigorous == declared
        assert size <= h.certificate.adjoint.value + 1e-15  # rounding of h itself, which is of size 0.1
    assert error > 1e-4 and left < error / 5
    assert plain.certificate.inner is None and "needs strong_convexity" in str(plain.certificate)
    assert plain.certificate.bound == float("inf") and not plain.certificate.rigorous


def test_constants_of_the_user_certify_the_error_of_y():
    assert isinstance(RIDGE.condition, ig.Stationary)
    condition = replace(RIDGE.condition, strong_convexity=0.6)
    off = 1.01 * RIDGE.exact(RIDGE.x, *RIDGE.data)
    h = ig.hypergradient(upper, condition, RIDGE.x, off, *RIDGE.data, lipschitz=10.0, on_unconverged="ignore")
    error = torch.linalg.vector_norm(h.value - exact_hypergradient()).item()
    assert error <= h.certificate.bound < 1.0
    assert h.certificate.rigorous and "not certified" not in str(h.certificate)
    with pytest.raises(ValueError, match="lipschitz must be a positive number"):
        ig.hypergradient(upper, condition, RIDGE.x, off, *RIDGE.data, lipschitz=0.0)


def test_dense_matrices_certify_any_condition():
    y = AFFINE.exact(AFFINE.x, *AFFINE.data)
    h = ig.hypergradient(upper, AFFINE.condition, AFFINE.x, y, *AFFINE.data)
    assert h.certificate.adjoint is not None and h.certificate.adjoint.rigorous
    assert h.certificate.adjoint.value < 1e-12


def test_a_false_constant_is_refused_on_every_road():
    assert isinstance(RIDGE.condition, ig.Stationary)
    condition = replace(RIDGE.condition, strong_convexity=50.0)
    y, x = RIDGE.exact(RIDGE.x, *RIDGE.data), RIDGE.x.clone().requires_grad_()
    with pytest.raises(ValueError, match="strong_convexity"):
        ig.hypergradient(upper, condition, x, y, *RIDGE.data, solver=CG())
    for solver in (CG(), None):
        with pytest.raises(ValueError, match="strong_convexity"):
            ig.implicit_root(condition, x, y, *RIDGE.data, solver=solver).sum().backward()


def test_every_backward_reports_a_bound_where_one_is_free():
    assert isinstance(RIDGE.condition, ig.Stationary)
    y, x = RIDGE.exact(RIDGE.x, *RIDGE.data), RIDGE.x.clone().requires_grad_()
    for condition, rigorous in ((RIDGE.condition, False), (replace(RIDGE.condition, strong_convexity=0.6), True)):
        with ig.diagnostics() as log:
            ig.implicit_root(condition, x, y, *RIDGE.data, solver=CG()).sum().backward()
        bound = log[-1].last.error_bound
        assert bound is not None and bound.rigorous == rigorous and str(bound) in str(log)


def test_a_corrected_hypergradient_has_no_certificate_of_another_one():
    y = RIDGE.exact(RIDGE.x, *RIDGE.data)
    h = ig.hypergradient(upper, RIDGE.condition, RIDGE.x, y, *RIDGE.data, correct=True)
    assert h.certificate.adjoint is None and "correct=False" in str(h.certificate)
    with pytest.raises(ValueError, match="choose one"):
        ig.hypergradient(upper, RIDGE.condition, RIDGE.x, y, *RIDGE.data, correct=True, dual_weighted=True)


def test_dual_weights_are_for_few_upper_variables():
    condition = ig.Stationary(lambda x, y: (y - x).square().sum())
    with pytest.raises(ValueError, match="at most 8 numbers"):
        ig.hypergradient(lambda x, y: y.sum(), condition, torch.ones(9), torch.ones(9), dual_weighted=True)
    with pytest.raises(ValueError, match=r"at most 8; got 9"):
        identity = LinearOperator.from_dense(torch.eye(9), symmetric=True)
        norm = certificate.NormBound(1.0, True, "")
        certificate.dual_weighted(identity, identity, torch.ones(9), norm, CG())


def test_another_curvature_takes_the_place_of_the_hessian_and_its_error_is_seen():
    y = RIDGE.exact(RIDGE.x, *RIDGE.data)
    X = RIDGE.data[0]
    hessian = X.mT @ X / len(X) + RIDGE.x.exp().diag()

    def curvature(factor: float):
        return lambda x, y, *data: LinearOperator.from_dense(factor * hessian, symmetric=True)

    run = lambda factor: ig.hypergradient(upper, RIDGE.condition, RIDGE.x, y, *RIDGE.data, curvature=curvature(factor))
    assert torch.allclose(run(1.0).value, exact_hypergradient(), rtol=1e-12)
    for factor in (1.1, 0.6, 100.0):  # a far one too: corrections with it are a slow geometric series
        rough = run(factor)
        error = torch.linalg.vector_norm(rough.value - exact_hypergradient()).item()
        assert error > 1e-3 and 0.8 < rough.error_estimate / error < 1.2
        assert rough.certificate.adjoint is None or rough.certificate.adjoint.value >= error
        assert "true adjoint residual" in str(rough.report)
    assert run(0.4).error_estimate == float("inf")  # corrections diverge
    arguments = (upper, RIDGE.condition, RIDGE.x, y, *RIDGE.data)
    with pytest.raises(TypeError, match="must return a LinearOperator"):
        ig.hypergradient(*arguments, curvature=lambda *a: hessian)
    with pytest.raises(ValueError, match="must act on the flat y"):
        ig.hypergradient(*arguments, curvature=lambda *a: LinearOperator.from_dense(torch.eye(2), symmetric=True))
