"""The Lanczos process: the part of a symmetric matrix that acts on a Krylov space."""

from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.checks import check_count, require_symmetric
from implicitgrad.linalg.matrix import as_columns, as_rows, factor_dtype
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_dot, safe_row_norm
from implicitgrad.linalg.sampling import draw_gaussian, generator_on
from implicitgrad.linalg.solver import Products, check_finite
from implicitgrad.linalg.symmetry import irregular

# What is left of A v is rounding if it is smaller than this many units in the last place of the largest A v.
BREAKDOWN = 10.0
# A solver that is told nothing about the spectrum looks at it for so many steps, ...
INTERVAL_STEPS = 20
# ... and takes these multiples of the ends of what it saw. After 20 steps the smallest Ritz value lay about twice as
# high as the smallest eigenvalue on a Hessian of logistic regression, the largest was right to 1e-4.
INTERVAL_SAFETY = (0.5, 1.05)
# Vectors held by a process without reorthogonalisation.
LANCZOS_VECTORS = 6


class Lanczos(NamedTuple):
    """``A Q = Q T + β_m q_{m+1} e_mᵀ`` with T tridiagonal, of a process with m steps; float32 or better.

    Attributes:
        alphas: the diagonal of T, ``(m, *batch_shape)``.
        betas: ``(m, *batch_shape)``: all but the last stand beside the diagonal of T, the last is β_m. Zero where the
            process found an invariant subspace.
        basis: the vectors of Q, ``(m, *batch_shape, n)``, orthonormal; None without reorthogonalisation.
        num_matvec: products spent, m.
    """

    alphas: Tensor
    betas: Tensor
    basis: Tensor | None
    num_matvec: int


class Ritz(NamedTuple):
    """Eigenvalues of T in ascending order, on the CPU in float64.

    Attributes:
        values: ``(*batch_shape, m)``.
        residuals: |A y - value y| of the Ritz vectors y = Q s: β_m times the last entry of s, ``(*batch_shape, m)``.
        coefficients: the vectors s in columns, ``(*batch_shape, m, m)``.
    """

    values: Tensor
    residuals: Tensor
    coefficients: Tensor


def lanczos(
    A: LinearOperator,
    num_steps: int,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    reorthogonalise: bool = True,
) -> Lanczos:
    """The Lanczos process of a symmetric operator.

    ``A qⱼ = βⱼ₋₁ qⱼ₋₁ + αⱼ qⱼ + βⱼ qⱼ₊₁`` for orthonormal q₁, q₂, ... with q₁ along the start. The eigenvalues of the
    tridiagonal T lie within those of A, and the outermost approach them first. Costs one product per step; with
    reorthogonalisation also 4 j n operations in step j and m vectors of memory. Without it six vectors suffice, but
    eigenvalues that have converged appear several times. It waits for the device once, at the end.

    Where the vectors span an invariant subspace the process goes on with β = 0 from a random vector orthogonal to
    them, so that multiple eigenvalues and parts of the spectrum foreign to the start are found too, and a stack of
    systems stays in step. More than n steps are not made.

    Source: Lanczos (1950); Golub and Van Loan, Matrix Computations (2013), sections 10.1 and 10.3. Departure: the
    continuation at an invariant subspace, where the textbook stops.

    Args:
        A: symmetric; a stack of systems has one process each.
        num_steps: m.
        start: q₁ before normalisation, ``(*batch_shape, n)``; by default random.
        generator: draws the start and the continuation; by default a fresh one with a fixed seed.
        reorthogonalise: against all vectors so far, in every step.

    Raises:
        ValueError: A is not declared symmetric (take ``A.T @ A``), `num_steps` below one, or a start that is zero or
            does not fit.
        FloatingPointError: NaN or infinity in the start or a product.

    Example:
        >>> A = LinearOperator.from_dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), symmetric=True)
        >>> process = lanczos(A, 2, start=torch.tensor([1.0, 0.0]))
        >>> process.alphas, process.betas
        (tensor([2., 2.]), tensor([1., 0.]))
    """
    require_symmetric("lanczos", A, "A.T @ A")
    check_count("lanczos", "num_steps", num_steps)
    generator = generator_on(A.device, generator)
    if start is None:
        start = draw_gaussian(A, generator)
    else:
        _check_start(A, start)
    spare = draw_gaussian(A, generator)
    return _process("lanczos", A, Products(A), start.detach().to(spare.dtype), spare, num_steps, reorthogonalise)


def ritz(process: Lanczos) -> Ritz:
    """Eigenvalues of the tridiagonal matrix, for m steps O(m³)."""
    # T is tiny: on the CPU its eigenvalues cost less than the launches would, and float64 is there on every machine
    alphas, betas = (numbers.movedim(0, -1).cpu().double() for numbers in (process.alphas, process.betas))
    beside = torch.diag_embed(betas[..., :-1], 1)
    values, coefficients = torch.linalg.eigh(torch.diag_embed(alphas) + beside + beside.mT)
    return Ritz(values, betas[..., -1:] * coefficients[..., -1, :].abs(), coefficients)


def spectral_interval(name: str, A: LinearOperator, product: Products) -> tuple[Tensor, Tensor]:
    """Where a solver may take the eigenvalues of a symmetric A to be, from 20 steps; remembered on A.

    Args:
        name: class name of the solver.
        A: symmetric.
        product: counts what is spent.

    Returns:
        Half of the smallest Ritz value, and 1.05 (θ_max + its residual) for the largest; with at most 20 unknowns
        the extreme eigenvalues themselves. Row scalars in the dtype of A: 0-dimensional, or ``(*batch_shape, 1)``.
    """

    def look() -> tuple[Tensor, Tensor]:
        example = torch.empty(A.vector_shape, dtype=factor_dtype(A.dtype), device=A.device)
        start, spare = irregular(example), irregular(example, 3**0.5)
        complete = A.size <= INTERVAL_STEPS
        found = ritz(_process(name, A, product, start, spare, INTERVAL_STEPS, reorthogonalise=complete))
        smallest, largest = found.values[..., 0], found.values[..., -1] + found.residuals[..., -1]
        below, above = (1.0, 1.0) if complete else INTERVAL_SAFETY
        ends = torch.stack([below * smallest, above * largest]).to(A.device, A.dtype)
        low, high = ends.unsqueeze(-1) if A.batch_shape else ends
        return low, high

    return A.remember("spectral interval", look)


def _process(
    name: str,
    A: LinearOperator,
    product: Products,
    start: Tensor,
    spare: Tensor,
    num_steps: int,
    reorthogonalise: bool,
) -> Lanczos:
    num_steps = min(num_steps, A.size)
    tolerance = max(BREAKDOWN * torch.finfo(A.dtype).eps, A.noise)
    size = safe_row_norm(start)
    v, previous, beta, largest = start / size, torch.zeros_like(start), torch.zeros_like(size), torch.zeros_like(size)
    basis = v.new_zeros(num_steps if reorthogonalise else 0, *v.shape)
    alphas, betas, before = [], [], product.count
    for step in range(num_steps):
        if reorthogonalise:
            basis[step] = v
        image = product(v.to(A.dtype)).to(v.dtype)
        largest = torch.maximum(largest, safe_row_norm(image))
        alpha = row_dot(v, image)
        w = image.addcmul(v, alpha, value=-1).addcmul_(previous, beta, value=-1)
        w = _orthogonal(w, basis[: step + 1])
        ended = safe_row_norm(w) <= tolerance * largest
        # the spare vector is turned a little further each time: its turns are linearly independent. To look whether it
        # is needed would make a GPU wait, so it is always done there.
        if check_every(w) > 1 or any_row(ended):
            w = _orthogonal(torch.where(ended, spare.roll(step, -1), w), basis[: step + 1])
        size = safe_row_norm(w)
        beta = torch.where(ended, 0, size)
        previous, v = v, w / torch.where(size > 0, size, 1)
        alphas.append(alpha)
        betas.append(beta)
    T = torch.stack(alphas), torch.stack(betas)
    check_finite(name, num_steps, *T)
    diagonal, beside = (numbers.squeeze(-1) if A.batch_shape else numbers for numbers in T)
    return Lanczos(diagonal, beside, basis if reorthogonalise else None, product.count - before)


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """The row less its part in the span of the basis ``(j, *batch, n)``; j may be zero."""
    columns, w = as_columns(basis), w.unsqueeze(0)
    return (w - as_rows(columns @ (columns.mT @ as_columns(w)))).squeeze(0)


def _check_start(A: LinearOperator, start: Tensor) -> None:
    if start.shape != A.vector_shape or start.device != A.device or not start.is_floating_point():
        raise ValueError(
            f"lanczos needs a floating point start of shape {A.vector_shape} on {A.device}; got {tuple(start.shape)},"
            f" {start.dtype} on {start.device}."
        )
    largest = start.abs().amax(-1)
    if not largest.isfinite().all():
        raise FloatingPointError("lanczos got NaN or infinity in the start; find out where it arose.")
    if not largest.all():
        raise ValueError("lanczos needs a start that is not zero; leave it out for a random one.")
