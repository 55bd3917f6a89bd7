"""Ridge regression with one penalty per feature, whose hypergradient is known in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ridge:
    """Training loss `(|X y - t|² + Σ exp(x_j) y_j²) / 2` and validation loss `mean((V y - s)²) / 2`, in float64.

    Attributes:
        features: X, `(n, d)`.
        targets: t, `(n,)`.
        validation_features: V, `(n, d)`.
        validation_targets: s, `(n,)`.
    """

    features: Tensor
    targets: Tensor
    validation_features: Tensor
    validation_targets: Tensor

    @classmethod
    def random(cls, n: int, d: int, spread: float = 1.0, seed: int = 0) -> "Ridge":
        """Gaussian features with standard deviations from 1 to `1 / spread`; targets of a linear model plus noise."""
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        scale = torch.logspace(0, -1, d, base=spread, dtype=torch.float64)
        features, validation_features, weights = normal(n, d) * scale, normal(n, d) * scale, normal(d)
        targets, validation_targets = features @ weights + normal(n), validation_features @ weights + normal(n)
        return cls(features, targets, validation_features, validation_targets)

    def penalties(self, seed: int = 1) -> Tensor:
        """A random `x: (d,)` of unit variance, requiring a gradient."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.features.shape[1], generator=generator, dtype=torch.float64).requires_grad_()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The training loss, minimised by `solution(x)`."""
        return ((self.features @ y - self.targets).square().sum() + (x.exp() * y.square()).sum()) / 2

    def upper(self, x: Tensor, y: Tensor) -> Tensor:
        """The validation loss."""
        return (self.validation_features @ y - self.validation_targets).square().mean() / 2

    def hessian(self, x: Tensor) -> Tensor:
        """The second derivative of the training loss in y, `XᵀX + diag(exp(x))`."""
        return self.features.T @ self.features + torch.diag(x.exp())

    def solution(self, x: Tensor) -> Tensor:
        """The minimiser in closed form; autograd differentiates it through `torch.linalg.solve`."""
        return torch.linalg.solve(self.hessian(x), self.features.T @ self.targets)
