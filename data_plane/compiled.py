"""Runs a model's layers as fused code, which torch.compile makes of transformers' own.

Layers are compiled, not the model: those of one class are one piece of code, since all that they
differ in comes in as tensors (weights, the layer's blocks of the cache and their scales), so that
forty layers take as long as one. A layer that does something else, as one with a window beside
one without, is another piece. How many tokens a step has and how many blocks the cache has is
left open, but a step of one token is a case of its own, as torch.compile has it. All are made at
start; a step that fits none of them runs eagerly. A step's other columns are no inputs: see
`kernels.layer_attention`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from data_plane.merged_linear import merge, seeing_siblings, share_products
from data_plane.model_probe import first_line

log = logging.getLogger(__name__)

# Tokens and blocks of two steps that are only looked at: sizes that differ are left open.
_LOOKED_AT = ((5, 2), (7, 3))
# Those that are compiled for. Open sizes must not be 1 there, and code for a GPU is tuned to them.
_COMPILED = ((64, 3), (1, 3))
# Pieces of code at most: kinds of layers, each for one token and for more.
_MOST_PIECES = 16

RunStep = Callable[[int, int], None]
Progress = Callable[[list[tuple[int, int]]], Iterable[tuple[int, int]]]


class LayerStep(NamedTuple):
    """What a compiled layer is given of a step, for its attention."""

    blocks: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


class CompiledLayers:
    """The layers of a model, each with a compiled forward pass in place of its own.

    Attributes:
        pieces: pieces of code that were made.
        missed: layers of steps that ran eagerly, because no piece fits them.
        eager: set to run all of them eagerly.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.pieces = self.missed = 0
        self.eager = False
        self._layers = layers
        self._watch: Callable[[int, list[Any]], None] | None = None
        # By layer and argument, what sizes are open.
        self._open: dict[int, list[list[int]]] = {}

    def make(self, run: RunStep, progress: Progress = iter) -> None:
        """Compiles all that steps need, and puts it in place.

        Args:
            run: computes a step of so many tokens over a cache of so many blocks.
            progress: shows how far it is while it yields what it is given.

        Raises:
            Exception: whatever keeps them from being compiled; they are as before then.
        """
        began = time.monotonic()
        compiled = {
            kind: torch.compile(kind.forward, backend=self._backend, fullgraph=True, dynamic=False)
            for kind in {type(layer) for layer in self._layers}
        }
        for at, layer in enumerate(self._layers):
            vars(layer)["forward"] = self._stand_in(at, layer, compiled[type(layer)])
        try:
            self._look(run)
            self._compile(run, progress)
        except BaseException:
            for layer in self._layers:
                del vars(layer)["forward"]
            raise
        seconds = time.monotonic() - began
        log.info("compiled %d layers as %d pieces of code in %.1f s",
                 len(self._layers), self.pieces, seconds)  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[None]:
        """While this is open, steps run on what was compiled, and what fits none of it eagerly."""
        stance = "force_eager" if self.eager else "eager_on_recompile"
        before, _running.layers = _running.layers, None if self.eager else self
        try:
            with torch.compiler.set_stance(stance):
                yield
        finally:
            _running.layers = before

    def _look(self, run: RunStep) -> None:
        """Finds what sizes to leave open, and the products to merge."""
        seen: dict[int, list[list[torch.Size]]] = {}

        def watch(at: int, given: list[Any]) -> None:
            sizes = [one.shape if isinstance(one, Tensor) else torch.Size() for one in given]
            seen.setdefault(at, []).append(sizes)

        self._watch = watch
        try:
            with torch.compiler.set_stance("force_eager"), seeing_siblings(self._layers) as groups:
                for tokens, blocks in _LOOKED_AT:
                    run(tokens, blocks)
                found = groups()
        finally:
            self._watch = None
        for at, (first, second) in seen.items():
            self._open[at] = [
                [place for place, (a, b) in enumerate(zip(*sizes, strict=True)) if a != b]
                for sizes in zip(first, second, strict=True)
            ]
        for group in found:
            merge(group)
            if group[0].weight.is_cuda:
                # What they were is too small for the next whole: it would stay with torch.
                torch.cuda.empty_cache()

    def _compile(self, run: RunStep, progress: Progress) -> None:
        # Not before it is asked for: it takes a second.
        import torch._dynamo

        def watch(at: int, given: list[Any]) -> None:
            for one, places in zip(given, self._open[at], strict=True):
                for place in places:
                    if one.shape[place] > 1:
                        torch._dynamo.mark_dynamic(one, place)

        self._watch = watch
        try:
            with torch._dynamo.config.patch(recompile_limit=_MOST_PIECES):
                for tokens, blocks in progress([*_COMPILED]):
                    run(tokens, blocks)
        finally:
            self._watch = None

    def _backend(self, graph: GraphModule, inputs: list[Any]) -> Any:
        self.pieces += 1
        share_products(graph)
        return code_of(graph, inputs)

    def _stand_in(self, at: int, layer: nn.Module, compiled: Any) -> Callable[..., Any]:
        def forward(*given: Any, quire_step: Any = None, **named: Any) -> Any:
            if quire_step is None:
                return type(layer).forward(layer, *given, **named)
            cache = quire_step.cache
            step = LayerStep(cache.layer(at), cache.key_scales(at), cache.value_scales(at))
            if self._watch is not None:
                self._watch(at, tree_leaves((given, named, step)))
            return compiled(layer, *given, quire_step=step, **named)

        return forward


class _Running(threading.local):
    layers: CompiledLayers | None = None


_running = _Running()


def code_of(graph: GraphModule, inputs: list[Any]) -> Any:
    """A function that computes a graph: code of inductor's, without CUDA graphs of its own."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs)


def ran_eagerly() -> None:
    """Called by an attention that is not compiled, with a step for one that is."""
    layers = _running.layers
    if layers is not None:
        if not layers.missed:
            log.warning("a step fits no compiled layer and runs eagerly")
        layers.missed += 1


def layers_of(module: nn.Module, layer_count: int) -> nn.ModuleList | None:
    """The list of a model's layers; None where there is not one list of so many."""
    lists = [
        found
        for found in module.modules()
        if isinstance(found, nn.ModuleList) and len(found) == layer_count
    ]
    return lists[0] if len(lists) == 1 else None


def reason_of(error: BaseException) -> str:
    """Why something could not be compiled, in a line: what its first cause says."""
    # Both torch._dynamo and torch._inductor wrap what a compiler raises.
    while (cause := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {first_line(error)}"
