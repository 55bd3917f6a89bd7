"""LinearOperator against dense matrices."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from implicitgrad.linalg import CG, LU, Cholesky, LinearOperator, check_symmetric

N = 5


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_products(matrix: Tensor, symmetric: bool = False, transpose: bool = True) -> LinearOperator:
    """An operator that knows nothing but products with single vectors."""
    return LinearOperator(
        lambda v: torch.einsum("...ij,...j->...i", matrix, v),
        matrix.shape[-1],
        rmatvec=(lambda v: torch.einsum("...ji,...j->...i", matrix, v)) if transpose else None,
        symmetric=symmetric,
        dtype=matrix.dtype,
        device=matrix.device,
        batch_shape=tuple(matrix.shape[:-2]),
    )


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("make", [by_products, LinearOperator.from_dense])
def test_products_equal_the_matrix(make, batch: tuple[int, ...]):
    matrix, v, block = rows(*batch, N, N), rows(*batch, N, seed=1), rows(4, *batch, N, seed=2)
    A = make(matrix)
    torch.testing.assert_close(A @ v, (matrix @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(A @ block, (matrix @ block.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(A.T @ v, (matrix.mT @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(A.T @ block, (matrix.mT @ block.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(A.to_dense(), matrix)
    torch.testing.assert_close(A.T.to_dense(), matrix.mT)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("make", [by_products, LinearOperator.from_dense])
def test_sums_scalings_and_damping_equal_those_of_matrices(make, batch: tuple[int, ...]):
    a, b, v = rows(*batch, N, N), rows(*batch, N, N, seed=1), rows(*batch, N, seed=2)
    A, B, eye = make(a), make(b), torch.eye(N, dtype=torch.float64)
    for operator, matrix in [
        (A + B, a + b),
        (3 * A, 3 * a),
        (-A, -a),
        (A.damped(0.5), a + 0.5 * eye),
        (2.0 * (A + -B).damped(1.0), 2 * (a - b + eye)),
        (A.T.damped(0.5) + B.T, a.mT + 0.5 * eye + b.mT),
    ]:
        torch.testing.assert_close(operator.to_dense(), matrix)
        torch.testing.assert_close(operator @ v, (matrix @ v.unsqueeze(-1)).squeeze(-1))
        torch.testing.assert_close(operator.T @ v, (matrix.mT @ v.unsqueeze(-1)).squeeze(-1))


def test_more_unknowns_than_one_block_of_columns():
    matrix = rows(150, 150)
    torch.testing.assert_close(by_products(matrix).to_dense(), matrix)


def test_transposing_twice_gives_the_same_operator():
    A = by_products(rows(N, N))
    assert A.T.T is A
    assert A.T.transposed and not A.transposed
    assert A.T.base is A and A.base is A


def test_transpose_of_a_symmetric_operator_is_itself():
    matrix = rows(N, N)
    A = by_products(matrix + matrix.mT, symmetric=True)
    assert A.T is A
    assert not A.T.transposed


def test_structure_follows_the_algebra():
    A = LinearOperator.from_dense(torch.eye(N), symmetric=True, definite=True)
    B = LinearOperator.from_dense(torch.eye(N))
    kept = [A.damped(0.0), A.damped(2.0), A + A, 2 * A]
    lost = [A.damped(-0.5), -A, 0 * A, A + -A]
    assert all(operator.definite for operator in kept)
    assert all(operator.symmetric and not operator.definite for operator in lost)
    assert not (A + B).symmetric


def test_matrix_and_memo_are_made_once_and_shared_with_the_transpose():
    calls = [0]
    matrix = rows(N, N)

    def dense() -> Tensor:
        calls[0] += 1
        return matrix

    A = LinearOperator(lambda v: matrix @ v, N, dense=dense, dtype=torch.float64, device="cpu")
    for operator in (A.T, A, A.damped(1.0), 2 * A.T):
        operator.to_dense()
    assert calls == [1]
    assert A.remember("key", lambda: 1) == A.T.remember("key", lambda: 2) == 1


def test_dense_cost_counts_the_products_that_are_missing():
    A = by_products(rows(N, N))
    damped, both = A.damped(1.0), A + by_products(rows(N, N))
    assert (A.dense_cost, damped.dense_cost, both.dense_cost) == (N, N, 2 * N)
    A.T.to_dense()
    assert (A.dense_cost, A.T.dense_cost, damped.dense_cost, both.dense_cost) == (0, 0, 0, N)


def test_operator_is_freed_without_the_garbage_collector():
    """A reference cycle would keep the autograd graph of its products alive."""
    A = by_products(rows(N, N))
    A.damped(1.0).to_dense()
    LU().solve(A.T, rows(N))
    alive = weakref.ref(A)
    gc.disable()
    try:
        del A
        assert alive() is None
    finally:
        gc.enable()


def test_without_graph_keeps_matrix_and_factors():
    matrix = rows(N, N)
    A = by_products(matrix)
    assert A.without_graph() is None
    LU().solve(A, rows(N))
    known, known_transpose = A.without_graph(), A.T.without_graph()
    assert known is not None and known_transpose is not None
    assert LU in known._memo
    torch.testing.assert_close(known @ rows(N), matrix @ rows(N))
    torch.testing.assert_close(known_transpose @ rows(N), matrix.mT @ rows(N))
    assert known_transpose.transposed and known.dense_cost == 0


def test_symmetry_defect_is_zero_only_for_symmetric_operators():
    matrix = rows(40, 40)
    assert by_products(matrix).symmetry_defect() > 0.01
    assert by_products(matrix + matrix.mT).symmetry_defect() < 1e-15
    assert by_products(torch.stack([matrix + matrix.mT, matrix])).symmetry_defect() > 0.01
    assert by_products(0 * matrix).symmetry_defect() == 0
    skew = LinearOperator.from_dense((matrix - matrix.mT).float())
    assert skew.symmetry_defect(torch.Generator().manual_seed(3)) > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 10, 1000])
def test_check_symmetric_tells_rounding_from_asymmetry(dtype: torch.dtype, n: int):
    matrix = rows(n, n).to(dtype)
    symmetric = matrix + matrix.mT
    check_symmetric(by_products(symmetric, symmetric=True))
    check_symmetric(by_products(matrix))
    if n > 1:
        asymmetric = by_products(symmetric + 0.1 * matrix, symmetric=True)
        with pytest.raises(ValueError, match="declared symmetric.*symmetric=False"):
            check_symmetric(asymmetric)
        check_symmetric(asymmetric, tolerance=0.5)


def test_check_symmetric_refuses_nan():
    with pytest.raises(ValueError, match="differ by nan"):
        check_symmetric(by_products(torch.full((N, N), float("nan")), symmetric=True))


def test_symmetry_defect_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    by_products(rows(N, N)).symmetry_defect()
    assert torch.equal(torch.get_rng_state(), before)


def test_transpose_without_rmatvec_still_has_a_matrix():
    matrix, b = rows(N, N), rows(N)
    A = by_products(matrix, transpose=False)
    assert A.has_product and not A.T.has_product
    for missing in (A.T, A.T.damped(1.0), A.damped(1.0).T):
        with pytest.raises(ValueError, match="rmatvec"):
            _ = missing @ b
    torch.testing.assert_close(LU().solve(A.T, b).value, torch.linalg.solve(matrix.mT, b))


def test_products_keep_their_autograd_graph():
    matrix = rows(N, N).requires_grad_()
    (LinearOperator.from_dense(matrix) @ rows(N)).sum().backward()
    assert matrix.grad is not None


def test_refuses_contradictory_declarations():
    def make(**declared):
        return LinearOperator(lambda v: v, declared.pop("size", N), device="cpu", **declared)

    with pytest.raises(ValueError, match="pass symmetric=True too"):
        make(definite=True, dtype=torch.float64)
    with pytest.raises(ValueError, match="real floating dtype; got torch.complex64"):
        make(dtype=torch.complex64)
    with pytest.raises(ValueError, match="real floating dtype; got torch.int64"):
        make(dtype=torch.int64)
    with pytest.raises(ValueError, match="size >= 1 and num_rows >= 1; got 0"):
        make(size=0, dtype=torch.float64)


def test_refuses_what_is_no_matrix_or_not_symmetric():
    with pytest.raises(ValueError, match=r"\(\*batch, m, n\); got \(3,\)"):
        LinearOperator.from_dense(torch.ones(3))
    with pytest.raises(ValueError, match="A symmetric operator is square; got 2 rows and 3 columns"):
        LinearOperator.from_dense(torch.ones(2, 3), symmetric=True)
    with pytest.raises(ValueError, match="declared symmetric"):
        LinearOperator.from_dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), symmetric=True)


@pytest.mark.parametrize("shape", [(N + 1,), (2, 2, N), (1,), (N, 2)])
def test_product_names_both_shapes(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"\(5\), or \(k, 5\)|\(5,\), or \(k, 5\)"):
        _ = by_products(rows(N, N)) @ rows(*shape)


@pytest.mark.parametrize("product", [lambda v: v.sum(), lambda v: v.float(), lambda v: v.unsqueeze(0)])
def test_product_of_another_shape_or_dtype_is_refused(product):
    A = LinearOperator(product, N, dtype=torch.float64, device="cpu")
    with pytest.raises(ValueError, match="came back as"):
        _ = A @ rows(N)


def test_dense_of_another_shape_is_refused():
    A = LinearOperator(lambda v: v, N, dense=lambda: torch.eye(N + 1), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"dense\(\) returned shape \(6, 6\)"):
        A.to_dense()


def test_sum_refuses_operators_that_do_not_fit():
    A = by_products(rows(N, N))
    for other in (by_products(rows(N + 1, N + 1)), by_products(rows(2, N, N)), by_products(rows(N, N).float())):
        with pytest.raises(ValueError, match=r"A \+ B needs one batch shape"):
            _ = A + other
    with pytest.raises(TypeError):
        _ = A + 1.0  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(TypeError):
        _ = rows(N) * A  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(ValueError, match="finite; got nan"):
        A.damped(float("nan"))


def test_damped_solves_the_damped_system():
    factor, b = rows(N, 2), rows(N)
    A = LinearOperator.from_dense(factor @ factor.mT, symmetric=True).damped(0.1)
    expected = torch.linalg.solve(factor @ factor.mT + 0.1 * torch.eye(N, dtype=torch.float64), b)
    for solver in (CG(), Cholesky()):
        torch.testing.assert_close(solver.solve(A, b).value, expected)
