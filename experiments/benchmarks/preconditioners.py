"""Products with the Hessian over 15 outer steps of a bilevel problem, by preconditioner and by who keeps it.

Logistic regression with 4000 examples and 800 features of different scale, one penalty per feature. Each outer step
solves the inner problem, takes the adjoint system `H u = ∇(validation loss)` and moves the log-penalties along the
hypergradient; the trajectory comes from dense solves, so that every method meets the same 15 systems. They are known
by products only, in float64, and solved to a relative residual of 1e-6. Totals have the products of building in them.

"Built once": made at the first system, then used for all, with a warm start. "Recycling": by `Recycling`, which decides
by itself. A diagonal in closed form and M-FAC's gradients of single examples cost no product with the Hessian; they are
given the price of one.

Run: python -m experiments.benchmarks.preconditioners
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg import (
    CG,
    Deflation,
    Jacobi,
    LinearOperator,
    LowRankInverse,
    Nystrom,
    Preconditioner,
    QuasiNewton,
    Recycling,
    Solution,
)

NUM_STEPS = 15
NUM_EXAMPLES, NUM_VALID, NUM_FEATURES = 4000, 1000, 800
FIRST_PENALTY = 2e-4
STEP = 0.15  # mean square change of a log-penalty
RTOL = 1e-6


class System(NamedTuple):
    """One outer step."""

    hessian: Tensor  # (d, d)
    b: Tensor  # (d,)
    gradients: Tensor  # of the losses of 512 examples, (512, d)
    floor: float  # smallest penalty

    def operator(self) -> LinearOperator:
        return LinearOperator(
            lambda v: self.hessian @ v,
            len(self.b),
            matmat=lambda rows: rows @ self.hessian,
            symmetric=True,
            eigenvalue_floor=self.floor,
            dtype=self.b.dtype,
            device="cpu",
        )


def data(num: int, seed: int) -> Tensor:
    """Features with 20 common factors, scaled by 1 to 1/30."""
    scale = torch.logspace(0, -1.5, NUM_FEATURES, dtype=torch.float64)[draw_order()]
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    loadings = torch.randn(20, NUM_FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (normal(num, NUM_FEATURES) + normal(num, 20) @ loadings / 20**0.5) * scale


def draw_order() -> Tensor:
    return torch.randperm(NUM_FEATURES, generator=torch.Generator().manual_seed(0))


def labels(features: Tensor, seed: int) -> Tensor:
    weights = torch.randn(NUM_FEATURES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noise = torch.randn(len(features), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (features @ weights + 0.5 * noise > 0).double()


def newton(features: Tensor, target: Tensor, penalty: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The inner solution and the Hessian there."""
    while True:
        p = torch.sigmoid(features @ w)
        gradient = features.mT @ (p - target) / len(features) + penalty * w
        hessian = (features.mT * (p * (1 - p))) @ features / len(features) + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        if step.norm() <= 1e-10 * (1 + w.norm()):
            return w, (hessian + hessian.mT) / 2
        w = w - step


def trajectory() -> list[System]:
    features, valid = data(NUM_EXAMPLES, seed=3), data(NUM_VALID, seed=4)
    target, wanted = labels(features, seed=5), labels(valid, seed=6)
    x = torch.full((NUM_FEATURES,), FIRST_PENALTY, dtype=torch.float64).log()
    w, systems = torch.zeros(NUM_FEATURES, dtype=torch.float64), []
    for _ in range(NUM_STEPS):
        w, hessian = newton(features, target, x.exp(), w)
        b = valid.mT @ (torch.sigmoid(valid @ w) - wanted) / len(valid)
        errors = (torch.sigmoid(features @ w) - target).unsqueeze(-1)
        systems.append(System(hessian, b, (errors * features)[:512], x.exp().min().item()))
        hypergradient = -x.exp() * w * torch.linalg.solve(hessian, b)
        x = x - STEP * NUM_FEATURES**0.5 * hypergradient / hypergradient.norm()
    return systems


@dataclass(frozen=True)
class Priced(Preconditioner):
    """A preconditioner from other sources than products, at the price of one."""

    name: str
    make: Callable[[System], Callable[[Tensor], Tensor]]
    systems: dict[LinearOperator, System] = field(repr=False, hash=False)

    def build(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        return self.make(self.systems[A])

    def cost(self, A: LinearOperator) -> int:
        return 1

    def __str__(self) -> str:
        return self.name


def built_once(recipe: Preconditioner | None, operators: list[LinearOperator], b: list[Tensor]) -> list[int]:
    P = None if recipe is None else recipe.build(operators[0])
    spent, x = [], None
    for A, right in zip(operators, b, strict=True):
        solution = CG(RTOL, preconditioner=P).solve(A, right, x)
        check(solution)
        spent.append(solution.num_matvec)
        x = solution.value
    spent[0] += 0 if recipe is None else recipe.cost(operators[0])
    return spent


def recycled(recipe: Preconditioner | None, operators: list[LinearOperator], b: list[Tensor]) -> list[int]:
    solver = Recycling(CG(RTOL), recipe)
    solutions = [solver.solve(A, right) for A, right in zip(operators, b, strict=True)]
    for solution in solutions:
        check(solution)
    return [solution.num_matvec for solution in solutions]


def cold(operators: list[LinearOperator], b: list[Tensor]) -> list[int]:
    return [CG(RTOL).solve(A, right).num_matvec for A, right in zip(operators, b, strict=True)]


def check(solution: Solution) -> None:
    assert solution.converged, solution.reason


def main() -> None:
    systems = trajectory()
    operators, b = [system.operator() for system in systems], [system.b for system in systems]
    known = dict(zip(operators, systems, strict=True))
    recipes: list[Preconditioner | None] = [
        None,
        Priced("diagonal in closed form", lambda s: lambda r: r / s.hessian.diagonal(), known),
        Jacobi(),
        Jacobi(num_probes=32),
        Nystrom(rank=50),
        Nystrom(rank=100),
        Nystrom(rank=200),
        Deflation(num_pairs=50),
        Deflation(num_pairs=100),
        QuasiNewton(num_pairs=50),
        QuasiNewton(num_pairs=100),
        Priced("M-FAC, 512 gradients", lambda s: LowRankInverse(s.gradients, s.floor, 1 / 512).apply, known),
    ]
    conditions = [torch.linalg.cond(system.hessian).item() for system in systems]
    print(f"condition of the Hessian {conditions[0]:.1e} at first, {conditions[-1]:.1e} at last")
    bare = cold(operators, b)
    print(f"{'':<40} {'built once':>10} {'Recycling':>10}   products of Recycling, step by step")
    print(f"{'cold starts, no preconditioner':<40} {sum(bare):>10} {'':>10}   {bare}")
    for recipe in recipes:
        once, steps = built_once(recipe, operators, b), recycled(recipe, operators, b)
        name = "warm starts, no preconditioner" if recipe is None else str(recipe)
        print(f"{name:<40} {sum(once):>10} {sum(steps):>10}   {steps}")


if __name__ == "__main__":
    main()
