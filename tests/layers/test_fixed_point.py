"""Deep equilibrium layers against unrolling, dense Jacobians and finite differences."""

import copy
import pickle
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import implicitgrad as ig
from experiments.benchmarks.deep_equilibrium import Cell, gradients, peak_memory, problem, relative_error, unrolled
from implicitgrad.layers import FixedPointLayer
from implicitgrad.linalg import GMRES, LU, BiCGSTAB, Neumann
from implicitgrad.solvers import Anderson, FixedPointIteration

EXACT = partial(Anderson, tol=1e-12)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return torch.allclose(got, want, rtol=tolerance, atol=tolerance)


class Linear(nn.Module):
    """`z ↦ M z + input`, row by row."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, z: Tensor, inputs: Tensor) -> Tensor:
        return z @ self.matrix.mT + inputs


@pytest.mark.parametrize("norm", [0.9, 2.0])
def test_gradients_equal_unrolling_at_a_tenth_of_its_memory(norm: float) -> None:
    cell, inputs, target = problem(width=32, batch=64, norm=norm)
    long = partial(gradients, cell, partial(unrolled, cell, num_steps=500), inputs, target)
    layer = FixedPointLayer(cell, solver=partial(Anderson, tol=1e-9))
    short = partial(gradients, cell, layer, inputs, target)
    assert relative_error(short(), long()) < 1e-7
    assert peak_memory(short, inputs.device) < 0.1 * peak_memory(long, inputs.device)


@pytest.mark.parametrize("linear_solver", [GMRES(), BiCGSTAB(), Neumann(num_terms=300), LU(), None], ids=str)
@pytest.mark.parametrize("solver", [EXACT, partial(FixedPointIteration, tol=1e-12)])
def test_every_choice_of_solvers_gives_the_same_gradients(solver, linear_solver) -> None:
    cell, inputs, target = problem(width=5, batch=3, norm=0.9)
    layer = FixedPointLayer(cell, solver=solver, linear_solver=linear_solver)
    got = gradients(cell, layer, inputs, target)
    assert relative_error(got, gradients(cell, partial(unrolled, cell, num_steps=400), inputs, target)) < 1e-9


def test_first_and_second_derivatives_pass_gradcheck() -> None:
    cell = Cell(2, 0.8)
    layer = FixedPointLayer(cell, solver=partial(Anderson, tol=1e-13))
    names = [name for name, _ in cell.named_parameters()]

    def run(inputs: Tensor, *parameters: Tensor) -> Tensor:
        named = {f"module.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(layer, named, (inputs,))

    arguments = [draw(2, 2).requires_grad_(), *(p.detach().clone().requires_grad_() for p in cell.parameters())]
    assert torch.autograd.gradcheck(run, arguments)
    # a second backward pass starts from the first one's solution, so that it differs by the solver's tolerance
    assert torch.autograd.gradgradcheck(run, arguments, nondet_tol=1e-8)


def test_parameters_get_gradients_and_an_optimizer_trains_them() -> None:
    torch.manual_seed(0)
    layer = FixedPointLayer(Cell(4, 0.5))
    inputs, target = draw(8, 4), 0.5 * draw(8, 4, seed=1).tanh()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        z = layer(inputs)
        loss = (z - target).square().mean() + 0.01 * layer.jacobian_penalty(z, inputs)
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_trees_as_state_and_several_inputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.tensor(0.3))

        def forward(self, z: dict, a: Tensor, b: Tensor) -> dict:
            return {"u": self.mix * z["v"] + a, "v": self.mix * z["u"] + b}

    layer = FixedPointLayer(Pair(), solver=EXACT, initial=lambda a, b: {"v": torch.zeros_like(b), "u": torch.ones(3)})
    a, b = draw(3).requires_grad_(), draw(3, seed=1).requires_grad_()
    z = layer(a, b)
    m = layer.module.mix
    want = (a + m * b) / (1 - m * m)
    assert near(z["u"], want, 1e-10)
    got, exact = (torch.autograd.grad(v.sin().sum(), (a, b, m), retain_graph=True) for v in (z["u"], want))
    assert all(near(x, y, 1e-9) for x, y in zip(got, exact, strict=True))


def test_a_batch_is_one_system_and_vmap_makes_many() -> None:
    cell, inputs, _ = problem(width=4, batch=5, norm=0.9)
    layer = FixedPointLayer(cell, solver=EXACT)
    with ig.diagnostics() as log:
        together = layer(inputs)
    assert log[-1].size == 20 and log[-1].batch == 1
    grads = [torch.func.grad(lambda x: f(x).sin().sum())(inputs) for f in (layer, torch.func.vmap(layer))]  # noqa: B023
    assert near(together, torch.func.vmap(layer)(inputs), 1e-10) and near(*grads, 1e-9)


# --- Jacobians --------------------------------------------------------------------------------------------------------


def dense_jacobian(cell: nn.Module, z: Tensor, inputs: Tensor) -> Tensor:
    n = z.numel()
    return torch.func.jacrev(lambda flat: cell(flat.view_as(z), inputs).reshape(-1))(z.detach().reshape(-1)).view(n, n)


def test_jacobian_penalty_is_the_mean_of_squared_products() -> None:
    cell, inputs, _ = problem(width=3, batch=2, norm=0.9)
    layer = FixedPointLayer(cell, solver=EXACT)
    z = layer(inputs).detach()
    J = dense_jacobian(cell, z, inputs)
    generator, twin = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    got = layer.jacobian_penalty(z, inputs, num_samples=3, generator=generator)
    probes = torch.stack([torch.randn(6, generator=twin) for _ in range(3)])
    assert near(got, (probes @ J).square().sum(1).mean() / 6, 1e-12)
    # its mean over many samples is the squared Frobenius norm over n; a sample strays by about its mean
    many = layer.jacobian_penalty(z, inputs, num_samples=2000)
    assert many.item() == pytest.approx((J.square().sum() / 6).item(), rel=0.1)
    assert layer.jacobian_penalty(z, inputs).item() != layer.jacobian_penalty(z, inputs).item()  # new samples each time


def test_the_gradient_of_the_penalty_is_the_total_derivative_at_no_further_system() -> None:
    cell, inputs, target = problem(width=3, batch=2, norm=0.9)
    layer = FixedPointLayer(cell, solver=partial(Anderson, tol=1e-14), linear_solver=GMRES(rtol=1e-13))

    def value() -> Tensor:
        z = layer(inputs)
        return (z * target).sum() + layer.jacobian_penalty(z, inputs, generator=torch.Generator().manual_seed(0))

    with ig.diagnostics() as log:
        (got,) = torch.autograd.grad(value(), cell.weight)
    assert len(log) == 1 and len(log[0].solves) == 1
    direction, h = draw(3, 3, seed=4), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            cell.weight += sign * h * direction
        values.append(value().item())
        with torch.no_grad():
            cell.weight -= sign * h * direction
    assert (got * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-7)


def test_training_with_the_penalty_shrinks_the_spectral_radius() -> None:
    layer = FixedPointLayer(Cell(6, 1.5))
    inputs = draw(4, 6)
    optimizer = torch.optim.Adam([layer.module.weight], lr=0.02)  # pyright: ignore
    before = layer.spectral_radius(layer(inputs), inputs)
    for _ in range(25):
        optimizer.zero_grad()
        layer.jacobian_penalty(layer(inputs), inputs).backward()
        optimizer.step()
    assert layer.spectral_radius(layer(inputs), inputs) < 0.6 * before


@pytest.mark.parametrize("kind", ["real", "complex pair", "zero"])
def test_spectral_radius_equals_the_largest_eigenvalue(kind: str) -> None:
    blocks = {
        "real": torch.diag(torch.tensor([-0.9, 0.5, 0.3])),
        "complex pair": torch.block_diag(torch.tensor([[0.3, -0.8], [0.6, 0.2]]), torch.tensor([[0.4]])),
        "zero": torch.zeros(3, 3),
    }
    basis = draw(3, 3)
    layer = FixedPointLayer(Linear(torch.linalg.inv(basis) @ blocks[kind] @ basis))
    inputs = draw(2, 3, seed=1)
    radius = layer.spectral_radius(layer(inputs), inputs, num_iter=400)
    # products with a pair of eigenvalues turn, so that their mean growth is good to about 1 / num_iter
    tolerance = 1e-2 if kind == "complex pair" else 1e-6
    assert radius == pytest.approx(torch.linalg.eigvals(blocks[kind]).abs().max().item(), abs=tolerance)


# --- state ------------------------------------------------------------------------------------------------------------


def test_warm_start_and_init_save_iterations() -> None:
    cell, inputs, _ = problem(width=6, batch=4, norm=0.95)
    layer = FixedPointLayer(cell, solver=partial(Anderson, tol=1e-8), warm_start=True)
    assert layer.info is None
    z = layer(inputs)
    first = layer.info
    layer(inputs + 1e-6)
    assert first is not None and layer.info is not None
    assert first.converged and layer.info.converged and layer.info.num_iter < first.num_iter / 2
    layer(inputs[:2])  # another shape: from zero again
    assert layer.info.num_iter > 3
    cold = FixedPointLayer(cell, solver=partial(Anderson, tol=1e-8))
    cold(inputs, init=z)
    assert cold.info is not None and cold.info.num_iter == 0
    cold(inputs)
    assert cold.info.num_iter == first.num_iter


def test_dropout_and_running_statistics() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.norm, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)

        def forward(self, z: Tensor, inputs: Tensor) -> Tensor:
            return 0.3 * self.drop(torch.tanh(self.norm(self.lift(z)) + inputs))

    torch.manual_seed(0)
    module = Noisy()
    layer = FixedPointLayer(module, solver=EXACT)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    random = torch.get_rng_state()
    first, second = layer(draw(6, 3)), layer(draw(6, 3))
    assert layer.info is not None and layer.info.converged and torch.equal(first, second)
    first.sum().backward()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    torch.rand(())
    assert not near(layer(draw(6, 3)), first, 1e-3)  # another mask


def test_copies_pickles_and_evaluation_without_gradients() -> None:
    layer = FixedPointLayer(Cell(3, 0.5), warm_start=True)
    z = layer(draw(2, 3))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            twin.module.weight.zero_()
        assert not near(twin(draw(2, 3)), z, 1e-3)  # its own weights
        assert near(twin(draw(2, 3)), torch.tanh(draw(2, 3) @ layer.module.lift + layer.module.bias), 1e-7)
    with torch.no_grad():
        plain = layer(draw(2, 3))
    assert not plain.requires_grad and near(plain, z, 1e-7)


def test_a_layer_that_does_not_converge_says_so() -> None:
    layer = FixedPointLayer(Linear(torch.tensor([[-3.0]])), solver=partial(FixedPointIteration, max_iter=3))
    with pytest.warns(ig.ConvergenceWarning):
        layer(torch.ones(1, 1).requires_grad_())
    assert layer.info is not None and not layer.info.converged and layer.info.residual_norm > 1
    with pytest.raises(FloatingPointError):
        FixedPointLayer(Linear(torch.tensor([[-3.0]])), solver=partial(FixedPointIteration, max_iter=2000))(
            torch.ones(1, 1)
        )


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FixedPointLayer(torch.tanh), TypeError, "nn.Module"),  # pyright: ignore
        (lambda: FixedPointLayer(Cell(2, 0.5), solver=lambda step, linear_solver: step), TypeError, "InnerSolver"),
        (lambda: FixedPointLayer(Cell(2, 0.5))(), ValueError, "initial"),
        (
            lambda: FixedPointLayer(Cell(2, 0.5)).spectral_radius(draw(1, 2), draw(1, 2), num_iter=1),
            ValueError,
            "num_iter",
        ),
        (
            lambda: FixedPointLayer(Cell(2, 0.5)).jacobian_penalty(draw(1, 2), draw(1, 2), num_samples=0),
            ValueError,
            "samples",
        ),
    ],
)
def test_wrong_arguments_raise(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
