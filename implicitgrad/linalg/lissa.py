"""Neumann series with a new sample of the matrix in every term (LiSSA)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad.linalg.checks import CheckedSystem, check_count, check_rtol, check_system, default_rtol
from implicitgrad.linalg.lanczos import spectral_interval
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.rows import any_row, check_every, row_norm, safe_row_norm
from implicitgrad.linalg.sampling import Estimate, RunningMean
from implicitgrad.linalg.solver import LinearSolver, Products, Solution, check_finite, unscaled_solution, zero_solution

# The automatic scale looks at so many samples. A later one diverges only above twice the scale.
SCALE_SAMPLES = 5
# Room for rounding above the proven bound of an iterate; divergence is exponential and soon passes it.
SLACK = 2.0


class _Runs(NamedTuple):
    """Independent runs for ``system.b``."""

    mean: Tensor
    standard_error: Tensor
    scale: Tensor  # row scalar
    diverged: Tensor  # row flags
    num_iter: int  # of the longest
    num_matvec: int


@dataclass(frozen=True)
class LiSSA(LinearSolver):
    r"""Estimates A⁻¹b from products with random samples of A, say Hessians of minibatches.

    Each term takes a new sample H with mean A: $x \leftarrow x + (b - H x) / scale$, from zero or a guess. In
    expectation that is `Neumann` with the step 1 / scale, and after enough terms A⁻¹b; the spread of the samples leaves
    noise in x that more terms do not lower. So `num_repeats` independent runs are averaged, and their spread gives the
    standard error. Costs ``num_terms · num_repeats`` products with samples, at most two with A, and seven vectors of
    memory per right-hand side.

    A sample with eigenvalues outside of [0, 2 scale] can make x grow exponentially. Without such samples
    ``|x_k| <= |x_0| + k |b| / scale``; a row that exceeds twice that ends with the reason "diverged". Damp the samples,
    take larger ones, or set a larger scale.

    `Solution` has the true residual, measured with A itself, and counts as converged only if that meets `rtol`, which
    a stochastic estimate seldom does; `Solution.reason` names the scale and the standard error relative to x.
    `Solution.num_matvec` counts products with samples like those with A.

    Source: Agarwal, Bullins and Hazan (2017), algorithm 1; Koh and Liang (2017), section 3, for the scale. Departures:
    x starts at zero or the guess in place of b, one term behind; the automatic scale; the test for divergence.

    Args:
        sample: draws H with the given generator, which lives on the CPU; damping goes here:
            ``lambda generator: minibatch_hessian(generator).damped(0.01)``.
        num_terms: terms of each run.
        num_repeats: independent runs, at least 2.
        scale: above the largest eigenvalue of every sample, in units of A. None takes the largest of five samples,
            1.05 (θ_max + its residual) from 20 products each by Lanczos, or the eigenvalue itself with at most 20
            unknowns; looked for in every solve. The samples must be declared symmetric then.
        seed: of the generator. Each solve starts from it, so the same system has the same answer.
        rtol: what counts as converged, |b - A x| <= rtol |b|; None for 1e-10 in float64, 1e-5 in float32, 1e-2 below.

    Raises:
        ValueError: a hyperparameter out of range; in `solve`, a sample that differs from A in shape, dtype or device,
            or an automatic scale for samples without positive eigenvalue.

    Example:
        >>> diagonals = torch.tensor([[1.0, 2.0], [3.0, 2.0]])  # of two samples; their mean is 2 I
        >>> draw = lambda g: torch.diag(diagonals[torch.randint(2, (), generator=g)])
        >>> A = LinearOperator.from_dense(2 * torch.eye(2), symmetric=True)
        >>> solver = LiSSA(lambda g: LinearOperator.from_dense(draw(g), symmetric=True), num_terms=50, num_repeats=20)
        >>> error = (solver.solve(A, torch.ones(2)).value - 0.5).abs()
        >>> bool(error[0] < 0.1), bool(error[1] < 1e-5)
        (True, True)
    """

    sample: Callable[[torch.Generator], LinearOperator]
    num_terms: int
    num_repeats: int = 4
    scale: float | None = None
    seed: int = 0
    rtol: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.sample):
            raise ValueError(f"LiSSA(sample=...) needs a function generator -> LinearOperator; got {self.sample!r}.")
        check_count("LiSSA", "num_terms", self.num_terms)
        check_count("LiSSA", "num_repeats", self.num_repeats, at_least=2)
        check_rtol("LiSSA", self.rtol)
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"LiSSA(scale=...) needs a positive number, or None for automatic; got {self.scale}.")

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        system = check_system("LiSSA", A, b, x0)
        if system.zero:
            return zero_solution("LiSSA", system)
        rtol = default_rtol(A) if self.rtol is None else self.rtol
        product = Products(A)
        x, runs = system.x0, None
        relative = None if x is None else safe_row_norm(system.b - product(x))
        if x is None or relative is None or any_row(~(relative <= rtol)):
            runs = self._run(A, system)
            x = runs.mean.to(A.dtype)
            relative = safe_row_norm(system.b - product(x))
        check_finite("LiSSA", self.num_terms, relative)
        converged = not any_row(relative > rtol)
        return unscaled_solution(
            "LiSSA",
            system,
            x,
            relative,
            num_iter=runs.num_iter if runs else 0,
            num_matvec=product.count + (runs.num_matvec if runs else 0),
            converged=converged,
            reason=_reason(converged, runs),
            memory=7 * b.nbytes,
        )

    def estimate(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Estimate:
        """The estimate with the standard error of every entry, without products with A.

        Args:
            A: the mean of the samples; read for its shape.
            b: see `solve`.
            x0: start of every run.

        Raises:
            ValueError: see `LiSSA`.
            FloatingPointError: NaN or infinity in b, x0 or a product, or a run that diverged.
        """
        system = check_system("LiSSA", A, b, x0)
        if system.zero:
            return Estimate(torch.zeros_like(b), torch.zeros_like(b), 0)
        runs = self._run(A, system)
        if any_row(runs.diverged):
            raise FloatingPointError(f"LiSSA: {_reason(False, runs)}; damp the samples or set a larger scale.")
        return Estimate(runs.mean * system.scale, runs.standard_error * system.scale, runs.num_matvec)

    def _run(self, A: LinearOperator, system: CheckedSystem) -> _Runs:
        scale, spent = self._scale(A)
        b = system.b
        start = torch.zeros_like(b) if system.x0 is None else system.x0
        mean = RunningMean(b)
        diverged, longest = torch.zeros_like(system.scale, dtype=torch.bool), 0
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.num_repeats):
            x, active, num_iter = self._chain(A, generator, b, start, 1 / scale)
            mean.add(x.unsqueeze(0))
            diverged, longest = diverged | ~active, max(longest, num_iter)
            spent += num_iter * (1 if b.ndim == len(A.vector_shape) else len(b))
        return _Runs(mean.mean, mean.standard_error, scale, diverged, longest, spent)

    def _chain(
        self, A: LinearOperator, generator: torch.Generator, b: Tensor, start: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """One run: the last x, the rows that have not diverged, the terms."""
        every = check_every(b)
        x, reach, pace = start, row_norm(start), step * row_norm(b)
        active, largest = torch.ones_like(reach, dtype=torch.bool), torch.zeros_like(reach)
        num_iter = 0
        while num_iter < self.num_terms:
            num_iter += 1
            new_x = torch.addcmul(x, b - (self._draw(A, generator) @ x).detach(), step)
            size = row_norm(new_x)
            largest = torch.maximum(largest, torch.where(active, size, 0))  # keeps a NaN
            active = active & (size <= SLACK * (reach + num_iter * pace))
            x = torch.where(active, new_x, x)
            if num_iter % every == 0 and not any_row(active):
                break
        if any_row(largest.isnan()):  # an infinite size is divergence
            check_finite("LiSSA", num_iter, largest)
        return x, active, num_iter

    def _scale(self, A: LinearOperator) -> tuple[Tensor, int]:
        """A row scalar and the products spent on it."""
        if self.scale is not None:
            return torch.full((), self.scale, dtype=A.dtype, device=A.device), 0
        generator = torch.Generator().manual_seed(self.seed)
        largest, spent = [], 0
        for _ in range(SCALE_SAMPLES):
            H = self._draw(A, generator)
            if not H.symmetric:
                raise ValueError(f"LiSSA(scale=None) needs symmetric samples; got {H}. Set the scale.")
            product = Products(H)
            largest.append(spectral_interval("LiSSA", H, product)[1])
            spent += product.count
        scale = torch.stack(largest).amax(0)
        if not (scale > 0).all():
            raise ValueError("LiSSA found no positive eigenvalue in five samples; it needs positive definite ones.")
        return scale, spent

    def _draw(self, A: LinearOperator, generator: torch.Generator) -> LinearOperator:
        H = self.sample(generator)
        if (H.vector_shape, H.image_shape, H.dtype, H.device) != (A.vector_shape, A.image_shape, A.dtype, A.device):
            raise ValueError(f"LiSSA needs samples like A, {A} on {A.device}; sample returned {H} on {H.device}.")
        return H


def _reason(converged: bool, runs: _Runs | None) -> str:
    if runs is None:
        return "converged"
    error = (row_norm(runs.standard_error) / row_norm(runs.mean).clamp_min(torch.finfo(runs.mean.dtype).tiny)).amax()
    detail = f"scale {runs.scale.amax():.3g}, relative standard error {error:.1e}"
    if any_row(runs.diverged):
        return f"diverged: a sample has eigenvalues outside of [0, 2 scale] ({detail})"
    return f"{'converged' if converged else 'num_terms reached'} ({detail})"
