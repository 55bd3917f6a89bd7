"""Conjugate gradients for several right-hand sides at once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.cg import MISLED, NEGATIVE_CURVATURE, carried_out, conjugate_gradients
from implicitgrad.linalg.checks import check_count, check_rtol, require_symmetric
from implicitgrad.linalg.cycles import Cycle, solve_in_cycles
from implicitgrad.linalg.hindsight import Coefficients, Hindsight
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.preconditioner import Preconditioner, check_preconditioner
from implicitgrad.linalg.rows import any_row, check_every, row_dot
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite

# Rows, and what is left of them orthogonal to the rows before, come from subtractions of rows of length one. Below this
# many units in the last place they are rounding, ...
ROUNDING = 100.0
# ... and inner products in float64 show them down to √(s √n eps) of a row; it has to be a little more.
MARGIN = 3.0
# Where such a part is shorter than this, the rows are made orthonormal a second time.
SHORT = 0.1
# Numbers that are converted to float64 at a time: half a megabyte stays in the cache of a CPU, which is faster than all
# at once; elsewhere it is memory that is saved.
PART, PART_ELSEWHERE = 2**16, 2**24


@dataclass(frozen=True)
class BlockCG(LinearSolver):
    """Solves symmetric positive definite systems with several right-hand sides in one common Krylov space.

    Each of the k iterates minimises its ``½ xᵀAx - bᵀx`` over the space that A spans from all k residuals. Such a block
    settles k eigenvalues at a time, so it needs fewer products than k runs of `CG`; how many fewer depends on the
    spectrum (experiments/benchmarks/block_cg.py). Costs one product with a block per iteration, 12 n k² operations on
    vectors, about three times the time `CG` spends on them, and 6 k vectors of memory. One right-hand side is solved by
    CG itself.

    The block keeps as many directions as there are independent residuals: equal, dependent and zero right-hand sides
    cost no products. A right-hand side stands still once its residual has met the tolerance, while its directions serve
    the others to the end. A combination p of directions with ``pᵀAp <= 0`` ends all right-hand sides of its system with
    the reason "negative curvature" and the iterates before it. In a stack of systems each has its own block.

    `Solution.energy_error` is given as by `CG`, Ritz values for one right-hand side only.

    Source: O'Leary (1980), "The block conjugate gradient algorithm and related methods"; Dubrulle (2001), "Retooling
    the method of block conjugate gradients", algorithm BCGrQ. Departures: the basis of the residuals comes from
    a Cholesky factor of inner products in float64, in the inner product of the preconditioner if there is one;
    directions below rounding are left out; restarts from the true residual as in `CG`.

    Args:
        rtol: stops at |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.
        max_iter: iterations over all restarts; None for 10 n, at most 2000.
        num_refinements: as in `CG`.
        preconditioner: as in `CG`.

    Raises:
        ValueError: a hyperparameter out of range; in `solve`, an operator that is not declared symmetric (use GMRES).

    Example:
        >>> A = LinearOperator.from_dense(torch.diag(torch.tensor([1.0, 2.0, 4.0])), symmetric=True, definite=True)
        >>> solution = BlockCG().solve(A, torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))
        >>> solution.value[1], solution.num_matvec  # three iterations with one direction, and three residuals
        (tensor([2.0000, 1.0000, 0.5000]), 6)
    """

    rtol: float | None = None
    max_iter: int | None = None
    num_refinements: int = 2
    preconditioner: Callable[[Tensor], Tensor] | Preconditioner | None = None

    def __post_init__(self) -> None:
        check_rtol("BlockCG", self.rtol)
        check_count("BlockCG", "max_iter", self.max_iter)
        check_count("BlockCG", "num_refinements", self.num_refinements, at_least=0)
        check_preconditioner("BlockCG", self.preconditioner)

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        require_symmetric("BlockCG", A, "GMRES")
        several = b.ndim > len(A.vector_shape) and len(b) > 1
        run = block_conjugate_gradients if several else partial(conjugate_gradients, name="BlockCG")

        def recurrence(product: Products, residual: Tensor, target: float, budget: int) -> Cycle:
            return run(product, residual, target, budget, carried_out(self.preconditioner, A, product))

        return solve_in_cycles(
            "BlockCG",
            recurrence,
            A,
            b,
            x0,
            rtol=self.rtol,
            max_iter=self.max_iter,
            num_refinements=self.num_refinements,
            num_vectors=5 if self.preconditioner is None else 6,
        )


def block_conjugate_gradients(
    product: Products,
    residual: Tensor,
    target: float,
    budget: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Cycle:
    """One run of the block recurrence; a `Recurrence` if there is no preconditioner.

    Blocks are ``(*batch, rows, n)`` here, as `torch.linalg` wants them. The residuals are ``C Q`` with the rows of Q
    orthonormal and C small; the directions D are conjugate to all before them.
    """
    every, limit, rounding = check_every(residual), target**2, _rounding(residual.dtype)
    coefficients = Coefficients()
    R = _block(residual)
    x = torch.zeros_like(R)
    basis = _orthonormal(R, precondition, torch.ones_like(R[..., 0], dtype=torch.bool), least=0.0)
    C, D, misled = basis.factor, basis.preconditioned.clone(), basis.misled
    square = _block(row_dot(residual, residual)).squeeze(-1).to(C.dtype)
    energy = C.square().sum(-1)  # <r, P r>
    largest = energy.amax(-1, keepdim=True)  # so far; keeps a NaN
    active = (square > limit) & ~misled
    num_iter = 0
    while num_iter < budget:
        if num_iter % every == 0:
            going_on, *alive = torch.cat((active.any().view(1), basis.alive.reshape(-1, D.shape[-2]).any(0))).tolist()
            if not (going_on and any(alive)):
                break
            if not all(alive):
                basis, C, D = _without_dead(basis, C, D, alive)
        num_iter += 1
        Z = _block(product(_rows(D)))
        inverse, definite = _inverse(_gram(D, Z), basis.alive)
        active = active & definite
        steps = torch.where(active.unsqueeze(-1), C @ inverse, 0)
        coefficients.append((steps * C).sum(-1) / torch.where(active, energy, 1), energy)
        _add_product(x, steps, D)
        _add_product(basis.rows, -inverse, Z)
        basis = _orthonormal(basis.rows, precondition, basis.alive & active.any(-1, keepdim=True), rounding)
        D = (basis.factor.mT.to(D.dtype) @ D).add_(basis.preconditioned)
        C, misled = C @ basis.factor, misled | basis.misled
        active = active & ~misled
        new_energy = C.square().sum(-1)
        largest = torch.maximum(largest, new_energy.amax(-1, keepdim=True))
        energy = torch.where(active, new_energy, energy)
        square = torch.where(active, _squares(C, basis, precondition), square)
        active = active & (square > limit)
    check_finite("BlockCG", num_iter, largest, square)
    claimed = _rows((square <= limit).unsqueeze(-1))
    broken = ~_rows(active.unsqueeze(-1)) & ~claimed
    if any_row(broken) or num_iter == 0:
        return Cycle(_rows(x), num_iter, claimed, broken, MISLED if any_row(misled) else NEGATIVE_CURVATURE)
    ratio = coefficients.hindsight(energy, square, ritz=False).energy_per_residual
    return Cycle(_rows(x), num_iter, claimed, broken, hindsight=Hindsight(_rows(ratio.unsqueeze(-1))))


class _Basis(NamedTuple):
    """``R = factor @ rows``. Dead rows are zero, and so are the columns of `factor` that would multiply them."""

    rows: Tensor  # Q (*batch, s, n), with Q P Qᵀ = I on the alive rows
    preconditioned: Tensor  # Q P
    factor: Tensor  # (*batch, rows of R, s)
    alive: Tensor  # (*batch, s)
    misled: Tensor  # (*batch, 1): P is not positive definite


def _orthonormal(R: Tensor, precondition: Callable[[Tensor], Tensor] | None, allowed: Tensor, least: float) -> _Basis:
    """A basis of the rows of R, by Cholesky factors of their inner products; once more where the first is inaccurate.

    Rows that are not allowed, shorter than `least`, or combinations of those before them come out dead.

    Source: Yamamoto, Nakatsukasa, Yanagisawa and Fukaya (2015), "Roundoff error analysis of the CholeskyQR2 algorithm".
    """
    Z = R if precondition is None else _block(precondition(_rows(R)).detach())
    gram = _gram(R, Z)
    square = gram.diagonal(dim1=-2, dim2=-1)
    factor, inverse, alive, pivot = _factorised(gram, allowed & (square > least**2), R)
    # a row that is not zero has <r, P r> > 0, and a Gram matrix has a Cholesky factor
    misled = ((square <= 0) & R.any(-1) | pivot.isnan()).any(-1, keepdim=True) & (precondition is not None)
    rows = inverse @ R
    Z = rows if precondition is None else inverse @ Z
    if check_every(R) > 1 or any_row(alive & (pivot < SHORT**2)):  # where a look would wait for the device, always
        again, inverse, alive, _ = _factorised(_gram(rows, Z), alive, R)
        factor, rows = factor @ again, inverse @ rows
        Z = rows if precondition is None else inverse @ Z
    return _Basis(rows, Z, factor, alive, misled)


def _factorised(gram: Tensor, allowed: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A factor of the inner products, its inverse in the dtype of the rows, which are alive, and their squared parts.

    With rows of length one it begins with the Cholesky factor L of ``gram + shift I``, since a singular matrix has none
    in rounding. On its diagonal are the parts of the rows orthogonal to those before. Rows without one are dead:
    their columns of L are rounding. On the others ``L⁻¹ gram L⁻ᵀ`` is ``I - shift L⁻¹L⁻ᵀ``, whose Cholesky factor takes
    the shift out again; without that, block CG takes 5 to 10 % more iterations.
    """
    square = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(allowed, square.rsqrt(), 0)
    shift = like.shape[-2] * like.shape[-1] ** 0.5 * torch.finfo(gram.dtype).eps
    lower, info = torch.linalg.cholesky_ex(_scaled(gram, scale) + torch.where(allowed, shift, 1).diag_embed())
    pivot = torch.where(info.unsqueeze(-1) == 0, lower.diagonal(dim1=-2, dim2=-1).square(), torch.nan)
    alive = allowed & (pivot > max(MARGIN**2 * shift, _rounding(like.dtype) ** 2))
    within = alive.unsqueeze(-1) & alive.unsqueeze(-2)
    identity = torch.ones_like(scale).diag_embed()
    inverse = torch.linalg.solve_triangular(torch.where(within, lower, identity), identity, upper=False)
    inverse = torch.where(within, inverse, 0)
    correction, failed = torch.linalg.cholesky_ex(identity - shift * inverse @ inverse.mT)
    correction = torch.where(failed.view(*failed.shape, 1, 1) == 0, correction, identity)
    inverse = torch.linalg.solve_triangular(correction, inverse * scale.unsqueeze(-2), upper=False)
    factor = torch.where(alive.unsqueeze(-2), lower, 0) @ correction
    return factor * square.clamp(min=0).sqrt().unsqueeze(-1), inverse.to(like.dtype), alive, pivot


def _rounding(dtype: torch.dtype) -> float:
    """Length below which what is left of a row of length one is rounding."""
    return min(ROUNDING * torch.finfo(dtype).eps, SHORT)


def _without_dead(basis: _Basis, C: Tensor, D: Tensor, alive: list[bool]) -> tuple[_Basis, Tensor, Tensor]:
    """Leave out the rows that are dead in all systems."""
    index = torch.tensor([i for i, flag in enumerate(alive) if flag], device=D.device)
    rows = basis.rows.index_select(-2, index)
    same = basis.preconditioned is basis.rows
    preconditioned = rows if same else basis.preconditioned.index_select(-2, index)
    basis = basis._replace(rows=rows, preconditioned=preconditioned, alive=basis.alive.index_select(-1, index))
    return basis, C.index_select(-1, index), D.index_select(-2, index)


def _inverse(curvature: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse on the alive rows, zero on the others, and whether it is positive definite; then all is zero."""
    square = curvature.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(alive & (square > 0), square.rsqrt(), 0)
    lower, info = torch.linalg.cholesky_ex(_scaled(curvature, scale) + (~alive).to(square.dtype).diag_embed())
    half = torch.linalg.solve_triangular(lower, scale.diag_embed(), upper=False)
    definite = info.unsqueeze(-1) == 0
    return torch.where(definite.unsqueeze(-1), half.mT @ half, 0), definite


def _scaled(matrix: Tensor, scale: Tensor) -> Tensor:
    """Symmetrised, and scaled from both sides."""
    return (matrix + matrix.mT) / 2 * scale.unsqueeze(-1) * scale.unsqueeze(-2)


def _squares(C: Tensor, basis: _Basis, precondition: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Squared norms of the rows of ``C Q``."""
    image = C if precondition is None else C @ _gram(basis.rows, basis.rows)
    return (image * C).sum(-1)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows, in float64."""
    if a.dtype == torch.float64:
        return a @ b.mT
    length = max(1, (PART if a.device.type == "cpu" else PART_ELSEWHERE) * a.shape[-1] // a.numel())
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for part, other in zip(a.split(length, -1), b.split(length, -1), strict=True):
        part = part.double()
        total = total + part @ (part if a is b else other.double()).mT
    return total


def _add_product(block: Tensor, factor: Tensor, rows: Tensor) -> None:
    """``block += factor @ rows``."""
    factor = factor.to(rows.dtype)
    if block.ndim == 2:
        block.addmm_(factor, rows)
    else:
        block.add_(factor @ rows)


def _block(rows: Tensor) -> Tensor:
    """``(k, *batch, n)`` as ``(*batch, k, n)``."""
    return rows.movedim(0, -2)


def _rows(block: Tensor) -> Tensor:
    """``(*batch, k, n)`` as ``(k, *batch, n)``."""
    return block.movedim(-2, 0)
