"""Read protobuf's encoding without a schema: just enough to check a file before a real parser reads it."""

from collections.abc import Iterator
from typing import TypeAlias

Value: TypeAlias = int | memoryview
Fields: TypeAlias = Iterator[tuple[int, Value]]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MAX_NUMBERS = 32  # in one list: the axes of a tensor


class Refused(ValueError):
    """The bytes are not valid; the message says why."""


def fields(message: memoryview) -> Fields:
    """The number and value of each field of a message. Strings, messages and packed lists stay bytes."""
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(message, position)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire_type, end + 1)
        if key >> 3 == 0 or length > end - position:
            raise Refused("is cut off, or not an ONNX file")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A number from 0 to 2**64 - 1, and the position of the next byte."""
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), position
        shift += 7
    raise Refused("is cut off, or not an ONNX file")


def number(value: Value) -> int:
    """The value as a signed number of 64 bits."""
    if not isinstance(value, int):
        raise Refused("is not an ONNX file: a number is written as bytes")
    return value - 2**64 if value >= 2**63 else value


def numbers(value: Value) -> list[int]:
    """The values of a repeated number, packed or not."""
    if isinstance(value, int):
        return [number(value)]
    found, position = [], 0
    while position < len(value):
        unsigned, position = _varint(value, position)
        found.append(number(unsigned))
        if len(found) > _MAX_NUMBERS:
            raise Refused(f"holds a tensor of more than {_MAX_NUMBERS} axes")
    return found


def content(value: Value) -> memoryview:
    """The bytes of a string or a message."""
    if isinstance(value, int):
        raise Refused("is not an ONNX file: bytes are written as a number")
    return value


def text(value: Value) -> str:
    return bytes(content(value)).decode(errors="replace")
