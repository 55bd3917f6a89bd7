"""A solver for a sequence of systems that drift, as the outer steps of bilevel optimisation do."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from implicitgrad.linalg.cg import CG, MISLED, NEGATIVE_CURVATURE
from implicitgrad.linalg.fitted import FittedPreconditioner
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.preconditioner import Preconditioner
from implicitgrad.linalg.recording import Recorder
from implicitgrad.linalg.solver import LinearSolver, Products, Solution
from implicitgrad.linalg.warm_start import Starts

# A preconditioner stays if it leaves at most this part of the effort,
WORTHWHILE = 0.8
# and is made anew where the effort is this many times that when it was new.
STALE = 1.3
# A solve with a preconditioner that has proven itself is cut off after so many times the iterations of the bare one.
PATIENCE = 2
# After so many solves with it, and twice as many, and so on, what it is worth is measured again.
FIRST_REVIEW = 16


class _Memory(NamedTuple):
    """What earlier systems of one shape taught. A pace is in iterations per decade of the relative residual."""

    starts: Starts = Starts()
    num_solves: int = 0
    bare_iter: int = 0  # iterations of the newest solve without a preconditioner, 0 before there was one
    bare_pace: float = 0.0
    bare_warm: bool = False  # whether that solve had a start
    paid: int = 0  # products of bare solves since a preconditioner was last dropped
    resume: int = 0  # number of solves at which one may be tried again
    product: Callable[[Tensor], Tensor] | None = None
    carried: Any = None  # from the newest fit to the next
    proven: bool = False  # has passed its trial
    age: int = 0  # solves since it was built, or proven if fitted
    pace: float = 0.0  # of the newest solve with it
    new_pace: float = 0.0  # of the first one since it was built
    growth: float = 1.0  # of `new_pace` when it was last built again
    rebuild: bool = False  # at the next solve
    review: bool = False  # the next solve is bare, for comparison

    def without_product(self) -> "_Memory":
        bare = _Memory(self.starts, self.num_solves, self.bare_iter, self.bare_pace, self.bare_warm)
        return bare._replace(paid=self.paid, resume=self.resume)

    def dropped(self) -> "_Memory":
        """Without the preconditioner, until twice as many systems have been solved."""
        return self.without_product()._replace(paid=0, resume=2 * (self.num_solves + 1))


@dataclass(frozen=True, eq=False)
class Recycling(LinearSolver):
    """Conjugate gradients that reuse, from one system to the next, the last solutions and the preconditioner.

    This is the one solver with memory: what it does depends on what it has solved before. That is the point of it: a
    preconditioner for one system may cost more than it saves, for fifteen systems that hardly differ it is a bargain,
    and only who sees them all can tell. Give one instance to all outer steps of one problem and another instance to
    the next problem. The effort depends on the memory, the tolerance does not: the residual is always measured with
    the system at hand. A solve that is cut off by `max_iter` goes on from where the last one was.

    Effort is counted in iterations per decade of the relative residual, so that solves cut off early compare with
    others. The rules, whose outcome `Solution.reason` tells:

    1. The start is taken from an earlier solution if its right-hand side is within 45° of the new one, times the number
       that brings it closest in the norm of A. That costs a product beside the one for its residual.
    2. The first solves are bare, until they have cost as many products as the preconditioner would. To rent until the
       rent has reached the price assumes that as many solves are to come as have been; it spends at most about twice
       what foresight would. A recipe fitted to products that were made anyway (`Deflation`, `QuasiNewton`) has no
       price, so it is there after one solve.
    3. The first solve with it is a trial, from a start only if the bare solve had one. It stays if it leaves at most
       80 % of the effort. The trial ends where the bare solve ended, later solves at twice as many iterations; they
       are then finished without it, and it is dropped.
    4. A fitted one is fitted again after every solve, to its products and what has been known before. Others are built
       again where the effort exceeds 1.3 times that when they were new, if that would have paid over as many solves as
       they have served. Effort that stayed after an earlier renewal is put down to harder systems.
    5. Where the effort has reached that of the last bare solve, and after 16, 32, 64 ... solves, the next solve is
       bare. If the preconditioner leaves more than 80 % of that, or has failed its trial, it is dropped, and tried
       again when twice as many systems have been solved. One that is fitted may be tried again at once.

    Products are all that counts here. The passes of a low-rank preconditioner over its vectors, in every iteration and,
    if it is fitted, once more per solve, are cheap beside products with a deep network and dear beside those with a
    small matrix; the caller decides about them by `rank` or `num_pairs`.

    `Solution.memory` has the starts and the recorded pairs in it, but not what the preconditioner itself holds.
    Systems of another shape, dtype or device have a memory of their own. Solves in several threads at a time are safe:
    each reads one state and leaves one, and the last one stays. Copies and pickles start without memory.

    Source: rule 2 is the deterministic strategy of ski rental, Karlin, Manasse, Rudolph and Sleator (1988); the others
    are this library's.

    Args:
        solver: how each system is solved; its own preconditioner must be None.
        preconditioner: a recipe; None for warm starts only.

    Raises:
        TypeError: `solver` is not CG, or `preconditioner` is not a recipe.
        ValueError: the solver has a preconditioner of its own; in `solve`, what CG and the recipe raise.

    Example:
        >>> import torch
        >>> from implicitgrad.linalg import Jacobi
        >>> solver = Recycling(CG(), Jacobi())
        >>> A = LinearOperator.from_dense(torch.diag(torch.arange(1.0, 9.0)), symmetric=True)
        >>> [solver.solve(A, b).num_iter for b in torch.eye(8)[:2] + 1]
        [8, 1]
    """

    solver: CG = field(default_factory=CG)
    preconditioner: Preconditioner | None = None
    _memory: dict[tuple, _Memory] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, CG):
            raise TypeError(f"Recycling(solver=...) needs a CG(...); got {type(self.solver).__name__}.")
        if self.solver.preconditioner is not None:
            raise ValueError("Recycling needs a solver without a preconditioner; pass the recipe to Recycling itself.")
        if not (self.preconditioner is None or isinstance(self.preconditioner, Preconditioner)):
            raise TypeError(
                f"Recycling(preconditioner=...) needs a recipe, which it can carry out again, such as Jacobi() or"
                f" Deflation(); got {type(self.preconditioner).__name__}. Pass a finished function to CG."
            )

    def __reduce__(self) -> tuple:
        return Recycling, (self.solver, self.preconditioner)

    def reset(self) -> None:
        """Forget all systems, as before an unrelated problem."""
        self._memory.clear()

    def solve(self, A: LinearOperator, b: Tensor, x0: Tensor | None = None) -> Solution:
        if isinstance(self.preconditioner, FittedPreconditioner):
            self.preconditioner.check(A)
        key = (A.vector_shape, A.dtype, A.device)
        memory, built, before = self._prepared(A, self._memory.get(key, _Memory()))
        bare = memory.product is None or memory.review
        # a trial from a start against a bare solve from zero would flatter the preconditioner
        fair = bare or memory.proven or memory.bare_warm
        product = Products(A)
        guess = memory.starts.guess(b.detach(), product) if x0 is None and fair else None
        turn = self._solve_bare if bare else self._solve_preconditioned
        solution, memory, story = turn(A, b, guess if x0 is None else x0, memory)
        if solution.num_iter:
            memory = memory._replace(num_solves=memory.num_solves + 1)
            if solution.reason != NEGATIVE_CURVATURE:
                memory = memory._replace(starts=memory.starts.with_solution(b.detach(), solution.value))
        self._memory[key] = memory
        after = "" if guess is None else ", warm start"
        return replace(
            solution,
            num_matvec=solution.num_matvec + product.count + built,
            reason=f"{solution.solver} ({before}{story}{after}): {solution.reason}",
            memory=solution.memory + memory.starts.nbytes,
        )

    def _prepared(self, A: LinearOperator, memory: _Memory) -> tuple[_Memory, int, str]:
        """Build where rule 2 or 4 says so: the memory with the product, products spent, and what to tell."""
        recipe = self.preconditioner
        if recipe is None or isinstance(recipe, FittedPreconditioner):
            return memory, 0, ""
        cost = recipe.cost(A)
        affordable = memory.bare_iter > 0 and memory.paid >= cost and memory.num_solves >= memory.resume
        if not (memory.rebuild or memory.product is None and affordable):
            return memory, 0, ""
        memory = memory._replace(product=recipe.build(A), age=0, rebuild=False)
        return memory, cost, f"{type(recipe).__name__} built with {cost} products, "

    def _recorded(
        self, solver: CG, A: LinearOperator, b: Tensor, x0: Tensor | None, memory: _Memory
    ) -> tuple[Solution, _Memory]:
        """The solution, and the memory with a preconditioner that is fitted to its products, if it is of that kind."""
        recipe = self.preconditioner
        if not isinstance(recipe, FittedPreconditioner) or memory.num_solves < memory.resume:
            return solver.solve(A, b, x0), memory
        recorder = Recorder(A, recipe.num_pairs)
        solution = solver.solve(recorder.operator, b, x0)
        solution = replace(solution, memory=solution.memory + recorder.nbytes)
        if solution.num_iter == 0 or solution.reason == NEGATIVE_CURVATURE:
            return solution, memory
        product, carried = recipe.fit(*recorder.pairs(), memory.carried)
        return solution, memory._replace(product=product, carried=carried)

    def _solve_bare(
        self, A: LinearOperator, b: Tensor, x0: Tensor | None, memory: _Memory
    ) -> tuple[Solution, _Memory, str]:
        name, told = type(self.preconditioner).__name__, "no preconditioner"
        solution, fitted = self._recorded(self.solver, A, b, x0, memory._replace(carried=None))
        if not solution.num_iter:
            return solution, memory, "nothing to do"
        measured = {"bare_iter": solution.num_iter, "bare_pace": _pace(solution), "bare_warm": x0 is not None}
        memory = memory._replace(**measured, paid=memory.paid + solution.num_matvec, review=False)
        if memory.proven:
            told = f"review of {name}: {memory.pace:.3g} iterations per decade against {memory.bare_pace:.3g} without; "
            if memory.pace <= WORTHWHILE * memory.bare_pace:
                return solution, memory, told + "kept"
            told += "dropped"
            memory = memory.without_product() if fitted.carried is not None else memory.dropped()
        if fitted.carried is not None:
            memory = memory._replace(product=fitted.product, carried=fitted.carried)
            told += f"; {name} fitted for the next solve"
        return solution, memory, told

    def _solve_preconditioned(
        self, A: LinearOperator, b: Tensor, x0: Tensor | None, memory: _Memory
    ) -> tuple[Solution, _Memory, str]:
        limit, patience = self.solver.max_iter, memory.bare_iter * (PATIENCE if memory.proven else 1)
        cap = patience if limit is None else min(patience, limit)
        solver = replace(self.solver, preconditioner=memory.product, max_iter=cap)
        solution, fitted = self._recorded(solver, A, b, x0, memory)
        done, pace, told = solution.num_iter, _pace(solution), type(self.preconditioner).__name__
        if not done:
            return solution, memory, told
        told += f": {done} iterations, {pace:.3g} per decade"
        if solution.reason in ("max_iter reached", MISLED) and done != limit:
            rest = replace(self.solver, max_iter=limit and limit - done).solve(A, b, solution.value)
            memory = memory.without_product() if memory.proven else memory.dropped()
            return _joined(solution, rest), memory, told + ", finished without; dropped"
        if not memory.proven:
            told += f" against {memory.bare_pace:.3g} without; "
            if pace > WORTHWHILE * memory.bare_pace:
                return solution, memory.dropped(), told + "dropped"
            memory = fitted._replace(proven=True, age=1, pace=pace, new_pace=pace)
            return solution, memory, told + "kept"
        memory = fitted._replace(pace=pace, age=memory.age + 1)
        if not isinstance(self.preconditioner, FittedPreconditioner):
            memory, aged = self._aged(A, memory, solution.num_matvec)
            told += aged
        power_of_two = memory.age & (memory.age - 1) == 0
        if not memory.rebuild and (pace > memory.bare_pace or memory.age >= FIRST_REVIEW and power_of_two):
            return solution, memory._replace(review=True), told + "; to be reviewed"
        return solution, memory, told

    def _aged(self, A: LinearOperator, memory: _Memory, num_matvec: int) -> tuple[_Memory, str]:
        """Rule 4 for a recipe with a price."""
        assert self.preconditioner is not None
        pace = memory.pace
        if memory.age == 1:
            return memory._replace(growth=max(pace / memory.new_pace, 1.0), new_pace=pace), ""
        if memory.age == 2:  # the trial may have been the only solve without a start
            memory = memory._replace(new_pace=min(memory.new_pace, pace))
        told = f", {memory.new_pace:.3g} when new"
        saved = num_matvec * (1 - memory.new_pace * memory.growth / pace) * memory.age
        if pace > STALE * memory.new_pace and self.preconditioner.cost(A) < saved:
            return memory._replace(rebuild=True), told + "; to be made anew"
        return memory, told


def _pace(solution: Solution) -> float:
    """Iterations per decade of the relative residual, of which a tenth at least is taken as gained."""
    residual = solution.relative_residual.amax().item()
    return solution.num_iter / max(-math.log10(max(residual, 1e-300)), 0.1)


def _joined(first: Solution, rest: Solution) -> Solution:
    return replace(
        rest,
        num_iter=first.num_iter + rest.num_iter,
        num_matvec=first.num_matvec + rest.num_matvec,
        memory=max(first.memory, rest.memory),
    )
