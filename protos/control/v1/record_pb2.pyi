from protos.inference.v1 import inference_pb2 as _inference_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SequenceRecord(_message.Message):
    __slots__ = ("request", "tenant", "request_digest", "cached_token_count", "arrival", "shared_block_count")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    SHARED_BLOCK_COUNT_FIELD_NUMBER: _ClassVar[int]
    request: _inference_pb2.GenerateRequest
    tenant: str
    request_digest: bytes
    cached_token_count: int
    arrival: int
    shared_block_count: int
    def __init__(self, request: _Optional[_Union[_inference_pb2.GenerateRequest, _Mapping]] = ..., tenant: _Optional[str] = ..., request_digest: _Optional[bytes] = ..., cached_token_count: _Optional[int] = ..., arrival: _Optional[int] = ..., shared_block_count: _Optional[int] = ...) -> None: ...
