"""K-FAC against dense Gauss-Newton and Fisher matrices by torch.func, in the cases where the factors are exact."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import implicitgrad as ig
from implicitgrad import tree
from implicitgrad.curvature import empirical_fisher, gauss_newton, kfac, minibatch_kfac, sampled_fisher
from implicitgrad.linalg import CG, KnownInverse, LinearOperator

half = lambda outputs, targets: (outputs - targets).square().sum() / 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*layers: nn.Module, seed: int = 0):
    """As a function of its parameters, with weights of our own."""
    net = nn.Sequential(*layers).double()
    model = ig.functional(net)
    y = model.parameters()
    return model, {name: 0.5 * normal(*value.shape, seed=seed + i) for i, (name, value) in enumerate(y.items())}


def perceptron():
    return network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def dense_gauss_newton(model: Callable, loss: Callable, y: dict, inputs: Tensor, targets: Tensor) -> Tensor:
    flat, unravel = tree.ravel(y)
    outputs = model(y, inputs)
    J = torch.func.jacrev(lambda vector: model(unravel(vector), inputs).flatten())(flat)
    H = torch.func.hessian(lambda z: loss(z.view_as(outputs), targets))(outputs.flatten())
    return J.mT @ H @ J


def block_diagonal(matrix: Tensor, y: dict) -> Tensor:
    """What `matrix` has within the parameters of one layer."""
    layer = torch.cat(
        [torch.full((value.numel(),), hash(name.rpartition(".")[0]) % 2**31) for name, value in y.items()]
    )
    return torch.where(layer.unsqueeze(0) == layer.unsqueeze(1), matrix, 0)


def assert_equal(A: LinearOperator, matrix: Tensor) -> None:
    assert matrix.abs().max() > 1e-3  # the comparison says something
    torch.testing.assert_close(A.to_dense(), matrix, rtol=0, atol=1e-12 * max(1.0, matrix.abs().max().item()))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("loss", [F.cross_entropy, half, F.binary_cross_entropy_with_logits])
def test_one_example_makes_it_exact(loss: Callable, corrected: bool):
    """Then the block is ``(Σ g gᵀ) ⊗ a aᵀ``, whatever the network."""
    model, y = perceptron()
    X, t = normal(1, 4), torch.tensor([1]) if loss is F.cross_entropy else normal(1, 3, seed=1).sigmoid()
    A = kfac(model, loss, y, X, t, corrected=corrected)
    assert_equal(A, block_diagonal(dense_gauss_newton(model, loss, y, X, t), y))
    assert A.eigenvalue_floor == 0


@pytest.mark.parametrize("corrected", [False, True])
def test_linear_layers_behind_squared_error_are_exact(corrected: bool):
    model, y = network(nn.Linear(4, 5), nn.Linear(5, 2, bias=False), nn.Linear(2, 3))
    X, t = normal(7, 4), normal(7, 3, seed=1)
    A = kfac(model, F.mse_loss, y, X, t, corrected=corrected)
    assert_equal(A, block_diagonal(dense_gauss_newton(model, F.mse_loss, y, X, t), y))


def test_factors_are_those_of_the_paper():
    """Nothing is exact here: sums over examples written out with Jacobians in the outputs of the layers."""
    model, y = perceptron()
    X, t = normal(6, 4), torch.arange(6) % 3
    first, last = (lambda z: z @ y["2.weight"].mT + y["2.bias"]), (lambda z: z)
    hidden = X @ y["0.weight"].mT + y["0.bias"]
    outputs = first(hidden.tanh())
    blocks = []
    inputs_of = {0: X, 2: hidden.tanh()}
    behind = {0: (hidden, lambda s: first(s.tanh())), 2: (outputs, last)}
    for i in (0, 2):
        a = torch.cat([inputs_of[i], torch.ones(6, 1, dtype=torch.float64)], 1)
        s, rest = behind[i]
        left = 0
        for n in range(6):
            J = torch.func.jacrev(rest)(s[n])
            p = outputs[n].softmax(0)
            left = left + J.mT @ (p.diag() - p.outer(p)) @ J / 6  # the mean over examples is in the left factor
        blocks.append((left, a.mT @ a / 6))
    A = kfac(model, F.cross_entropy, y, X, t)
    V = tree.ravel(y)[1](normal(A.size))
    product = {}
    for i, (left, right) in zip((0, 2), blocks, strict=True):
        matrix = left @ torch.cat([V[f"{i}.weight"], V[f"{i}.bias"].unsqueeze(1)], 1) @ right
        product |= {f"{i}.weight": matrix[:, :-1], f"{i}.bias": matrix[:, -1]}
    torch.testing.assert_close(A @ normal(A.size), tree.ravel(product)[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("damping", [1e-4, 1.0])
def test_damping_is_exact(damping: float):
    model, y = perceptron()
    X, t = normal(6, 4), torch.arange(6) % 3
    A = kfac(model, F.cross_entropy, y, X, t)
    inverse = A.damped(damping).known_inverse
    assert inverse is not None
    b = normal(2, A.size)
    exact = torch.linalg.solve(A.to_dense() + damping * torch.eye(A.size, dtype=torch.float64), b.mT).mT
    torch.testing.assert_close(inverse(b), exact, rtol=1e-9, atol=0)
    assert KnownInverse().solve(A.damped(damping), b).converged


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["gauss_newton", "empirical"])
def test_correction_never_adds_error_and_is_the_best_in_the_basis(kind: str, sharing: str):
    model, y = network(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    X, t = normal(5, 2, 3, 3), torch.arange(5) % 3
    curvature = gauss_newton if kind == "gauss_newton" else empirical_fisher
    target = block_diagonal(curvature(model, F.cross_entropy, y, X, t).to_dense(), y)
    plain = kfac(model, F.cross_entropy, y, X, t, kind=kind, sharing=sharing).to_dense()
    corrected = kfac(model, F.cross_entropy, y, X, t, kind=kind, sharing=sharing, corrected=True).to_dense()
    assert (corrected - target).norm() < (plain - target).norm()
    # the error of the best eigenvalues in a basis is orthogonal to every matrix that this basis makes diagonal
    for diagonal_there in (corrected, plain, corrected @ corrected):
        inner = ((corrected - target) * diagonal_there).sum()
        assert inner.abs() <= 1e-12 * target.norm() * diagonal_there.norm()


CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 2, "dilation": 2, "bias": False},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution_with_a_loss_per_pixel_is_exact(options: dict, corrected: bool):
    model, y = network(nn.Conv2d(2, 2, **options))
    X = normal(3, 2, 5, 4)
    t = torch.zeros_like(model(y, X))
    A = kfac(model, half, y, X, t, sharing="expand", corrected=corrected)
    assert_equal(A, dense_gauss_newton(model, half, y, X, t))


def test_convolution_under_mean_pooling_is_exact_when_reduced():
    model, y = network(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    X, t = normal(4, 2, 4, 4), normal(4, 2)
    exact = block_diagonal(dense_gauss_newton(model, half, y, X, t), y)
    assert_equal(kfac(model, half, y, X, t, sharing="reduce"), exact)
    assert (kfac(model, half, y, X, t, sharing="expand").to_dense() - exact).norm() > 0.1 * exact.norm()


def test_sequences():
    model, y = network(nn.Linear(3, 2))
    X, t = normal(4, 5, 3), normal(4, 5, 2)
    assert_equal(kfac(model, half, y, X, t), dense_gauss_newton(model, half, y, X, t))
    pooled, y = network(nn.Linear(3, 2), Mean())
    X, t = normal(4, 2, 5, 3), normal(4, 2)
    assert_equal(kfac(pooled, half, y, X, t, sharing="reduce"), dense_gauss_newton(pooled, half, y, X, t))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


class Twice(nn.Module):
    """One layer for two inputs, and a second one tied to it."""

    def __init__(self, pooled: bool):
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.tied = nn.Linear(3, 2)
        self.tied.weight, self.tied.bias = self.first.weight, self.first.bias
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.stack([self.first(x[:, 0]), self.first(input=x[:, 1]), self.tied(x[:, 2])], 1)
        return parts.mean(1) if self.pooled else parts


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_shared_modules_and_tied_weights(sharing: str, corrected: bool):
    model, y = network(Twice(pooled=sharing == "reduce"))
    assert len(y) == 2
    X = normal(4, 3, 3)
    t = torch.zeros_like(model(y, X))
    A = kfac(model, half, y, X, t, sharing=sharing, corrected=corrected)
    assert_equal(A, dense_gauss_newton(model, half, y, X, t))


def test_empirical_on_one_example_is_its_outer_product():
    model, y = perceptron()
    X, t = normal(1, 4), torch.tensor([2])
    A = kfac(model, F.cross_entropy, y, X, t, kind="empirical")
    assert_equal(A, block_diagonal(empirical_fisher(model, F.cross_entropy, y, X, t).to_dense(), y))


def test_sampled_uses_the_labels_of_the_sampled_fisher():
    model, y = network(nn.Linear(4, 3))
    X = normal(1, 4)
    draw = lambda: {"num_samples": 3, "generator": torch.Generator().manual_seed(5)}
    A = kfac(model, "categorical", y, X, kind="sampled", **draw())
    assert_equal(A, sampled_fisher(model, "categorical", y, X, **draw()).to_dense())
    first, second = (kfac(model, "categorical", y, X, kind="sampled") @ torch.ones_like(tree.ravel(y)[0]) for _ in "ab")
    assert torch.equal(first, second)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_minibatches_make_the_factors_of_the_whole(reduction: str, corrected: bool):
    model, y = perceptron()
    X, t = normal(7, 4), torch.arange(7) % 3
    loss = lambda outputs, targets: F.cross_entropy(outputs, targets, reduction=reduction)
    batches = [(X[:4], t[:4]), (X[4:], t[4:])]
    weights = "mean" if reduction == "mean" else None
    A = minibatch_kfac(model, loss, y, batches, weights, corrected=corrected)
    torch.testing.assert_close(
        A.to_dense(), kfac(model, loss, y, X, t, corrected=corrected).to_dense(), rtol=0, atol=1e-12
    )


def test_y_may_be_a_part_of_the_network():
    """Frozen layers, a weight without its bias and a bias without its weight; values that are not the module's."""
    model, y = network(nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(2, 3))
    some = {name: y[name] for name in ("2.bias", "1.weight")}
    X, t = normal(6, 4), normal(6, 3)
    assert_equal(kfac(model, half, some, X, t), block_diagonal(dense_gauss_newton(model, half, some, X, t), some))


def test_module_values_and_random_state_are_left_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(4, 2))
    net.double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    model = ig.functional(net)
    A = kfac(model, half, model.parameters(), normal(6, 4), normal(6, 2), zero_others=True, corrected=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert A.size == sum(value.numel() for value in net.parameters())


def test_layers_followed_by_work_in_place():
    X, t = normal(6, 4), torch.arange(6) % 3
    first, y = network(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    second, _ = network(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    A, B = (kfac(model, F.cross_entropy, y, X, t) for model in (first, second))
    torch.testing.assert_close(A.to_dense(), B.to_dense(), rtol=0, atol=1e-14)


def test_checkpointed_blocks():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    X, t = normal(6, 4), torch.arange(6) % 3
    plain, y = perceptron()
    model, z = network(Checkpointed())
    A, B = kfac(plain, F.cross_entropy, y, X, t), kfac(model, F.cross_entropy, z, X, t)
    torch.testing.assert_close(A.to_dense(), B.to_dense(), rtol=0, atol=1e-14)


def test_zero_block_is_divided_by_the_damping():
    model, y = network(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    X, t = normal(6, 4), torch.arange(6) % 3
    A = kfac(model, F.cross_entropy, y, X, t, zero_others=True)
    mask = tree.ravel({name: torch.full_like(value, name.startswith("1.")) for name, value in y.items()})[0]
    torch.testing.assert_close(A @ mask, 0 * mask)
    inverse = A.damped(0.25).known_inverse
    assert inverse is not None
    torch.testing.assert_close(inverse(mask), 4 * mask)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


class Hidden(nn.Module):
    """Uses the weight of a layer behind its back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x), self.layer.weight)


class Attention(nn.Module):
    """Its output projection is a subclass of `nn.Linear` that is never called."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class TwoBiases(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LayerNorm(3), r"'1.weight': 'LayerNorm', '1.bias': 'LayerNorm'.*leave them out of y.*zero_others=True"),
        (Attention(), "'MultiheadAttention'.*'NonDynamicallyQuantizableLinear'"),
        (nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 3, 1, groups=3), nn.Flatten()), "'Conv2d with groups'"),
        (TwoBiases(), "'1.first.weight': 'shared by layers with different weights or biases'"),
        (Idle(), "'1.idle.weight': 'never used'"),
        (Hidden(), "'1.layer.weight': 'used outside of its layer as well'"),
    ],
)
def test_names_the_parameters_it_has_no_factors_for(layer: nn.Module, message: str):
    model, y = network(nn.Linear(3, 3), layer)
    with pytest.raises(ValueError, match=message):
        kfac(model, half, y, normal(4, 3), normal(4, 3))


def test_refuses_rows_that_are_no_examples_where_that_matters():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model, y = network(Folded())
    X, t = normal(4, 5, 3), normal(4, 5, 2)
    assert_equal(kfac(model, half, y, X, t), dense_gauss_newton(model, half, y, X, t))
    for options in ({"sharing": "reduce"}, {"corrected": True}):
        with pytest.raises(ValueError, match="20 rows for 4 examples"):
            kfac(model, half, y, X, t, **options)


def test_refuses_wrong_arguments():
    model, y = perceptron()
    X, t = normal(6, 4), torch.arange(6) % 3
    with pytest.raises(TypeError, match="implicitgrad.functional.*got Sequential"):
        kfac(model.net, F.cross_entropy, y, X, t)
    with pytest.raises(TypeError, match="implicitgrad.functional.*got function"):
        kfac(lambda y, X: model(y, X), F.cross_entropy, y, X, t)
    with pytest.raises(ValueError, match=r"no parameters \['w'\]"):
        kfac(model, F.cross_entropy, {"w": torch.ones(2)}, X, t)
    with pytest.raises(ValueError, match="'gauss_newton', 'empirical', 'sampled'.*got 'hessian'"):
        kfac(model, F.cross_entropy, y, X, t, kind="hessian")
    with pytest.raises(ValueError, match="'expand', 'reduce'.*got 'both'"):
        kfac(model, F.cross_entropy, y, X, t, sharing="both")
    with pytest.raises(TypeError, match="takes one of the likelihoods"):
        kfac(model, F.cross_entropy, y, X, t, kind="sampled")
    with pytest.raises(TypeError, match="takes loss"):
        kfac(model, "categorical", y, X, t)
    with pytest.raises(FloatingPointError):
        kfac(model, F.cross_entropy, y, X * float("nan"), t)
    for swapped in (X, tree.ravel(y)[0]):
        with pytest.raises(TypeError, match=r"parameters by name, like model\.parameters\(\); got Tensor"):
            kfac(model, F.cross_entropy, swapped, y, t)
    with pytest.raises(TypeError, match="kfac.*int64"):
        kfac(model, F.cross_entropy, {"0.weight": torch.ones(5, 4, dtype=torch.int64)}, X, t)
    for kind, loss in (("gauss_newton", F.cross_entropy), ("empirical", F.cross_entropy), ("sampled", "categorical")):
        with pytest.raises(ValueError, match="K-FAC got no examples"):
            kfac(model, loss, y, X[:0], t[:0], kind=kind)
    pair, z = network(Pair())
    with pytest.raises(TypeError, match=r"one tensor \(N, \.\.\.\), got tuple"):
        kfac(pair, half, z, X, t)


def test_refuses_transforms_and_inference_mode():
    model, y = perceptron()
    X, t = normal(6, 4), torch.arange(6) % 3
    with torch.inference_mode(), pytest.raises(RuntimeError, match="kfac.*inference_mode"):
        kfac(model, F.cross_entropy, y, X, t)
    with pytest.raises(RuntimeError, match=r"kfac.*torch\.func"):
        torch.func.vmap(lambda X: kfac(model, F.cross_entropy, y, X, t).to_dense())(X.expand(2, -1, -1))
    with torch.no_grad():
        assert kfac(model, F.cross_entropy, y, X, t).size == 43


@pytest.mark.parametrize("weights", [None, "mean"])
@pytest.mark.parametrize("corrected", [False, True])
def test_refuses_batches_that_can_be_gone_through_once(weights: str | None, corrected: bool):
    model, y = perceptron()
    X, t = normal(6, 4), torch.arange(6) % 3
    with pytest.raises(TypeError, match="minibatch_kfac.*got generator.*only once"):
        minibatch_kfac(
            model, F.cross_entropy, y, ((X[i : i + 3], t[i : i + 3]) for i in (0, 3)), weights, corrected=corrected
        )


def test_refuses_batches_that_are_no_pairs():
    model, y = perceptron()
    X, t = normal(6, 4), torch.arange(6) % 3
    for batch in (X, (X, t, t), {"inputs": X, "targets": t}):
        with pytest.raises(TypeError, match=r"minibatch_kfac needs batches \(inputs, targets\)"):
            minibatch_kfac(model, F.cross_entropy, y, [batch])
    with pytest.raises(ValueError, match="minibatch_kfac got 0 batches"):
        minibatch_kfac(model, F.cross_entropy, y, [])
    with pytest.raises(ValueError, match="minibatch_kfac got 1 batches.*2, one per weight"):
        minibatch_kfac(model, F.cross_entropy, y, [(X, t)], [0.5, 0.5])
    lists = minibatch_kfac(model, F.cross_entropy, y, [[X, t]])  # what a DataLoader yields
    assert torch.equal(lists.to_dense(), kfac(model, F.cross_entropy, y, X, t).to_dense())


def test_preconditions_conjugate_gradients():
    model, y = network(nn.Linear(20, 4))
    X, t = normal(500, 20) @ torch.diag(torch.logspace(0, -2, 20, dtype=torch.float64)), torch.arange(500) % 4
    A = gauss_newton(model, F.cross_entropy, y, X, t).damped(1e-6)
    P = kfac(model, F.cross_entropy, y, X, t).damped(1e-6)
    b = normal(A.size)
    plain, preconditioned = CG().solve(A, b), CG(preconditioner=P.known_inverse).solve(A, b)
    assert preconditioned.converged, preconditioned.reason
    assert preconditioned.num_iter < 0.2 * plain.num_iter


def test_float32():
    model, y = perceptron()
    X, t = normal(6, 4), torch.arange(6) % 3
    exact = kfac(model, F.cross_entropy, y, X, t).to_dense()
    narrow = ig.functional(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    A = kfac(narrow, F.cross_entropy, tree.map(Tensor.float, y), X.float(), t)
    assert A.dtype == torch.float32
    assert (A.to_dense().double() - exact).norm() < 1e-6 * exact.norm()
