"""Ways to choose penalties, one file each; a new one is one file here and one yaml in `conf/method/`."""

from experiments.methods.grid_search import GridSearch
from experiments.methods.hypergradient_descent import HypergradientDescent
from experiments.methods.method import Method
from experiments.methods.parzen_search import ParzenSearch
from experiments.methods.random_search import RandomSearch

__all__ = ["GridSearch", "HypergradientDescent", "Method", "ParzenSearch", "RandomSearch"]
