"""Products and time of block CG with 8 right-hand sides, beside 8 runs of CG and one CG that treats them as rows.

Matrices of condition number 1e3 with given eigenvalues and random eigenvectors, multiplied as dense matrices, and the
Hessian of a logistic regression. Times are CPU seconds, the median over rounds in turns.

Run: python -m experiments.benchmarks.block_cg
"""

import statistics
import time

import torch
from torch import Tensor

from experiments.benchmarks.cg_products import logistic_hessian
from implicitgrad.linalg import CG, BlockCG, LinearOperator, LinearSolver

NUM_SIDES, ROUNDS = 8, 5


def with_eigenvalues(eigenvalues: Tensor) -> LinearOperator:
    generator = torch.Generator().manual_seed(0)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(eigenvalues.double()) @ basis.T
    return LinearOperator.from_dense((matrix + matrix.T) / 2, symmetric=True)


def problems() -> dict[str, tuple[LinearOperator, float]]:
    """Operators and tolerances by name."""
    return {
        "evenly spaced logarithms, n = 300": (with_eigenvalues(torch.logspace(-3, 0, 300)), 1e-8),
        "evenly spaced logarithms, n = 1000": (with_eigenvalues(torch.logspace(-3, 0, 1000)), 1e-8),
        "evenly spaced, n = 300": (with_eigenvalues(torch.linspace(1e-3, 1, 300)), 1e-8),
        "evenly spaced, n = 1000": (with_eigenvalues(torch.linspace(1e-3, 1, 1000)), 1e-8),
        "1/i + 1e-3, n = 1000": (with_eigenvalues(1 / torch.arange(1, 1001) + 1e-3), 1e-8),
        "logistic regression, float64": (logistic_hessian(torch.float64), 1e-8),
        "logistic regression, float32": (logistic_hessian(torch.float32), 1e-5),
    }


def measure(A: LinearOperator, b: Tensor, solvers: dict[str, LinearSolver]) -> dict[str, tuple[int, float]]:
    """Products and seconds; the first solver gets the right-hand sides one by one."""
    counts, times = dict.fromkeys(solvers, 0), {name: [] for name in solvers}
    for _ in range(ROUNDS):
        for name, solver in solvers.items():
            start = time.process_time()
            sides = b if name == "one by one" else [b]
            solutions = [solver.solve(A, side) for side in sides]
            times[name].append(time.process_time() - start)
            assert all(solution.converged for solution in solutions), [solution.reason for solution in solutions]
            counts[name] = sum(solution.num_matvec for solution in solutions)
    return {name: (counts[name], statistics.median(times[name])) for name in solvers}


def main() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {NUM_SIDES} right-hand sides")
    print(f"{'':<36} {'products':>24} {'':>6} {'CPU ms':>24}")
    print(f"{'system':<36} {'CGs':>8} {'rows':>7} {'block':>7} {'ratio':>6} {'CGs':>8} {'rows':>7} {'block':>7}")
    for name, (A, rtol) in problems().items():
        b = torch.randn(NUM_SIDES, A.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(A.dtype)
        cg = CG(rtol, max_iter=5000)
        found = measure(A, b, {"one by one": cg, "rows": cg, "block": BlockCG(rtol)})
        (one, one_time), (rows, rows_time), (block, block_time) = found.values()
        print(
            f"{name:<36} {one:>8} {rows:>7} {block:>7} {one / block:>6.2f}"
            f" {1e3 * one_time:>8.0f} {1e3 * rows_time:>7.0f} {1e3 * block_time:>7.0f}"
        )


if __name__ == "__main__":
    main()
