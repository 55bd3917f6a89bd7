"""Rectangular operators, compositions, restrictions, and what is known about them."""

import pytest
import torch
from torch import Tensor

from implicitgrad.linalg import CG, KnownInverse, LinearOperator


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_products(matrix: Tensor, **declared: object) -> LinearOperator:
    """An operator that knows nothing but products with single vectors."""
    return LinearOperator(
        lambda v: torch.einsum("...ij,...j->...i", matrix, v),
        matrix.shape[-1],
        num_rows=matrix.shape[-2],
        rmatvec=lambda v: torch.einsum("...ji,...j->...i", matrix, v),
        dtype=matrix.dtype,
        device=matrix.device,
        batch_shape=tuple(matrix.shape[:-2]),
        **declared,  # pyright: ignore[reportArgumentType]
    )


def symmetric(n: int, smallest: float, seed: int = 0) -> Tensor:
    """Eigenvalues from `smallest` to 3."""
    q = torch.linalg.qr(rows(n, n, seed=seed))[0]
    return (q * torch.linspace(smallest, 3, n, dtype=torch.float64)) @ q.mT


def knows_inverse(matrix: Tensor) -> LinearOperator:
    shifted = lambda lam: lambda v: v @ torch.linalg.inv(matrix + lam * torch.eye(len(matrix), dtype=matrix.dtype))
    return by_products(matrix, symmetric=True, shifted_inverse=shifted)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("make", [by_products, LinearOperator.from_dense])
def test_rectangular_products_equal_the_matrix(make, batch: tuple[int, ...]):
    matrix, v, u = rows(*batch, 3, 5), rows(*batch, 5, seed=1), rows(2, *batch, 3, seed=2)
    J = make(matrix)
    assert (J.shape, J.T.shape, J.is_square) == ((3, 5), (5, 3), False)
    assert (J.vector_shape, J.image_shape) == ((*batch, 5), (*batch, 3))
    torch.testing.assert_close(J @ v, (matrix @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(J.T @ u, (matrix.mT @ u.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(J.to_dense(), matrix)
    torch.testing.assert_close(J.T.to_dense(), matrix.mT)
    torch.testing.assert_close((2.0 * J + J).to_dense(), 3 * matrix)
    torch.testing.assert_close((J.T @ J).to_dense(), matrix.mT @ matrix)
    torch.testing.assert_close((J @ J.T) @ u, (matrix @ matrix.mT @ u.unsqueeze(-1)).squeeze(-1))


def test_composition_of_different_operators_and_its_transpose():
    left, right = rows(4, 3), rows(3, 5, seed=1)
    C = by_products(left) @ by_products(right)
    assert (C.shape, C.symmetric, C.eigenvalue_floor) == ((4, 5), False, None)
    torch.testing.assert_close(C @ rows(5), left @ (right @ rows(5)))
    torch.testing.assert_close(C.T @ rows(4), right.mT @ (left.mT @ rows(4)))
    torch.testing.assert_close(C.T.to_dense(), (left @ right).mT)


def test_gram_operators_are_known_to_be_positive_semidefinite():
    J, S = by_products(rows(3, 5)), by_products(symmetric(4, -1.0), symmetric=True)
    for gram in (J.T @ J, J @ J.T, S @ S):
        assert gram.symmetric and gram.eigenvalue_floor == 0.0 and not gram.definite
    assert (J.T @ J).damped(0.5).definite
    assert CG().solve((J.T @ J).damped(0.5), rows(5)).converged
    J = by_products(rows(3, 3))
    assert not (J @ J).symmetric


def test_floor_follows_sums_scalings_and_shifts():
    A = by_products(symmetric(4, 0.5), symmetric=True, eigenvalue_floor=0.5)
    B = by_products(symmetric(4, -1.0, seed=1), symmetric=True, eigenvalue_floor=-1.0)
    assert A.definite and not B.definite
    for combination in (2.0 * A + B, A + A.damped(0.25), (3.0 * B).damped(-2.0), A.restricted(torch.tensor([2, 0]))):
        floor = combination.eigenvalue_floor
        assert floor is not None and floor <= torch.linalg.eigvalsh(combination.to_dense()).min() + 1e-12
        assert combination.definite == (floor > 0)
    assert (-A).eigenvalue_floor is None
    assert (A + by_products(symmetric(4, 0.0), symmetric=True)).eigenvalue_floor is None
    declared = by_products(symmetric(4, 0.5), symmetric=True, definite=True)
    assert declared.eigenvalue_floor == 0.0 and (declared + declared).definite and not (declared + B).definite


@pytest.mark.parametrize("index", [torch.tensor([3, 0, 1]), torch.tensor([True, True, False, True])])
@pytest.mark.parametrize("remembered", [False, True])
def test_restriction_is_the_principal_submatrix(index: Tensor, remembered: bool):
    matrix = rows(4, 4)
    A = by_products(matrix)
    if remembered:
        A.to_dense()
    part = A.restricted(index)
    wanted = matrix[index][:, index]
    assert part.dense_cost == (0 if remembered else 3)
    torch.testing.assert_close(part @ rows(2, 3), rows(2, 3) @ wanted.mT)
    torch.testing.assert_close(part.T @ rows(3), wanted.mT @ rows(3))
    torch.testing.assert_close(part.to_dense(), wanted)


def test_known_inverse_follows_shifts_and_scalings():
    matrix, b = symmetric(5, 0.2), rows(3, 5)
    A = knows_inverse(matrix)
    for combination, dense in (
        (A, matrix),
        (A.damped(0.3), matrix + 0.3 * torch.eye(5, dtype=torch.float64)),
        ((2.0 * A.damped(0.3)).damped(0.1), 2 * matrix + 0.7 * torch.eye(5, dtype=torch.float64)),
    ):
        solution = KnownInverse().solve(combination, b)
        assert solution.converged and solution.num_matvec == 3
        torch.testing.assert_close(solution.value, torch.linalg.solve(dense, b.mT).mT)
    for other in (A + A, -A, A @ A, A.restricted(torch.tensor([0, 1]))):
        assert other.known_inverse is None
        with pytest.raises(ValueError, match="knows its inverse"):
            KnownInverse().solve(other, torch.ones(other.size, dtype=torch.float64))


def test_inexact_inverse_is_refined_and_a_wrong_one_is_reported():
    matrix, b = symmetric(5, 1.0), rows(5)
    exact = torch.linalg.inv(matrix)
    for error, converged in ((1e-6, True), (0.5, False)):
        perturbed = exact + error * torch.eye(5, dtype=torch.float64)
        A = by_products(matrix, symmetric=True, shifted_inverse=lambda lam, p=perturbed: lambda v: v @ p)
        solution = KnownInverse().solve(A, b)
        assert solution.converged == converged
        torch.testing.assert_close(solution.residual_norm, (b - matrix @ solution.value).norm(), rtol=1e-6, atol=1e-15)


def test_a_known_inverse_ends_where_the_matrix_is_not_definite():
    matrix = symmetric(5, 0.2)
    shifted = lambda lam: lambda v: v @ torch.linalg.inv(matrix + lam * torch.eye(5, dtype=matrix.dtype))
    A = by_products(matrix, symmetric=True, eigenvalue_floor=0.2, shifted_inverse=shifted)
    assert A.known_inverse is not None and A.damped(-0.1).known_inverse is not None
    assert A.damped(-0.3).known_inverse is None


def test_scalars_stand_on_either_side_and_operators_subtract():
    left, right = rows(4, 3), rows(4, 3, seed=1)
    A, B = by_products(left), by_products(right)
    torch.testing.assert_close((A * 2).to_dense(), (2 * A).to_dense())
    torch.testing.assert_close((A - B).to_dense(), left - right)
    with pytest.raises(ValueError, match=r"v in torch.float64 like A; got torch.float32"):
        _ = A @ torch.ones(3)


def test_contradictions_are_refused():
    J = by_products(rows(3, 5))
    with pytest.raises(ValueError, match=r"A @ B needs as many columns"):
        _ = J @ J
    with pytest.raises(ValueError, match="needs a square operator"):
        J.damped(1.0)
    with pytest.raises(ValueError, match="needs a square operator"):
        J.restricted(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"CG needs a symmetric|square"):
        CG().solve(J, rows(3))
    for index in ([0, 0], [5], [-1], []):
        with pytest.raises(ValueError, match="different positions from 0 to 2"):
            (J @ J.T).restricted(torch.tensor(index, dtype=torch.long))
    with pytest.raises(ValueError, match="mask of"):
        (J @ J.T).restricted(torch.tensor([True, False]))
    for declared in ({"eigenvalue_floor": 1.0}, {"symmetric": True, "eigenvalue_floor": float("nan")}):
        with pytest.raises(ValueError, match="bounds the eigenvalues of a symmetric operator"):
            by_products(rows(3, 3), **declared)
    with pytest.raises(ValueError, match="shifted_inverse"):
        by_products(rows(3, 3), shifted_inverse=lambda lam: lambda v: v)
