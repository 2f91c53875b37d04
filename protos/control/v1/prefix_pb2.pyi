from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class RegisteredPrefixRecord(_message.Message):
    __slots__ = ("text", "system", "pinned")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    text: str
    system: bool
    pinned: bool
    def __init__(self, text: _Optional[str] = ..., system: _Optional[bool] = ..., pinned: _Optional[bool] = ...) -> None: ...
