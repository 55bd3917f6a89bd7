"""Logistic regression with one L2 penalty per feature, differentiable in those penalties.

Upper variable `x: (1 + d,)`, log-penalties: the entry every feature shares, then one entry per feature.
Lower variable `y: (d + 1, C - 1)`, weights row by row, intercepts last; the last of the `C` classes is pinned at zero,
since adding a constant to all scores changes no probability and would leave the Hessian singular.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import implicitgrad as ig
from experiments.dataset import Part
from experiments.newton import newton

Fit = Callable[[Tensor, Tensor, Tensor], Tensor]


def implicit_fit(solver: ig.linalg.LinearSolver, num_classes: int) -> Fit:
    """A function `fit(x, X, t) -> y` that trains to convergence and whose gradient in `x` is the implicit one.

    It starts from zero each time, so a fit depends on its arguments alone: any order of fits, and any interruption,
    gives the same numbers.

    Args:
        solver: solves the adjoint system of `backward`.
        num_classes: `C`, two or more.
    """

    @ig.implicit(ig.Stationary(training_loss), solver=solver)
    def fit(x: Tensor, X: Tensor, t: Tensor) -> Tensor:
        start = X.new_zeros(X.shape[1] + 1, num_classes - 1)
        return newton(lambda y: training_loss(x, y, X, t), lambda y: training_hessian(x, y, X), start)

    return fit


def training_loss(x: Tensor, y: Tensor, X: Tensor, t: Tensor) -> Tensor:
    """Mean cross entropy plus `0.5 * sum_j exp(x[0] + x[1 + j]) * |y[j]|^2`; the intercepts go unpenalised."""
    return F.cross_entropy(scores(y, X), t) + 0.5 * (penalties(x)[:, None] * y[:-1] ** 2).sum()


def training_hessian(x: Tensor, y: Tensor, X: Tensor) -> Tensor:
    """Second derivative of `training_loss` in `y` flattened: `(m, m)` with `m = (d + 1) (C - 1)`.

    With `z_n` the row, a one appended, and `p_n` its probabilities, the data term is the mean over `n` of
    `z_n z_n^T` times `diag(p_n) - p_n p_n^T`; the second half of it is one matrix product of `z_n` times `p_n`.
    """
    p = scores(y, X).softmax(1)[:, :-1]
    rows = torch.cat([X, X.new_ones(len(X), 1)], 1)
    weighted = rows[:, :, None] * p[:, None, :]
    flat = weighted.flatten(1)
    hessian = -(flat.T @ flat)
    within_class = hessian.view(*y.shape, *y.shape).diagonal(dim1=1, dim2=3)
    within_class += torch.einsum("ni,njc->ijc", rows, weighted)
    penalty = torch.cat([penalties(x), x.new_zeros(1)]).repeat_interleave(y.shape[1])
    return hessian / len(X) + penalty.diag()


def scores(y: Tensor, X: Tensor) -> Tensor:
    """Unnormalised log-probabilities `(n, C)`, zero for the last class."""
    return F.pad(X @ y[:-1] + y[-1], (0, 1))


def penalties(x: Tensor) -> Tensor:
    """The L2 penalty of each feature, `exp(x[0] + x[1:])`: `(d,)`."""
    return (x[0] + x[1:]).exp()


def loss(y: Tensor, part: Part) -> Tensor:
    """Mean cross entropy on one part of the data, in nats."""
    return F.cross_entropy(scores(y, part.X), part.t)


def accuracy(y: Tensor, part: Part) -> float:
    """Share of rows whose likeliest class is the label, no unit."""
    return (scores(y, part.X).argmax(1) == part.t).double().mean().item()
