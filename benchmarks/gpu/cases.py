"""What is measured, in order of importance. Nothing here needs torch.

A cell is one line of the results. Its fields say what is measured, its key names it, and
its section says by which module: ceilings, check, attention, moves or tune for the kernels;
steps, rates, preemption, fitting or engine_checks for the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

# Query heads and key/value heads of a layer: Llama 3 8B, without shared heads, Llama 3 70B
# on one GPU, Qwen 2.5 7B, whose group of 7 leaves rows of the matrix units empty.
GROUPED, EVERY, LARGE, SEVEN = (32, 8), (32, 32), (64, 8), (28, 4)


# Who serves the same model: transformers, by its functions.
MODEL_PEERS = ("generate", "continuous batching")

# What flex_attention takes to compile, and tuning to try everything.
COMPILING_SECONDS, TUNING_SECONDS = 45.0, 35.0


@dataclass(frozen=True)
class Cell:
    """One line of the results."""

    section: ClassVar[str]

    @property
    def seconds(self) -> float:
        """What it takes at most as a rule, setting up and comparing included."""
        return COMPILING_SECONDS if getattr(self, "compiled", False) else 5.0

    @property
    def key(self) -> str:
        """Unique, and readable enough for a line of progress: what is as usual is left out."""
        parts = [self.section]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name != "small":
                parts.append(field.name if value is True else f"{field.name}={value}")
        return " ".join(parts)

    def columns(self) -> dict[str, Any]:
        """The fields, as a line of the results has them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Ceiling(Cell):
    """name: read, copy, matrix or pinned."""

    section: ClassVar[str] = "ceiling"
    name: str
    small: bool = False


@dataclass(frozen=True)
class Check(Cell):
    """Attention, a write or a move against a plain computation in float64.

    what: attention, write, copy or swap. query, cache: dtypes. window, softcap, alibi, sinks:
    options of the layer. layout: block or layer first. public: by way of the function that
    the engine calls, too.
    """

    section: ClassVar[str] = "check"
    what: str = "attention"
    query: str = "bf16"
    cache: str = "bf16"
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 128
    block: int = 16
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    layout: str = "block-first"
    public: bool = False
    small: bool = False


@dataclass(frozen=True)
class Decode(Cell):
    """One layer's decodes. context: mean keys of a sequence. lengths: uniform or zipf.

    pool: blocks of the cache for each block in use, which spreads the blocks over memory.
    compiled: whether flex_attention takes part, which takes long to compile.
    """

    section: ClassVar[str] = "decode"
    batch: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block: int = 16
    query: str = "bf16"
    cache: str = "bf16"
    lengths: str = "uniform"
    layout: str = "block-first"
    pool: int = 1
    compiled: bool = False
    small: bool = False


@dataclass(frozen=True)
class Prefill(Cell):
    """One layer's chunks: of `sequences` sequences with `context` keys, the last `chunk`."""

    section: ClassVar[str] = "prefill"
    sequences: int
    chunk: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block: int = 16
    query: str = "bf16"
    cache: str = "bf16"
    layout: str = "block-first"
    compiled: bool = False
    small: bool = False


@dataclass(frozen=True)
class Copy(Cell):
    """Blocks of `kib` KiB, all layers, within the slab; `mib` MiB in one call."""

    section: ClassVar[str] = "copy"
    kib: int
    layers: int
    mib: int
    layout: str
    small: bool = False


@dataclass(frozen=True)
class Swap(Cell):
    """The same between the device and pinned memory. direction: out or in."""

    section: ClassVar[str] = "swap"
    kib: int
    layers: int
    mib: int
    direction: str
    layout: str
    small: bool = False


@dataclass(frozen=True)
class EngineCell(Cell):
    """A cell that runs an engine. model: a name in `models.SHAPES`, or the demo model."""

    model: str

    @property
    def seconds(self) -> float:
        """With a model that must be loaded first, and kernels that must be compiled."""
        return 25.0


@dataclass(frozen=True)
class EngineCheck(EngineCell):
    """what: tokens (those of transformers' generate) or memory (none is taken after start)."""

    section: ClassVar[str] = "engine"
    what: str


@dataclass(frozen=True)
class Step(EngineCell):
    """A chain of decode steps.

    context: mean tokens of a sequence. eager: without graphs. fused: with compiled layers.
    """

    section: ClassVar[str] = "step"
    batch: int
    context: int
    eager: bool = False
    fused: bool = False


@dataclass(frozen=True)
class Kernels(EngineCell):
    """What the device is busy with in such a step; apart, since a profiler slows what follows."""

    section: ClassVar[str] = "kernels"
    batch: int
    context: int
    fused: bool = False


@dataclass(frozen=True)
class Rate(EngineCell):
    """Tokens a second of requests that come at once, beside transformers on the same weights."""

    section: ClassVar[str] = "rate"
    batch: int


@dataclass(frozen=True)
class Preempt(EngineCell):
    """Swapping a sequence out and in, and computing it again, by its length."""

    section: ClassVar[str] = "preempt"
    block: int


@dataclass(frozen=True)
class Fit(EngineCell):
    """How many requests the memory beside the weights holds at once, by kind of allocation."""

    section: ClassVar[str] = "fit"

    @property
    def seconds(self) -> float:
        return 40.0


@dataclass(frozen=True)
class TuneDecode(Decode):
    """A shape of decodes that tilings are tried on."""

    section: ClassVar[str] = "tune-decode"

    @property
    def seconds(self) -> float:
        return TUNING_SECONDS


@dataclass(frozen=True)
class TunePrefill(Prefill):
    """A shape of prefills that tilings are tried on."""

    section: ClassVar[str] = "tune-prefill"

    @property
    def seconds(self) -> float:
        return TUNING_SECONDS


def measured(dry: bool) -> list[Cell]:
    """The cells of a run, most important first."""
    if dry:
        return _dry()
    return [
        *(Ceiling(name) for name in ("read", "copy", "matrix", "pinned")),
        *_checks(),
        EngineCheck(DEMO, "tokens"),
        *_first_decodes(),
        *_first_prefills(),
        *_moves(),
        *_engine(),
        *_more_decodes(),
        *_more_prefills(),
        *_last_decodes(),
        Decode(64, 4096, compiled=True),
        Prefill(4, 4096, 4096, compiled=True),
    ]


def tuned(dry: bool) -> list[Cell]:
    """The shapes that `--tune` looks for better tilings of."""
    if dry:
        tiny: dict[str, Any] = {"head_size": 32, "query": "fp16", "cache": "fp16", "small": True}
        return [
            TuneDecode(2, 40, heads=4, kv_heads=2, **tiny),
            TunePrefill(1, 20, 30, heads=4, kv_heads=2, **tiny),
        ]
    fp8: dict[str, Any] = {"cache": "fp8"}
    return [
        TuneDecode(64, 4096),
        TunePrefill(4, 4096, 4096),
        TuneDecode(64, 4096, **fp8),
        TuneDecode(64, 1024),
        TunePrefill(1, 512, 8192),
        TuneDecode(64, 4096, *EVERY),
        TuneDecode(64, 4096, *LARGE),
        TuneDecode(64, 4096, *SEVEN),
        TuneDecode(8, 4096),
        TunePrefill(4, 4096, 4096, *EVERY),
        TuneDecode(128, 4096, head_size=64),
        TunePrefill(4, 4096, 4096, head_size=64),
        TunePrefill(4, 4096, 4096, **fp8),
        TuneDecode(32, 4096, head_size=256),
        TunePrefill(4, 4096, 4096, head_size=256),
    ]


def _checks() -> list[Cell]:
    """The correctness matrix, reduced to one change at a time, and all options at once."""
    dtypes = (("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "fp8"), ("fp16", "fp8"))
    every: dict[str, Any] = {"window": 37, "softcap": 2.0, "alibi": True, "sinks": True}
    return [
        Check(public=True),
        *(Check(query=query, cache=cache, public=True) for query, cache in dtypes),
        *(Check(heads=2 * group) for group in (1, 3, 7, 8, 16, 32)),
        *(Check(head_size=size) for size in (32, 64, 80, 96, 112, 192, 256)),
        *(Check(block=size) for size in (8, 32, 64, 128)),
        *(Check(window=window) for window in (1, 37)),
        Check(softcap=2.0),
        Check(alibi=True),
        Check(sinks=True),
        Check(**every),
        Check(cache="fp8", head_size=64, **every),
        Check(query="fp32", cache="fp32", heads=14, head_size=80, **every),
        Check(cache="fp8", head_size=256, heads=16),
        Check(layout="layer-first"),
        Check(what="write"),
        Check(what="write", cache="fp8"),
        *(Check(what=what, layout=layout) for what in ("copy", "swap") for layout in _LAYOUTS),
    ]


_LAYOUTS = ("block-first", "layer-first")


def _first_decodes() -> list[Cell]:
    large = [Decode(batch, keys) for batch in (64, 128, 256) for keys in (1024, 4096, 8192)]
    fp8 = [Decode(64, keys, cache="fp8") for keys in (1024, 4096, 8192)]
    return [*large, *fp8]


def _more_decodes() -> list[Cell]:
    small = [Decode(batch, keys) for batch in (1, 8, 32) for keys in (1024, 4096, 8192)]
    return [
        *(Decode(64, keys, block=64) for keys in (1024, 4096, 8192)),
        Decode(64, 4096, layout="layer-first"),
        Decode(64, 1024, layout="layer-first"),
        Decode(64, 4096, pool=12),
        *small,
        *(Decode(64, keys, *heads) for heads in (EVERY, LARGE, SEVEN) for keys in (1024, 4096)),
        *(Decode(64, keys, lengths="zipf") for keys in (1024, 4096)),
        Decode(64, 4096, lengths="zipf", cache="fp8"),
    ]


def _last_decodes() -> list[Cell]:
    return [
        Decode(128, 4096, lengths="zipf"),
        *(Decode(batch, 32768) for batch in (1, 8, 32)),
        *(Decode(batch, 512) for batch in (64, 256)),
        *(Decode(128, keys, cache="fp8") for keys in (1024, 4096)),
        Decode(64, 4096, block=64, cache="fp8"),
        *(Decode(64, 4096, *heads, cache="fp8") for heads in (EVERY, LARGE, SEVEN)),
    ]


def _first_prefills() -> list[Cell]:
    whole = [Prefill(16384 // length, length, length) for length in (4096, 16384, 1024, 8192)]
    return [*whole, *(Prefill(1, chunk, 8192) for chunk in (512, 2048))]


def _more_prefills() -> list[Cell]:
    return [
        *(Prefill(1, chunk, 32768) for chunk in (512, 2048)),
        *(Prefill(1, chunk, chunk) for chunk in (512, 2048)),
        *(Prefill(4, 4096, 4096, *heads) for heads in (EVERY, LARGE, SEVEN)),
        Prefill(4, 4096, 4096, block=64),
        Prefill(4, 4096, 4096, cache="fp8"),
    ]


LLAMA, OPT, DEMO = "llama-8b", "opt-13b", "demo"
# Batches and contexts. Sequences of the 13B take 800 KiB a token, and 2048 tokens at most.
_LLAMA_STEPS = ((64, 512), (64, 4096), (256, 512), (1, 512), (8, 512), (8, 4096), (1, 4096))
_OPT_STEPS = ((64, 512), (256, 256), (1, 512), (8, 512), (64, 1536))


def _engine() -> list[Cell]:
    """One model after the other; the profiler comes last, when all that is timed has been.

    Layers are compiled after all that is measured without that.
    """
    return [
        *_steps(LLAMA, _LLAMA_STEPS, eager=4),
        EngineCheck(LLAMA, "memory"),
        *(Rate(LLAMA, batch) for batch in (1, 8, 64, 256)),
        *(Preempt(LLAMA, block) for block in (8, 16, 32)),
        *(Step(LLAMA, *shape, fused=True) for shape in _LLAMA_STEPS[:4]),
        *_steps(OPT, _OPT_STEPS, eager=2),
        *(Rate(OPT, batch) for batch in (1, 64, 256)),
        Fit(OPT),
        *(Kernels(OPT, *shape) for shape in _OPT_STEPS[:2]),
        *(Kernels(LLAMA, *shape) for shape in _LLAMA_STEPS[:5]),
        *(Kernels(LLAMA, *shape, fused=True) for shape in _LLAMA_STEPS[:4]),
    ]


def _steps(model: str, shapes: tuple[tuple[int, int], ...], eager: int) -> list[Cell]:
    """With graphs, and the first ones without."""
    graphs = [Step(model, *shape) for shape in shapes]
    return [*graphs, *(replace(cell, eager=True) for cell in graphs[:eager])]


def _moves() -> list[Cell]:
    """Blocks of 2 MiB (32 layers of 8 heads of 128) and of 64 KiB (4 layers of 4 of 64)."""
    blocks = ((2048, 32), (64, 4))
    copies: list[Cell] = [
        Copy(kib, layers, mib, layout)
        for mib in (256, 1024)
        for kib, layers in blocks
        for layout in _LAYOUTS
    ]
    swaps: list[Cell] = [
        Swap(kib, layers, 512, direction, layout)
        for kib, layers in blocks
        for layout in _LAYOUTS
        for direction in ("out", "in")
    ]
    return copies + swaps


def _dry() -> list[Cell]:
    """Everything once, at sizes that the interpreter gets through in seconds.

    No bf16: the interpreter multiplies its bits as if they were numbers.
    """
    shape: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_size": 32, "small": True}
    half: dict[str, Any] = {**shape, "query": "fp16", "cache": "fp16"}
    every: dict[str, Any] = {"window": 7, "softcap": 2.0, "alibi": True, "sinks": True}
    return [
        *(Ceiling(name, small=True) for name in ("read", "copy", "matrix", "pinned")),
        Check(**half, public=True),
        Check(**{**shape, "query": "fp32", "cache": "fp32"}, **every, public=True),
        Check(**{**shape, "query": "fp16", "cache": "fp8"}, public=True),
        Check(**{**half, "head_size": 80, "layout": "layer-first"}),
        Check(**half, what="write"),
        *(Check(**half, what=what, layout="layer-first") for what in ("copy", "swap")),
        Decode(2, 300, **half),
        Decode(3, 20, lengths="zipf", pool=2, **{**half, "cache": "fp8"}),
        Prefill(1, 40, 40, **half),
        Prefill(2, 10, 40, **half),
        *(Copy(4, 2, 1, layout, small=True) for layout in _LAYOUTS),
        *(Swap(4, 2, 1, way, layout, small=True) for layout in _LAYOUTS for way in ("out", "in")),
        EngineCheck(DEMO, "tokens"),
        EngineCheck("tiny-llama", "memory"),
        *_steps("tiny-llama", ((3, 40),), eager=1),
        *(Rate("tiny-llama", batch) for batch in (1, 3)),
        Preempt("tiny-llama", 8),
        *_steps("tiny-opt", ((2, 20),), eager=0),
        Rate("tiny-opt", 2),
        Fit("tiny-opt"),
        Kernels("tiny-llama", 3, 40),
    ]
