"""tf.train.Example protos of TFRecord files, read and written without TensorFlow.

    Example { Features features = 1; }
    Features { map<string, Feature> feature = 1; }   a map: repeated messages { key = 1; value = 2; }
    Feature { oneof { BytesList = 1; FloatList = 2; Int64List = 3; } }
    BytesList { repeated bytes value = 1; }

Protocol buffers merge: separate parts of a message are concatenated. The last value of a repeated key and the
last member of a oneof count. Lists of bytes and of integers are read here.
"""

import struct
from collections.abc import Iterator

from dalle2_jax.data.records import BadRecord, masked_crc32c

_MAX_DEPTH = 100  # of groups, in unknown fields
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3
_FIXED = {1: 8, 5: 4}  # bytes of the wire types that have a fixed size


def _bad(what: str) -> BadRecord:
    return BadRecord("invalid_proto", what)


def _varint(data: bytes, at: int, end: int, max_bytes: int = 10) -> tuple[int, int]:
    """(number, its end) of the varint at `at`. Raises BadRecord."""
    value = 0
    for place in range(max_bytes):
        if at >= end:
            raise _bad("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at
    raise _bad(f"a number of more than {max_bytes} bytes")


def _skip(data: bytes, at: int, end: int, tag: int, depth: int = 0) -> int:
    """The end of the field whose tag is before `at`. Raises BadRecord."""
    kind = tag & 7
    if kind == 0:
        return _varint(data, at, end)[1]
    if kind == 2:
        size, at = _varint(data, at, end)
        at += size
    elif kind in _FIXED:
        at += _FIXED[kind]
    elif kind == 3 and depth < _MAX_DEPTH:
        while True:
            inner, at = _tag(data, at, end)
            if inner & 7 == 4:
                if inner >> 3 != tag >> 3:
                    raise _bad("a group that another one's end closes")
                return at
            at = _skip(data, at, end, inner, depth + 1)
    else:
        raise _bad(f"a field of wire type {kind}")
    if at > end:
        raise _bad("a field that is longer than what holds it")
    return at


def _tag(data: bytes, at: int, end: int) -> tuple[int, int]:
    """(field number << 3 | wire type, the tag's end). Raises BadRecord."""
    tag, at = _varint(data, at, end, max_bytes=5)
    if not 0 < tag >> 3 < 1 << 29:
        raise _bad(f"a field of number {tag >> 3}")
    return tag, at


def _messages(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, begin, end) of every field with a length in data[at:end]; skip others."""
    while at < end:
        tag, at = _tag(data, at, end)
        if tag & 7 == 2:
            size, at = _varint(data, at, end)
            if size > end - at:
                raise _bad("a field that is longer than what holds it")
            yield tag >> 3, at, at + size
            at += size
        else:
            at = _skip(data, at, end, tag)


class Example:
    """A tf.train.Example: iterating gives the names of its features; `values` copies their bytes."""

    def __init__(self, data: bytes):
        """Raises BadRecord('invalid_proto') if `data` is no Example."""
        self._data = data
        self._features: dict[str, list[tuple[int, int]]] = {}  # name -> the parts of its Feature
        for number, begin, end in _messages(data, 0, len(data)):
            if number == 1:
                for inner, *entry in _messages(data, begin, end):
                    if inner == 1:
                        self._add_entry(*entry)

    def _add_entry(self, begin: int, end: int) -> None:
        name, parts = b"", []
        for number, first, last in _messages(self._data, begin, end):
            if number == 1:
                name = self._data[first:last]
            elif number == 2:
                parts.append((first, last))
        try:
            self._features[name.decode("utf-8")] = parts
        except UnicodeDecodeError as error:
            raise _bad(f"the name of a feature: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._features)

    def values(self, name: str) -> list[bytes]:
        """The values of a feature; [] for no such feature, or one without bytes. Raises BadRecord."""
        found: list[bytes] = []
        for part in self._features.get(name, ()):
            for kind, begin, end in _messages(self._data, *part):
                if kind in (_FLOAT_LIST, _INT64_LIST):
                    found = []
                elif kind == _BYTES_LIST:
                    values = _messages(self._data, begin, end)
                    found += [self._data[first:last] for number, first, last in values if number == 1]
        return found

    def integers(self, name: str) -> list[int]:
        """The values of a feature of 64-bit integers; [] for no such feature, or another kind. Raises
        BadRecord."""
        found: list[int] = []
        for part in self._features.get(name, ()):
            for kind, begin, end in _messages(self._data, *part):
                if kind in (_BYTES_LIST, _FLOAT_LIST):
                    found = []
                elif kind == _INT64_LIST:
                    found += _integers(self._data, begin, end)
        return [(value + 2**63) % 2**64 - 2**63 for value in found]  # the bits of signed numbers


def _integers(data: bytes, at: int, end: int) -> Iterator[int]:
    """Yield the varints of the Int64List in data[at:end], packed or not."""
    while at < end:
        tag, at = _tag(data, at, end)
        if tag == 1 << 3 | 2:
            size, at = _varint(data, at, end)
            if size > end - at:
                raise _bad("a field that is longer than what holds it")
            last = at + size
            while at < last:
                value, at = _varint(data, at, last)
                yield value
        elif tag == 1 << 3:
            value, at = _varint(data, at, end)
            yield value
        else:
            at = _skip(data, at, end, tag)


def _field(number: int, payload: bytes) -> bytes:
    """A field with a length."""
    size, rest = bytearray(), len(payload)
    while rest > 0x7F:
        size.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([number << 3 | 2, *size, rest]) + payload


def serialize(features: dict[str, list[bytes]]) -> bytes:
    """A tf.train.Example with lists of bytes, sorted by name."""
    entries = []
    for name, values in sorted(features.items()):
        feature = _field(_BYTES_LIST, b"".join(_field(1, value) for value in values))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def tfrecord(payload: bytes) -> bytes:
    """One record of a TFRecord file: length, checksum, payload, checksum."""
    length = struct.pack("<Q", len(payload))
    checksums = [struct.pack("<I", masked_crc32c(data)) for data in (length, payload)]
    return length + checksums[0] + payload + checksums[1]
