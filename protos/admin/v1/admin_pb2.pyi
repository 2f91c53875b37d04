from protos.inference.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_STATE_UNSPECIFIED: _ClassVar[EngineState]
    ENGINE_STATE_CONNECTING: _ClassVar[EngineState]
    ENGINE_STATE_LED: _ClassVar[EngineState]
    ENGINE_STATE_FOLLOWED: _ClassVar[EngineState]

class SequenceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEQUENCE_STATE_UNSPECIFIED: _ClassVar[SequenceState]
    SEQUENCE_STATE_WAITING: _ClassVar[SequenceState]
    SEQUENCE_STATE_PREFILL: _ClassVar[SequenceState]
    SEQUENCE_STATE_DECODE: _ClassVar[SequenceState]
    SEQUENCE_STATE_SWAPPED: _ClassVar[SequenceState]

class BlockState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOCK_STATE_UNSPECIFIED: _ClassVar[BlockState]
    BLOCK_STATE_FREE: _ClassVar[BlockState]
    BLOCK_STATE_CACHED: _ClassVar[BlockState]
    BLOCK_STATE_PINNED: _ClassVar[BlockState]
    BLOCK_STATE_USED: _ClassVar[BlockState]
    BLOCK_STATE_SHARED: _ClassVar[BlockState]

class LookupOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOOKUP_OUTCOME_UNSPECIFIED: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_HIT: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_NEVER_SEEN: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_EVICTED: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_OTHER_ENGINE: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_OTHER_TENANT: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_OTHER_MODEL: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_AFTER_A_MISS: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_NOT_FULL: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_NOT_USED: _ClassVar[LookupOutcome]
    LOOKUP_OUTCOME_RESTARTED: _ClassVar[LookupOutcome]

class PrefixForm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PREFIX_FORM_UNSPECIFIED: _ClassVar[PrefixForm]
    PREFIX_FORM_SYSTEM: _ClassVar[PrefixForm]
    PREFIX_FORM_PLAIN: _ClassVar[PrefixForm]
ENGINE_STATE_UNSPECIFIED: EngineState
ENGINE_STATE_CONNECTING: EngineState
ENGINE_STATE_LED: EngineState
ENGINE_STATE_FOLLOWED: EngineState
SEQUENCE_STATE_UNSPECIFIED: SequenceState
SEQUENCE_STATE_WAITING: SequenceState
SEQUENCE_STATE_PREFILL: SequenceState
SEQUENCE_STATE_DECODE: SequenceState
SEQUENCE_STATE_SWAPPED: SequenceState
BLOCK_STATE_UNSPECIFIED: BlockState
BLOCK_STATE_FREE: BlockState
BLOCK_STATE_CACHED: BlockState
BLOCK_STATE_PINNED: BlockState
BLOCK_STATE_USED: BlockState
BLOCK_STATE_SHARED: BlockState
LOOKUP_OUTCOME_UNSPECIFIED: LookupOutcome
LOOKUP_OUTCOME_HIT: LookupOutcome
LOOKUP_OUTCOME_NEVER_SEEN: LookupOutcome
LOOKUP_OUTCOME_EVICTED: LookupOutcome
LOOKUP_OUTCOME_OTHER_ENGINE: LookupOutcome
LOOKUP_OUTCOME_OTHER_TENANT: LookupOutcome
LOOKUP_OUTCOME_OTHER_MODEL: LookupOutcome
LOOKUP_OUTCOME_AFTER_A_MISS: LookupOutcome
LOOKUP_OUTCOME_NOT_FULL: LookupOutcome
LOOKUP_OUTCOME_NOT_USED: LookupOutcome
LOOKUP_OUTCOME_RESTARTED: LookupOutcome
PREFIX_FORM_UNSPECIFIED: PrefixForm
PREFIX_FORM_SYSTEM: PrefixForm
PREFIX_FORM_PLAIN: PrefixForm

class ListEnginesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListEnginesResponse(_message.Message):
    __slots__ = ("engines", "next_page_token", "unanswered_replicas")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[Engine]
    next_page_token: str
    unanswered_replicas: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, engines: _Optional[_Iterable[_Union[Engine, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., unanswered_replicas: _Optional[_Iterable[str]] = ...) -> None: ...

class Engine(_message.Message):
    __slots__ = ("engine_id", "address", "state", "model", "incarnation", "epoch", "block_size_tokens", "block_count", "free_block_count", "cached_block_count", "used_block_count", "running_sequence_count", "waiting_request_count", "step", "prefix_hit_token_count", "prefix_query_token_count", "preemption_count", "leader_address", "host_block_count", "used_host_block_count", "swap_count", "last_failure", "last_failure_age_seconds", "draining", "pinned_block_count", "swapped_sequence_count", "mean_queue_seconds", "mean_moves_seconds", "mean_forward_seconds", "mean_sample_seconds")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SEQUENCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERY_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREEMPTION_COUNT_FIELD_NUMBER: _ClassVar[int]
    LEADER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    USED_HOST_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    SWAP_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_SEQUENCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    MEAN_QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEAN_MOVES_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEAN_FORWARD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEAN_SAMPLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    address: str
    state: EngineState
    model: str
    incarnation: str
    epoch: int
    block_size_tokens: int
    block_count: int
    free_block_count: int
    cached_block_count: int
    used_block_count: int
    running_sequence_count: int
    waiting_request_count: int
    step: int
    prefix_hit_token_count: int
    prefix_query_token_count: int
    preemption_count: int
    leader_address: str
    host_block_count: int
    used_host_block_count: int
    swap_count: int
    last_failure: str
    last_failure_age_seconds: float
    draining: bool
    pinned_block_count: int
    swapped_sequence_count: int
    mean_queue_seconds: float
    mean_moves_seconds: float
    mean_forward_seconds: float
    mean_sample_seconds: float
    def __init__(self, engine_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[_Union[EngineState, str]] = ..., model: _Optional[str] = ..., incarnation: _Optional[str] = ..., epoch: _Optional[int] = ..., block_size_tokens: _Optional[int] = ..., block_count: _Optional[int] = ..., free_block_count: _Optional[int] = ..., cached_block_count: _Optional[int] = ..., used_block_count: _Optional[int] = ..., running_sequence_count: _Optional[int] = ..., waiting_request_count: _Optional[int] = ..., step: _Optional[int] = ..., prefix_hit_token_count: _Optional[int] = ..., prefix_query_token_count: _Optional[int] = ..., preemption_count: _Optional[int] = ..., leader_address: _Optional[str] = ..., host_block_count: _Optional[int] = ..., used_host_block_count: _Optional[int] = ..., swap_count: _Optional[int] = ..., last_failure: _Optional[str] = ..., last_failure_age_seconds: _Optional[float] = ..., draining: _Optional[bool] = ..., pinned_block_count: _Optional[int] = ..., swapped_sequence_count: _Optional[int] = ..., mean_queue_seconds: _Optional[float] = ..., mean_moves_seconds: _Optional[float] = ..., mean_forward_seconds: _Optional[float] = ..., mean_sample_seconds: _Optional[float] = ...) -> None: ...

class ListSequencesRequest(_message.Message):
    __slots__ = ("engine_id", "page_size", "page_token")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    page_size: int
    page_token: str
    def __init__(self, engine_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSequencesResponse(_message.Message):
    __slots__ = ("sequences", "next_page_token", "unanswered_replicas")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    next_page_token: str
    unanswered_replicas: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., unanswered_replicas: _Optional[_Iterable[str]] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("engine_id", "request_id", "sample", "state", "slot", "prompt_token_count", "cached_token_count", "output_token_count", "block_count", "priority", "tenant")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    request_id: str
    sample: int
    state: SequenceState
    slot: int
    prompt_token_count: int
    cached_token_count: int
    output_token_count: int
    block_count: int
    priority: int
    tenant: str
    def __init__(self, engine_id: _Optional[str] = ..., request_id: _Optional[str] = ..., sample: _Optional[int] = ..., state: _Optional[_Union[SequenceState, str]] = ..., slot: _Optional[int] = ..., prompt_token_count: _Optional[int] = ..., cached_token_count: _Optional[int] = ..., output_token_count: _Optional[int] = ..., block_count: _Optional[int] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class GetBlockTableRequest(_message.Message):
    __slots__ = ("engine_id", "request_id", "sample", "tenant")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    request_id: str
    sample: int
    tenant: str
    def __init__(self, engine_id: _Optional[str] = ..., request_id: _Optional[str] = ..., sample: _Optional[int] = ..., tenant: _Optional[str] = ...) -> None: ...

class GetBlockTableResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockEntry]
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockEntry, _Mapping]]] = ...) -> None: ...

class BlockEntry(_message.Message):
    __slots__ = ("block_id", "reference_count", "prefix_hash")
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASH_FIELD_NUMBER: _ClassVar[int]
    block_id: int
    reference_count: int
    prefix_hash: bytes
    def __init__(self, block_id: _Optional[int] = ..., reference_count: _Optional[int] = ..., prefix_hash: _Optional[bytes] = ...) -> None: ...

class GetBlockMapRequest(_message.Message):
    __slots__ = ("engine_id",)
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    def __init__(self, engine_id: _Optional[str] = ...) -> None: ...

class GetBlockMapResponse(_message.Message):
    __slots__ = ("states", "host_states")
    STATES_FIELD_NUMBER: _ClassVar[int]
    HOST_STATES_FIELD_NUMBER: _ClassVar[int]
    states: bytes
    host_states: bytes
    def __init__(self, states: _Optional[bytes] = ..., host_states: _Optional[bytes] = ...) -> None: ...

class ListPrefixesRequest(_message.Message):
    __slots__ = ("engine_id", "page_size", "page_token")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    page_size: int
    page_token: str
    def __init__(self, engine_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListPrefixesResponse(_message.Message):
    __slots__ = ("prefixes", "next_page_token", "unanswered_replicas")
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    prefixes: _containers.RepeatedCompositeFieldContainer[Prefix]
    next_page_token: str
    unanswered_replicas: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, prefixes: _Optional[_Iterable[_Union[Prefix, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., unanswered_replicas: _Optional[_Iterable[str]] = ...) -> None: ...

class Prefix(_message.Message):
    __slots__ = ("prefix_hash", "name", "model", "token_count", "hit_count", "saved_token_count", "idle_seconds", "tenant", "shared", "pinned", "holders")
    PREFIX_HASH_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    HIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAVED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    prefix_hash: bytes
    name: str
    model: str
    token_count: int
    hit_count: int
    saved_token_count: int
    idle_seconds: float
    tenant: str
    shared: bool
    pinned: bool
    holders: _containers.RepeatedCompositeFieldContainer[PrefixHolder]
    def __init__(self, prefix_hash: _Optional[bytes] = ..., name: _Optional[str] = ..., model: _Optional[str] = ..., token_count: _Optional[int] = ..., hit_count: _Optional[int] = ..., saved_token_count: _Optional[int] = ..., idle_seconds: _Optional[float] = ..., tenant: _Optional[str] = ..., shared: _Optional[bool] = ..., pinned: _Optional[bool] = ..., holders: _Optional[_Iterable[_Union[PrefixHolder, _Mapping]]] = ...) -> None: ...

class PrefixHolder(_message.Message):
    __slots__ = ("engine_id", "reference_count")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    reference_count: int
    def __init__(self, engine_id: _Optional[str] = ..., reference_count: _Optional[int] = ...) -> None: ...

class ExplainPromptRequest(_message.Message):
    __slots__ = ("model", "tenant", "text", "chat", "token_ids")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    tenant: str
    text: str
    chat: _inference_pb2.Chat
    token_ids: _inference_pb2.TokenIds
    def __init__(self, model: _Optional[str] = ..., tenant: _Optional[str] = ..., text: _Optional[str] = ..., chat: _Optional[_Union[_inference_pb2.Chat, _Mapping]] = ..., token_ids: _Optional[_Union[_inference_pb2.TokenIds, _Mapping]] = ...) -> None: ...

class ExplainPromptResponse(_message.Message):
    __slots__ = ("explanation",)
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    explanation: Explanation
    def __init__(self, explanation: _Optional[_Union[Explanation, _Mapping]] = ...) -> None: ...

class ExplainRequestRequest(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class ExplainRequestResponse(_message.Message):
    __slots__ = ("explanation",)
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    explanation: Explanation
    def __init__(self, explanation: _Optional[_Union[Explanation, _Mapping]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("request_id", "model", "tenant", "engine_id", "block_size_tokens", "prompt_token_count", "cached_token_count", "age_seconds", "registered_prefix", "shared_token_count", "predicted_token_count", "spans")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_PREFIX_FIELD_NUMBER: _ClassVar[int]
    SHARED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    tenant: str
    engine_id: str
    block_size_tokens: int
    prompt_token_count: int
    cached_token_count: int
    age_seconds: float
    registered_prefix: str
    shared_token_count: int
    predicted_token_count: int
    spans: _containers.RepeatedCompositeFieldContainer[BlockSpan]
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., tenant: _Optional[str] = ..., engine_id: _Optional[str] = ..., block_size_tokens: _Optional[int] = ..., prompt_token_count: _Optional[int] = ..., cached_token_count: _Optional[int] = ..., age_seconds: _Optional[float] = ..., registered_prefix: _Optional[str] = ..., shared_token_count: _Optional[int] = ..., predicted_token_count: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[BlockSpan, _Mapping]]] = ...) -> None: ...

class BlockSpan(_message.Message):
    __slots__ = ("first_block", "block_count", "token_count", "outcome", "engine_ids", "evicted_seconds_before", "tenant", "model")
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ENGINE_IDS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_SECONDS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    first_block: int
    block_count: int
    token_count: int
    outcome: LookupOutcome
    engine_ids: _containers.RepeatedScalarFieldContainer[str]
    evicted_seconds_before: float
    tenant: str
    model: str
    def __init__(self, first_block: _Optional[int] = ..., block_count: _Optional[int] = ..., token_count: _Optional[int] = ..., outcome: _Optional[_Union[LookupOutcome, str]] = ..., engine_ids: _Optional[_Iterable[str]] = ..., evicted_seconds_before: _Optional[float] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class ListRegisteredPrefixesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRegisteredPrefixesResponse(_message.Message):
    __slots__ = ("prefixes", "unanswered_replicas")
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    prefixes: _containers.RepeatedCompositeFieldContainer[RegisteredPrefix]
    unanswered_replicas: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, prefixes: _Optional[_Iterable[_Union[RegisteredPrefix, _Mapping]]] = ..., unanswered_replicas: _Optional[_Iterable[str]] = ...) -> None: ...

class RegisteredPrefix(_message.Message):
    __slots__ = ("name", "form", "text", "pinned", "declared", "hit_count", "saved_token_count", "engines")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    DECLARED_FIELD_NUMBER: _ClassVar[int]
    HIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAVED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    name: str
    form: PrefixForm
    text: str
    pinned: bool
    declared: bool
    hit_count: int
    saved_token_count: int
    engines: _containers.RepeatedCompositeFieldContainer[RegisteredPrefixEngine]
    def __init__(self, name: _Optional[str] = ..., form: _Optional[_Union[PrefixForm, str]] = ..., text: _Optional[str] = ..., pinned: _Optional[bool] = ..., declared: _Optional[bool] = ..., hit_count: _Optional[int] = ..., saved_token_count: _Optional[int] = ..., engines: _Optional[_Iterable[_Union[RegisteredPrefixEngine, _Mapping]]] = ...) -> None: ...

class RegisteredPrefixEngine(_message.Message):
    __slots__ = ("engine_id", "model", "shared_token_count", "held_token_count", "warming", "problem", "known")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SHARED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    HELD_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    WARMING_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    model: str
    shared_token_count: int
    held_token_count: int
    warming: bool
    problem: str
    known: bool
    def __init__(self, engine_id: _Optional[str] = ..., model: _Optional[str] = ..., shared_token_count: _Optional[int] = ..., held_token_count: _Optional[int] = ..., warming: _Optional[bool] = ..., problem: _Optional[str] = ..., known: _Optional[bool] = ...) -> None: ...

class RegisterPrefixRequest(_message.Message):
    __slots__ = ("name", "text", "form", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    text: str
    form: PrefixForm
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., text: _Optional[str] = ..., form: _Optional[_Union[PrefixForm, str]] = ..., pinned: _Optional[bool] = ...) -> None: ...

class RegisterPrefixResponse(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: RegisteredPrefix
    def __init__(self, prefix: _Optional[_Union[RegisteredPrefix, _Mapping]] = ...) -> None: ...

class UpdatePrefixRequest(_message.Message):
    __slots__ = ("name", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., pinned: _Optional[bool] = ...) -> None: ...

class UpdatePrefixResponse(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: RegisteredPrefix
    def __init__(self, prefix: _Optional[_Union[RegisteredPrefix, _Mapping]] = ...) -> None: ...

class UnregisterPrefixRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnregisterPrefixResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WarmPrefixRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WarmPrefixResponse(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: RegisteredPrefix
    def __init__(self, prefix: _Optional[_Union[RegisteredPrefix, _Mapping]] = ...) -> None: ...

class DrainEngineRequest(_message.Message):
    __slots__ = ("engine_id", "resume")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    resume: bool
    def __init__(self, engine_id: _Optional[str] = ..., resume: _Optional[bool] = ...) -> None: ...

class DrainEngineResponse(_message.Message):
    __slots__ = ("engine",)
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    engine: Engine
    def __init__(self, engine: _Optional[_Union[Engine, _Mapping]] = ...) -> None: ...
