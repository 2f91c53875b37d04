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
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule
from torch.nn import functional

# As Python's operator module and its methods name them, without underscores.
_WRITING_OPERATORS = {
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
    "isub", "itruediv", "ixor", "setitem",
}  # fmt: skip


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
    that were given the very same tensors, in which nothing was written meanwhile.
    """
    inputs: dict[nn.Linear, list[_Given]] = {}
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


class _Given(NamedTuple):
    """A tensor, kept so that no other one has its id, and the bytes that were in it."""

    tensor: Tensor
    contents: bytes


def _seeing(seen: list[_Given]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def see(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        contents = given[0].reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        seen.append(_Given(given[0], contents))

    return see


def _groups(module: nn.Module, inputs: dict[nn.Linear, list[_Given]]) -> Iterator[list[nn.Linear]]:
    for parent in module.modules():
        groups: dict[object, list[nn.Linear]] = {}
        for child in parent.children():
            if isinstance(child, nn.Linear) and inputs.get(child):
                given = tuple((id(tensor), contents) for tensor, contents in inputs[child])
                groups.setdefault((given, child.weight.dtype, child.bias is None), []).append(child)
        yield from (group for group in groups.values() if len(group) > 1)


def share_products(graph: GraphModule) -> int:
    """Makes one of products whose operands are the same; returns how many that saves.

    What is written in place may be an operand, or a view of one: from there on none is the same.
    """
    seen: dict[object, torch.fx.Node] = {}
    saved = 0
    for node in list(graph.graph.nodes):
        if _may_write(node):
            seen.clear()
        elif node.op == "call_function" and node.target is functional.linear:
            first = seen.setdefault((node.args, *node.kwargs.items()), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.graph.erase_node(node)
                saved += 1
    if saved:
        graph.recompile()
    return saved


def _may_write(node: torch.fx.Node) -> bool:
    """Whether a node may write to a tensor that is there before it."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, OpOverloadPacket):
        names = node.target.overloads()  # type: ignore[no-untyped-call]
        return any(getattr(node.target, each)._schema.is_mutable for each in names)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    asked_to = any(given is True for given in (*node.args, node.kwargs.get("inplace")))
    return in_place or asked_to or "out" in node.kwargs or name.strip("_") in _WRITING_OPERATORS
