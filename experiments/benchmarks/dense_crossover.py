"""Where does writing down the Hessian stop to pay? Dense rows and Cholesky against CG, one right-hand side.

l2-regularised logistic regression in float64, 5 d examples, features with standard deviations from 1 to 0.1, both
solvers to the default tolerance of 1e-10, one thread. Products go through one retained double-backward graph whose
making is not counted; the rows of the dense matrix come from the same graph, all at once.

Run: python -m experiments.benchmarks.dense_crossover
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from implicitgrad.curvature.jacobian import Linearization
from implicitgrad.linalg import CG, Cholesky, LinearOperator

SIZES = [50, 100, 200, 400, 800, 1600]
DAMPINGS = [1e-2, 1e-3, 1e-4]
SECONDS = 0.5  # spent on each figure, at least one run after one for warming up


def hessian(d: int, damping: float) -> Linearization:
    """The gradient at a random point with its graph."""
    generator = torch.Generator().manual_seed(d)
    features = torch.randn(5 * d, d, generator=generator, dtype=torch.float64)
    features = features * torch.logspace(0, -1, d, dtype=torch.float64)
    signs = torch.randn(5 * d, generator=generator, dtype=torch.float64).sign()
    w = 0.1 * torch.randn(d, generator=generator, dtype=torch.float64)

    def gradient(w: Tensor) -> Tensor:
        loss = torch.nn.functional.softplus(-signs * (features @ w)).mean() + 0.5 * damping * w.dot(w)
        return torch.autograd.grad(loss, w, create_graph=True)[0]

    return Linearization(gradient, w, [], tracked=[], symmetric=True)


def median_ms(work: Callable[[], object]) -> float:
    """Median time of a call after one for warming up."""
    work()
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(d: int, damping: float) -> str:
    """One line of the table."""
    graph = hessian(d, damping)
    known, b = graph.operator(), torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = graph.dense()
    product = median_ms(lambda: known @ b)
    rows = median_ms(graph.dense)
    cholesky = median_ms(lambda: Cholesky().solve(LinearOperator.from_dense(matrix, symmetric=True), b))
    iterative = median_ms(lambda: CG().solve(known, b))
    return (
        f"{d:>5} {damping:>7.0e} {product:>8.3f} {rows:>9.1f} {cholesky:>9.2f} {rows + cholesky:>9.1f}"
        f" {iterative:>9.1f} {CG().solve(known, b).num_iter:>11}"
    )


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; milliseconds, medians")
    print("    d  lambda  product      rows  cholesky     dense        CG  iterations")
    for damping in DAMPINGS:
        for d in SIZES:
            print(measure(d, damping), flush=True)


if __name__ == "__main__":
    main()
