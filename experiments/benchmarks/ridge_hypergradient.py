"""The hypergradient of a ridge regression with 200 penalties: time and error beside TorchOpt, hypertorch and JAXopt.

n = 500, d = 200, float64, CPU. The inner solution is given, so only the hypergradient is timed: from penalties and
solution to the gradient of the validation loss. Every library receives the training loss and differentiates it. Rounds
run every method once, in rotating order; the JAXopt process takes its turn after every ten rounds, so that drift of
the machine hits all alike. A second table has the errors of second derivatives at n = 40, d = 5.

The peers live in environments of their own (rows of a peer that is missing say so):

    python -m venv peers && peers/bin/pip install torch==2.13.0 torchopt==0.7.3
    python -m venv jax && jax/bin/pip install jax==0.10.2 jaxopt==0.8.5

Run: peers/bin/python -m experiments.benchmarks.ridge_hypergradient --jax-python jax/bin/python
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import implicitgrad as ig
from experiments.benchmarks.ridge_peers import hypertorch_cg, torchopt, torchopt_solution
from experiments.benchmarks.ridge_problem import Ridge

ROUNDS_PER_BLOCK = 10
REFERENCE = "implicitgrad, default"

Methods = dict[str, Callable[[], Tensor] | None]  # None: not installed


def hypergradients(problem: Ridge, x: Tensor, y: Tensor) -> Methods:
    """Every way from `x` and the inner solution `y` to the hypergradient; the first, in closed form, ignores `y`."""
    condition = ig.Stationary(problem.loss)

    def implicit(solver: ig.linalg.LinearSolver | None = None) -> Tensor:
        return _gradient(problem.upper(x, ig.implicit_root(condition, x, y, solver=solver)), x)

    def peer(solve: Callable | None = None) -> Callable[[], Tensor]:
        solution = torchopt_solution(problem.loss, solve)
        return lambda: _gradient(problem.upper(x, solution(y, x)), x)

    return {
        "closed form, inner solve included": lambda: _gradient(problem.upper(x, problem.solution(x)), x),
        REFERENCE: implicit,
        "implicitgrad, CG (1e-10)": lambda: implicit(ig.linalg.CG()),
        "implicitgrad, hypergradient() with error estimate": lambda: (
            ig.hypergradient(problem.upper, condition, x, y).value
        ),
        "TorchOpt, default (normal CG, 1e-5)": peer() if torchopt else None,
        "TorchOpt, CG (1e-10)": peer(torchopt.linear_solve.solve_cg(rtol=1e-10)) if torchopt else None,
        "hypertorch-style CG (1e-10)": lambda: hypertorch_cg(problem.upper, problem.loss, x, y),
    }


def second_derivatives(problem: Ridge, x: Tensor) -> Methods:
    """Every way to the matrix of second derivatives of the validation loss in `x`."""
    solve = ig.implicit(ig.Stationary(problem.loss))(problem.solution)
    value = lambda x: problem.upper(x, solve(x))

    def peer(solve: Callable | None = None) -> Callable[[], Tensor]:
        solution = torchopt_solution(problem.loss, solve)
        return lambda: _reverse_twice(lambda x: problem.upper(x, solution(problem.solution(x.detach()), x)), x)

    return {
        "implicitgrad, reverse over reverse (autograd.grad twice)": lambda: _reverse_twice(value, x),
        "implicitgrad, forward over reverse (torch.func.hessian)": lambda: torch.func.hessian(value)(x),
        "implicitgrad, reverse over forward (jacrev of jacfwd)": lambda: torch.func.jacrev(torch.func.jacfwd(value))(x),
        "TorchOpt, reverse over reverse, default": peer() if torchopt else None,
        "TorchOpt, reverse over reverse, CG (1e-10)": (
            peer(torchopt.linear_solve.solve_cg(rtol=1e-10)) if torchopt else None
        ),
    }


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value, x)[0]


def _reverse_twice(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value(x), x, create_graph=True)
    rows = [torch.autograd.grad(entry, x, retain_graph=True, materialize_grads=True)[0] for entry in gradient]
    return torch.stack(rows)


class JaxProcess:
    """The JAXopt methods in an interpreter that has JAX: derivatives at once, times on demand."""

    def __init__(self, python: str, threads: int, problems: list[dict[str, np.ndarray]]) -> None:
        flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
        limits = dict.fromkeys(("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder, f"{i}.npz")) for i in range(len(problems))]
            for file, arrays in zip(files, problems, strict=True):
                np.savez(file, **arrays)  # type: ignore[arg-type]
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name("ridge_jax.py")), *files],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **limits, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            )
            answer = self._receive()
        self.version: str = answer["version"]
        self.gradients = {name: torch.tensor(g, dtype=torch.float64) for name, g in answer["gradients"].items()}
        self.hessian = torch.tensor(answer["hessian"], dtype=torch.float64)

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """The times of so many runs of every method."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rounds}\n")
        self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the JAX process ended early; its own message is above")
        return json.loads(line)


def measure(
    methods: dict[str, Callable[[], Tensor]], jax: JaxProcess | None, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every run, without a first block for warming up, and the CPU time of torch over its wall time.

    On one thread that quotient is 1 on an idle machine. Below 0.95 others had the processor, and times that long runs
    lost to them say nothing about a method.
    """
    seconds: dict[str, list[float]] = {}
    cpu = wall = 0.0
    for block in range(1 + rounds // ROUNDS_PER_BLOCK):
        before = time.process_time(), time.perf_counter()
        times = _run_rounds(methods)
        cpu, wall = cpu + time.process_time() - before[0], wall + time.perf_counter() - before[1]
        if jax is not None:
            times.update(jax.seconds(ROUNDS_PER_BLOCK))
        if block > 0:
            for name, new in times.items():
                seconds.setdefault(name, []).extend(new)
    return seconds, cpu / wall


def _run_rounds(methods: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
    names = list(methods)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(ROUNDS_PER_BLOCK):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            methods[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def relative_error(got: Tensor, want: Tensor) -> float:
    return (torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)).item()


def print_times(errors: dict[str, float], seconds: dict[str, list[float]], missing: list[str]) -> None:
    reference = statistics.median(seconds[REFERENCE])
    print(f"\n{'hypergradient, n = 500, d = 200':50} {'median ms':>9} {'p25 - p75':>15} {'error':>8} {'ratio':>6}")
    for name, error in errors.items():
        low, median, high = statistics.quantiles(seconds[name], n=4)
        spread = f"{1e3 * low:.2f} - {1e3 * high:.2f}"
        print(f"{name:50} {1e3 * median:9.2f} {spread:>15} {error:8.1e} {median / reference:6.2f}")
    for name in missing:
        print(f"{name:50} not installed")


def print_errors(errors: dict[str, float], missing: list[str]) -> None:
    print(f"\n{'second derivatives, n = 40, d = 5':60} {'error':>8}")
    for name, error in errors.items():
        print(f"{name:60} {error:8.1e}")
    for name in missing:
        print(f"{name:60} not installed")


def arrays(problem: Ridge, x: Tensor) -> dict[str, np.ndarray]:
    tensors = {**vars(problem), "x": x, "y": problem.solution(x)}
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="for torch and for XLA")
    parser.add_argument("--rounds", type=int, default=100, help="runs of every method, a multiple of 10")
    parser.add_argument("--spread", type=float, default=1.0, help="largest over smallest scale of the features")
    parser.add_argument("--jax-python", help="interpreter of the environment with JAXopt; left out if not given")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)  # TorchOpt calls it by its old name

    problem, small = Ridge.random(500, 200, options.spread), Ridge.random(40, 5)
    x, small_x = problem.penalties(), small.penalties()
    y = problem.solution(x).detach()
    gradients, hessians = hypergradients(problem, x, y), second_derivatives(small, small_x)
    installed = {name: method for name, method in gradients.items() if method}
    want = installed["closed form, inner solve included"]()
    errors = {name: relative_error(method(), want) for name, method in installed.items()}
    want_second = _reverse_twice(lambda x: small.upper(x, small.solution(x)), small_x)
    second_errors = {name: relative_error(method(), want_second) for name, method in hessians.items() if method}

    jax = None
    if options.jax_python:
        jax = JaxProcess(options.jax_python, options.threads, [arrays(problem, x), arrays(small, small_x)])
        errors.update({name: relative_error(gradient, want) for name, gradient in jax.gradients.items()})
        second_errors["JAXopt, reverse over reverse (jacrev of jacrev)"] = relative_error(jax.hessian, want_second)
    seconds, busy = measure(installed, jax, options.rounds)

    versions = [f"torch {torch.__version__}", f"torchopt {torchopt.__version__}" if torchopt else "no torchopt"]
    versions.append(jax.version if jax else "JAXopt left out: no --jax-python")
    condition = torch.linalg.cond(problem.hessian(x).detach()).item()
    print(f"{', '.join(versions)}; {options.threads} threads; Hessian of condition {condition:.0f}")
    print(f"CPU time over wall time of torch: {busy:.2f} (1 on one thread of an idle machine)")
    print_times(errors, seconds, [name for name, method in gradients.items() if method is None])
    print_errors(second_errors, [name for name, method in hessians.items() if method is None])
    if jax is not None:
        jax.close()


if __name__ == "__main__":
    main()
