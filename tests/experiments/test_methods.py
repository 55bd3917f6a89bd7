"""Ways to choose penalties: each finds a known best point as well as it should, and goes on from its state."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from experiments.methods import GridSearch, HypergradientDescent, Method, ParzenSearch, RandomSearch

NUM_FEATURES = 3


def _parzen_search(num_startup: int) -> ParzenSearch:
    return ParzenSearch(
        NUM_FEATURES,
        seed=0,
        smallest=1e-4,
        largest=1.0,
        spread=4.0,
        num_startup=num_startup,
        num_candidates=24,
        best_fraction=0.15,
    )


METHODS: dict[str, Callable[[], Method]] = {
    "grid_search": lambda: GridSearch(NUM_FEATURES, num_points=40, smallest=1e-4, largest=1.0),
    "random_search": lambda: RandomSearch(NUM_FEATURES, seed=0, smallest=1e-4, largest=1.0),
    "parzen_search": lambda: _parzen_search(num_startup=10),
    "hypergradient_descent": lambda: HypergradientDescent(
        NUM_FEATURES, start=1e-2, optimizer=lambda x: torch.optim.Adam(x, lr=0.2)
    ),
}


def _bowl(x: Tensor) -> Tensor:
    """Lowest, at zero, where the shared term is -3 and the three others are 1, 0 and -1."""
    return (x - x.new_tensor([-3.0, 1.0, 0.0, -1.0])).square().sum()


def _run(method: Method, num_solves: int) -> list[tuple[float, list[float]]]:
    seen = []
    for _ in range(num_solves):
        x = method.propose()
        loss = _bowl(x)
        seen.append((loss.item(), x.tolist()))
        method.observe(x, loss)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_method_goes_on_from_its_state(name: str) -> None:
    whole = _run(METHODS[name](), 30)
    first, second = METHODS[name](), METHODS[name]()
    begun = _run(first, 17)
    second.load_state_dict(first.state_dict())
    assert begun + _run(second, 13) == whole


@pytest.mark.parametrize("name", ["grid_search", "random_search"])
def test_shared_searches_keep_features_equal_and_in_range(name: str) -> None:
    for _, x in _run(METHODS[name](), 40):
        assert math.log(1e-4) - 1e-12 <= x[0] <= 1e-12
        assert x[1:] == [0.0] * NUM_FEATURES


def test_grid_search_visits_each_point_once_and_spreads_early_ones() -> None:
    visited = [x[0] for _, x in _run(METHODS["grid_search"](), 40)]
    steps = torch.tensor(sorted(visited)).diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps))
    thirds = {min(2, math.floor(3 * x / math.log(1e-4))) for x in visited[:5]}
    assert thirds == {0, 1, 2}


def test_parzen_search_beats_its_own_uniform_draws() -> None:
    steered, uniform = _run(_parzen_search(num_startup=10), 100), _run(_parzen_search(num_startup=100), 100)
    assert min(steered)[0] < 0.5 * min(uniform)[0]


def test_parzen_search_stays_in_its_box() -> None:
    xs = torch.tensor([x for _, x in _run(_parzen_search(num_startup=10), 100)], dtype=torch.float64)
    assert xs[:, 0].max() <= 0
    assert xs[:, 0].min() >= math.log(1e-4)
    assert xs[:, 1:].abs().max() <= 4


def test_hypergradient_descent_reaches_the_minimum() -> None:
    assert _run(METHODS["hypergradient_descent"](), 100)[-1][0] < 1e-3
