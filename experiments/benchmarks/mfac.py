"""What an inverse of m rows costs beside reading the rows twice, and how accurate it is in float32.

Costs are ratios to ``G @ v`` plus ``c @ G``, the two passes that no method with stored rows can avoid, measured in
turns with the work itself; medians of process time on one thread. "recursion" is the static algorithm of the M-FAC
paper, ``F⁻¹gᵢ`` row by row, written with one matrix-vector product per pass.

Errors are relative to float64, for 256 rows of 20 000 entries with condition number 2e4: singular values that are all
equal or spread over 1.5 decades.

Run: python -m experiments.benchmarks.mfac
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from implicitgrad.linalg import LowRankInverse, SlidingWindow, split_rows

SIZES = [(64, 400_000), (256, 200_000), (512, 100_000)]
DAMPING = 1e-2
ROUNDS = 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(work: Callable[[], object], two_passes: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median over rounds of the time of `work` in units of that of `two_passes` just before."""
    work()
    two_passes()
    pairs = [(seconds(two_passes), seconds(work)) for _ in range(rounds)]
    return statistics.median(time / unit for unit, time in pairs)


def recursion(rows: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """F⁻¹gᵢ of the rows before i, and the denominators; what the paper's static algorithm precomputes."""
    images, denominators = torch.empty_like(rows), rows.new_empty(len(rows))
    for i, g in enumerate(rows):
        coefficients = (images[:i] @ g) / denominators[:i]
        images[i] = torch.addmv(g, images[:i].T, coefficients, beta=1 / damping, alpha=-1)
        denominators[i] = len(rows) + g @ images[i]
    return images, denominators


def recursive_apply(images: Tensor, denominators: Tensor, damping: float, v: Tensor) -> Tensor:
    return torch.addmv(v, images.T, (images @ v) / denominators, beta=1 / damping, alpha=-1)


def costs(m: int, n: int) -> str:
    """One line of the first table."""
    rows, v, c = draw(m, n), draw(n, seed=1), draw(m, seed=2)
    block, weights = draw(8, n, seed=3), draw(8, m, seed=4)
    inverse = LowRankInverse(rows, DAMPING, 1 / m)
    half = LowRankInverse(split_rows(rows, storage=torch.bfloat16), DAMPING, 1 / m)
    window = SlidingWindow(m, n, DAMPING)
    for g in rows:
        window.add(g)
    two_passes = lambda: (rows @ v, c @ rows)
    against = lambda work, rounds=ROUNDS: ratio(work, two_passes, rounds)
    precompute = against(lambda: LowRankInverse(rows, DAMPING, 1 / m), 3)
    figures = [
        against(lambda: inverse.apply(v)),
        against(lambda: inverse.apply(block)) / len(block),
        against(lambda: (block @ rows.T, weights @ rows)) / len(block),
        against(lambda: window.apply(v)),
        against(lambda: window.add(v)),
        against(lambda: window.update_apply(v)),
        against(lambda: inverse.apply(v, refine=1), 3),
        against(lambda: half.apply(v), 3),
        precompute,
        against(lambda: LowRankInverse(rows, DAMPING, 1 / m).diagonal(), 1),
        against(lambda: recursion(rows, DAMPING), 1),
    ]
    unit = statistics.median(seconds(two_passes) for _ in range(ROUNDS))
    return f"{m:>4} {n:>7} {1e3 * unit:>7.1f} ms" + "".join(f"{figure:>11.2f}" for figure in figures)


def accuracy(decades: float) -> list[str]:
    """Lines of the second table."""
    m, n, damping = 256, 20_000, 1e-6
    left = torch.linalg.qr(draw(m, m).double()).Q
    right = torch.linalg.qr(draw(n, m, seed=1).double()).Q
    singular = torch.logspace(0, -decades, m, dtype=torch.float64) * (2e-2 * m) ** 0.5
    rows = (left @ (singular.unsqueeze(-1) * right.mT)).float()
    wide = rows.double()
    core = torch.linalg.cholesky(damping * m * torch.eye(m, dtype=torch.float64) + wide @ wide.mT)

    def error(found: Tensor, v: Tensor) -> float:
        sums = torch.cholesky_solve((wide @ v.double()).unsqueeze(-1), core).squeeze(-1)
        wanted = (v.double() - wide.mT @ sums) / damping
        return float((found.double() - wanted).norm() / wanted.norm())

    inverse, (images, denominators) = LowRankInverse(rows, damping, 1 / m), recursion(rows, damping)
    window = SlidingWindow(m, n, damping)
    for g in rows[:-1]:
        window.add(g)
    lines = []
    kinds = {"random": draw(n, seed=2), "in the span": draw(m, seed=3) @ rows, "newest row": rows[-1]}
    for name, v in kinds.items():
        errors = [
            error(recursive_apply(images, denominators, damping, v), v),
            error(inverse.apply(v), v),
            error(inverse.apply(v, refine=1), v),
        ]
        if name == "newest row":  # the window had room for one more
            errors += [error(window.update_apply(v), v), error(window.apply_row(m - 1, refine=1), v)]
        lines.append(f"{decades:>7} {name:<12}" + "".join(f"{value:>12.1e}" for value in errors))
    return lines


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; units of G @ v plus c @ G")
    heads = ["apply", "8 RHS, each", "(bound)", "window", "update", "upd+apply", "refine=1", "bfloat16"]
    heads += ["precompute", "+diagonal", "recursion"]
    print(f"{'m':>4} {'n':>7} {'unit':>10}" + "".join(f"{head:>11}" for head in heads))
    for m, n in SIZES:
        print(costs(m, n), flush=True)
    print("\nrelative error in float32, condition number 2e4")
    heads = ["recursion", "apply", "refine=1", "span", "span refined"]
    print(f"{'decades':>7} {'vector':<12}" + "".join(f"{head:>12}" for head in heads))
    for decades in (0.0, 1.5):
        print("\n".join(accuracy(decades)), flush=True)


if __name__ == "__main__":
    main()
