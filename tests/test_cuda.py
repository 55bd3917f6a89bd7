"""On a GPU: the same numbers, and no waiting for the device in every iteration."""

import warnings

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.linalg import CG, GMRES, MINRES, LinearOperator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


def test_hypergradient_equals_that_on_the_cpu() -> None:
    X, t, x = torch.randn(60, 20), torch.randn(60), torch.randn(20)

    def gradient(device: str, solver: ig.linalg.LinearSolver) -> Tensor:
        A, b, p = (value.to(device) for value in (X, t, x))
        p.requires_grad_()
        loss = lambda p, y: 0.5 * ((A @ y - b) ** 2).mean() + 0.5 * (p.exp() * y**2).sum()
        y = torch.linalg.solve(A.T @ A / 60 + p.exp().diag(), A.T @ b / 60)
        return torch.autograd.grad(ig.implicit_root(ig.Stationary(loss), p, y, solver=solver).square().sum(), p)[0]

    for solver in (ig.linalg.Auto(), CG(), MINRES(), GMRES()):
        torch.testing.assert_close(gradient("cuda", solver).cpu(), gradient("cpu", solver), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("solver", [CG(rtol=1e-12), MINRES(rtol=1e-12)], ids=["CG", "MINRES"])
def test_iterations_do_not_wait_for_the_device(solver: ig.linalg.LinearSolver) -> None:
    diagonal = torch.linspace(1, 1e4, 2000, device="cuda")
    A = LinearOperator(lambda v: diagonal * v, 2000, symmetric=True, dtype=diagonal.dtype, device="cuda")
    b = torch.ones(2000, device="cuda")
    solver.solve(A, b)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            solution = solver.solve(A, b)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(warning.message) for warning in caught)
    assert solution.num_iter > 100 and waits <= solution.num_iter / 8 + 20
