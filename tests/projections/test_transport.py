"""Transport polytopes: against CVXPY and optimality conditions, with derivatives along balanced marginals."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from implicitgrad.projections import birkhoff, entropic_birkhoff, entropic_transport, transport
from implicitgrad.projections.scaling import scale


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marginal(*shape: int, seed: int = 0) -> Tensor:
    weights = draw(*shape, seed=seed).exp()
    return weights / weights.sum(-1, keepdim=True)


def balanced(project, *options):
    """With marginals divided by their sums: finite differences need a feasible set."""
    return lambda y, a, b: project(y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True), *options)


@pytest.mark.parametrize(("n", "m", "size"), [(6, 4, 1.0), (4, 6, 10.0), (7, 7, 0.01), (1, 5, 1.0), (5, 1, 1.0)])
def test_transport_equals_cvxpy(n: int, m: int, size: float) -> None:
    y, a, b = size * draw(n, m), marginal(n, seed=1), marginal(m, seed=2)
    z = cp.Variable((n, m), nonneg=True)
    rows, columns = cp.sum(z, 1) == a.numpy(), cp.sum(z, 0) == b.numpy()
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-13)
    cp.Problem(cp.Minimize(cp.sum_squares(z - y.numpy())), [rows, columns]).solve(solver="CLARABEL", **tight)
    assert np.abs(transport(y, a, b).numpy() - z.value).max() < 1e-6


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2, 1e4])
def test_transport_is_feasible_and_optimal_at_every_scale(size: float) -> None:
    y, a, b = size * draw(30, 20), marginal(30, seed=1), marginal(20, seed=2)
    a = torch.cat([torch.zeros(2, dtype=a.dtype), a[2:] / a[2:].sum()])  # rows without mass
    z, rounding = transport(y, a, b), 1e-13 * (1 + size)
    assert (z >= 0).all()
    assert (z.sum(1) - a).abs().max() < rounding and (z.sum(0) - b).abs().max() < rounding
    # y - z is f + g on the support and at most that elsewhere: no plan is better in the direction y - z
    from scipy.optimize import linprog

    sums = np.vstack([np.kron(np.eye(30), np.ones(20)), np.kron(np.ones(30), np.eye(20))])
    best = linprog(-(y - z).numpy().ravel(), A_eq=sums, b_eq=torch.cat([a, b]).numpy(), method="highs")
    assert -best.fun - ((y - z) * z).sum().item() < 1e-6 * size  # HiGHS is feasible to 1e-7


def test_birkhoff_of_a_permutation_is_itself_and_rows_and_columns_sum_to_one() -> None:
    permutation = torch.eye(5, dtype=torch.float64)[torch.tensor([2, 0, 1, 4, 3])]
    assert torch.allclose(birkhoff(permutation), permutation, atol=1e-14)
    z = birkhoff(draw(3, 12, 12))
    ones = torch.ones(3, 12, dtype=torch.float64)
    assert torch.allclose(z.sum(-1), ones, atol=1e-13) and torch.allclose(z.sum(-2), ones, atol=1e-13)
    assert torch.allclose(birkhoff(z), z, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(5, 4), (3, 5)])
def test_derivatives_of_transport(n: int, m: int) -> None:
    arguments = (draw(2, n, m), marginal(2, n, seed=1), marginal(2, m, seed=2))
    arguments = tuple(value.requires_grad_() for value in arguments)
    assert gradcheck(balanced(transport), arguments, check_forward_ad=True, fast_mode=True)
    assert gradcheck(balanced(entropic_transport, 0.5), arguments, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(balanced(entropic_transport, 0.5), arguments, fast_mode=True)


def test_derivative_in_epsilon_and_of_birkhoff() -> None:
    y, epsilon = draw(4, 4).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(entropic_birkhoff, (y, epsilon), check_forward_ad=True)
    assert gradcheck(birkhoff, y, check_forward_ad=True)


@pytest.mark.parametrize("epsilon", [1.0, 0.05])
def test_entropic_plan_is_a_scaled_kernel_with_right_marginals(epsilon: float) -> None:
    y, a, b = draw(20, 30), marginal(20, seed=1), marginal(30, seed=2)
    z = entropic_transport(y, a, b, epsilon)
    assert (z.sum(1) - a).abs().max() < 1e-14 and (z.sum(0) - b).abs().max() < 1e-14
    # log z - y / epsilon = f + g: its double differences vanish
    rest = z.log() - y / epsilon
    assert (rest - rest[:, :1] - rest[:1] + rest[:1, :1]).abs().max() < 1e-10


def test_entropic_plan_tends_to_the_linear_programme() -> None:
    from scipy.optimize import linear_sum_assignment

    y = draw(8, 8)
    z = entropic_birkhoff(y, 1e-3)
    rows, columns = linear_sum_assignment(-y.numpy())
    assert abs(z.numpy()[rows, columns] - 1).max() < 1e-10


@pytest.mark.parametrize("project", [transport, entropic_transport])
def test_vmap_batches_and_dtypes_agree(project) -> None:
    y, a, b = draw(3, 5, 4), marginal(3, 5, seed=1), marginal(3, 4, seed=2)
    want = torch.stack([project(*example) for example in zip(y, a, b, strict=True)])
    assert torch.allclose(project(y, a, b), want, atol=1e-13)
    assert torch.allclose(torch.func.vmap(project)(y, a, b), want, atol=1e-13)
    assert torch.allclose(torch.func.vmap(project, (0, None, 0))(y, a[0], b), project(y, a[0], b), atol=1e-13)
    single = project(y.float(), a.float(), b.float())
    assert single.dtype == torch.float32 and torch.allclose(single.double(), want, atol=1e-5)
    assert torch.func.vmap(torch.func.jacrev(project))(y, a, b).shape == (3, 5, 4, 5, 4)


def test_newton_and_sweeps_find_the_same_scaling() -> None:
    scores, a, b = 5 * draw(2, 12, 9), marginal(2, 12, seed=1), marginal(2, 9, seed=2)
    slow = scale(scores, a, b, tol=1e-12, max_iter=20_000, newton=False)
    fast = scale(scores, a, b, tol=1e-12, max_iter=20_000, newton=True)
    assert max(slow.error, fast.error) < 2e-12 and fast.num_newton > 0
    assert torch.allclose(slow.f, fast.f, atol=1e-8) and torch.allclose(slow.g, fast.g, atol=1e-8)


def test_wrong_arguments_raise() -> None:
    y, a, b = draw(3, 2), marginal(3), marginal(2)
    with pytest.raises(ValueError, match="equal sums"):
        transport(y, 2 * a, b)
    with pytest.raises(ValueError, match="not negative"):
        transport(y, a - 1, b - 1)
    with pytest.raises(ValueError, match="positive"):
        entropic_transport(y, torch.tensor([0.0, 0.5, 0.5]), b)
    with pytest.raises(ValueError, match="shape"):
        transport(y, b, a)
    with pytest.raises(ValueError, match="epsilon > 0"):
        entropic_transport(y, a, b, 0.0)
    with pytest.raises(ValueError, match="n, n"):
        birkhoff(y)
    with pytest.raises(FloatingPointError, match="NaN"):
        transport(y / 0, a, b)
    with pytest.raises(TypeError, match="tensor"):
        transport(y, [1.0], b)  # type: ignore[arg-type]
