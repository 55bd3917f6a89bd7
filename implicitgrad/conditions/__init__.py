"""What holds at the solution of an inner problem."""

from implicitgrad.conditions.block_proximal_gradient import BlockProximalGradient
from implicitgrad.conditions.condition import OptimalityCondition
from implicitgrad.conditions.conic import ConicProgram
from implicitgrad.conditions.fixed_point import FixedPoint
from implicitgrad.conditions.kkt import KKT
from implicitgrad.conditions.mirror_descent import MirrorDescent
from implicitgrad.conditions.newton import NewtonFixedPoint
from implicitgrad.conditions.projected_gradient import ProjectedGradient
from implicitgrad.conditions.proximal_gradient import ProximalGradient
from implicitgrad.conditions.qp import QP
from implicitgrad.conditions.root import Root
from implicitgrad.conditions.stationary import Stationary

__all__ = [
    "KKT",
    "QP",
    "BlockProximalGradient",
    "ConicProgram",
    "FixedPoint",
    "MirrorDescent",
    "NewtonFixedPoint",
    "OptimalityCondition",
    "ProjectedGradient",
    "ProximalGradient",
    "Root",
    "Stationary",
]
