"""Names the field of a message that is no UTF-8: protobuf itself only says that parsing failed."""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.internal.decoder import _DecodeVarint  # type: ignore[attr-defined]

_FIXED = {1: 8, 5: 4}


def find_invalid_utf8(data: bytes, descriptor: Descriptor) -> str | None:
    """Returns the path of the first string field in `data` that is no UTF-8, or None."""
    position = 0
    counts: dict[str, int] = {}
    try:
        while position < len(data):
            key, position = _DecodeVarint(data, position)
            number, kind = key >> 3, key & 7
            if kind == 0:
                _, position = _DecodeVarint(data, position)
            elif kind in _FIXED:
                position += _FIXED[kind]
            elif kind == 2:
                size, position = _DecodeVarint(data, position)
                value, position = data[position : position + size], position + size
                field = descriptor.fields_by_number.get(number)
                if field is not None and (path := _check(field, value, counts)) is not None:
                    return path
            else:
                return None
    except (IndexError, ValueError, TypeError):
        return None
    return None


def _check(field: FieldDescriptor, value: bytes, counts: dict[str, int]) -> str | None:
    name: str = field.name
    if field.is_repeated:
        index = counts.get(name, 0)
        counts[name] = index + 1
        name = f"{name}[{index}]"
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            value.decode()
        except UnicodeDecodeError:
            return name
    elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
        inner = find_invalid_utf8(value, field.message_type)
        return None if inner is None else f"{name}.{inner}"
    return None
