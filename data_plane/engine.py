"""Executes step plans: the one place where plans, resident state, model and KV cache meet.

Not thread-safe; one worker calls it. A plan is checked whole before anything changes, so a refused
plan leaves no trace.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_plane.device import Fetch, device_of
from data_plane.fingerprint import block_fingerprint
from data_plane.kv_cache import KVCache
from data_plane.kv_scales import KVScales, cache_dtype
from data_plane.metrics.meter import StepMeter
from data_plane.model import Model
from data_plane.plan import PlanColumns
from data_plane.plan_check import check_plan
from data_plane.rehearsal import every_move, largest_draw, largest_pass
from data_plane.result import encode_result, encode_snapshot
from data_plane.sampler import Draws, Rows, Scores, collect_scores, draw, score_prompt
from data_plane.state import Awaited, Moves, ResidentState, StepBatch
from data_plane.step_runner import StepRunner
from data_plane.token_table import TokenTable
from kernels import AttentionBatch
from protos.engine.v1 import engine_pb2


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """Fixed at start: nothing grows later.

    Attributes:
        block_size: tokens per block.
        block_count, host_block_count: blocks on the device and in host memory for swapping.
        slot_count: sequences resident at once.
        step_tokens: tokens of one step, at most; at least `slot_count`.
        max_length: prompt and output tokens of one sequence, at most.
    """

    block_size: int
    block_count: int
    host_block_count: int
    slot_count: int
    step_tokens: int
    max_length: int


class Engine:
    """One model with its KV cache and everything resident on it.

    Args:
        kv_scales: make the KV cache one of fp8, in units of these; those of this rank's heads.
        buckets: batch sizes that steps which only decode are padded to; see `StepRunner`.
        check: verify block conservation after every step, for tests.

    Attributes:
        fingerprint: names what decides the bytes of a block; see `block_fingerprint`.
        load_seconds: what it took to build, where somebody has measured it.
    """

    def __init__(
        self,
        model: Model,
        sizes: EngineSizes,
        *,
        kv_scales: KVScales | None = None,
        buckets: Iterable[int] = (),
        check: bool = False,
    ) -> None:
        facts = model.facts
        self.model, self.sizes = model, sizes
        self.fingerprint = block_fingerprint(facts.fingerprint, kv_scales)
        self.cache = KVCache(
            facts.layer_count,
            sizes.block_count,
            sizes.host_block_count,
            facts.local_kv_head_count,
            sizes.block_size,
            facts.head_size,
            cache_dtype(facts.dtype, kv_scales),
            model.device,
            kv_scales,
        )
        self.state = ResidentState(
            sizes.slot_count,
            sizes.max_length,
            sizes.block_size,
            sizes.block_count,
            sizes.host_block_count,
            facts.vocabulary_size,
        )
        self.device = device_of(model.device)
        self.tokens = TokenTable(sizes.slot_count, self.state.tokens.shape[1], self.device)
        self.runner = StepRunner(
            model, self.cache, self.device, self.tokens.tokens, self.state.table_width, buckets
        )
        self.counters, self.meter = engine_pb2.Counters(), StepMeter()
        self.load_seconds = 0.0
        self._launched: deque[Launched] = deque()
        self._check = check

    def execute(self, plan: PlanColumns, queued_us: int = 0) -> engine_pb2.StepResult:
        """Runs one step to its end; see `launch`."""
        return self.launch(plan, queued_us).finish()

    def launch(self, plan: PlanColumns, queued_us: int = 0) -> Launched:
        """Puts one step on its way; the next one may be launched before this one is finished.

        Raises:
            PlanError: the plan does not fit the resident state; nothing has changed.
        """
        check_plan(plan, self.state, self.sizes.step_tokens)
        moves = self.state.apply_moves(plan)
        self.tokens.apply(plan, self.state.token_count)
        batch = self.state.lay_out(plan)
        moved = self._move(moves, batch)
        self.tokens.copy(plan.fork_parents, plan.fork_children)
        marks = [self.device.mark()]
        logits = self.runner.run(batch) if len(batch.positions) else None
        marks.append(self.device.mark())
        rows = Rows(
            batch.sampled_logits,
            batch.sampled_slots,
            self.state.token_count[batch.sampled_slots],
        )
        draws, prompt = self._draw(batch, rows, logits), self._score_prompts(batch, logits)
        awaited = self.state.advance(plan, batch)
        self.tokens.put(awaited.slots, awaited.positions, draws.ids)
        marks.append(self.device.mark())
        values = [*draws.values, *(value for scores in prompt for value in scores.values)]
        fetch = self.device.fetch(values)
        launched = Launched(
            self, plan, batch, awaited, draws, prompt, fetch, moved, marks, queued_us
        )
        self._launched.append(launched)
        self._count(batch)
        if self._check:
            self.state.check()
        return launched

    def finish_all(self) -> None:
        """Waits for every step that was launched."""
        while self._launched:
            self._launched[0].finish()

    def snapshot(self) -> list[engine_pb2.SnapshotPart]:
        """Returns the resident state for a new leader; see `ResidentState.pause`."""
        self.finish_all()
        self.state.pause()
        return encode_snapshot(self.state)

    def release_all(self) -> int:
        """Drops every resident sequence; cached blocks stay. Returns how many there were."""
        self.finish_all()
        slots = self.state.resident_slots()
        self.state.release(slots)
        return len(slots)

    def warm_up(
        self, progress: Callable[[list[AttentionBatch]], Iterable[AttentionBatch]] = iter
    ) -> None:
        """Compiles the kernels of every kind of step; called once, before `capture`.

        On a CPU there are none. What a step writes here, nobody reads.
        """
        if self.device.asynchronous:
            self.runner.warm_up(progress)

    def capture(self, progress: Callable[[list[int]], Iterable[int]] = iter) -> None:
        """Readies the graphs of the buckets; called once, before the first step.

        Raises:
            Exception: whatever keeps them from being captured; decodes run without them then.
        """
        self.runner.capture(progress)

    def rehearse(self) -> None:
        """Runs the largest step, draws and moves that there can be; called once, after `capture`.

        So whatever comes later finds its memory taken. On a CPU it would only take time.
        """
        if not self.device.asynchronous:
            return
        logits = largest_pass(self.model, self.cache, self.sizes.step_tokens)
        vocabulary, send = self.state.sampling.vocabulary_size, self.device.send
        drawn = largest_draw(logits, self.tokens.tokens, vocabulary, send)
        with self.device.moving():
            every_move(self.cache)
        self.device.await_moves()
        self.device.fetch(drawn).wait()

    def forget(self, launched: Launched) -> None:
        """Takes a step off that was finished; they are finished in the order of their launch."""
        while self._launched and self._launched[0] is not launched:
            self._launched[0].finish()
        if self._launched:
            self._launched.popleft()

    def _move(self, moves: Moves, batch: StepBatch) -> list[tuple[Any, Any]]:
        """Copies blocks beside what is computed, which waits only for what it needs.

        Blocks that come back from the host are read by a later step; those that went there may be
        written by this one. Returns when moves began and ended.
        """
        device, spans, meter = self.device, [], self.meter
        meter.swapped_out += len(moves.swap_out[0])
        meter.swapped_in += len(moves.swap_in[0])
        meter.copied += len(moves.copies[0])
        device.await_moves()
        if len(moves.swap_out[0]) or len(moves.copies[0]):
            with device.moving():
                began = device.mark()
                self.cache.swap_out(*moves.swap_out)
                self.cache.copy_blocks(*moves.copies)
                spans.append((began, device.mark()))
            written = batch.slot_mapping // self.sizes.block_size
            if len(moves.copies[0]) or np.isin(moves.swap_out[0], written).any():
                device.await_moves()
        if len(moves.swap_in[0]):
            with device.moving():
                began = device.mark()
                self.cache.swap_in(*moves.swap_in)
                spans.append((began, device.mark()))
        return spans

    def _draw(self, batch: StepBatch, rows: Rows, logits: torch.Tensor | None) -> Draws:
        if logits is None or not len(batch.sampled_slots):
            empty = torch.zeros(0, dtype=torch.int64, device=self.device.torch_device)
            return Draws(empty, [])
        state, send = self.state, self.device.send
        tokens = self.tokens.tokens
        return draw(logits, rows, state.sampling, tokens, state.prompt_count, send)

    def _score_prompts(self, batch: StepBatch, logits: torch.Tensor | None) -> list[Scores]:
        if logits is None or not batch.prompt_rows:
            return []
        parts, row = [], len(logits) - sum(count for _, _, count in batch.prompt_rows)
        for slot, first, count in batch.prompt_rows:
            following = self.tokens.tokens[slot, first + 1 : first + 1 + count].long()
            wanted = int(self.state.sampling.prompt_logprob_count[slot])
            rows = logits[row : row + count]
            parts += score_prompt(rows, slot, first + 1, following, wanted)
            row += count
        return parts

    def _count(self, batch: StepBatch) -> None:
        self.counters.step_count += 1
        self.counters.decode_token_count += batch.decode_count
        self.counters.prefill_token_count += len(batch.positions) - batch.decode_count


@dataclass(eq=False, slots=True)
class Launched:
    """A step on its way, whose result is to be fetched."""

    engine: Engine
    plan: PlanColumns
    batch: StepBatch
    awaited: Awaited
    draws: Draws
    prompt: list[Scores]
    fetch: Fetch
    moved: list[tuple[Any, Any]]
    marks: list[Any]
    queued_us: int
    result: engine_pb2.StepResult | None = None

    @property
    def done(self) -> bool:
        """Whether it was done as soon as it was launched."""
        return not self.engine.device.asynchronous

    def wait(self) -> None:
        """Returns when the device has done the step and its moves; on any thread."""
        self.fetch.wait()
        for _, ended in self.moved:
            self.engine.device.reach(ended)

    def finish(self) -> engine_pb2.StepResult:
        """Waits for the step and returns its result, also when it is asked again."""
        if self.result is None:
            self.engine.forget(self)
            self.wait()
            values = self.fetch.wait()
            count = len(self.draws.values)
            samples = self.draws.collect(values[:count])
            nothing = np.zeros(0, np.int64)
            prompt = collect_scores(self.prompt, values[count:], nothing)
            self.engine.state.record(self.awaited, samples.token_ids)
            times = self._timings()
            self.engine.meter.took(times)
            self.result = encode_result(self.plan, self.batch, samples, prompt, times)
        return self.result

    def _timings(self) -> tuple[int, int, int, int]:
        """Microseconds in the queue, of moves, of the forward pass and of sampling."""
        elapsed = self.engine.device.elapsed_us
        moves = sum(elapsed(began, ended) for began, ended in self.moved)
        launched, computed, drawn = self.marks
        return self.queued_us, moves, elapsed(launched, computed), elapsed(computed, drawn)
