"""Sums over minibatches: equal to the full batch, one graph at a time, loud about loaders that change."""

import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from implicitgrad.curvature import gauss_newton, hessian, jacobian, minibatch_sum
from implicitgrad.linalg import LinearOperator
from tests.curvature.models import Problem, assert_near, problem, vectors


def loader(p: Problem, **options) -> DataLoader:
    return DataLoader(TensorDataset(*p.data), **{"batch_size": 4, **options})


def hessians(p: Problem):
    return lambda batch: hessian(p.objective, p.y, *batch, check=False)


@pytest.mark.parametrize("retain", [False, True])
def test_weighted_means_equal_the_full_batch(retain: bool):
    p = problem("mlp")  # 9 examples in batches of 4, 4 and 1
    A, full = minibatch_sum(hessians(p), loader(p), "mean", retain=retain), hessian(p.objective, p.y, *p.data)
    assert (A.symmetric, A.eigenvalue_floor) == (True, None)
    v = vectors(2, A.size)
    assert_near(A @ v[0], full @ v[0], 1e-13)
    assert_near(A @ v, full @ v, 1e-13)
    assert_near(A.to_dense(), full.to_dense(), 1e-13)


def test_sums_and_numbers_as_weights():
    p = problem("sum of losses")
    full = hessian(p.objective, p.y, *p.data).to_dense()
    assert_near(minibatch_sum(hessians(p), loader(p)).to_dense(), full, 1e-13)
    q = problem("mlp")
    assert_near(minibatch_sum(hessians(q), loader(q), [4.0, 4.0, 1.0]).to_dense(), full, 1e-13)


@pytest.mark.parametrize(("weights", "floor"), [(None, 0.0), ("mean", 0.0), ([1.0, 1.0, -1.0], None)])
def test_floor_holds_for_weights_that_are_not_negative(weights, floor: float | None):
    p = problem("mlp")
    make = lambda batch: gauss_newton(p.model, p.loss, p.y, *batch, check=False)
    assert minibatch_sum(make, loader(p), weights).eigenvalue_floor == floor


def test_rectangular_terms_keep_their_transpose():
    matrices = vectors(3, 2, 4)
    A = minibatch_sum(lambda M: jacobian(lambda y: M @ y, vectors(4), check=False), list(matrices))
    assert A.shape == (2, 4)
    u = vectors(3, 2)
    assert_near(A.T @ u, u @ matrices.sum(0), 1e-14)
    assert_near(A.T @ u[0], matrices.sum(0).T @ u[0], 1e-14)


class Watched(torch.autograd.Function):
    """Lives in the graph of one batch, and counts how many such graphs there are at a time."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()
    most = 0

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        Watched.alive.add(ctx)
        Watched.most = max(Watched.most, len(Watched.alive))
        return value.square()

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * cotangent


@pytest.mark.parametrize(("retain", "most"), [(False, 1), (True, 5)])
def test_one_graph_at_a_time(retain: bool, most: int):
    Watched.most = 0
    y, batches = vectors(3), list(vectors(5, 4, 3))
    make = lambda X: hessian(lambda y: Watched.apply(X @ y).square().sum(), y, check=False)
    A = minibatch_sum(make, batches, retain=retain)
    A @ vectors(2, 3)
    A.to_dense()
    assert Watched.most == most
    del A
    assert len(Watched.alive) == 0


def test_shuffling_is_harmless_where_the_sum_does_not_change():
    p = problem("mlp")
    A = minibatch_sum(hessians(p), loader(p, shuffle=True), "mean")
    assert_near(A.to_dense(), hessian(p.objective, p.y, *p.data).to_dense(), 1e-13)


def test_a_loader_with_other_examples_each_time_is_found():
    p = problem("mlp")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pytest.raises(ValueError, match="a loader that shuffles"):
            minibatch_sum(hessians(p), loader(p, shuffle=True, drop_last=True), "mean")


def test_a_model_with_a_new_mask_each_time_is_found():
    y, X, drawn = vectors(3), vectors(4, 3), torch.Generator().manual_seed(0)
    mask = lambda: torch.rand(4, generator=drawn, dtype=torch.float64)
    with pytest.raises(ValueError, match="dropout"):
        minibatch_sum(lambda X: hessian(lambda y: (mask() * (X @ y)).square().sum(), y, check=False), [X])


@pytest.mark.parametrize(
    ("batches", "weights", "error", "message"),
    [
        (iter([1, 2]), None, TypeError, "only once"),
        ((batch for batch in [1, 2]), None, TypeError, "generator.*only once"),
        ([], None, ValueError, "0 batches"),
        ([1.0, 2.0], [1.0], ValueError, "1, one per weight"),
        ([1.0, 2.0], [1.0] * 3, ValueError, "2 batches"),
        ([1.0, 2.0], "mean", TypeError, "found none"),
        ([1.0, 0.0], None, ValueError, "one kind"),
        ([1.0, 2.0], "sum", ValueError, "'sum'"),
    ],
)
def test_refuses(batches, weights, error: type[Exception], message: str):
    def make(batch: float) -> LinearOperator:
        return LinearOperator(lambda v: batch * v, 2, symmetric=batch > 0, dtype=torch.float64, device="cpu")

    with pytest.raises(error, match=message):
        minibatch_sum(make, batches, weights)


def test_float32_full_loss():
    p = problem("conv", dtype=torch.float32)
    A = minibatch_sum(lambda batch: gauss_newton(p.model, F.cross_entropy, p.y, *batch, check=False), loader(p), "mean")
    assert_near(A.to_dense(), gauss_newton(p.model, F.cross_entropy, p.y, *p.data).to_dense(), 1e-5)


@pytest.mark.parametrize("retain", [False, True])
def test_refuses_terms_that_are_no_operators(retain: bool):
    with pytest.raises(TypeError, match="make_operator must return a LinearOperator, got Tensor"):
        minibatch_sum(lambda batch: torch.eye(2), [1.0, 2.0], retain=retain)
