"""What a condition is: a residual that vanishes at the solution."""

from abc import ABC, abstractmethod

from implicitgrad.tree import Tree


class OptimalityCondition(ABC):
    """A statement `residual(x, y, *data) = 0` that holds at the solution `y` of an inner problem.

    Attributes:
        symmetric: Whether the Jacobian `∂residual/∂y` is symmetric.
        symmetric_by_construction: Whether that needs no test, since the residual is a gradient.
        strong_convexity: A constant `mu > 0` with `∂residual/∂y ⪰ mu I` everywhere, if one is known and the Jacobian is
            symmetric. It turns error estimates into bounds.
        route: How products with the Jacobian come about: `"retained graph"` or `"finite difference"`.
    """

    symmetric: bool = False
    symmetric_by_construction: bool = False
    strong_convexity: float | None = None
    route: str = "retained graph"

    @abstractmethod
    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """A tree like `y`, zero at the solution."""

    def first_order_twin(self) -> "OptimalityCondition | None":
        """The same condition with a residual that needs only first-order derivatives of user code, if there is one."""
        return None
