"""A loop over any optimizer of `torch.optim`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions import Stationary
from implicitgrad.linalg import LinearSolver
from implicitgrad.linalg.rows import check_every
from implicitgrad.solvers.objective import Objective, check_hyperparameters, tolerance
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree

IDLE_STEPS = 8  # that many without a change are the end; Rprop now and then makes one


@dataclass(frozen=True)
class TorchOptim(InnerSolver):
    """Minimises a loss with any optimizer of `torch.optim` until its gradient is small.

    Costs one gradient and one step of the optimizer per iteration (what its `step(closure)` evaluates; `LBFGS` more),
    and a copy of y. On a device the gradient norm is read every 8 iterations only.

    An optimizer with weight decay minimises another function than `loss`: put the penalty into the loss. With a
    constant learning rate Adam settles at a gradient norm in proportion to it, seldom below 1e-4: follow it by
    `LBFGS` or `Newton` with `init` at its result.

    Args:
        loss: `loss(x, y, *data)`, a scalar tensor, differentiable in y.
        optimizer: Makes the optimizer from the list of the leaves of y: `lambda y: torch.optim.SGD(y, lr=0.1)`.
        tol: Largest gradient norm that counts as solved, absolute; None for 1e-8 in float64, 1e-5 in float32.
        max_iter: Steps of the optimizer.
        linear_solver: For the systems of the derivative; None for `Auto()`.

    Raises:
        TypeError: `loss` or `optimizer` is no function, or the latter makes something else.
        ValueError: a hyperparameter out of range; in a run, a loss that does not depend on y.
        FloatingPointError: in a run, NaN or infinity in the loss or its gradient, also after divergence.

    Example:
        >>> import torch
        >>> loss = lambda x, y: (y["w"] - x).square().sum() + y["w"].square().sum()
        >>> solver = TorchOptim(loss, lambda y: torch.optim.SGD(y, lr=0.2))
        >>> x = torch.tensor([2.0, 4.0], requires_grad=True)
        >>> y, info = solver(x, init={"w": torch.zeros(2)})
        >>> torch.autograd.grad(y["w"].sum(), x)[0], info.converged
        (tensor([0.5000, 0.5000]), True)
    """

    loss: Callable[..., Tensor]
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    tol: float | None = None
    max_iter: int = 1000
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        if not callable(self.optimizer):
            raise TypeError(
                f"TorchOptim needs a function that makes an optimizer, such as lambda y: torch.optim.Adam(y, lr=0.01); "
                f"got {type(self.optimizer).__name__}"
            )
        check_hyperparameters("TorchOptim", self.loss, self.tol, self.max_iter)

    @property
    def condition(self) -> Stationary:
        """The gradient of the loss vanishes."""
        return Stationary(self.loss)

    def run(self, x: Tree, init: Tree, *data: Tree) -> tuple[Tree, SolverInfo]:
        objective = Objective("TorchOptim", self.loss, x, init, data)
        tol = tolerance(self.tol, objective.start.dtype)
        parts = [leaf.clone().requires_grad_() for leaf in tree.leaves(objective.unravel(objective.start))]
        optimizer = self.optimizer(parts)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
        measured: list[tuple[Tensor, Tensor]] = []

        def closure() -> Tensor:
            loss, gradient = objective.value_and_gradient(_joined(parts))
            for part, piece in zip(parts, tree.leaves(objective.unravel(gradient)), strict=True):
                part.grad = piece.clone()
            measured.append((loss, gradient))
            return loss

        num_idle = 0
        every = check_every(objective.start)
        for num_iter in range(self.max_iter):
            before = _joined(parts)
            measured.clear()
            optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]
            if num_iter % every == 0:
                value, norm = objective.checked(*measured[0])  # the first evaluation of a step is at `before`
                num_idle = num_idle + 1 if torch.equal(before, _joined(parts)) else 0
                if norm <= tol or num_idle == IDLE_STEPS:
                    reason = "the optimizer no longer moves"
                    return objective.outcome(
                        before, num_iter=num_iter, residual_norm=norm, tol=tol, reason=reason, value=value
                    )
        y = _joined(parts)
        value, norm = objective.checked(*objective.value_and_gradient(y))
        return objective.outcome(
            y, num_iter=self.max_iter, residual_norm=norm, tol=tol, reason="max_iter reached", value=value
        )


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])
