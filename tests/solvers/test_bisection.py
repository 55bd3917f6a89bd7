"""Scalar equations, many at once."""

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.linalg import LinearOperator
from implicitgrad.solvers import Bisection
from implicitgrad.solvers.bisection import Slopes


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def cubic(x: dict, y: dict, shift: Tensor) -> dict:
    """Rises in one leaf and falls in the other."""
    return {"down": x["b"] - y["down"].exp(), "up": y["up"] ** 3 + y["up"] - x["a"] - shift}


def test_roots_and_derivatives_of_trees_equal_closed_forms() -> None:
    a, b = (5 * draw(4, 3, seed=1)).requires_grad_(), draw(5, seed=2).exp().requires_grad_()
    shift = torch.tensor(0.3).double().requires_grad_()
    init = {"up": torch.zeros(4, 3).double(), "down": torch.zeros(5).double()}
    with ig.diagnostics() as log:
        y, info = Bisection(cubic, bounds=(-30.0, 30.0), tol=1e-12)({"a": a, "b": b}, shift, init=init)
        got = torch.autograd.grad(y["up"].sin().sum() + y["down"].sum(), (a, b, shift))
    assert info.converged and info.num_iter <= 60
    assert torch.allclose(y["down"], b.log(), rtol=0, atol=1e-11)
    up = y["up"].detach()
    assert (up**3 + up - a - shift).abs().max() < 1e-12
    slope = up.cos() / (3 * up**2 + 1)
    for found, want in zip(got, (slope, 1 / b.detach(), slope.sum()), strict=True):
        assert torch.allclose(found, want, rtol=1e-10)
    assert log[0].last.solver == "Slopes" and log[0].last.products <= 3  # instead of 17 for a matrix


def test_transforms_and_second_derivatives() -> None:
    solver = Bisection(lambda x, y: y**3 + y - x, bounds=(-20.0, 20.0), tol=1e-12)
    root = lambda x: solver(x, init=torch.zeros(()).double())[0]
    x = 5 * draw(6, seed=3)
    y = torch.func.vmap(root)(x)
    slope = 1 / (3 * y**2 + 1)
    with ig.diagnostics() as log:
        assert torch.allclose(torch.func.vmap(torch.func.grad(root))(x), slope, rtol=1e-10)
    assert log[0].last.solver == "Slopes"
    bend = torch.func.vmap(torch.func.hessian(root))(x)
    assert torch.allclose(bend, -6 * y * slope**3, rtol=1e-8, atol=1e-10)


def test_error_halves_with_each_iteration() -> None:
    solve = lambda steps: Bisection(lambda x, y: y - x, bounds=(0.0, 1.0), tol=1e-300, max_iter=steps)
    x = torch.tensor([1 / 3]).double()
    for steps in (5, 20):
        y, info = solve(steps).run(x, torch.tensor([0.5]).double())
        assert not info.converged and info.reason == "max_iter reached"
        assert (y - x).abs().item() <= 0.5**steps
    y, info = solve(200).run(x, torch.tensor([0.5]).double())
    assert info.num_iter < 60
    assert info.converged or "precision floor" in info.reason
    assert (y - x).abs().item() <= 1e-16


def test_a_start_at_the_root_costs_no_iteration() -> None:
    solver = Bisection(lambda x, y: y**3 - x, bounds=(0.0, 10.0))
    x = torch.tensor([8.0, 27.0]).double()
    y, info = solver.run(x, torch.tensor([2.0, 3.0]).double())
    assert info.num_iter == 0 and info.converged
    _, cold = solver.run(x, torch.zeros(2).double())
    assert cold.num_iter > 20


def test_roots_at_the_ends_of_brackets() -> None:
    for sign in (1.0, -1.0):
        solver = Bisection(lambda x, y, sign=sign: sign * (y - x), bounds=(0.0, 1.0), tol=1e-12)
        y, info = solver.run(torch.tensor([0.0, 1.0]).double(), torch.full((2,), 0.4).double())
        assert info.converged and torch.allclose(y, torch.tensor([0.0, 1.0]).double(), atol=1e-12)


def test_brackets_may_depend_on_x_without_influence_on_derivatives() -> None:
    solver = Bisection(lambda x, y: y**2 - x, bounds=lambda x: (0.0, x + 1))
    x = torch.tensor([4.0, 100.0]).double().requires_grad_()
    y, _ = solver(x, init=torch.ones(2).double())
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.tensor([0.25, 0.05]).double())


def test_float32() -> None:
    x = torch.tensor([2.0, 10.0], requires_grad=True)
    y, info = Bisection(lambda x, y: y**3 + y - x, bounds=(0.0, 4.0))(x, init=torch.ones(2))
    assert y.dtype == torch.float32 and info.converged
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.tensor([1 / 4, 1 / 13]), rtol=1e-5)


def test_wrong_brackets_raise() -> None:
    function = lambda x, y: y - x
    x, init = torch.tensor([0.5, 2.0]), torch.zeros(2)
    with pytest.raises(ValueError, match="1 of 2 have none, entry 1 has the values -2 at 0 and -1 at 1"):
        Bisection(function, bounds=(0.0, 1.0)).run(x, init)
    with pytest.raises(ValueError, match="finite brackets"):
        Bisection(function, bounds=(0.0, None)).run(x, init)
    with pytest.raises(FloatingPointError, match="ends"):
        Bisection(lambda x, y: (y - x).log(), bounds=(0.0, 1.0)).run(x, init)


def test_equations_that_are_coupled_are_noticed() -> None:
    coupled = Bisection(lambda x, y: y - x + 0.4 * y.flip(0), bounds=(-9.0, 9.0), tol=1e-3, max_iter=60)
    x = torch.tensor([1.0, 1.0]).double().requires_grad_()
    y, _ = coupled(x, init=torch.full((2,), 1 / 1.4).double())
    with pytest.warns(ig.ConvergenceWarning, match="Slopes"):
        torch.autograd.grad(y[0], x)


def test_slopes_solve_diagonal_systems_in_any_shape() -> None:
    diagonal = torch.tensor([[2.0, -4.0], [1.0, 5.0]]).double()
    stack = LinearOperator.from_dense(torch.diag_embed(diagonal))
    b = draw(3, 2, 2, seed=4)
    solution = Slopes().solve(stack, b)
    assert solution.converged and torch.allclose(solution.value, b / diagonal)
    assert not Slopes().solve(stack, torch.zeros(2, 2).double()).value.any()
    singular = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, 0.0]).double()))
    with pytest.raises(FloatingPointError):
        Slopes().solve(singular, torch.ones(2).double())
