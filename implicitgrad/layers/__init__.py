"""Layers whose output solves a problem."""

from implicitgrad.layers.fixed_point import FixedPointLayer
from implicitgrad.layers.optnet import OptNetLayer
from implicitgrad.layers.projection import ProjectionLayer
from implicitgrad.layers.sinkhorn import Coupling, sinkhorn
from implicitgrad.layers.sorting import SoftRank, SoftSort, isotonic_regression, permutahedron, soft_rank, soft_sort

__all__ = [
    "Coupling",
    "FixedPointLayer",
    "OptNetLayer",
    "ProjectionLayer",
    "SoftRank",
    "SoftSort",
    "isotonic_regression",
    "permutahedron",
    "sinkhorn",
    "soft_rank",
    "soft_sort",
]
