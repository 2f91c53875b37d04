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
ENGINE_STATE_UNSPECIFIED: EngineState
ENGINE_STATE_CONNECTING: EngineState
ENGINE_STATE_LED: EngineState
ENGINE_STATE_FOLLOWED: EngineState
SEQUENCE_STATE_UNSPECIFIED: SequenceState
SEQUENCE_STATE_WAITING: SequenceState
SEQUENCE_STATE_PREFILL: SequenceState
SEQUENCE_STATE_DECODE: SequenceState
SEQUENCE_STATE_SWAPPED: SequenceState

class ListEnginesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListEnginesResponse(_message.Message):
    __slots__ = ("engines", "next_page_token")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[Engine]
    next_page_token: str
    def __init__(self, engines: _Optional[_Iterable[_Union[Engine, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Engine(_message.Message):
    __slots__ = ("engine_id", "address", "state", "model", "incarnation", "epoch", "block_size_tokens", "block_count", "free_block_count", "cached_block_count", "used_block_count", "running_sequence_count", "waiting_request_count", "step", "prefix_hit_token_count", "prefix_query_token_count", "preemption_count", "leader_address", "host_block_count", "used_host_block_count", "swap_count", "last_failure", "last_failure_age_seconds")
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
    def __init__(self, engine_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[_Union[EngineState, str]] = ..., model: _Optional[str] = ..., incarnation: _Optional[str] = ..., epoch: _Optional[int] = ..., block_size_tokens: _Optional[int] = ..., block_count: _Optional[int] = ..., free_block_count: _Optional[int] = ..., cached_block_count: _Optional[int] = ..., used_block_count: _Optional[int] = ..., running_sequence_count: _Optional[int] = ..., waiting_request_count: _Optional[int] = ..., step: _Optional[int] = ..., prefix_hit_token_count: _Optional[int] = ..., prefix_query_token_count: _Optional[int] = ..., preemption_count: _Optional[int] = ..., leader_address: _Optional[str] = ..., host_block_count: _Optional[int] = ..., used_host_block_count: _Optional[int] = ..., swap_count: _Optional[int] = ..., last_failure: _Optional[str] = ..., last_failure_age_seconds: _Optional[float] = ...) -> None: ...

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
    __slots__ = ("sequences", "next_page_token")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    next_page_token: str
    def __init__(self, sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("engine_id", "request_id", "sample", "state", "slot", "prompt_token_count", "cached_token_count", "output_token_count", "block_count", "priority")
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
    def __init__(self, engine_id: _Optional[str] = ..., request_id: _Optional[str] = ..., sample: _Optional[int] = ..., state: _Optional[_Union[SequenceState, str]] = ..., slot: _Optional[int] = ..., prompt_token_count: _Optional[int] = ..., cached_token_count: _Optional[int] = ..., output_token_count: _Optional[int] = ..., block_count: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class GetBlockTableRequest(_message.Message):
    __slots__ = ("engine_id", "request_id", "sample")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    request_id: str
    sample: int
    def __init__(self, engine_id: _Optional[str] = ..., request_id: _Optional[str] = ..., sample: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("prefixes", "next_page_token")
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    prefixes: _containers.RepeatedCompositeFieldContainer[Prefix]
    next_page_token: str
    def __init__(self, prefixes: _Optional[_Iterable[_Union[Prefix, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Prefix(_message.Message):
    __slots__ = ("engine_id", "prefix_hash", "token_count", "reference_count", "hit_count", "saved_token_count", "idle_seconds", "resident")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    HIT_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAVED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    prefix_hash: bytes
    token_count: int
    reference_count: int
    hit_count: int
    saved_token_count: int
    idle_seconds: float
    resident: bool
    def __init__(self, engine_id: _Optional[str] = ..., prefix_hash: _Optional[bytes] = ..., token_count: _Optional[int] = ..., reference_count: _Optional[int] = ..., hit_count: _Optional[int] = ..., saved_token_count: _Optional[int] = ..., idle_seconds: _Optional[float] = ..., resident: _Optional[bool] = ...) -> None: ...
