"""Curvature of user code as linear operators: Hessians, Gauss-Newton and Fisher matrices, Jacobians."""

from implicitgrad.curvature.exact_gauss_newton import exact_gauss_newton
from implicitgrad.curvature.fisher import empirical_fisher, sampled_fisher
from implicitgrad.curvature.gauss_newton import gauss_newton
from implicitgrad.curvature.hessian import hessian
from implicitgrad.curvature.jacobian import jacobian
from implicitgrad.curvature.kfac import kfac, minibatch_kfac
from implicitgrad.curvature.minibatch import minibatch_sum
from implicitgrad.curvature.mixed import mixed_derivative
from implicitgrad.curvature.rows import empirical_rows, gauss_newton_rows, sampled_rows

__all__ = [
    "empirical_fisher",
    "empirical_rows",
    "exact_gauss_newton",
    "gauss_newton",
    "gauss_newton_rows",
    "hessian",
    "jacobian",
    "kfac",
    "minibatch_kfac",
    "minibatch_sum",
    "mixed_derivative",
    "sampled_fisher",
    "sampled_rows",
]
