"""Solvers of inner problems whose solution is differentiable."""

from implicitgrad.solvers.anderson import Anderson
from implicitgrad.solvers.augmented_lagrangian import AugmentedLagrangian
from implicitgrad.solvers.bisection import Bisection
from implicitgrad.solvers.block_coordinate import BlockCoordinateDescent
from implicitgrad.solvers.fixed_point import FixedPointIteration
from implicitgrad.solvers.gradient_descent import GradientDescent
from implicitgrad.solvers.lbfgs import LBFGS
from implicitgrad.solvers.least_squares import GaussNewton, LevenbergMarquardt
from implicitgrad.solvers.mirror_descent import MirrorGradientDescent
from implicitgrad.solvers.newton import Newton, RegularizedNewton
from implicitgrad.solvers.projected_gradient import AcceleratedProjectedGradient
from implicitgrad.solvers.proximal_gradient import AcceleratedProximalGradient
from implicitgrad.solvers.qp import InfeasibleError, solve_qp
from implicitgrad.solvers.qp_interior_point import QPInteriorPoint
from implicitgrad.solvers.qp_package import QPPackage
from implicitgrad.solvers.scipy_bridge import ScipyLeastSquares, ScipyMinimize, ScipyRoot
from implicitgrad.solvers.solver import InnerSolver, SolverInfo
from implicitgrad.solvers.torch_optim import TorchOptim

__all__ = [
    "LBFGS",
    "AcceleratedProjectedGradient",
    "AcceleratedProximalGradient",
    "Anderson",
    "AugmentedLagrangian",
    "Bisection",
    "BlockCoordinateDescent",
    "FixedPointIteration",
    "GaussNewton",
    "GradientDescent",
    "InfeasibleError",
    "InnerSolver",
    "LevenbergMarquardt",
    "MirrorGradientDescent",
    "Newton",
    "QPInteriorPoint",
    "QPPackage",
    "RegularizedNewton",
    "ScipyLeastSquares",
    "ScipyMinimize",
    "ScipyRoot",
    "SolverInfo",
    "TorchOptim",
    "solve_qp",
]
