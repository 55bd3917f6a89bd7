"""Deep equilibrium layers: the output is a fixed point of a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from implicitgrad import internals, tree
from implicitgrad.curvature import jacobian
from implicitgrad.linalg import GMRES, LinearSolver
from implicitgrad.solvers.anderson import Anderson
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.tree import Tree


class FixedPointLayer(nn.Module):
    """The z with `z = module(z, *inputs)`, differentiable in inputs and parameters: a deep equilibrium layer.

    Forward, a solver finds z without a graph; backward, one linear system with `I - ∂module/∂z` gives the gradient. So
    memory does not grow with the number of iterations: one evaluation of the module and the vectors of the solvers.
    Exact at a fixed point, with a unique derivative where `I - ∂module/∂z` is nonsingular. Modules that contract have
    a unique fixed point; `spectral_radius` tells whether the module does so at z, and `jacobian_penalty` trains it to.

    A batch is ONE flat system: examples share the coefficients of Anderson's method and of Krylov methods, and stop
    together when the norm over the whole batch meets the tolerance. For a solver per example use
    `torch.func.vmap(layer)`, a loop in the forward pass.

    Evaluations are repeatable: dropout is one mask per call, running statistics do not move, and the random state is
    left as it was, so that the next call draws the same mask unless something else draws in between.
    `jacobian_penalty` runs the module in the usual way, once per sample.

    Args:
        module: `module(z, *inputs)` returns a tree like z.
        solver: Makes the forward solver from the step: `Anderson`, or `functools.partial(Anderson, tol=1e-6)`, or
            `FixedPointIteration`; called as `solver(step, linear_solver=...)`.
        linear_solver: For the backward system: `BiCGSTAB()` with less memory, `Neumann(num_terms=20)`, whose T terms
            are the gradient of the last T unrolled steps; None for `GMRES(restart=20)`, whose basis of 21 vectors is
            the larger part of the memory.
        initial: `initial(*inputs)` returns a z to start from; zeros like the first input by default.
        warm_start: Start from the z of the last call where that has the same shape.

    Attributes:
        info: `SolverInfo` of the last call; None before.

    Source: Bai, Kolter and Koltun (2019), "Deep equilibrium models".

    Raises:
        TypeError: `module` is no module, or `solver` makes no inner solver.

    Example:
        >>> class Cell(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(0.1 * torch.ones(3, 3))
        ...     def forward(self, z, inputs):
        ...         return torch.tanh(z @ self.weight + inputs)
        >>> layer = FixedPointLayer(Cell())
        >>> z = layer(torch.ones(2, 3))
        >>> z.sum().backward()
        >>> layer.info.converged, layer.module.weight.grad.shape
        (True, torch.Size([3, 3]))
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        solver: Callable[..., InnerSolver] = Anderson,
        linear_solver: LinearSolver | None = None,
        initial: Callable[..., Tree] | None = None,
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"FixedPointLayer needs an nn.Module that maps (z, *inputs) to z, got {type(module).__name__}"
            )
        self.module = module
        self.info: SolverInfo | None = None
        self._warm_start = warm_start
        self._initial = initial or _zeros_like_first
        self._last: Tree = None
        self._num_penalties = 0
        self._solver = solver(self._step, linear_solver=linear_solver or GMRES(restart=20))
        if not isinstance(self._solver, InnerSolver):
            raise TypeError(f"solver must make an InnerSolver, such as Anderson, got {type(self._solver).__name__}")

    def _step(self, parameters: dict[str, Tensor], z: Tree, *inputs: Tree) -> Tree:
        return torch.func.functional_call(self.module, parameters, (z, *inputs))

    def forward(self, *inputs: Tree, init: Tree = None) -> Tree:
        """The fixed point.

        Args:
            inputs: What the module takes besides z.
            init: Where to start, a tree like z; comes before `warm_start` and `initial`.

        Raises:
            FloatingPointError: NaN or infinity on the way.
        """
        start = self._start(inputs) if init is None else init
        z, self.info = self._solver(dict(self.module.named_parameters()), *inputs, init=start)
        if self._warm_start and not internals.transforming():
            self._last = tree.detach(z)
        return z

    def _start(self, inputs: tuple[Tree, ...]) -> Tree:
        start = self._initial(*inputs)
        if self._last is None or internals.transforming():
            return start
        kinds = [[(leaf.shape, leaf.dtype, leaf.device) for leaf in tree.leaves(z)] for z in (start, self._last)]
        return self._last if kinds[0] == kinds[1] else start

    def jacobian_penalty(
        self, z: Tree, *inputs: Tree, num_samples: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """An estimate of `‖∂module/∂z‖² / n` in the Frobenius norm, differentiable: `mean |Jᵀε|² / n`, ε normal.

        Added to a training loss it keeps the module contracting, so that both passes need fewer iterations:
        `loss = task(z) + 0.1 * layer.jacobian_penalty(z, x)`. One evaluation of the module and one reverse pass per
        sample; it must have a double backward.

        Args:
            z: What the layer returned, with n numbers. The gradient goes through it, too, at no further linear system:
                it adds to that of the task; `z.detach()` leaves this part out.
            inputs: Those of the layer.
            num_samples: Directions ε.
            generator: Draws them; by default one seeded by the number of penalties so far.

        Returns:
            0-dimensional.

        Source: Bai, Koltun and Kolter (2021), "Stabilizing equilibrium models by Jacobian regularization", eq. 5.
        Departure: there the gradient through z is left out.

        Raises:
            ValueError: `num_samples` below one.
        """
        if not (isinstance(num_samples, int) and num_samples >= 1):
            raise ValueError(f"jacobian_penalty(num_samples=...) needs an integer of at least 1; got {num_samples!r}.")
        generator = generator or torch.Generator().manual_seed(self._num_penalties)
        self._num_penalties += 1
        flat, unravel = tree.ravel(z)
        values = lambda vector: tree.ravel_like(z, self.module(unravel(vector), *inputs))
        squares = []
        for _ in range(num_samples):
            (product,) = tree.vjp(values, (flat,), _normal(flat, generator))
            assert product is not None
            squares.append(product.square().mean())
        return torch.stack(squares).mean()

    def spectral_radius(
        self, z: Tree, *inputs: Tree, num_iter: int = 50, generator: torch.Generator | None = None
    ) -> float:
        """An estimate of the largest modulus of an eigenvalue of `∂module/∂z`, over the whole batch.

        Below one, plain iteration near z and the Neumann series converge, at this rate. By power iteration: the mean
        growth of `|Jᵀv|` over its second half, which holds for complex pairs of eigenvalues, too. Costs one evaluation
        and `num_iter` reverse passes; the error falls at least like 1 / num_iter for a diagonalisable Jacobian.

        Args:
            z: What the layer returned.
            inputs: Those of the layer.
            num_iter: Products, two or more.
            generator: Draws the first v; seeded with zero by default.

        Raises:
            ValueError: `num_iter` below two.
            FloatingPointError: NaN or infinity in the products.
        """
        if not (isinstance(num_iter, int) and num_iter >= 2):
            raise ValueError(f"spectral_radius(num_iter=...) needs an integer of at least 2; got {num_iter!r}.")
        J = jacobian(lambda z, *inputs: self.module(z, *inputs), z, *inputs, check=False)
        v = _normal(tree.ravel(tree.detach(z))[0], generator or torch.Generator().manual_seed(0))
        growths = []
        for _ in range(num_iter):
            v = J.T @ (v / torch.linalg.vector_norm(v).clamp(min=torch.finfo(v.dtype).tiny))
            growths.append(torch.linalg.vector_norm(v))
        radius = torch.stack(growths[num_iter // 2 :]).log().mean().exp().item()
        if not radius < float("inf"):
            raise FloatingPointError(
                f"spectral_radius: a product with the Jacobian is {radius}; check z and the inputs"
            )
        return radius


def _zeros_like_first(*inputs: Any) -> Tree:
    if not inputs:
        raise ValueError("FixedPointLayer: without inputs give initial=..., a function that returns a z to start from")
    return tree.map(torch.zeros_like, inputs[0])


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
