"""The one validator of requests: limits on everything, the same wherever it is called.

What depends on the model (vocabulary, length) comes in `ModelLimits`; what depends on the tokenised
prompt is checked by `check_length`, once there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from protos.inference.v1 import inference_pb2 as pb
from protos.wire import RpcError, bad_field

MAX_MODEL_NAME_BYTES = 256
MAX_REQUEST_ID_BYTES = 128
MAX_CHAT_MESSAGES = 1024
MAX_ROLE_BYTES = 64
MAX_TEXT_BYTES = 8 << 20
MAX_BIASES = 300
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 16
MAX_SAMPLES = 16
MAX_BEAMS = 16
MAX_LENGTH_PENALTY = 10
# What a search asks of the engine for each beam: its width for each way to go on or to end.
MAX_CANDIDATES = 2048
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100
MAX_PENALTY = 10
MAX_BIAS = 100
DEFAULT_MAX_TOKENS = 4096
MAX_WAITING_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """`max_length` counts prompt and output tokens of one sample."""

    vocabulary_size: int
    max_length: int


def is_request_id(text: str) -> bool:
    """Whether a client may name a request so, and a log show it."""
    return 0 < len(text) <= MAX_REQUEST_ID_BYTES and all(" " < char <= "~" for char in text)


def check_request(request: pb.GenerateRequest, limits: ModelLimits) -> None:
    """Raises RpcError (INVALID_ARGUMENT, naming field and limit) unless every field is valid."""
    _bytes("model", request.model, MAX_MODEL_NAME_BYTES)
    _bytes("request_id", request.request_id, MAX_REQUEST_ID_BYTES)
    if request.request_id and not is_request_id(request.request_id):
        raise bad_field("request_id", "must be printable ASCII without spaces")
    _number("priority", request.priority, -100, 100)
    _check_prompt(request, limits)
    _check_sampling(request.sampling, limits)
    _check_stopping(request.stopping, limits)
    _check_output(request)
    if request.HasField("beam_search"):
        _check_beams(request)
    if request.HasField("max_waiting_time"):
        _check_waiting(request)


def check_length(
    prompt_tokens: int, stopping: pb.Stopping, limits: ModelLimits, pool_room: int
) -> int:
    """Returns how many new tokens a sample may have.

    Args:
        pool_room: new tokens that fit the block pool; bounds the default, not what is asked for.

    Raises:
        RpcError: the prompt is empty, or prompt and max_tokens exceed the model's length.
    """
    if prompt_tokens == 0:
        raise bad_field("prompt", "is empty; at least 1 token is needed")
    room = limits.max_length - prompt_tokens
    if room < 1:
        raise bad_field(
            "prompt",
            f"has {prompt_tokens} tokens; the model's length of {limits.max_length} must leave "
            "room for at least 1 new token",
        )
    if not stopping.HasField("max_tokens"):
        return max(min(room, pool_room, DEFAULT_MAX_TOKENS), stopping.min_tokens, 1)
    if stopping.max_tokens > room:
        raise bad_field(
            "stopping.max_tokens",
            f"{prompt_tokens} prompt tokens and {stopping.max_tokens} new ones exceed the model's "
            f"length of {limits.max_length}",
        )
    return stopping.max_tokens


def _check_prompt(request: pb.GenerateRequest, limits: ModelLimits) -> None:
    form = request.WhichOneof("prompt")
    if form is None:
        raise bad_field("prompt", "is missing; set text, token_ids or chat")
    if form == "text":
        if not request.text:
            raise bad_field("text", "is empty")
        _bytes("text", request.text, MAX_TEXT_BYTES)
    elif form == "token_ids":
        ids = request.token_ids.ids
        if not ids:
            raise bad_field("token_ids.ids", "is empty")
        if len(ids) >= limits.max_length:
            raise bad_field(
                "token_ids.ids",
                f"has {len(ids)} tokens; the model's length of {limits.max_length} must leave "
                "room for at least 1 new token",
            )
        _token("token_ids.ids", min(ids), limits)
        _token("token_ids.ids", max(ids), limits)
    else:
        _check_chat(request.chat)


def _check_chat(chat: pb.Chat) -> None:
    _number("chat.messages", len(chat.messages), 1, MAX_CHAT_MESSAGES, "entries")
    for index, message in enumerate(chat.messages):
        field = f"chat.messages[{index}]"
        if not message.role:
            raise bad_field(f"{field}.role", "is empty")
        _bytes(f"{field}.role", message.role, MAX_ROLE_BYTES)
        _bytes(f"{field}.content", message.content, MAX_TEXT_BYTES)


def _check_sampling(sampling: pb.Sampling, limits: ModelLimits) -> None:
    _number("sampling.temperature", sampling.temperature, 0, MAX_TEMPERATURE)
    _number("sampling.top_k", sampling.top_k, 0, limits.vocabulary_size)
    _number("sampling.min_p", sampling.min_p, 0, 1)
    _number("sampling.presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _number("sampling.frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    for field, high in (("top_p", 1), ("repetition_penalty", MAX_PENALTY)):
        if sampling.HasField(field):
            value = getattr(sampling, field)
            if not 0 < value <= high:
                raise bad_field(f"sampling.{field}", f"is {value}; it must be in (0, {high}]")
    _number("sampling.logit_bias", len(sampling.logit_bias), 0, MAX_BIASES, "entries")
    for token, value in sampling.logit_bias.items():
        _token("sampling.logit_bias", token, limits)
        _number(f"sampling.logit_bias[{token}]", value, -MAX_BIAS, MAX_BIAS)


def _check_stopping(stopping: pb.Stopping, limits: ModelLimits) -> None:
    if stopping.HasField("max_tokens"):
        _number("stopping.max_tokens", stopping.max_tokens, 1, limits.max_length)
        _number("stopping.min_tokens", stopping.min_tokens, 0, stopping.max_tokens)
    _number("stopping.min_tokens", stopping.min_tokens, 0, limits.max_length)
    strings = stopping.stop_strings
    _number("stopping.stop_strings", len(strings), 0, MAX_STOP_STRINGS, "entries")
    for index, string in enumerate(strings):
        if not string:
            raise bad_field(f"stopping.stop_strings[{index}]", "is empty")
        _bytes(f"stopping.stop_strings[{index}]", string, MAX_STOP_STRING_BYTES)
    ids = stopping.stop_token_ids
    _number("stopping.stop_token_ids", len(ids), 0, MAX_STOP_TOKEN_IDS, "entries")
    for token in ids:
        _token("stopping.stop_token_ids", token, limits)


def _check_output(request: pb.GenerateRequest) -> None:
    output = request.output
    samples = output.sample_count if output.HasField("sample_count") else 1
    _number("output.sample_count", samples, 1, MAX_SAMPLES)
    _number("output.logprob_count", output.logprob_count, 0, MAX_LOGPROBS)
    _number("output.prompt_logprob_count", output.prompt_logprob_count, 0, MAX_LOGPROBS)
    received = request.received_token_counts
    if len(received) not in (0, samples):
        raise bad_field(
            "received_token_counts", f"has {len(received)} entries; 0 or {samples} are needed"
        )
    for count in received:
        _number("received_token_counts", count, 0, 1 << 30)


def _check_beams(request: pb.GenerateRequest) -> None:
    beams, sampling, output = request.beam_search, request.sampling, request.output
    _number("beam_search.width", beams.width, 1, MAX_BEAMS)
    _number(
        "beam_search.length_penalty", beams.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY
    )
    if beams.early_stopping not in pb.EarlyStopping.values():
        raise bad_field("beam_search.early_stopping", f"is {beams.early_stopping}, no known value")
    if output.sample_count > beams.width:
        raise bad_field(
            "output.sample_count", f"is {output.sample_count}; it must be in [1, {beams.width}]"
        )
    plain = pb.Sampling(seed=sampling.seed) if sampling.HasField("seed") else pb.Sampling()
    if sampling.HasField("temperature"):
        plain.temperature = 0
    if sampling != plain:
        raise bad_field("sampling", "must be greedy and without more for a beam search")
    for field, given in (
        ("stopping.stop_strings", bool(request.stopping.stop_strings)),
        ("stopping.min_tokens", bool(request.stopping.min_tokens)),
        ("output.logprob_count", output.HasField("logprob_count")),
        ("output.prompt_logprob_count", output.HasField("prompt_logprob_count")),
    ):
        if given:
            raise bad_field(field, "is not for a beam search")


def _check_waiting(request: pb.GenerateRequest) -> None:
    time = request.max_waiting_time
    _number("max_waiting_time.nanos", time.nanos, 0, 999_999_999)
    seconds = time.seconds + time.nanos / 1e9
    if not 0 < seconds <= MAX_WAITING_SECONDS:
        raise bad_field(
            "max_waiting_time", f"is {seconds:g} s; it must be in (0, {MAX_WAITING_SECONDS}] s"
        )


def _number(field: str, value: float, low: float, high: float, what: str = "") -> None:
    # Also false for NaN.
    if not low <= value <= high or math.isinf(value):
        unit = f" {what}" if what else ""
        raise bad_field(field, f"is {value}{unit}; it must be in [{low}, {high}]")


def _token(field: str, token: int, limits: ModelLimits) -> None:
    if not 0 <= token < limits.vocabulary_size:
        raise bad_field(
            field, f"token id {token} is outside the vocabulary [0, {limits.vocabulary_size})"
        )


def _bytes(field: str, text: str, limit: int) -> None:
    size = len(text.encode())
    if size > limit:
        raise bad_field(field, f"has {size} bytes; at most {limit} are allowed")


__all__ = ["ModelLimits", "RpcError", "check_length", "check_request", "is_request_id"]
