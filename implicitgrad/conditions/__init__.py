"""What holds at the solution of an inner problem."""

from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.conditions.fixed_point import FixedPoint
from implicitgrad.conditions.stationary import Stationary

__all__ = ["FixedPoint", "OptimalityCondition", "Stationary"]
