"""Projections onto transport polytopes: non-negative matrices with given row and column sums."""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from implicitgrad.below import computed
from implicitgrad.linalg.rows import any_row
from implicitgrad.projections import checks
from implicitgrad.projections.matrix_sets import check_matrix
from implicitgrad.projections.scaling import scale

MAX_ITER = 500  # Newton steps; random problems of a hundred rows take about ten


def transport(y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The nearest matrix of the transport polytope `{Z : Z >= 0, Z1 = a, Zᵀ1 = b}`.

    `Z = max(y + f 1ᵀ + 1 gᵀ, 0)`: for given g the rows are projections onto simplices, which gives f by a sort; g
    maximises a concave, piecewise quadratic function, by Newton steps with a line search. With the support at hand, Z
    is an affine function of y, a and b, which is evaluated once more: so Z is exact to rounding and torch
    differentiates it, in the marginals along changes that keep both sums equal. Costs `O(n m (m + log m) + m³)` per
    step, some ten steps; sets with more columns than rows are transposed.

    Args:
        y: `(*batch, n, m)`.
        a: Row sums `(*batch, n)`, not negative; 1/n each by default. Shapes may broadcast over the batch.
        b: Column sums `(*batch, m)`, not negative, of the same total; 1/m each by default.

    Raises:
        ValueError: shapes that do not fit, negative marginals, sums that differ.
        TypeError: y is no floating point tensor.
        FloatingPointError: NaN or infinity. Inside `torch.func` transforms, where values cannot be read, a wrong value
            gives NaN.

    Warns:
        RuntimeWarning: the support was not found, and the marginals are wrong by more than rounding.

    Source: Blondel, Seguy, Rolet (2018), "Smooth and sparse optimal transport", for the semi-dual; Li, Sun, Toh (2020),
    "On the efficient computation of a generalized Jacobian of the projector over the Birkhoff polytope", for Newton.

    Example:
        >>> transport(torch.tensor([[1.0, 0.0], [0.5, 0.0]], dtype=torch.float64))
        tensor([[0.3750, 0.1250],
                [0.1250, 0.3750]], dtype=torch.float64)
    """
    y, a, b = checked_marginals("transport", y, a, b, {}, [], total=1.0, zeros=True)
    return _nearest(y, a, b)


def birkhoff(y: Tensor) -> Tensor:
    """The nearest doubly stochastic matrix: `transport` with all row and column sums one.

    Args:
        y: `(*batch, n, n)`.

    Raises:
        ValueError, TypeError, FloatingPointError: as `transport`; y is not square.

    Example:
        >>> birkhoff(torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    check_matrix("birkhoff", y, square=True)
    y, a, b = checked_marginals("birkhoff", y, None, None, {}, [], total=float(y.shape[-1]))
    return _nearest(y, a, b)


def entropic_transport(
    y: Tensor, a: Tensor | None = None, b: Tensor | None = None, epsilon: float | Tensor = 1.0
) -> Tensor:
    """The matrix of the transport polytope that maximises `<Z, y> - epsilon Σ Z log Z`.

    The projection of `exp(y / epsilon)` in Kullback-Leibler divergence: `Z = exp((y + f 1ᵀ + 1 gᵀ) / epsilon)`. Found
    by Newton steps with a sparse Hessian; two more, with the whole Hessian, torch differentiates, which gives exact
    derivatives up to third order. Costs O(n m) per iteration, and three inverses of size m. For more than some
    thousand columns, or to know how it went, use `implicitgrad.layers.sinkhorn`.

    Args:
        y: `(*batch, n, m)`.
        a: Row sums `(*batch, n)`, positive; 1/n each by default. Shapes may broadcast over the batch.
        b: Column sums `(*batch, m)`, positive, of the same total; 1/m each by default.
        epsilon: Strength of the entropy, positive, in units of y. Differentiable.

    Raises:
        ValueError: shapes that do not fit, marginals or epsilon not positive, sums that differ.
        TypeError, FloatingPointError: as `transport`.

    Warns:
        RuntimeWarning: the marginals are wrong by more than the square root of rounding.

    Source: Cuturi (2013); algorithms as in `implicitgrad.projections.scaling`.

    Example:
        >>> entropic_transport(torch.tensor([[1.0, 0.0], [0.5, 0.0]], dtype=torch.float64))
        tensor([[0.2811, 0.2189],
                [0.2189, 0.2811]], dtype=torch.float64)
    """
    return _entropic("entropic_transport", y, a, b, epsilon, total=1.0)


def entropic_birkhoff(y: Tensor, epsilon: float | Tensor = 1.0) -> Tensor:
    """The doubly stochastic matrix that maximises `<Z, y> - epsilon Σ Z log Z`; see `entropic_transport`.

    Args:
        y: `(*batch, n, n)`.
        epsilon: Strength of the entropy, positive.

    Raises:
        ValueError, TypeError, FloatingPointError: as `entropic_transport`; y is not square.

    Example:
        >>> entropic_birkhoff(torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
        tensor([[0.8176, 0.1824],
                [0.1824, 0.8176]], dtype=torch.float64)
    """
    check_matrix("entropic_birkhoff", y, square=True)
    return _entropic("entropic_birkhoff", y, None, None, epsilon, total=float(y.shape[-1]))


def checked_marginals(
    name: str,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    parameters: Mapping[str, Tensor],
    claims: Sequence[checks.Claim],
    *,
    total: float,
    zeros: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y` and marginals of full shape, checked; `total` is the mass of marginals left out.

    Raises:
        TypeError, ValueError, FloatingPointError: see `transport`.
    """
    check_matrix(name, y, square=False)
    a = _marginal(name, "a", a, y[..., 0], total)
    b = _marginal(name, "b", b, y[..., 0, :], total)
    sums = a.sum(-1), b.sum(-1)
    rounding = torch.finfo(y.dtype).eps ** 0.5
    bound, least = ("not negative", (a >= 0).all() & (b >= 0).all())
    if not zeros:
        bound, least = "positive; leave out rows and columns without mass", (a > 0).all() & (b > 0).all()
    claims = [
        *claims,
        checks.Claim(least, lambda: f"{name} needs marginals that are {bound}; got {a.min()} in a, {b.min()} in b"),
        checks.Claim(
            ((sums[0] - sums[1]).abs() <= rounding * sums[0]).all(),
            lambda: f"{name} needs marginals of equal sums, got {sums[0].tolist()} and {sums[1].tolist()}; rescale one",
        ),
    ]
    return checks.checked(name, y, {"a": a, "b": b, **parameters}, claims), a, b


def _marginal(name: str, field: str, value: Tensor | None, like: Tensor, total: float) -> Tensor:
    if value is None:
        return like.new_full((), total / like.shape[-1]).expand_as(like)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} needs a tensor as {field}, got {type(value).__name__}")
    lengths_fit = value.dim() >= 1 and value.shape[-1] == like.shape[-1] and value.dim() <= like.dim()
    if not lengths_fit or any(s not in (1, t) for s, t in zip(value.shape[::-1], like.shape[::-1], strict=False)):
        raise ValueError(f"{name} needs {field} of shape {tuple(like.shape)}, got {tuple(value.shape)}")
    return value.to(like).expand_as(like)


def _entropic(
    name: str, y: Tensor, a: Tensor | None, b: Tensor | None, epsilon: float | Tensor, total: float
) -> Tensor:
    check_matrix(name, y, square=False)
    epsilon = checks.number(name, "epsilon", epsilon, y)
    positive = checks.Claim(epsilon > 0, lambda: f"{name} needs epsilon > 0, got {epsilon.item()}")
    y, a, b = checked_marginals(name, y, a, b, {"epsilon": epsilon}, [positive], total=total)
    scores = y / epsilon
    tol = 16 * torch.finfo(y.dtype).eps * (y.shape[-1] + y.shape[-2])

    def solve(scores: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor]:
        if not scores.isfinite().all():
            return (b + torch.nan,)
        run = scale(scores, a, b, tol=tol, max_iter=10_000, newton=True)
        if run.error > torch.finfo(scores.dtype).eps ** 0.5:
            warnings.warn(f"{name}: marginals wrong by {run.error:.1e}; use a larger epsilon", RuntimeWarning, 2)
        return (run.g,)

    (g,) = computed(solve, scores, a, b)
    for _ in range(2):
        plan = _plan(scores, a, g)
        gauge = b.sum(-1)[..., None, None] / b.shape[-1] ** 2  # a shift of g changes nothing: it is held
        rounding = b.shape[-1] * torch.finfo(b.dtype).eps  # for plans near a permutation, where all else vanishes
        diagonal = torch.diag_embed(plan.sum(-2) + rounding * b)
        curvature = diagonal - plan.mT @ (plan / a.unsqueeze(-1)) + gauge
        g = g + (torch.linalg.inv(curvature) @ (b - plan.sum(-2)).unsqueeze(-1)).squeeze(-1)
    return _plan(scores, a, g)


def _plan(scores: Tensor, a: Tensor, g: Tensor) -> Tensor:
    shifted = scores + g.unsqueeze(-2)
    return a.unsqueeze(-1) * (shifted - shifted.logsumexp(-1, keepdim=True)).exp()


def _nearest(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if y.shape[-1] > y.shape[-2]:
        return _nearest(y.mT, b, a).mT
    support, inverse = computed(_support, y, a, b)
    counts = support.sum(-1)
    shares = support / torch.where(counts > 0, counts, 1).unsqueeze(-1)
    # on the support Z = y + f + g; f and g make up for what the marginals of y lack there
    rows, columns = a - (support * y).sum(-1), b - (support * y).sum(-2)
    g = _times(inverse, columns - _times(shares.mT, rows))
    f = rows / torch.where(counts > 0, counts, 1) - _times(shares, g)
    point = support * (y + f.unsqueeze(-1) + g.unsqueeze(-2))
    return torch.where(point <= 0, 0, point)  # below zero by rounding only


def _support(y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where the nearest matrix is positive, as numbers 0 and 1; and the pseudo-inverse of the Hessian in g there.

    Large y make few entries positive and Newton's method slow; so y grows by factors of four, and each problem begins
    at the potential of the one before.
    """
    span = (y.amax((-2, -1)) - y.amin((-2, -1))).max() / b.mean(-1).max() if y.numel() else y.new_zeros(())
    num_stages = max(0, math.ceil(math.log(max(span.item(), 1.0), 4))) if span.isfinite() else 0
    g = torch.zeros_like(b)
    for i in range(num_stages, -1, -1):
        g, found = _newton(y / 4**i, a, b, g)
        g = 4 * g if i else g
    if not found:
        warnings.warn("transport: the support was not found; the marginals are not exact", RuntimeWarning, 2)
    z = _row_projections(y, a, g)
    values, vectors = torch.linalg.eigh(_curvature(z))
    smallest = 10 * b.shape[-1] * torch.finfo(b.dtype).eps * values[..., -1:]
    inverted = torch.where(values > smallest, 1 / values, 0)
    return (z > 0).to(y.dtype), vectors * inverted.unsqueeze(-2) @ vectors.mT


def _newton(y: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, bool]:
    """The potential for which the columns are right, and whether they are."""
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    gauge = torch.full_like(eye, 1 / len(eye))  # a shift of g changes nothing: it is held
    eps = torch.finfo(y.dtype).eps
    tol = 100 * eps * (y.abs().amax((-2, -1)) + a.amax(-1)).unsqueeze(-1)
    lack = b - _row_projections(y, a, g).sum(-2)
    for _ in range(MAX_ITER):
        if not any_row((lack.abs() > tol).any(-1)):
            return g, True
        # a regularisation that vanishes with the error keeps the convergence quadratic
        relative = lack.abs().sum(-1) / b.sum(-1).clamp(min=torch.finfo(b.dtype).tiny)
        shift = 1e-2 * relative.clamp(max=1) + 4 * eps * y.shape[-2]
        system = _curvature(_row_projections(y, a, g)) + shift[..., None, None] * eye + gauge
        direction = torch.linalg.solve(system, lack.unsqueeze(-1)).squeeze(-1)
        slope = (direction * lack).sum(-1)
        length = torch.ones_like(slope)
        for _ in range(40):  # the slope falls along the direction; it must not fall far below zero
            trial = g + length.unsqueeze(-1) * direction
            after = b - _row_projections(y, a, trial).sum(-2)
            poor = (direction * after).sum(-1) < -0.1 * slope
            if not any_row(poor):
                break
            length = torch.where(poor, length / 2, length)
        g, lack = trial, after
    return g, False


def _row_projections(y: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Rows of y + g projected onto simplices of sums a."""
    shifted = y + g.unsqueeze(-2)
    ordered = shifted.sort(dim=-1, descending=True).values
    counts = torch.arange(1, y.shape[-1] + 1, device=y.device, dtype=y.dtype)
    excess = ordered.cumsum(-1) - a.unsqueeze(-1)
    last = ((counts * ordered > excess).sum(-1, keepdim=True) - 1).clamp(min=0)
    threshold = torch.where(a.unsqueeze(-1) > 0, excess.gather(-1, last) / (last + 1), ordered[..., :1])
    return (shifted - threshold).clamp(min=0)


def _curvature(z: Tensor) -> Tensor:
    """Minus the Hessian in g: `diag(Sᵀ1) - Sᵀ diag(1/S1) S` for the support S of Z."""
    support = (z > 0).to(z.dtype)
    counts = support.sum(-1, keepdim=True)
    return torch.diag_embed(support.sum(-2)) - support.mT @ (support / torch.where(counts > 0, counts, 1))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
