"""Linear operators on flat vectors and solvers for systems with them."""

from implicitgrad.linalg.auto import Auto
from implicitgrad.linalg.bicgstab import BiCGSTAB
from implicitgrad.linalg.block_cg import BlockCG
from implicitgrad.linalg.certificate import ErrorBound
from implicitgrad.linalg.cg import CG
from implicitgrad.linalg.cgls import CGLS
from implicitgrad.linalg.chebyshev import Chebyshev
from implicitgrad.linalg.checks import AsymmetryError, check_operator, check_symmetric
from implicitgrad.linalg.cholesky import Cholesky
from implicitgrad.linalg.deflation import Deflation
from implicitgrad.linalg.density import SpectralDensity, spectral_density
from implicitgrad.linalg.fitted import QuasiNewton
from implicitgrad.linalg.gmres import GMRES
from implicitgrad.linalg.jacobi import Jacobi
from implicitgrad.linalg.known_inverse import KnownInverse
from implicitgrad.linalg.kronecker import KroneckerBlock, kronecker
from implicitgrad.linalg.lanczos import Lanczos, lanczos
from implicitgrad.linalg.ldl import LDL
from implicitgrad.linalg.lissa import LiSSA
from implicitgrad.linalg.lowrank import LowRankInverse
from implicitgrad.linalg.lsmr import LSMR
from implicitgrad.linalg.lu import LU
from implicitgrad.linalg.minres import MINRES
from implicitgrad.linalg.multishift import MultiShiftCG
from implicitgrad.linalg.neumann import Neumann
from implicitgrad.linalg.nystrom import Nystrom
from implicitgrad.linalg.operator import LinearOperator
from implicitgrad.linalg.preconditioner import Preconditioner
from implicitgrad.linalg.recycling import Recycling
from implicitgrad.linalg.sampling import Estimate
from implicitgrad.linalg.sliding import SlidingWindow
from implicitgrad.linalg.solver import LinearSolver, Solution
from implicitgrad.linalg.spectral import (
    ConditionNumber,
    Eigenpairs,
    Extremes,
    condition_number,
    extreme_eigenvalues,
    per_block_top_eigenvalue,
    top_eigenvalues,
)
from implicitgrad.linalg.split_rows import SplitRows, split_rows
from implicitgrad.linalg.symmetry import irregular
from implicitgrad.linalg.trace import diagonal, per_block_trace, trace

__all__ = [
    "CG",
    "CGLS",
    "GMRES",
    "LDL",
    "LSMR",
    "LU",
    "MINRES",
    "AsymmetryError",
    "Auto",
    "BiCGSTAB",
    "BlockCG",
    "Chebyshev",
    "Cholesky",
    "ConditionNumber",
    "Deflation",
    "Eigenpairs",
    "ErrorBound",
    "Estimate",
    "Extremes",
    "Jacobi",
    "KnownInverse",
    "KroneckerBlock",
    "Lanczos",
    "LiSSA",
    "LinearOperator",
    "LinearSolver",
    "LowRankInverse",
    "MultiShiftCG",
    "Neumann",
    "Nystrom",
    "Preconditioner",
    "QuasiNewton",
    "Recycling",
    "SlidingWindow",
    "Solution",
    "SpectralDensity",
    "SplitRows",
    "check_operator",
    "check_symmetric",
    "condition_number",
    "diagonal",
    "extreme_eigenvalues",
    "irregular",
    "kronecker",
    "lanczos",
    "per_block_top_eigenvalue",
    "per_block_trace",
    "spectral_density",
    "split_rows",
    "top_eigenvalues",
    "trace",
]
