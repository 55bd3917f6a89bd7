"""Projections onto sets: the nearest point, differentiable in the point and in the parameters of the set.

Each takes one point, as a tree; many points go through `torch.func.vmap`.
"""

from implicitgrad.projections.balls import l1_ball, l1_sphere, l2_ball, l2_sphere
from implicitgrad.projections.box_sections import box_section
from implicitgrad.projections.boxes import box, hypercube, linf_ball, non_negative
from implicitgrad.projections.cones import dual_cone, exponential_cone, packed_psd_cone, second_order_cone, zero_cone
from implicitgrad.projections.matrix_sets import psd_cone, stiefel
from implicitgrad.projections.planes import RowSpace, affine_set, half_space, hyperplane, row_space
from implicitgrad.projections.polyhedra import polyhedron
from implicitgrad.projections.products import Dykstra, DykstraInfo, cartesian
from implicitgrad.projections.simplices import simplex, sparse_simplex
from implicitgrad.projections.transport import birkhoff, entropic_birkhoff, entropic_transport, transport

__all__ = [
    "Dykstra",
    "DykstraInfo",
    "RowSpace",
    "affine_set",
    "birkhoff",
    "box",
    "box_section",
    "cartesian",
    "dual_cone",
    "entropic_birkhoff",
    "entropic_transport",
    "exponential_cone",
    "half_space",
    "hypercube",
    "hyperplane",
    "l1_ball",
    "l1_sphere",
    "l2_ball",
    "l2_sphere",
    "linf_ball",
    "non_negative",
    "packed_psd_cone",
    "polyhedron",
    "psd_cone",
    "row_space",
    "second_order_cone",
    "simplex",
    "sparse_simplex",
    "stiefel",
    "transport",
    "zero_cone",
]
