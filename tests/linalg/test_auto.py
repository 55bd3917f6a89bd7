"""What Auto chooses, and that whatever it returns is solved or flagged."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg import Auto, LinearOperator, Solution


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(eigenvalues: list[float]) -> LinearOperator:
    q, _ = torch.linalg.qr(rows(len(eigenvalues), len(eigenvalues)))
    matrix = q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.mT
    return LinearOperator.from_dense((matrix + matrix.mT) / 2, symmetric=True)


DEFINITE = symmetric([1.0, 2.0, 3.0, 4.0])
INDEFINITE = symmetric([-1.0, 2.0, -3.0, 4.0])
NONSYMMETRIC = LinearOperator.from_dense(rows(4, 4))


@pytest.mark.parametrize(
    ("A", "dense_size", "solver", "words"),
    [
        (DEFINITE, 4, "Cholesky", "n = 4 <= dense_size = 4, symmetric"),
        (INDEFINITE, 4, "LU", "n = 4 <= dense_size = 4; Cholesky found the matrix not positive definite"),
        (NONSYMMETRIC, 4, "LU", "n = 4 <= dense_size = 4, not symmetric"),
        (DEFINITE, 3, "CG", "n = 4 > dense_size = 3, symmetric"),
        (INDEFINITE, 3, "MINRES", "n = 4 > dense_size = 3; CG met negative curvature after"),
        (NONSYMMETRIC, 3, "GMRES", "n = 4 > dense_size = 3, not symmetric"),
    ],
)
def test_says_what_it_chose_and_why(A: LinearOperator, dense_size: int, solver: str, words: str):
    solution = Auto(dense_size=dense_size).solve(A, rows(4))
    assert solution.converged
    assert solution.solver == solver
    assert solution.reason.startswith(f"{solver} ({words}")
    assert solution.reason.endswith("): converged")


@pytest.mark.parametrize("dense_size", [0, 100])
def test_counts_the_products_of_a_failed_attempt(dense_size: int):
    matrix, count = INDEFINITE.to_dense(), [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return matrix @ v

    A = LinearOperator(product, 4, symmetric=True, dtype=torch.float64, device="cpu")
    solution = Auto(dense_size=dense_size).solve(A, rows(4))
    assert solution.solver in ("LU", "MINRES")
    assert solution.num_matvec == count[0]


def test_a_failed_cholesky_is_not_tried_again(monkeypatch: pytest.MonkeyPatch):
    A = symmetric([-1.0, 2.0, -3.0, 4.0])
    Auto().solve(A, rows(4))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: pytest.fail("a second attempt"))
    monkeypatch.setattr(torch.linalg, "lu_factor_ex", lambda matrix: pytest.fail("a second attempt"))
    assert Auto().solve(A, rows(4)).solver == "LU"


def test_hands_its_tolerance_on():
    assert not Auto(rtol=1e-16).solve(symmetric([1e-9, 1.0, 3.0]), rows(3)).converged
    assert Auto(rtol=1e-2, dense_size=0).solve(DEFINITE, rows(4)).num_iter < 4


def by_products(matrix: Tensor, symmetric: bool = True, **declared: object) -> tuple[LinearOperator, list[int]]:
    """An operator that knows nothing but products, and how many vectors it has multiplied so far."""
    count = [0]

    def product(v: Tensor) -> Tensor:
        count[0] += v.numel() // len(matrix)
        return v @ matrix.mT

    A = LinearOperator(
        product,
        len(matrix),
        rmatvec=lambda v: v @ matrix,
        matmat=product,
        symmetric=symmetric,
        dtype=matrix.dtype,
        device="cpu",
        **declared,  # pyright: ignore[reportArgumentType]
    )
    return A, count


def spread_spectrum(n: int, condition: float) -> Tensor:
    q, _ = torch.linalg.qr(rows(n, n))
    return (q * torch.logspace(-math.log10(condition), 0, n, dtype=torch.float64)) @ q.mT


def is_solved(matrix: Tensor, solution: Solution, b: Tensor) -> bool:
    residual = torch.linalg.vector_norm(b - solution.value @ matrix.mT, dim=-1)
    return solution.converged and bool((residual <= 1.01e-10 * torch.linalg.vector_norm(b, dim=-1)).all())


def test_a_known_inverse_is_used_and_a_wrong_one_is_not_trusted():
    matrix, b = spread_spectrum(8, 10.0), rows(8)
    for factor, solver in ((1.0, "KnownInverse"), (1.5, "CG")):
        inverse = lambda lam, f=factor: lambda v: f * v @ torch.linalg.inv(matrix)
        A, count = by_products(matrix, definite=True, shifted_inverse=inverse)
        solution = Auto(dense_size=0).solve(A, b)
        assert solution.solver == solver and is_solved(matrix, solution, b)
        assert solution.num_matvec == count[0]
    assert "the inverse that the operator knows left a residual" in solution.reason


def test_a_start_is_not_given_up_for_a_worse_inverse():
    matrix, b = spread_spectrum(8, 10.0), rows(8)
    wrong = lambda lam: lambda v: 50 * v
    A, _ = by_products(matrix, definite=True, shifted_inverse=wrong)
    assert Auto(dense_size=0).solve(A, b, torch.linalg.solve(matrix, b)).num_iter == 0
    assert is_solved(matrix, Auto(dense_size=0).solve(A, b), b)


def test_many_right_hand_sides_share_a_krylov_space():
    matrix, b = spread_spectrum(60, 100.0), rows(4, 60)
    A, count = by_products(matrix)
    solution = Auto(dense_size=10).solve(A, b)
    assert solution.solver == "BlockCG" and "4 right-hand sides" in solution.reason
    assert is_solved(matrix, solution, b) and solution.num_matvec == count[0]
    assert Auto(dense_size=10).solve(A, b[:3]).solver == "CG"


def test_very_many_right_hand_sides_share_a_matrix():
    matrix, b = spread_spectrum(60, 100.0), rows(6, 60)
    A, count = by_products(matrix)
    solution = Auto(dense_size=15).solve(A, b)
    assert solution.solver == "Cholesky" and "6 right-hand sides share a matrix" in solution.reason
    assert is_solved(matrix, solution, b) and solution.num_matvec == count[0] == 66
    assert Auto(dense_size=15).solve(by_products(matrix)[0], b[:5]).solver == "BlockCG"


def test_slow_cg_gives_way_to_the_matrix_where_that_is_cheaper():
    matrix, b = spread_spectrum(240, 1e7), rows(240)
    A, count = by_products(matrix)
    solution = Auto(dense_size=60).solve(A, b)
    assert solution.solver == "Cholesky" and is_solved(matrix, solution, b)
    assert "CG left" in solution.reason and "after 200 iterations" in solution.reason
    assert solution.num_matvec == count[0] <= 200 + 240 + 4
    before = count[0]
    again = Auto(dense_size=60).solve(A, rows(240, seed=1))
    assert "the matrix is there from an earlier solve" in again.reason
    assert count[0] - before == again.num_matvec <= 2


def test_badly_scaled_unknowns_get_a_diagonal_preconditioner_and_keep_it():
    scales = torch.logspace(-5, 0, 300, dtype=torch.float64)
    matrix, b = torch.diag(scales) + 1e-6 * spread_spectrum(300, 10.0), rows(300)
    A, count = by_products(matrix)
    solution = Auto(rtol=1e-8, dense_size=10).solve(A, b)
    assert solution.converged and ": kept)" in solution.reason
    assert solution.num_matvec == count[0]
    again = Auto(rtol=1e-8, dense_size=10).solve(A, b)
    assert again.converged and "kept from an earlier solve" in again.reason
    assert again.num_iter < 200


def test_a_preconditioner_that_does_not_pay_is_dropped():
    matrix, b = spread_spectrum(400, 1e5), rows(400)  # its diagonal is nearly constant
    A, count = by_products(matrix)
    solution = Auto(rtol=1e-6, dense_size=10).solve(A, b)
    assert ": dropped)" in solution.reason and solution.converged
    assert solution.num_matvec == count[0]
    before = count[0]
    assert Auto(rtol=1e-6, dense_size=10).solve(A, b).num_matvec == count[0] - before  # the test is not made again


def test_gmres_gives_way_when_it_stagnates():
    shift = torch.roll(torch.eye(120, dtype=torch.float64), 1, 0)  # every cycle of GMRES but the last gains nothing
    b = rows(120)
    for dense_size, solver in ((30, "LU"), (10, "BiCGSTAB")):
        A, count = by_products(shift, symmetric=False)
        solution = Auto(dense_size=dense_size).solve(A, b)
        assert "GMRES stagnated" in solution.reason
        assert solution.num_matvec == count[0]
        if solver == "LU":
            assert solution.solver == "LU" and is_solved(shift, solution, b)
        else:
            assert not solution.converged or is_solved(shift, solution, b)


def test_a_basis_too_large_for_memory_is_avoided(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("implicitgrad.linalg.auto.LARGEST_BASIS", 30 * 4 * 8)
    solution = Auto(dense_size=0).solve(NONSYMMETRIC, rows(4))
    assert solution.solver == "BiCGSTAB" and "a basis for GMRES would take 31 times b" in solution.reason


@st.composite
def systems(draw: st.DrawFn) -> tuple[LinearOperator, Tensor, Tensor]:
    """Small systems with eigenvalues or singular values over up to 14 decades, and scales over 24."""
    n, seed = draw(st.integers(1, 12)), draw(st.integers(0, 10**6))
    decades = draw(st.sampled_from([0.5, 3.0, 8.0, 14.0]))
    scale = 10.0 ** draw(st.integers(-12, 12))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    kind = draw(st.sampled_from(["indefinite", "badly scaled", "nonsymmetric"]))
    q, _ = torch.linalg.qr(rows(n, n, seed=seed))
    spread = torch.logspace(0, -decades, n, dtype=torch.float64)
    if kind == "indefinite":
        matrix = q @ torch.diag(spread * rows(n, seed=seed + 1).sign()) @ q.mT
    elif kind == "badly scaled":
        matrix = spread.sqrt().unsqueeze(-1) * (q @ torch.diag(1 + spread) @ q.mT) * spread.sqrt()
    else:
        matrix = q @ torch.diag(spread) @ torch.linalg.qr(rows(n, n, seed=seed + 2))[0]
    if kind != "nonsymmetric":
        matrix = (matrix + matrix.mT) / 2
    matrix = (scale * matrix).to(dtype)
    b = (10.0 ** draw(st.integers(-12, 12)) * rows(n, seed=seed + 3)).to(dtype)
    return LinearOperator.from_dense(matrix, symmetric=kind != "nonsymmetric"), matrix, b


@settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(systems(), st.sampled_from([0, 1000]))
def test_random_systems_are_solved_to_tolerance_or_flagged(system: tuple[LinearOperator, Tensor, Tensor], dense: int):
    A, matrix, b = system
    rtol = 1e-10 if b.dtype == torch.float64 else 1e-5
    try:
        solution = Auto(dense_size=dense).solve(A, b)
    except (LinAlgError, FloatingPointError) as error:
        assert "singular" in str(error)  # a matrix with 14 decades in float32
        return
    assert solution.value.isfinite().all()
    relative = (b.double() - matrix.double() @ solution.value.double()).norm() / b.double().norm()
    assert not solution.converged or relative <= 1.5 * rtol
    torch.testing.assert_close(
        solution.relative_residual.double(),
        relative,
        rtol=0.5,
        atol=20 * torch.finfo(b.dtype).eps * size_of(A, solution.value, b),
    )


def size_of(A: LinearOperator, x: Tensor, b: Tensor) -> float:
    """|A| |x| / |b|: the rounding of a residual in units of eps."""
    return (A.to_dense().double().norm() * x.double().norm() / b.double().norm()).item()
