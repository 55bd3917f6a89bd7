"""Modules inside conditions: right hypergradients, and nothing the user owns is changed."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import implicitgrad as ig

SIZE = 4


class Rows(nn.Module):
    """Feeds `(6, SIZE)` rows to a sequence layer as one sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        out = self.layer(h.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.second.weight = self.first.weight

    def forward(self, h: Tensor) -> Tensor:
        return self.second(self.first(h).tanh())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh()), nn.Linear(SIZE, 2)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, h, use_reentrant=False))


def _transformer() -> nn.Module:
    return Rows(nn.TransformerEncoderLayer(SIZE, 2, 5, dropout=0.1, activation="gelu", batch_first=True))


MODULES = {
    "transformer block": _transformer,
    "batch norm": lambda: nn.Sequential(nn.Linear(SIZE, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(SIZE, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 2)),
    "lstm": lambda: Rows(nn.LSTM(SIZE, 3, batch_first=True)),
    "gru": lambda: Rows(nn.GRU(SIZE, 3, batch_first=True)),
    "tied weights": Tied,
    "compiled": lambda: torch.compile(
        nn.Sequential(nn.Linear(SIZE, 3), nn.Tanh(), nn.Linear(3, 2)), backend="aot_eager"
    ),
    "checkpointed": Checkpointed,
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(SIZE, 3)), nn.Tanh()),
}
# torch's own note that weight_norm runs row by row under vmap
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
every_module = pytest.mark.parametrize("name", MODULES)


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    """Fails if weights, buffers, flags, gradients, hooks or the random state differ after the block, by one bit."""
    before = copy.deepcopy(net.state_dict())
    owners = {name: id(value) for name, value in [*net.named_parameters(), *net.named_buffers()]}
    versions = {name: value._version for name, value in [*net.named_parameters(), *net.named_buffers()]}
    flags = [(module.training, len(module._forward_pre_hooks), set(vars(module))) for module in net.modules()]
    wants = [parameter.requires_grad for parameter in net.parameters()]
    grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()]
    random = torch.get_rng_state()
    hooks = len(nn.modules.module._global_forward_pre_hooks)
    yield
    after = net.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert owners == {name: id(value) for name, value in [*net.named_parameters(), *net.named_buffers()]}
    assert versions == {name: value._version for name, value in [*net.named_parameters(), *net.named_buffers()]}
    assert flags == [(m.training, len(m._forward_pre_hooks), set(vars(m))) for m in net.modules()]
    assert wants == [parameter.requires_grad for parameter in net.parameters()]
    for old, parameter in zip(grads, net.parameters(), strict=True):
        assert (old is None) == (parameter.grad is None) and (old is None or torch.equal(old, parameter.grad))
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == len(nn.modules.module._global_forward_pre_hooks)


FEATURES = torch.linspace(-1, 1, 6 * SIZE, dtype=torch.float64).sin().mul(3).cos().reshape(6, SIZE)


class Training:
    """Training a module with penalties `exp(x)`, with a linear term that puts the solution at a given place.

    The reference for `dF/dx` uses first-order gradients only: central differences of the re-solved problem, where the
    re-solve is a Newton iteration with Jacobians by central differences.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net_fn = ig.functional(net, rng=3)
        self.start = {}
        for name, value in self.net_fn.parameters().items():  # at most 64: the reference pays per unknown
            if sum(v.numel() for v in self.start.values()) + value.numel() <= 64:
                self.start[name] = value
        self.x = torch.tensor([1.2, 0.9])
        self.slope = {name: torch.zeros_like(value) for name, value in self.start.items()}
        self.slope = self.gradient(self.x, self.start)

    def loss(self, x: Tensor, y: dict[str, Tensor]) -> Tensor:
        fit = self.net_fn(y, FEATURES * (1 + 0.1 * x[1])).sin().mean()
        flat = torch.cat([value.reshape(-1) for value in y.values()])
        shift = torch.cat([value.reshape(-1) for value in self.slope.values()])
        return fit + 0.5 * x[0].exp() * (flat * flat).sum() - shift @ flat

    def upper(self, x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return sum(
            (value * torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape)).sin().sum() for value in y.values()
        )

    def gradient(self, x: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        y = {name: value.detach().requires_grad_() for name, value in y.items()}
        grads = torch.autograd.grad(self.loss(x, y), list(y.values()))
        return dict(zip(y, grads, strict=True))

    def solved_at(self, x: Tensor) -> dict[str, Tensor]:
        """Newton iteration at a nearby `x` with one Jacobian, by fourth-order differences."""
        flat, unravel = ig.tree.ravel(self.start)
        residual = lambda v, x: ig.tree.ravel(self.gradient(x, unravel(v)))[0]
        if not hasattr(self, "inverse"):
            columns = [self._difference(lambda v: residual(v, self.x), flat, unit) for unit in torch.eye(len(flat))]
            self.inverse = torch.linalg.inv(torch.stack(columns, -1))
        for _ in range(12):  # contracts by the change of x each time: 1e-3 and better
            flat = flat - self.inverse @ residual(flat, x)
        return unravel(flat)

    @staticmethod
    def _difference(fn: Callable[[Tensor], Tensor], point: Tensor, unit: Tensor, step: float = 1e-3) -> Tensor:
        near = fn(point + step * unit) - fn(point - step * unit)
        far = fn(point + 2 * step * unit) - fn(point - 2 * step * unit)
        return (8 * near - far) / (12 * step)

    def differences(self) -> Tensor:
        """`dF/dx` of the re-solved problem by fourth-order differences, good to about 1e-9."""
        value = lambda x: self.upper(x, self.solved_at(x)).detach()
        return torch.stack([self._difference(value, self.x, unit) for unit in torch.eye(2)])


@every_module
def test_hypergradient_equals_finite_differences_and_the_module_is_unchanged(name: str) -> None:
    net = MODULES[name]()
    with unchanged(net):
        problem = Training(net)
        condition = ig.Stationary(problem.loss)
        x = problem.x.clone().requires_grad_()
        with ig.diagnostics() as log:
            y = ig.implicit_root(condition, x, problem.start)
            (got,) = torch.autograd.grad(problem.upper(x, y), x)
        assert log[-1].route == "retained graph"
        h = ig.hypergradient(problem.upper, condition, problem.x, problem.start)
        want = problem.differences()
    # 1e-7: truncation and rounding of the differences, which have no better step than 1e-3
    assert torch.allclose(got, want, rtol=1e-7, atol=1e-9)
    assert torch.allclose(h.value, got, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("checkpointed",)])
def test_functional_transforms_agree_with_reverse_mode_and_leave_the_module(name: str) -> None:
    net = MODULES[name]()
    with unchanged(net):
        problem = Training(net)
        scalar = lambda x: problem.upper(x, ig.implicit_root(ig.Stationary(problem.loss), x, problem.start))
        x = problem.x.clone().requires_grad_()
        (want,) = torch.autograd.grad(scalar(x), x)
        assert torch.allclose(torch.func.grad(scalar)(problem.x), want, rtol=1e-9)
        # jacfwd runs the condition under vmap, where torch asks how to draw dropout masks
        assert torch.allclose(torch.func.jacfwd(scalar, randomness="same")(problem.x), want, rtol=1e-9)


@pytest.mark.parametrize("name", ["batch norm", "dropout", "transformer block", "gru", "tied weights"])
def test_second_derivatives_equal_differences_of_first_ones_or_raise(name: str) -> None:
    # third derivatives of layer_norm, batch_norm and instance_norm are wrong in torch 2.13, in reverse mode too
    net = MODULES[name]()
    with unchanged(net):
        problem = Training(net)
        condition = ig.Stationary(problem.loss)

        def hypergradient(x: Tensor) -> Tensor:
            y = problem.solved_at(x.detach())
            x = x.detach().requires_grad_()
            return torch.autograd.grad(problem.upper(x, ig.implicit_root(condition, x, y)), x)[0]

        x = problem.x.clone().requires_grad_()
        upper = problem.upper(x, ig.implicit_root(condition, x, problem.start))
        (first,) = torch.autograd.grad(upper, x, create_graph=True)
        try:
            (second,) = torch.autograd.grad(first[0], x)
        except NotImplementedError as error:
            assert "norm" in str(error) and name in ("batch norm", "transformer block")
            return
        want = problem._difference(hypergradient, problem.x, torch.tensor([1.0, 0.0]))
    assert torch.allclose(second, want, rtol=1e-7, atol=1e-8)


# --- functional -------------------------------------------------------------------------------------------------------


@every_module
def test_functional_computes_what_the_module_computes(name: str) -> None:
    net = MODULES[name]().eval()
    net_fn = ig.functional(net)
    assert torch.allclose(net_fn(net_fn.parameters(), FEATURES), net(FEATURES), rtol=1e-13)
    assert torch.allclose(net_fn({}, FEATURES), net(FEATURES), rtol=1e-13)


def test_dropout_masks_are_the_same_in_every_call_and_follow_the_seed() -> None:
    net = MODULES["dropout"]()
    params = ig.functional(net).parameters()
    with unchanged(net):
        one, other = ig.functional(net, rng=1), ig.functional(net, rng=2)
        first = one(params, FEATURES)
        assert torch.equal(first, one(params, FEATURES)) and torch.equal(
            first, ig.functional(net, rng=1)(params, FEATURES)
        )
        assert not torch.equal(first, other(params, FEATURES))
        unseeded = ig.functional(net)
        before = unseeded(params, FEATURES)
    torch.rand(1)
    assert torch.equal(before, unseeded(params, FEATURES))
    assert not torch.equal(before, ig.functional(net)(params, FEATURES))
    net.eval()
    assert torch.equal(one(params, FEATURES), net(FEATURES))


def test_functional_buffers_can_be_given_and_stay_as_given() -> None:
    net = nn.Sequential(nn.BatchNorm1d(SIZE))
    mean = torch.full((SIZE,), 2.0)
    net.eval()
    with unchanged(net):
        got = ig.functional(net, buffers={"0.running_mean": mean})({}, FEATURES)
        assert torch.allclose(got, (FEATURES - 2) / (1 + 1e-5) ** 0.5, rtol=1e-13)
    net.train()
    with unchanged(net):
        ig.functional(net, buffers={"0.running_mean": mean})({}, FEATURES)
    assert torch.equal(mean, torch.full((SIZE,), 2.0))


def test_tied_weights_appear_once_and_get_both_gradients() -> None:
    net = Tied()
    net_fn = ig.functional(net)
    assert set(net_fn.parameters()) == {"first.weight", "first.bias", "second.bias"}
    loss = lambda weight: net_fn({"first.weight": weight}, FEATURES).square().sum()
    weight = net.first.weight.detach()
    step = 1e-5
    unit = torch.eye(SIZE)
    slope = (loss(weight + step * unit) - loss(weight - step * unit)) / (2 * step)
    assert torch.allclose(torch.func.grad(loss)(weight).diagonal().sum(), slope, rtol=1e-7)


def test_unknown_names_shapes_and_kinds_are_refused() -> None:
    net = nn.Linear(SIZE, 2)
    net_fn = ig.functional(net)
    with pytest.raises(ValueError, match="no parameter 'wight'"):
        net_fn({"wight": net.weight}, FEATURES)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        net_fn({"weight": torch.ones(2)}, FEATURES)
    with pytest.raises(ValueError, match="no buffers"):
        ig.functional(net, buffers={"running_mean": torch.ones(2)})
    with pytest.raises(TypeError, match=r"nn\.Module"):
        ig.functional(lambda h: h)


@every_module
def test_functional_gradients_do_not_touch_the_module(name: str) -> None:
    net = MODULES[name]()
    with unchanged(net):
        net_fn = ig.functional(net)
        params = {key: value.requires_grad_() for key, value in net_fn.parameters().items()}
        net_fn(params, FEATURES).square().sum().backward()
    assert all(value.grad is not None for value in params.values())


# --- modules used directly in a condition -----------------------------------------------------------------------------


def _direct(net: nn.Module, penalty: float = 3.0) -> ig.Stationary:
    """`y` is an input that the network, used as it stands, pulls at."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return net(FEATURES * (1 + 0.2 * y)).sin().mean() + 0.5 * penalty * (y - x.sin()).square().sum()

    return ig.Stationary(loss)


def _solve(condition: ig.Stationary, x: Tensor, state: Tensor) -> Tensor:
    """Gradient descent; the same random state at every step makes dropout one fixed mask."""
    y = torch.zeros(SIZE)
    for _ in range(60):
        torch.set_rng_state(state)
        leaf = y.clone().requires_grad_()
        y = y - torch.autograd.grad(condition.loss(x.detach(), leaf), leaf)[0] / 3
    torch.set_rng_state(state)
    return y


@pytest.mark.parametrize("name", ["batch norm", "dropout", "gru", "tied weights", "transformer block", "checkpointed"])
def test_a_module_used_directly_is_left_alone_and_its_weights_get_right_gradients(name: str) -> None:
    net = MODULES[name]()
    twin = copy.deepcopy(net)
    x, state = torch.tensor([0.3, -0.2, 0.5, 0.1]), torch.get_rng_state()
    y = _solve(_direct(twin), x, state)
    weights = list(net.parameters())
    with unchanged(net):
        leaf = x.clone().requires_grad_()
        solved = ig.implicit_root(_direct(net), leaf, y)
        grads = torch.autograd.grad(solved.sin().sum(), [leaf, *weights], allow_unused=True)
    assert torch.equal(y, solved.detach())
    # the last weight's first entry and x, by differences of the re-solved problem
    step = 1e-4

    def moved(amount: float) -> Tensor:
        other = copy.deepcopy(twin)
        with torch.no_grad():
            next(iter(other.parameters())).view(-1)[0].add_(amount)
        return _solve(_direct(other), x, state).sin().sum()

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert torch.allclose(grads[1].view(-1)[0], slope, rtol=1e-5, atol=1e-9)
    unit = torch.eye(SIZE)[0]
    ahead, behind = (
        _solve(_direct(copy.deepcopy(twin)), x + sign * step * unit, state).sin().sum() for sign in (1, -1)
    )
    assert torch.allclose(grads[0][0], (ahead - behind) / (2 * step), rtol=1e-6)


def test_backward_fills_the_gradients_of_closed_over_weights_once() -> None:
    net = nn.Linear(SIZE, 2)
    x = torch.ones(SIZE, requires_grad=True)
    y = _solve(_direct(net), x, torch.get_rng_state()).requires_grad_()
    solved = ig.implicit_root(_direct(net), x, y)
    assert net.weight.grad is None
    want = torch.autograd.grad(solved.sum(), [x, net.weight, net.bias], retain_graph=True)
    assert net.weight.grad is None
    with unchanged(nn.ParameterList()):
        solved.sum().backward(retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip((x.grad, net.weight.grad, net.bias.grad), want, strict=True))
    assert y.grad is None and y.requires_grad and y.is_leaf
    solved.sum().backward()
    assert torch.allclose(net.weight.grad, 2 * want[1])
    net.weight.requires_grad_(False)
    frozen = ig.implicit_root(_direct(net), x, y)
    assert len(torch.autograd.grad(frozen.sum(), [x, net.bias])) == 2
    assert not net.weight.requires_grad


@pytest.mark.parametrize(
    "road", ["reverse", "grad", "jacfwd", "vmap", "hypergradient", "no grad", "nothing requires grad"]
)
def test_random_state_arguments_and_flags_are_untouched_on_every_road(road: str) -> None:
    net = nn.Sequential(nn.Linear(SIZE, 5), nn.Dropout(0.3), nn.Linear(5, 2))
    x, state = torch.tensor([0.3, -0.2, 0.5, 0.1]), torch.get_rng_state()
    y = _solve(_direct(net), x, state)
    copies, versions = (x.clone(), y.clone()), (x._version, y._version)
    scalar = lambda x: ig.implicit_root(_direct(net), x, y).sum()
    with unchanged(net):
        if road == "reverse":
            torch.autograd.grad(scalar(x.clone().requires_grad_()), list(net.parameters()), create_graph=True)
        elif road == "hypergradient":
            ig.hypergradient(lambda x, y: net(y).sum(), _direct(net), x, y)
        elif road == "vmap":
            torch.func.vmap(scalar, randomness="same")(x[None])
        elif road == "jacfwd":
            torch.func.jacfwd(scalar, randomness="same")(x)
        elif road == "no grad":
            with torch.no_grad():
                scalar(x.clone().requires_grad_())
        elif road == "nothing requires grad":
            with ig.diagnostics():
                scalar(x)
        else:
            getattr(torch.func, road)(scalar)(x)
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1]) and (x._version, y._version) == versions
    assert not x.requires_grad and not y.requires_grad and x.grad is None


def test_the_result_never_shares_memory_with_the_solution_given() -> None:
    condition = ig.Stationary(lambda x, y: (y - x).square().sum())
    for x in (torch.ones(2), torch.ones(2, requires_grad=True)):
        y = torch.ones(2)
        solved = ig.implicit_root(condition, x, y)
        with torch.no_grad():
            solved.zero_()
        assert torch.equal(y, torch.ones(2))


def test_a_compiled_module_used_directly_takes_the_finite_difference_route_or_says_so() -> None:
    net = torch.compile(nn.Sequential(nn.Linear(SIZE, 3), nn.Tanh(), nn.Linear(3, 2)), backend="aot_eager")
    plain = net._orig_mod
    x = torch.tensor([0.3, -0.2, 0.5, 0.1])
    y = _solve(_direct(plain), x, torch.get_rng_state())
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(ig.implicit_root(_direct(plain), leaf, y).sin().sum(), [leaf, *plain.parameters()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler looks at .grad of every tensor and is warned for it
        with unchanged(plain), ig.diagnostics() as log:
            solved = ig.implicit_root(_direct(net), leaf, y)
            got = torch.autograd.grad(solved.sin().sum(), [leaf, *plain.parameters()])
    assert log[-1].route == "finite difference" and "finite difference" in str(log)
    # products by central differences are good to about 1e-7 relative
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(got, wanted, strict=True))
