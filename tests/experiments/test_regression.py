"""The inner problem: exact Hessian, converged fits, hypergradients equal to finite differences of re-solved fits."""

import hydra
import pytest
import torch
from torch import Tensor

from experiments.dataset import Dataset
from experiments.regression import Fit, implicit_fit, loss, training_hessian, training_loss
from tests.experiments.small_job import CONF, compose

DATASETS = ["breast_cancer", "digits"]
SOLVERS = sorted(path.stem for path in (CONF / "solver").glob("*.yaml"))


def _dataset_and_fit(name: str, solver: str = "auto") -> tuple[Dataset, Fit]:
    comparison = hydra.utils.instantiate(compose(f"dataset={name}", f"solver={solver}").comparison)
    return comparison.dataset, implicit_fit(comparison.solver, comparison.dataset.num_classes)


def _log_penalties(dataset: Dataset) -> Tensor:
    x = 0.5 * torch.randn(1 + dataset.num_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] = -4.0
    return x.requires_grad_()


def _hypergradient(fit: Fit, dataset: Dataset, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss(fit(x, *dataset.train), dataset.validation), x)[0]


@pytest.mark.parametrize("num_classes", [2, 4])
def test_hessian_equals_autograd(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 5, dtype=torch.float64, generator=generator)
    t = torch.randint(num_classes, (20,), generator=generator)
    x = torch.randn(6, dtype=torch.float64, generator=generator)
    y = torch.randn(6, num_classes - 1, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.functional.hessian(lambda y: training_loss(x, y, X, t), y)
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(training_hessian(x, y, X), wanted.reshape(y.numel(), -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DATASETS)
def test_fit_converges(name: str) -> None:
    dataset, fit = _dataset_and_fit(name)
    x = _log_penalties(dataset).detach()
    y = fit(x, *dataset.train).requires_grad_()
    assert torch.autograd.grad(training_loss(x, y, *dataset.train), y)[0].norm() <= 1e-10


@pytest.mark.parametrize("name", DATASETS)
def test_hypergradient_equals_finite_differences_of_resolved_fits(name: str) -> None:
    dataset, fit = _dataset_and_fit(name)
    x = _log_penalties(dataset)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()

    def resolved(step: float) -> Tensor:
        return loss(fit(x.detach() + step * direction, *dataset.train), dataset.validation)

    # fits are good to 1e-10, so a step of 1e-3 with a fourth-order stencil leaves an error near 1e-9
    h = 1e-3
    wanted = (8 * (resolved(h) - resolved(-h)) - (resolved(2 * h) - resolved(-2 * h))) / (12 * h)
    torch.testing.assert_close(_hypergradient(fit, dataset, x) @ direction, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_configured_solver_gives_the_same_hypergradient(solver: str) -> None:
    dataset, wanted_fit = _dataset_and_fit("breast_cancer", "cholesky")
    _, fit = _dataset_and_fit("breast_cancer", solver)
    x = _log_penalties(dataset)
    # iterative solvers stop at a relative residual; the Hessian's condition number magnifies what is left
    torch.testing.assert_close(
        _hypergradient(fit, dataset, x), _hypergradient(wanted_fit, dataset, x), rtol=0, atol=1e-6
    )
