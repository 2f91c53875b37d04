"""Requests between wire and scheduler, and the record from which any leader rebuilds one."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from control_plane.beams import BeamFields, EarlyStopping
from control_plane.blocks import Int32Array
from control_plane.engine_link import EngineFacts
from control_plane.hashing import PrefixHasher
from control_plane.request import Request, SamplingFields
from protos.control.v1 import record_pb2
from protos.inference.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A registered prefix that a prompt begins with, in full blocks."""

    name: str = ""
    block_count: int = 0


NOT_SHARED = SharedPrefix()
_LAST_IN_LINE = 100

Number = TypeVar("Number", int, float)


def request_digest(message: pb.GenerateRequest) -> bytes:
    """What two calls with one request id must agree on: all but the id and the received counts."""
    bare = pb.GenerateRequest()
    bare.CopyFrom(message)
    bare.ClearField("received_token_counts")
    bare.ClearField("request_id")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()


def new_request(
    message: pb.GenerateRequest,
    prompt: list[int],
    max_tokens: int,
    facts: EngineFacts,
    tenant: str,
    digest: bytes,
    shared: SharedPrefix = NOT_SHARED,
) -> Request:
    """Makes the scheduler's request from a validated message and its tokenised prompt.

    Args:
        message: with its request id filled in.
        tenant: salts the prefix hashes.
        digest: see `request_digest`.
        shared: the registered prefix that the prompt begins with.
    """
    record = record_pb2.SequenceRecord(
        tenant=tenant,
        request_digest=digest,
        request=message,
        shared_block_count=shared.block_count,
    )
    # The engine keeps the prompt's tokens already, and hands them over with the record.
    record.request.ClearField("prompt")
    record.request.ClearField("received_token_counts")
    record.request.stopping.max_tokens = max_tokens
    if not message.sampling.HasField("seed"):
        # Derived, so that a retry with the same id draws the same tokens.
        drawn = hashlib.sha256(b"quire.seed" + message.request_id.encode()).digest()
        record.request.sampling.seed = int.from_bytes(drawn[:8], "little")
    tokens = np.array(prompt, np.int32)
    request = _request(
        record, record.SerializeToString(), tokens, _hashes(record, tokens, facts), facts
    )
    return replace(request, prefix_name=shared.name)


def warming_request(name: str, ids: list[int], facts: EngineFacts) -> tuple[Request, bytes]:
    """Makes the request that has an engine compute a registered prefix, and its digest.

    Args:
        ids: the tokens of its full blocks.
    """
    message = pb.GenerateRequest(
        request_id=f"warm-{name}-{uuid.uuid4().hex[:12]}",
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.Sampling(temperature=0),
        priority=_LAST_IN_LINE,
    )
    digest = request_digest(message)
    shared = SharedPrefix(name, len(ids) // facts.block_size)
    return new_request(message, ids, 1, facts, "", digest, shared), digest


def rebuilt_request(data: bytes, prompt: Int32Array, facts: EngineFacts) -> tuple[Request, bytes]:
    """Returns the request of a resident sequence and its digest.

    Raises:
        ValueError: the bytes are no record.
    """
    record = record_pb2.SequenceRecord()
    try:
        record.ParseFromString(data)
    except Exception as error:
        raise ValueError(f"no sequence record: {error}") from error
    request = _request(record, data, prompt.copy(), _hashes(record, prompt, facts), facts)
    return request, record.request_digest


def admission_facts(data: bytes) -> tuple[int, int]:
    """Returns a resident sequence's place of arrival, and its cached prompt tokens.

    Raises:
        DecodeError: the bytes are no record.
    """
    record = record_pb2.SequenceRecord.FromString(data)
    return record.arrival, record.cached_token_count


def stop_strings(request: Request) -> tuple[str, ...]:
    record = record_pb2.SequenceRecord.FromString(request.record)
    return tuple(record.request.stopping.stop_strings)


def _hashes(
    record: record_pb2.SequenceRecord, tokens: Int32Array, facts: EngineFacts
) -> tuple[bytes, ...]:
    hasher = PrefixHasher(facts.fingerprint, facts.block_size, record.tenant)
    return tuple(hasher.extend([], tokens, record.shared_block_count))


def _request(
    record: record_pb2.SequenceRecord,
    data: bytes,
    prompt: Int32Array,
    hashes: tuple[bytes, ...],
    facts: EngineFacts,
) -> Request:
    message = record.request
    sampling, stopping, output = message.sampling, message.stopping, message.output
    ends = () if stopping.ignore_eos else facts.eos_token_ids
    stop_ids = tuple(dict.fromkeys([*ends, *stopping.stop_token_ids]))
    if message.HasField("beam_search"):
        return _beam_request(record, data, prompt, hashes, facts, stop_ids)
    return Request(
        request_id=message.request_id,
        prompt=prompt,
        max_tokens=stopping.max_tokens,
        sample_count=_or(output, "sample_count", 1),
        min_tokens=stopping.min_tokens,
        stop_ids=stop_ids,
        sampling=SamplingFields(
            temperature=_or(sampling, "temperature", 1.0),
            top_k=sampling.top_k,
            top_p=_or(sampling, "top_p", 1.0),
            min_p=sampling.min_p,
            repetition_penalty=_or(sampling, "repetition_penalty", 1.0),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed,
            logit_bias=dict(sampling.logit_bias),
            logprob_count=_or(output, "logprob_count", -1),
            prompt_logprob_count=_or(output, "prompt_logprob_count", -1),
        ),
        priority=message.priority,
        hashes=hashes,
        salt=record.tenant,
        shared_blocks=record.shared_block_count,
        record=data,
    )


_EARLY_STOPPING: dict[int, EarlyStopping] = {
    pb.EARLY_STOPPING_UNSPECIFIED: "heuristic",
    pb.EARLY_STOPPING_HEURISTIC: "heuristic",
    pb.EARLY_STOPPING_FIRST: "first",
    pb.EARLY_STOPPING_NEVER: "never",
}


def _beam_request(
    record: record_pb2.SequenceRecord,
    data: bytes,
    prompt: Int32Array,
    hashes: tuple[bytes, ...],
    facts: EngineFacts,
    stop_ids: tuple[int, ...],
) -> Request:
    """Beams are greedy sequences whose candidates the engine reports as log-probabilities."""
    message = record.request
    beams = BeamFields(
        width=message.beam_search.width,
        length_penalty=_or(message.beam_search, "length_penalty", 1.0),
        early_stopping=_EARLY_STOPPING[message.beam_search.early_stopping],
        stream_best=message.beam_search.stream_best,
    )
    candidates = min(beams.candidate_count(len(stop_ids)), facts.vocabulary_size)
    return Request(
        request_id=message.request_id,
        prompt=prompt,
        max_tokens=message.stopping.max_tokens,
        sample_count=_or(message.output, "sample_count", 1),
        stop_ids=stop_ids,
        sampling=SamplingFields(temperature=0.0, logprob_count=candidates),
        priority=message.priority,
        hashes=hashes,
        salt=record.tenant,
        shared_blocks=record.shared_block_count,
        record=data,
        beams=beams,
    )


def _or(message: pb.Sampling | pb.Output | pb.BeamSearch, field: str, default: Number) -> Number:
    value: Number = getattr(message, field)
    return value if message.HasField(field) else default
