"""The exact inverse of Gauss-Newton matrices against dense matrices by torch.func, on both roads."""

import gc
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn import functional as F

import implicitgrad as ig
from implicitgrad import tree
from implicitgrad.curvature import exact_gauss_newton, gauss_newton_rows
from implicitgrad.linalg import KnownInverse, check_symmetric


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(*layers: nn.Module, dtype: torch.dtype = torch.float64):
    model = ig.functional(nn.Sequential(*layers).to(dtype))
    y = {name: 0.5 * normal(*v.shape, seed=i, dtype=dtype) for i, (name, v) in enumerate(model.parameters().items())}
    return model, y


def perceptron(dtype: torch.dtype = torch.float64):
    return network(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 3), dtype=dtype)


def convolutional():
    return network(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def sequence():
    return network(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


INPUTS = {perceptron: normal(6, 4), convolutional: normal(6, 1, 3, 3), sequence: normal(6, 3, 3)}
TARGETS = {
    F.cross_entropy: torch.arange(6) % 3,
    F.mse_loss: normal(6, 3, seed=1),
    F.binary_cross_entropy_with_logits: normal(6, 3, seed=1).sigmoid(),
}
every_network = pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
every_loss = pytest.mark.parametrize("loss", TARGETS, ids=lambda loss: loss.__name__)


def dense(model: Callable, loss: Callable, y: tree.Tree, inputs: Tensor, targets: Tensor) -> Tensor:
    flat, unravel = tree.ravel(y)
    outputs = model(y, inputs)
    J = torch.func.jacrev(lambda vector: model(unravel(vector), inputs).flatten())(flat)
    H = torch.func.hessian(lambda z: loss(z.view_as(outputs), targets))(outputs.flatten())
    return J.mT @ H @ J


def shifted_solve(matrix: Tensor, damping: float, b: Tensor) -> Tensor:
    shifted = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(shifted, b.unsqueeze(-1)).squeeze(-1)


@every_loss
@every_network
def test_equals_the_dense_matrix_and_its_inverse(make: Callable, loss: Callable):
    (model, y), X, t = make(), INPUTS[make], TARGETS[loss]
    A, exact = exact_gauss_newton(model, loss, y, X, t), dense(model, loss, y, X, t)
    torch.testing.assert_close(A.to_dense(), exact, rtol=0, atol=1e-13)
    check_symmetric(A)
    assert A.eigenvalue_floor == 0
    b = normal(2, A.size)
    for damping in (1.0, 1e-3, 1e-6):
        inverse = A.damped(damping).known_inverse
        assert inverse is not None
        expected = torch.stack([shifted_solve(exact, damping, row) for row in b])
        # rounding of 1e-16 · |G| / λ
        torch.testing.assert_close(inverse(b), expected, rtol=0, atol=1e-9 * expected.abs().max().item())
        torch.testing.assert_close(inverse(b[0]), inverse(b)[0], rtol=0, atol=1e-9 * expected.abs().max().item())


@every_loss
def test_function_of_a_tree(loss: Callable):
    y = (normal(4, 3, seed=2), [normal(3, seed=3)])
    model = lambda y, X: X @ y[0] + y[1][0].square()
    A = exact_gauss_newton(model, loss, y, INPUTS[perceptron], TARGETS[loss]).damped(0.01)
    b = normal(A.size)
    solution = KnownInverse().solve(A, b)
    assert solution.converged, solution.reason
    exact = shifted_solve(dense(model, loss, y, INPUTS[perceptron], TARGETS[loss]), 0.01, b)
    torch.testing.assert_close(solution.value, exact, rtol=1e-8, atol=0)


def root_made(monkeypatch: pytest.MonkeyPatch, make_operator: Callable) -> str:
    """Which of the two roads an operator took."""
    module = sys.modules[exact_gauss_newton.__module__]
    taken, graph = ["layers"], module._graph_root

    def noted(U):
        taken.append("graph")
        return graph(U)

    monkeypatch.setattr(module, "_graph_root", noted)
    make_operator()
    return taken[-1]


@every_network
def test_road_goes_through_layers_where_it_can(make: Callable, monkeypatch: pytest.MonkeyPatch):
    (model, y), X, t = make(), INPUTS[make], TARGETS[F.cross_entropy]
    taken = root_made(monkeypatch, lambda: exact_gauss_newton(model, F.cross_entropy, y, X, t))
    assert taken == ("layers" if make is perceptron else "graph")


@pytest.mark.parametrize(
    ("layers", "road"),
    [
        ((nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)), "graph"),  # couples the examples
        ((nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False).eval(), nn.Linear(6, 3)), "layers"),
        ((nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), "graph"),  # parameters of another kind
        ((nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3)), "layers"),
        ((nn.Sequential(shared := nn.Linear(4, 4), nn.Tanh(), shared), nn.Linear(4, 3)), "graph"),
    ],
)
def test_layers_that_do_not_tell_the_whole_story(layers: tuple, road: str, monkeypatch: pytest.MonkeyPatch):
    model, y = network(*layers)
    X, t = INPUTS[perceptron], TARGETS[F.cross_entropy]
    exact = dense(model, F.cross_entropy, y, X, t)
    A = exact_gauss_newton(model, F.cross_entropy, y, X, t)
    torch.testing.assert_close(A.to_dense(), exact, rtol=0, atol=1e-12)
    b = normal(A.size)
    torch.testing.assert_close(KnownInverse().solve(A.damped(0.1), b).value, shifted_solve(exact, 0.1, b))
    assert root_made(monkeypatch, lambda: exact_gauss_newton(model, F.cross_entropy, y, X, t)) == road


def test_y_may_be_a_part_of_the_network():
    model, y = perceptron()
    some, X, t = {name: y[name] for name in ("4.bias", "0.weight")}, INPUTS[perceptron], TARGETS[F.cross_entropy]
    A = exact_gauss_newton(model, F.cross_entropy, some, X, t)
    torch.testing.assert_close(A.to_dense(), dense(model, F.cross_entropy, some, X, t), rtol=0, atol=1e-13)


@every_loss
@every_network
def test_one_gram_matrix_for_all_dampings_and_one_factor_for_each(
    make: Callable, loss: Callable, monkeypatch: pytest.MonkeyPatch
):
    factored, factorise = [], torch.linalg.cholesky_ex

    def noted(matrix: Tensor):
        factored.append(matrix.clone())
        return factorise(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", noted)
    (model, y), X, t = make(), INPUTS[make], TARGETS[loss]
    A = exact_gauss_newton(model, loss, y, X, t)
    b = normal(A.size)
    assert A.damped(1.0).known_inverse is not None
    assert factored == []
    for damping in (1.0, 1.0, 0.5, 1.0):
        KnownInverse().solve(A.damped(damping), b)
    rows = gauss_newton_rows(model, loss, y, X, t)
    assert len(rows) == (12 if loss is F.cross_entropy else 18)
    for matrix, damping in zip(factored, (1.0, 0.5), strict=True):
        gram = rows @ rows.mT + damping * torch.eye(len(rows), dtype=torch.float64)
        torch.testing.assert_close(matrix, gram, rtol=0, atol=1e-13)


def test_layers_in_float32_meet_the_tolerance_of_a_general_right_hand_side():
    model, y = perceptron(torch.float32)
    X, t = INPUTS[perceptron].float(), TARGETS[F.cross_entropy]
    A = exact_gauss_newton(model, F.cross_entropy, y, X, t).damped(1e-4)
    solution = KnownInverse().solve(A, normal(A.size, dtype=torch.float32))
    assert solution.converged, solution.reason
    assert solution.value.dtype == torch.float32


def test_graph_road_in_float32_is_exact_for_gradients():
    model, y = network(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3), dtype=torch.float32)
    X, t = INPUTS[convolutional].float(), TARGETS[F.cross_entropy]
    gradient = tree.ravel(tree.grad(lambda y: F.cross_entropy(model(y, X), t), y))[0].detach()
    solution = KnownInverse().solve(exact_gauss_newton(model, F.cross_entropy, y, X, t).damped(1e-4), gradient)
    assert solution.converged, solution.reason


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, value: Tensor):
        self.value = value


@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_layers_keep_no_autograd_graph(make: Callable):
    kept: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(value: Tensor) -> Saved:
        kept.add(saved := Saved(value.detach()))  # attached, an output would hold its own graph
        return saved

    model, y = make()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value):
        A = exact_gauss_newton(model, F.cross_entropy, y, INPUTS[make], TARGETS[F.cross_entropy])
        gc.collect()
        assert bool(kept) == (make is convolutional)
    del A
    gc.collect()
    assert not kept


def test_arguments_and_random_state_are_left_alone():
    model, y = network(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    random, before = torch.get_rng_state(), {name: value.clone() for name, value in y.items()}
    A = exact_gauss_newton(model, F.cross_entropy, y, INPUTS[perceptron], TARGETS[F.cross_entropy])
    b = normal(3, A.size).mT.contiguous().mT
    kept = b.clone()
    KnownInverse().solve(A.damped(0.1), b)
    assert torch.equal(b, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in y.items())
    assert not any(block._forward_hooks for block in model.net.modules())


@pytest.mark.parametrize("damping", [0.0, -1e-3])
def test_needs_a_positive_damping(damping: float):
    model, y = perceptron()
    A = exact_gauss_newton(model, F.cross_entropy, y, INPUTS[perceptron], TARGETS[F.cross_entropy])
    with pytest.raises(ValueError, match="positive damping"):
        KnownInverse().solve(A.damped(damping), normal(A.size))


def test_damping_lost_in_rounding_is_named():
    model, y = perceptron()
    X = INPUTS[perceptron][:1].expand(20, 4)  # twenty times one example: a Gram matrix of rank two
    A = exact_gauss_newton(model, F.cross_entropy, y, X, torch.zeros(20, dtype=torch.long)).damped(1e-30)
    with pytest.raises(LinAlgError, match=r"1.0e-30 is lost in the rounding"):
        KnownInverse().solve(A, normal(A.size))


def test_refuses_batches_that_are_too_large():
    model, y = perceptron()
    X, t = INPUTS[perceptron], TARGETS[F.cross_entropy]
    with pytest.raises(ValueError, match="got 18 outputs where max_outputs=17.*Use gauss_newton with CG"):
        exact_gauss_newton(model, F.cross_entropy, y, X, t, max_outputs=17)
    assert exact_gauss_newton(model, F.cross_entropy, y, X, t, max_outputs=18).size == 4 * 6 + 6 + 30 + 15 + 3


def test_refuses_losses_without_a_root():
    model, y = perceptron()
    X, t = INPUTS[perceptron], TARGETS[F.mse_loss]
    with pytest.raises(ValueError, match="convex"):
        exact_gauss_newton(model, lambda z, t: -F.mse_loss(z, t), y, X, t)
    with pytest.raises(ValueError, match="across examples"):
        exact_gauss_newton(model, lambda z, t: z.sum().square(), y, X, t)
    with pytest.raises(TypeError, match="one tensor"):
        exact_gauss_newton(lambda y, X: {"a": model(y, X)}, F.mse_loss, y, X, t)
