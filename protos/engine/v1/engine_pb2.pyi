from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("engine_id", "incarnation", "model", "model_fingerprint", "geometry", "limits", "vocabulary_size", "eos_token_ids", "tokenizer_digest", "counters")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    incarnation: str
    model: str
    model_fingerprint: str
    geometry: Geometry
    limits: Limits
    vocabulary_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokenizer_digest: str
    counters: Counters
    def __init__(self, engine_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., model: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., vocabulary_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., tokenizer_digest: _Optional[str] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ...) -> None: ...

class Geometry(_message.Message):
    __slots__ = ("layer_count", "kv_head_count", "head_size", "kv_dtype", "block_size_tokens", "device_block_count", "host_block_count", "bytes_per_block")
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    KV_HEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_BLOCK_FIELD_NUMBER: _ClassVar[int]
    layer_count: int
    kv_head_count: int
    head_size: int
    kv_dtype: str
    block_size_tokens: int
    device_block_count: int
    host_block_count: int
    bytes_per_block: int
    def __init__(self, layer_count: _Optional[int] = ..., kv_head_count: _Optional[int] = ..., head_size: _Optional[int] = ..., kv_dtype: _Optional[str] = ..., block_size_tokens: _Optional[int] = ..., device_block_count: _Optional[int] = ..., host_block_count: _Optional[int] = ..., bytes_per_block: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_slots", "max_tokens_per_step", "max_model_length", "max_plans_in_flight")
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_PLANS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    max_slots: int
    max_tokens_per_step: int
    max_model_length: int
    max_plans_in_flight: int
    def __init__(self, max_slots: _Optional[int] = ..., max_tokens_per_step: _Optional[int] = ..., max_model_length: _Optional[int] = ..., max_plans_in_flight: _Optional[int] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("step_count", "prefill_token_count", "decode_token_count", "refused_plan_count")
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_PLAN_COUNT_FIELD_NUMBER: _ClassVar[int]
    step_count: int
    prefill_token_count: int
    decode_token_count: int
    refused_plan_count: int
    def __init__(self, step_count: _Optional[int] = ..., prefill_token_count: _Optional[int] = ..., decode_token_count: _Optional[int] = ..., refused_plan_count: _Optional[int] = ...) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTokenizerResponse(_message.Message):
    __slots__ = ("tokenizer_json", "chat_template", "special_tokens")
    TOKENIZER_JSON_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokenizer_json: bytes
    chat_template: str
    special_tokens: SpecialTokens
    def __init__(self, tokenizer_json: _Optional[bytes] = ..., chat_template: _Optional[str] = ..., special_tokens: _Optional[_Union[SpecialTokens, _Mapping]] = ...) -> None: ...

class SpecialTokens(_message.Message):
    __slots__ = ("tokens",)
    class TokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.ScalarMap[str, str]
    def __init__(self, tokens: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LeadRequest(_message.Message):
    __slots__ = ("claim", "plan", "heartbeat", "drained")
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    claim: Claim
    plan: StepPlan
    heartbeat: Heartbeat
    drained: Drained
    def __init__(self, claim: _Optional[_Union[Claim, _Mapping]] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., drained: _Optional[_Union[Drained, _Mapping]] = ...) -> None: ...

class LeadResponse(_message.Message):
    __slots__ = ("granted", "refused", "snapshot_part", "result", "draining")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_PART_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    granted: Granted
    refused: Refused
    snapshot_part: SnapshotPart
    result: StepResult
    draining: Draining
    def __init__(self, granted: _Optional[_Union[Granted, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., snapshot_part: _Optional[_Union[SnapshotPart, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("leader_address", "takes_draining", "leader_admin_address")
    LEADER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TAKES_DRAINING_FIELD_NUMBER: _ClassVar[int]
    LEADER_ADMIN_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    leader_address: str
    takes_draining: bool
    leader_admin_address: str
    def __init__(self, leader_address: _Optional[str] = ..., takes_draining: _Optional[bool] = ..., leader_admin_address: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Drained(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Granted(_message.Message):
    __slots__ = ("epoch", "incarnation", "snapshot_part_count")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_PART_COUNT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    incarnation: str
    snapshot_part_count: int
    def __init__(self, epoch: _Optional[int] = ..., incarnation: _Optional[str] = ..., snapshot_part_count: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("leader_address", "epoch", "leader_admin_address")
    LEADER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEADER_ADMIN_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    leader_address: str
    epoch: int
    leader_admin_address: str
    def __init__(self, leader_address: _Optional[str] = ..., epoch: _Optional[int] = ..., leader_admin_address: _Optional[str] = ...) -> None: ...

class SnapshotPart(_message.Message):
    __slots__ = ("slots", "requests", "sample_indexes", "prompt_token_counts", "token_counts", "computed_token_counts", "token_ids", "block_counts", "block_ids", "swapped", "hashed_blocks", "block_hashes")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEXES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SWAPPED_FIELD_NUMBER: _ClassVar[int]
    HASHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    slots: bytes
    requests: _containers.RepeatedScalarFieldContainer[bytes]
    sample_indexes: bytes
    prompt_token_counts: bytes
    token_counts: bytes
    computed_token_counts: bytes
    token_ids: bytes
    block_counts: bytes
    block_ids: bytes
    swapped: bytes
    hashed_blocks: bytes
    block_hashes: bytes
    def __init__(self, slots: _Optional[bytes] = ..., requests: _Optional[_Iterable[bytes]] = ..., sample_indexes: _Optional[bytes] = ..., prompt_token_counts: _Optional[bytes] = ..., token_counts: _Optional[bytes] = ..., computed_token_counts: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., block_counts: _Optional[bytes] = ..., block_ids: _Optional[bytes] = ..., swapped: _Optional[bytes] = ..., hashed_blocks: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("epoch", "step", "touched_slots", "touched_token_counts", "released_slots", "swap_out_slots", "swap_out_blocks", "swap_out_targets", "swap_in_slots", "swap_in_blocks", "swap_in_targets", "truncated_slots", "truncated_token_counts", "admissions", "appended_slots", "appended_blocks", "copied_slots", "copied_indexes", "copied_blocks", "beam_slots", "beam_parents", "beam_tokens", "decode_leaves", "decode_joins", "chunk_slots", "chunk_token_counts", "fork_parents", "fork_children", "fork_sample_indexes", "hashed_blocks", "block_hashes")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOUCHED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOUCHED_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    RELEASED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SWAP_OUT_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SWAP_OUT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SWAP_OUT_TARGETS_FIELD_NUMBER: _ClassVar[int]
    SWAP_IN_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SWAP_IN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SWAP_IN_TARGETS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    ADMISSIONS_FIELD_NUMBER: _ClassVar[int]
    APPENDED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    APPENDED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COPIED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    COPIED_INDEXES_FIELD_NUMBER: _ClassVar[int]
    COPIED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BEAM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    BEAM_PARENTS_FIELD_NUMBER: _ClassVar[int]
    BEAM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_LEAVES_FIELD_NUMBER: _ClassVar[int]
    DECODE_JOINS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SLOTS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    FORK_PARENTS_FIELD_NUMBER: _ClassVar[int]
    FORK_CHILDREN_FIELD_NUMBER: _ClassVar[int]
    FORK_SAMPLE_INDEXES_FIELD_NUMBER: _ClassVar[int]
    HASHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    touched_slots: bytes
    touched_token_counts: bytes
    released_slots: bytes
    swap_out_slots: bytes
    swap_out_blocks: bytes
    swap_out_targets: bytes
    swap_in_slots: bytes
    swap_in_blocks: bytes
    swap_in_targets: bytes
    truncated_slots: bytes
    truncated_token_counts: bytes
    admissions: Admissions
    appended_slots: bytes
    appended_blocks: bytes
    copied_slots: bytes
    copied_indexes: bytes
    copied_blocks: bytes
    beam_slots: bytes
    beam_parents: bytes
    beam_tokens: bytes
    decode_leaves: bytes
    decode_joins: bytes
    chunk_slots: bytes
    chunk_token_counts: bytes
    fork_parents: bytes
    fork_children: bytes
    fork_sample_indexes: bytes
    hashed_blocks: bytes
    block_hashes: bytes
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., touched_slots: _Optional[bytes] = ..., touched_token_counts: _Optional[bytes] = ..., released_slots: _Optional[bytes] = ..., swap_out_slots: _Optional[bytes] = ..., swap_out_blocks: _Optional[bytes] = ..., swap_out_targets: _Optional[bytes] = ..., swap_in_slots: _Optional[bytes] = ..., swap_in_blocks: _Optional[bytes] = ..., swap_in_targets: _Optional[bytes] = ..., truncated_slots: _Optional[bytes] = ..., truncated_token_counts: _Optional[bytes] = ..., admissions: _Optional[_Union[Admissions, _Mapping]] = ..., appended_slots: _Optional[bytes] = ..., appended_blocks: _Optional[bytes] = ..., copied_slots: _Optional[bytes] = ..., copied_indexes: _Optional[bytes] = ..., copied_blocks: _Optional[bytes] = ..., beam_slots: _Optional[bytes] = ..., beam_parents: _Optional[bytes] = ..., beam_tokens: _Optional[bytes] = ..., decode_leaves: _Optional[bytes] = ..., decode_joins: _Optional[bytes] = ..., chunk_slots: _Optional[bytes] = ..., chunk_token_counts: _Optional[bytes] = ..., fork_parents: _Optional[bytes] = ..., fork_children: _Optional[bytes] = ..., fork_sample_indexes: _Optional[bytes] = ..., hashed_blocks: _Optional[bytes] = ..., block_hashes: _Optional[bytes] = ...) -> None: ...

class Admissions(_message.Message):
    __slots__ = ("slots", "requests", "sample_indexes", "prompt_token_counts", "token_counts", "token_ids", "block_counts", "block_ids", "cached_token_counts", "sampling")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEXES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    slots: bytes
    requests: _containers.RepeatedScalarFieldContainer[bytes]
    sample_indexes: bytes
    prompt_token_counts: bytes
    token_counts: bytes
    token_ids: bytes
    block_counts: bytes
    block_ids: bytes
    cached_token_counts: bytes
    sampling: SamplingColumns
    def __init__(self, slots: _Optional[bytes] = ..., requests: _Optional[_Iterable[bytes]] = ..., sample_indexes: _Optional[bytes] = ..., prompt_token_counts: _Optional[bytes] = ..., token_counts: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., block_counts: _Optional[bytes] = ..., block_ids: _Optional[bytes] = ..., cached_token_counts: _Optional[bytes] = ..., sampling: _Optional[_Union[SamplingColumns, _Mapping]] = ...) -> None: ...

class SamplingColumns(_message.Message):
    __slots__ = ("temperatures", "top_ks", "top_ps", "min_ps", "repetition_penalties", "presence_penalties", "frequency_penalties", "seeds", "min_token_counts", "stop_id_counts", "stop_ids", "bias_counts", "bias_ids", "bias_values", "logprob_counts", "prompt_logprob_counts")
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    TOP_KS_FIELD_NUMBER: _ClassVar[int]
    TOP_PS_FIELD_NUMBER: _ClassVar[int]
    MIN_PS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTIES_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTIES_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTIES_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    STOP_ID_COUNTS_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_COUNTS_FIELD_NUMBER: _ClassVar[int]
    BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_COUNTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROB_COUNTS_FIELD_NUMBER: _ClassVar[int]
    temperatures: bytes
    top_ks: bytes
    top_ps: bytes
    min_ps: bytes
    repetition_penalties: bytes
    presence_penalties: bytes
    frequency_penalties: bytes
    seeds: bytes
    min_token_counts: bytes
    stop_id_counts: bytes
    stop_ids: bytes
    bias_counts: bytes
    bias_ids: bytes
    bias_values: bytes
    logprob_counts: bytes
    prompt_logprob_counts: bytes
    def __init__(self, temperatures: _Optional[bytes] = ..., top_ks: _Optional[bytes] = ..., top_ps: _Optional[bytes] = ..., min_ps: _Optional[bytes] = ..., repetition_penalties: _Optional[bytes] = ..., presence_penalties: _Optional[bytes] = ..., frequency_penalties: _Optional[bytes] = ..., seeds: _Optional[bytes] = ..., min_token_counts: _Optional[bytes] = ..., stop_id_counts: _Optional[bytes] = ..., stop_ids: _Optional[bytes] = ..., bias_counts: _Optional[bytes] = ..., bias_ids: _Optional[bytes] = ..., bias_values: _Optional[bytes] = ..., logprob_counts: _Optional[bytes] = ..., prompt_logprob_counts: _Optional[bytes] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step", "token_ids", "logprobs", "prompt_logprobs", "faults", "timings")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    token_ids: bytes
    logprobs: LogprobColumns
    prompt_logprobs: LogprobColumns
    faults: _containers.RepeatedCompositeFieldContainer[SlotFault]
    timings: Timings
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Union[LogprobColumns, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[LogprobColumns, _Mapping]] = ..., faults: _Optional[_Iterable[_Union[SlotFault, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class LogprobColumns(_message.Message):
    __slots__ = ("slots", "positions", "token_ids", "logprobs", "ranks", "top_counts", "top_token_ids", "top_logprobs")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TOP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    slots: bytes
    positions: bytes
    token_ids: bytes
    logprobs: bytes
    ranks: bytes
    top_counts: bytes
    top_token_ids: bytes
    top_logprobs: bytes
    def __init__(self, slots: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., ranks: _Optional[bytes] = ..., top_counts: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ...) -> None: ...

class SlotFault(_message.Message):
    __slots__ = ("slot", "reason")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    slot: int
    reason: str
    def __init__(self, slot: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_us", "moves_us", "forward_us", "sample_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    MOVES_US_FIELD_NUMBER: _ClassVar[int]
    FORWARD_US_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    moves_us: int
    forward_us: int
    sample_us: int
    def __init__(self, queue_us: _Optional[int] = ..., moves_us: _Optional[int] = ..., forward_us: _Optional[int] = ..., sample_us: _Optional[int] = ...) -> None: ...
