"""Executes step plans: the one place where plans, resident state, model and KV cache meet.

Not thread-safe; one worker calls it. A plan is checked whole before anything changes, so a refused
plan leaves no trace.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from data_plane.kv_cache import KVCache
from data_plane.model import Model
from data_plane.plan import PlanColumns
from data_plane.plan_check import check_plan
from data_plane.result import encode_result, encode_snapshot
from data_plane.sampler import Logprobs, Samples, prompt_logprobs, sample
from data_plane.state import Moves, ResidentState, StepBatch
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
        check: verify block conservation after every step, for tests.
    """

    def __init__(self, model: Model, sizes: EngineSizes, *, check: bool = False) -> None:
        facts = model.facts
        self.model, self.sizes = model, sizes
        self.cache = KVCache(
            facts.layer_count,
            sizes.block_count,
            sizes.host_block_count,
            facts.kv_head_count,
            sizes.block_size,
            facts.head_size,
            facts.dtype,
            model.device,
        )
        self.state = ResidentState(
            sizes.slot_count,
            sizes.max_length,
            sizes.block_size,
            sizes.block_count,
            sizes.host_block_count,
            facts.vocabulary_size,
        )
        self.counters = engine_pb2.Counters()
        self._check = check

    def execute(self, plan: PlanColumns, queued_us: int = 0) -> engine_pb2.StepResult:
        """Runs one step.

        Raises:
            PlanError: the plan does not fit the resident state; nothing has changed.
        """
        started = time.perf_counter_ns()
        check_plan(plan, self.state, self.sizes.step_tokens)
        self._move(self.state.apply_moves(plan))
        batch = self.state.lay_out(plan)
        moved = time.perf_counter_ns()
        logits = self._forward(batch) if len(batch.token_ids) else None
        computed = time.perf_counter_ns()
        samples, prompt = self._sample(batch, logits)
        self.state.commit(plan, batch, samples.token_ids)
        self._count(batch)
        if self._check:
            self.state.check()
        times = [queued_us]
        times += [(b - a) // 1000 for a, b in ((started, moved), (moved, computed))]
        times.append((time.perf_counter_ns() - computed) // 1000)
        return encode_result(plan, batch, samples, prompt, (times[0], times[1], times[2], times[3]))

    def snapshot(self) -> list[engine_pb2.SnapshotPart]:
        """Returns the resident state for a new leader; see `ResidentState.pause`."""
        self.state.pause()
        return encode_snapshot(self.state)

    def release_all(self) -> int:
        """Drops every resident sequence; cached blocks stay. Returns how many there were."""
        slots = self.state.resident_slots()
        self.state.release(slots)
        return len(slots)

    def _move(self, moves: Moves) -> None:
        if len(moves.swap_out[0]):
            self.cache.swap_out(*moves.swap_out)
        if len(moves.swap_in[0]):
            self.cache.swap_in(*moves.swap_in)
        if len(moves.copies[0]):
            self.cache.copy_blocks(*moves.copies)

    def _forward(self, batch: StepBatch) -> torch.Tensor:
        attention = AttentionBatch.build(
            torch.from_numpy(batch.query_starts),
            torch.from_numpy(batch.context_lengths),
            torch.from_numpy(batch.block_tables),
            torch.from_numpy(batch.slot_mapping),
            batch.decode_count,
            device=self.model.device,
        )
        return self.model.forward(
            torch.from_numpy(batch.token_ids).to(self.model.device),
            torch.from_numpy(batch.positions).to(self.model.device),
            attention,
            self.cache,
            torch.from_numpy(batch.logit_rows).to(self.model.device),
        )

    def _sample(
        self, batch: StepBatch, logits: torch.Tensor | None
    ) -> tuple[Samples, Logprobs | None]:
        state = self.state
        if logits is None or not len(batch.sampled_slots):
            return Samples(batch.sampled_slots[:0], None, []), self._prompt(batch, logits)
        samples = sample(
            logits,
            batch.sampled_logits,
            batch.sampled_slots,
            state.token_count[batch.sampled_slots],
            state.sampling,
            state.tokens,
            state.prompt_count,
        )
        return samples, self._prompt(batch, logits)

    def _prompt(self, batch: StepBatch, logits: torch.Tensor | None) -> Logprobs | None:
        if logits is None or not batch.prompt_rows:
            return None
        parts, row = [], len(logits) - sum(count for _, _, count in batch.prompt_rows)
        for slot, first, count in batch.prompt_rows:
            following = self.state.tokens[slot, first + 1 : first + 1 + count]
            wanted = int(self.state.sampling.prompt_logprob_count[slot])
            rows = logits[row : row + count]
            parts.append(prompt_logprobs(rows, slot, first + 1, following, wanted))
            row += count
        return Logprobs.concatenate(parts)

    def _count(self, batch: StepBatch) -> None:
        self.counters.step_count += 1
        self.counters.decode_token_count += batch.decode_count
        self.counters.prefill_token_count += len(batch.token_ids) - batch.decode_count
