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
        symmetric_on_support: Whether the Jacobian is symmetric between coordinates of the support.
        route: How products with the Jacobian come about: `"retained graph"` or `"finite difference"`.
    """

    symmetric: bool = False
    symmetric_by_construction: bool = False
    strong_convexity: float | None = None
    symmetric_on_support: bool = False
    route: str = "retained graph"

    @abstractmethod
    def residual(self, x: Tree, y: Tree, *data: Tree) -> Tree:
        """A tree like `y`, zero at the solution."""

    def support(self, x: Tree, y: Tree, *data: Tree) -> Tree | None:
        """A tree of booleans like `y`, false where the residual is `y_i - const` around `y`; None if nowhere.

        Linear systems are solved on the support alone.
        """
        return None

    def notes(self, x: Tree, y: Tree, *data: Tree) -> list[str]:
        """What a reader of the report should know about the solution, a sentence each; made where a log is open."""
        return []

    def first_order_twin(self) -> "OptimalityCondition | None":
        """The same condition with a residual that needs only first-order derivatives of user code, if there is one."""
        return None
