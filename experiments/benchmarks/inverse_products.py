"""Inverse-Hessian products beside curvlinops, pyDVL and SciPy, all stopped at one true residual.

Two systems in float32 with damping 1e-4 and one right-hand side, the gradient on held-out data: the Hessian of a
logistic regression (10 000 examples, 1000 features), and the Gauss-Newton matrix of an MLP 784-256-10 with cross
entropy (batch of 512, 203 530 weights). Every method gets the module, the loss and the data; its operator is made anew
in each run and counts, with the checks that each library does by default. Residuals are `|b - A x| / |b|` with products
in float64; where the residual in a method's own recurrence is too small, its tolerance is tightened until the true one
is met. Rounds run every method once, in rotating order.

The peers live in an environment of their own (rows of one that is missing say so):

    python -m venv peers
    peers/bin/pip install torch==2.13.0 scipy scikit-learn curvlinops-for-pytorch==3.0.1 pyDVL==0.10.0

Run: peers/bin/python -m experiments.benchmarks.inverse_products
"""

import argparse
import functools
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import implicitgrad as ig
from experiments.benchmarks import inverse_products_peers as peers
from experiments.benchmarks.inverse_products_peers import Loss, Solve
from implicitgrad.curvature import gauss_newton, hessian
from implicitgrad.linalg import CG, Auto, LinearOperator, LinearSolver

scipy: Any
try:
    import scipy.sparse.linalg
except ImportError:
    scipy = None

REFERENCE = "implicitgrad, default"


@dataclass(frozen=True)
class System:
    """`(C + damping I) x = b` with the curvature C of `loss(net(inputs), targets)`."""

    name: str
    curvature: Literal["hessian", "gauss_newton"]
    net: nn.Module
    loss: Loss
    inputs: Tensor
    targets: Tensor
    damping: float
    b: Tensor

    def operator(self, dtype: torch.dtype | None = None) -> LinearOperator:
        """The matrix as implicitgrad makes it; products in another dtype if one is given."""
        net = ig.functional(self.net)
        cast = lambda tensor: tensor.to(dtype or self.b.dtype) if tensor.is_floating_point() else tensor
        params = ig.tree.map(cast, net.parameters())
        inputs, targets = cast(self.inputs), cast(self.targets)
        if self.curvature == "hessian":
            objective = lambda params, inputs, targets: self.loss(net(params, inputs), targets)
            return hessian(objective, params, inputs, targets).damped(self.damping)
        return gauss_newton(net, self.loss, params, inputs, targets).damped(self.damping)

    def methods(self) -> dict[str, Solve | None]:
        """Every way to the solution, the operator's making included; None for what is not installed."""
        net, loss, data, rest = self.net, self.loss, (self.inputs, self.targets), (self.damping, self.b)
        rows: dict[str, Solve | None] = {
            REFERENCE: lambda rtol: self._own(Auto(rtol=rtol)),
            "implicitgrad, CG": lambda rtol: self._own(CG(rtol=rtol)),
            "SciPy CG on implicitgrad's product": self._scipy if scipy else None,
            "curvlinops, CG": peers.curvlinops_cg(self.curvature, net, loss, data, *rest) if peers.curvlinops else None,
        }
        if self.curvature == "hessian":  # what pyDVL calls Gauss-Newton is the empirical Fisher matrix
            for label, batches in {"data ready as one batch": [data], "DataLoader": peers.loader(data)}.items():
                rows[f"pyDVL, CG, {label}"] = peers.pydvl_cg(net, loss, batches, *rest) if peers.pydvl else None
        return rows

    def residual(self, x: Tensor) -> float:
        """`|b - A x| / |b|` in float64."""
        b = self.b.double()
        return (torch.linalg.vector_norm(b - self._exact @ x.double()) / torch.linalg.vector_norm(b)).item()

    @functools.cached_property
    def _exact(self) -> LinearOperator:
        return self.operator(torch.float64)

    def _own(self, solver: LinearSolver) -> tuple[Tensor, int]:
        solution = solver.solve(self.operator(), self.b)
        assert solution.converged, solution.reason
        return solution.value, solution.num_matvec

    def _scipy(self, rtol: float) -> tuple[Tensor, int]:
        A, calls = self.operator(), []

        def product(v: Any) -> Any:
            calls.append(None)
            return (A @ torch.from_numpy(v).to(self.b.device)).cpu().numpy()

        b = self.b.cpu().numpy()
        matrix = scipy.sparse.linalg.LinearOperator((A.size, A.size), matvec=product, dtype=b.dtype)
        x, info = scipy.sparse.linalg.cg(matrix, b, rtol=rtol)
        assert info == 0
        return torch.from_numpy(x).to(self.b.device), len(calls)


def logistic_regression(device: torch.device) -> System:
    """10 000 examples, 1000 features whose standard deviations fall from 1 to 0.03; labels of a linear model."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 1000, generator=generator)
    inputs = torch.randn(20_000, 1000, generator=generator) * torch.logspace(0, -1.5, 1000)
    targets = torch.bernoulli(torch.sigmoid(inputs @ weights[0]), generator=generator)
    net = nn.Sequential(nn.Linear(1000, 1, bias=False), nn.Flatten(0))
    net.load_state_dict({"0.weight": 0.1 * weights})
    loss = nn.BCEWithLogitsLoss()
    return _halved("logistic regression", "hessian", net, loss, inputs, targets, 1e-4, device)


def perceptron(device: torch.device) -> System:
    """784-256-10 with tanh at random weights, batch of 512 random images and labels."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(1024, 784, generator=generator), torch.randint(10, (1024,), generator=generator)
    net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
    for weights in net.parameters():
        nn.init.normal_(weights, std=0.05, generator=generator)
    return _halved("MLP, Gauss-Newton", "gauss_newton", net, nn.CrossEntropyLoss(), inputs, targets, 1e-4, device)


def _halved(
    name: str,
    curvature: Literal["hessian", "gauss_newton"],
    net: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    damping: float,
    device: torch.device,
) -> System:
    """Curvature on the first half of the data, the gradient of the loss on the second half as right-hand side."""
    net, inputs, targets = net.to(device), inputs.to(device), targets.to(device)
    half = len(inputs) // 2
    slopes = torch.autograd.grad(loss(net(inputs[half:]), targets[half:]), list(net.parameters()))
    b = torch.cat([slope.reshape(-1) for slope in slopes])
    return System(name, curvature, net, loss, inputs[:half], targets[:half], damping, b)


class Result(NamedTuple):
    """What one method needs to reach a true residual."""

    asked: float  # the tolerance that it was given
    residual: float
    products: int


def tune(system: System, method: Solve, rtol: float) -> Result:
    """The largest of the tolerances `rtol, 0.9 rtol, 0.81 rtol, ...` at which the true residual is at most `rtol`."""
    asked = rtol
    while True:
        x, products = method(asked)
        residual = system.residual(x)
        if residual <= rtol:
            return Result(asked, residual, products)
        asked *= 0.9


def measure(methods: dict[str, Callable[[], tuple[Tensor, int]]], rounds: int) -> tuple[dict[str, float], float]:
    """Fewest seconds of each method, and the CPU time of all over their wall time."""
    names, seconds = list(methods), dict.fromkeys(methods, float("inf"))
    cpu, wall = time.process_time(), time.perf_counter()
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            methods[name]()[0].sum().item()  # waits for the device
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds, (time.process_time() - cpu) / (time.perf_counter() - wall)


def print_table(system: System, rtol: float, rounds: int) -> None:
    methods = system.methods()
    installed = {name: method for name, method in methods.items() if method}
    results = {name: tune(system, method, rtol) for name, method in installed.items()}  # also warms up
    runs = {name: functools.partial(method, results[name].asked) for name, method in installed.items()}
    seconds, busy = measure(runs, rounds)
    print(f"\n{system.name}, n = {len(system.b)}, damping {system.damping:.0e}; CPU over wall time {busy:.2f}")
    print(f"{'method':40} {'seconds':>9} {'ratio':>6} {'products':>8} {'true residual':>13} {'asked for':>9}")
    for name in methods:
        if name not in results:
            print(f"{name:40} not installed")
            continue
        asked, residual, products = results[name]
        ratio = seconds[name] / seconds[REFERENCE]
        print(f"{name:40} {seconds[name]:9.3f} {ratio:6.2f} {products:8d} {residual:13.1e} {asked:9.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rtol", type=float, default=1e-4, help="on the true residual, relative")
    parser.add_argument("--rounds", type=int, default=5, help="runs of every method")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    installed = {"curvlinops-for-pytorch": peers.curvlinops, "pyDVL": peers.pydvl, "scipy": scipy}
    versions = [f"{name} {importlib.metadata.version(name)}" for name, module in installed.items() if module]
    print(f"torch {torch.__version__}, {', '.join(versions)}; {options.threads} threads, {options.device}")
    print("seconds: fewest of all rounds; ratio: to the first row")
    for problem in (logistic_regression, perceptron):
        print_table(problem(options.device), options.rtol, options.rounds)


if __name__ == "__main__":
    main()
