"""What a solver learns from one system for the next, and what it must not."""

import copy
import math
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import implicitgrad as ig
from implicitgrad.linalg import (
    CG,
    MINRES,
    Deflation,
    Jacobi,
    LinearOperator,
    LowRankInverse,
    Nystrom,
    Preconditioner,
    QuasiNewton,
    Recycling,
    Solution,
)
from implicitgrad.linalg.recording import Recorder

N = 60
RECIPES = [None, Jacobi(), Jacobi(16), Nystrom(15), Deflation(30), QuasiNewton(30)]

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=str)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(seed: int = 3) -> Tensor:
    return torch.linalg.qr(draw(N, N, seed=seed)).Q


def decaying(scale: float = 1.0, q: Tensor | None = None) -> Tensor:
    """Fifteen eigenvalues from 10 to 10 000 over a rest from one to two."""
    eigenvalues = torch.linspace(1, 2, N, dtype=torch.float64)
    eigenvalues[:15] = scale * torch.logspace(1, 4, 15, dtype=torch.float64)
    q = orthogonal() if q is None else q
    matrix = (q * eigenvalues) @ q.mT
    return (matrix + matrix.mT) / 2


def drifting(count: int) -> list[tuple[Tensor, Tensor]]:
    """Matrices and right-hand sides, each two percent away from the one before."""
    systems, matrix, b = [], decaying(), draw(N)
    for step in range(count):
        systems.append((matrix, b))
        turn = torch.linalg.matrix_exp(0.001 * (lambda k: k - k.mT)(draw(N, N, seed=step)))
        matrix = turn @ matrix @ turn.mT
        matrix, b = (matrix + matrix.mT) / 2, b + 0.02 * draw(N, seed=100 + step)
    return systems


def operator_of(matrix: Tensor) -> LinearOperator:
    return LinearOperator.from_dense(matrix, symmetric=True, definite=True)


def run(solver: Recycling | CG, systems: list[tuple[Tensor, Tensor]]) -> list[Solution]:
    return [solver.solve(operator_of(matrix), b) for matrix, b in systems]


def exact(matrix: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Given(Preconditioner):
    """A preconditioner made by the test, at a price."""

    make: Callable[[LinearOperator], Callable[[Tensor], Tensor]]
    price: int = 0

    def build(self, A: LinearOperator) -> Callable[[Tensor], Tensor]:
        return self.make(A)

    def cost(self, A: LinearOperator) -> int:
        return self.price


def perfect(A: LinearOperator) -> Callable[[Tensor], Tensor]:
    inverse = torch.linalg.inv(A.to_dense())
    return lambda r: r @ inverse.mT


def useless(A: LinearOperator) -> Callable[[Tensor], Tensor]:
    """As M-FAC with few gradients of a problem that it does not describe: a wrong low rank matrix, hardly damped."""
    return LowRankInverse(draw(20, A.size, seed=9), damping=1e-3).apply


# ---- the answers ----


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_system_of_a_sequence_equals_its_dense_solve(recipe: Preconditioner | None, dtype: torch.dtype):
    # in float32 a condition of 1e4 leaves 1e-3, so the tolerance asked for is what can be had
    rtol, tolerance = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-3, 2e-2)}[dtype]
    solver = Recycling(CG(rtol=rtol), recipe)
    for matrix, b in drifting(6):
        solution = solver.solve(operator_of(matrix.to(dtype)), b.to(dtype))
        assert solution.converged, solution.reason
        assert solution.value.dtype == dtype
        true = (b - matrix @ solution.value.double()).norm() / b.norm()
        assert true <= 1.5 * rtol  # of the matrix before it was rounded to float32
        torch.testing.assert_close(solution.value.double(), exact(matrix, b), rtol=0, atol=tolerance)


@pytest.mark.parametrize("recipe", [None, Jacobi(), Nystrom(15)], ids=str)
def test_stacks_and_several_right_hand_sides(recipe: Preconditioner | None):
    solver = Recycling(CG(), recipe)
    for matrix, b in drifting(3):
        matrices, block = torch.stack([matrix, 2 * matrix]), torch.stack([b, 3 * b])
        for _ in range(2):  # stack and block each have a memory of their own
            stacked = solver.solve(operator_of(matrices), block)
            torch.testing.assert_close(stacked.value, exact(matrices, block), rtol=0, atol=1e-8)
            several = solver.solve(operator_of(matrix), block)
            torch.testing.assert_close(several.value, exact(matrix, block), rtol=0, atol=1e-8)
            assert stacked.converged
            assert several.converged


@every_recipe
def test_counts_every_product(recipe: Preconditioner | None):
    solver, count = Recycling(CG(), recipe), [0]
    for matrix, b in drifting(5):

        def product(v: Tensor, matrix: Tensor = matrix) -> Tensor:
            count[0] += 1
            return matrix @ v

        A = LinearOperator(product, N, symmetric=True, dtype=torch.float64, device="cpu")
        before = count[0]
        assert solver.solve(A, b).num_matvec == count[0] - before


def test_arguments_stay_unchanged_and_no_graph_is_recorded():
    solver = Recycling(CG(), Deflation())
    for matrix, b in drifting(3):
        matrix, b = matrix.requires_grad_(), b.requires_grad_()
        before = matrix.detach().clone(), b.detach().clone()
        solution = solver.solve(operator_of(matrix), b)
        assert not solution.value.requires_grad
        assert torch.equal(matrix, before[0])
        assert torch.equal(b, before[1])


# ---- what it saves ----


@pytest.mark.parametrize("recipe", RECIPES[3:], ids=str)
def test_costs_less_than_warm_starts_alone(recipe: Preconditioner):
    systems = drifting(10)
    cold = sum(solution.num_matvec for solution in run(CG(), systems))
    warm = sum(solution.num_matvec for solution in run(Recycling(CG()), systems))
    recycled = sum(solution.num_matvec for solution in run(Recycling(CG(), recipe), systems))
    assert warm < cold
    assert recycled < 0.8 * warm


def test_the_same_system_again_costs_two_products():
    solver, (matrix, b) = Recycling(CG()), drifting(1)[0]
    solver.solve(operator_of(matrix), b)
    again = solver.solve(operator_of(matrix), -1e9 * b)
    assert (again.num_iter, again.num_matvec) == (0, 2)  # to scale the start, and its residual
    assert "warm start" in again.reason
    torch.testing.assert_close(again.value, exact(matrix, -1e9 * b), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_start_survives_that_the_operator_is_scaled(dtype: torch.dtype):
    solver, (matrix, b) = Recycling(CG(rtol=1e-3)), drifting(1)[0]
    for scale in (1.0, 1e-12, 1e12):
        solution = solver.solve(operator_of((scale * matrix).to(dtype)), b.to(dtype))
        assert solution.converged, solution.reason
        assert (scale == 1.0) == (solution.num_iter > 0)


def test_starts_only_rows_that_are_like_earlier_ones():
    solver, matrix = Recycling(CG()), decaying()
    q = orthogonal(seed=4)
    solver.solve(operator_of(matrix), q[:2])
    assert "warm start" not in solver.solve(operator_of(matrix), q[2:4]).reason
    mixed = solver.solve(operator_of(matrix), torch.stack([q[0], q[5]]))
    assert "warm start" in mixed.reason
    torch.testing.assert_close(mixed.value, exact(matrix, torch.stack([q[0], q[5]])), rtol=0, atol=1e-8)


def test_several_kinds_of_right_hand_side_have_starts_of_their_own():
    solver, q = Recycling(CG()), orthogonal(seed=4)
    A = operator_of(decaying())
    for _ in range(2):
        counts = [solver.solve(A, b).num_iter for b in q[:4]]
    assert counts == [0, 0, 0, 0]
    solver.solve(A, q[4])  # supersedes the oldest
    assert solver.solve(A, q[1]).num_iter == 0
    assert solver.solve(A, q[0]).num_iter > 0


def test_a_given_start_is_used():
    solver, (matrix, b) = Recycling(CG()), drifting(1)[0]
    solver.solve(operator_of(matrix), b)
    assert solver.solve(operator_of(matrix), b, torch.zeros_like(b)).num_iter > 0
    assert solver.solve(operator_of(matrix), draw(N, seed=8), exact(matrix, draw(N, seed=8))).num_iter == 0


# ---- the rules ----


def test_first_solve_is_bare_then_a_trial_then_kept():
    solutions = run(Recycling(CG(), Given(perfect)), drifting(3))
    assert solutions[0].reason == "CG (no preconditioner): converged"
    assert solutions[0].num_iter == run(CG(), drifting(1))[0].num_iter
    assert "Given built with 0 products, Given: 1 iterations" in solutions[1].reason
    assert "without; kept" in solutions[1].reason
    assert "when new" in solutions[2].reason


@pytest.mark.parametrize("cheap", [True, False])
def test_renting_before_buying(cheap: bool):
    systems = [(matrix, draw(N, seed=i)) for i, (matrix, _) in enumerate(drifting(4))]
    price = run(CG(), systems)[0].num_matvec + (0 if cheap else 1)
    solutions = run(Recycling(CG(), Given(perfect, price)), systems)
    bought = 1 if cheap else 2
    assert [i for i, solution in enumerate(solutions) if "Given built" in solution.reason] == [bought]
    assert solutions[bought].num_matvec >= price  # which is on the bill


def test_one_that_does_not_pay_is_dropped_at_little_cost():
    systems = drifting(8)
    matrix, b = systems[0]
    bare = CG().solve(operator_of(matrix), b)
    assert CG(preconditioner=useless(operator_of(matrix))).solve(operator_of(matrix), b).num_iter > 1.5 * bare.num_iter
    solutions = run(Recycling(CG(), Given(useless)), systems)
    tried = [i for i, solution in enumerate(solutions) if "Given:" in solution.reason]
    assert tried == [1, 4]  # again after twice as many systems
    assert "dropped" in solutions[1].reason
    assert all(solution.converged for solution in solutions)
    assert solutions[1].num_iter <= 2 * bare.num_iter + 2  # the trial ended where the bare solve had ended
    cold = sum(solution.num_matvec for solution in run(CG(), systems))
    assert sum(solution.num_matvec for solution in solutions) < 1.3 * cold


def test_identity_is_not_kept_for_the_gain_of_a_warm_start():
    A, b = operator_of(decaying()), draw(N)
    solver = Recycling(CG(), Given(lambda A: torch.clone))
    solver.solve(A, b)
    told = solver.solve(A, b + 1e-6 * draw(N, seed=1)).reason
    assert "dropped" in told
    assert "warm start" not in told


def turned(count: int, at: int) -> list[tuple[Tensor, Tensor]]:
    """Systems that stay alike until one day all eigenvectors are others."""
    return [(decaying(q=orthogonal(seed=3 if i < at else 4)), draw(N, seed=i)) for i in range(count)]


@pytest.mark.parametrize("recipe", [Nystrom(15), Given(perfect), Deflation(30), QuasiNewton(30)], ids=str)
def test_one_that_fails_from_one_day_to_the_next_is_replaced(recipe: Preconditioner):
    solutions = run(Recycling(CG(), recipe), turned(count=12, at=5))
    assert all(solution.converged for solution in solutions)
    assert not any("dropped" in solution.reason for solution in solutions[:5])
    assert "finished without; dropped" in solutions[5].reason
    assert solutions[5].num_iter <= 3 * solutions[0].num_iter + 2  # cut off after twice the bare solve
    assert any("kept" in solution.reason for solution in solutions[6:8])
    assert solutions[-1].num_iter <= 1.3 * solutions[4].num_iter


def pace(solution: Solution) -> float:
    return solution.num_iter / -math.log10(solution.relative_residual.item())


def test_one_that_ages_is_built_again():
    solutions = run(Recycling(CG(), Nystrom(15)), drifting(12))
    stale = next(i for i, solution in enumerate(solutions) if "to be made anew" in solution.reason)
    assert pace(solutions[stale]) > 1.3 * min(pace(solutions[1]), pace(solutions[2]))
    assert "Nystrom built with 15 products" in solutions[stale + 1].reason
    assert pace(solutions[stale + 1]) < 0.8 * pace(solutions[stale])


def test_one_that_ages_stays_where_another_would_not_pay():
    recipe = Given(lambda A: Nystrom(15).build(A))
    for price, renewed in ((15, True), (1000, False)):
        solver, systems = Recycling(CG(), recipe), drifting(12)
        object.__setattr__(recipe, "price", 0)
        bought = run(solver, systems[:3])
        assert "when new" in bought[2].reason
        object.__setattr__(recipe, "price", price)
        assert any("anew" in solution.reason for solution in run(solver, systems[3:])) == renewed


def test_deflation_follows_a_drift_without_a_product():
    """What it carries from earlier operators is worth more than a fit to the first one, or to the last one alone."""
    systems, recipe = drifting(30), Deflation(20)
    recycled = run(Recycling(CG(), recipe), systems)
    assert not any("built" in solution.reason for solution in recycled)
    for forget in (False, True):
        product, x, spent = None, None, []
        for matrix, b in systems:
            recorder = Recorder(operator_of(matrix), 20)
            solution = CG(preconditioner=product).solve(recorder.operator, b, x)
            x = solution.value
            spent.append(solution.num_matvec)
            if product is None or forget:
                product = recipe.fit(*recorder.pairs()).product
        assert sum(solution.num_matvec for solution in recycled[20:]) < 0.8 * sum(spent[20:])


def test_reviewed_after_sixteen_solves_and_dropped_where_systems_became_easy():
    """A preconditioner from another time does harm then, which no solve with it can show."""
    rough = [(decaying(), draw(N, seed=i)) for i in range(3)]
    easy = [((2 + i) * torch.eye(N, dtype=torch.float64), draw(N, seed=i)) for i in range(3, 22)]
    P = Nystrom(15).build(operator_of(decaying()))
    solutions = run(Recycling(CG(), Given(lambda A: P)), rough + easy)
    assert "kept" in solutions[1].reason  # the first of sixteen
    assert "to be reviewed" in solutions[16].reason
    assert "review of Given" in solutions[17].reason
    assert "dropped" in solutions[17].reason
    assert all("no preconditioner" in solution.reason for solution in solutions[18:])
    assert [solution.num_iter for solution in solutions[17:]] == [1] * 5


def test_review_keeps_what_pays():
    solutions = run(Recycling(CG(), Given(perfect)), turned(count=20, at=20))
    reviews = [i for i, solution in enumerate(solutions) if "review of Given" in solution.reason]
    assert reviews == [17]
    assert "kept" in solutions[17].reason
    assert solutions[18].num_iter == 1


def test_one_that_is_not_definite_is_dropped_and_the_solve_finished():
    solutions = run(Recycling(CG(), Given(lambda A: torch.neg)), drifting(3))
    assert all(solution.converged for solution in solutions)
    assert "dropped" in solutions[1].reason
    assert "no preconditioner" in solutions[2].reason


def test_solves_cut_off_early_are_judged_by_their_residuals_and_continued():
    """With few iterations per outer step no solve converges alone; together they follow the solution."""
    matrix, b = drifting(1)[0]
    cut = CG(max_iter=6)
    solver = Recycling(cut, Given(perfect))
    first, second = (solver.solve(operator_of(matrix), b) for _ in range(2))
    assert not first.converged
    assert "kept" in second.reason
    assert second.converged
    continued, solution = Recycling(cut), exact(matrix, b)
    errors = [solution]
    for _ in range(20):
        errors.append(continued.solve(operator_of(matrix), b).value - solution)
    energies = torch.stack([error @ matrix @ error for error in errors])
    assert (energies[1:] < energies[:-1]).all()
    assert energies[-1] < 0.5 * energies[1]


# ---- memory ----


def test_sizes_do_not_disturb_each_other():
    solver = Recycling(CG(), Given(perfect))
    small = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    for i, (matrix, b) in enumerate(drifting(4)):
        solution = solver.solve(operator_of(matrix), b)
        other = solver.solve(operator_of(small), draw(8, seed=i))
        single = solver.solve(operator_of(matrix.float()), b.float())
        assert solution.converged
        assert other.converged
        torch.testing.assert_close(single.value.double(), solution.value, rtol=0, atol=1e-2)
    assert "Given" in solution.reason
    assert "Given" in other.reason


@pytest.mark.parametrize(
    "forget", [lambda s: s.reset() or s, copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_reset_copies_and_pickles_start_afresh(forget: Callable[[Recycling], Recycling]):
    solver, systems = Recycling(CG(rtol=1e-6), Deflation(7)), drifting(3)
    before = run(solver, systems)
    fresh = forget(solver)
    assert (fresh.solver, fresh.preconditioner) == (CG(rtol=1e-6), Deflation(7))
    for old, new in zip(before, run(fresh, systems), strict=True):
        assert old.reason == new.reason
        assert torch.equal(old.value, new.value)


def test_a_solve_that_fails_leaves_the_memory_as_it_was():
    solver, (matrix, b) = Recycling(CG()), drifting(1)[0]
    solver.solve(operator_of(matrix), b)
    broken = b.clone()
    broken[3] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinity in b"):
        solver.solve(operator_of(matrix), broken)
    with pytest.raises(ValueError, match="float64"):
        solver.solve(operator_of(matrix), b.float())
    with pytest.raises(ValueError, match="shape"):
        solver.solve(operator_of(matrix), b[:-1])
    assert solver.solve(operator_of(matrix), b).num_iter == 0


def test_zero_right_hand_side_costs_and_teaches_nothing():
    solver, (matrix, b) = Recycling(CG(), Given(perfect)), drifting(1)[0]
    for _ in range(2):
        solution = solver.solve(operator_of(matrix), torch.zeros_like(b))
        assert (solution.num_iter, solution.num_matvec, solution.converged) == (0, 0, True)
        assert "zero right-hand side" in solution.reason
    assert "no preconditioner" in solver.solve(operator_of(matrix), b).reason


def test_negative_curvature_is_told_and_not_fitted_to():
    matrix = decaying() - 100 * torch.eye(N, dtype=torch.float64)
    for recipe in (Deflation(), QuasiNewton()):
        solver = Recycling(CG(), recipe)
        for _ in range(2):
            solution = solver.solve(LinearOperator.from_dense(matrix, symmetric=True), draw(N))
            assert not solution.converged
            assert "negative curvature" in solution.reason


def test_threads_at_the_same_time():
    solver, systems, failures = Recycling(CG(), Deflation(30)), drifting(8), []

    def work(mine: list[tuple[Tensor, Tensor]]) -> None:
        for (matrix, b), solution in zip(mine, run(solver, mine), strict=True):
            if not (solution.value - exact(matrix, b)).norm() < 1e-7:
                failures.append(solution)

    threads = [threading.Thread(target=work, args=(systems[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Recycling(MINRES()), TypeError, r"needs a CG\(...\); got MINRES"),
        (lambda: Recycling(CG(preconditioner=Jacobi())), ValueError, "without a preconditioner"),
        (lambda: Recycling(CG(), torch.clone), TypeError, "needs a recipe.*Pass a finished function to CG"),
    ],
)
def test_refuses_what_it_cannot_use(make: Callable[[], object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()


def test_refuses_operators_as_its_parts_do():
    with pytest.raises(ValueError, match="needs a symmetric operator"):
        Recycling(CG()).solve(LinearOperator.from_dense(draw(N, N)), draw(N))
    stack = operator_of(torch.stack([decaying()] * 2))
    with pytest.raises(ValueError, match="fitted to one system; got a stack"):
        Recycling(CG(), Deflation()).solve(stack, draw(2, N))


# ---- where it is used ----


def test_outer_steps_of_a_bilevel_problem():
    """Ridge regression: each outer step has an operator of its own, and a closed form."""
    features, target = draw(200, N, seed=5) * torch.logspace(0, 2, N, dtype=torch.float64), draw(200, seed=6)
    valid, wanted = draw(50, N, seed=7), draw(50, seed=8)
    condition = ig.Stationary(
        lambda x, y: 0.5 * (features @ y - target).square().mean() + 0.5 * x.exp() * y.square().sum()
    )
    upper = lambda x, y: 0.5 * (valid @ y - wanted).square().mean()

    def best(x: Tensor) -> Tensor:
        gram = features.mT @ features / len(features) + x.exp() * torch.eye(N, dtype=torch.float64)
        return exact(gram, features.mT @ target / len(features))

    solver = Recycling(CG(), Deflation(30))
    spent: list[int] = []
    for step in range(5):
        x = torch.tensor(-1 - 0.1 * step, dtype=torch.float64, requires_grad=True)
        found = ig.hypergradient(upper, condition, x.detach(), best(x).detach(), solver=solver)
        (closed,) = torch.autograd.grad(upper(x, best(x)), x)
        torch.testing.assert_close(found.value, closed, rtol=1e-6, atol=0)
        spent.append(found.report.solves[0].iterations)
        again = ig.implicit_root(condition, x, best(x).detach(), solver=solver)
        (gradient,) = torch.autograd.grad(upper(x, again), x)
        torch.testing.assert_close(gradient, closed, rtol=1e-6, atol=0)
    assert max(spent[1:]) < 0.5 * spent[0]
    assert "Deflation" in found.report.solves[0].reason
