"""How long curvature operators live, their self-test, and what they refuse."""

import gc
import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from implicitgrad import tree
from implicitgrad.curvature import gauss_newton, hessian, jacobian, mixed_derivative
from implicitgrad.curvature.pullback import Pullback
from implicitgrad.linalg import AsymmetryError, LinearOperator, check_operator
from tests.curvature.models import problem, vectors


class Watched(torch.autograd.Function):
    """Lives in the graph, as long as it does."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        Watched.alive.add(ctx)
        return y**3

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].square() * cotangent


@pytest.mark.parametrize("make", ["hessian", "gauss_newton", "jacobian", "mixed"])
def test_dropping_the_operator_frees_the_graph(make: str):
    y, inputs = vectors(3), vectors(4, 3)
    model = lambda y, X: X @ Watched.apply(y)
    operators = {
        "hessian": lambda: hessian(lambda y: model(y, inputs).square().sum(), y),
        "gauss_newton": lambda: gauss_newton(model, F.mse_loss, y, inputs, vectors(4)),
        "jacobian": lambda: jacobian(model, y, inputs),
        "mixed": lambda: mixed_derivative(lambda x, y: (x * model(y, inputs)).square().sum(), vectors(4), y),
    }
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        A = operators[make]()
        assert len(Watched.alive) > 0
        A @ torch.ones(2, A.size, dtype=torch.float64)
        transposed = A.T
        transposed @ torch.ones(A.num_rows, dtype=torch.float64)
        del A, transposed
        assert len(Watched.alive) == 0
    finally:
        gc.enable()


def test_leaves_no_gradient_behind():
    y = {name: value.requires_grad_() for name, value in problem("mlp").y.items()}
    p = problem("mlp")._replace(y=y)
    gauss_newton(p.model, p.loss, p.y, *p.data) @ vectors(len(tree.ravel(p.y)[0]))
    hessian(p.objective, p.y, *p.data) @ vectors(len(tree.ravel(p.y)[0]))
    assert all(value.grad is None for value in y.values())


def test_changing_y_afterwards_changes_nothing():
    y = vectors(3)
    H = hessian(lambda y: (y**4).sum(), y)
    before = H @ torch.ones(3, dtype=torch.float64)
    y.zero_()
    assert torch.equal(H @ torch.ones(3, dtype=torch.float64), before)


# --- self-test and errors --------------------------------------------------------------------------------------------


def test_the_check_costs_three_products(monkeypatch: pytest.MonkeyPatch):
    counted = []
    call = Pullback.__call__
    monkeypatch.setattr(Pullback, "__call__", lambda self, u: counted.append(u) or call(self, u))
    hessian(lambda y: (y**4).sum(), vectors(3))
    assert len(counted) == 3
    hessian(lambda y: (y**4).sum(), vectors(3), check=False)
    assert len(counted) == 3


def operator(matvec, n: int = 4, **declared) -> LinearOperator:
    return LinearOperator(matvec, n, dtype=torch.float64, device="cpu", **declared)


def test_check_operator_finds_what_contradicts():
    M = vectors(4, 4)
    check_operator(operator(lambda v: M @ v, rmatvec=lambda v: M.T @ v))
    check_operator(operator(lambda v: M @ v))  # no transpose: nothing to compare with
    check_operator(operator(lambda v: 0 * v, symmetric=True, eigenvalue_floor=0.0))
    check_operator(operator(lambda v: M[:2] @ v, num_rows=2, rmatvec=lambda v: M[:2].T @ v))
    with pytest.raises(ValueError, match="second time"):
        calls = []
        check_operator(operator(lambda v: calls.append(v) or (1 + 1e-6 * len(calls)) * v))
    with pytest.raises(AsymmetryError, match="declared symmetric"):
        check_operator(operator(lambda v: M @ v, symmetric=True))
    with pytest.raises(ValueError, match=r"<Aᵀu, v>"):
        check_operator(operator(lambda v: M @ v, rmatvec=lambda v: M @ v))
    with pytest.raises(ValueError, match="eigenvalues of at least 0"):
        check_operator(operator(lambda v: -v, symmetric=True, eigenvalue_floor=0.0))
    with pytest.raises(FloatingPointError, match="NaN"):
        check_operator(operator(lambda v: v / 0 * 0))


def test_check_operator_takes_stacks_and_noise():
    M = vectors(3, 4, 4)
    check_operator(LinearOperator.from_dense(M + M.mT, symmetric=True))
    check_operator(LinearOperator.from_dense(M))
    drawn = torch.Generator().manual_seed(0)
    noisy = lambda v: v * (1 + 1e-7 * torch.rand(4, generator=drawn, dtype=torch.float64))
    check_operator(operator(noisy, noise=1e-6))
    with pytest.raises(ValueError, match="second time"):
        check_operator(operator(noisy))


def test_random_numbers_outside_of_isolation_are_found():
    drawn = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="dropout"):
        check_operator(operator(lambda v: v * torch.rand(4, generator=drawn, dtype=torch.float64)))


def test_nan_raises():
    with pytest.raises(FloatingPointError, match="NaN"):
        hessian(lambda y: y.abs().sqrt().sum(), torch.zeros(3))
    with pytest.raises(FloatingPointError, match="NaN"):
        jacobian(lambda y: y.log() * 0, torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: hessian(lambda y: y, torch.ones(3)), ValueError, "scalar"),
        (lambda: hessian(lambda y: torch.ones(()), torch.ones(3)), ValueError, "does not depend on y"),
        (lambda: hessian(lambda y: y["a"].sum(), {"a": torch.ones(3, dtype=torch.int64)}), TypeError, "int64"),
        (lambda: hessian(lambda y: y.sum(), torch.ones(3), route="fast"), ValueError, "'fast'"),
        (lambda: hessian(lambda y: y.sum(), torch.ones(0)), ValueError, "empty"),
        (lambda: jacobian(lambda y: torch.ones(2), torch.ones(3)), ValueError, "does not depend on y"),
        (lambda: jacobian(lambda y: y.double(), torch.ones(3)), TypeError, "float32 .*float64"),
        (lambda: jacobian(lambda y: 1.0, torch.ones(3)), TypeError, "float"),
        (
            lambda: mixed_derivative(lambda x, y: x.sum() * y.sum(), torch.ones(2), torch.ones(2).double()),
            TypeError,
            "mixes dtypes",
        ),
    ],
)
def test_refuses(make, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()


def test_refuses_transforms_and_inference_mode():
    make = lambda y: hessian(lambda y: (y**3).sum(), y) @ torch.ones(3)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(make)(torch.ones(2, 3))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        make(torch.ones(3))
    with torch.no_grad():
        assert torch.equal(make(torch.ones(3)), 6 * torch.ones(3))
