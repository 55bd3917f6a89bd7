"""Gradients of a quadratic program in every matrix and vector against finite differences around a Clarabel solution.

    python -m experiments.benchmarks.qp_gradients

Needs Clarabel and SciPy. Prints, for every part of the program, the largest relative difference over random directions
between the slope by the implicit gradient and the one by differences of order four of `weights · z`. The solutions that
are differenced come from Clarabel, polished on the active set that it found.
"""

import argparse

import torch
from torch import Tensor

import implicitgrad as ig
from experiments.benchmarks.qp_problem import Problem, RandomPrograms
from implicitgrad.solvers import QPInteriorPoint, QPPackage, solve_qp

STEP = 1e-4  # rounding of 1e-14 / STEP and a fifth derivative times STEP⁴ are both far below 1e-7


def slope(problem: Problem, part: str, direction: Tensor, weights: Tensor) -> Tensor:
    """Derivative of `weights · z` along a direction in one part."""
    solver = QPPackage("clarabel", tol=1e-12)

    def value(t: float) -> Tensor:
        y, _ = solver.run({**problem, part: problem[part] + t * direction}, None)
        return (y["primal"] * weights).sum()

    near, far = value(STEP) - value(-STEP), value(2 * STEP) - value(-2 * STEP)
    return (8 * near - far) / (12 * STEP)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directions", type=int, default=5, help="random directions for each part")
    arguments = parser.parse_args()
    programs = RandomPrograms(size=1)
    stack, _ = programs.draw()
    problem = {name: part[0] for name, part in stack.items()}
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(programs.num_variables, generator=generator, dtype=torch.float64)
    print(f"{'solver':>16}  {'part':>4}  largest relative difference of slopes")
    for name, solver in (("interior point", QPInteriorPoint()), ("Clarabel", QPPackage("clarabel", tol=1e-12))):
        leaves = {part: value.clone().requires_grad_() for part, value in problem.items()}
        with ig.diagnostics() as log:
            y, _ = solve_qp(leaves, solver=solver)
            (y["primal"] @ weights).backward()
        for part, value in leaves.items():
            errors = []
            for _ in range(arguments.directions):
                direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                direction /= torch.linalg.vector_norm(direction)
                assert value.grad is not None
                want = slope(problem, part, direction, weights)
                errors.append(abs((value.grad * direction).sum() - want) / abs(want))
            print(f"{name:>16}  {part:>4}  {max(errors):.1e}")
        print(log)


if __name__ == "__main__":
    main()
