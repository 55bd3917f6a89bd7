"""What products with retained curvature cost beside a gradient, in time and in memory.

Time is CPU time of this process on one thread, each quantity measured in turns with the others; a ratio is the median
over rounds. `by hand` is a Hessian-vector product written out: one gradient with `create_graph=True` over the list of
parameters, then `torch.autograd.grad(gradient, parameters, v, retain_graph=True)`.

Memory is the peak of what is allocated above the start, from the allocation events of `torch.profiler`: of a gradient,
of a product and of 5 CG iterations with a Hessian that is there already, damped, and of all three steps of a solve from
nothing: graph, self-test, iterations. `allowed` is 2 gradients + 5 vectors.

Run: OMP_NUM_THREADS=1 python -m experiments.benchmarks.curvature_products
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import implicitgrad as ig
from implicitgrad import tree
from implicitgrad.curvature import gauss_newton, hessian
from implicitgrad.linalg import CG

ROUNDS = 15
SECONDS = 0.1  # per quantity and round, at least


class Problem(NamedTuple):
    net: nn.Module
    inputs: Tensor
    targets: Tensor
    most: float  # Hessian products in gradients, at most

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Block(nn.Module):
    """Attention and a perceptron, both after layer norm and beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.first(tokens)
        tokens = tokens + self.mix(normed, normed, normed, need_weights=False)[0]
        return tokens + self.think(self.second(tokens))


def logistic() -> Problem:
    return Problem(nn.Linear(1000, 2), torch.randn(10_000, 1000), torch.randint(2, (10_000,)), 1.15)


def perceptron() -> Problem:
    """One hidden layer, batch 512."""
    net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
    return Problem(net, torch.randn(512, 784), torch.randint(10, (512,)), 1.15)


def deep_perceptron() -> Problem:
    """Four hidden layers of 512, batch 512."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.Tanh())]
    net = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), *hidden, nn.Linear(512, 10))
    return Problem(net, torch.randn(512, 784), torch.randint(10, (512,)), 1.8)


def transformer() -> Problem:
    """Two blocks of width 128, 8 sequences of 64 tokens."""
    net = nn.Sequential(nn.Embedding(256, 128), Block(128), Block(128), nn.Linear(128, 256))
    return Problem(net, torch.randint(256, (8, 64)), torch.randint(256, (8, 64)), 2.3)


def seconds_of(work: Callable[[], Any]) -> float:
    """CPU seconds of one call, over as many calls as take a while."""
    calls, start = 0, time.process_time()
    while (passed := time.process_time() - start) < SECONDS:
        work()
        calls += 1
    return passed / calls


def peak_memory(work: Callable[[], Any]) -> int:
    """Most bytes allocated at a time while `work` runs, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events: list[Any] = results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


def measure(make: Callable[[], Problem]) -> str:
    torch.manual_seed(0)
    problem = make()
    model = ig.functional(problem.net)
    y = model.parameters()
    leaves = {name: value.clone().requires_grad_() for name, value in y.items()}
    objective = lambda y, inputs, targets: problem.loss(model(y, inputs), targets)
    value = lambda: objective(leaves, problem.inputs, problem.targets)
    wrt = list(leaves.values())

    def gradient() -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.grad(value(), wrt)

    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.autograd.grad(value(), wrt, create_graph=True)
    H = hessian(objective, y, problem.inputs, problem.targets)
    G = gauss_newton(model, problem.loss, y, problem.inputs, problem.targets)
    v = torch.randn(H.size)
    parts = list(tree.ravel(y)[1](v).values())
    works = {
        "gradient": gradient,
        "by hand": lambda: torch.autograd.grad(slope, wrt, parts, retain_graph=True),
        "hessian": lambda: H @ v,
        "gauss_newton": lambda: G @ v,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    ratio = lambda a, b: statistics.median(p / q for p, q in zip(times[a], times[b], strict=True))

    solve = lambda A: CG(rtol=1e-30, max_iter=5).solve(A, v).value
    peak, product, solved = (peak_memory(work) for work in (gradient, lambda: H @ v, lambda: solve(H.damped(1.0))))
    whole = peak_memory(lambda: solve(hessian(objective, y, problem.inputs, problem.targets).damped(1.0)))
    allowed = 2 * peak + 5 * v.nbytes
    return (
        f"{make.__name__:<16} {len(v):>8} {1e3 * statistics.median(times['gradient']):>8.2f}"
        f" {ratio('hessian', 'gradient'):>8.2f} {problem.most:>5.2f} {ratio('hessian', 'by hand'):>8.2f}"
        f" {ratio('gauss_newton', 'gradient'):>8.2f} {peak / 2**20:>9.1f} {v.nbytes / 2**20:>9.1f}"
        f" {product / peak:>9.2f} {solved / allowed:>13.2f} {whole / peak:>10.2f}"
    )


def main() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {ROUNDS} rounds")
    print("H, G: a product with the Hessian and the Gauss-Newton matrix; from `grad MB` on: peak memory")
    print(
        f"{'problem':<16} {'numbers':>8} {'grad ms':>8} {'H/grad':>8} {'most':>5} {'H/hand':>8} {'G/grad':>8}"
        f" {'grad MB':>9} {'vector MB':>9} {'H@v/grad':>9} {'solve/allowed':>13} {'whole/grad':>10}"
    )
    for make in (logistic, perceptron, deep_perceptron, transformer):
        print(measure(make), flush=True)


if __name__ == "__main__":
    main()
