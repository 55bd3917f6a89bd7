"""A deep equilibrium layer beside the same layer unrolled: gradients, peak memory, time.

`z = tanh(z W + x U + b)`, float64; the gradient of `(z · target).sum()` in W, U, b and x. Peak memory is the largest
sum of allocations less frees that torch.profiler records on the CPU from the call of the layer to the end of the
backward pass, gradients included; on a GPU `torch.cuda.max_memory_allocated` beyond what was there before. Times are
wall seconds of a run without the profiler.

Run: python -m experiments.benchmarks.deep_equilibrium [--width 256] [--batch 128] [--steps 500] [--device cpu]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from implicitgrad.layers.fixed_point import FixedPointLayer
from implicitgrad.linalg import GMRES, BiCGSTAB, LinearSolver, Neumann
from implicitgrad.solvers import Anderson, FixedPointIteration, InnerSolver


class Cell(nn.Module):
    """One step, with a recurrent matrix whose largest singular value is `norm`."""

    def __init__(self, width: int, norm: float, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        weight = draw(width, width)
        self.weight = nn.Parameter(norm * weight / torch.linalg.matrix_norm(weight, 2))
        self.lift = nn.Parameter(draw(width, width) / width**0.5)
        self.bias = nn.Parameter(0.1 * draw(width))

    def forward(self, z: Tensor, inputs: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + inputs @ self.lift + self.bias)


def unrolled(cell: Cell, inputs: Tensor, num_steps: int) -> Tensor:
    z = torch.zeros_like(inputs)
    for _ in range(num_steps):
        z = cell(z, inputs)
    return z


def gradients(cell: Cell, forward: Callable[[Tensor], Tensor], inputs: Tensor, target: Tensor) -> list[Tensor]:
    """Of the upper loss, in the inputs and all parameters."""
    inputs = inputs.detach().requires_grad_()
    return list(torch.autograd.grad((forward(inputs) * target).sum(), [inputs, *cell.parameters()]))


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes held at the worst moment of `run` beyond those before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    results = record.profiler.kineto_results.events()  # pyright: ignore
    for event in sorted((e for e in results if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore
        peak = max(peak, held)
    return peak


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest over the tensors, each in its norm."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def problem(width: int, batch: int, norm: float, device: str = "cpu") -> tuple[Cell, Tensor, Tensor]:
    """A cell, inputs and the weights of the upper loss."""
    cell = Cell(width, norm).to(device)
    generator = torch.Generator().manual_seed(1)
    inputs, target = torch.randn(2, batch, width, generator=generator, dtype=torch.float64).to(device)
    return cell, inputs, target


def timed(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in {"width": 256, "batch": 128, "steps": 500}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; {vars(options)}")
    print(
        f"{'norm of W, method':<34} {'radius':>7} {'steps':>6} {'error':>8} {'peak MB':>9} {'ratio':>8} {'seconds':>8}"
    )
    settings: list[tuple[str, Callable[..., InnerSolver], LinearSolver | None]] = [
        ("Anderson, default", partial(Anderson, tol=1e-9), None),
        ("Anderson, GMRES", partial(Anderson, tol=1e-9), GMRES(rtol=1e-8)),
        ("Anderson, BiCGSTAB", partial(Anderson, tol=1e-9), BiCGSTAB(rtol=1e-8)),
        ("Anderson, Neumann", partial(Anderson, tol=1e-9), Neumann(num_terms=500)),
        ("plain, GMRES", partial(FixedPointIteration, tol=1e-9), GMRES(rtol=1e-8)),
    ]
    for norm in (0.9, 2.0):
        cell, inputs, target = problem(options.width, options.batch, norm, options.device)
        long = partial(gradients, cell, partial(unrolled, cell, num_steps=options.steps), inputs, target)
        exact, most, seconds = long(), peak_memory(long, inputs.device), timed(long, inputs.device)
        name = f"{norm}, unrolled {options.steps} times"
        print(f"{name:<34} {'':>7} {options.steps:>6} {'':>8} {most / 1e6:>9.1f} {1:>8} {seconds:>8.2f}")
        for name, solver, linear_solver in settings:
            layer = FixedPointLayer(cell, solver=solver, linear_solver=linear_solver)
            short = partial(gradients, cell, layer, inputs, target)
            error, peak = relative_error(short(), exact), peak_memory(short, inputs.device)
            seconds = timed(short, inputs.device)
            assert layer.info is not None
            radius = layer.spectral_radius(layer(inputs).detach(), inputs)
            print(
                f"{norm}, {name:<29} {radius:>7.3f} {layer.info.num_iter:>6} {error:>8.1e} {peak / 1e6:>9.1f}"
                f" {peak / most:>8.4f} {seconds:>8.2f}"
            )


if __name__ == "__main__":
    main()
