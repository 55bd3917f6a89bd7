"""Fisher information matrices of a model: sums of squares of gradients on single examples.

Both are `Jᵀ M J` with the Jacobian J of the outputs in y, like the Gauss-Newton matrix, and with `M = Σ c cᵀ` made of
the derivatives c of single losses in the outputs instead of a Hessian: no gradient of a single example is ever formed.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from implicitgrad.curvature.examples import check_tensor, num_examples, single_gradients
from implicitgrad.curvature.gauss_newton import sandwich
from implicitgrad.curvature.jacobian import values_and_jacobian
from implicitgrad.curvature.point import Point
from implicitgrad.linalg import LinearOperator
from implicitgrad.tree import Tree

Likelihood = Literal["categorical", "gaussian", "bernoulli"]


def empirical_fisher(
    model: Callable[[Tree, Any], Tensor],
    loss: Callable[[Tensor, Any], Tensor],
    y: Tree,
    inputs: Any,
    targets: Any,
    *,
    check: bool = True,
) -> LinearOperator:
    """The empirical Fisher matrix `F = (1/N) Σᵢ gᵢ gᵢᵀ` as a symmetric operator.

    `gᵢ = ∇_y loss(model(y, inputs), targets)` with the loss of example i alone: the matrix is a mean over the N
    examples whether the loss is a mean or a sum of its values on them. It is no approximation of the Hessian, not even
    at a minimum, unless the labels follow the model.

    Args:
        model: `model(y, inputs) -> outputs (N, ...)`, each output from its own example. Where a layer couples the
            examples (batch normalisation in training mode), gᵢ is the derivative of the loss of example i in the batch.
        loss: `loss(outputs, targets) -> scalar`, the mean or the sum of its values on single examples.
        y: Tree of tensors with n numbers, in the order of `tree.ravel`.
        inputs: Handed to the model.
        targets: Tensor, or tree of tensors, with first dimension N.
        check: Test the products with J as `check_operator` does, for about three products with F.

    Returns:
        `F`, `(n, n)`, positive semidefinite. A product costs 0.9 to 2 gradients.

    Raises:
        TypeError: y or the outputs are no floating point tensors of one dtype.
        ValueError: first dimensions differ; the loss is neither mean nor sum of its values on single examples (class
            weights, an ignored index); the outputs do not depend on y.

    Source: Kunstner, Balles, Hennig (2019), "Limitations of the empirical Fisher approximation for natural gradient
    descent", equation 3 over N.

    Example:
        >>> half = lambda outputs, targets: (outputs - targets).square().sum() / 2
        >>> X, t = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 1.0])  # gradients -1 and -2
        >>> empirical_fisher(lambda y, X: X @ y, half, torch.zeros(1), X, t).to_dense()
        tensor([[2.5000]])
    """
    point = Point("empirical_fisher", y, model, inputs)
    outputs, J = values_and_jacobian(point, model, inputs, check=check)
    with point.isolation():
        return _sum_of_squares(J, empirical_cotangents(point.name, loss, outputs, targets))


def sampled_fisher(
    model: Callable[[Tree, Any], Tensor],
    likelihood: Likelihood,
    y: Tree,
    inputs: Any,
    *,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> LinearOperator:
    """The Fisher matrix by labels drawn from the model: `F = (1/NS) Σᵢₛ gᵢₛ gᵢₛᵀ` over N examples and S labels each.

    `gᵢₛ` is the gradient of the negative log-likelihood of label s on example i. The expectation is the Fisher matrix,
    which is the Gauss-Newton matrix of the mean negative log-likelihood over examples:

    | likelihood | outputs | loss with that Gauss-Newton matrix |
    |---|---|---|
    | `"categorical"` | logits `(N, C)`, or `(N, C, ...)` | `F.cross_entropy`, summed over positions `...` |
    | `"gaussian"` | means `(N, ...)`, unit variance | half the squared error, summed over outputs |
    | `"bernoulli"` | logits `(N, ...)` | `F.binary_cross_entropy_with_logits`, summed over outputs |

    Args:
        model: `model(y, inputs) -> outputs (N, ...)`, each output from its own example.
        likelihood: Distribution of the labels given the outputs.
        y: Tree of tensors with n numbers, in the order of `tree.ravel`.
        inputs: Handed to the model.
        num_samples: S.
        generator: Draws the labels; by default a fresh one with seed 0, so that equal calls give equal matrices.
        check: Test the products with J as `check_operator` does, for about three products with F.

    Returns:
        `F`, `(n, n)`, positive semidefinite. A product costs 0.9 to 2 gradients, whatever S.

    Raises:
        TypeError: y or the outputs are no floating point tensors of one dtype.
        ValueError: an unknown likelihood, outputs of a shape that it does not have, `num_samples` below one.

    Source: Martens (2020), "New insights and perspectives on the natural gradient method", section 5.

    Example:
        >>> X = torch.tensor([[1.0], [2.0]])
        >>> F_ = sampled_fisher(lambda y, X: X * y, "gaussian", torch.zeros(1), X, num_samples=10_000)
        >>> abs(F_.to_dense().item() - 2.5) < 0.1  # (1² + 2²) / 2
        True
    """
    outputs, J = values_and_jacobian(Point("sampled_fisher", y, model, inputs), model, inputs, check=check)
    return _sum_of_squares(J, sampled_cotangents("sampled_fisher", likelihood, outputs, num_samples, generator))


def _sum_of_squares(J: LinearOperator, cotangents: Tensor) -> LinearOperator:
    """`Jᵀ M J` with `M = Σᵢₖ cᵢₖ cᵢₖᵀ`, block diagonal over the examples i; cotangents `(N, k, *outputs)`."""
    factors = cotangents.reshape(*cotangents.shape[:2], -1)

    def product(v: Tensor) -> Tensor:
        by_example = v.unflatten(-1, (factors.shape[0], 1, factors.shape[2]))
        return ((by_example @ factors.mT) @ factors).reshape(v.shape)

    M = LinearOperator(
        product,
        J.num_rows,
        matmat=product,
        symmetric=True,
        eigenvalue_floor=0.0,
        dtype=J.dtype,
        device=J.device,
    )
    return sandwich(J, M)


def empirical_cotangents(name: str, loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Any) -> Tensor:
    """Derivatives of the losses of single examples in their outputs, over √N; `(N, 1, *outputs)`.

    Raises:
        TypeError: the outputs are no tensor.
        ValueError: these are not the examples' shares in the derivative of the whole loss.
        FloatingPointError: NaN or infinity in the latter.
    """
    check_tensor(name, outputs)
    single, kinds = single_gradients(name, loss, outputs, targets)
    if not kinds:
        raise ValueError(
            f"{name}: loss(outputs, targets) is neither the mean nor the sum of its values on single examples; use one "
            "without class weights, ignored labels, and terms across examples"
        )
    return single.unsqueeze(1) / math.sqrt(len(outputs))


def sampled_cotangents(
    name: str, likelihood: Likelihood, outputs: Tensor, num_samples: int, generator: torch.Generator | None
) -> Tensor:
    """Derivatives of negative log-likelihoods of drawn labels, over √(N S); `(N, S, *outputs)`.

    Raises:
        ValueError: an unknown likelihood, outputs of a shape that it does not have, `num_samples` below one.
    """
    if likelihood not in _SCORES:
        raise ValueError(f"{name}: likelihood must be one of {sorted(_SCORES)}, got {likelihood!r}")
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"{name}: num_samples must be an integer of at least 1, got {num_samples!r}")
    count = num_examples(name, outputs)
    check_tensor(name, outputs)
    if likelihood == "categorical" and outputs.dim() < 2:
        raise ValueError(f"{name}: categorical outputs are logits (N, C, ...), got shape {tuple(outputs.shape)}")
    generator = torch.Generator(outputs.device).manual_seed(0) if generator is None else generator
    return _SCORES[likelihood](outputs, num_samples, generator) / math.sqrt(count * num_samples)


def _categorical_scores(logits: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """softmax - onehot(label)."""
    probabilities = logits.softmax(1).movedim(1, -1)  # (N, ..., C)
    flat = probabilities.reshape(-1, probabilities.shape[-1]).to(generator.device)
    labels = torch.multinomial(flat, num_samples, replacement=True, generator=generator).to(logits.device)
    hits = F.one_hot(labels, flat.shape[-1]).unflatten(0, probabilities.shape[:-1])  # (N, ..., S, C)
    return (probabilities.unsqueeze(-2) - hits).movedim((-2, -1), (1, 2))


def _gaussian_scores(means: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """mean - label."""
    shape = (len(means), num_samples, *means.shape[1:])
    return torch.randn(shape, generator=generator, device=generator.device, dtype=means.dtype).to(means.device)


def _bernoulli_scores(logits: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """sigmoid - label."""
    shape = (len(logits), num_samples, *logits.shape[1:])
    draws = torch.rand(shape, generator=generator, device=generator.device, dtype=logits.dtype).to(logits.device)
    probabilities = logits.sigmoid().unsqueeze(1)
    return probabilities - (draws < probabilities).to(logits.dtype)


_SCORES: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "categorical": _categorical_scores,
    "gaussian": _gaussian_scores,
    "bernoulli": _bernoulli_scores,
}
