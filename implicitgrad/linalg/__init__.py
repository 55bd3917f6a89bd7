"""Linear operators on flat vectors and solvers for systems with them."""

from implicitgrad.linalg.auto import Auto
from implicitgrad.linalg.cg import CG
from implicitgrad.linalg.checks import AsymmetryError, check_symmetric
from implicitgrad.linalg.cholesky import Cholesky
from implicitgrad.linalg.gmres import GMRES
from implicitgrad.linalg.known_inverse import KnownInverse
from implicitgrad.linalg.lu import LU
from implicitgrad.linalg.minres import MINRES
from implicitgrad.linalg.neumann import Neumann
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.solver import LinearSolver, Solution
from implicitgrad.linalg.symmetry import irregular

__all__ = [
    "CG",
    "GMRES",
    "LU",
    "MINRES",
    "AsymmetryError",
    "Auto",
    "Cholesky",
    "KnownInverse",
    "LinearOperator",
    "LinearSolver",
    "Neumann",
    "Solution",
    "check_symmetric",
    "irregular",
]
