"""tf.train.Example protos without TensorFlow: what is read, what is refused, and that TensorFlow agrees."""

import random

import pytest

from dalle2_jax.data import examples
from dalle2_jax.data.records import BadRecord

FEATURES = {"key": [b"7"], "jpg": [bytes(range(256)) * 3], "txt": [b"a", b"", "图".encode()], "none": []}


def read(data: bytes) -> dict[str, list[bytes]]:
    """All features of an Example."""
    example = examples.Example(data)
    return {name: example.values(name) for name in example}


def field(number: int, payload: bytes) -> bytes:
    """A field with a length, of less than 128 bytes."""
    return bytes([number << 3 | 2, len(payload)]) + payload


def entry(name: bytes, *parts: bytes) -> bytes:
    """An Example of one feature, given the parts of its Feature."""
    return field(1, field(1, field(1, name) + b"".join(field(2, part) for part in parts)))


def test_what_is_written_is_read():
    assert read(examples.serialize(FEATURES)) == FEATURES
    assert read(examples.serialize({})) == {} and read(b"") == {}
    # the bytes of a small one, worked out by hand from the wire format
    assert examples.serialize({"a": [b"xy"]}) == b"\n\r\n\x0b\n\x01a\x12\x06\n\x04\n\x02xy"


def test_messages_in_parts_merge_and_the_last_of_a_key_or_a_oneof_stays():
    one, two = field(1, field(1, b"one")), field(1, field(1, b"two"))  # a Feature of one value each
    number = field(3, field(1, b"\x05"))  # a Feature of the integer 5
    assert read(entry(b"a", one) + entry(b"b", two)) == {"a": [b"one"], "b": [b"two"]}
    assert read(entry(b"a", one) + entry(b"a", two)) == {"a": [b"two"]}
    assert read(entry(b"a", one, two)) == read(entry(b"a", one + two)) == {"a": [b"one", b"two"]}
    assert read(entry(b"a", one + number)) == {"a": []}
    assert read(entry(b"a", one + number + two)) == {"a": [b"two"]}
    assert read(entry(b"", one)) == read(field(1, field(1, field(2, one)))) == {"": [b"one"]}
    unknown = b"\x38\x96\x01" + b"\x3d1234" + b"\x3912345678" + b"\x3b\x38\x01\x3c" + field(9, b"z")
    assert read(unknown + entry(b"a", unknown + one + unknown) + unknown) == {"a": [b"one"]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff no protocol buffer", "a number of more than 5 bytes|field of|wire type"),
        (b"\x0a", "ends within a number"),
        (b"\x0a\x05abc", "longer than what holds it"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "longer than what holds it"),
        (b"\x0a" + 11 * b"\x80", "more than 10 bytes"),
        (b"\x02\x00", "field of number 0"),
        (b"\x0c", "wire type 4"),
        (b"\x0e", "wire type 6"),
        (b"\x3b\x44", "another one's end"),
        (b"\x3b", "ends within a number"),
        (100_000 * b"\x3b", "wire type 3"),
        (b"\x3d123", "longer than what holds it"),
        (entry(b"\xff", b""), "the name of a feature"),
    ],
)
def test_what_is_no_example_is_a_bad_record(data, reason):
    with pytest.raises(BadRecord, match=f"invalid_proto: .*({reason})"):
        read(data)


def test_tensorflow_reads_and_refuses_the_same():
    """Examples with flipped, lost and repeated bytes: what TensorFlow takes is taken, with the same values.

    The reverse does not hold within lists of numbers, which are not looked into.
    """
    example_pb2 = pytest.importorskip(
        "tensorflow.core.example.example_pb2", reason="compares with TensorFlow"
    )
    from google.protobuf.message import DecodeError

    def theirs(data):
        features = example_pb2.Example.FromString(data).features.feature
        return {name: list(features[name].bytes_list.value) for name in features}

    whole = example_pb2.Example()
    for name, values in FEATURES.items():
        whole.features.feature[name].bytes_list.value.extend(values)
    assert theirs(examples.serialize(FEATURES)) == FEATURES == read(whole.SerializeToString())
    whole.features.feature["floats"].float_list.value.extend([0.5, 2.0])
    whole.features.feature["numbers"].int64_list.value.extend([1, -1, 2**40])
    assert read(whole.SerializeToString()) == FEATURES | {"floats": [], "numbers": []}
    whole.features.feature["jpg"].bytes_list.value[0] = b"short"  # so that flips hit what is around it
    start, rng, taken, refused = whole.SerializeToString(deterministic=True), random.Random(0), 0, 0
    for _ in range(4000):
        data = bytearray(start)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[place] = rng.randrange(256)
            elif kind == 2:
                data[place : place + 1] = data[place : place + rng.randint(0, 9)]
            else:
                del data[place : place + rng.randint(1, 9)]
        try:
            expected = theirs(bytes(data))
        except DecodeError:
            refused += 1
            continue
        taken += 1
        ours = read(bytes(data))  # may have more: theirs leaves out a feature with an unknown field beside it
        assert {name: ours.get(name) for name in expected} == expected, bytes(data)
    assert taken > 200 and refused > 200  # about 480 and 3500
