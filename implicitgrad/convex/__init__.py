"""Solutions of convex problems as differentiable functions of their parameters."""

from implicitgrad.convex.canonical import SolverStatusError
from implicitgrad.convex.layer import ConvexLayer, from_cvxpy

__all__ = ["ConvexLayer", "SolverStatusError", "from_cvxpy"]
