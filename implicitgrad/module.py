"""An `nn.Module` as a function of its parameters, free of side effects and safe to differentiate twice."""

import types
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from implicitgrad.closure import Refusal
from implicitgrad.isolation import RandomState
from implicitgrad.surroundings import is_compiled


def functional(
    net: nn.Module, *, buffers: Mapping[str, Tensor] | None = None, rng: int | None = None
) -> "FunctionalModule":
    """Make `net` a function of its parameters: `net_fn(params, *args, **kwargs)`.

    * Parameters, buffers and the global random state are never changed: running statistics of normalisation layers
      are updated on copies that are thrown away.
    * Dropout draws the same mask in every call on inputs of one shape, so that a loss is one function and not a new
      one each time. Make a new functional module for a new mask, or call `net.eval()` first for none.
    * Tied weights stay tied, compiled modules run uncompiled (compiled code has no double backward), checkpointed
      blocks recompute with the parameters they were called with.

    Args:
        net: Any module; training or evaluation mode is read at each call.
        buffers: Values by name to use instead of the module's own buffers.
        rng: Seed of the dropout masks; the random state of this moment if None.

    Returns:
        The function. Its `parameters()` gives the tree to start from.

    Raises:
        TypeError: `net` is no module.
        ValueError: `buffers` has names that `net` lacks.

    Example:
        >>> import torch, implicitgrad as ig
        >>> net_fn = ig.functional(torch.nn.Linear(3, 1))
        >>> net_fn(net_fn.parameters(), torch.ones(5, 3)).shape
        torch.Size([5, 1])
    """
    return FunctionalModule(net, buffers, rng)


class FunctionalModule:
    """What `functional` returns.

    Attributes:
        net: The module, uncompiled.
    """

    def __init__(self, net: nn.Module, buffers: Mapping[str, Tensor] | None, rng: int | None) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"functional needs an nn.Module, got {type(net).__name__}")
        if isinstance(net, torch.jit.ScriptModule):
            raise TypeError("functional cannot take a scripted module apart; pass the original nn.Module")
        self.net = _uncompiled(net)
        known = {name for name, _ in self.net.named_buffers(remove_duplicate=False)}
        if unknown := set(buffers or ()) - known:
            raise ValueError(f"the module has no buffers {sorted(unknown)}; it has {sorted(known)}")
        self._buffers = dict(buffers or {})
        self._checked = False
        self._devices = {torch.device("cpu"), *(parameter.device for parameter in self.net.parameters())}
        self._random = RandomState(self._devices) if rng is None else RandomState.seeded(self._devices, rng)

    def parameters(self) -> dict[str, Tensor]:
        """Detached copies of the parameters by name; tied ones once."""
        return {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}

    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the module on `args` with `params` for parameters; names left out keep the module's own values.

        Raises:
            ValueError: a name or a shape that the module does not have.
        """
        shell = self._shell(params)
        before = RandomState(self._devices)
        self._random.restore()
        try:
            with nullcontext() if self._checked else self._refuse_own(params):
                result = shell(*args, **kwargs)
            self._checked = True
            return result
        finally:
            before.restore()

    def _refuse_own(self, params: Mapping[str, Tensor]) -> AbstractContextManager[object]:
        """During the first call: raise if code of the module reaches its own parameters instead of `params`."""
        own = dict(self.net.named_parameters(remove_duplicate=False))
        replaced = [own[name] for name in params if own[name] is not params[name]]
        return Refusal(
            replaced,
            "the module's own parameters: a lambda, a partial or a hook inside the module refers to it; use "
            "torch.func.functional_call, or make that reference a method or a submodule",
        )

    def _shell(self, params: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the module tree that holds `params`; tensors are shared, no value is copied but buffers."""
        own = dict(self.net.named_parameters(remove_duplicate=False))
        for name, value in params.items():
            if name not in own:
                raise ValueError(f"the module has no parameter {name!r}; it has {sorted(own)}")
            if value.shape != own[name].shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(value.shape)}, wanted {tuple(own[name].shape)} "
                    "(batched parameters need torch.func.vmap over the call)"
                )
        exchange = {id(own[name]): value for name, value in params.items()}
        for name, buffer in self.net.named_buffers(remove_duplicate=False):
            exchange.setdefault(id(buffer), self._buffers.get(name, buffer).clone())
        shells: dict[int, nn.Module] = {}
        for module in self.net.modules():
            shell = object.__new__(type(module))
            shells[id(module)] = shell
        for module in self.net.modules():
            attributes = {name: _rewired(value, exchange, shells) for name, value in vars(module).items()}
            attributes["_compiled_call_impl"] = None
            vars(shells[id(module)]).update(attributes)
        return shells[id(self.net)]


def _rewired(value: Any, exchange: Mapping[int, Tensor], shells: Mapping[int, nn.Module]) -> Any:
    """An attribute with tensors exchanged and modules replaced by their shells, also inside lists, tuples and dicts."""
    if isinstance(value, nn.Module):
        return shells.get(id(_uncompiled(value)), value)
    if isinstance(value, Tensor):
        return exchange.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in shells:
        return types.MethodType(value.__func__, shells[id(value.__self__)])
    if type(value) is list:
        return [_rewired(item, exchange, shells) for item in value]
    if type(value) is tuple:
        return tuple(_rewired(item, exchange, shells) for item in value)
    if isinstance(value, dict):
        copy = value.copy()
        copy.update({key: _rewired(item, exchange, shells) for key, item in value.items()})
        return copy
    return value


def _uncompiled(net: nn.Module) -> nn.Module:
    """The module behind `torch.compile(net)`."""
    return net.get_submodule("_orig_mod") if is_compiled(net) and "_orig_mod" in net._modules else net
