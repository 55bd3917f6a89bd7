"""Quadratic programs: minimisers of a quadratic function under linear constraints, all matrices differentiable."""

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitgrad import tree
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.conditions.qualification import Qualification, check_active_tol, is_active, qualify
from implicitgrad.tree import Tree

NAMES = ("Q", "c", "A", "b", "G", "h")


@dataclass(frozen=True)
class QP(OptimalityCondition):
    """`z` solves a quadratic program: `min_z zᵀQz / 2 + cᵀz` subject to `A z = b` and `G z <= h`.

    `x` is a dict of some of `Q: (n, n)`, `c: (n,)`, `A: (p, n)`, `b: (p,)`, `G: (m, n)`, `h: (m,)`, further dicts in
    `data` hold the rest. Q or c, A with b, or G with h may be left out. Only the symmetric part of Q counts. The
    solution is `y = {"primal": z, "equality": ν, "inequality": λ}`, the last two where there are such constraints, and
    the residual that of `KKT`, written out:

        Q z + c + Aᵀν + Σ_active λᵢ Gᵢ,    A z - b,    (G z - h)ᵢ if i is active, otherwise λᵢ,

    where i is active if `λᵢ > (h - G z)ᵢ`. Derivatives of every order in every matrix and vector take systems with one
    symmetric matrix, `[Q, Aᵀ, G_activeᵀ; A, 0, 0; G_active, 0, 0]`. It is regular if the rows of A and the active rows
    of G are linearly independent and Q is definite on their null space; the derivative is unique if besides no
    inequality has multiplier and slack both zero (see `check`). Q may be singular, or absent in a linear program.

    Source: Amos and Kolter (2017), "OptNet: differentiable optimization as a layer in neural networks", eq. 6 to 8;
    their system has a row `λᵢ Gᵢ dz + (G z - h)ᵢ dλᵢ` for every inequality, this one only active ones.

    Attributes:
        active_tol: Multipliers and slacks below this count as zero in `check`.

    Example:
        >>> import torch, implicitgrad as ig
        >>> problem = {"Q": torch.eye(2), "c": torch.tensor([-3.0, -0.5], requires_grad=True)}
        >>> problem |= {"G": torch.eye(2), "h": torch.ones(2)}
        >>> y = {"primal": torch.tensor([1.0, 0.5]), "inequality": torch.tensor([2.0, 0.0])}
        >>> ig.implicit_root(QP(), problem, y)["primal"].sum().backward()
        >>> print(f"{problem['c'].grad[1].item():.4f}")
        -1.0000
    """

    active_tol: float = 1e-6
    symmetric = True
    symmetric_by_construction = True

    def __post_init__(self) -> None:
        check_active_tol(self.active_tol)

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """A tree like `y`; see the class.

        Raises:
            TypeError: `x` or `data` are no dicts of tensors.
            ValueError: parts are missing, unknown, given twice, or of shapes that do not fit.
        """
        problem = gathered(x, data)
        check_solution(problem, y)
        z = y["primal"]
        stationarity = torch.zeros_like(z)
        if "Q" in problem:
            stationarity = stationarity + (problem["Q"] @ z + problem["Q"].mT @ z) / 2
        if "c" in problem:
            stationarity = stationarity + problem["c"]
        rest = {}
        if "A" in problem:
            stationarity = stationarity + problem["A"].mT @ y["equality"]
            rest["equality"] = problem["A"] @ z - problem["b"]
        if "G" in problem:
            value = problem["G"] @ z - problem["h"]
            active = is_active(y["inequality"], value)
            stationarity = stationarity + problem["G"].mT @ torch.where(active, y["inequality"], 0)
            rest["inequality"] = torch.where(active, value, y["inequality"])
        return {"primal": stationarity, **rest}

    def support(self, x: Tree, y: Tree, *data: Tree) -> Tree | None:
        """True for z, ν and the multipliers of active inequalities."""
        problem = gathered(x, data)
        if "G" not in problem:
            return None
        everywhere = tree.map(lambda leaf: torch.ones_like(leaf, dtype=torch.bool), y)
        return {**everywhere, "inequality": is_active(y["inequality"], problem["G"] @ y["primal"] - problem["h"])}

    def check(self, x: Tree, y: Tree, *data: Tree) -> Qualification:
        """How well the assumptions hold at y, for one problem: LICQ, strict complementarity, feasibility."""
        x, y, data = tree.detach((x, y, data))
        problem = gathered(x, data)
        check_solution(problem, y)
        z = y["primal"]
        nothing, no_rows = z.new_zeros(0), z.new_zeros(0, len(z))
        h = problem["A"] @ z - problem["b"] if "A" in problem else nothing
        g = problem["G"] @ z - problem["h"] if "G" in problem else nothing
        rows = torch.cat([problem.get(name, no_rows) for name in ("A", "G")])  # pyright: ignore[reportArgumentType]
        names = [f"inequality[{i}]" for i in range(len(g))]
        return qualify(h, g, y.get("inequality", nothing), rows, names, self.active_tol)

    def notes(self, x: Tree, y: Tree, *data: Tree) -> list[str]:
        """`check` in words."""
        return self.check(x, y, *data).notes(self.active_tol)


def gathered(x: Tree, data: tuple) -> dict[str, Tensor]:
    """The parts of a quadratic program from `x` and `data`, checked to be complete.

    Raises:
        TypeError: no dicts, or parts that are no tensors.
        ValueError: an unknown part, one given twice, or one without its other half.
    """
    problem: dict[str, Tensor] = {}
    for part in (x, *data):
        if not isinstance(part, dict):
            raise TypeError(f"a QP needs dicts of Q, c, A, b, G, h for x and data, got {type(part).__name__}")
        for name, value in part.items():
            if name not in NAMES or not isinstance(value, Tensor):
                raise (ValueError if name not in NAMES else TypeError)(
                    f"a QP has tensors named Q, c, A, b, G, h; got {name!r}: {type(value).__name__}"
                )
            if name in problem:
                raise ValueError(f"the part {name} of the QP is given twice; give each once, in x or in data")
            problem[name] = value
    if "Q" not in problem and "c" not in problem:
        raise ValueError("a QP needs an objective: give Q, c or both")
    for matrix, vector in (("A", "b"), ("G", "h")):
        if (matrix in problem) != (vector in problem):
            raise ValueError(f"a QP needs {matrix} and {vector} together, got {sorted(problem)}")
    return problem


def check_solution(problem: dict[str, Tensor], y: Tree) -> None:
    """Raise unless `y` has the parts that one problem asks for, in fitting shapes.

    Raises:
        ValueError: naming the part.
    """
    wanted = {"primal"} | ({"equality"} if "A" in problem else set()) | ({"inequality"} if "G" in problem else set())
    if not isinstance(y, dict) or set(y) != wanted:
        got = sorted(y) if isinstance(y, dict) else type(y).__name__
        raise ValueError(f"this QP needs y as a dict with the parts {sorted(wanted)}, got {got}")
    n, p, m = (len(y[name]) if name in y else 0 for name in ("primal", "equality", "inequality"))
    shapes = {"Q": (n, n), "c": (n,), "A": (p, n), "b": (p,), "G": (m, n), "h": (m,)}
    for name, value in problem.items():
        if value.shape != shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} where {shapes[name]} was wanted for {n} variables, {p} "
                f"equalities and {m} inequalities; for a batch of problems use solve_qp, or torch.func.vmap"
            )
