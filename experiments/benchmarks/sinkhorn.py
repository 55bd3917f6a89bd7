"""Iterations and seconds of Sinkhorn's iteration and of Newton steps with a sparse Hessian, n = m = 500.

Both run in the log domain, in float64, to a marginal error of 1e-10 relative to the mass. An iteration of Newton's
method is here a sweep or an evaluation of the plan, which is what costs a pass over the matrix. The gradient is that of
a random function of the plan in the cost, by the implicit function theorem, beside central differences along one
direction.

Run: python -m experiments.benchmarks.sinkhorn
"""

import argparse
import time

import torch
from torch import Tensor

from implicitgrad.layers import sinkhorn

COLUMNS = f"{'cost':<8} {'epsilon':>8} {'sweeps':>8} {'s':>7} {'newton':>8} {'s':>7} {'ratio':>7}"


def costs(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Independent random costs, and squared distances of random points in the unit square."""
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
    return {"random": draw(size, size), "points": (draw(size, 1, 2) - draw(size, 2)).square().sum(-1)}


def marginal(size: int, generator: torch.Generator) -> Tensor:
    weights = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    return weights / weights.sum()


def gradient(cost: Tensor, a: Tensor, b: Tensor, epsilon: float) -> tuple[float, float]:
    """Seconds of a gradient in the cost, and its relative error along one direction."""
    generator = torch.Generator().manual_seed(1)
    weights, direction = (torch.rand(cost.shape, generator=generator, dtype=cost.dtype) - 0.5 for _ in range(2))

    def value(cost: Tensor) -> Tensor:
        return (weights * sinkhorn(cost, a, b, epsilon=epsilon, tol=1e-13, newton=True)[0].plan).sum()

    leaf = cost.clone().requires_grad_()
    result = value(leaf)
    start = time.perf_counter()
    (found,) = torch.autograd.grad(result, leaf)
    seconds = time.perf_counter() - start
    step = 1e-4 * epsilon * direction
    want = (value(cost + step) - value(cost - step)) / 2e-4 / epsilon
    return seconds, abs(((found * direction).sum() - want) / want).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--max-iter", type=int, default=20_000, help="of Sinkhorn's iteration")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, 1 thread, n = m = {options.size}, marginal error 1e-10")
    print(f"{COLUMNS} {'gradient s':>11} {'error':>8}")
    for name, cost in costs(options.size, generator).items():
        a, b = marginal(options.size, generator), marginal(options.size, generator)
        for epsilon in (1e-2, 2e-3, 1e-3, 5e-4):
            row = f"{name:<8} {epsilon:>8}"
            passes = []
            for newton in (False, True):
                start = time.perf_counter()
                found, info = sinkhorn(cost, a, b, epsilon=epsilon, newton=newton, max_iter=options.max_iter)
                seconds = time.perf_counter() - start
                passes.append(info.num_evaluations)
                row += f" {info.num_evaluations:>7}{' ' if info.converged else '+'} {seconds:>7.2f}"
            seconds, error = gradient(cost, a, b, epsilon)
            print(f"{row} {passes[1] / passes[0]:>7.4f} {seconds:>11.2f} {error:>8.1e}", flush=True)
    print("+ stopped at the limit on iterations")


if __name__ == "__main__":
    main()
