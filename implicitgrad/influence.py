"""What a trained model owes to single training examples: influence on test losses, and removal without retraining.

With the objective `f(y) = mean_i loss_i(y) + R(y)` at its minimum and `H = ∇²f`, retraining without a set S of the N
examples, the regulariser R unchanged, minimises `f_S = mean_{i not in S} loss_i + R` and moves the parameters by

    y_S - y  ≈  H⁻¹ Σ_{i in S} (∇loss_i + ∇R) / N.

Source: Koh and Liang (2017), "Understanding black-box predictions via influence functions", section 2.1, where R is
part of every `loss_i`, as it is here; Guo, Goldstein, Hannun, van der Maaten (2020), "Certified data removal from
machine learning models", section 3.1, for the Newton step of `Influence.remove`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from implicitgrad import closure, report, tree
from implicitgrad.curvature import gauss_newton, hessian
from implicitgrad.curvature.examples import by_example, check_mean, num_examples, select
from implicitgrad.curvature.point import Point
from implicitgrad.linalg import Auto, LinearOperator, LinearSolver
from implicitgrad.linalg.certificate import solution_error
from implicitgrad.report import LinearSolve, OnUnconverged, Policy, Report
from implicitgrad.tree import Tree

Examples = tuple[Tree, Tree]  # inputs and targets; the first dimension of every tensor counts examples

# Gradients of single examples are made in blocks of so many numbers: 32 MB in float64.
NUMBERS_PER_BLOCK = 2**22


class Influence:
    """Influence of the examples a model was trained on, at parameters that minimise the training objective.

    The objective is `loss(model(params, inputs), targets) + regulariser(params)` with a loss that is the mean of its
    values on single examples. Its curvature H is one operator for all questions: the graph of the objective on all
    training examples is kept, a factorisation or preconditioner of the solver is made once.

    Predictions are of first order in 1 / N. They are as good as the objective is convex and as `params` minimise it:
    how far they are from that is measured and reported. Where H is indefinite take `curvature="gauss_newton"` or a
    damping; the predictions are then those for another objective.

    Args:
        model: `model(params, inputs) -> outputs`, a tensor `(N, ...)` or a tree of them, the outputs of each example
            depending on that example alone; `implicitgrad.functional(net)` makes one of a module.
        loss: `loss(outputs, targets) -> scalar`, the mean of its values on single examples: without class weights or
            ignored labels.
        params: Trained parameters, a tree of floating point tensors with n numbers.
        train: Inputs and targets of the N training examples: tensors, or trees of them, whose first dimension is N.
        regulariser: `regulariser(params) -> scalar`, what the objective has besides the loss.
        damping: λ >= 0, added to H as λI. It is no part of the objective; a penalty that was trained with belongs into
            `regulariser`.
        curvature: `"hessian"`, or `"gauss_newton"` for the part of it that is positive semidefinite by construction
            (the Hessian of the regulariser is added).
        solver: For systems with H; `Auto()` if None.
        on_unconverged: `"warn"` once per call site, `"raise"` a `ConvergenceError`, or `"ignore"`, when `params` are
            not stationary or a linear system misses its tolerance.
        inner_tolerance: Largest `‖∇f‖ / ‖H params‖` that passes; no unit.

    Attributes:
        params: Copies of the parameters; what is written into them changes nothing else.
        operator: H, damping included.
        report: `inner_residual` is the gradient norm of the objective at `params`; every linear solve is added.

    Raises:
        TypeError: parameters, data or outputs that are not tensors, a solver that is none.
        ValueError: numbers of examples that differ, a loss that is not the mean over examples, a bad option.
        FloatingPointError: NaN or infinity in the derivative of the loss or the gradient of the objective.

    Example:
        >>> X, t = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 6.0])
        >>> square = lambda outputs, targets: (outputs - targets).square().mean()
        >>> fit = Influence(lambda y, X: X @ y, square, torch.tensor([23 / 14]), train=(X, t))
        >>> fit.remove([2])  # least squares through the origin of the two that are left
        tensor([1.])
        >>> fit.scores(X, t).shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        model: Callable[[Tree, Any], Any],
        loss: Callable[[Any, Any], Tensor],
        params: Tree,
        train: Examples,
        *,
        regulariser: Callable[[Tree], Tensor] | None = None,
        damping: float = 0.0,
        curvature: Literal["hessian", "gauss_newton"] = "hessian",
        solver: LinearSolver | None = None,
        on_unconverged: OnUnconverged = "warn",
        inner_tolerance: float = 1e-3,
    ) -> None:
        if curvature not in ("hessian", "gauss_newton"):
            raise ValueError(f'curvature must be "hessian" or "gauss_newton", got {curvature!r}')
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping must be finite and not negative, got {damping}")
        if not (solver is None or isinstance(solver, LinearSolver)):
            raise TypeError(f"solver must be a LinearSolver like CG(), got {solver!r}")
        self._policy = Policy(on_unconverged, inner_tolerance)
        self._model, self._loss, self._regulariser = model, loss, regulariser
        self._damping, self._curvature = damping, curvature
        self._solver = Auto() if solver is None else solver
        self._train = self._checked("train", train)
        self._num_train = num_examples("train", *self._train)
        self._point = Point("Influence", params, model, loss, regulariser, train)
        self._params = self._point.unravel(self._point.flat)
        self.params = tree.map(Tensor.clone, self._params)
        check_mean(self._point, model, loss, *self._train)
        self.operator = self._curvature_on(self._train, check=True)
        self._penalty_slope = torch.zeros_like(self._point.flat) if regulariser is None else self._slope(regulariser)
        self.report = self._measure()

    def scores(self, inputs: Tree, targets: Tree) -> Tensor:
        """Predicted change of each test example's loss when one training example is removed and the model retrained.

        `scores[t, i] = ∇loss_t · H⁻¹ (∇loss_i + ∇R) / N`: positive where training example i helps, since the test loss
        rises without it. Scores add up over a group of examples, to first order.

        One solve with all test gradients as right-hand sides, and one gradient per example. Memory: the T test
        gradients of n numbers each, with what the solver keeps per right-hand side.

        Args:
            inputs: Test inputs, like the training inputs with T examples.
            targets: Test targets.

        Returns:
            `(T, N)`.
        """
        test = self._checked("the test set", (inputs, targets))
        adjoints = self._solve(self.operator, torch.cat(list(self._gradients(test))), "adjoint")
        columns = [adjoints @ (rows + self._penalty_slope).mT for rows in self._gradients(self._train)]
        return torch.cat(columns, dim=1) / self._num_train

    def self_influence(self) -> Tensor:
        """Predicted rise of each training example's own loss when it is removed; large for outliers, wrong labels.

        `∇loss_i · H⁻¹ (∇loss_i + ∇R) / N`. One solve per training example, in blocks: cheap while H is small enough for
        a factor, N solves by iteration where it is not.

        Returns:
            `(N,)`.
        """
        effects = []
        for rows in self._gradients(self._train):
            adjoints = self._solve(self.operator, rows, "adjoint")
            effects.append((adjoints * (rows + self._penalty_slope)).sum(1))
        return torch.cat(effects) / self._num_train

    def group_effect(self, indices: Sequence[int] | Tensor, inputs: Tree, targets: Tree) -> Tensor:
        """Predicted change of each test example's loss when a group of training examples is removed together.

        The sum of their `scores` by one solve, whatever the number of test examples. Of first order in the size of the
        group; where that is too rough, evaluate the losses at the parameters that `remove` returns.

        Args:
            indices: Training examples, as in `remove`.
            inputs: Test inputs with T examples.
            targets: Test targets.

        Returns:
            `(T,)`.
        """
        test = self._checked("the test set", (inputs, targets))
        group = self._group(indices)
        slopes = sum(rows.sum(0) for rows in self._gradients(select(self._train, group.tolist())))
        slope = (slopes + len(group) * self._penalty_slope) / self._num_train
        change = self._solve(self.operator, slope, "tangent")
        return torch.cat([rows @ change for rows in self._gradients(test)])

    def remove(self, indices: Sequence[int] | Tensor) -> Tree:
        """Parameters without these training examples: one Newton step on the objective of those that are left.

        `y - H_S⁻¹ ∇f_S(y)`, the minimum itself where the objective is quadratic; otherwise off by the square of the
        distance moved. For stationary `params` it is the step of Guo et al., whose certificate also asks for a random
        linear term in the objective. Costs one graph of the remaining examples and one solve.

        Args:
            indices: Positions of training examples, or a mask `(N,)` of booleans.

        Returns:
            A tree like `params`.

        Raises:
            TypeError: indices that are neither integers nor booleans.
            ValueError: no index, one that is out of range or given twice, or all examples.
        """
        group = self._group(indices)
        left = torch.ones(self._num_train, dtype=torch.bool, device=group.device)
        left[group] = False
        rest = select(self._train, left.nonzero().squeeze(1).tolist())
        slope = self._slope(lambda params: self._objective(params, *rest))
        step = self._solve(self._curvature_on(rest, check=False), slope, "tangent")
        return self._point.unravel(self._point.flat - step)

    def _objective(self, params: Tree, inputs: Tree, targets: Tree) -> Tensor:
        value = tree.scalar(self._loss(self._model(params, inputs), targets))
        if self._regulariser is None:
            return value
        return value + tree.scalar(self._regulariser(params), "the regulariser")

    def _curvature_on(self, examples: Examples, check: bool) -> LinearOperator:
        if self._curvature == "hessian":
            operator = hessian(self._objective, self._params, *examples, check=check)
        else:
            operator = gauss_newton(self._model, self._loss, self._params, *examples, check=check)
            if self._regulariser is not None:
                operator = operator + hessian(self._regulariser, self._params, check=check)
        return operator.damped(self._damping) if self._damping else operator

    def _slope(self, fn: Callable[[Tree], Tensor]) -> Tensor:
        """Gradient `(n,)` of a function of the parameters."""
        with self._point.evaluation():
            return tree.ravel_like(self._params, tree.grad(fn, self._params)).detach()

    def _loss_of_one(self, flat: Tensor, inputs: Tree, targets: Tree) -> Tensor:
        inputs, targets = tree.map(lambda leaf: leaf.unsqueeze(0), (inputs, targets))
        return tree.scalar(self._loss(self._model(self._point.unravel(flat), inputs), targets))

    def _gradients(self, examples: Examples) -> Iterator[Tensor]:
        """Gradients `(k, n)` of the losses of single examples, block by block in order."""
        flat = self._point.flat
        batchable = lambda *one: torch.func.grad(self._loss_of_one)(flat, *one)
        eager = lambda *one: tree.grad(lambda flat: self._loss_of_one(flat, *one), flat)
        return by_example(self._point, batchable, eager, examples, max(1, NUMBERS_PER_BLOCK // len(flat)))

    def _solve(self, operator: LinearOperator, b: Tensor, kind: Literal["adjoint", "tangent"]) -> Tensor:
        start = time.perf_counter()
        solution = self._solver.solve(operator, b)
        bound = solution_error(operator, b, solution, dense=False)
        record = LinearSolve.of(kind, solution, bound, time.perf_counter() - start)
        self.report.solves.append(record)
        report.publish(self.report)
        replace(self._policy, site=report.call_site()).judge_solve(record)
        return solution.value

    def _measure(self) -> Report:
        """How far the parameters are from stationary, judged."""
        start = time.perf_counter()
        slope = self._slope(lambda params: self._objective(params, *self._train))
        report.check_finite(slope, "the gradient of the training objective")
        norm = torch.linalg.vector_norm(slope)
        size = torch.linalg.vector_norm(self.operator @ self._point.flat)
        relative = torch.where(norm > 0, norm / size, 0).item()
        measured = Report(
            condition="training objective",
            size=len(slope),
            inner_residual=norm.item(),
            inner_relative=relative,
            inner_converged=relative <= self._policy.inner_tolerance,
            seconds=time.perf_counter() - start,
        )
        report.publish(measured)
        replace(self._policy, site=report.call_site()).judge_inner(measured)
        return measured

    def _checked(self, name: str, examples: Examples) -> Examples:
        """Examples cut off from the graph.

        Raises:
            TypeError: not a pair, or something that is no tensor.
            ValueError: first dimensions that differ, or no example at all.
        """
        if not isinstance(examples, tuple) or len(examples) != 2:
            raise TypeError(f"{name} must be a pair (inputs, targets), got {type(examples).__name__}")
        num_examples(name, *examples)
        return tree.map(closure.without_derivative, examples)

    def _group(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Checked positions `(m,)` of training examples."""
        total = self._num_train
        group = torch.as_tensor(indices, device=self._point.flat.device)
        if group.dtype == torch.bool and group.shape == (total,):
            group = group.nonzero().squeeze(1)
        if group.numel() == 0 or group.numel() >= total:
            raise ValueError(f"indices must leave out 1 to {total - 1} of {total} examples, got {group.numel()}")
        if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool or group.dim() != 1:
            raise TypeError(
                f"indices must be integers in one dimension or a mask of shape ({total},), got {group.dtype} of shape"
                f" {tuple(group.shape)}"
            )
        if group.min() < 0 or group.max() >= total or len(group.unique()) < len(group):
            raise ValueError(f"indices must be different numbers from 0 to {total - 1}, got {group.tolist()[:10]}")
        return group
