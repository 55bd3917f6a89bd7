"""Entropic transport as a layer: marginals, iterations, derivatives against finite differences and unrolling."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import implicitgrad as ig
from implicitgrad.layers import sinkhorn


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marginal(*shape: int, seed: int = 0) -> Tensor:
    weights = draw(*shape, seed=seed) + 0.5
    return weights / weights.sum(-1, keepdim=True)


def coupling(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, newton: bool = True) -> tuple[Tensor, ...]:
    """With marginals divided by their sums: finite differences need a feasible set."""
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    return sinkhorn(cost, a, b, epsilon=epsilon, tol=1e-14, newton=newton)[0]


EPSILON = torch.tensor(0.2, dtype=torch.float64)


@pytest.mark.parametrize("newton", [False, True])
def test_plan_has_its_marginals_and_its_potentials(newton: bool) -> None:
    cost, a, b = draw(2, 8, 6), marginal(2, 8, seed=1), marginal(2, 6, seed=2)
    found, info = sinkhorn(cost, a, b, epsilon=0.05, newton=newton)
    assert info.converged and info.residual_norm <= 1e-10
    error = (found.plan.sum(-1) - a).abs().sum(-1) + (found.plan.sum(-2) - b).abs().sum(-1)
    assert error.max() <= 1e-10
    explained = (found.f.unsqueeze(-1) + found.g.unsqueeze(-2) - cost) / 0.05
    assert torch.allclose(found.plan, explained.exp(), rtol=1e-12)
    assert found.g.mean(-1).abs().max() < 1e-14


def test_newton_needs_a_tenth_of_the_iterations() -> None:
    points = draw(2, 100, 2)
    cost = (points[0].unsqueeze(1) - points[1]).square().sum(-1)
    a, b = marginal(100, seed=1), marginal(100, seed=2)
    fast, quick = sinkhorn(cost, a, b, epsilon=0.002, newton=True)
    slow, long = sinkhorn(cost, a, b, epsilon=0.002)
    assert quick.converged and long.converged
    assert quick.num_evaluations <= long.num_evaluations / 10
    assert (fast.plan - slow.plan).abs().sum() < 1e-6  # marginals right to 1e-10 leave the slowest direction


def test_small_epsilon_finds_the_assignment() -> None:
    from scipy.optimize import linear_sum_assignment

    cost = draw(20, 20)
    found, info = sinkhorn(cost, epsilon=1e-4, newton=True)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert info.converged
    assert (20 * found.plan[rows, columns] - 1).abs().max() < 1e-3


def test_too_few_iterations_are_reported() -> None:
    with pytest.warns(ig.ConvergenceWarning):
        _, info = sinkhorn(draw(9, 9).requires_grad_(), epsilon=0.002, max_iter=3)
    assert not info.converged and info.reason == "max_iter reached" and info.residual_norm > 1e-3
    assert info.num_iter == 3


@pytest.mark.parametrize("newton", [False, True])
def test_derivatives_equal_finite_differences(newton: bool) -> None:
    arguments = draw(5, 4), marginal(5, seed=1), marginal(4, seed=2), EPSILON
    arguments = tuple(value.clone().requires_grad_() for value in arguments)
    fn = lambda *a: coupling(*a, newton=newton)
    assert gradcheck(fn, arguments, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(lambda *a: fn(*a)[0], arguments, fast_mode=True)


def test_derivatives_of_a_batch() -> None:
    cost = draw(2, 3, 4, 3).requires_grad_()
    a, b = marginal(4, seed=1).requires_grad_(), marginal(3, 3, seed=2).requires_grad_()
    assert gradcheck(lambda *x: coupling(*x, EPSILON)[0], (cost, a, b), fast_mode=True)


def test_implicit_gradient_equals_unrolled() -> None:
    def unrolled(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        scores, g = -cost / EPSILON, torch.zeros_like(b)
        for _ in range(300):
            f = a.log() - (scores + g).logsumexp(-1)
            g = b.log() - (scores + f.unsqueeze(-1)).logsumexp(-2)
        return (scores + f.unsqueeze(-1) + g).exp()

    weights = draw(6, 5, seed=3)
    gradients = []
    for plan in (unrolled, lambda cost, a, b: sinkhorn(cost, a, b, epsilon=EPSILON)[0].plan):
        arguments = [value.requires_grad_() for value in (draw(6, 5), marginal(6, seed=1), marginal(5, seed=2))]
        gradients.append(torch.autograd.grad((weights * plan(*arguments)).sum(), arguments))
    (want, want_a, want_b), (got, got_a, got_b) = gradients
    assert torch.allclose(got, want, atol=1e-10)
    # marginals move only together: gradients agree up to a constant each, that of one minus that of the other
    assert (got_a - want_a).std() < 1e-10 and (got_b - want_b).std() < 1e-10


def test_vmap_and_other_transforms_agree() -> None:
    cost, a, b = draw(3, 5, 4), marginal(5, seed=1), marginal(4, seed=2)
    plan = lambda cost: coupling(cost, a, b, EPSILON)[0]
    assert torch.allclose(torch.func.vmap(plan)(cost), plan(cost), atol=1e-13)
    value = lambda cost: plan(cost).square().sum()
    want = torch.stack([torch.autograd.functional.hessian(value, one) for one in cost])
    assert torch.allclose(torch.func.vmap(torch.func.hessian(value))(cost), want, atol=1e-9)


def test_linear_solver_is_used_and_dtype_is_kept() -> None:
    cost = draw(6, 5).float().requires_grad_()
    with ig.diagnostics() as log:
        found, info = sinkhorn(cost, epsilon=0.1, linear_solver=ig.linalg.MINRES())
        found.plan[0, 0].backward()
    assert found.plan.dtype == torch.float32 and info.converged
    assert log[-1].solves[0].solver == "MINRES"


def test_wrong_arguments_raise() -> None:
    cost = draw(3, 2)
    with pytest.raises(ValueError, match="epsilon > 0"):
        sinkhorn(cost, epsilon=-1.0)
    with pytest.raises(ValueError, match="max_iter"):
        sinkhorn(cost, epsilon=1.0, max_iter=0)
    with pytest.raises(ValueError, match="equal sums"):
        sinkhorn(cost, torch.ones(3), torch.ones(2), epsilon=1.0)
    with pytest.raises(FloatingPointError, match="infinity"):
        sinkhorn(cost / 0, epsilon=1.0)
    with pytest.raises(TypeError, match="floating"):
        sinkhorn(torch.ones(2, 2, dtype=torch.long), epsilon=1.0)
