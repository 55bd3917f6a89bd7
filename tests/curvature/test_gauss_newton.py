"""Gauss-Newton matrices and their rows against JᵀHJ with both factors by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import implicitgrad as ig
from implicitgrad import tree
from implicitgrad.curvature import (
    empirical_fisher,
    exact_gauss_newton,
    gauss_newton,
    gauss_newton_rows,
    hessian,
    sampled_fisher,
)
from implicitgrad.linalg import CG, LinearOperator
from tests.curvature.models import NETS, Problem, assert_near, dense_gauss_newton, problem, vectors

every_net = pytest.mark.parametrize("name", NETS)


def gauss_newton_of(p: Problem, **options) -> LinearOperator:
    return gauss_newton(p.model, p.loss, p.y, *p.data, **options)


@every_net
def test_equals_the_product_of_its_factors(name: str):
    p = problem(name)
    G, exact = gauss_newton_of(p), dense_gauss_newton(p)
    assert G.symmetric
    assert G.eigenvalue_floor == 0
    assert_near(G.to_dense(), exact, 1e-12)
    assert_near(G @ vectors(G.size), exact @ vectors(G.size), 1e-12)


@every_net
def test_float32(name: str):
    single, double = problem(name, dtype=torch.float32), problem(name)
    assert_near(gauss_newton_of(single).to_dense().double(), dense_gauss_newton(double), 1e-5)


def test_is_the_hessian_where_the_model_is_linear():
    p = problem("logistic")
    assert_near(gauss_newton_of(p).to_dense(), hessian(p.objective, p.y, *p.data).to_dense(), 1e-13)


def test_damped_system_is_definite():
    p = problem("mlp")
    A = gauss_newton_of(p).damped(1e-2)
    assert A.definite
    b = vectors(A.size)
    exact = torch.linalg.solve(dense_gauss_newton(p) + 1e-2 * torch.eye(A.size, dtype=torch.float64), b)
    assert_near(CG().solve(A, b).value, exact, 1e-8)


def test_outputs_can_be_a_tree():
    p = problem("mlp")
    two_heads = lambda y, X: {"a": p.model(y, X)[:, :1], "b": p.model(y, X)[:, 1:]}
    joined = lambda z, t: p.loss(torch.cat([z["a"], z["b"]], 1), t)
    G = gauss_newton(two_heads, joined, p.y, *p.data)
    assert_near(G.to_dense(), dense_gauss_newton(p), 1e-12)


def test_restriction_to_the_last_layer():
    p = problem("mlp")
    place = tree.slices(p.y)
    chosen = torch.arange(place["['2.weight']"].start, place["['2.bias']"].stop)
    assert_near(gauss_newton_of(p).restricted(chosen).to_dense(), dense_gauss_newton(p)[chosen][:, chosen], 1e-12)


def test_convexity_is_declared_and_tried():
    p = problem("mlp")
    concave = lambda z, t: -z.square().sum()
    with pytest.raises(ValueError, match="convex=False"):
        gauss_newton(p.model, concave, p.y, *p.data)
    G = gauss_newton(p.model, concave, p.y, *p.data, convex=False)
    assert G.eigenvalue_floor is None
    assert G.symmetric
    assert torch.linalg.eigvalsh(G.to_dense()).max() < 1e-12


def test_layers_that_couple_examples():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    model = ig.functional(net)
    inputs, targets = vectors(5, 4), vectors(5, 3)
    flat, unravel = tree.ravel(model.parameters())
    J = torch.autograd.functional.jacobian(lambda v: model(unravel(v), inputs).flatten(), flat)
    G = gauss_newton(model, F.mse_loss, model.parameters(), inputs, targets)
    assert_near(G.to_dense(), J.T @ J * 2 / targets.numel(), 1e-12)


@pytest.mark.parametrize("layer", ["weight_norm", "huber", "gru", "embedding"])
def test_kernels_without_forward_mode(layer: str):
    """Double backward works where the forward-mode formula is missing or wrong."""
    inputs, loss = vectors(5, 4), F.mse_loss
    if layer == "weight_norm":
        net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh())
    elif layer == "gru":
        net, inputs = First(nn.GRU(4, 3, batch_first=True)), vectors(5, 2, 4)
    elif layer == "embedding":
        net, inputs = nn.Sequential(nn.Embedding(6, 3), nn.Tanh()), torch.arange(5)
    else:
        net, loss = nn.Linear(4, 3), lambda z, t: F.huber_loss(z, t, delta=0.8)
    model = ig.functional(net.double())
    outputs = model(model.parameters(), inputs)
    targets = vectors(*outputs.shape)
    flat, unravel = tree.ravel(model.parameters())
    leaf = flat.clone().requires_grad_()
    J = torch.stack(
        [torch.autograd.grad(z, leaf, retain_graph=True)[0] for z in model(unravel(leaf), inputs).flatten()]
    )
    curved = (outputs - targets).abs() < 0.8 if layer == "huber" else torch.full_like(outputs, 2)
    G = gauss_newton(model, loss, model.parameters(), inputs, targets)
    assert_near(G.to_dense(), J.T @ (curved.flatten().unsqueeze(1) * J) / targets.numel(), 1e-12)


class First(nn.Module):
    """The first result of a module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)[0]


# --- rows ------------------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_rows_are_a_square_root(name: str, chunk_size: int | None):
    p = problem(name)
    rows, exact = gauss_newton_rows(p.model, p.loss, p.y, *p.data, chunk_size=chunk_size), dense_gauss_newton(p)
    assert_near(rows.T @ rows, exact, 1e-12)
    rank = 2 if p.targets.dtype == torch.int64 else 3  # cross entropy does not see a shift of all logits
    assert rows.shape == (rank * len(p.inputs), len(exact))


def test_rows_of_another_convex_loss():
    p = problem("mlp with mse")
    loss = lambda z, t: (z - t).norm(dim=1).pow(3).sum() + z.logsumexp(1).sum()
    rows = gauss_newton_rows(p.model, loss, p.y, *p.data)
    assert_near(rows.T @ rows, gauss_newton(p.model, loss, p.y, *p.data).to_dense(), 1e-12)


def test_rows_in_float32_of_saturated_logits():
    p = problem("logistic", dtype=torch.float32)
    large = {name: 12 * value for name, value in p.y.items()}
    rows = gauss_newton_rows(p.model, p.loss, large, *p.data).double()
    exact = dense_gauss_newton(problem("logistic")._replace(y={name: v.double() for name, v in large.items()}))
    assert_near(rows.T @ rows, exact, 1e-4)


def test_rows_of_scalar_outputs():
    inputs, targets, y = vectors(5, 3), vectors(5), vectors(3)
    rows = gauss_newton_rows(lambda y, X: X @ y, F.mse_loss, y, inputs, targets)
    assert_near(rows.T @ rows, inputs.T @ inputs * 2 / 5, 1e-14)


def test_rows_refuse_what_has_none():
    p = problem("mlp with mse")
    make = lambda loss, model=p.model: gauss_newton_rows(model, loss, p.y, *p.data)
    with pytest.raises(ValueError, match="not convex in the outputs"):
        make(lambda z, t: (z**3).sum())
    with pytest.raises(ValueError, match="across examples"):
        make(lambda z, t: z.sum().square())
    with pytest.raises(ValueError, match="not curved"):
        make(lambda z, t: (z - t).sum())
    with pytest.raises(ValueError, match="one number of examples"):
        gauss_newton_rows(p.model, p.loss, p.y, {"a": p.inputs, "b": p.inputs[:3]}, p.targets)
    with pytest.raises(ValueError, match="chunk_size"):
        gauss_newton_rows(p.model, p.loss, p.y, *p.data, chunk_size=0)
    with pytest.raises(TypeError, match="one tensor"):
        make(p.loss, lambda y, X: (p.model(y, X), p.model(y, X)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "mlp with mse", "group norm"])
def test_rows_in_half_precision(name: str, dtype: torch.dtype):
    """The root is made in float32, so only the rounding of the outputs and of the rows is left."""
    p = problem(name, dtype=dtype)
    rows = gauss_newton_rows(p.model, p.loss, p.y, *p.data)
    assert rows.dtype == dtype
    y = {key: value.double() for key, value in p.y.items()}
    targets = p.targets if p.targets.dtype == torch.int64 else p.targets.double()
    exact = dense_gauss_newton(problem(name)._replace(y=y, inputs=p.inputs.double(), targets=targets))
    # a row is a sum over a few terms that are rounded on the way: some units of eps in both factors
    assert_near(rows.double().T @ rows.double(), exact, 10 * torch.finfo(dtype).eps)


def test_rows_in_half_precision_keep_all_directions_of_many_classes():
    inputs, weights, targets = vectors(8, 4), vectors(40, 4), torch.arange(8)
    model = lambda y, X: X @ y.T
    rows = gauss_newton_rows(model, F.cross_entropy, weights.bfloat16(), inputs.bfloat16(), targets).double()
    assert rows.shape == (8 * 39, 160)
    exact = gauss_newton(model, F.cross_entropy, weights, inputs, targets).to_dense()
    # beside the rows the parameters and inputs are rounded
    assert_near(rows.T @ rows, exact, 20 * torch.finfo(torch.bfloat16).eps)


def test_empty_batches_are_named():
    p = problem("mlp")
    for make in (gauss_newton, empirical_fisher, exact_gauss_newton, gauss_newton_rows):
        with pytest.raises(ValueError, match=f"{make.__name__}.* no examples"):
            make(p.model, p.loss, p.y, p.inputs[:0], p.targets[:0])
    with pytest.raises(ValueError, match="sampled_fisher.* no examples"):
        sampled_fisher(p.model, "categorical", p.y, p.inputs[:0])


def test_a_loss_that_ignores_the_outputs_is_told():
    p = problem("mlp")
    with pytest.raises(ValueError, match="does not depend on y, the variable it is differentiated in"):
        gauss_newton(p.model, lambda z, t: t.sum().double(), p.y, *p.data)
