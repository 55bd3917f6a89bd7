"""Entropic optimal transport as a differentiable layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.below import computed
from implicitgrad.conditions import Stationary
from implicitgrad.implicit import implicit_root
from implicitgrad.linalg import CG, LinearSolver
from implicitgrad.linalg.checks import check_count
from implicitgrad.projections import checks
from implicitgrad.projections.scaling import Scaling, scale
from implicitgrad.projections.transport import checked_marginals
from implicitgrad.solvers import SolverInfo


class Coupling(NamedTuple):
    """An entropic transport plan and what explains it: `plan = exp((f + g - cost) / epsilon)`.

    Attributes:
        plan: `(*batch, n, m)`, of row sums a and column sums b.
        f: Row potentials `(*batch, n)`, in units of the cost.
        g: Column potentials `(*batch, m)`, of mean zero.
    """

    plan: Tensor
    f: Tensor
    g: Tensor


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float | Tensor,
    tol: float | None = None,
    max_iter: int = 10_000,
    newton: bool = False,
    linear_solver: LinearSolver | None = None,
) -> tuple[Coupling, SolverInfo]:
    """Optimal transport with entropic regularisation: `argmin <P, cost> + epsilon Σ P log P` over plans P.

    Solved in the log domain by Sinkhorn's iteration, or by Newton steps with a sparse Hessian, which take a fraction of
    the iterations when epsilon is small. Derivatives come from the implicit function theorem: the column potentials are
    a stationary point of the dual with rows eliminated, their mean held at zero; the rest is closed formulas. They are
    as exact as the marginals, and need memory for a few matrices, however many iterations there were. Costs n m per
    iteration; a derivative costs one linear system of size m.

    Marginals can only change together: a gradient in a and b means something along changes that keep both sums equal.

    Args:
        cost: `(*batch, n, m)`.
        a: Row sums `(*batch, n)`, positive; 1/n each by default. Shapes may broadcast over the batch.
        b: Column sums `(*batch, m)`, positive, of the same total; 1/m each by default.
        epsilon: Strength of the regularisation, positive, in units of the cost. Differentiable.
        tol: Largest |P1 - a|₁ + |Pᵀ1 - b|₁ relative to the total mass; None for 1e-10 in float64, 1e-5 below.
        max_iter: Sweeps over the matrix.
        newton: Whether to take Newton steps.
        linear_solver: For derivatives; `CG()` if None.

    Returns:
        The coupling, and what happened: `num_iter` counts sweeps and Newton steps, `num_evaluations` passes over the
        matrix that cost as much as a sweep, `residual_norm` is the error of the marginals at the end. A run that ends
        early is not converged there.

    Raises:
        ValueError: shapes that do not fit, marginals or epsilon not positive, sums that differ.
        TypeError: cost is no floating point tensor.
        FloatingPointError: NaN or infinity in an argument; leave forbidden pairs a large cost, not an infinite one.

    Source: Cuturi (2013); Luise, Rudi, Pontil, Ciliberto (2018), "Differential properties of Sinkhorn approximation",
    for the derivative; algorithms as in `implicitgrad.projections.scaling`.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> coupling, info = sinkhorn(cost, epsilon=0.5)
        >>> coupling.plan, info.converged
        (tensor([[0.4404, 0.0596],
                [0.0596, 0.4404]], dtype=torch.float64), True)
    """
    check_count("sinkhorn", "max_iter", max_iter)
    if not isinstance(cost, Tensor) or not cost.is_floating_point():
        raise TypeError(f"sinkhorn needs a floating point tensor as cost, got {type(cost).__name__}; convert it")
    epsilon = checks.number("sinkhorn", "epsilon", epsilon, cost)
    positive = checks.Claim(epsilon > 0, lambda: f"sinkhorn needs epsilon > 0, got {epsilon.item()}")
    cost, a, b = checked_marginals("sinkhorn", cost, a, b, {"epsilon": epsilon}, [positive], total=1.0)
    if tol is None:
        tol = 1e-10 if cost.dtype == torch.float64 else 1e-5
    runs: list[Scaling] = []

    def solve(scores: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
        runs.append(scale(scores, a, b, tol=tol, max_iter=max_iter, newton=newton))
        return (runs[-1].g,)

    scores = -cost / epsilon
    (g,) = computed(solve, scores, a, b)
    g = _attached(scores, a, b, g, linear_solver)
    f = a.log() - (scores + g.unsqueeze(-2)).logsumexp(-1)
    plan = (scores + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()
    return Coupling(plan, epsilon * f, epsilon * g), _info(runs[-1], tol)


def _attached(scores: Tensor, a: Tensor, b: Tensor, g: Tensor, linear_solver: LinearSolver | None) -> Tensor:
    """The column potentials with their derivative; independent systems for a batch."""

    def one(scores: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return implicit_root(Stationary(_dual), (scores, a, b), g, solver=linear_solver or CG())

    if scores.dim() == 2:
        return one(scores, a, b, g)
    flat = [tensor.flatten(0, scores.dim() - 3) for tensor in (scores, a, b, g)]
    return torch.func.vmap(one)(*flat).reshape(g.shape)


def _dual(x: tuple[Tensor, Tensor, Tensor], g: Tensor) -> Tensor:
    """Minus the dual with rows eliminated, convex in g; and a term that holds the mean of g at zero."""
    scores, a, b = x
    rows = (a * (scores + g.unsqueeze(-2)).logsumexp(-1)).sum()
    return rows - (b * g).sum() + b.detach().sum() * g.mean().square() / 2


def _info(run: Scaling, tol: float) -> SolverInfo:
    converged = run.error <= tol
    return SolverInfo(
        num_iter=run.num_sweeps + run.num_newton,
        residual_norm=run.error,
        converged=converged,
        reason="converged" if converged else "max_iter reached",
        num_evaluations=run.num_sweeps + run.num_evaluations,
    )
