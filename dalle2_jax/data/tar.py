"""The index of a tar shard: the places of every sample's members.

A header is 512 bytes: name [0:100], size [124:136], checksum [148:156], type [156], prefix [345:500]
(POSIX.1-1988 ustar, with the pax and GNU long-name extensions). Nothing is unpacked; names, sizes and types
of members are checked.
"""

import os
import re
from typing import NamedTuple

import numpy as np

from dalle2_jax.data import damage, remote
from dalle2_jax.data.records import IMAGE_EXTENSIONS, MAX_MEMBER_BYTES, Counts, Damaged, Index

MAX_MEMBERS = 1_000_000  # of one tar shard; img2dataset writes 30,000
MAX_HEADER_BYTES = 64 << 10  # of a pax or long-name header
NO_LABEL = -2  # in an index: no .cls, or one without a label; -1 is the label of no class
_END_BYTES = 2 << 20  # searched behind the end mark; `tar` fills its last block, of 10 KiB or more
_REGULAR, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK = b"x", b"g", b"L", b"K"
_LABEL = re.compile(rb"\s*(-1|[0-9]{1,9})\s*")
_MAX_LABEL_BYTES = 32


def _number(field: bytes) -> int:
    """A tar header's number: octal text, or base 256 where the first bit is set. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0")[0].strip()
    number = int(text, 8) if text else 0
    if number < 0:
        raise ValueError(f"negative number {number}")
    return number


def _checksum_ok(header: bytes) -> bool:
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    return stored == sum(header) - sum(header[148:156]) + 8 * 32  # the checksum field itself counts as spaces


def _pax_fields(data: bytes) -> dict[bytes, tuple[int, bytes]]:
    """{keyword: (where its value begins, value)} of a pax header, whose lines are 'LENGTH keyword=value\\n'.

    Raises ValueError.
    """
    fields, position = {}, 0
    while position < len(data) and data[position : position + 1] != b"\0":
        space = data.index(b" ", position)
        length = int(data[position:space])
        if length <= space - position:
            raise ValueError("pax line too short")
        keyword, _, value = data[space + 1 : position + length - 1].partition(b"=")
        fields[keyword] = space + 1 + len(keyword) + 1, value
        position += length
    return fields


class _Member(NamedTuple):
    """A member of a tar: its full name, the place of the name's last part, its type, its data's place and
    size."""

    name: bytes
    base_at: int
    kind: bytes
    start: int
    size: int


def _tar_members(file, size: int):
    """Yield each `_Member` of an open tar. Raises Damaged if it ends early or is no tar."""
    offset, long_name = 0, None
    pax: dict[bytes, tuple[int, bytes]] = {}
    for _ in range(MAX_MEMBERS):
        file.seek(offset)
        header = file.read(512)
        begins_well = offset or header[257:262] == b"ustar"
        if len(header) < 512:  # no end mark: cut, perhaps on a boundary
            raise Damaged(
                "truncated_archive" if begins_well else damage.of_beginning(header, "not_an_archive")
            )
        if not header.strip(b"\0"):
            if _goes_on(file):
                raise Damaged("joined_archives")
            return
        try:
            member_size = int(pax[b"size"][1]) if b"size" in pax else _number(header[124:136])
            damaged = member_size < 0 or not _checksum_ok(header)
        except ValueError:
            damaged = True
        if damaged:
            raise Damaged("damaged_archive" if begins_well else damage.of_beginning(header, "not_an_archive"))
        kind, at, start = header[156:157], offset, offset + 512
        if start + member_size > size:
            raise Damaged("truncated_archive")
        offset = start + (member_size + 511) // 512 * 512
        if kind in (_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
            if member_size > MAX_HEADER_BYTES:
                raise Damaged("header_too_large")
            data = file.read(member_size)
            if kind == _GNU_NAME:
                long_name = start, data.rstrip(b"\0")
            elif kind == _PAX:
                try:
                    pax = {word: (start + place, value) for word, (place, value) in _pax_fields(data).items()}
                except ValueError:
                    raise Damaged("damaged_archive") from None
            continue
        name = header[:100].split(b"\0")[0]
        if header[257:262] == b"ustar" and header[263:265] == b"00":
            prefix = header[345:500].split(b"\0")[0]
            if prefix:  # before the name, but behind it in the header: `at` is right for the name only
                at, name = at - len(prefix) - 1, prefix + b"/" + name
        for place, other in (long_name or (0, b""), pax.get(b"path", (0, b""))):
            if other:
                at, name = place, other
        long_name, pax = None, {}
        yield _Member(name, at + name.rfind(b"/") + 1, kind, start, member_size)
    raise Damaged("too_many_members")


def _goes_on(file) -> bool:
    """Whether another archive was appended behind the end mark, where `file` is."""
    for _ in range(_END_BYTES // 512):
        block = file.read(512)
        if len(block) < 512 or block.strip(b"\0"):
            return len(block) == 512 and _checksum_ok(block)
    return False


def index_tar(path: str) -> Index:
    """Index one tar shard: a row for each sample with an image.

    A row is (offset, size) of the image, of its .txt, of its .json, and of the key within the image's name,
    then the label in its .cls, or NO_LABEL; size -1: no such part. A sample is the members with one name up
    to the last dot before a known extension; see `_is_part`.

    Refused: members that are no regular files, unsafe names (they are printed), members above 64 MiB,
    repeated parts, samples without an image. Passed over: hidden files, files of other kinds, parts of the
    sample of a shorter key, and folders, which are not counted. A truncated or damaged archive keeps the
    samples before the damage.
    """
    examples: dict[str, str] = {}
    samples: dict[bytes, list[int]] = {}
    refused, passed, found = Counts(examples), Counts(examples), ""
    with remote.open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            for member in _tar_members(file, size):
                _add_member(file, member, samples, refused, passed)
        except Damaged as error:
            found = error.kind
    rows = []
    for key, row in samples.items():
        if _is_part(key, row, samples):
            passed.note("part_of_another", key.removeprefix(b"/"))
        elif max(row[1], row[3], row[5]) < 0:
            passed.note("other_extension", key.removeprefix(b"/") + b".cls")
        elif row[1] < 0:
            refused.note("no_image", key.removeprefix(b"/"))
        else:
            rows.append(row)
    return Index(np.asarray(rows, np.int64).reshape(-1, 9), dict(refused), dict(passed), examples, found)


def _add_member(file, member: _Member, samples: dict[bytes, list], refused: Counts, passed: Counts) -> None:
    """Enter a member of an open tar into its sample's row, or count it."""
    name = member.name
    if member.kind == _DIRECTORY:
        return
    if member.kind not in _REGULAR:
        return refused.note("not_a_regular_file", name)
    if name.startswith(b"/") or b".." in name.split(b"/") or damage.has_control_characters(name):
        return refused.note("unsafe_name", name)
    folder, _, base = name.rpartition(b"/")
    stem, _, ending = base.rpartition(b".")
    extension = ending.lower().decode("ascii", "replace")
    column = 0 if extension in IMAGE_EXTENSIONS else {"txt": 2, "json": 4, "cls": 8}.get(extension)
    if base.startswith(b"."):  # such as ._KEY.jpg
        return passed.note("hidden_file", name)
    if column is None or not stem:
        return passed.note("other_extension", name)
    if member.size > MAX_MEMBER_BYTES:
        return refused.note("member_too_large", name)
    row = samples.setdefault(folder + b"/" + stem, [0, -1, 0, -1, 0, -1, 0, 0, NO_LABEL])
    if column == 8:
        row[8] = _label(file, member)
        return None
    if row[column + 1] >= 0:
        return refused.note("repeated_member", name)
    row[column : column + 2] = member.start, member.size
    if column == 0:
        row[6:8] = member.base_at, len(stem)
    return None


def _label(file, member: _Member) -> int:
    """The label in a .cls; NO_LABEL: it is no whole number from -1 on."""
    file.seek(member.start)
    found = _LABEL.fullmatch(file.read(min(member.size, _MAX_LABEL_BYTES)))
    return int(found[1]) if found and member.size <= _MAX_LABEL_BYTES else NO_LABEL


def _is_part(key: bytes, row: list, samples: dict[bytes, list]) -> bool:
    """Whether a sample is a part of the sample of a shorter key, as KEY.seg.png of KEY.png.

    That is so if KEY has an image, unless this sample has an image and a caption: a .txt, or a .json if KEY
    has no .txt.
    """
    end = key.rfind(b"/") + 1
    while (end := key.find(b".", end + 1)) > 0:
        whole = samples.get(key[:end])
        if whole is not None and whole[1] >= 0:
            return row[1] < 0 or not (row[3] >= 0 or (row[5] >= 0 and whole[3] < 0))
    return False
