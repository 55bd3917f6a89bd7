"""Estimators of the gradient of an upper loss through the solution of an inner problem."""

from implicitgrad.hypergradient.implicit import Hypergradient, hypergradient

__all__ = ["Hypergradient", "hypergradient"]
