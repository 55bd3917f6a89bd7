"""What one CG iteration costs beside the product in it, on two Hessians in float32.

Products go through one retained double-backward graph. A step is the time of a solve with 40 iterations, less that of
one with 10, divided by 30; product and step are measured in turns, and the ratio is the median over rounds.

Run: python -m experiments.benchmarks.cg_step
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from implicitgrad.linalg import CG, LinearOperator

ROUNDS = 15
SHORT, LONG = 10, 40


def logistic_regression() -> LinearOperator:
    """10 000 examples, 1000 features, damping 1e-3."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(10_000, 1000, generator=generator)
    signs = torch.randn(10_000, generator=generator).sign()
    w = torch.zeros(1000, requires_grad=True)
    loss = torch.nn.functional.softplus(-signs * (features @ w)).mean() + 0.5e-3 * w.dot(w)
    return hessian(loss, w)


def perceptron() -> LinearOperator:
    """784-256-10 with tanh and cross entropy, batch of 512, 203 530 weights; damped by 1, so that it is definite."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(512, 784, generator=generator)
    labels = torch.randint(10, (512,), generator=generator)
    shapes = [(256, 784), (256,), (10, 256), (10,)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    w = (0.03 * torch.randn(sum(sizes), generator=generator)).requires_grad_()
    weights = [part.view(shape) for part, shape in zip(w.split(sizes), shapes, strict=True)]
    hidden = torch.tanh(torch.nn.functional.linear(images, weights[0], weights[1]))
    logits = torch.nn.functional.linear(hidden, weights[2], weights[3])
    return hessian(torch.nn.functional.cross_entropy(logits, labels) + 0.5 * w.dot(w), w)


def hessian(loss: Tensor, w: Tensor) -> LinearOperator:
    (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
    return LinearOperator(
        lambda v: torch.autograd.grad(gradient, w, v, retain_graph=True)[0],
        w.numel(),
        symmetric=True,
        definite=True,
        dtype=w.dtype,
        device=w.device,
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(A: LinearOperator) -> tuple[float, float, float]:
    """Seconds of a product, of a CG step, and the median ratio of the two."""
    b = torch.randn(A.size, generator=torch.Generator().manual_seed(1))
    # a tolerance that is never met, so that all iterations are done
    short, long = CG(rtol=1e-30, max_iter=SHORT), CG(rtol=1e-30, max_iter=LONG)
    for solver in (short, long):
        assert solver.solve(A, b).num_iter == solver.max_iter
    count, products, steps = LONG - SHORT, [], []
    for _ in range(ROUNDS):
        products.append(seconds(lambda: [A @ b for _ in range(count)]) / count)
        brief = seconds(lambda: short.solve(A, b))
        steps.append((seconds(lambda: long.solve(A, b)) - brief) / count)
    ratio = statistics.median(step / product for step, product in zip(steps, products, strict=True))
    return statistics.median(products), statistics.median(steps), ratio


def main() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {ROUNDS} rounds")
    print(f"{'problem':<22} {'product ms':>10} {'CG step ms':>10} {'ratio':>6}")
    for problem in (logistic_regression, perceptron):
        product, step, ratio = measure(problem())
        print(f"{problem.__name__:<22} {1e3 * product:>10.3f} {1e3 * step:>10.3f} {ratio:>6.3f}")


if __name__ == "__main__":
    main()
