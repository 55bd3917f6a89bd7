"""No silent failure: 200 systems from easy to hopeless through every solver.

Each outcome is one of four: solved, and a residual computed here in extended precision meets the tolerance; flagged
with a reason from the list below; an error with a name; or refused at the door for what the system is declared to be.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from implicitgrad.linalg import CGLS, LSMR, Solution
from tests.cases import SOLVERS, SolverCase
from tests.linalg import stress_systems
from tests.linalg.stress_systems import Draw, System, systems

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Why a solver gives up; `Auto` puts its choice in front, some put details behind, in parentheses.
REASONS = {
    "max_iter reached",
    "num_terms reached",
    "num_refinements reached",
    "precision floor",
    "stagnated",
    "diverged",
    "negative curvature",
    "no positive eigenvalue",
    "preconditioner not positive definite",
    "singular to working precision",
}
LEAST_SQUARES = (LSMR, CGLS)
SUCCESSES = {"converged", "zero right-hand side", "consistent", "least squares"}


def extended(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy().astype(np.longdouble)


def apply(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return (matrix @ vectors[..., None])[..., 0]


def norm(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt((vectors**2).sum(-1))


def check_solution(system: System, solution: Solution, rtol: float) -> str:
    """The outcome in one word; AssertionError if it is not what the solver says it is.

    The residual is compared up to the rounding of its own evaluation, (n + 4) eps (|A| |x| + |b|), which no solver that
    works in the given dtype can go below.
    """
    assert solution.value.isfinite().all()
    matrix, x, b = extended(system.matrix), extended(solution.value), extended(system.b)
    r = b - apply(matrix, x)
    eps = torch.finfo(system.matrix.dtype).eps * (matrix.shape[-1] + 4)
    rounding = eps * norm(apply(np.abs(matrix), np.abs(x)) + np.abs(b))
    reported = extended(solution.residual_norm)
    assert (np.abs(reported - norm(r)) <= rounding + 1e-5 * norm(r)).all(), "the reported residual is not the true one"
    reason = re.sub(r"^\w+ \(.*\): | \(.*\)$", "", solution.reason)  # without the choice of Auto and details
    if not solution.converged:
        assert reason in REASONS, f"unknown reason {reason!r}"
        return reason
    assert reason in SUCCESSES, f"unknown reason {reason!r}"
    meets = norm(r) <= rtol * norm(b) + rounding
    if reason == "least squares":
        transposed = np.swapaxes(matrix, -1, -2)
        attainable = matrix.shape[-2] <= matrix.shape[-1]
        tolerance = min(rtol, 50 * torch.finfo(system.matrix.dtype).eps) if attainable else rtol
        size = np.linalg.norm(matrix.astype(np.float64), 2, axis=(-2, -1))
        allowed = tolerance * size * norm(r) + eps * norm(apply(np.abs(transposed), np.abs(r))) + size * rounding
        meets |= norm(apply(transposed, r)) <= allowed
    assert meets.all(), f"claims {reason!r} at a relative residual of {(norm(r) / norm(b)).max():.1e}"
    return "solved"


def outcome(case: SolverCase, system: System) -> str:
    try:
        solution = case.solver.solve(system.operator, system.b)
    except ValueError as error:
        assert "needs a" in str(error)
        unsuited = case.needs in ("definite", "symmetric") and not system.symmetric
        assert unsuited or not system.operator.is_square and not isinstance(case.solver, LEAST_SQUARES), (
            f"refused: {error}"
        )
        return "refused"
    except LinAlgError as error:
        assert system.is_finite and re.match(r"\w+: .* is (singular|not positive definite)", str(error)), error
        return "LinAlgError"
    except FloatingPointError as error:
        assert "NaN or inf" in str(error)
        # besides bad input: numbers near the end of the dtype's range, or a solution that runs off to infinity
        excused = not system.is_finite or system.is_extreme or "A is singular" in str(error) and system.is_singular
        assert excused, f"overflow: {error}"
        return "FloatingPointError"
    assert system.is_finite, "no error for NaN or infinity"
    return check_solution(system, solution, TOLERANCE[system.matrix.dtype])


@pytest.mark.slow  # 224 systems, the hopeless ones up to the last iteration
@pytest.mark.parametrize("case", SOLVERS, ids=str)
def test_no_silent_failure(case: SolverCase, capsys: pytest.CaptureFixture[str]):
    failures, outcomes = [], Counter()
    for name, system in systems():
        try:
            found = outcome(case, system)
            least_squares = isinstance(case.solver, LSMR | CGLS)
            if case.needs in system.easy_for or least_squares and system.easy_for:
                assert found == "solved", f"gave up on an easy system: {found}"
        except AssertionError as error:
            failures.append(f"{name} {system.name}: {str(error).splitlines()[0]}")
            found = "FAILED"
        outcomes[found] += 1
    with capsys.disabled():
        print(f"\n{case}: {dict(outcomes.most_common())}")
    assert not failures, "\n".join(failures)
    assert outcomes.total() >= 200


@pytest.mark.parametrize(
    "lie",
    [
        lambda truth: replace(truth, converged=True, reason="converged"),
        lambda truth: replace(truth, converged=True, reason="least squares"),
        lambda truth: replace(truth, residual_norm=0.9 * truth.residual_norm),
        lambda truth: replace(truth, reason=""),
        lambda truth: replace(truth, value=truth.value * torch.nan),
    ],
)
def test_a_silent_failure_would_be_noticed(lie: Callable[[Solution], Solution]):
    system = stress_systems.rectangular(Draw(0))
    truth = CGLS(max_iter=2).solve(system.operator, system.b)
    assert check_solution(system, truth, 1e-10) == "max_iter reached"
    with pytest.raises(AssertionError):
        check_solution(system, lie(truth), 1e-10)
