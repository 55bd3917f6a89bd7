"""Points and parameters of proximal operators, checked."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from implicitgrad import tree
from implicitgrad.projections import checks
from implicitgrad.projections.boxes import bound_like
from implicitgrad.tree import Tree


def entrywise(
    name: str, operator: Callable[..., Tensor], y: Tree, parameters: dict[str, Any], *, positive: bool = False
) -> Tree:
    """`operator(entries, *parameters)` on the entries of y `(n,)` and the parameters, `(n,)` or `()` each.

    Args:
        name: Of the operator, for messages.
        operator: What to do.
        y: Tree of tensors.
        parameters: By name. Numbers or tensors `()` for all entries, or trees like y, whose tensors may be smaller and
            broadcast.
        positive: Zero is as wrong as a negative parameter.

    Raises:
        TypeError: y is no tree of floating point tensors of one dtype, or a parameter is neither number nor tensor.
        ValueError: a parameter of wrong sign or shape; y has no entries.
        FloatingPointError: NaN or infinity.
    """
    flat, unravel = tree.ravel(y)
    spread = {
        field: checks.number(name, field, value, flat) if _is_one_for_all(value) else bound_like(name, field, value, y)
        for field, value in parameters.items()
    }
    return unravel(operator(checked(name, flat, spread, positive), *spread.values()))


def _is_one_for_all(value: Any) -> bool:
    return isinstance(value, (int, float)) or isinstance(value, Tensor) and value.dim() == 0


def leafwise(operator: Callable[[Tensor, Any, Any], Tensor], y: Tree, penalty: Any, scaling: Any) -> Tree:
    """`operator(leaf, penalty, scaling)` for every leaf of y; parameters are one for all, or trees like y."""
    tree.check_vector_space(tree.leaves(y), "y")
    one_for_all = lambda value: isinstance(value, (int, float, Tensor))
    spread = (tree.map(lambda _, v=v: v, y) if one_for_all(v) else v for v in (penalty, scaling))
    return tree.map(operator, y, *spread)


def threshold(name: str, y: Tensor, penalty: Any, scaling: Any) -> tuple[Tensor, Tensor]:
    """y, checked, and `scaling · penalty` as a tensor `()`, for operators with one penalty for all of y."""
    parameters = {
        field: checks.number(name, field, v, y) for field, v in {"penalty": penalty, "scaling": scaling}.items()
    }
    return checked(name, y, parameters), parameters["penalty"] * parameters["scaling"]


def checked(name: str, y: Tensor, parameters: dict[str, Tensor], positive: bool = False) -> Tensor:
    """y, once it and `parameters` are known to be finite, and these not negative; see `checks.checked`."""

    def claim(field: str, value: Tensor) -> checks.Claim:
        right = value > 0 if positive else value >= 0
        wanted = "> 0" if positive else ">= 0"
        return checks.Claim(
            right.all(), lambda: f"{name} needs {field} {wanted}, got {value.detach()[~right].flatten()[0].item()}"
        )

    return checks.checked(name, y, parameters, [claim(field, value) for field, value in parameters.items()])
