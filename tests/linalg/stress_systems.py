"""Systems from easy to hopeless for test_stress.py: 28 families, drawn from seeds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from implicitgrad.linalg import LinearOperator

SEEDS_PER_FAMILY = 8


@dataclass(frozen=True)
class System:
    """A x = b with what is declared about A, and the demands of solvers that it meets with a condition number of 3."""

    name: str
    matrix: Tensor
    b: Tensor
    symmetric: bool = False
    easy_for: frozenset[str] = frozenset()

    @property
    def operator(self) -> LinearOperator:
        return LinearOperator.from_dense(self.matrix, symmetric=self.symmetric)

    @property
    def is_finite(self) -> bool:
        return bool(self.matrix.isfinite().all() and self.b.isfinite().all())

    @property
    def is_extreme(self) -> bool:
        return bool(self.matrix.abs().max() > 1e200 or 0 < self.matrix.abs().max() < 1e-200)

    @property
    def is_singular(self) -> bool:
        values = torch.linalg.svdvals(self.matrix.double())
        return bool((values[..., -1] <= 1e-15 * values[..., 0]).any())


class Draw:
    """Random matrices and vectors from one seed."""

    def __init__(self, seed: int):
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def pick(self, *options):
        return options[self.seed % len(options)]

    def orthogonal(self, m: int, n: int) -> Tensor:
        return torch.linalg.qr(self.normal(m, n))[0]

    def scales(self, n: int, decades: float = 12.0) -> Tensor:
        """From 10^-decades to 10^decades, shuffled."""
        values = torch.logspace(-decades, decades, n, dtype=torch.float64) if n > 1 else torch.ones(1).double()
        return values[torch.randperm(n, generator=self._generator)]

    def symmetric(self, eigenvalues: Tensor) -> Tensor:
        q = self.orthogonal(len(eigenvalues), len(eigenvalues))
        matrix = q @ torch.diag(eigenvalues.double()) @ q.mT
        return (matrix + matrix.mT) / 2

    def with_singular_values(self, m: int, n: int, values: Tensor) -> Tensor:
        return self.orthogonal(m, len(values)) @ torch.diag(values.double()) @ self.orthogonal(n, len(values)).mT


FAMILIES: dict[str, Callable[[Draw], System]] = {}


def family(make: Callable[[Draw], System]) -> Callable[[Draw], System]:
    FAMILIES[make.__name__] = make
    return make


ALL = frozenset({"definite", "symmetric", "square", "contraction"})


@family
def definite(draw: Draw) -> System:
    n = draw.integer(2, 25)
    return System("", draw.symmetric(torch.linspace(0.5, 1.5, n)), draw.normal(n), symmetric=True, easy_for=ALL)


@family
def definite_ill_conditioned(draw: Draw) -> System:
    n = draw.integer(5, 25)
    eigenvalues = torch.logspace(-draw.pick(3, 5, 8, 11, 14, 17), 0, n)
    return System("", draw.symmetric(eigenvalues), draw.normal(n), symmetric=True)


@family
def indefinite(draw: Draw) -> System:
    n = draw.integer(2, 25)
    eigenvalues = torch.linspace(0.5, 1.5, n)
    eigenvalues[::2] *= -1
    return System("", draw.symmetric(eigenvalues), draw.normal(n), True, frozenset({"symmetric", "square"}))


@family
def indefinite_ill_conditioned(draw: Draw) -> System:
    n = draw.integer(5, 25)
    eigenvalues = torch.logspace(-draw.pick(3, 6, 9, 13), 0, n)
    eigenvalues[::2] *= -1
    return System("", draw.symmetric(eigenvalues), draw.normal(n), symmetric=True)


@family
def saddle_point(draw: Draw) -> System:
    n = draw.integer(4, 15)
    constraint, zero = draw.normal(n // 2, n), torch.zeros(n // 2, n // 2, dtype=torch.float64)
    hessian = draw.symmetric(torch.logspace(-2, 1, n))
    matrix = torch.cat([torch.cat([hessian, constraint.mT], 1), torch.cat([constraint, zero], 1)])
    return System("", matrix, draw.normal(len(matrix)), symmetric=True)


@family
def symmetric_singular(draw: Draw) -> System:
    n = draw.integer(5, 25)
    eigenvalues = torch.linspace(-1, 2, n)
    eigenvalues[: draw.integer(1, 3)] = 0
    matrix = draw.symmetric(eigenvalues)
    consistent = draw.pick(True, False)
    return System(f"consistent={consistent}", matrix, matrix @ draw.normal(n) if consistent else draw.normal(n), True)


@family
def semidefinite_of_low_rank(draw: Draw) -> System:
    n, rank = draw.integer(5, 25), draw.pick(1, 2, 4)
    factor = draw.normal(n, rank)
    consistent = draw.pick(True, True, False)
    b = factor @ draw.normal(rank) if consistent else draw.normal(n)
    return System(f"consistent={consistent}", factor @ factor.mT, b, symmetric=True)


@family
def nonsymmetric(draw: Draw) -> System:
    n = draw.integer(2, 25)
    matrix = torch.eye(n, dtype=torch.float64) + 0.5 * draw.orthogonal(n, n)
    return System("", matrix, draw.normal(n), easy_for=frozenset({"square", "contraction"}))


@family
def gaussian(draw: Draw) -> System:
    n = draw.integer(2, 40)
    return System("", draw.normal(n, n), draw.normal(n))


@family
def nonsymmetric_singular(draw: Draw) -> System:
    n = draw.integer(4, 25)
    matrix = draw.normal(n, n - draw.integer(1, 2))
    matrix = matrix @ draw.normal(matrix.shape[1], n)
    consistent = draw.pick(True, False)
    return System(f"consistent={consistent}", matrix, matrix @ draw.normal(n) if consistent else draw.normal(n))


@family
def exactly_singular(draw: Draw) -> System:
    n = draw.integer(2, 20)
    matrix = torch.diag(torch.arange(n, dtype=torch.float64) - draw.pick(0, n // 2))
    b = draw.normal(n)
    return System("", matrix, draw.pick(b, matrix @ b), symmetric=draw.pick(True, True, False))


@family
def non_normal(draw: Draw) -> System:
    """All eigenvalues at one, the smallest singular value near 2^-n."""
    n = draw.integer(3, 40)
    matrix = torch.eye(n, dtype=torch.float64) + torch.diag(torch.full((n - 1,), 2.0).double(), 1)
    return System("", matrix, draw.normal(n))


@family
def nilpotent(draw: Draw) -> System:
    n = draw.integer(2, 40)
    b = torch.eye(n, dtype=torch.float64)[draw.pick(0, -1)]
    return System("", torch.diag(torch.ones(n - 1, dtype=torch.float64), 1), b)


@family
def rotation(draw: Draw) -> System:
    n = draw.integer(2, 35)
    matrix = draw.normal(n, n)
    shift = torch.eye(n, dtype=torch.float64)
    return System("", draw.pick(shift.roll(1, 0), matrix - matrix.mT, matrix - matrix.mT + 0.3 * shift), shift[-1])


@family
def scaled(draw: Draw) -> System:
    n = draw.integer(2, 25)
    scale = draw.pick(1e-12, 1e12)
    easy = frozenset({"symmetric", "square"})
    eigenvalues = torch.linspace(0.5, 1.5, n)
    eigenvalues[::2] *= -1
    return System(f"by {scale}", scale * draw.symmetric(eigenvalues), draw.normal(n), True, easy)


@family
def scaled_rows(draw: Draw) -> System:
    n = draw.integer(3, 20)
    matrix = draw.scales(n).unsqueeze(-1) * (torch.eye(n, dtype=torch.float64) + 0.5 * draw.orthogonal(n, n))
    return System("", matrix, draw.pick(draw.normal(n), matrix @ draw.normal(n)))


@family
def scaled_columns(draw: Draw) -> System:
    n = draw.integer(3, 20)
    matrix = (torch.eye(n, dtype=torch.float64) + 0.5 * draw.orthogonal(n, n)) * draw.scales(n)
    return System("", matrix, draw.pick(draw.normal(n), matrix @ draw.normal(n)))


@family
def scaled_on_both_sides(draw: Draw) -> System:
    n = draw.integer(3, 20)
    scale, eigenvalues = draw.scales(n, decades=6.0), torch.linspace(0.5, 1.5, n)
    eigenvalues[:: draw.pick(2, n)] *= -1
    matrix = scale.unsqueeze(-1) * draw.symmetric(eigenvalues) * scale
    return System("", (matrix + matrix.mT) / 2, draw.pick(draw.normal(n), matrix @ draw.normal(n)), symmetric=True)


@family
def one_scaled_row_or_column(draw: Draw) -> System:
    n = draw.integer(3, 20)
    matrix = torch.eye(n, dtype=torch.float64) + 0.5 * draw.orthogonal(n, n)
    (matrix if draw.pick(True, False) else matrix.mT)[n // 2] *= draw.pick(1e-12, 1e-12, 1e12, 1e12)
    return System("", matrix, draw.normal(n))


@family
def rectangular(draw: Draw) -> System:
    m, n = draw.pick((40, 12), (12, 40), (7, 6), (1, 9), (9, 1))
    matrix = draw.with_singular_values(m, n, torch.linspace(0.5, 1.5, min(m, n)))
    return System(f"{m}x{n}", matrix, draw.pick(matrix @ draw.normal(n), draw.normal(m)), easy_for=frozenset({"any"}))


@family
def rectangular_rank_deficient(draw: Draw) -> System:
    m, n = draw.pick((40, 12), (12, 40))
    matrix = draw.with_singular_values(m, n, torch.linspace(0.5, 1.5, draw.integer(1, 9)))
    b = draw.normal(m) if draw.integer(0, 1) else matrix @ draw.normal(n)
    return System(f"{m}x{n}", matrix, b, easy_for=frozenset({"any"}))


@family
def rectangular_badly_scaled(draw: Draw) -> System:
    m, n = draw.pick((40, 12), (12, 40))
    matrix = draw.with_singular_values(m, n, torch.linspace(0.5, 1.5, min(m, n)))
    matrix = matrix * draw.scales(n) if draw.integer(0, 1) else matrix * draw.scales(m).unsqueeze(-1)
    return System(f"{m}x{n}", matrix, draw.normal(m))


@family
def one_unknown(draw: Draw) -> System:
    value = draw.pick(0.8, -3.0, 0.0, 1e-12, 1e300, 1e-300, -1e-12, 5e-324)
    return System(f"{value}", torch.tensor([[value]], dtype=torch.float64), draw.normal(1), symmetric=True)


@family
def zero_matrix(draw: Draw) -> System:
    n = draw.integer(1, 10)
    return System("", torch.zeros(n, n, dtype=torch.float64), draw.normal(n), symmetric=draw.pick(True, False))


@family
def unusual_right_hand_sides(draw: Draw) -> System:
    n = draw.integer(2, 20)
    sizes = draw.pick([0.0, 0.0, 0.0], [1.0, 0.0, 1e-300], [1e300, 1.0, 1e-12])
    b = draw.normal(3, n) * torch.tensor(sizes, dtype=torch.float64).unsqueeze(-1)
    return System("", draw.symmetric(torch.linspace(0.5, 1.5, n)), b, symmetric=True, easy_for=ALL)


@family
def stack_of_good_and_bad(draw: Draw) -> System:
    n = draw.integer(3, 12)
    good, hopeless = torch.linspace(0.5, 1.5, n), torch.linspace(0, 1, n)
    spectra = [good, -good, hopeless, good.flip(0) * torch.tensor([-1.0, 1.0]).repeat(n)[:n]]
    return System("", torch.stack([draw.symmetric(values) for values in spectra]), draw.normal(2, 4, n), symmetric=True)


@family
def not_finite(draw: Draw) -> System:
    n, bad = draw.integer(2, 10), draw.pick(torch.nan, torch.inf)
    matrix, b = draw.symmetric(torch.linspace(0.5, 1.5, n)), draw.normal(n)
    if draw.pick(True, True, False, False):
        b[draw.integer(0, n - 1)] = bad
    else:
        matrix[0, 0] = bad
    return System(f"{bad}", matrix, b, symmetric=draw.pick(True, True, True, True, False))


@family
def single_precision(draw: Draw) -> System:
    made = draw.pick(
        definite, indefinite, definite_ill_conditioned, symmetric_singular, nonsymmetric, gaussian, scaled, rectangular
    )(draw)
    return replace(made, matrix=made.matrix.float(), b=made.b.float())


@cache
def systems() -> list[tuple[str, System]]:
    return [
        (f"{name}[{seed}]", make(Draw(seed))) for name, make in FAMILIES.items() for seed in range(SEEDS_PER_FAMILY)
    ]
