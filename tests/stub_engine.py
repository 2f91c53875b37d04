"""An engine without a model: the real resident state and plan checks, an arithmetic sampler.

Its tokens depend on the whole sequence and on the sample index, so a wrong block table, token or
fork shows in the output. Keys and values are stood in for by "the token whose key is here", one
integer per block row, which attention would have read: a copy, share or write gone wrong shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from control_plane.engine_wire import decode_result, decode_snapshot, encode_plan
from control_plane.plan import Plan, Snapshot, StepResult
from control_plane.scheduler import SchedulerLimits
from data_plane.plan import decode_plan
from data_plane.plan_check import check_plan
from data_plane.result import encode_result, encode_snapshot
from data_plane.sampler import Logprobs, Samples
from data_plane.state import ResidentState, StepBatch
from protos.engine.v1 import engine_pb2

VOCABULARY = 1000


def draw(tokens: np.ndarray, sample_index: int) -> int:
    """The token that follows `tokens` in this sample: a pure function of both."""
    data = np.asarray(tokens, "<i4").tobytes() + bytes([sample_index])
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little") % VOCABULARY


def candidates(tokens: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The likeliest tokens after `tokens` and their log-probabilities, best first."""
    rng = np.random.default_rng(draw(tokens, 255) + 1000 * draw(tokens, 254))
    ids = rng.permutation(VOCABULARY)[:count]
    scores = -np.sort(rng.exponential(2.0, count)).astype(np.float32)
    return list(zip(ids.tolist(), scores.tolist(), strict=True))


def expected(prompt: list[int], count: int, sample_index: int = 0) -> list[int]:
    """What a request generates when nothing stops it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(draw(np.array(tokens), sample_index))
    return tokens[len(prompt) :]


class StubEngine:
    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.state = ResidentState(
            limits.slot_count,
            limits.max_length,
            limits.block_size,
            limits.block_count,
            limits.host_block_count,
            VOCABULARY,
        )
        self.keys = np.full(limits.block_count * limits.block_size, -1, np.int64)
        self.host_keys = np.full(limits.host_block_count * limits.block_size, -1, np.int64)
        self.fault: Callable[[int, np.ndarray], bool] = lambda slot, tokens: False
        self.prefill_tokens = 0
        self.messages: list[engine_pb2.StepPlan] = []

    def execute(self, plan: Plan, epoch: int = 1) -> StepResult:
        """Sends a plan over the wire format, executes it, and sends its result back likewise."""
        message = encode_plan(plan, epoch)
        self.messages.append(message)
        return self.execute_message(message)

    def execute_message(self, message: engine_pb2.StepPlan) -> StepResult:
        """Executes a plan as it came over the wire, which may be later than it was made."""
        columns = decode_plan(engine_pb2.StepPlan.FromString(message.SerializeToString()))
        check_plan(columns, self.state, self.limits.step_tokens)
        moves = self.state.apply_moves(columns)
        size = self.limits.block_size
        rows = self.keys.reshape(-1, size)
        host = self.host_keys.reshape(-1, size)
        host[moves.swap_out[1]] = rows[moves.swap_out[0]]
        rows[moves.swap_in[1]] = host[moves.swap_in[0]]
        rows[moves.copies[1]] = rows[moves.copies[0]]
        batch = self.state.lay_out(columns)
        self.prefill_tokens += int(batch.counts[batch.decode_count :].sum())
        written = batch.slot_mapping >= 0
        tokens = self.state.tokens[batch.token_slots, batch.positions]
        self.keys[batch.slot_mapping[written]] = tokens[written]
        samples = self._sample(batch)
        self.state.record(self.state.advance(columns, batch), samples.token_ids)
        self.state.check()
        result = encode_result(columns, batch, samples, None, (0, 0, 0, 0))
        return decode_result(engine_pb2.StepResult.FromString(result.SerializeToString()))

    def _sample(self, batch: StepBatch) -> Samples:
        ids = np.zeros(len(batch.sampled_slots), np.int32)
        faults = []
        for row, slot in enumerate(batch.sampled_slots.tolist()):
            count = int(self.state.token_count[slot])
            tokens = self.state.tokens[slot, :count]
            self._check_keys(slot, tokens)
            if self.fault(slot, tokens):
                ids[row] = -1
                faults.append((row, "planted"))
            else:
                ids[row] = draw(tokens, int(self.state.sampling.sample_index[slot]))
        return Samples(ids, self._logprobs(batch.sampled_slots[ids >= 0]), faults)

    def _logprobs(self, sampled: np.ndarray) -> Logprobs | None:
        wanted = self.state.sampling.logprob_count
        rows = [slot for slot in sampled.tolist() if wanted[slot] >= 0]
        if not rows:
            return None
        tops = [
            candidates(self.state.tokens[slot, : self.state.token_count[slot]], int(wanted[slot]))
            for slot in rows
        ]
        flat = [pair for top in tops for pair in top]
        return Logprobs(
            slots=np.array(rows, np.int32),
            positions=self.state.token_count[rows].astype(np.int32),
            token_ids=np.array([top[0][0] for top in tops], np.int32),
            logprobs=np.array([top[0][1] for top in tops], np.float32),
            ranks=np.ones(len(rows), np.int32),
            top_counts=np.array([len(top) for top in tops], np.int32),
            top_token_ids=np.array([token for token, _ in flat], np.int32),
            top_logprobs=np.array([score for _, score in flat], np.float32),
        )

    def _check_keys(self, slot: int, tokens: np.ndarray) -> None:
        positions = np.arange(len(tokens))
        size = self.limits.block_size
        blocks = self.state.tables[slot, positions // size].astype(np.int64)
        seen = self.keys[blocks * size + positions % size]
        if not np.array_equal(seen, tokens):
            wrong = int(np.flatnonzero(seen != tokens)[0])
            raise AssertionError(f"slot {slot} reads another's key at position {wrong}")

    def snapshot(self) -> Snapshot:
        self.state.pause()
        parts = encode_snapshot(self.state)
        return decode_snapshot(
            [engine_pb2.SnapshotPart.FromString(part.SerializeToString()) for part in parts]
        )
