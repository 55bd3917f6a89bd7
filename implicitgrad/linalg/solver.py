"""The contract of a linear solver and what it returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad.linalg.checks import CheckedSystem
from implicitgrad.linalg.hindsight import Hindsight
from implicitgrad.linalg.operator import LinearOperator


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found and how good it is.

    Attributes:
        value: x, shape of b.
        residual_norm: |b - A x| recomputed with a product at the end, not taken from a recurrence; ``b.shape[:-1]``.
        relative_residual: the same divided by |b|, no unit; 0 where b = 0.
        num_iter: iterations of the slowest right-hand side; 0 for a direct solver.
        num_matvec: products with A, one per right-hand side of a block: a product with ``(k, *batch_shape, n)`` counts
            k, one with a stack of systems counts 1. A matrix made column by column counts n.
        converged: whether every right-hand side met the tolerance.
        reason: why the solver stopped, in words; with several right-hand sides the worst of their reasons.
        solver: class name of the solver that produced the value (`Auto` names its choice).
        memory: bytes of the vectors and matrices the solver held, besides A.
        ritz_min: smallest Ritz value of A over all right-hand sides, above its smallest eigenvalue; None if the solver
            yields none.
        ritz_max: the largest one, below the largest eigenvalue.
        energy_error: estimate of the largest |x - x*|_A over right-hand sides, from below; None if there is none.
        normal_residual: |Aᵀ(b - A x) - damping x| of a least-squares solver, like `residual_norm`; None for the rest.
    """

    value: Tensor
    residual_norm: Tensor
    relative_residual: Tensor
    num_iter: int
    num_matvec: int
    converged: bool
    reason: str
    solver: str
    memory: int
    ritz_min: float | None = None
    ritz_max: float | None = None
    energy_error: float | None = None
    normal_residual: Tensor | None = None


class LinearSolver(ABC):
    """Solves ``A x = b``. Immutable: all fields are hyperparameters."""

    @abstractmethod
    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        """The solution, or as much of it as could be had; `Solution.converged` says which.

        No autograd graph is recorded and no argument changed.

        Args:
            A: the operator.
            b: ``(*batch_shape, n)``, or ``(k, *batch_shape, n)`` for k right-hand sides.
            x0: a guess at the solution, shape of b; zero by default.

        Raises:
            ValueError: shape, dtype or device do not fit, or the solver cannot take this kind of operator.
            FloatingPointError: NaN or infinity in `b`, `x0`, a product with A, or the solution.
        """


class Products:
    """``v -> A v`` without autograd graph, counting as `Solution.num_matvec` does."""

    def __init__(self, A: LinearOperator):
        self.count = 0
        self._A = A
        self._ndim = len(A.vector_shape)

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1 if v.ndim == self._ndim else v.shape[0]
        return (self._A @ v).detach()


def zero_solution(solver: str, system: CheckedSystem) -> Solution:
    """The solution for right-hand sides that are all zero, at no cost."""
    norm = system.scale.reshape(system.b.shape[:-1])
    return Solution(torch.zeros_like(system.b), norm, norm, 0, 0, True, "zero right-hand side", solver, 0)


def unscaled_solution(
    solver: str,
    system: CheckedSystem,
    x: Tensor,
    relative: Tensor,
    *,
    num_iter: int,
    num_matvec: int,
    converged: bool,
    reason: str,
    memory: int,
    hindsight: Hindsight | None = None,
) -> Solution:
    """The solution in the units of the caller.

    Args:
        solver: class name.
        system: what was solved.
        x: solution for ``system.b``.
        relative: norms of its true residual, shape of ``system.scale``.
        num_iter: see `Solution`, like all that follow.
        num_matvec: products.
        converged: for every row.
        reason: in words.
        memory: in bytes.
        hindsight: what conjugate gradients know about the spectrum and the error.

    Raises:
        FloatingPointError: NaN or infinity in the solution.
    """
    value = x * system.scale
    check_finite(solver, num_iter, value)
    shape = system.b.shape[:-1]
    residual = relative * system.scale
    return Solution(
        value=value,
        residual_norm=residual.reshape(shape),
        relative_residual=relative.reshape(shape),
        num_iter=num_iter,
        num_matvec=num_matvec,
        converged=converged,
        reason=reason,
        solver=solver,
        memory=memory,
        ritz_min=hindsight and hindsight.ritz_min,
        ritz_max=hindsight and hindsight.ritz_max,
        energy_error=hindsight and (hindsight.energy_per_residual * residual).max().item(),
    )


def check_finite(solver: str, num_iter: int, *tensors: Tensor) -> None:
    """Refuse NaN or infinity that arose during a solve; one transfer from the device.

    Raises:
        FloatingPointError: naming the solver and the iteration.
    """
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise FloatingPointError(
            f"{solver}: NaN or infinity at iteration {num_iter}, in a product with A or in the solution. Check A @ v"
            f" for a finite v; if that is finite, A is singular or scaled beyond its dtype: damp it (A.damped) or use"
            f" float64."
        )
