"""Hessians, Jacobians and mixed derivatives against differences, formulas and hand-written passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import implicitgrad as ig
from implicitgrad import tree
from implicitgrad.curvature import gauss_newton, hessian, jacobian, mixed_derivative
from implicitgrad.curvature.pullback import Pullback
from implicitgrad.linalg import CG, LinearOperator
from tests.curvature.models import NETS, Problem, assert_near, dense_hessian, dense_jacobian, problem, vectors

every_net = pytest.mark.parametrize("name", NETS)


def hessian_of(p: Problem, **options) -> LinearOperator:
    return hessian(p.objective, p.y, *p.data, **options)


@every_net
def test_hessian_equals_differences_of_gradients(name: str):
    p = problem(name)
    H = hessian_of(p)
    assert H.symmetric
    assert_near(H.to_dense(), dense_hessian(p), 1e-9)  # what the differences are good for


@every_net
def test_hessian_in_float32(name: str):
    single, double = problem(name, dtype=torch.float32), problem(name)
    assert_near(hessian_of(single).to_dense().double(), hessian_of(double).to_dense(), 1e-5)


@pytest.mark.parametrize("name", ["logistic", "mlp", "conv", "layer norm"])
def test_hessian_equals_torch_func(name: str):
    p = problem(name)
    flat, unravel = tree.ravel(p.y)
    loss = (lambda z, t: (z - t).square().mean()) if p.loss is F.mse_loss else p.loss  # jvp(grad(mse_loss)) raises
    objective = lambda v: loss(p.model(unravel(v), p.inputs), p.targets)
    exact = torch.func.jacfwd(torch.func.grad(objective))(flat)  # torch.func.hessian is wrong for layer norm
    assert_near(hessian_of(p).to_dense(), exact, 1e-12)


@every_net
def test_jacobian_equals_rows_by_hand(name: str):
    p = problem(name)
    J, exact = jacobian(p.model, p.y, p.inputs), dense_jacobian(p)
    assert J.shape == exact.shape
    v, u = vectors(2, J.size), vectors(2, J.num_rows)
    assert_near(J @ v, v @ exact.T, 1e-12)
    assert_near(J.T @ u, u @ exact, 1e-12)
    assert_near(J @ v[0], exact @ v[0], 1e-12)
    assert_near(J.T @ u[0], exact.T @ u[0], 1e-12)
    assert_near(J.to_dense(), exact, 1e-12)
    assert (J.T @ J).eigenvalue_floor == 0


@pytest.mark.parametrize("num_rows", [2, 7])  # dense by rows, and by columns
def test_jacobian_of_a_linear_map_is_its_matrix(num_rows: int):
    matrix = vectors(num_rows, 5)
    J = jacobian(lambda y: {"a": matrix[:1] @ y, "b": matrix[1:] @ y}, vectors(5))
    assert J.dense_cost == min(num_rows, 5)
    assert_near(J.to_dense(), matrix, 1e-14)


def coupled(x: dict[str, Tensor], y: Tensor, scale: Tensor) -> Tensor:
    return scale * ((x["a"].exp() @ y[:2]) + x["b"].sum() * y.square().sum() + x["b"].sin().sum())


def test_mixed_derivative_equals_the_jacobian_of_the_gradient():
    x, y, scale = {"a": vectors(2), "b": vectors(3) + 1}, vectors(4), torch.tensor(0.7, dtype=torch.float64)
    B = mixed_derivative(coupled, x, y, scale)
    left = torch.diag_embed(x["a"].exp())
    exact = scale * torch.cat([torch.cat([left, torch.zeros(2, 2)]), (2 * y).unsqueeze(1).expand(4, 3)], dim=1)
    assert B.shape == (4, 5)
    assert_near(B.to_dense(), exact, 1e-14)
    v, u = vectors(2, 5), vectors(2, 4)
    assert_near(B @ v, v @ exact.T, 1e-14)
    assert_near(B.T @ u, u @ exact, 1e-14)
    assert_near(B @ v[0], exact @ v[0], 1e-14)


def test_mixed_derivative_through_layer_norm():
    """Third derivatives of layer norm are wrong in torch; no product here may need them."""
    p = problem("layer norm")
    x = torch.tensor(0.3, dtype=torch.float64)
    loss = lambda x, y: p.objective(y, p.inputs * x.exp(), p.targets)
    B = mixed_derivative(loss, x, p.y).to_dense()
    at = lambda value: tree.ravel_like(p.y, tree.grad(lambda y: loss(value, y), p.y)).detach()
    assert_near(B[:, 0], (at(x + 1e-5) - at(x - 1e-5)) / 2e-5, 1e-8)


def test_mixed_derivative_is_zero_where_the_loss_separates():
    B = mixed_derivative(lambda x, y: x.square().sum() + y.exp().sum(), vectors(2), vectors(3))
    assert torch.equal(B.to_dense(), torch.zeros(3, 2, dtype=torch.float64))


def test_restriction_to_some_parameters():
    p = problem("mlp")
    H = hessian_of(p)
    part = tree.slices(p.y)["['2.weight']"]
    inner = dict(p.y)
    last = lambda w: p.objective({**inner, "2.weight": w}, *p.data)
    assert_near(
        H.restricted(torch.arange(part.start, part.stop)).to_dense(), hessian(last, p.y["2.weight"]).to_dense(), 1e-13
    )


def test_convex_loss_has_a_certified_floor():
    p = problem("logistic")
    A = hessian_of(p, convex=True).damped(0.1)
    assert A.eigenvalue_floor == 0.1
    assert A.definite
    b = vectors(A.size)
    assert_near(CG().solve(A, b).value, torch.linalg.solve(A.to_dense(), b), 1e-9)
    assert hessian_of(p).eigenvalue_floor is None


def test_a_loss_that_is_not_convex_cannot_be_declared_so():
    with pytest.raises(ValueError, match="convex=False"):
        hessian(lambda y: -y.square().sum(), vectors(3), convex=True)


def test_differences_where_there_is_no_double_backward():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, cotangent: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0].square() * cotangent

    y, loss = vectors(4), lambda y: Cube.apply(y).sum() + y.square().sum()
    with pytest.raises(RuntimeError, match="leave it out in silence"):
        hessian(loss, y)
    H = hessian(loss, y, route="finite difference")
    assert H.noise > 0
    assert_near(H.to_dense(), torch.diag(6 * y + 2), 1e-7)


@pytest.mark.parametrize("derivative", ["hessian", "mixed"])
def test_a_backward_outside_torch_is_not_left_out_in_silence(derivative: str):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y: Tensor) -> Tensor:
            ctx.slope = 2 * y.detach()
            return y.square()

        @staticmethod
        def backward(ctx, cotangent: Tensor) -> Tensor:
            return ctx.slope * cotangent

    with pytest.raises(RuntimeError, match="silence"):
        if derivative == "hessian":
            hessian(lambda y: Square.apply(y).sum() + y.exp().sum(), vectors(3))
        else:
            mixed_derivative(lambda x, y: Square.apply(x * y).sum() + (x * y).sum(), vectors(3), vectors(3) + 2)


def test_a_differentiable_custom_backward_passes():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y.square()

        @staticmethod
        def backward(ctx, cotangent: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * cotangent

    H = hessian(lambda y: Square.apply(y).square().sum(), vectors(3))
    assert_near(H.to_dense(), torch.diag(12 * vectors(3) ** 2), 1e-14)


def test_dropout_is_one_mask():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 2)).double()
    inputs, seed = vectors(5, 4), 5
    loss = lambda y: torch.func.functional_call(net, y, inputs).square().sum()
    y = {name: value.detach() for name, value in net.named_parameters()}
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    H = hessian(loss, y)
    assert torch.equal(torch.get_rng_state(), state)

    def same_mask(y: dict) -> Tensor:
        torch.manual_seed(seed)
        return loss(y)

    flat, unravel = tree.ravel(y)
    exact = torch.autograd.functional.hessian(lambda v: same_mask(unravel(v)), flat)
    assert_near(H.to_dense(), exact, 1e-12)


def test_batch_norm_statistics_stay():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    before = {name: value.clone() for name, value in net.named_buffers()}
    inputs = vectors(6, 4)
    y = {name: value.detach() for name, value in net.named_parameters()}
    model = lambda y, inputs: torch.func.functional_call(net, y, inputs)
    loss = lambda y, inputs: model(y, inputs).square().mean()
    H = hessian(loss, y, inputs)
    p = Problem(model, lambda z, t: z.square().mean(), y, inputs, inputs)
    assert_near(H.to_dense(), dense_hessian(p), 1e-9)
    net.load_state_dict(before, strict=False)
    gauss_newton(model, F.mse_loss, y, inputs, vectors(6, 3)) @ vectors(H.size)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_checkpointed_model():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.net, inputs, use_reentrant=False)

    plain, saving = ig.functional(net), ig.functional(Checkpointed())
    inputs, targets = vectors(5, 4), vectors(5, 2)
    make = lambda model: gauss_newton(model, F.mse_loss, model.parameters(), inputs, targets)
    assert_near(make(saving).to_dense(), make(plain).to_dense(), 1e-14)
    make = lambda model: hessian(lambda y: F.mse_loss(model(y, inputs), targets), model.parameters())
    assert_near(make(saving).to_dense(), make(plain).to_dense(), 1e-14)


@pytest.mark.parametrize("name", ["mlp", "attention", "group norm"])
def test_blocks_equal_single_products(name: str):
    H = hessian_of(problem(name))
    v = vectors(3, H.size)
    assert_near(H @ v, torch.stack([H @ row for row in v]), 1e-13)


def test_blocks_are_cut_by_the_widest_tensor_of_the_graph(monkeypatch: pytest.MonkeyPatch):
    seen = []
    call = Pullback.__call__
    monkeypatch.setattr(Pullback, "__call__", lambda self, u: seen.append(u) or call(self, u))
    X = torch.ones(2**20, 2)
    H = hessian(lambda y: (X @ y).square().mean(), torch.ones(2), check=False)
    before = len(seen)
    H @ torch.eye(2).repeat(5, 1)
    assert len(seen) - before == 3  # 10 rows, 4 at a time


def test_operations_without_a_batching_rule_go_one_by_one():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y.square()

        @staticmethod
        def backward(ctx, cotangent: Tensor) -> Tensor:
            return Slope.apply(cotangent, ctx.saved_tensors[0])

    class Slope(torch.autograd.Function):  # no vmap rule
        @staticmethod
        def forward(ctx, cotangent: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(cotangent, y)
            return torch.from_numpy(2 * cotangent.numpy() * y.numpy())

        @staticmethod
        def backward(ctx, outer: Tensor) -> tuple[Tensor, Tensor]:
            cotangent, y = ctx.saved_tensors
            assert outer.stride() is not None
            return Slope.apply(outer, y), Slope.apply(outer, cotangent)

    H = hessian(lambda y: Square.apply(y).sum(), vectors(3))
    assert_near(H @ torch.eye(3, dtype=torch.float64), 2 * torch.eye(3, dtype=torch.float64), 1e-14)
