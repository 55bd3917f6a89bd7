"""When does the exact inverse of a Gauss-Newton matrix pay? Its cost in products, against CG, in float32.

784-256-10 perceptron with tanh and cross entropy, 203 530 weights, 256 examples: 2560 outputs, a Gram matrix of 2304
rows. The variances of the 784 features fall like 1 / k, as those of the principal components of images do. Two
right-hand sides: the gradient of the loss, which lies in the range of the matrix, and a normal vector, most of which
lies in its null space. The residuals of both methods are measured with products of `gauss_newton`; in brackets stands
what `exact_gauss_newton` finds with products of its own.

Run: python -m experiments.benchmarks.exact_gauss_newton
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from implicitgrad import functional, tree
from implicitgrad.curvature import exact_gauss_newton, gauss_newton
from implicitgrad.linalg import CG, KnownInverse, LinearOperator

DAMPINGS = [1e-2, 1e-4, 1e-6]
ROUNDS = 7


def problem() -> tuple[Any, dict[str, Tensor], Tensor, Tensor]:
    """The network as a function, its parameters, images and labels."""
    generator = torch.Generator().manual_seed(0)
    model = functional(nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10)))
    y = {
        name: torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5
        for name, value in model.parameters().items()
    }
    variances = 1 / torch.arange(1.0, 785.0)
    images = torch.randn(256, 784, generator=generator) * (variances / variances.mean()).sqrt()
    return model, y, images, torch.randint(10, (256,), generator=generator)


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median processor time of a call after one for warming up."""
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def residual(G: LinearOperator, damping: float, x: Tensor, b: Tensor) -> float:
    return ((b - G @ x - damping * x).norm() / b.norm()).item()


def main() -> None:
    torch.set_num_threads(1)
    model, y, images, labels = problem()
    arguments = model, F.cross_entropy, y, images, labels
    G = gauss_newton(*arguments)
    gradient = tree.ravel(tree.grad(lambda y: F.cross_entropy(model(y, images), labels), y))[0].detach()
    normal = torch.randn(G.size, generator=torch.Generator().manual_seed(1))
    block = torch.randn(16, G.size, generator=torch.Generator().manual_seed(2))

    product = seconds(lambda: G @ normal, 50)
    known = exact_gauss_newton(*arguments)
    setup = seconds(lambda: exact_gauss_newton(*arguments))

    def build() -> None:
        exact_gauss_newton(*arguments).damped(1e-2).known_inverse(normal)  # pyright: ignore[reportOptionalCall]

    whole = seconds(build)
    inverse = known.damped(1e-2).known_inverse
    assert inverse is not None
    one, many = seconds(lambda: inverse(normal)), seconds(lambda: inverse(block)) / len(block)
    others = iter(range(2, 1000))
    refactored = seconds(lambda: known.damped(1e-2 * next(others)).known_inverse(normal))  # pyright: ignore
    own = seconds(lambda: known @ normal)
    print(f"torch {torch.__version__}, one thread; a product of gauss_newton takes {1e3 * product:.2f} ms")
    print(f"in products: set-up {setup / product:.0f}, with Gram matrix, factor and first solve {whole / product:.0f};")
    print(f"next solve {one / product:.1f}, of 16 at once {many / product:.1f} each; first solve at another damping")
    print(f"{refactored / product:.0f}; its own product {own / product:.1f}")
    print("right-hand side  damping | CG: products  time  residual   reason | exact: products  residual  reason")
    for name, b in (("gradient", gradient), ("normal", normal)):
        for damping in DAMPINGS:
            A = G.damped(damping)
            start = time.process_time()
            iterated = CG().solve(A, b)
            spent = time.process_time() - start
            exact = KnownInverse().solve(known.damped(damping), b)
            print(
                f"{name:<16} {damping:>7.0e} | {iterated.num_matvec:>12} {spent / product:>5.0f}"
                f"  {residual(G, damping, iterated.value, b):>8.1e} {iterated.reason:>8} | {exact.num_matvec:>15}"
                f"  {residual(G, damping, exact.value, b):>8.1e}  {exact.reason} ({exact.relative_residual:.1e})"
            )


if __name__ == "__main__":
    main()
