"""Kronecker operators against matrices written out with torch.kron."""

import pytest
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg import CG, KnownInverse, KroneckerBlock, check_symmetric, kronecker

SIZE = 31  # 12 + (3 + 4 * 3) of two blocks, and gaps of 2 before, 1 between and 1 behind


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(n: int, seed: int, rank: int | None = None) -> Tensor:
    root = normal(n, rank or n, seed=seed)
    return root @ root.mT / n


def blocks(dtype: torch.dtype = torch.float64) -> list[KroneckerBlock]:
    """A plain block, and one whose first columns are stored behind the last."""
    return [
        KroneckerBlock.of(factor(3, 1).to(dtype), factor(4, 2).to(dtype), [(2, 14)]),
        KroneckerBlock.of(factor(3, 3).to(dtype), factor(5, 4, rank=2).to(dtype), [(27, 30), (15, 27)]),
    ]


def dense() -> Tensor:
    matrix = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    matrix[2:14, 2:14] = torch.kron(factor(3, 1), factor(4, 2))
    # entry (i, j) of the second V: row by row in two pieces
    place = torch.tensor([[27 + i if j == 0 else 15 + 4 * i + j - 1 for j in range(5)] for i in range(3)]).flatten()
    matrix[place.unsqueeze(1), place] = torch.kron(factor(3, 3), factor(5, 4, rank=2))
    return matrix


def test_product_equals_the_written_out_matrix():
    A = kronecker(blocks(), SIZE)
    torch.testing.assert_close(A.to_dense(), dense(), rtol=0, atol=1e-13)
    v, block = normal(SIZE), normal(2, SIZE, seed=9)
    torch.testing.assert_close(A @ v, dense() @ v, rtol=0, atol=1e-13)
    torch.testing.assert_close(A @ block, block @ dense(), rtol=0, atol=1e-13)
    assert A.eigenvalue_floor == 0
    check_symmetric(A)


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
def test_inverse_is_exact_at_any_damping(damping: float):
    b = normal(2, SIZE)
    exact = torch.linalg.solve(dense() + damping * torch.eye(SIZE, dtype=torch.float64), b.mT).mT
    inverse = kronecker(blocks(), SIZE).damped(damping).known_inverse
    assert inverse is not None
    # cond · eps = 1e7 · 2e-16 at the smallest damping
    torch.testing.assert_close(inverse(b), exact, rtol=1e-8, atol=0)
    torch.testing.assert_close(inverse(b[0]), exact[0], rtol=1e-8, atol=0)


def test_solves_as_an_operator_with_a_known_inverse():
    A, b = 2.0 * kronecker(blocks(), SIZE).damped(0.05), normal(SIZE)
    solution = KnownInverse().solve(A, b)
    assert solution.converged, solution.reason
    exact = torch.linalg.solve(2 * dense() + 0.1 * torch.eye(SIZE, dtype=torch.float64), b)
    torch.testing.assert_close(solution.value, exact, rtol=1e-10, atol=0)


def test_its_own_inverse_as_preconditioner_leaves_one_iteration():
    A, b = kronecker(blocks(), SIZE).damped(1e-3), normal(SIZE)
    assert CG(preconditioner=A.known_inverse).solve(A, b).num_iter == 1
    assert CG().solve(A, b).num_iter > 10


def test_dense_block_is_a_kronecker_product_with_one():
    matrix = factor(4, 5)
    A = kronecker([KroneckerBlock.of(matrix, torch.ones(1, 1, dtype=torch.float64), [(0, 4)])], 4)
    torch.testing.assert_close(A.to_dense(), matrix, rtol=0, atol=1e-13)
    inverse = A.damped(0.1).known_inverse
    assert inverse is not None and A.known_inverse is None  # semidefinite is all that is proven
    damped = matrix + 0.1 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(inverse(normal(4)), torch.linalg.solve(damped, normal(4)), rtol=1e-10, atol=0)


def test_corrected_eigenvalues_are_the_closest_in_the_basis():
    target = factor(12, 6)
    block = KroneckerBlock.of(factor(3, 1), factor(4, 2), [(0, 12)])
    basis = torch.kron(block.left_basis, block.right_basis)
    best = (basis.mT @ target @ basis).diagonal().reshape(3, 4)

    def error(eigenvalues: Tensor) -> float:
        return (kronecker([block._replace(eigenvalues=eigenvalues)], 12).to_dense() - target).norm().item()

    assert error(best) < error(block.eigenvalues)
    for seed in range(5):
        assert error(best) < error(best * (1 + 0.1 * normal(3, 4, seed=seed)))


@pytest.mark.parametrize("covered", [True, False])
def test_singular_operator_has_no_inverse_and_says_so(covered: bool):
    block = KroneckerBlock.of(torch.diag(torch.tensor([0.0 if covered else 1.0, 1.0])), torch.eye(2), [(0, 4)])
    A = kronecker([block], 4 if covered else 5)
    with pytest.raises(ValueError, match="positive damping"):
        KnownInverse().solve(A, torch.ones(A.size))
    assert KnownInverse().solve(A.damped(0.5), torch.ones(A.size)).converged


def test_float32_and_bfloat16():
    single = kronecker(blocks(torch.float32), SIZE).damped(0.1)
    b = normal(3, SIZE).float()
    solution = KnownInverse().solve(single, b)
    assert solution.converged, solution.reason
    half = kronecker(blocks(torch.float32), SIZE, torch.bfloat16).damped(1.0)
    product = half @ b.bfloat16()
    assert product.dtype == torch.bfloat16
    exact = b.bfloat16().double() @ dense() + b.bfloat16().double()
    torch.testing.assert_close(product.double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())  # 5 roundings


def test_eigenvalues_lost_in_float32_are_found_in_float64(monkeypatch: pytest.MonkeyPatch):
    seen, eigh = [], torch.linalg.eigh

    def fragile(matrix: Tensor):
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fragile)
    block = KroneckerBlock.of(factor(3, 1).float(), torch.eye(2), [(0, 6)])
    assert seen == [torch.float32, torch.float64] * 2
    assert block.left_basis.dtype == block.eigenvalues.dtype == torch.float32
    expected = torch.kron(factor(3, 1), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(kronecker([block], 6).to_dense().double(), expected, rtol=0, atol=1e-6)


def test_rounding_below_zero_becomes_zero():
    rank_one = normal(6, 1).float() @ normal(6, 1).float().mT
    block = KroneckerBlock.of(rank_one, torch.eye(2), [(0, 12)])
    assert block.eigenvalues.min() == 0


def test_arguments_stay_unchanged_and_no_graph_is_recorded():
    left = factor(2, 1).requires_grad_()
    A, v = kronecker([KroneckerBlock.of(left, torch.eye(2, dtype=torch.float64), [(0, 4)])], 5), normal(5)
    before = v.clone()
    inverse = A.damped(1.0).known_inverse
    assert inverse is not None
    assert not (A @ v).requires_grad
    assert not inverse(v).requires_grad
    assert torch.equal(v, before)


@pytest.mark.parametrize(
    ("left", "right", "spans", "message"),
    [
        (torch.ones(2, 3), torch.eye(2), [(0, 4)], r"square matrix; got left of shape \(2, 3\)"),
        (torch.eye(2), torch.ones(3), [(0, 4)], r"square matrix; got right"),
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.eye(2), [(0, 4)], "symmetric"),
        (torch.diag(torch.tensor([1.0, -0.5])), torch.eye(2), [(0, 4)], "positive semidefinite; left has.*-5.0e-01"),
        (torch.eye(2), torch.eye(2), [(0, 5)], "spans of whole columns, 2 entries each"),
        (torch.eye(2), torch.eye(2), [(0, 3), (3, 4)], "spans of whole columns"),
        (torch.eye(2), torch.eye(2), [], "spans of whole columns"),
    ],
)
def test_refuses_factors_that_make_no_block(left: Tensor, right: Tensor, spans: list, message: str):
    with pytest.raises(ValueError, match=message):
        KroneckerBlock.of(left, right, spans)


def test_refuses_blocks_that_do_not_fit():
    block = KroneckerBlock.of(torch.eye(2), torch.eye(2), [(1, 5)])
    with pytest.raises(ValueError, match="at least one"):
        kronecker([], 5)
    with pytest.raises(ValueError, match="disjoint"):
        kronecker([block, block], 9)
    with pytest.raises(ValueError, match="within 0 and 4"):
        kronecker([block], 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_numbers_gone_bad(bad: float):
    broken = torch.diag(torch.tensor([1.0, bad]))
    with pytest.raises(FloatingPointError, match="right Kronecker factor"):
        KroneckerBlock.of(torch.eye(2), broken, [(0, 4)])
    block = KroneckerBlock.of(torch.eye(2), torch.eye(2), [(0, 4)])
    with pytest.raises(FloatingPointError, match="NaN or infinite eigenvalues"):
        kronecker([block._replace(eigenvalues=torch.full((2, 2), bad))], 4)
