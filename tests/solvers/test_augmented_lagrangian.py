"""Equality constraints: quadratic problems in closed form, curved ones against SciPy."""

import pytest
import torch
from scipy import optimize
from torch import Tensor

from implicitgrad.linalg import CG, Cholesky, LinearSolver, Nystrom
from implicitgrad.solvers import AugmentedLagrangian

N, M = 40, 8


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


ROOT = draw(N, N, seed=1)
Q, A = ROOT @ ROOT.mT / N + 0.1 * torch.eye(N), draw(M, N, seed=2)
C, B = draw(N, seed=3), draw(M, seed=4)
INIT = {"primal": torch.zeros(N).double(), "equality": torch.zeros(M).double()}


def quadratic(x: Tensor, z: Tensor, b: Tensor) -> Tensor:
    return z @ Q @ z / 2 + x @ z


def affine(x: Tensor, z: Tensor, b: Tensor) -> Tensor:
    return A @ z - b


def exact(c: Tensor, b: Tensor) -> Tensor:
    """Primal and dual solution by the inverse of the whole matrix."""
    matrix = torch.cat([torch.cat([Q, A.mT], 1), torch.cat([A, torch.zeros(M, M).double()], 1)])
    return torch.linalg.inv(matrix) @ torch.cat([-c, b])


@pytest.mark.parametrize(
    "system_solver", [CG(rtol=0.01), CG(rtol=0.01, preconditioner=Nystrom(M + 4)), Cholesky()], ids=repr
)
def test_quadratic_problem_equals_the_closed_form(system_solver: LinearSolver) -> None:
    solver = AugmentedLagrangian(quadratic, affine, tol=1e-10, system_solver=system_solver)
    c, b = C.clone().requires_grad_(), B.clone().requires_grad_()
    y, info = solver(c, b, init=INIT)
    assert info.converged and info.residual_norm <= 1e-10
    want = exact(C, B)
    assert torch.allclose(torch.cat([y["primal"], y["equality"]]), want, rtol=0, atol=1e-8)
    assert info.value == pytest.approx(quadratic(C, want[:N], B).item())
    weight = torch.arange(N + M).double().cos()
    got = torch.autograd.grad(weight @ torch.cat([y["primal"], y["equality"]]), (c, b))
    for found, wanted in zip(
        got, torch.func.grad(lambda c, b: weight @ exact(c, b), argnums=(0, 1))(C, B), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-8)


def test_a_sketch_saves_products() -> None:
    counts = []
    matrix = Q.clone()

    class Counted(torch.autograd.Function):
        """`Q z`, counted: the reverse product of a gradient is a product with Q again."""

        @staticmethod
        def forward(ctx, z: Tensor) -> Tensor:
            counts.append(1)
            return matrix @ z

        @staticmethod
        def backward(ctx, cotangent: Tensor) -> Tensor:
            return Counted.apply(cotangent)

    objective = lambda x, z: z @ Counted.apply(z) / 2 + x @ z
    rows = 30 * A  # far apart: eigenvalues of the augmented Hessian reach 1e6
    constraint = lambda x, z: rows @ z - B
    used = []
    for system_solver in (CG(rtol=1e-3), CG(rtol=1e-3, preconditioner=Nystrom(M + 4))):
        counts.clear()
        solver = AugmentedLagrangian(objective, constraint, tol=1e-7, penalty=100.0, system_solver=system_solver)
        y, info = solver.run(C, INIT)
        assert info.converged
        used.append(len(counts))
    assert used[1] < 0.7 * used[0], used


def test_curved_constraint_equals_scipy_and_the_multiplier_is_the_slope_of_the_value() -> None:
    rosenbrock = lambda x, z: (1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2
    circle = lambda x, z: {"circle": z.square().sum() - x}
    solver = AugmentedLagrangian(rosenbrock, circle, tol=1e-9)
    x = torch.tensor(1.5).double().requires_grad_()
    init = {"primal": torch.tensor([0.5, 1.0]).double(), "equality": {"circle": torch.tensor(0.0).double()}}
    y, info = solver(x, init=init)
    result = optimize.minimize(
        lambda z: rosenbrock(0, z),
        [0.5, 1.0],
        constraints={"type": "eq", "fun": lambda z: z @ z - 1.5},
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    assert info.converged and torch.allclose(y["primal"].detach(), torch.from_numpy(result.x), rtol=0, atol=1e-5)
    (slope,) = torch.autograd.grad(rosenbrock(x, y["primal"]), x)
    assert slope.item() == pytest.approx(-y["equality"]["circle"].item(), rel=1e-7)  # envelope theorem


def test_warm_start_with_multipliers_saves_updates() -> None:
    solver = AugmentedLagrangian(quadratic, affine, tol=1e-8)
    solution, cold = solver.run(C, INIT, B)
    _, none = solver.run(C, solution, B)
    assert none.num_iter == 0 and none.converged
    _, warm = solver.run(C + 1e-4, solution, B)
    assert warm.converged and warm.num_iter < cold.num_iter


def test_contradicting_constraints_are_told() -> None:
    solver = AugmentedLagrangian(lambda x, z: z.square().sum(), lambda x, z: torch.stack([z[0] - 1, z[0] + 1]))
    _, info = solver.run(torch.tensor(0.0), {"primal": torch.zeros(2).double(), "equality": torch.zeros(2).double()})
    assert not info.converged and "contradict" in info.reason
    assert info.residual_norm > 1


def test_init_needs_both_parts_and_nan_raises() -> None:
    solver = AugmentedLagrangian(quadratic, affine)
    with pytest.raises(ValueError, match="'equality', 'primal'"):
        solver.run(C, {"primal": INIT["primal"]}, B)
    with pytest.raises(FloatingPointError):
        solver.run(C * torch.nan, INIT, B)


def test_float32() -> None:
    objective = lambda x, z: (z - x).square().sum() / 2
    solver = AugmentedLagrangian(objective, lambda x, z: z.sum().reshape(1) - 1)
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    y, info = solver(x, init={"primal": torch.zeros(2), "equality": torch.zeros(1)})
    assert info.converged and y["primal"].dtype == torch.float32
    assert torch.allclose(y["primal"], torch.tensor([-0.5, 1.5]), atol=1e-4)
    assert torch.allclose(torch.autograd.grad(y["primal"][0], x)[0], torch.tensor([0.5, -0.5]), atol=1e-5)
