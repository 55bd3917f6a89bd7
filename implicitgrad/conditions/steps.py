"""Gradient steps, and checks of what conditions made of them need."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from implicitgrad import tree
from implicitgrad.curvature import hvp
from implicitgrad.tree import Tree


def gradient_step(loss: Callable[..., Tensor], step: Any, x: Tree, y: Tree, data: tuple) -> Tree:
    """`y - step · ∇_y loss(x, y, *data)`; `step` is a number, or a tree like y."""
    gradient = hvp.marked_grad(lambda point: loss(x, point, *data), y)
    if isinstance(step, float | int):
        return tree.map(lambda now, slope: now - step * slope, y, gradient)
    return tree.map(lambda now, slope, size: now - size * slope, y, gradient, step)


def check_function(name: str, what: str, function: object) -> None:
    """Raise unless `function` can be called."""
    if not callable(function):
        raise TypeError(f"{name} needs a function {what}, got {type(function).__name__}")


def check_step(name: str, step: object) -> None:
    """Raise unless `step` is a positive finite number."""
    if isinstance(step, bool) or not isinstance(step, float | int):
        raise TypeError(f"{name} needs a number as step, got {type(step).__name__}")
    if not 0 < step < math.inf:
        raise ValueError(f"{name} needs a positive finite step, got {step}")
