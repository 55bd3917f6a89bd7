"""Arithmetic on trees of tensors: nested tuples, lists, dicts, named tuples and dataclasses registered with pytree.

The rest of the library works on trees, `linalg` on flat vectors; `ravel` is the one bridge between them. Two trees are
always paired by key path, never by position, since dicts may list the same keys in another order.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from implicitgrad import internals

Tree = Any


def leaves(tree: Tree) -> list[Any]:
    """Every leaf of `tree`, in order; a leaf is whatever is no registered container (so also None and numbers)."""
    return pytree.tree_leaves(tree)


def flatten(tree: Tree) -> tuple[list[Any], Callable[[Sequence[Any]], Tree]]:
    """The leaves of `tree` and the function that puts a list of leaves back into its shape."""
    values, spec = pytree.tree_flatten(tree)
    return values, lambda new: pytree.tree_unflatten(list(new), spec)


def paths(tree: Tree) -> list[str]:
    """How to reach every leaf from the root, in order: `['w'][0]`; empty for a tree that is one leaf."""
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def map(fn: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply `fn` leaf by leaf; leaves of `others` are matched to those of `tree` by key path.

    Example:
        >>> map(lambda a, b: a - b, {"u": 3, "v": 5}, {"v": 1, "u": 2})
        {'u': 1, 'v': 4}

    Raises:
        ValueError: a tree lacks a leaf that another one has.
    """
    values, rebuild = flatten(tree)
    return rebuild([fn(*group) for group in zip(values, *(_match(tree, other) for other in others), strict=True)])


def _match(reference: Tree, other: Tree) -> list[Any]:
    """Leaves of `other` in the order of `reference`."""
    wanted = paths(reference)
    found = dict(zip(paths(other), leaves(other), strict=True))
    if set(wanted) != set(found):
        missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        raise ValueError(
            f"two trees differ in structure: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}; "
            "give both the same keys"
        )
    return [found[path] for path in wanted]


def detach(tree: Tree) -> Tree:
    """The same tree with every tensor cut off from the graph; other leaves unchanged."""
    return map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def is_differentiable(leaf: Any) -> bool:
    """Whether `leaf` is a tensor of floating point type."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves of a tree of tensors as one flat vector, and the way back.

    Args:
        tree: Tensors of one dtype on one device, of any shapes; n elements in total.

    Returns:
        The vector `(n,)` and a function from `(n,)` vectors to trees like `tree`. Both are differentiable.

    Raises:
        TypeError: a leaf is no floating point tensor, or dtypes differ.
        ValueError: no leaves at all, or leaves on different devices.

    Example:
        >>> flat, unravel = ravel({"w": torch.ones(2, 2), "b": torch.zeros(2)})
        >>> flat.shape, unravel(2 * flat)["w"].sum().item()
        (torch.Size([6]), 8.0)
    """
    values, rebuild = flatten(tree)
    check_vector_space(values)
    shapes = [value.shape for value in values]
    sizes = [value.numel() for value in values]
    if len(values) == 1:
        return values[0].reshape(-1), lambda vector: rebuild([vector.reshape(shapes[0])])

    def unravel(vector: Tensor) -> Tree:
        # split, not slices: the gradient of a slice is a zero-padded vector of full length for every leaf
        return rebuild([part.reshape(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)])

    return torch.cat([value.reshape(-1) for value in values]), unravel


def slices(tree: Tree) -> dict[str, slice]:
    """Where each leaf of `tree` lies in the vector of `ravel`, by key path.

    Example:
        >>> slices({"w": torch.ones(2, 2), "b": torch.zeros(2)})
        {"['w']": slice(0, 4, None), "['b']": slice(4, 6, None)}
    """
    ends = list(itertools.accumulate(leaf.numel() for leaf in leaves(tree)))
    return {path: slice(begin, end) for path, begin, end in zip(paths(tree), [0, *ends], ends, strict=False)}


def ravel_like(reference: Tree, tree: Tree) -> Tensor:
    """The leaves of `tree` as one vector, in the order of `reference` (matched by key path).

    Raises:
        ValueError: structures or shapes differ.
    """
    values = [tree] if isinstance(tree, Tensor) and isinstance(reference, Tensor) else _match(reference, tree)
    for want, got in zip(leaves(reference), values, strict=True):
        if not isinstance(got, Tensor) or got.shape != want.shape:
            kind = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(f"a leaf has shape {kind} where {tuple(want.shape)} was wanted; return a tree like y")
    return values[0].reshape(-1) if len(values) == 1 else torch.cat([value.reshape(-1) for value in values])


def check_vector_space(values: Sequence[Any], name: str = "the tree") -> None:
    """Raise unless `values` are real floating point tensors of one dtype on one device."""
    if not values:
        raise ValueError(f"{name} has no leaves; it needs at least one tensor")
    if all(isinstance(value, Tensor) and value.numel() == 0 for value in values):
        raise ValueError(f"{name} is empty; it needs at least one number")
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} has a leaf of type {type(value).__name__}; every leaf must be a floating point tensor "
                "(use torch.as_tensor on NumPy arrays and numbers)"
            )
        if value.is_complex():
            raise TypeError(f"{name} is complex ({value.dtype}); stack real and imaginary parts into a real tensor")
        if not value.is_floating_point():
            raise TypeError(f"{name} has a leaf of dtype {value.dtype}; convert it to a floating point type")
    if len({value.dtype for value in values}) > 1:
        raise TypeError(f"{name} mixes dtypes {sorted({str(v.dtype) for v in values})}; convert them to one")
    if len({value.device for value in values}) > 1:
        raise ValueError(f"{name} mixes devices {sorted({str(v.device) for v in values})}; move them to one")


def alias(tensor: Tensor) -> Tensor:
    """The same values as a new node that requires a gradient, still attached to what `tensor` hangs on."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def grad(fn: Callable[[Tree], Tensor], tree: Tree) -> Tree:
    """Gradient of a scalar function at `tree`, as a tree like it; leaves that `fn` ignores get zeros.

    Differentiable again: by eager reverse mode normally, by `torch.func.grad` inside a functional transform.

    Raises:
        ValueError: `fn` does not return a scalar tensor, or does not depend on `tree` at all.
    """
    values, rebuild = flatten(tree)
    if internals.transforming():
        return rebuild(torch.func.grad(lambda parts: scalar(fn(rebuild(parts))))(tuple(values)))
    with torch.enable_grad():
        parts = [alias(value) for value in values]
        value = scalar(fn(rebuild(parts)))
        found: Sequence[Tensor | None] = [None]
        if value.requires_grad:
            found = torch.autograd.grad(value, parts, create_graph=True, allow_unused=True)
        if all(gradient is None for gradient in found):
            raise ValueError(
                "the loss does not depend on y, the variable it is differentiated in; check the order of its arguments"
            )
        return rebuild([torch.zeros_like(p) if g is None else g for g, p in zip(found, parts, strict=True)])


def scalar(value: Any, name: str = "the loss") -> Tensor:
    """`value` as a 0-dimensional tensor.

    Raises:
        ValueError: not a tensor with one element.
        TypeError: complex.
    """
    if not isinstance(value, Tensor) or value.dim() > 0 and value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a scalar tensor, got {got}; reduce it with .sum() or .mean()")
    if value.is_complex():
        raise TypeError(f"{name} is complex; return a real scalar, for example its squared modulus")
    return value.reshape(())


def vjp(fn: Callable[..., Tensor], primals: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """Reverse product `cotangent · ∂fn/∂primals`, one entry per primal; None where a primal is not floating point.

    Differentiable in the primals and the cotangent when gradients are enabled.
    """
    active = [i for i, primal in enumerate(primals) if is_differentiable(primal)]

    def restricted(*parts: Tensor) -> Tensor:
        full = list(primals)
        for i, part in zip(active, parts, strict=True):
            full[i] = part
        return fn(*full)

    if internals.transforming():
        pullback = torch.func.vjp(restricted, *(primals[i] for i in active))[1]
        products = pullback(cotangent)
    else:
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            parts = [alias(primals[i]) for i in active]
            value = restricted(*parts)
        if value.requires_grad:
            products = torch.autograd.grad(value, parts, cotangent, create_graph=keep, materialize_grads=True)
        else:
            products = tuple(torch.zeros_like(part) for part in parts)
    result: list[Tensor | None] = [None] * len(primals)
    for i, product in zip(active, products, strict=True):
        result[i] = product
    return tuple(result)


def jvp(fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """Forward product `∂fn/∂primals · tangents` by two reverse passes; a None tangent is zero.

    Reverse mode twice works wherever double backward does, while forward-mode formulas are missing or wrong for
    several losses and layers.
    """
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None and is_differentiable(primals[i])]
    output = fn(*primals)
    if not moving:
        return torch.zeros_like(output)

    def along(dual: Tensor) -> Tensor:
        with torch.enable_grad():
            products = vjp(fn, primals, dual)
            return torch.stack([(products[i] * tangents[i]).sum() for i in moving]).sum()  # type: ignore[operator]

    (product,) = vjp(along, (torch.zeros_like(output),), output.new_ones(()))
    assert product is not None
    return product
