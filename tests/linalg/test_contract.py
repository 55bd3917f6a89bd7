"""What every linear solver promises; the cases come from tests/cases.py."""

from functools import partial

import pytest
import torch
from torch import Tensor

from implicitgrad.linalg import LinearOperator, LinearSolver
from tests.cases import SOLVERS, SolverCase

N = 12
KINDS = {
    "definite": ("definite",),
    "symmetric": ("definite", "indefinite"),
    "square": ("definite", "indefinite", "nonsymmetric"),
    "contraction": ("definite", "nonsymmetric"),
}
PERMITTED = [pytest.param(case, kind, id=f"{case}-{kind}") for case in SOLVERS for kind in KINDS[case.needs]]
# the step of a Neumann series is in units of 1 / A
SCALABLE = [pair for pair in PERMITTED if "Neumann" not in str(pair.id)]
SYMMETRIC_ONLY = [case for case in SOLVERS if case.needs in ("definite", "symmetric")]
NAMES = "|".join(sorted({type(case.solver).__name__ for case in SOLVERS}))
CAPPED = [pytest.param(case, id=str(case)) for case in SOLVERS if case.capped is not None]
ITERATING = ("cg", "minres", "gmres", "bicgstab", "lsmr", "cgls", "neumann", "chebyshev", "block_cg")

every_solver = pytest.mark.parametrize("case", SOLVERS, ids=str)
every_system = pytest.mark.parametrize(("case", "kind"), PERMITTED)


def matrix_of(kind: str, batch: tuple[int, ...] = (), n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    """Singular values between 0.5 and 1.5; I - M has spectral radius below one unless M is indefinite."""
    generator = torch.Generator().manual_seed(7)
    q, _ = torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64))
    if kind == "nonsymmetric":
        return (torch.eye(n, dtype=torch.float64) + 0.5 * q).to(dtype)
    eigenvalues = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    if kind == "indefinite":
        eigenvalues[: (n + 1) // 2] *= -1
    return (q @ (eigenvalues.unsqueeze(-1) * q.mT)).to(dtype)


def operator_of(matrix: Tensor, kind: str) -> LinearOperator:
    return LinearOperator.from_dense(matrix, symmetric=kind != "nonsymmetric", definite=kind == "definite")


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


def exact(matrix: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)


def any_kind(case: SolverCase) -> str:
    return KINDS[case.needs][0]


@every_system
def test_equals_dense_solve(case: SolverCase, kind: str):
    matrix, b = matrix_of(kind), rows(N)
    solution = case.solver.solve(operator_of(matrix, kind), b)
    assert solution.converged, solution.reason
    torch.testing.assert_close(solution.value, exact(matrix, b), rtol=0, atol=1e-9)


@every_system
def test_residual_is_the_true_one(case: SolverCase, kind: str):
    matrix, b = matrix_of(kind), rows(3, N)
    solution = case.solver.solve(operator_of(matrix, kind), b)
    residual = torch.linalg.vector_norm(b - solution.value @ matrix.mT, dim=-1)
    torch.testing.assert_close(solution.residual_norm, residual, rtol=0, atol=1e-14)
    torch.testing.assert_close(solution.relative_residual, residual / b.norm(dim=-1), rtol=0, atol=1e-14)
    assert solution.residual_norm.shape == (3,)


@every_system
def test_warm_start_at_the_solution_needs_no_iterations(case: SolverCase, kind: str):
    matrix, b = matrix_of(kind), rows(N)
    solution = case.solver.solve(operator_of(matrix, kind), b, exact(matrix, b))
    assert solution.converged
    assert solution.num_iter == 0


@every_system
def test_any_start_leads_to_the_solution(case: SolverCase, kind: str):
    matrix, b = matrix_of(kind), rows(N)
    solution = case.solver.solve(operator_of(matrix, kind), b, 10 * rows(2, N)[1])
    assert solution.converged
    torch.testing.assert_close(solution.value, exact(matrix, b), rtol=0, atol=1e-9)


@every_solver
def test_zero_right_hand_side_costs_nothing(case: SolverCase):
    kind = any_kind(case)
    solution = case.solver.solve(operator_of(matrix_of(kind), kind), torch.zeros(N, dtype=torch.float64), rows(N))
    assert torch.equal(solution.value, torch.zeros(N, dtype=torch.float64))
    assert (solution.num_iter, solution.num_matvec, solution.converged) == (0, 0, True)
    assert "zero right-hand side" in solution.reason
    assert solution.relative_residual == 0


@every_system
def test_several_right_hand_sides_equal_one_by_one(case: SolverCase, kind: str):
    A, b = operator_of(matrix_of(kind), kind), rows(4, N) * torch.tensor([1.0, 1e-9, 0.0, 1e9]).unsqueeze(-1)
    together = case.solver.solve(A, b)
    assert together.converged, together.reason
    for row, x in zip(b, together.value, strict=True):
        torch.testing.assert_close(x, case.solver.solve(A, row).value, rtol=1e-8, atol=0)


@every_system
def test_stacked_systems_equal_one_by_one(case: SolverCase, kind: str):
    matrices, b = matrix_of(kind, batch=(3,)), rows(3, N)
    together = case.solver.solve(operator_of(matrices, kind), b)
    assert together.converged, together.reason
    assert together.residual_norm.shape == (3,)
    for matrix, row, x in zip(matrices, b, together.value, strict=True):
        torch.testing.assert_close(x, case.solver.solve(operator_of(matrix, kind), row).value, rtol=0, atol=1e-9)


@every_system
def test_stacked_systems_take_several_right_hand_sides(case: SolverCase, kind: str):
    matrices, b = matrix_of(kind, batch=(3,)), rows(2, 3, N)
    solution = case.solver.solve(operator_of(matrices, kind), b)
    assert solution.converged, solution.reason
    torch.testing.assert_close(solution.value, exact(matrices, b), rtol=0, atol=1e-9)


@every_system
def test_float32(case: SolverCase, kind: str):
    matrix, b = matrix_of(kind, dtype=torch.float32), rows(2, N, dtype=torch.float32)
    solution = case.solver.solve(operator_of(matrix, kind), b)
    assert solution.converged, solution.reason
    assert solution.value.dtype == torch.float32
    torch.testing.assert_close(solution.value, exact(matrix, b), rtol=0, atol=1e-4)


@every_solver
def test_bfloat16(case: SolverCase):
    kind = any_kind(case)
    matrix, b = matrix_of(kind, dtype=torch.bfloat16), rows(N, dtype=torch.bfloat16)
    solution = case.solver.solve(operator_of(matrix, kind), b)
    assert solution.relative_residual <= 0.03  # one rounding to bfloat16 is 0.004
    assert solution.value.dtype == torch.bfloat16


@every_system
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale_of_the_right_hand_side_does_not_matter(case: SolverCase, kind: str, scale: float, dtype: torch.dtype):
    A, b = operator_of(matrix_of(kind, dtype=dtype), kind), rows(N, dtype=dtype)
    solution, scaled = case.solver.solve(A, b), case.solver.solve(A, scale * b)
    assert scaled.converged, scaled.reason
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(scaled.value / scale, solution.value, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("case", "kind"), SCALABLE)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale_of_the_operator_does_not_matter(case: SolverCase, kind: str, scale: float, dtype: torch.dtype):
    matrix, b = matrix_of(kind, dtype=dtype), rows(N, dtype=dtype)
    solution = case.solver.solve(operator_of(scale * matrix, kind), b)
    assert solution.converged, solution.reason
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(solution.value * scale, exact(matrix, b), rtol=0, atol=tolerance)


@every_system
def test_one_unknown(case: SolverCase, kind: str):
    matrix = torch.tensor([[-0.8 if kind == "indefinite" else 0.8]], dtype=torch.float64)
    solution = case.solver.solve(operator_of(matrix, kind), torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(solution.value, 2 / matrix[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", SYMMETRIC_ONLY, ids=str)
def test_refuses_an_operator_it_cannot_take(case: SolverCase):
    with pytest.raises(ValueError, match=r"needs a symmetric operator; got .* Use (GMRES|LU)"):
        case.solver.solve(operator_of(matrix_of("nonsymmetric"), "nonsymmetric"), rows(N))


@pytest.mark.parametrize("case", CAPPED)
def test_reports_that_it_has_not_converged(case: SolverCase):
    kind = any_kind(case)
    matrix, b = matrix_of(kind), rows(N)
    assert case.capped is not None
    solution = case.capped.solve(operator_of(matrix, kind), b)
    assert not solution.converged
    assert "reached" in solution.reason
    assert solution.num_iter == 1
    torch.testing.assert_close(solution.residual_norm, (b - matrix @ solution.value).norm(), rtol=1e-12, atol=0)


@every_solver
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_right_hand_side_or_guess_raises(case: SolverCase, bad: float):
    kind = any_kind(case)
    A, b = operator_of(matrix_of(kind), kind), rows(N)
    broken = b.clone()
    broken[3] = bad
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        case.solver.solve(A, broken)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        case.solver.solve(A, b, broken)


@every_solver
@pytest.mark.parametrize("good_products", [0, 1, 2])
@pytest.mark.parametrize("shape", [(N,), (2, N)])
def test_products_that_turn_nan_raise(case: SolverCase, good_products: int, shape: tuple[int, ...]):
    kind = any_kind(case)
    matrix = matrix_of(kind)
    left = [good_products]

    def product(v: Tensor) -> Tensor:
        left[0] -= 1
        out = matrix @ v
        return out if left[0] >= 0 else out * float("nan")

    A = LinearOperator(product, N, symmetric=kind != "nonsymmetric", dtype=torch.float64, device="cpu")
    with pytest.raises(FloatingPointError, match=rf"({NAMES}): .*NaN"):
        case.solver.solve(A, rows(*shape))


@every_system
def test_arguments_stay_unchanged(case: SolverCase, kind: str):
    matrix, b, x0 = matrix_of(kind), rows(3, N), rows(4, 3, N)[3]
    before = [tensor.clone() for tensor in (matrix, b, x0)]
    case.solver.solve(operator_of(matrix, kind), b, x0)
    for tensor, copy in zip((matrix, b, x0), before, strict=True):
        assert torch.equal(tensor, copy)


@every_solver
@pytest.mark.parametrize("shape", [(N,), (2, N)])
def test_identity_that_returns_its_argument(case: SolverCase, shape: tuple[int, ...]):
    identity = LinearOperator(
        lambda v: v, N, matmat=lambda v: v, symmetric=True, definite=True, dtype=torch.float64, device="cpu"
    )
    b = rows(*shape)
    torch.testing.assert_close(case.solver.solve(identity, b).value, b)


@every_system
def test_non_contiguous_right_hand_side(case: SolverCase, kind: str):
    A, b = operator_of(matrix_of(kind), kind), rows(N, 3)
    solution = case.solver.solve(A, b.T)
    torch.testing.assert_close(solution.value, case.solver.solve(A, b.T.contiguous()).value, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        case.solver.solve(A, b[:, 0]).value, case.solver.solve(A, b[:, 0].contiguous()).value, rtol=0, atol=1e-9
    )


@every_system
def test_records_no_autograd_graph(case: SolverCase, kind: str):
    matrix = matrix_of(kind).requires_grad_()
    solution = case.solver.solve(operator_of(matrix, kind), rows(2, N).requires_grad_(), rows(2, N).requires_grad_())
    assert not solution.value.requires_grad
    assert not solution.residual_norm.requires_grad


@every_system
def test_counts_products_by_right_hand_side(case: SolverCase, kind: str):
    matrix, counted = matrix_of(kind), [0]

    def product(matrix: Tensor, v: Tensor) -> Tensor:
        counted[0] += 1
        return matrix @ v

    forward, backward = partial(product, matrix), partial(product, matrix.mT)
    symmetric = kind != "nonsymmetric"
    A = LinearOperator(forward, N, rmatvec=backward, symmetric=symmetric, dtype=torch.float64, device="cpu")
    assert case.solver.solve(A, rows(2, N)).num_matvec == counted[0]


@every_system
def test_rows_stand_still_between_convergence_tests(case: SolverCase, kind: str, monkeypatch: pytest.MonkeyPatch):
    """On a GPU convergence is tested every 8 iterations only; the answer must not depend on it."""
    A, b = operator_of(matrix_of(kind), kind), rows(3, N) * torch.tensor([1.0, 0.0, 1e-8]).unsqueeze(-1)
    often = case.solver.solve(A, b)
    for name in ITERATING:
        monkeypatch.setattr(f"implicitgrad.linalg.{name}.check_every", lambda rows: 8)
    seldom = case.solver.solve(A, b)
    assert seldom.converged, seldom.reason
    torch.testing.assert_close(seldom.value, often.value, rtol=1e-9, atol=0)


@every_system
def test_memory_is_that_of_vectors_or_matrices(case: SolverCase, kind: str):
    solution = case.solver.solve(operator_of(matrix_of(kind), kind), rows(N))
    assert 3 * N * 8 <= solution.memory <= (40 * N + 2 * N * N) * 8


@pytest.mark.parametrize(
    ("b", "x0", "message"),
    [
        (torch.ones(N + 1, dtype=torch.float64), None, r"shape \(12,\).*got \(13,\)"),
        (torch.ones(N), None, "float64.*got torch.float32"),
        (torch.ones(N, dtype=torch.complex128), None, "real systems"),
        (torch.ones(N, dtype=torch.float64), torch.ones(2, N, dtype=torch.float64), r"x0 like b.*got \(2, 12\)"),
        (torch.ones(N, dtype=torch.float64), torch.ones(N), "x0 like b.*float32"),
    ],
)
@every_solver
def test_refuses_tensors_that_do_not_fit(case: SolverCase, b: Tensor, x0: Tensor | None, message: str):
    kind = any_kind(case)
    with pytest.raises(ValueError, match=message):
        case.solver.solve(operator_of(matrix_of(kind), kind), b, x0)


@pytest.mark.parametrize("solver", [type(case.solver) for case in SOLVERS])
@pytest.mark.parametrize("rtol", [0.0, 1.0, -1e-3, float("nan"), "1e-8"])
def test_refuses_a_tolerance_out_of_range(solver: type[LinearSolver], rtol: object):
    required = {"num_terms": 3} if solver.__name__ == "Neumann" else {}
    with pytest.raises(ValueError, match=r"rtol=\.\.\..*between 0 and 1"):
        solver(rtol=rtol, **required)  # pyright: ignore[reportCallIssue]
