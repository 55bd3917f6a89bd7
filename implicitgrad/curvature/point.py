"""Where a derivative is taken: a tree as a flat vector, and the isolation in which user code runs there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from implicitgrad import closure, internals, tree
from implicitgrad.isolation import Isolation
from implicitgrad.surroundings import look_around
from implicitgrad.tree import Tree


class Point:
    """A tree at which user code is evaluated, with a copy of its numbers that outlives changes to the original.

    Args:
        name: Of the function that the user called, for errors.
        y: Tree of floating point tensors with n numbers; it is detached.
        code: What will be evaluated, and its data: modules found in it are guarded.

    Attributes:
        name: As given.
        y: The detached tree.
        flat: The same as a vector `(n,)` of its own.
        unravel: From vectors to trees like y.
        isolation: Context for products, in which user code may run again.

    Raises:
        RuntimeError: inside a `torch.func` transform or inference mode, where no graph can be kept.
        TypeError: a leaf of y is no floating point tensor, or dtypes differ.
        ValueError: y is empty, or on several devices.
    """

    def __init__(self, name: str, y: Tree, *code: Any) -> None:
        if internals.transforming() or torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{name} keeps an autograd graph, which torch.func transforms and torch.inference_mode forbid; call it "
                "outside of them"
            )
        self.name = name
        self.y = tree.map(closure.without_derivative, y)
        tree.check_vector_space(tree.leaves(self.y), f"{name}: the variable")
        flat, self.unravel = tree.ravel(self.y)
        self.flat = flat.clone() if len(tree.leaves(self.y)) == 1 else flat  # several leaves were copied already
        self.isolation = Isolation(self.flat.device, look_around(*code))

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context in which user code is evaluated."""
        with self.isolation(), self.isolation.layers(higher=False):
            yield
