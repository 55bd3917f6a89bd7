"""The layer of quadratic programs: its map, its gradients, and that it learns."""

from collections.abc import Iterator

import pytest
import torch

from implicitgrad.layers import OptNetLayer
from implicitgrad.solvers import QPInteriorPoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(**options) -> OptNetLayer:
    return OptNetLayer(5, num_equalities=2, num_inequalities=7, **options).double()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_output_solves_the_program_of_its_matrices():
    cvxpy = pytest.importorskip("cvxpy")
    net, c = layer(), draw(3, 5)
    out = net(c).detach()
    parts = {name: part.detach().numpy() for name, part in net.matrices().items()}
    for row, got in zip(c, out, strict=True):
        z = cvxpy.Variable(5)
        loss = cvxpy.quad_form(z, parts["Q"]) / 2 + row.numpy() @ z
        problem = cvxpy.Problem(cvxpy.Minimize(loss), [parts["A"] @ z == parts["b"], parts["G"] @ z <= parts["h"]])
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12)
        torch.testing.assert_close(got, torch.as_tensor(z.value), rtol=0, atol=1e-7)
    assert net.info is not None and net.info.converged


def test_gradcheck_in_the_input_and_all_parameters():
    net = OptNetLayer(3, num_equalities=1, num_inequalities=3).double()
    names = [name for name, _ in net.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in net.parameters()]

    def run(c: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (c,))

    c = (3 * draw(2, 3)).requires_grad_()
    assert ((net.matrices()["h"] - net(c) @ net.G.mT) < 1e-9).any()  # an inequality is active
    assert torch.autograd.gradcheck(run, (c, *values))


@pytest.mark.parametrize(("num_equalities", "num_inequalities"), [(0, 0), (0, 3), (2, 0)])
def test_kinds_of_constraints_may_be_absent(num_equalities: int, num_inequalities: int):
    net = OptNetLayer(4, num_equalities, num_inequalities).double()
    net(draw(3, 4)).square().sum().backward()
    assert net.lower.grad is not None and net.lower.grad.isfinite().all()


def test_a_layer_learns_the_program_of_another_one():
    teacher, student = layer(generator=torch.Generator().manual_seed(5)), layer()
    c = 3 * draw(20, 5)
    target = teacher(c).detach()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (student(c) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_leading_dimensions_and_one_vector():
    net, c = layer(), draw(2, 3, 5)
    out = net(c)
    assert out.shape == (2, 3, 5)
    torch.testing.assert_close(net(c[1, 2]), out[1, 2], rtol=0, atol=1e-12)


def test_state_comes_from_the_generator_and_nothing_else():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = layer(), layer()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert "num_inequalities=7" in repr(first)


def test_wrong_arguments_raise():
    for make, words in (
        (lambda: OptNetLayer(3, 3), "0 <= p < n"),
        (lambda: OptNetLayer(3, ridge=0.0), "ridge"),
        (lambda: layer(solver=QPInteriorPoint())(draw(2, 4)), "shape"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
