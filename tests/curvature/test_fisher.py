"""Fisher matrices and their rows against sums over single examples."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import implicitgrad as ig
from implicitgrad.curvature import empirical_fisher, empirical_rows, gauss_newton, sampled_fisher, sampled_rows
from tests.curvature.models import NETS, assert_near, dense_gauss_newton, problem, single_gradients, vectors

every_net = pytest.mark.parametrize("name", NETS)


@every_net
def test_empirical_fisher_is_the_mean_of_squares(name: str):
    """Also for a loss that is a sum: the matrix is a mean over examples."""
    p = problem(name)
    G = single_gradients(p)
    A, exact = empirical_fisher(p.model, p.loss, p.y, *p.data), G.T @ G / len(G)
    assert A.symmetric
    assert A.eigenvalue_floor == 0
    assert_near(A.to_dense(), exact, 1e-12)
    assert_near(A @ vectors(A.size), exact @ vectors(A.size), 1e-12)


@every_net
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_empirical_rows_are_single_gradients(name: str, chunk_size: int | None):
    p = problem(name)
    rows = empirical_rows(p.model, p.loss, p.y, *p.data, chunk_size=chunk_size)
    assert_near(rows, single_gradients(p) / math.sqrt(len(p.inputs)), 1e-12)


def test_float32():
    single, double = problem("layer norm", dtype=torch.float32), problem("layer norm")
    A = empirical_fisher(single.model, single.loss, single.y, *single.data)
    G = single_gradients(double)
    assert_near(A.to_dense().double(), G.T @ G / len(G), 1e-5)
    rows = empirical_rows(single.model, single.loss, single.y, *single.data)
    assert_near(rows.double(), G / 3, 1e-5)


LIKELIHOODS = {
    "categorical": ("mlp", lambda z: torch.distributions.Categorical(logits=z)),
    "gaussian": ("mlp with mse", lambda z: torch.distributions.Independent(torch.distributions.Normal(z, 1.0), 1)),
    "bernoulli": ("group norm", lambda z: torch.distributions.Independent(torch.distributions.Bernoulli(logits=z), 1)),
}
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)


@every_likelihood
def test_sampled_scores_have_the_fisher_matrix_as_their_mean(likelihood: str):
    """Within six standard errors, entry by entry; the exact mean is the Gauss-Newton matrix of the log-likelihood."""
    name, distribution = LIKELIHOODS[likelihood]
    p, num_samples = problem(name), 10_000
    likely = lambda z, t: -distribution(z).log_prob(t).mean()
    exact = gauss_newton(p.model, likely, p.y, p.inputs, p.targets).to_dense()
    A = sampled_fisher(p.model, likelihood, p.y, p.inputs, num_samples=num_samples)
    spread = 6 * exact.diagonal().sqrt().outer(exact.diagonal().sqrt()).max() / math.sqrt(num_samples)
    assert (A.to_dense() - exact).abs().max() < spread
    assert spread < 0.1 * exact.abs().max()  # so that it says something


@every_likelihood
def test_sampled_gradients_are_those_of_the_log_likelihood(likelihood: str):
    """Labels are read off the scores, then each row is compared with a gradient through torch.distributions."""
    name, distribution = LIKELIHOODS[likelihood]
    p = problem(name)
    rows = sampled_rows(p.model, likelihood, p.y, p.inputs, num_samples=2).unflatten(0, (len(p.inputs), 2))
    for i, pair in enumerate(rows * math.sqrt(2 * len(p.inputs))):
        leaves = {name: value.clone().requires_grad_() for name, value in p.y.items()}
        z = p.model(leaves, p.inputs[i : i + 1])
        bias = pair[:, -3:]  # the derivative in the last bias is the score itself
        if likelihood == "categorical":
            labels = bias.argmin(1).unsqueeze(1)
        else:
            mean = z.sigmoid() if likelihood == "bernoulli" else z
            labels = (mean.detach() - bias).unsqueeze(1)
        for row, label in zip(pair, labels, strict=True):
            label = label.round() if likelihood == "bernoulli" else label
            value = -distribution(z).log_prob(label).sum()
            wanted = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
            assert_near(row, torch.cat([g.flatten() for g in wanted]), 1e-12)


@every_likelihood
@pytest.mark.parametrize("num_samples", [1, 3])
def test_sampled_rows_are_a_square_root(likelihood: str, num_samples: int):
    p = problem(LIKELIHOODS[likelihood][0])
    options = {"num_samples": num_samples}
    rows = sampled_rows(p.model, likelihood, p.y, p.inputs, **options)
    assert rows.shape == (num_samples * len(p.inputs), len(rows[0]))
    assert_near(rows.T @ rows, sampled_fisher(p.model, likelihood, p.y, p.inputs, **options).to_dense(), 1e-12)


def test_labels_come_from_the_generator():
    p = problem("mlp")
    make = lambda seed: sampled_rows(
        p.model, "categorical", p.y, p.inputs, generator=torch.Generator().manual_seed(seed)
    )
    state = torch.get_rng_state()
    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_categorical_positions_add_up():
    """Logits (N, C, positions): a sample is a row of labels, its score the sum over positions."""
    inputs, y = vectors(4, 2), vectors(2, 3, 5)
    model = lambda y, X: torch.einsum("na,acp->ncp", X, y)
    likely = lambda z, t: F.cross_entropy(z, t, reduction="sum") / len(z)
    exact = gauss_newton(model, likely, y, inputs, torch.zeros(4, 5, dtype=torch.int64)).to_dense()
    A = sampled_fisher(model, "categorical", y, inputs, num_samples=20_000).to_dense()
    assert (A - exact).abs().max() < 0.05 * exact.abs().max()


def test_models_that_branch_on_values_go_one_by_one():
    def alone(y: Tensor, example: Tensor) -> Tensor:
        sign = 1.0 if example.sum().item() > 0 else -1.0  # vmap refuses .item()
        return (sign * example * y).tanh() * y

    y, inputs, targets = vectors(3), vectors(4, 3), vectors(4, 3)
    loss = lambda z, t: (z - t).square().sum()
    rows = empirical_rows(lambda y, X: torch.stack([alone(y, x) for x in X]), loss, y, inputs, targets)
    for row, x, t in zip(rows, inputs, targets, strict=True):
        leaf = y.clone().requires_grad_()
        assert_near(2 * row, torch.autograd.grad(loss(alone(leaf, x), t), leaf)[0], 1e-13)


def test_checkpointed_models_go_one_by_one():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.net, inputs, use_reentrant=False)

    inputs, targets = vectors(5, 4), vectors(5, 3)
    rows = [
        empirical_rows(model, F.mse_loss, model.parameters(), inputs, targets)
        for model in (ig.functional(net), ig.functional(Checkpointed()))
    ]
    assert_near(rows[1], rows[0], 1e-13)


def test_batch_norm_in_training_mode_has_no_rows():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    model, inputs, targets = ig.functional(net), vectors(6, 4), vectors(6, 2)
    with pytest.raises(ValueError, match=r"net\.eval\(\)"):
        empirical_rows(model, F.mse_loss, model.parameters(), inputs, targets)
    net.eval()
    rows = empirical_rows(model, F.mse_loss, model.parameters(), inputs, targets)
    A = empirical_fisher(model, F.mse_loss, model.parameters(), inputs, targets)
    assert_near(rows.T @ rows, A.to_dense(), 1e-12)


def test_dropout_is_one_mask_for_all_examples():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2)).double()
    model, inputs, targets = ig.functional(net), vectors(6, 4), vectors(6, 2)
    make = lambda **options: empirical_rows(model, F.mse_loss, model.parameters(), inputs, targets, **options)
    assert torch.equal(make(), make())
    assert_near(make(chunk_size=1), make(), 1e-14)
    assert (make() == 0).all(0).any()  # a hidden unit is switched off for all


def test_refuses():
    p = problem("mlp")
    with pytest.raises(ValueError, match="neither the mean nor the sum"):
        weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        empirical_fisher(p.model, lambda z, t: F.cross_entropy(z, t, weight=weights), p.y, *p.data)
    with pytest.raises(ValueError, match="neither the mean nor the sum"):
        empirical_rows(p.model, lambda z, t: F.cross_entropy(z, t, ignore_index=0), p.y, *p.data)
    with pytest.raises(ValueError, match="likelihood must be one of .* got 'poisson'"):
        sampled_fisher(p.model, "poisson", p.y, p.inputs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_samples"):
        sampled_rows(p.model, "categorical", p.y, p.inputs, num_samples=0)
    with pytest.raises(ValueError, match="one number of examples"):
        empirical_rows(p.model, p.loss, p.y, p.inputs, p.targets[:4])
    with pytest.raises(ValueError, match=r"logits \(N, C"):
        sampled_fisher(lambda y, X: X @ y, "categorical", vectors(4), p.inputs)
    with pytest.raises(FloatingPointError, match="NaN"):
        empirical_fisher(p.model, lambda z, t: (z - z.detach()).abs().sqrt().sum(), p.y, *p.data)
    with pytest.raises(TypeError, match="needs tensors"):
        empirical_fisher(p.model, p.loss, p.y, p.inputs, list(range(9)))
    with pytest.raises(TypeError, match="one tensor"):
        empirical_fisher(lambda y, X: {"z": p.model(y, X)}, p.loss, p.y, *p.data)


def test_empirical_fisher_is_not_the_gauss_newton_matrix():
    p = problem("mlp")
    A = empirical_fisher(p.model, p.loss, p.y, *p.data).to_dense()
    assert (A - dense_gauss_newton(p)).abs().max() > 0.1 * A.abs().max()
