"""Conic programs: linear or quadratic objectives over cones, all matrices and vectors differentiable."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitgrad import projections, tree
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.conditions.regularity import Regularity, distance_to_kink, rank_tolerance
from implicitgrad.curvature import jacobian
from implicitgrad.tree import Tree

NAMES = ("P", "c", "A", "b", "P_index", "A_index")


@dataclass(frozen=True)
class ConicProgram(OptimalityCondition):
    """`z` solves a conic program: `min_z zᵀPz / 2 + cᵀz` subject to `A z + s = b`, `s ∈ K`.

    K is a product of cones, which take the rows of A in this order: `{0}`, the nonnegative numbers, second-order cones
    `{(t, u) : ‖u‖ <= t}`, cones of positive semidefinite matrices, exponential cones `{(u, v, w) : v exp(u/v) <= w}`.
    A k × k matrix is k (k + 1) / 2 numbers: the lower triangle column by column, off-diagonal entries times √2. This is
    the standard form of SCS.

    `x` is a dict of some of `P: (n, n)`, `c: (n,)`, `A: (m, n)`, `b: (m,)`, further dicts in `data` hold the rest; P
    may be left out and only its symmetric part counts. Sparse matrices: `A: (nnz,)` are the entries and
    `A_index: (2, nnz)` their rows and columns, and so for P. The solution is `y = {"primal": z, "dual": y}`, both for
    the same scaling of the problem, and the residual

        P z + c + Aᵀ y,    Π(s - y) - s    with s = b - A z and the projection Π onto K.

    It vanishes exactly at solutions: by Moreau's theorem the second part says `s ∈ K`, `y ∈ K*`, `<s, y> = 0`. Where
    `s - y` lies in a cone, so that its constraint is not active, the second part is written y instead: these rows are
    left out of linear systems. The Jacobian is `[P, Aᵀ; (I - D) A, -D]` with `D = ∂Π(s - y)`; with `{0}` and
    nonnegative numbers only, it is symmetric on the support.

    The derivative exists where Π is differentiable at s - y (strict complementarity) and is unique where the Jacobian
    is regular, which takes unique primal and dual solutions; `check` measures both. Higher derivatives follow by those
    of Π.

    Source: Busseti, Moursi and Boyd (2019), "Solution refinement at regular points of conic problems"; Agrawal,
    Barratt, Boyd, Busseti and Moursi (2019), "Differentiating through a cone program". They use the residual of the
    homogeneous self-dual embedding, which also covers certificates of infeasibility, but whose Jacobian is singular
    along the ray of scalings. Here the scale is fixed, the slack eliminated, and a quadratic objective allowed.

    Attributes:
        zero: Number of rows in the cone `{0}`: equations.
        nonnegative: Number of rows that are inequalities.
        second_order: Length of each second-order cone.
        psd: Size k of each matrix.
        exponential: Number of exponential cones, three rows each.

    Example:
        >>> import torch, implicitgrad as ig
        >>> problem = {"c": torch.tensor([3.0, 4.0], requires_grad=True), "A": torch.zeros(3, 2), "b": torch.eye(3)[0]}
        >>> problem["A"][1:] = -torch.eye(2)  # min cᵀz with ‖z‖ <= 1
        >>> y = {"primal": -torch.tensor([0.6, 0.8]), "dual": torch.tensor([5.0, 3.0, 4.0])}
        >>> ig.implicit_root(ConicProgram(second_order=(3,)), problem, y)["primal"][0].backward()
        >>> problem["c"].grad  # (c₁c₂ c - |c|² c) / |c|³
        tensor([-0.1280,  0.0960])
    """

    zero: int = 0
    nonnegative: int = 0
    second_order: tuple[int, ...] = ()
    psd: tuple[int, ...] = ()
    exponential: int = 0

    def __post_init__(self) -> None:
        counts = {"zero": self.zero, "nonnegative": self.nonnegative, "exponential": self.exponential}
        for name, value in counts.items():
            _check_count(name, value, least=0)
        for name in ("second_order", "psd"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"ConicProgram needs {name} as a tuple of sizes, got {getattr(self, name)!r}")
            for value in getattr(self, name):
                _check_count(name, value, least=1)

    @property
    def symmetric_on_support(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the Jacobian is symmetric there: for linear constraints."""
        return not (self.second_order or self.psd or self.exponential)

    @property
    def num_rows(self) -> int:
        """Rows m of A that the cones take."""
        return sum(block.count * block.length for block in self._blocks())

    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """A tree like `y`; see the class.

        Raises:
            TypeError: `x` or `data` are no dicts of tensors.
            ValueError: parts are missing, unknown, given twice, or of shapes that do not fit.
        """
        problem = self._problem(x, y, data)
        z, dual = y["primal"], y["dual"]
        slack = problem["b"] - _product(problem, "A", z, len(dual))
        stationarity = problem["c"] + _product(problem, "A", dual, len(z), transposed=True)
        if "P" in problem:
            both = _product(problem, "P", z, len(z)) + _product(problem, "P", z, len(z), transposed=True)
            stationarity = stationarity + both / 2
        parts = [self._part(*block).reshape(-1) for block in self._split(slack, dual)]
        return {"primal": stationarity, "dual": torch.cat([dual.new_zeros(0), *parts])}

    def support(self, x: Tree, y: Tree, *data: Tree) -> Tree | None:
        """True for z and the duals of cones whose constraint is active."""
        problem = self._problem(x, y, data)
        z, dual = y["primal"], y["dual"]
        slack = problem["b"] - _product(problem, "A", z, len(dual))
        parts = [self._active(*block).reshape(-1) for block in self._split(slack, dual)]
        nothing = torch.zeros_like(dual[:0], dtype=torch.bool)
        return {"primal": torch.ones_like(z, dtype=torch.bool), "dual": torch.cat([nothing, *parts])}

    def check(self, x: Tree, y: Tree, *data: Tree) -> Regularity:
        """How well the assumptions hold at y, for one problem: n + m reverse passes, one dense decomposition."""
        x, y, data = tree.detach((x, y, data))
        problem = self._problem(x, y, data)
        slack = problem["b"] - _product(problem, "A", y["primal"], len(y["dual"]))
        values = torch.linalg.svdvals(jacobian(lambda y: self.residual(x, y, *data), y, check=False).to_dense())
        margins = [distance_to_kink(block.kind, s - dual) for block, s, dual in self._split(slack, y["dual"])]
        return Regularity(
            regularity=(values[-1] / values[0]).item(),
            num_undetermined=int((values <= rank_tolerance(len(values), values.dtype) * values[0]).sum()),
            margin=min((margin.min().item() for margin in margins), default=torch.inf),
            residual=torch.linalg.vector_norm(tree.ravel(self.residual(x, y, *data))[0]).item(),
        )

    def notes(self, x: Tree, y: Tree, *data: Tree) -> list[str]:
        """`check` in words."""
        return self.check(x, y, *data).notes()

    def _blocks(self) -> Iterator["_Block"]:
        if self.zero:
            yield _Block("zero", 1, self.zero)
        if self.nonnegative:
            yield _Block("nonnegative", 1, self.nonnegative)
        for length, same in itertools.groupby(self.second_order):
            yield _Block("second_order", len(list(same)), length)
        for size, same in itertools.groupby(self.psd):
            yield _Block("psd", len(list(same)), size * (size + 1) // 2)
        if self.exponential:
            yield _Block("exponential", self.exponential, 3)

    def _split(self, slack: Tensor, dual: Tensor) -> Iterator[tuple["_Block", Tensor, Tensor]]:
        """Each run of equal cones with its part of both vectors, `(count, length)`."""
        blocks = list(self._blocks())
        sizes = [block.count * block.length for block in blocks]
        for block, s, y in zip(blocks, slack.split(sizes), dual.split(sizes), strict=True):
            yield block, s.reshape(block.count, block.length), y.reshape(block.count, block.length)

    def _part(self, block: "_Block", slack: Tensor, dual: Tensor) -> Tensor:
        """What the residual says about one run of cones."""
        if block.kind == "zero":
            return -slack
        if block.kind == "nonnegative":
            return torch.where(dual > slack, -slack, dual)
        point = slack - dual
        nearest = PROJECTIONS[block.kind](point)
        return torch.where((nearest == point).all(-1, keepdim=True), dual, nearest - slack)

    def _active(self, block: "_Block", slack: Tensor, dual: Tensor) -> Tensor:
        if block.kind == "zero":
            return torch.ones_like(dual, dtype=torch.bool)
        if block.kind == "nonnegative":
            return dual > slack
        point = slack - dual
        return (PROJECTIONS[block.kind](point) != point).any(-1, keepdim=True).expand_as(point)

    def _problem(self, x: Tree, y: Tree, data: tuple) -> dict[str, Tensor]:
        """The parts of the program, checked against y."""
        problem = _gathered(x, data)
        if not isinstance(y, dict) or set(y) != {"primal", "dual"}:
            got = sorted(y) if isinstance(y, dict) else type(y).__name__
            raise ValueError(f"ConicProgram needs y as a dict with the parts ['dual', 'primal'], got {got}")
        n, m = len(y["primal"]), len(y["dual"])
        if m != self.num_rows:
            raise ValueError(f"the dual has {m} entries, but the cones take {self.num_rows} rows: {self}")
        shapes = {"P": (n, n), "c": (n,), "A": (m, n), "b": (m,)}
        for name, wanted in shapes.items():
            index = problem.get(f"{name}_index")
            wanted = wanted if index is None else (index.shape[-1],)
            if name in problem and problem[name].shape != wanted:
                raise ValueError(
                    f"{name} has shape {tuple(problem[name].shape)} where {wanted} was wanted for {n} variables and "
                    f"{m} rows; for a batch of programs use torch.func.vmap"
                )
        return problem


class _Block(NamedTuple):
    """A run of equal cones."""

    kind: str
    count: int
    length: int


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "second_order": projections.second_order_cone,
    "psd": projections.packed_psd_cone,
    "exponential": projections.exponential_cone,
}


def _product(problem: dict[str, Tensor], name: str, v: Tensor, length: int, transposed: bool = False) -> Tensor:
    """`M v`, or `Mᵀv`, for the dense or sparse matrix M of that name; the result has this length."""
    matrix, index = problem[name], problem.get(f"{name}_index")
    if index is None:
        return (matrix.mT if transposed else matrix) @ v
    row, column = index.flip(0) if transposed else index
    return v.new_zeros(length).index_add(0, row, matrix * v.index_select(0, column))


def _gathered(x: Tree, data: tuple) -> dict[str, Tensor]:
    problem: dict[str, Tensor] = {}
    for part in (x, *data):
        if not isinstance(part, dict):
            raise TypeError(f"ConicProgram needs dicts of {', '.join(NAMES)}, got {type(part).__name__}")
        for name, value in part.items():
            if name not in NAMES:
                raise ValueError(f"a conic program has parts {', '.join(NAMES)}; got {name!r}")
            if name in problem:
                raise ValueError(f"the part {name} is given twice; give each once, in x or in data")
            if not isinstance(value, Tensor):
                raise TypeError(f"ConicProgram needs {name} as a tensor, got {type(value).__name__}")
            problem[name] = value
    missing = [name for name in ("c", "A", "b") if name not in problem]
    if missing:
        raise ValueError(f"ConicProgram needs c, A and b; {', '.join(missing)} is missing")
    return problem


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ConicProgram needs whole numbers in {name}, got {value!r}")
    if value < least:
        raise ValueError(f"ConicProgram needs numbers >= {least} in {name}, got {value}")
