"""Modules that a function can call upon, found by looking at it without running it."""

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Surroundings:
    """What a function refers to.

    Attributes:
        modules: Modules and their submodules.
        compiled: Whether `torch.compile` made one of them, or a function.
    """

    modules: tuple[nn.Module, ...]
    compiled: bool


_MOST_ITEMS = 1000  # a look around, not a search of the whole program

NOTHING = Surroundings((), False)


def look_around(*roots: Any) -> Surroundings:
    """Look through closures, globals in use, bound objects, partial arguments and containers behind `roots`."""
    modules: dict[nn.Module, None] = {}
    compiled = False
    seen: set[int] = set()
    stack = list(roots)
    while stack and len(seen) < _MOST_ITEMS:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            parts = list(item.modules())
            modules.update(dict.fromkeys(parts))
            compiled = compiled or any(is_compiled(part) for part in parts)
        else:
            compiled = compiled or isinstance(item, types.FunctionType) and "_torchdynamo_orig_callable" in vars(item)
            stack.extend(_referred(item))
    return Surroundings(tuple(modules), compiled)


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made this module; told by names, since importing the compiler takes a second."""
    return type(module).__name__ == "OptimizedModule" or vars(module).get("_compiled_call_impl") is not None


def _referred(item: Any) -> Iterator[Any]:
    if isinstance(item, types.FunctionType):
        if item.__module__ is not None and item.__module__.split(".")[0] == "torch":
            return
        for cell in item.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a cell that is not filled yet
                continue
        yield from (item.__globals__[name] for name in _global_names(item.__code__) if name in item.__globals__)
        yield from item.__defaults__ or ()
        yield from vars(item).values()
    elif isinstance(item, types.MethodType):
        yield from (item.__func__, item.__self__)
    elif isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, (list, tuple)):
        yield from item[:_MOST_ITEMS]
    elif not isinstance(item, (type, types.ModuleType, Tensor)):
        yield from getattr(item, "__dict__", {}).values()


def _global_names(code: types.CodeType) -> set[str]:
    """Names that a function and the functions inside it look up outside."""
    inner = (_global_names(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)
