"""Constrained minimisers: the conditions of Karush, Kuhn and Tucker."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad import tree
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.conditions.qualification import Qualification, check_active_tol, is_active, qualify
from implicitgrad.curvature import hvp
from implicitgrad.tree import Tree


@dataclass(frozen=True)
class KKT(OptimalityCondition):
    """`z` minimises an objective under constraints: `min_z f(x, z)` subject to `h(x, z) = 0` and `g(x, z) <= 0`.

    With multipliers ν and λ >= 0 the residual is

        ∇_z [f + νᵀh + Σ_active λᵢ gᵢ],    h,    gᵢ if i is active, otherwise λᵢ,

    where i is active if λᵢ > -gᵢ, so that the last part is `max(gᵢ, -λᵢ)` up to its sign: it vanishes exactly where
    `gᵢ <= 0`, `λᵢ >= 0` and `λᵢ gᵢ = 0`. An inactive inequality contributes exactly zero to every derivative, however
    rough its multiplier. The residual is the gradient of one scalar function, so its Jacobian is symmetric (and
    indefinite: MINRES, LDL, LU). Linear systems are restricted to z, ν and the active λ.

    Holds, with a unique derivative, under linear independence of the gradients of active constraints (LICQ), strict
    complementarity (`λᵢ > 0` wherever `gᵢ = 0`) and the second-order sufficient condition; `check` measures the first
    two. Second derivatives of f, h, g are needed. Give f, h, g comparable units: activity compares λᵢ with -gᵢ.

    `y = {"primal": z, "equality": ν, "inequality": λ}`, the last two only where there are such constraints and shaped
    like the values of h and g. With `recover_duals=True`, `y = z`: an inequality is active if `gᵢ >= -active_tol`, the
    multipliers are those of least squares, `(ν, λ)(z) = -(J Jᵀ)⁻¹ J ∇f` with the rows of J the gradients of active
    constraints, and the residual is `∇f + Jᵀ(ν, λ)(z) + Jᵀ(h, g_active)`. Its first two terms lie in the null space of
    J, the third in its row space, so it vanishes at the same points. It needs all rows of J, one reverse pass each,
    the Jacobian is not symmetric, and a derivative of order k takes derivatives of order k + 1 of f, h, g.

    Source: Fiacco (1976), "Sensitivity analysis for nonlinear programming using penalty methods"; the least-squares
    multipliers are Nocedal and Wright (2006), eq. 18.21. Blondel et al. (2022) use `λᵢ gᵢ` in place of the last part,
    whose Jacobian is not symmetric.

    Attributes:
        objective: Function of `(x, z, *data)` that returns a scalar tensor.
        equality: Function of the same that returns a tree of tensors, zero at the solution.
        inequality: Function of the same that returns a tree of tensors, none positive at the solution.
        recover_duals: The inner solver returns z alone.
        active_tol: Slacks, and multipliers, below this count as zero: in `check`, and with `recover_duals`.

    Raises:
        torch.linalg.LinAlgError: with `recover_duals`, LICQ fails.

    Example:
        >>> import torch, implicitgrad as ig
        >>> nearest = KKT(lambda x, z: (z - x).square().sum() / 2, inequality=lambda x, z: z - 1)
        >>> y = {"primal": torch.tensor([1.0, 0.5]), "inequality": torch.tensor([2.0, 0.0])}
        >>> x = torch.tensor([3.0, 0.5], requires_grad=True)
        >>> ig.implicit_root(nearest, x, y)["primal"].sum().backward()
        >>> print(f"{x.grad[1].item():.4f}")
        1.0000
    """

    objective: Callable[..., Tensor]
    equality: Callable[..., Tree] | None = None
    inequality: Callable[..., Tree] | None = None
    recover_duals: bool = False
    active_tol: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("objective", "equality", "inequality"):
            function = getattr(self, name)
            if not callable(function) and (function is not None or name == "objective"):
                raise TypeError(f"KKT needs {name} as a function of (x, z, *data), got {type(function).__name__}")
        check_active_tol(self.active_tol)

    @property
    def symmetric(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the Jacobian is symmetric: with the multipliers in y."""
        return not self.recover_duals

    @property
    def symmetric_by_construction(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The same: the residual is a gradient then."""
        return not self.recover_duals

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """A tree like `y`; see the class.

        Raises:
            ValueError: parts of y are missing or too many, or multipliers and constraints differ in shape.
        """
        if self.recover_duals:
            return self._primal_residual(x, y, *data)
        self._check_parts(y)
        return hvp.marked_grad(lambda point: self._lagrangian(x, point, *data), y)

    def support(self, x: Tree, y: Tree, *data: Tree) -> Tree | None:
        """True for z, ν and the multipliers of active inequalities."""
        if self.recover_duals or self.inequality is None:
            return None
        values = self.inequality(x, y["primal"], *data)
        everywhere = tree.map(lambda leaf: torch.ones_like(leaf, dtype=torch.bool), y)
        return {**everywhere, "inequality": tree.map(is_active, y["inequality"], values)}

    def complete(self, x: Tree, z: Tree, *data: Tree) -> dict[str, Tree]:
        """`{"primal": z, "equality": ν, "inequality": λ}` with the least-squares multipliers at z; plain numbers.

        Raises:
            torch.linalg.LinAlgError: the gradients of active constraints are linearly dependent.
        """
        x, z, data = tree.detach((x, z, data))
        parts = self._parts(x, *tree.ravel(z), *data)
        y: dict[str, Tree] = {"primal": z}
        for name, multiplier in zip(parts.unravel, parts.multipliers.split(parts.sizes), strict=True):
            y[name] = parts.unravel[name](multiplier)
        return tree.detach(y)

    def check(self, x: Tree, y: Tree, *data: Tree) -> Qualification:
        """How well the assumptions hold at y: LICQ, strict complementarity, feasibility; one reverse pass per row."""
        x, y, data = tree.detach((x, y, data))
        y = self.complete(x, y, *data) if self.recover_duals else y
        self._check_parts(y)
        parts = self._parts(x, *tree.ravel(y["primal"]), *data, multipliers=False)
        values = dict(zip(parts.unravel, parts.values.split(parts.sizes), strict=True))
        nothing = parts.values.new_zeros(0)
        g = values.get("inequality", nothing)
        lam = tree.ravel_like(parts.unravel["inequality"](g), y["inequality"]) if len(g) else nothing
        names = _names(parts.unravel["inequality"](g)) if len(g) else []
        return qualify(values.get("equality", nothing), g, lam, parts.rows, names, self.active_tol)

    def notes(self, x: Tree, y: Tree, *data: Tree) -> list[str]:
        """`check` in words."""
        return self.check(x, y, *data).notes(self.active_tol)

    def _check_parts(self, y: Tree) -> None:
        constraints = [name for name in ("equality", "inequality") if getattr(self, name) is not None]
        wanted = {"primal", *constraints}
        if not isinstance(y, dict) or set(y) != wanted:
            got = sorted(y) if isinstance(y, dict) else type(y).__name__
            raise ValueError(
                f"KKT needs y as a dict with the parts {sorted(wanted)}, got {got}; if the solver returns only the "
                "primal point, set recover_duals=True or return condition.complete(x, z, *data)"
            )

    def _lagrangian(self, x: Tree, y: Tree, *data: Tree) -> Tensor:
        """The function whose gradient is the residual."""
        z = y["primal"]
        terms = [tree.scalar(self.objective(x, z, *data), "the objective")]
        if self.equality is not None:
            terms += _paired(lambda nu, h: nu * h, y["equality"], self.equality(x, z, *data))
        if self.inequality is not None:
            term = lambda lam, g: torch.where(is_active(lam, g), lam * g, lam.square() / 2)
            terms += _paired(term, y["inequality"], self.inequality(x, z, *data))
        return torch.stack(terms).sum()

    def _primal_residual(self, x: Tree, z: Tree, *data: Tree) -> Tree:
        flat, unravel = tree.ravel(z)
        parts = self._parts(x, flat, unravel, *data)
        violation = torch.where(parts.active, parts.values, 0)
        return unravel(parts.gradient + (parts.multipliers + violation) @ parts.active_rows)

    def _parts(
        self, x: Tree, flat: Tensor, unravel: Callable[[Tensor], Tree], *data: Tree, multipliers: bool = True
    ) -> "_Parts":
        functions = {"equality": self.equality, "inequality": self.inequality}
        sizes: list[int] = []
        rebuild: dict[str, Callable[[Tensor], Tree]] = {}

        def constraints(point: Tensor) -> Tensor:
            vectors = [point.new_zeros(0)]
            sizes.clear()
            for name, function in functions.items():
                if function is not None:
                    vector, rebuild[name] = tree.ravel(function(x, unravel(point), *data))
                    sizes.append(len(vector))
                    vectors.append(vector)
            return torch.cat(vectors)

        values = constraints(flat)
        num_equalities = sizes[0] if self.equality is not None else 0
        active = values >= -self.active_tol
        active = torch.cat([torch.ones_like(active[:num_equalities]), active[num_equalities:]])
        rows = torch.func.jacrev(constraints)(flat)
        gradient = tree.grad(lambda point: self.objective(x, unravel(point), *data), flat)
        active_rows = torch.where(active.unsqueeze(-1), rows, 0)
        found = _least_squares_multipliers(active_rows, active, gradient) if multipliers else torch.zeros_like(values)
        return _Parts(values, active, rows, active_rows, gradient, found, list(sizes), rebuild)


class _Parts(NamedTuple):
    """What `KKT` computes from z alone; constraints in the order equalities, inequalities."""

    values: Tensor  # (p + m,)
    active: Tensor  # (p + m,)
    rows: Tensor  # (p + m, n)
    active_rows: Tensor  # the same, zero where inactive
    gradient: Tensor  # (n,), of the objective
    multipliers: Tensor  # (p + m,), zero where inactive
    sizes: list[int]  # of the kinds of constraints there are
    unravel: dict[str, Callable[[Tensor], Tree]]  # for each of them


def _least_squares_multipliers(rows: Tensor, active: Tensor, gradient: Tensor) -> Tensor:
    """`argmin ‖gradient + rowsᵀ u‖` over u that are zero where a row is inactive."""
    if not len(rows):
        return rows.new_zeros(0)
    gram = rows @ rows.mT + torch.diag_embed((~active).to(rows.dtype))
    try:
        # by the inverse: vmap of forward mode through torch.linalg.solve is wrong in torch 2.13
        return -(torch.linalg.inv(gram) @ (rows @ gradient))
    except LinAlgError:
        raise LinAlgError(
            "KKT: the gradients of active constraints are linearly dependent (LICQ fails), so multipliers are not "
            "unique; drop redundant constraints, or lower active_tol if inactive ones are taken for active"
        ) from None


def _paired(term: Callable[[Tensor, Tensor], Tensor], multipliers: Tree, values: Tree) -> list[Tensor]:
    """Sums of `term(multiplier, value)`, leaf by leaf."""

    def checked(multiplier: Tensor, value: Tensor) -> Tensor:
        if multiplier.shape != value.shape:
            raise ValueError(
                f"multipliers of shape {tuple(multiplier.shape)} for constraints of shape {tuple(value.shape)}; KKT "
                "needs one multiplier for every constraint"
            )
        return term(multiplier, value).sum()

    return tree.leaves(tree.map(checked, multipliers, values))


def _names(values: Tree) -> list[str]:
    """`inequality[3]`, or with the path of its leaf, `inequality['upper'][3]`."""
    found: list[str] = []
    for path, leaf in zip(tree.paths(values), tree.leaves(values), strict=True):
        found += [f"inequality{path}[{i}]" if leaf.dim() else f"inequality{path}" for i in range(leaf.numel())]
    return found
