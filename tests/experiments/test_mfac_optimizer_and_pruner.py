"""M-FAC in use: the optimizer and the pruner against dense formulas."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.dataset import Part
from experiments.mfac.optimizer import MFAC
from experiments.mfac.pruner import BrainSurgeon, Magnitude, Prunable
from experiments.mfac.training import Trainer, gradient_rows


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(draw(*shape, seed=10 + place)) for place, shape in enumerate(shapes)]


def flat(tensors: list) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def give_gradients(group: list[nn.Parameter], seed: int) -> torch.Tensor:
    for place, p in enumerate(group):
        p.grad = draw(*p.shape, seed=100 * seed + place)
    return flat([p.grad for p in group])


# --- optimizer


def test_steps_equal_the_formula_with_a_dense_inverse() -> None:
    lr, momentum, weight_decay, num_grads, damping = 0.05, 0.7, 0.1, 4, 0.3
    group = parameters((3, 2), (2,))
    optimizer = MFAC(group, lr, momentum, weight_decay, num_grads, damping)
    w, rows, v = flat(group), [], torch.zeros(8, dtype=torch.float64)
    for step in range(7):  # fills the window and goes round
        g = give_gradients(group, step) + weight_decay * w
        rows = [*rows, g][-num_grads:]
        F = damping * torch.eye(8, dtype=torch.float64) + sum(torch.outer(row, row) for row in rows) / num_grads
        v = momentum * v + (1 - momentum) * torch.linalg.solve(F, g)
        w = w - lr * v
        optimizer.step()
        torch.testing.assert_close(flat(group), w, rtol=1e-11, atol=1e-12)


def test_groups_have_their_own_window_and_settings() -> None:
    group = parameters((3,), (2,))
    both = MFAC([{"params": group[:1]}, {"params": group[1:], "lr": 0.5, "num_grads": 2}], lr=0.1, damping=0.1)
    apart = copy.deepcopy(group)
    alone = [MFAC(apart[:1], lr=0.1, damping=0.1), MFAC(apart[1:], lr=0.5, num_grads=2, damping=0.1)]
    for step in range(4):
        give_gradients(group, step), give_gradients(apart, step)
        both.step()
        for optimizer in alone:
            optimizer.step()
    assert torch.equal(flat(group), flat(apart))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_optimizer_continues_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    group = [nn.Parameter(p.detach().to(dtype)) for p in parameters((3, 2), (2,))]
    optimizer = MFAC(group, lr=0.05, momentum=0.9, num_grads=3, damping=1e-3)

    def steps(group: list[nn.Parameter], optimizer: MFAC, places: range) -> None:
        for step in places:
            for place, p in enumerate(group):
                p.grad = draw(*p.shape, seed=100 * step + place).to(dtype)
            optimizer.step()

    steps(group, optimizer, range(5))
    torch.save({"w": group, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = [nn.Parameter(p.detach().clone()) for p in saved["w"]]
    resumed = MFAC(other)  # the settings come with the state
    resumed.load_state_dict(saved["optimizer"])
    copied, copy_of_optimizer = copy.deepcopy((group, optimizer))
    for each in ((group, optimizer), (other, resumed), (copied, copy_of_optimizer)):
        steps(*each, range(5, 10))
    assert torch.equal(flat(group), flat(other)) and torch.equal(flat(group), flat(copied))


def test_state_of_an_optimizer_that_has_not_stepped_loads() -> None:
    group = parameters((3,))
    optimizer = MFAC(group)
    optimizer.load_state_dict(MFAC(group, lr=0.25).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_parameter_without_gradient_stays_and_counts_as_zero() -> None:
    group, zero = parameters((3,), (2,)), parameters((3,), (2,))
    optimizers = MFAC(group, lr=0.1, weight_decay=0.0, damping=0.1), MFAC(zero, lr=0.1, damping=0.1)
    for step in range(3):
        give_gradients(group, step), give_gradients(zero, step)
        before = group[1].detach().clone()
        group[1].grad, zero[1].grad = None, torch.zeros(2, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(group[1], before)
    assert torch.equal(group[0], zero[0])
    optimizers[0].zero_grad()
    before = flat(group)
    optimizers[0].step()
    assert torch.equal(flat(group), before)


def test_bad_gradients_raise_and_move_nothing() -> None:
    group = parameters((3,), (2,))
    optimizer = MFAC([{"params": group[:1]}, {"params": group[1:]}], lr=0.1)
    give_gradients(group, 0)
    before = flat(group)
    group[1].grad = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        optimizer.step()
    group[1].grad = draw(2).to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step()
    assert torch.equal(flat(group), before)


def test_gradients_that_drown_the_damping_raise() -> None:
    group = parameters((3,))
    optimizer = MFAC(group, damping=1e-5)
    group[0].grad = torch.full((3,), 1e12, dtype=torch.float64)
    optimizer.step()
    with pytest.raises(FloatingPointError, match="norm 1.7e\\+12 .*lower lr"):
        optimizer.step()


@pytest.mark.parametrize(
    "setting",
    [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"num_grads": 0}, {"num_grads": 1.5}, {"damping": 0.0}],
)
def test_settings_out_of_range_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=f"MFAC needs .*{next(iter(setting))}|positive {next(iter(setting))}"):
        MFAC(parameters((2,)), **setting)


def test_group_of_two_dtypes_is_refused_and_not_added() -> None:
    optimizer = MFAC(parameters((2,)))
    with pytest.raises(ValueError, match="one dtype"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2).double())]})
    with pytest.raises(ValueError, match="real parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def test_closure_schedulers_and_new_damping() -> None:
    group = parameters((2,))
    optimizer = MFAC(group, lr=1.0, num_grads=1, damping=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = group[0].square().sum() / 2
        loss.backward()
        return loss

    for lr, damping in ((1.0, 1.0), (0.5, 1.0), (0.25, 3.0)):
        optimizer.param_groups[0]["damping"] = damping
        w = group[0].detach().clone()
        assert optimizer.step(closure) == w.square().sum() / 2
        schedule.step()
        torch.testing.assert_close(group[0].detach(), w - lr * w / (damping + w @ w))


# --- pruner


def two_layers() -> tuple[nn.Module, Part]:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double()
    for place, p in enumerate(network.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(place))
    return network, Part(draw(40, 4), (draw(40, seed=1) > 0).long())


def dense_fisher(G: torch.Tensor, damping: float, block_size: int | None) -> torch.Tensor:
    F = damping * torch.eye(G.shape[1], dtype=torch.float64) + G.T @ G / len(G)
    block = torch.arange(len(F)) // (block_size or len(F))
    return F * (block[:, None] == block)


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("compensation", ["joint", "single"])
def test_one_step_equals_the_dense_formulas(compensation: str, block_size: int | None) -> None:
    network, part = two_layers()
    prunable = Prunable(network)
    G = gradient_rows(network, prunable.parameters, part, torch.arange(40).view(10, 4))
    w = flat(prunable.parameters)
    F = dense_fisher(G, 1e-2, block_size)
    inverse = torch.linalg.inv(F)
    scores = w.square() / (2 * inverse.diagonal())
    Q, R = scores.argsort()[:11], scores.argsort()[11:]
    expected = w.clone()
    if compensation == "joint":
        expected[R] += torch.linalg.solve(F[R][:, R], F[R][:, Q] @ w[Q])
    else:
        for i in Q:
            expected -= w[i] / inverse[i, i] * inverse[i]
    expected[Q] = 0

    prunable.prune(BrainSurgeon(1e-2, compensation, block_size), lambda: G, 1 - 7 / 18)
    torch.testing.assert_close(flat(prunable.parameters), expected, rtol=1e-10, atol=1e-12)
    assert prunable.kept.nonzero().flatten().tolist() == sorted(R.tolist())


def test_joint_change_is_the_minimum_of_the_quadratic_loss() -> None:
    network, part = two_layers()
    prunable = Prunable(network)
    G = gradient_rows(network, prunable.parameters, part, torch.arange(40).view(10, 4))
    before, F = flat(prunable.parameters), dense_fisher(G, 1e-2, None)
    prunable.prune(BrainSurgeon(1e-2, "joint"), lambda: G, 0.5)
    slope = F @ (flat(prunable.parameters) - before)
    assert slope[prunable.kept].abs().max() < 1e-10 < slope[~prunable.kept].abs().max()


def test_both_compensations_agree_for_one_weight() -> None:
    pruned = []
    for compensation in ("joint", "single"):
        network, part = two_layers()
        prunable = Prunable(network)
        G = gradient_rows(network, prunable.parameters, part, torch.arange(40).view(10, 4))
        prunable.prune(BrainSurgeon(1e-2, compensation), functools.partial(torch.clone, G), 1 / 18)
        pruned.append(flat(prunable.parameters))
    torch.testing.assert_close(*pruned, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scope", ["network", "layer"])
@pytest.mark.parametrize("rule", [Magnitude(), BrainSurgeon(1e-3, "joint"), BrainSurgeon(1e-3, "single", 5)])
def test_sparsity_is_exact_and_only_weights_are_pruned(rule, scope) -> None:
    network, part = two_layers()
    others = {name: p.detach().clone() for name, p in network.named_parameters() if p.ndim == 1}
    prunable = Prunable(network, scope)
    rows = lambda: gradient_rows(network, prunable.parameters, part, torch.arange(40).view(10, 4))
    for sparsity, num_steps in ((0.3, 1), (0.3, 2), (0.6, 3), (5 / 6, 4)):
        before = prunable.kept.clone()
        prunable.prune(rule, rows, sparsity, num_steps)
        groups = flat(prunable.parameters).split([12, 6] if scope == "layer" else [18])
        assert [int((group != 0).sum()) for group in groups] == [round(len(g) * (1 - sparsity)) for g in groups]
        assert torch.equal(flat(prunable.parameters) != 0, prunable.kept)
        assert not (prunable.kept & ~before).any()
    assert all(torch.equal(p, others[name]) for name, p in network.named_parameters() if p.ndim == 1)


def test_magnitude_keeps_the_largest_weights_as_they_are() -> None:
    network, _ = two_layers()
    prunable = Prunable(network)
    before = flat(prunable.parameters)
    prunable.prune(Magnitude(), lambda: pytest.fail("needs no gradients"), 0.5)
    kept = before.abs() > before.abs().median()
    assert torch.equal(flat(prunable.parameters), before * kept)


def test_training_under_the_mask_keeps_zeros() -> None:
    network, part = two_layers()
    prunable = Prunable(network)
    prunable.prune(Magnitude(), lambda: torch.empty(0), 0.5)
    before = flat(prunable.parameters)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    list(Trainer(network, optimizer, part, 2, 8, 0, prunable.apply_mask).epochs())
    after = flat(prunable.parameters)
    assert torch.equal(after != 0, prunable.kept) and not torch.equal(after, before)


def test_wrong_arguments_are_refused() -> None:
    network, _ = two_layers()
    prunable = Prunable(network)
    prunable.prune(Magnitude(), lambda: torch.empty(0), 0.5)
    for sparsity, num_steps in ((0.4, 1), (1.0, 1), (0.6, 0)):
        with pytest.raises(ValueError, match="sparsity is 0.5000|num_steps=0"):
            prunable.prune(Magnitude(), lambda: torch.empty(0), sparsity, num_steps)
    with pytest.raises(ValueError, match="nothing to prune"):
        Prunable(nn.ReLU())
    with pytest.raises(ValueError, match="scope must be"):
        Prunable(network, "global")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compensation must be"):
        BrainSurgeon(1e-3, "both")  # type: ignore[arg-type]


def test_gradient_rows_are_those_of_the_mean_loss() -> None:
    network, part = two_layers()
    network.eval()
    weight = network[0].weight
    rows = gradient_rows(network, [weight], part, torch.tensor([[0, 1], [2, 3]]))
    losses = lambda batch: nn.functional.cross_entropy(network(part.X[batch]), part.t[batch], reduction="none")
    for row, batch in zip(rows, ([0, 1], [2, 3]), strict=True):
        singles = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses(batch)]
        torch.testing.assert_close(row, torch.stack(singles).mean(0).flatten())
