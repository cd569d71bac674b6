"""Columns of texts of an embedding folder, in parquet or JSON lines, read within limits."""

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator

from dalle2_jax.data import parquet, remote
from dalle2_jax.data.records import MAX_TEXT_BYTES
from dalle2_jax.data.shards import add_caption, freeze, language_of

MAX_COLUMN_BYTES = 256 << 20  # of a column of captions within a row group of parquet
MAX_COLUMNS = 64  # of captions; each takes memory for every row
_NAMES = 32  # fields in a message

Columns = dict[str, list[str | None]]  # field -> one value a row


def row_captions(columns: Columns, row: int, embedded: bool = False) -> dict[str, tuple[str, ...]]:
    """The captions of one row by language, in the order of the columns.

    embedded: only the texts of text_emb: `caption` (`caption_zh`) if the row has it. clip-retrieval embeds
    that column, not a `text` beside it, such as a page's alt text.
    """
    texts: dict[str, list[str]] = {}
    for field, column in columns.items():
        language = language_of(field) or ""
        main = "caption" if language == "en" else f"caption_{language}"
        if not embedded or field == main or main not in columns or columns[main][row] is None:
            add_caption(texts, language, column[row] or "")
    return freeze(texts)


def read_columns(
    metadata: list[tuple[str, int]], wanted: Callable[[str], object]
) -> tuple[Columns, tuple[str, ...]]:
    """(columns, names of all fields) of metadata files and their numbers of rows.

    wanted: whether to read a field. A value is None if the file or the row has no such field, or if it is no
    text, no UTF-8, or above MAX_TEXT_BYTES.

    Raises ValueError for a file with another number of rows, more than MAX_COLUMNS columns, or a piece above
    the limits of memory; in parquet also for columns of one name, and for lists, structs and maps.
    """
    total, first = sum(rows for _, rows in metadata), 0
    columns: Columns = {}
    names: dict[str, None] = {}
    for path, rows in metadata:
        read, end = _parquet if path.endswith(".parquet") else _json_lines, first
        for count, piece in read(path, wanted, rows, names):
            for field, values in piece.items():
                if len(values) != count:
                    raise ValueError(f"{path}: {field!r} has {len(values)} values in {count} rows")
                columns.setdefault(field, [None] * total)[end : end + count] = values
            _check_number(path, columns)
            end += count
        if end - first != rows:
            raise ValueError(f"{path} has {end - first} rows, where there are embeddings for {rows}")
        first = end
    return columns, tuple(names)


def _check_number(path: str, columns: dict) -> None:
    if len(columns) > MAX_COLUMNS:
        raise ValueError(
            f"{path}: more than {MAX_COLUMNS} columns of captions: give most of them other names"
        )


def _keep_names(names: dict[str, None], more: Iterable[str]) -> None:
    """Add the first few names of fields to `names`, an ordered set."""
    if len(names) < _NAMES:
        names.update(dict.fromkeys(itertools.islice(more, _NAMES)))


def _parquet(path: str, wanted: Callable, most: int, names: dict) -> Iterator[tuple[int, Columns]]:
    """(rows, columns) of each row group. A repeated text is kept once."""
    import pyarrow

    with parquet.reader(path) as file:
        fields = [field for field in file.schema_arrow.names if wanted(field)]
        _keep_names(names, file.schema_arrow.names)
        stored = [file.schema.column(i) for i in range(len(file.schema))]
        plain = [column.path for column in stored if not column.max_repetition_level]
    for field in fields:
        # Nested columns have other names in the file, and other numbers of values than rows.
        if fields.count(field) > 1 or field not in plain:
            raise ValueError(
                f"{path}: {field!r} must be one column of texts, and is several or nested: write one text a "
                "row, or give what is no caption another name"
            )
    with parquet.reader(path, read_dictionary=fields) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        _check_rows(path, sum(group.num_rows for group in groups), most)
        for i, group in enumerate(groups):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema in fields and column.total_uncompressed_size > MAX_COLUMN_BYTES:
                    raise ValueError(
                        f"{path}: {column.path_in_schema} has more than {MAX_COLUMN_BYTES >> 20} MiB in a "
                        "row group: write the file with smaller row groups"
                    )
            table = file.read_row_group(i, columns=fields)
            columns: Columns = {field: [] for field in fields}
            for field, values in columns.items():
                for piece in table.column(field).chunks:
                    if pyarrow.types.is_dictionary(piece.type):
                        texts = _texts(piece.dictionary)
                        values += [None if i is None else texts[i] for i in piece.indices.to_pylist()]
                    else:
                        values += [None] * len(piece)
            yield group.num_rows, columns


def _texts(array) -> list[str | None]:
    """The values of a pyarrow array of texts; None: no UTF-8, which pyarrow does not check."""
    import pyarrow

    try:
        return [_text(value) for value in array.to_pylist()]
    except UnicodeDecodeError:
        large = pyarrow.types.is_large_string(array.type)
        stored = array.cast(pyarrow.large_binary() if large else pyarrow.binary()).to_pylist()
    texts = []
    for value in stored:
        try:
            texts.append(None if value is None else _text(value.decode("utf-8")))
        except UnicodeDecodeError:
            texts.append(None)
    return texts


def _json_lines(path: str, wanted: Callable, most: int, names: dict) -> Iterator[tuple[int, Columns]]:
    """(rows, columns) of a file with one object a line. Blank lines are skipped."""
    columns: Columns = {}
    rows = 0
    with io.BufferedReader(remote.open_file(path)) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_TEXT_BYTES)
            if not line:
                break
            if not line.strip():
                continue
            _check_rows(path, rows + 1, most)
            try:
                row = dict(json.loads(line))  # from bytes, which may begin with a byte-order mark
            except (ValueError, TypeError, RecursionError) as error:
                limit = f"an object in JSON of at most {MAX_TEXT_BYTES >> 20} MiB"
                raise ValueError(f"{path}: line {number} is not {limit}: {error}") from None
            _keep_names(names, row)
            for field in filter(wanted, row):
                columns.setdefault(field, [None] * rows)
            _check_number(path, columns)
            for field, values in columns.items():
                values.append(_text(row.get(field)))
            rows += 1
    yield rows, columns


def _text(value) -> str | None:
    return value if isinstance(value, str) and len(value) <= MAX_TEXT_BYTES else None


def _check_rows(path: str, rows: int, most: int) -> None:
    if rows > most:
        raise ValueError(f"{path} has {rows} rows or more, where there are embeddings for {most}")
