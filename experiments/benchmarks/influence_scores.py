"""Influence scores of logistic regressions beside exact leave-one-out retraining, and pyDVL on the same problems.

Breast cancer (scikit-learn, standardised; 455 training and 114 test examples, 31 weights) and ones against sevens of
MNIST (pixels from 0 to 1; 2000 and 100 examples, 785 weights) with an intercept and a penalty of `0.005 |y|²`, in
float64. The models are trained by Newton's method. So are those without one of 200 training examples, from the full
model on: `correlation` and `relative error` compare scores with exact changes over all pairs with these. Seconds cover
everything from the trained model to the scores of all pairs. pyDVL leaves the penalty out of the gradients of single
examples, and runs with its own tolerances; its CG returns zeros for all test examples beyond the n-th.

MNIST is read from `mnist/` in the folder that the environment variable IMPLICITGRAD_DATA names, as the four files of
its publishers, gzipped. pyDVL lives in an environment of its own; without it its rows say so:

    python -m venv peers && peers/bin/pip install torch==2.13.0 scikit-learn "pyDVL[influence]==0.10.0"

Run: peers/bin/python -m experiments.benchmarks.influence_scores
"""

import argparse
import functools
import gzip
import importlib.metadata
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import implicitgrad as ig
from experiments.benchmarks.influence_peers import Batch, pydvl, pydvl_scores
from experiments.newton import newton
from implicitgrad.influence import Influence

PENALTY = 1e-2
REFERENCE = "implicitgrad"
SECONDS = 20  # a method is not run again after so long


@dataclass(frozen=True)
class Problem:
    """A logistic regression: features with a constant one, targets 0 and 1."""

    name: str
    train: Batch
    test: Batch

    def minimise(self, data: Batch, start: Tensor) -> Tensor:
        """The minimiser of the training loss on `data`."""
        X, t = data

        def curvature(y: Tensor) -> Tensor:
            p = torch.sigmoid(X @ y)
            return (X.mT * (p * (1 - p))) @ X / len(t) + PENALTY * torch.eye(len(y), dtype=y.dtype)

        objective = lambda y: cross_entropy(X @ y, t) + PENALTY / 2 * y.dot(y)
        return newton(objective, curvature, start, gtol=1e-12)

    def solution(self) -> Tensor:
        return self.minimise(self.train, torch.zeros_like(self.train[0][0]))

    def without(self, group: Tensor, start: Tensor) -> Tensor:
        """The minimiser without some training examples."""
        left = torch.ones(len(self.train[1]), dtype=torch.bool)
        left[group] = False
        return self.minimise((self.train[0][left], self.train[1][left]), start)

    def test_losses(self, y: Tensor) -> Tensor:
        X, t = self.test
        return cross_entropy(X @ y, t, reduction="none")


def breast_cancer() -> Problem:
    features, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(569, generator=torch.Generator().manual_seed(0))
    X, t = torch.as_tensor(features)[order], torch.as_tensor(labels, dtype=torch.float64)[order]
    X = torch.cat([(X - X[:455].mean(0)) / X[:455].std(0), torch.ones(569, 1, dtype=X.dtype)], dim=1)
    return Problem("breast cancer", (X[:455], t[:455]), (X[455:], t[455:]))


def mnist_pair(folder: Path) -> Problem:
    images, labels = (
        torch.frombuffer(bytearray(gzip.decompress((folder / f"train-{name}.gz").read_bytes())), dtype=torch.uint8)
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    images, labels = images[16:], labels[8:]  # after the headers
    pair = ((labels == 1) | (labels == 7)).nonzero().squeeze(1)[:2100]
    X = torch.cat([images.view(-1, 784)[pair].double() / 255, torch.ones(2100, 1, dtype=torch.float64)], dim=1)
    t = (labels[pair] == 7).double()
    return Problem("MNIST, 1 against 7", (X[:2000], t[:2000]), (X[2000:], t[2000:]))


def penalty(y: Tensor) -> Tensor:
    return PENALTY / 2 * y.square().sum()


def influence(problem: Problem, y: Tensor) -> Influence:
    return Influence(lambda y, X: X @ y, cross_entropy, y, problem.train, regulariser=penalty)


def influence_of_module(problem: Problem, net: nn.Module) -> Influence:
    net_fn = ig.functional(net)
    regulariser = lambda params: penalty(params["0.weight"])
    return Influence(net_fn, cross_entropy, net_fn.parameters(), problem.train, regulariser=regulariser)


def methods(problem: Problem, y: Tensor) -> dict[str, Callable[[], Tensor] | None]:
    """Every way to the scores; None for what is not installed."""
    net = nn.Sequential(nn.Linear(len(y), 1, bias=False, dtype=y.dtype), nn.Flatten(0))
    net.load_state_dict({"0.weight": y.unsqueeze(0)})
    rows: dict[str, Callable[[], Tensor] | None] = {
        REFERENCE: lambda: influence(problem, y).scores(*problem.test),
        "implicitgrad, nn.Linear": lambda: influence_of_module(problem, net).scores(*problem.test),
    }
    for method in ("direct", "CG", "block CG"):
        scores = functools.partial(pydvl_scores, method, net, cross_entropy, PENALTY, problem.train, problem.test)
        rows[f"pyDVL, {method}"] = scores if pydvl else None
    return rows


def timed(work: Callable[[], Tensor], rounds: int) -> tuple[Tensor, float]:
    """The result, and the fewest seconds of several runs; slow ones are run once."""
    best, begin = float("inf"), time.perf_counter()
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > SECONDS:
            break
    return result, best


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def print_table(problem: Problem, num_left_out: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(1)
    y = problem.solution()
    order = torch.randperm(len(problem.train[1]), generator=generator)
    left_out = order[:num_left_out]
    start = time.perf_counter()
    moved = torch.stack([problem.test_losses(problem.without(i, y)) for i in left_out], dim=1)
    seconds = time.perf_counter() - start
    exact = moved - problem.test_losses(y).unsqueeze(1)

    (num_test, count), (num_train, n) = exact.shape, problem.train[0].shape
    print(f"\n{problem.name}: N = {num_train}, n = {n}, {num_test} test examples")
    print(f"{'method':24} {'seconds':>9} {'ratio':>7} {'correlation':>11} {'relative error':>14}")
    reference = float("nan")
    for name, method in methods(problem, y).items():
        if method is None:
            print(f"{name:24} not installed")
            continue
        scores, best = timed(method, rounds)
        reference = best if name == REFERENCE else reference
        error = torch.linalg.matrix_norm(scores[:, left_out] - exact) / torch.linalg.matrix_norm(exact)
        row = (
            f"{best:9.3f} {best / reference:7.1f} {correlation(scores[:, left_out], exact):11.4f} {error.item():14.3f}"
        )
        print(f"{name:24} {row}")
    print(f"{f'retraining, {count} of {num_train}':24} {seconds:9.3f}")
    print_removal(problem, influence(problem, y), y, order)


def print_removal(problem: Problem, known: Influence, y: Tensor, order: Tensor) -> None:
    for size in (1, 10, 100):
        group = order[:size]
        removed, seconds = timed(lambda group=group: known.remove(group), 1)
        exact = problem.without(group, y)
        error, distance = torch.linalg.vector_norm(removed - exact), torch.linalg.vector_norm(y - exact)
        print(f"remove {size:3d}: {seconds:.3f} s, error {error:.1e}, of a distance to retraining {distance:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--left-out", type=int, default=200, help="training examples left out one by one")
    parser.add_argument("--rounds", type=int, default=5, help=f"runs of every method that takes less than {SECONDS} s")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # pyDVL's use of its own dependencies
    peer = f"pyDVL {importlib.metadata.version('pyDVL')}" if pydvl else "no pyDVL"
    print(f"torch {torch.__version__}, {peer}; {options.threads} threads, float64; ratio: to the first row")
    print_table(breast_cancer(), options.left_out, options.rounds)
    folder = Path(os.environ.get("IMPLICITGRAD_DATA", "shared/data")) / "mnist"
    if folder.is_dir():
        print_table(mnist_pair(folder), options.left_out, options.rounds)
    else:
        print(f"\nMNIST: no folder {folder}; set IMPLICITGRAD_DATA")


if __name__ == "__main__":
    main()
