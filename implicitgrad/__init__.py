"""Implicit differentiation and bilevel optimization for PyTorch.

Declare what is true at the solution of an inner problem; the solution becomes differentiable.
"""

from implicitgrad import curvature, layers, linalg, projections, prox, solvers, tree
from implicitgrad.check import HypergradientCheck, check_hypergradient
from implicitgrad.conditions import (
    KKT,
    QP,
    BlockProximalGradient,
    ConicProgram,
    FixedPoint,
    MirrorDescent,
    NewtonFixedPoint,
    OptimalityCondition,
    ProjectedGradient,
    ProximalGradient,
    Root,
    Stationary,
)
from implicitgrad.convex import from_cvxpy
from implicitgrad.hypergradient import Hypergradient, hypergradient
from implicitgrad.implicit import ImplicitSolver, implicit, implicit_root
from implicitgrad.influence import Influence
from implicitgrad.module import FunctionalModule, functional
from implicitgrad.report import ConvergenceError, ConvergenceWarning, LinearSolve, Log, Report, diagnostics

__version__ = "0.1.0"

__all__ = [
    "KKT",
    "QP",
    "BlockProximalGradient",
    "ConicProgram",
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPoint",
    "FunctionalModule",
    "Hypergradient",
    "HypergradientCheck",
    "ImplicitSolver",
    "Influence",
    "LinearSolve",
    "Log",
    "MirrorDescent",
    "NewtonFixedPoint",
    "OptimalityCondition",
    "ProjectedGradient",
    "ProximalGradient",
    "Report",
    "Root",
    "Stationary",
    "check_hypergradient",
    "curvature",
    "diagnostics",
    "from_cvxpy",
    "functional",
    "hypergradient",
    "implicit",
    "implicit_root",
    "layers",
    "linalg",
    "projections",
    "prox",
    "solvers",
    "tree",
]
