"""A batch of quadratic programs, solved and differentiated: time and error beside cvxpylayers and qpth.

    python -m experiments.benchmarks.qp_peers

Solves 64 random programs (100 variables, 50 equalities, 100 inequalities, 33 of them active) and backpropagates
`weights · z` into every matrix and vector. Errors are relative to the largest entry: of the solution, which is known by
construction, and of the gradients, which autograd finds in closed form; the worst over the parts. Peers that are not
installed are left out. Everyone uses as many threads as torch (OMP_NUM_THREADS): cvxpylayers solves that many problems
at once.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.qp_problem import Problem, RandomPrograms
from implicitgrad.solvers import QPPackage, solve_qp

cvxpy: Any
CvxpyLayer: Any
qpth: Any
try:
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer  # pyright: ignore[reportMissingImports]
except ImportError:
    CvxpyLayer = None
try:
    import qpth.qp as qpth  # pyright: ignore[reportMissingImports]
except ImportError:
    qpth = None

Solve = Callable[[Problem], Tensor]


def cvxpylayers(programs: RandomPrograms, **solver_args: Any) -> Solve:
    """The idiom of its documentation: a factor of Q is the parameter, as Q itself breaks the rules of DPP."""
    n, p, m = programs.num_variables, programs.num_equalities, programs.num_inequalities
    root, c = cvxpy.Parameter((n, n)), cvxpy.Parameter(n)
    A, b, G, h = cvxpy.Parameter((p, n)), cvxpy.Parameter(p), cvxpy.Parameter((m, n)), cvxpy.Parameter(m)
    z = cvxpy.Variable(n)
    loss = cvxpy.sum_squares(root @ z) / 2 + c @ z
    layer = CvxpyLayer(cvxpy.Problem(cvxpy.Minimize(loss), [A @ z == b, G @ z <= h]), [root, c, A, b, G, h], [z])

    def solve(problem: Problem) -> Tensor:
        factor = torch.linalg.cholesky((problem["Q"] + problem["Q"].mT) / 2).mT
        rest = [problem[name] for name in ("c", "A", "b", "G", "h")]
        jobs = {"n_jobs_forward": torch.get_num_threads(), "n_jobs_backward": torch.get_num_threads()}
        return layer(factor, *rest, solver_args={**jobs, **solver_args})[0]

    return solve


def qpth_solve(problem: Problem) -> Tensor:
    """qpth's batched interior point method with its default settings."""
    Q, c, A, b, G, h = (problem[name] for name in ("Q", "c", "A", "b", "G", "h"))
    return qpth.QPFunction(verbose=-1)((Q + Q.mT) / 2, c, G, h, A, b)


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference in units of the largest entry."""
    return ((got - want).abs().max() / want.abs().max()).item()


@dataclass
class Row:
    """The fastest run of one solver, in seconds, and its errors."""

    seconds: float = float("inf")
    forward: float = 0.0
    solution: float = 0.0
    gradients: float = 0.0

    def run(self, solve: Solve, problem: Problem, z: Tensor, weights: Tensor, exact: Problem) -> None:
        """Solve and differentiate once more."""
        leaves = {part: value.clone().requires_grad_() for part, value in problem.items()}
        start = time.perf_counter()
        out = solve(leaves)
        between = time.perf_counter()
        found = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
        end = time.perf_counter()
        if end - start < self.seconds:
            self.seconds, self.forward = end - start, between - start
        gradients = dict(zip(leaves, found, strict=True))
        gradients["Q"] = (gradients["Q"] + gradients["Q"].mT) / 2
        self.solution = relative(out.detach(), z)
        self.gradients = max(relative(gradients[part], exact[part]) for part in exact)

    def __str__(self) -> str:
        backward = self.seconds - self.forward
        return f"{self.seconds:9.3f}{self.forward:9.3f}{backward:9.3f}{self.solution:12.1e}{self.gradients:12.1e}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    programs = RandomPrograms(size=arguments.size)
    problem, z = programs.draw()
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = programs.exact_gradients(problem, weights)
    solvers: dict[str, Solve] = {
        "solve_qp": lambda problem: solve_qp(problem)[0]["primal"],
        "solve_qp under vmap": torch.func.vmap(lambda problem: solve_qp(problem)[0]["primal"]),
        "solve_qp by OSQP": lambda problem: solve_qp(problem, solver=QPPackage("osqp"))[0]["primal"],
        "solve_qp by Clarabel": lambda problem: solve_qp(problem, solver=QPPackage("clarabel"))[0]["primal"],
    }
    if qpth is not None:
        solvers["qpth"] = qpth_solve
    if CvxpyLayer is not None:
        tight = {"eps": 1e-10, "max_iters": 100_000}
        solvers["cvxpylayers"] = cvxpylayers(programs)
        solvers["cvxpylayers, dense"] = cvxpylayers(programs, mode="dense")
        solvers["cvxpylayers, dense, eps 1e-10"] = cvxpylayers(programs, mode="dense", **tight)
    rows = {name: Row() for name in solvers}
    for _ in range(arguments.repeats):  # in turns, so that other work on the machine hits all alike
        for name, row in rows.items():
            row.run(solvers[name], problem, z, weights, exact)
    print(f"{programs}, {torch.get_num_threads()} threads, fastest of {arguments.repeats}")
    print(f"{'':32}{'seconds':>9}{'forward':>9}{'backward':>9}{'solution':>12}{'gradients':>12}")
    for name, row in rows.items():
        print(f"{name:32}{row}")


if __name__ == "__main__":
    main()
