"""Compare a hypergradient with finite differences of the re-solved problem, and name the likely cause of a mismatch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.hypergradient import Hypergradient, hypergradient
from implicitgrad.implicit import ImplicitSolver
from implicitgrad.linalg import AsymmetryError
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class HypergradientCheck:
    """Verdict of `check_hypergradient`; true when the hypergradient agrees with finite differences.

    Attributes:
        passed: Whether every direction agrees.
        cause: The likely cause of a mismatch; empty when passed.
        implicit: Slopes of the upper loss along the directions, by implicit differentiation; NaN if that failed.
        differences: The same by central differences of the re-solved problem.
        uncertainties: Error estimates of `differences`, from two step sizes.
        unrolled: The same by differentiating through the inner solver; empty if its operations leave no graph.
        inner_relative: Relative inner residual at the solution.
    """

    passed: bool
    cause: str
    implicit: tuple[float, ...]
    differences: tuple[float, ...]
    uncertainties: tuple[float, ...]
    unrolled: tuple[float, ...]
    inner_relative: float

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        lines = ["direction      implicit   differences   (uncertainty)" + ("      unrolled" if self.unrolled else "")]
        for i, values in enumerate(zip(self.implicit, self.differences, self.uncertainties, strict=True)):
            unrolled = f"  {self.unrolled[i]: .5e}" if self.unrolled else ""
            lines.append(f"{i:9d}  {values[0]: .5e}  {values[1]: .5e}  ({values[2]:.1e})    {unrolled}")
        lines.append(f"relative inner residual {self.inner_relative:.1e}")
        lines.append("PASSED" if self.passed else f"FAILED: {self.cause}")
        return "\n".join(lines)


def check_hypergradient(
    upper: Callable[..., Tensor],
    fit: ImplicitSolver,
    x: Tree,
    *data: Tree,
    upper_data: tuple = (),
    num_directions: int = 3,
    step: float | None = None,
    rtol: float | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> HypergradientCheck:
    """Check a decorated solver and its condition against re-solving the inner problem.

    Along random unit directions `d`, in each leaf of `x` and across all of them, the slope `⟨h, d⟩` is compared with
    `[F(x + εd, y(x + εd)) - F(x - εd, y(x - εd))] / 2ε` at two step sizes, extrapolated. The inner solver runs four
    times per direction, so it should be deterministic.

    Args:
        upper: `F(x, y, *upper_data)`, a scalar.
        fit: A function decorated with `implicit`.
        x: Where to check; a tree of floating point tensors.
        data: Further arguments of `fit`.
        upper_data: Further arguments of `upper`.
        num_directions: Directions per leaf, and for all leaves together.
        step: ε; by default `eps^(1/5) max(1, ‖x‖)`, 7e-4 in float64.
        rtol: Relative difference that passes, beside the uncertainty of the differences; 1e-5 in float64, 1e-2 below.
        seed: Of the random directions.
        verbose: Print the verdict.

    Returns:
        The verdict, with the figures.

    Raises:
        TypeError: `fit` was not made by `implicit`.

    Example:
        >>> import torch, implicitgrad as ig
        >>> @ig.implicit(ig.Stationary(lambda x, y: (y - 1).square() - x * y.square()))  # the solver adds the penalty
        ... def fit(x):
        ...     return 1 / (1 + x)
        >>> x = torch.tensor(0.1, dtype=torch.float64)
        >>> print(check_hypergradient(lambda x, y: y.square(), fit, x, verbose=False).cause)
        the sign of a term in the condition is wrong: ...
    """
    if not isinstance(fit, ImplicitSolver):
        raise TypeError(f"fit must be a function decorated with implicit, got {type(fit).__name__}")
    probe = _Probe(upper, fit, x, data, upper_data, step, rtol)
    directions = probe.directions(num_directions, seed)
    measured = [probe.differences(direction) for _, direction in directions]
    slopes, doubts = [slope for slope, _ in measured], [doubt for _, doubt in measured]
    unrolled = probe.unrolled([direction for _, direction in directions])
    try:
        exact = probe.hypergradient(fit.condition)
    except AsymmetryError as error:
        cause, implicit, inner = (
            f"the map is declared symmetric and is not: {error}",
            [math.nan] * len(slopes),
            math.nan,
        )
    else:
        implicit = [probe.slope(exact, direction) for _, direction in directions]
        inner = exact.report.inner_relative
        cause = probe.cause(exact, [leaf for leaf, _ in directions], implicit, slopes, doubts)
    result = HypergradientCheck(not cause, cause, tuple(implicit), tuple(slopes), tuple(doubts), tuple(unrolled), inner)
    if verbose:
        print(result)
    return result


class _Probe:
    def __init__(
        self,
        upper: Callable[..., Tensor],
        fit: ImplicitSolver,
        x: Tree,
        data: tuple,
        upper_data: tuple,
        step: float | None,
        rtol: float | None,
    ) -> None:
        self._upper, self._fit = upper, fit
        self._data, self._upper_data = tree.detach(data), upper_data
        self._leaves, self._rebuild = tree.flatten(tree.detach(x))
        self._names = tree.paths(x)
        for leaf in self._leaves:
            if not tree.is_differentiable(leaf):
                raise TypeError(f"x has a leaf of type {type(leaf).__name__}; every leaf must be a float tensor")
        size = math.sqrt(sum(leaf.square().sum().item() for leaf in self._leaves))
        precision = max(torch.finfo(leaf.dtype).eps for leaf in self._leaves)
        self._step = precision**0.2 * max(1.0, size) if step is None else step
        self._rtol = (1e-5 if precision < 1e-10 else 1e-2) if rtol is None else rtol

    def directions(self, count: int, seed: int) -> list[tuple[int | None, list[Tensor]]]:
        """Unit directions: `count` in each leaf, with its index, and `count` across all leaves (index None)."""
        generator = torch.Generator().manual_seed(seed)
        draw = lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
        chosen: list[int | None] = [*range(len(self._leaves))]
        if len(self._leaves) > 1:
            chosen.append(None)
        result = []
        for only in chosen:
            for _ in range(1 if only is not None and self._leaves[only].numel() == 1 else count):
                parts = [
                    draw(leaf) if only in (None, i) else torch.zeros_like(leaf) for i, leaf in enumerate(self._leaves)
                ]
                norm = math.sqrt(sum(part.square().sum().item() for part in parts))
                result.append((only, [part / norm for part in parts]))
        return result

    def differences(self, direction: list[Tensor]) -> tuple[float, float]:
        """Slope along `direction` by extrapolated central differences, and its uncertainty."""
        wide, narrow = (self._central(direction, self._step * factor) for factor in (1.0, 0.5))
        return (4 * narrow - wide) / 3, abs(narrow - wide) / 3

    def _central(self, direction: list[Tensor], step: float) -> float:
        ahead, behind = (
            self._value([leaf + sign * step * part for leaf, part in zip(self._leaves, direction, strict=True)])
            for sign in (1, -1)
        )
        return (ahead - behind) / (2 * step)

    def _value(self, leaves: list[Tensor]) -> float:
        x = self._rebuild(leaves)
        y, _ = self._fit.solve(x, *self._data)
        with torch.no_grad():
            return tree.scalar(self._upper(x, y, *self._upper_data), "the upper loss").item()

    def unrolled(self, directions: list[list[Tensor]]) -> list[float]:
        """Slopes by differentiating through the inner solver; none if it leaves no graph."""
        own = [leaf.clone().requires_grad_() for leaf in self._leaves]
        x = self._rebuild(own)
        try:
            with torch.enable_grad():
                result = self._fit.inner(x, *self._data)
                y = result[0] if self._fit.has_aux else result
                if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree.leaves(y)):
                    return []
                grads = torch.autograd.grad(self._upper(x, y, *self._upper_data), own, materialize_grads=True)
        except (RuntimeError, TypeError):  # most solvers cannot be unrolled: NumPy, in-place updates, detached loops
            return []
        return [sum((g * d).sum().item() for g, d in zip(grads, direction, strict=True)) for direction in directions]

    def hypergradient(self, condition: Any) -> Hypergradient:
        x = self._rebuild(self._leaves)
        y, _ = self._fit.solve(x, *self._data)
        return hypergradient(
            self._upper,
            condition,
            x,
            y,
            *self._data,
            upper_data=self._upper_data,
            solver=self._fit.options.solver,
            on_unconverged="ignore",
        )

    def slope(self, exact: Hypergradient, direction: list[Tensor]) -> float:
        return sum((g * d).sum().item() for g, d in zip(tree.leaves(exact.value), direction, strict=True))

    def cause(
        self,
        exact: Hypergradient,
        owners: list[int | None],
        implicit: list[float],
        slopes: list[float],
        doubts: list[float],
    ) -> str:
        """Why implicit and finite-difference slopes differ; empty if they agree."""
        scale = max(map(abs, slopes), default=0.0)
        # the inner solver's own error, if small, is noise on every value; if large it is a fault to be found
        jitter = 0.0
        if exact.report.inner_relative < 1e-5:
            y = exact.y_corrected
            with torch.no_grad():
                moved = self._upper(self._rebuild(self._leaves), y, *self._upper_data)
            jitter = 10 * abs(moved - exact.upper_value).item() / self._step
        allowed = [self._rtol * scale + 10 * doubt + jitter for doubt in doubts]
        wrong = [not abs(a - b) <= limit for a, b, limit in zip(implicit, slopes, allowed, strict=True)]
        if not any(wrong):
            return ""
        record = exact.report
        for i in sorted({owner for owner in owners if owner is not None}):
            mine = [k for k, owner in enumerate(owners) if owner == i]
            if any(wrong[k] for k in mine) and self._ignores(exact, i):
                return (
                    f"the condition ignores x{self._names[i]}, while the re-solved problem depends on it: use it in "
                    "the condition"
                )
        overlap = sum(a * b for a, b in zip(implicit, slopes, strict=True))
        if overlap < 0:
            return (
                "the sign of a term in the condition is wrong: implicit and finite-difference slopes point in opposite "
                f"directions (relative inner residual {record.inner_relative:.1e})"
            )
        if record.inner_relative > 0.3:
            return (
                f"the condition does not hold at the solver's result (relative residual {record.inner_relative:.1e}): "
                "a term is missing or has the wrong sign, or the inner solver has hardly started"
            )
        if record.inner_relative > 1e3 * torch.finfo(exact.upper_value.dtype).eps ** 0.75:
            return (
                f"the inner solver stops early: relative inner residual {record.inner_relative:.1e}, estimated "
                f"hypergradient error {exact.error_estimate:.1e}; give it more iterations or a smaller tolerance"
            )
        if not all(solve.converged for solve in record.solves):
            return f"the linear system was not solved: {record.reason}"
        return (
            "the condition holds at the solution but its derivative is another one: something in it is detached or "
            "rounded, the solution is not unique, or it is not smooth here"
        )

    def _ignores(self, exact: Hypergradient, leaf: int) -> bool:
        """Whether the residual does not change with a leaf of `x`."""
        own = [part.clone().requires_grad_(i == leaf) for i, part in enumerate(self._leaves)]
        with torch.enable_grad():
            residual = self._fit.condition.residual(self._rebuild(own), exact.y, *self._data)
            total = torch.stack([part.sin().sum() for part in tree.leaves(residual)]).sum()
        if not total.requires_grad:
            return True
        return not torch.autograd.grad(total, own[leaf], materialize_grads=True)[0].any()
