"""Proximal operators: `argmin_z ½‖z - y‖² + scaling · penalty · g(z)` for functions g that need not be smooth.

The point `y` is a tensor or a tree of tensors, one point; for many points use `torch.func.vmap`. Most operators act
entry by entry or leaf by leaf; each says what it does. Where an operator is constant along a direction in y, the
derivative along it is exactly zero: `support` of a condition counts on that.

`penalty` and `scaling` are numbers, tensors, or trees like y. Results are differentiable in y, penalty and scaling, to
any order and in every mode, wherever the operator is.
"""

from implicitgrad.prox.from_projection import prox_from_projection
from implicitgrad.prox.l1 import elastic_net, l1, non_negative_l1
from implicitgrad.prox.log_barrier import log_barrier
from implicitgrad.prox.norms import group_lasso, l_infinity
from implicitgrad.prox.nuclear_norm import nuclear_norm
from implicitgrad.prox.ridge import non_negative_ridge, ridge, zero
from implicitgrad.prox.total_variation import total_variation

__all__ = [
    "elastic_net",
    "group_lasso",
    "l1",
    "l_infinity",
    "log_barrier",
    "non_negative_l1",
    "non_negative_ridge",
    "nuclear_norm",
    "prox_from_projection",
    "ridge",
    "total_variation",
    "zero",
]
