"""Situations in which a wrong derivative would come without a word: each is right here, or raises."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import implicitgrad as ig
from implicitgrad.linalg import CG, Neumann


class Quartic(torch.autograd.Function):
    """`h**4`, with a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return h**4

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return cotangent * 4 * ctx.saved_tensors[0] ** 3


class QuarticInNumpy(torch.autograd.Function):
    """The same, computing outside of torch."""

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return h**4

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return cotangent * torch.from_numpy(4 * h.detach().numpy() ** 3)


def _root_of(kernel: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`y(x)` with `4 y³ + 2 y = x`, the kernel last in the loss."""

    def solve(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for _ in range(60):
            y = y - (4 * y**3 + 2 * y - x.detach()) / (12 * y**2 + 2)
        return y

    return ig.implicit(ig.Stationary(lambda x, y: kernel(y).sum() + (y * y - x * y).sum()))(solve)


@pytest.mark.parametrize("kernel", [Quartic.apply, QuarticInNumpy.apply], ids=["once differentiable", "NumPy"])
def test_a_kernel_without_second_derivatives_at_the_end_of_a_loss(kernel: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    with ig.diagnostics() as log:
        y = _root_of(kernel)(x)
        (got,) = torch.autograd.grad(y.sum(), x)
    exact = 1 / (12 * y.detach() ** 2 + 2)
    assert log[-1].route == "finite difference" and torch.allclose(got, exact, rtol=1e-6)  # differences: about 1e-8


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_the_same_kernel_under_a_functional_transform_raises(transform: Callable) -> None:
    with pytest.raises(RuntimeError, match="cannot be differentiated again|tried to vmap over Quartic"):
        transform(lambda x: _root_of(Quartic.apply)(x).sum())(torch.tensor([1.0, -2.0]))


def _ridge(x: Tensor, y: Tensor, X: Tensor, t: Tensor) -> Tensor:
    return 0.5 * ((X @ y - t) ** 2).mean() + 0.5 * (x.exp() * y**2).sum()


def _closed_form(x: Tensor, X: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.solve(X.T @ X / len(t) + x.exp().diag(), X.T @ t / len(t))


@pytest.mark.parametrize("second", ["again", "with a graph"])
def test_a_batch_rebound_between_forward_and_backward_raises(second: str) -> None:
    X, t, x = torch.randn(30, 4), torch.randn(30), torch.zeros(4, requires_grad=True)
    y = ig.implicit_root(ig.Stationary(lambda x, y: _ridge(x, y, X, t)), x, _closed_form(x, X, t))
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.isfinite(first).all()
    X, t = torch.randn(30, 4), torch.randn(30)
    with pytest.raises(RuntimeError, match="condition has changed"):
        torch.autograd.grad(y.sum(), x, retain_graph=True, create_graph=second == "with a graph")


@pytest.mark.parametrize("rtol", [0.1, 0.01])
def test_error_estimate_sees_an_inexact_adjoint(rtol: float) -> None:
    X, t, x = torch.randn(60, 40), torch.randn(60), torch.full((40,), -4.0)
    y = _closed_form(x, X, t)
    upper = lambda x, y: (y.square() * torch.linspace(1, 3, 40)).sum()
    exact = torch.func.grad(lambda x: upper(x, _closed_form(x, X, t)))(x)
    h = ig.hypergradient(upper, ig.Stationary(_ridge), x, y, X, t, solver=CG(rtol=rtol))
    assert h.error_estimate == pytest.approx(torch.linalg.vector_norm(h.value - exact).item(), rel=0.2)


def test_error_estimate_is_infinite_where_a_system_was_not_solved() -> None:
    X, t, x = torch.randn(60, 40), torch.randn(60), torch.full((40,), -4.0)
    arguments = (lambda x, y: y.square().sum(), ig.Stationary(_ridge), x, _closed_form(x, X, t), X, t)
    h = ig.hypergradient(*arguments, solver=CG(max_iter=2), on_unconverged="ignore")
    assert h.error_estimate == float("inf") and not h.report.converged


def test_hypergradient_refuses_a_condition_that_closes_over_x() -> None:
    x, y = torch.tensor([1.0]), torch.tensor([0.5])
    with pytest.raises(ValueError, match="condition's argument x"):
        ig.hypergradient(lambda x, y: y.sum(), ig.Stationary(lambda _, y: (y - x / 2).square().sum()), x, y)


def test_a_truncated_series_does_not_depend_on_earlier_backward_passes() -> None:
    X, t, x = torch.randn(30, 4), torch.randn(30), torch.zeros(4, requires_grad=True)
    series = Neumann(3, step=0.2)
    y = ig.implicit_root(ig.Stationary(_ridge), x, _closed_form(x, X, t), X, t, solver=series, on_unconverged="ignore")
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_finite_differences_follow_the_scale_of_the_problem(scale: float) -> None:
    centres = scale * torch.tensor([[0.0, 1.0], [2.0, 0.5], [-1.0, -1.0]])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (torch.cdist(y[None], centres) * x).sum()

    def solve(x: Tensor) -> Tensor:  # Weiszfeld's iteration for the geometric median
        y = centres.mean(0)
        for _ in range(2000):
            weights = x / (centres - y).square().sum(1).sqrt()
            y = (weights[:, None] * centres).sum(0) / weights.sum()
        return y

    x = torch.tensor([1.0, 1.2, 0.9], requires_grad=True)
    (got,) = torch.autograd.grad(ig.implicit(ig.Stationary(loss))(solve)(x)[0], x)
    step = 1e-4
    exact = torch.stack(
        [(solve(x.detach() + e)[0] - solve(x.detach() - e)[0]) / (2 * step) for e in step * torch.eye(3)]
    )
    assert torch.allclose(got, exact, rtol=1e-5, atol=1e-6 * scale)  # both sides are differences


@pytest.mark.parametrize(
    "norm",
    [
        lambda h: torch.native_layer_norm(h, (3,), None, None, 1e-5)[0],
        lambda h: torch.layer_norm(h, (3,)),
        lambda h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
        lambda h: torch.instance_norm(h[None], None, None, None, None, True, 0.1, 1e-5, False)[0],
        lambda h: F.instance_norm(h[None])[0],
    ],
    ids=["native_layer_norm", "torch.layer_norm", "torch.batch_norm", "torch.instance_norm", "F.instance_norm"],
)
def test_second_derivatives_through_norms_under_all_their_names(norm: Callable[[Tensor], Tensor]) -> None:
    features, weights = torch.randn(4, 3), torch.randn(4, 3)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (norm(features * (y + x)).sin() * weights).sum() + 4 * y.square().sum()

    def solve(x: Tensor) -> Tensor:
        y = torch.zeros(3)
        for _ in range(300):
            y = y - 0.1 * torch.func.grad(loss, argnums=1)(x, y)
        return y

    x = torch.tensor([1.0, 0.5, 2.0])
    fit = ig.implicit(ig.Stationary(loss))(solve)
    slope = lambda x: torch.autograd.grad(fit(x.requires_grad_()).sum(), x)[0]
    got = torch.autograd.functional.hessian(lambda x: fit(x).sum(), x)
    exact = torch.stack([(slope(x + e) - slope(x - e)) / 2e-5 for e in 1e-5 * torch.eye(3)])
    assert torch.allclose(got, exact, rtol=1e-5, atol=1e-7)  # central differences of first derivatives


def test_buffers_stay_when_a_module_is_not_called_but_its_forward_is() -> None:
    norm = nn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    features = torch.randn(5, 3)
    loss = lambda x, y: (norm.forward(features * y) ** 4).sum() + ((y - x) ** 2).sum()
    x = torch.ones(3, requires_grad=True)
    ig.implicit_root(ig.Stationary(loss), x, torch.ones(3), inner_tolerance=1e9).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_functional_refuses_a_module_that_reaches_its_own_weights() -> None:
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.call = lambda h: self.layer(h)

        def forward(self, h: Tensor) -> Tensor:
            return self.call(h)

    net_fn = ig.functional(Sly())
    with pytest.raises(ValueError, match="own parameters"):
        net_fn(net_fn.parameters(), torch.ones(3, 2))


def test_threads_leave_the_attention_kernels_as_they_were() -> None:
    flags = lambda: (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
    before = flags()

    def work() -> None:
        for _ in range(20):
            x = torch.tensor([2.0], requires_grad=True)
            ig.implicit_root(ig.Stationary(lambda x, y: (y - x).square().sum()), x, torch.tensor([2.0])).backward()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert flags() == before


def test_a_failed_allocation_is_not_taken_for_a_missing_derivative() -> None:
    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx, cotangent: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no memory")

    x = torch.ones(2, requires_grad=True)
    with pytest.raises(torch.OutOfMemoryError):
        ig.implicit_root(ig.Stationary(lambda x, y: (Hungry.apply(y) - x).square().sum()), x, torch.ones(2))


def test_rounding_near_a_solution_of_zero_is_not_taken_for_a_changed_condition() -> None:
    features = torch.randn(4, 3, dtype=torch.float32)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        normalized = F.layer_norm(features * (1 + y), (3,))  # a constant sum: all terms of its gradient cancel
        return (normalized.sum() + y.square().sum()) * x.sum()

    x = torch.ones(2, requires_grad=True, dtype=torch.float32)
    y = ig.implicit_root(ig.Stationary(loss), x, torch.zeros(3, dtype=torch.float32), inner_tolerance=1e9)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize("kernel", [Quartic.apply, QuarticInNumpy.apply], ids=["once", "numpy"])
def test_a_gradient_step_through_a_kernel_without_double_backward_raises(kernel: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([3.0, 2.0])
    y = torch.zeros_like(x)
    for _ in range(60):
        y = y - (4 * y**3 + 2 * y - x) / (12 * y**2 + 2)
    loss = lambda x, y: kernel(y).sum() + (y * y - x * y).sum()
    step = ig.FixedPoint(lambda x, y: y - 0.1 * ig.curvature.hvp.marked_grad(lambda y: loss(x, y), y))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        ig.implicit_root(step, x.requires_grad_(), y).sum().backward()


def test_a_step_through_a_kernel_with_one_backward_is_right_in_reverse_mode() -> None:
    """`y = x/2 + y⁴/8`: the residual needs the kernel's first derivative only."""
    x, y = torch.tensor([0.6, 1.0], requires_grad=True), torch.zeros(2)
    for _ in range(100):
        y = x.detach() / 2 + y**4 / 8
    root = ig.implicit_root(ig.FixedPoint(lambda x, y: x / 2 + Quartic.apply(y) / 8), x, y)
    torch.testing.assert_close(torch.autograd.grad(root.sum(), x)[0], 0.5 / (1 - y**3 / 2), rtol=1e-10, atol=0)
