"""CVXPY problems in the form of `ConicProgram`: affine maps from parameters, and back to variables."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicitgrad.conditions import ConicProgram
from implicitgrad.optional import require

DENSITY = (
    0.1  # share of entries from which matrices are dense: a product through indices costs ten times as much per entry
)


class SolverStatusError(RuntimeError):
    """A convex problem has no solution, or its solver did not find one.

    Attributes:
        status: What CVXPY calls it: `"infeasible"`, `"unbounded"`, `"user_limit"`, `"solver_error"`, ...
    """

    def __init__(self, solver: str, status: str, report: str) -> None:
        advice = {
            "infeasible": "the constraints contradict each other for these parameter values",
            "unbounded": "the objective has no lower bound for these parameter values",
        }.get(status, "scale the problem, or change solver_options")
        super().__init__(f"{solver} ended with status {status!r} ({report}): {advice}")
        self.status = status


class Canonical:
    """A problem in canonical form: maps from parameters to its data, and from its solution to variables."""

    def __init__(
        self, cvxpy: ModuleType, problem: Any, parameters: Sequence[Any], variables: Sequence[Any], solver: str
    ) -> None:
        self._sparse = require("scipy.sparse", extra="cvxpy")
        try:
            data, chain, _ = problem.get_problem_data(solver, enforce_dpp=True)
        except cvxpy.error.DPPError:
            raise ValueError(
                "the problem is not DPP: its data is not an affine function of its parameters; see "
                "https://www.cvxpy.org/tutorial/dpp for how to rewrite it"
            ) from None
        self._dims, self._solver = data["dims"], chain.solver
        self.program = _program(self._dims)
        stuffed = data["param_prob"]
        n, m = stuffed.x.size, self.program.num_rows
        places = _parameter_places(chain, stuffed, parameters)
        self._symmetric = [any(p.attributes[kind] for kind in ("symmetric", "PSD", "NSD")) for p in parameters]
        self._to_ours = _solver_rows(self.program, solver)
        self._to_solver = self._to_ours.argsort()
        # CVXPY keeps (A | b) with A z + b in K and (c | d), column after column, per parameter entry
        row, place, weight = _entries(stuffed.A, places)
        row = row - row % max(m, 1) + self._to_solver[row % max(m, 1)]
        is_b = row >= m * n
        self._b = _Affine(row[is_b] - m * n, place[is_b], weight[is_b], m)
        self._A = _Matrix.of(row[~is_b], place[~is_b], -weight[~is_b], (m, n))
        row, place, weight = _entries(stuffed.q, places)
        self._c = _Affine(row[row < n], place[row < n], weight[row < n], n)
        self._P = None if stuffed.P is None else _Matrix.of(*_entries(stuffed.P, places), (n, n))
        self._variables = _variable_places(chain, stuffed, variables, n)

    def data(self, values: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The program as `ConicProgram` takes it, in float64, and the places of entries of its sparse matrices."""
        parts = []
        for value, symmetric in zip(values, self._symmetric, strict=True):
            part = (value + value.mT) / 2 if symmetric else value
            parts.append(part.reshape(-1).double())
        vector = torch.cat([*parts, parts[0].new_ones(1)])
        x, pattern = {"c": self._c(vector), "b": self._b(vector)}, {}
        for name, matrix in (("A", self._A), ("P", self._P)):
            if matrix is not None:
                x[name] = matrix.entries(vector)
                if matrix.index is None:
                    x[name] = x[name].reshape(matrix.shape)
                else:
                    pattern[f"{name}_index"] = matrix.index.to(vector.device)
        return x, pattern

    def variables(self, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The wanted variables at a canonical solution."""
        padded = torch.cat([z.new_zeros(1), z])
        return tuple(padded[places.to(z.device)].to(dtype) for places in self._variables)

    def solve(self, x: dict[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Primal and dual solution, as the solver finds them.

        Raises:
            SolverStatusError: it finds none.
        """
        data = {"c": x["c"].cpu().numpy(), "b": x["b"].cpu()[self._to_solver].numpy(), "dims": self._dims}
        data["A"] = self._scipy(self._A, x["A"])[self._to_solver.numpy()].tocsc()
        if self._P is not None:
            P = self._scipy(self._P, x["P"])
            data["P"] = ((P + P.T) / 2).tocsc()
        raw = self._solver.solve_via_data(data, False, False, dict(options))
        status, report, z, dual = _outcome(self._solver, raw)
        if status not in ("optimal", "optimal_inaccurate"):
            raise SolverStatusError(self._solver.name(), status, report)
        like = x["c"]
        return {
            "primal": torch.tensor(z, dtype=like.dtype, device=like.device),
            "dual": torch.tensor(dual, dtype=like.dtype)[self._to_ours].to(like.device),
        }

    def _scipy(self, matrix: "_Matrix", values: Tensor) -> Any:
        """The same as a sparse matrix of SciPy."""
        if matrix.index is None:
            return self._sparse.csr_array(values.cpu().numpy())
        return self._sparse.csr_array((values.cpu().numpy(), tuple(matrix.index.numpy())), shape=matrix.shape)


class _Matrix(NamedTuple):
    """A matrix whose entries are affine functions of the parameters."""

    entries: "_Affine"
    index: Tensor | None  # rows and columns of the entries, (2, nnz); None for all of them, row by row
    shape: tuple[int, int]

    @staticmethod
    def of(row: Tensor, place: Tensor, weight: Tensor, shape: tuple[int, int]) -> "_Matrix":
        """From positions counted column after column, as CVXPY keeps them; sparse if most entries are always zero."""
        height, width = shape
        position, entry = row.unique(return_inverse=True)
        index = torch.stack([position % max(height, 1), position // max(height, 1)])
        if len(position) < DENSITY * height * width:
            return _Matrix(_Affine(entry, place, weight, len(position)), index, shape)
        position = index[0] * width + index[1]
        return _Matrix(_Affine(position[entry], place, weight, height * width), None, shape)


class _Affine(NamedTuple):
    """A sparse matrix of constants, to be multiplied in every mode of differentiation."""

    row: Tensor
    column: Tensor
    weight: Tensor
    size: int

    def __call__(self, vector: Tensor) -> Tensor:
        row, column, weight = (part.to(vector.device) for part in self[:3])
        return vector.new_zeros(self.size).index_add(0, row, weight * vector.index_select(0, column))


def _program(dims: Any) -> ConicProgram:
    if dims.p3d or dims.pnd:
        raise ValueError(
            "the problem has power cones, whose projection is not there; write powers and geometric means with "
            "approx=True, which uses second-order cones"
        )
    return ConicProgram(dims.zero, dims.nonneg, tuple(dims.soc), tuple(dims.psd), dims.exp)


def _solver_rows(program: ConicProgram, solver: str) -> Tensor:
    """For each row of `ConicProgram` that of the solver: Clarabel takes the lower triangle of a matrix row by row."""
    order = torch.arange(program.num_rows)
    if solver == "CLARABEL":
        start = program.zero + program.nonnegative + sum(program.second_order)
        for size in program.psd:
            column, row = torch.triu_indices(size, size)
            order[start : start + len(row)] = start + row * (row + 1) // 2 + column
            start += len(row)
    return order


def _outcome(solver: Any, raw: Any) -> tuple[str, str, Any, Any]:
    """Status in CVXPY's words and in the solver's own, primal and dual solution."""
    if solver.name() == "SCS":
        info = raw["info"]
        return solver.STATUS_MAP[info["status_val"]], info["status"], raw["x"], raw["y"]
    report = str(raw.status)
    return solver.STATUS_MAP.get(report, "solver_error"), report, raw.x, raw.z


def _entries(matrix: Any, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, places in the vector of parameter values, and weights of a map that CVXPY keeps."""
    matrix = matrix.tocoo()
    row, column = (torch.tensor(part, dtype=torch.long) for part in (matrix.row, matrix.col))
    return row, places[column], torch.tensor(matrix.data, dtype=torch.float64)


def _parameter_places(chain: Any, stuffed: Any, parameters: Sequence[Any]) -> Tensor:
    """Where each entry of CVXPY's vector of parameters lies among the given ones, one after the other, then 1."""
    start, numbered = 0, {}
    for parameter in parameters:
        numbered[parameter.id] = torch.arange(start, start + parameter.size).numpy().reshape(parameter.shape)
        start += parameter.size
    for reduction in chain.reductions:
        numbered = reduction.param_forward(numbered)
    places = torch.full((stuffed.total_param_size + 1,), start)
    for key, column in stuffed.param_id_to_col.items():
        if key in stuffed.id_to_param:
            values = torch.tensor(numbered[key].flatten(order="F"), dtype=torch.long)
            places[column : column + len(values)] = values
    return places


def _variable_places(chain: Any, stuffed: Any, variables: Sequence[Any], size: int) -> list[Tensor]:
    """For each entry of each variable, which entry of the canonical solution it is, counted from 1; 0 for none."""
    numbered = stuffed.split_solution(torch.arange(1.0, size + 1, dtype=torch.float64).numpy())
    for reduction in reversed(chain.reductions):
        numbered = reduction.var_forward(numbered)
    dense = [numbered[v.id].toarray() if hasattr(numbered[v.id], "toarray") else numbered[v.id] for v in variables]
    return [torch.tensor(places).round().long().reshape(v.shape) for places, v in zip(dense, variables, strict=True)]
