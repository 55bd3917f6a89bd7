"""How often bounds on a hypergradient's error are violated, and how loose they are, on random damped systems.

Run: python -m experiments.benchmarks.certificate

Each of 1000 problems is A = C + damping I with C positive semidefinite of size 120, damping from 1e-4 to 1, a random
right-hand side solved by CG to a tolerance from 1e-1 to 1e-6, and Bᵀu with 8 random columns as the product of interest.
"""

import torch
from torch import Tensor
from tqdm import trange

from implicitgrad.linalg import CG, LinearOperator
from implicitgrad.linalg.certificate import dual_weighted, inverse_norm, product_error, solution_error

NUM_PROBLEMS, SIZE, NUM_COLUMNS = 1000, 120, 8


def semidefinite(draw: torch.Generator) -> Tensor:
    """A covariance of features whose scales decay like a power of their index."""
    power = 2 * torch.rand((), generator=draw, dtype=torch.float64)
    scales = torch.arange(1, SIZE + 1, dtype=torch.float64) ** -power
    features = torch.randn(3 * SIZE, SIZE, generator=draw, dtype=torch.float64) * scales
    return features.mT @ features / len(features)


def trial(draw: torch.Generator) -> dict[str, float]:
    """One problem: bounds over errors, and by how much dual weights cut the error."""
    uniform = lambda low, high: low + (high - low) * torch.rand((), generator=draw, dtype=torch.float64).item()
    C, damping, rtol = semidefinite(draw), 10 ** uniform(-4, 0), 10 ** uniform(-6, -1)
    product = LinearOperator(
        lambda v: v @ C, SIZE, symmetric=True, eigenvalue_floor=0.0, dtype=C.dtype, device=C.device
    )
    A, dense = product.damped(damping), C + damping * torch.eye(SIZE, dtype=C.dtype)
    s, columns = (torch.randn(*shape, generator=draw, dtype=C.dtype) for shape in ((SIZE,), (SIZE, NUM_COLUMNS)))
    B = LinearOperator.from_dense(columns)
    solution = CG(rtol=rtol).solve(A, s)
    exact = torch.linalg.solve(dense, s)
    norm, bound = inverse_norm(A, None), solution_error(A, s, solution)
    assert norm is not None and bound is not None
    weighted = dual_weighted(A, B, s - dense @ solution.value, norm, CG(rtol=0.1))
    size = lambda v: torch.linalg.vector_norm(v).item()
    error = size(columns.mT @ (exact - solution.value))
    left = size(columns.mT @ (exact - solution.value) - weighted.correction)
    return {
        "|u - u*|: bound / error": bound.value / size(exact - solution.value),
        "|Bᵀ(u - u*)|: bound / error": product_error(B, bound).value / error,
        "dual weights: bound / error left": weighted.bound.value / left,
        "dual weights: bound / error before": weighted.bound.value / error,
        "dual weights: error before / left": error / left,
    }


def main() -> None:
    """Print violations and quantiles."""
    draw = torch.Generator().manual_seed(0)
    rows = [trial(draw) for _ in trange(NUM_PROBLEMS)]
    print(f"{'ratio':38s} {'below 1':>8s} {'median':>8s} {'95 %':>8s} {'max':>8s}")
    for name in rows[0]:
        ratios = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        median, high = ratios.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        print(f"{name:38s} {int((ratios < 1).sum()):8d} {median:8.2f} {high:8.1f} {ratios.max():8.1f}")


if __name__ == "__main__":
    main()
