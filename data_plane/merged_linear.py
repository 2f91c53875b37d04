"""Linear layers that read the same input, as one product of their weights.

Queries, keys and values of a layer are three products of one input, an MLP's gate and its
other half are two. A device reads the weights of one large product faster than those of several
small ones. The model's code stays as it is: each layer's weight becomes a view of a whole one,
and where the code is compiled, each layer asks for the whole product and takes its own columns.
`share_products` makes one product of the equal ones. Where it is not compiled, a layer is what it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional


class PartOfProduct(nn.Linear):
    """A Linear layer after :func:`merge`; its weight and bias keep shape, dtype and contents.

    Attributes:
        whole, whole_bias: those of all layers that were merged.
        first: its own first row in them.
    """

    whole: Tensor
    whole_bias: Tensor | None
    first: int

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            product = functional.linear(input, self.whole, self.whole_bias)
            return product[..., self.first : self.first + self.out_features]
        return functional.linear(input, self.weight, self.bias)


def merge(layers: Sequence[nn.Linear]) -> None:
    """Makes parts of one product of layers with as many inputs, of one dtype and device."""
    whole = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    first = 0
    for layer in layers:
        rows = slice(first, first + layer.out_features)
        layer.weight = nn.Parameter(whole[rows], requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias[rows], requires_grad=False)
        layer.__class__ = PartOfProduct
        # Parameters would be counted twice.
        vars(layer).update(whole=whole, whole_bias=bias, first=first)
        first = rows.stop


@contextmanager
def seeing_siblings(module: nn.Module) -> Iterator[Callable[[], list[list[nn.Linear]]]]:
    """Sees what a module's Linear layers are given while this is open.

    What it yields returns the groups of plain layers that can be merged: children of one module
    that were given the very same tensors.
    """
    inputs: dict[nn.Linear, list[Tensor]] = {}
    hooks = []
    for layer in module.modules():
        if type(layer) is nn.Linear and not layer._forward_hooks:
            inputs[layer] = []
            see = _seeing(inputs[layer])
            hooks.append(layer.register_forward_pre_hook(see))
    try:
        yield lambda: list(_groups(module, inputs))
    finally:
        for hook in hooks:
            hook.remove()


def _seeing(seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda layer, given: seen.append(given[0])


def _groups(module: nn.Module, inputs: dict[nn.Linear, list[Tensor]]) -> Iterator[list[nn.Linear]]:
    for parent in module.modules():
        groups: dict[object, list[nn.Linear]] = {}
        for child in parent.children():
            if isinstance(child, nn.Linear) and inputs.get(child):
                # The tensors are kept until here, so that no two have one id.
                given = tuple(map(id, inputs[child]))
                groups.setdefault((given, child.weight.dtype, child.bias is None), []).append(child)
        yield from (group for group in groups.values() if len(group) > 1)


def share_products(graph: GraphModule) -> int:
    """Makes one of products whose operands are the same; returns how many that saves."""
    seen: dict[object, torch.fx.Node] = {}
    saved = 0
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target is functional.linear:
            first = seen.setdefault((node.args, *node.kwargs.items()), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.graph.erase_node(node)
                saved += 1
    if saved:
        graph.recompile()
    return saved
