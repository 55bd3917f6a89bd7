"""What the affine layers of a network take in and what comes back to them: the raw material of Kronecker factors.

A linear or convolutional layer computes ``s = [W b] [a; 1]`` at every position of its output: a row of a sequence, a
pixel. The gradient of one example in ``[W b]`` is ``Σ g [a; 1]ᵀ`` over the positions, with the gradient g in s.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from implicitgrad import tree
from implicitgrad.curvature.examples import check_tensor, num_examples
from implicitgrad.linalg import irregular
from implicitgrad.linalg.kronecker import Spans


@runtime_checkable
class Network(Protocol):
    """A module as a function of its parameters, `implicitgrad.functional(net)`; its layers are seen through `net`."""

    net: nn.Module

    def __call__(self, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run `net` on `args` with `params` for parameters."""
        ...


@dataclass(eq=False)
class Layer:
    """All uses of one matrix ``[W b]`` in one evaluation of a network: several where modules or weights are shared.

    Attributes:
        names: The parameters of y in the matrix, weight first.
        spans: Where they lie in the flat y, see `KroneckerBlock`.
        has_weight: Whether W belongs to y.
        has_bias: Whether b belongs to y.
        uses: Per use the module, its input and its output on the graph.
    """

    names: tuple[str, ...]
    spans: Spans
    has_weight: bool
    has_bias: bool
    uses: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)

    def activations(self) -> list[Tensor]:
        """Inputs ``[a; 1]`` of each use, ``(N, positions, q)``; only the columns whose weights belong to y."""
        found = []
        for module, value, _ in self.uses:
            rows = _patches(module, value) if isinstance(module, nn.Conv2d) else _positions(value)
            ones = rows.new_ones(*rows.shape[:2], 1)
            found.append(torch.cat([rows] * self.has_weight + [ones] * self.has_bias, -1))
        return found

    def gradients(self, found: Iterable[Tensor]) -> list[Tensor]:
        """Gradients in the output of each use as ``(N, positions, p)``."""
        pairs = zip(self.uses, found, strict=True)
        return [part.flatten(2).mT if isinstance(use[0], nn.Conv2d) else _positions(part) for use, part in pairs]


class Evaluation:
    """One evaluation of a network with the layers that took part.

    Args:
        model: What `implicitgrad.functional` returns.
        y: Values of parameters by name; every other parameter keeps the module's own.
        inputs: The argument of `model` beside y.

    Attributes:
        outputs: ``(N, ...)``, on the graph.
        layers: Those that cover parameters of y.
        uncovered: Parameters of y that no layer covers, with the reason.

    Raises:
        TypeError: `model` does not come from `implicitgrad.functional`, or returns no tensor.
        ValueError: y has names that the module lacks; no examples.
    """

    def __init__(self, model: Network, y: Mapping[str, Tensor], inputs: Any) -> None:
        if isinstance(model, nn.Module) or not isinstance(model, Network):
            raise TypeError(
                f"Kronecker factors need implicitgrad.functional(net) for a model, to see the layers of net; got"
                f" {type(model).__name__}."
            )
        by_module, self.uncovered = find_layers(model.net, y)
        layers = list({id(layer): layer for layer in by_module.values()}.values())
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in y.items()}
            with _recording(by_module):
                self.outputs = model(leaves, inputs)
        check_tensor("K-FAC", self.outputs)
        num_examples("K-FAC", self.outputs)
        self.layers = [layer for layer in layers if layer.uses]
        self._leave_out([layer for layer in layers if not layer.uses], "never used")
        self._leave_out(self._elsewhere(leaves), "used outside of its layer as well")

    def _leave_out(self, layers: list[Layer], reason: str) -> None:
        self.layers = [layer for layer in self.layers if layer not in layers]
        self.uncovered.update({name: reason for layer in layers for name in layer.names})

    def backward(self, cotangent: Tensor) -> list[list[Tensor]]:
        """Gradients of ``<cotangent, outputs>`` in what each layer computes: `Layer.gradients` layer by layer."""
        outputs = [output for layer in self.layers for _, _, output in layer.uses]
        found = iter(torch.autograd.grad(self.outputs, outputs, cotangent, retain_graph=True, materialize_grads=True))
        return [layer.gradients([next(found) for _ in layer.uses]) for layer in self.layers]

    def check_examples(self) -> None:
        """Refuse layers whose first dimension does not count examples.

        Raises:
            ValueError: naming the layer.
        """
        for layer in self.layers:
            for _, value, _ in layer.uses:
                if len(value) != len(self.outputs):
                    raise ValueError(
                        f"The layer of {layer.names} works on {len(value)} rows for {len(self.outputs)} examples, so"
                        f" the gradients of single examples cannot be told apart; keep examples in the first dimension,"
                        f' or take kfac with sharing="expand" and corrected=False.'
                    )

    def _elsewhere(self, leaves: Mapping[str, Tensor]) -> list[Layer]:
        """Layers in whose weights the gradient is not what their inputs and outputs make it, for one cotangent.

        A penalty on weights in the network shows there, and so do calls of torch.nn.functional, or hooks.
        """
        names = [name for layer in self.layers for name in layer.names]
        if not names:
            return []
        cotangent = irregular(self.outputs.detach())
        true = torch.autograd.grad(
            self.outputs, [leaves[name] for name in names], cotangent, retain_graph=True, materialize_grads=True
        )
        exact, found = dict(zip(names, true, strict=True)), []
        for layer, gradients in zip(self.layers, self.backward(cotangent), strict=True):
            g, a = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in (gradients, layer.activations()))
            wanted = torch.cat([exact[name].reshape(g.shape[-1], -1) for name in layer.names], -1)
            error = (g.mT @ a.to(g.dtype) - wanted).norm()
            if error > torch.finfo(g.dtype).eps ** 0.5 * g.norm() * a.norm():
                found.append(layer)
        return found


def find_layers(net: nn.Module, y: Mapping[str, Tensor]) -> tuple[dict[nn.Module, Layer], dict[str, str]]:
    """The layers of y by module, modules of one weight and bias sharing one; and the rest of y with the reasons."""
    known = {id(parameter): name for name, parameter in net.named_parameters()}
    if strangers := sorted(set(y) - set(known.values())):
        raise ValueError(f"the module has no parameters {strangers}; it has {sorted(known.values())}")
    values, rebuild = tree.flatten(y)
    starts = rebuild([sum(value.numel() for value in values[:i]) for i in range(len(values))])

    modules: dict[tuple[str, str], list[nn.Module]] = defaultdict(list)
    uncovered = {}
    for module in net.modules():
        owned = {key: known[id(p)] for key, p in module.named_parameters(recurse=False, remove_duplicate=False)}
        if _is_affine(module):
            modules[owned["weight"], owned.get("bias", "")].append(module)
        else:
            uncovered.update({name: _description(module) for name in owned.values() if name in y})
    for names in modules:
        for name in names:
            if name in y and sum(name in others for others in modules) > 1:
                uncovered[name] = "shared by layers with different weights or biases"

    layers = {}
    for (weight, bias), users in modules.items():
        names = tuple(name for name in (weight, bias) if name in y and name not in uncovered)
        if names:
            spans = tuple((starts[name], starts[name] + y[name].numel()) for name in names)
            layer = Layer(names, spans, has_weight=weight in names, has_bias=bias in names)
            layers.update(dict.fromkeys(users, layer))
    return layers, uncovered


def _is_affine(module: nn.Module) -> bool:
    # a subclass may compute something else: the projection inside nn.MultiheadAttention is never called, for one
    return type(module) is nn.Linear or type(module) is nn.Conv2d and module.groups == 1


def _description(module: nn.Module) -> str:
    kind = type(module).__name__
    return f"{kind} with groups" if type(module) is nn.Conv2d else kind


@contextmanager
def _recording(layers: Mapping[nn.Module, Layer]) -> Iterator[None]:
    """Context in which layers note their uses; a checkpointed block that runs again in the backward does not."""
    active = True

    def record(layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if active and output.requires_grad:
            layer.uses.append((module, (args[0] if args else kwargs["input"]).detach(), output))
        return output.clone()  # what follows may work in place, which would make `output` another tensor

    hooks = [
        module.register_forward_hook(partial(record, layer), prepend=True, with_kwargs=True)
        for module, layer in layers.items()
    ]
    try:
        yield
    finally:
        active = False
        for hook in hooks:
            hook.remove()


def _positions(rows: Tensor) -> Tensor:
    """``(N, ..., c)`` as ``(N, positions, c)``."""
    return rows.reshape(len(rows), -1, rows.shape[-1])


def _patches(module: nn.Conv2d, images: Tensor) -> Tensor:
    """What lies under each output pixel, ``(N, positions, channels · height · width)``."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(images, module._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride).mT
