"""The linear systems of a Newton iteration: their matrix, its age, its damping, and what it leaves behind."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.curvature import hessian
from implicitgrad.linalg import CG, Cholesky, LinearOperator, LinearSolver, Solution
from implicitgrad.solvers.last_factor import LastFactor, left_behind
from implicitgrad.solvers.objective import Objective

# Up to so many unknowns systems are solved by a factor, by default; see `Auto`.
DENSE_SIZE = 500
# Above, systems are solved to sqrt(|g| / first |g|), at most to this (Nocedal and Wright, section 7.1).
LOOSEST = 0.1
# Damping of a matrix that is not definite starts at this share of its size, or at one that keeps steps below a thousand
# times y, and grows by a factor, at most so often.
FIRST_DAMPING, DAMPING_GROWTH, NUM_DAMPINGS = 1e-3, 10.0, 40
# A direction that goes down by less than this share of |d| |g| is no better than rounding.
LEAST_DESCENT = 1e-10


class NewtonSystems:
    """Systems `(A + λI) d = -g` with a curvature A that is renewed every few iterations.

    Args:
        objective: Where A is taken.
        loss: `loss(x, y, *data)`, whose Hessian is A unless `curvature` is given.
        curvature: `curvature(x, y, *data)`, a symmetric operator.
        solver: For the systems; None for Cholesky up to 500 unknowns and inexact CG above. It should notice where a
            matrix is not definite.
        refresh_every: Iterations with one A.
    """

    def __init__(
        self,
        objective: Objective,
        loss: Callable[..., Tensor],
        curvature: Callable[..., LinearOperator] | None,
        solver: LinearSolver | None,
        refresh_every: int,
    ) -> None:
        self._objective, self._loss, self._curvature = objective, loss, curvature
        self._solver, self._refresh_every = solver, refresh_every
        self._A: LinearOperator | None = None
        self._y = objective.start
        self._made_at, self._least, self._num_failures = 0, 0.0, 0
        self._first_norm = 0.0
        self._last: tuple[LinearOperator, LinearSolver, Solution] | None = None

    def update(self, y: Tensor, num_iter: int) -> None:
        """Renew A at y if it is old at this iteration."""
        if self._A is None or num_iter - self._made_at >= self._refresh_every:
            self._A, self._y, self._made_at = self._make(y), y, num_iter
            self._least, self._num_failures = 0.0, 0

    def expire(self, num_iter: int) -> bool:
        """Have A renewed at the next update; False if it was made in this iteration."""
        if self._made_at == num_iter:
            return False
        self._A = None
        return True

    def stiffen(self, gradient: Tensor) -> bool:
        """Have the next `descent` damp more, after a line search that failed; False if that was done too often."""
        self._least = self._more(self._least, gradient)
        self._num_failures += 1
        return self._num_failures <= NUM_DAMPINGS

    def direction(self, gradient: Tensor, damping: float) -> Tensor:
        """`-(A + λI)⁻¹ g`; NaN where the matrix is not definite and the solver notices."""
        assert self._A is not None
        A, solver = self._A.damped(damping) if damping else self._A, self._solver or self._default(gradient)
        try:
            solution = solver.solve(A, -gradient)
        except LinAlgError:
            return torch.full_like(gradient, torch.nan)
        self._last = A, solver, solution
        return solution.value

    def descent(self, gradient: Tensor) -> tuple[Tensor, float]:
        """`-(A + λI)⁻¹ g` with the first λ of 0, δ, 10 δ, ... for which it goes down, and the slope along it."""
        direction = self.direction(gradient, self._least)
        slope, longest = _slope(gradient, direction)
        while not slope < -LEAST_DESCENT * longest:
            self._least = self._more(self._least, gradient)
            direction = self.direction(gradient, self._least)
            slope, longest = _slope(gradient, direction)
        return direction, slope

    def size(self, v: Tensor) -> float:
        """`|A v| / |v|`, the size of A along v, or eps if that is more."""
        assert self._A is not None
        size = torch.linalg.vector_norm(self._A @ v) / torch.linalg.vector_norm(v)
        return max(size.item(), torch.finfo(v.dtype).eps)

    def left_behind(self) -> LastFactor | None:
        """A solver by the last factor, if there is one."""
        return None if self._last is None else left_behind(*self._last)

    def _more(self, damping: float, gradient: Tensor) -> float:
        if damping:
            return DAMPING_GROWTH * damping
        shortest = (torch.linalg.vector_norm(gradient) / torch.linalg.vector_norm(self._y).clamp(min=1)).item()
        return FIRST_DAMPING * max(self.size(gradient), shortest)

    def _default(self, gradient: Tensor) -> LinearSolver:
        if len(gradient) <= DENSE_SIZE:
            return Cholesky()
        norm = torch.linalg.vector_norm(gradient).item()
        self._first_norm = self._first_norm or norm
        return CG(rtol=min(LOOSEST, (norm / self._first_norm) ** 0.5))

    def _make(self, y: Tensor) -> LinearOperator:
        point, (x, *data) = self._objective.unravel(y), self._objective.constants
        self._objective.num_evaluations += 1
        if self._curvature is None:
            loss = self._loss
            A = hessian(lambda y, x, *data: loss(x, y, *data), point, x, *data, check=self._last is None)
        else:
            A = self._curvature(x, point, *data)
        if not isinstance(A, LinearOperator) or not A.symmetric or A.vector_shape != y.shape or A.dtype != y.dtype:
            raise ValueError(
                f"{self._objective.name} needs a curvature that returns a symmetric LinearOperator on {len(y)} numbers "
                f"in {y.dtype}; got {A}"
            )
        return A


def check_systems(name: str, curvature: object, refresh_every: int, solver: object) -> None:
    """Refuse hyperparameters that `NewtonSystems` cannot take.

    Raises:
        TypeError: `curvature` is no function, or `solver` no linear solver.
        ValueError: `refresh_every` is not an integer of at least one.
    """
    if curvature is not None and not callable(curvature):
        raise TypeError(f"{name} needs a function curvature(x, y, *data), or None; got {type(curvature).__name__}")
    if solver is not None and not isinstance(solver, LinearSolver):
        raise TypeError(f"{name}(system_solver=...) needs a linear solver such as CG(); got {type(solver).__name__}")
    if not (isinstance(refresh_every, int) and refresh_every >= 1):
        raise ValueError(f"{name}(refresh_every=...) needs an integer of at least 1; got {refresh_every!r}.")


def _slope(gradient: Tensor, direction: Tensor) -> tuple[float, float]:
    """`gᵀd` and `|g| |d|`."""
    norms = torch.linalg.vector_norm(gradient) * torch.linalg.vector_norm(direction)
    slope, longest = torch.stack([gradient @ direction, norms]).tolist()
    return slope, longest
