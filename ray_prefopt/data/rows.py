"""The rows of files, in chunks, text exactly as written.

JSON lines travel as bytes and are parsed one by one, so that a bad one costs itself and nothing else. Other formats
travel as dicts. Neither pyarrow's JSON nor its CSV reader is used: they turn text that looks like a date into a date.
"""

import csv
import io
import json
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from ray_prefopt.data.formats import OF_TEMPLATES, Skipped
from ray_prefopt.errors import DataError

CHUNK_BYTES = 16 << 20
"""A chunk of JSON lines ends here even when it has fewer rows."""

Row = bytes | dict[str, Any] | Skipped
"""One row: a line of JSON, a dict, or why it is neither."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file with rows."""

    path: str
    """Path or URI."""
    format: str
    compression: str | None
    stamp: tuple[str, ...]
    """What changes when the content does: size and modification time, ETag, or commit."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Files that one task reads, one after the other, counting their rows together."""

    source: int
    index: int
    files: tuple[InputFile, ...]
    max_rows: int | None
    columns: frozenset[str]
    """Columns that pairs are made of."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one file: the unit of tokenization, and one block when it is done."""

    source: int
    lane: int
    index: int
    first_row: int
    """Rows of the lane before this chunk."""
    file: str
    numbers: list[int]
    """Where each row is in the file: line of a text file, row of another; both count from 1."""
    rows: list[Row]

    @property
    def key(self) -> tuple[int, int, int]:
        """Order of the chunks, and with them of the pairs."""
        return self.source, self.lane, self.index


def copies(row: int, weight: float) -> int:
    """How often a row (counted from 0) of a source with this weight is taken; the first n rows give floor(n * weight).

    >>> [copies(row, 0.5) for row in range(4)], [copies(row, 1.5) for row in range(4)]
    ([0, 1, 0, 1], [1, 2, 1, 2])
    """
    return int((row + 1) * weight) - int(row * weight)


# --- reading ---


class _Numbered(NamedTuple):
    """A row and its place in the file."""

    number: int
    row: Row


def read_chunks(lane: Lane, *, rows: int) -> Iterator[Chunk]:
    """The rows of a lane, `rows` at a time; a chunk ends with its file. Raises DataError for an unreadable file."""
    first_row = index = 0
    for file in lane.files:
        reader = _READERS[file.format](file, lane, rows)
        with _readable(file):
            for part in _grouped(reader, rows):
                if lane.max_rows is not None:
                    part = part[: lane.max_rows - first_row]
                if not part:
                    return
                numbers, content = [item.number for item in part], [item.row for item in part]
                yield Chunk(lane.source, lane.index, index, first_row, file.path, numbers, content)
                index += 1
                first_row += len(part)


def _grouped(reader: Iterator[_Numbered], rows: int) -> Iterator[list[_Numbered]]:
    part: list[_Numbered] = []
    size = 0
    for item in reader:
        part.append(item)
        size += len(item.row) if isinstance(item.row, bytes) else 0
        if len(part) == rows or size >= CHUNK_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


@contextmanager
def _readable(file: InputFile) -> Iterator[None]:
    """Errors of storage and formats, as one that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file.path} cannot be read as {' '.join(filter(None, (file.compression, file.format)))}: {error}; "
            "check that it is whole, and named by what it is"
        ) from error


@contextmanager
def _open(file: InputFile) -> Iterator[Any]:
    """The file's bytes, decompressed."""
    fs, path = url_to_fs(file.path)
    with fs.open(path, "rb") as raw:
        if file.compression is None:
            yield raw
        else:
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), file.compression) as stream:
                yield stream


def _read_jsonl(file: InputFile, _lane: Lane, _rows: int) -> Iterator[_Numbered]:
    with _open(file) as stream:
        for number, line in enumerate(_lines(stream), start=1):
            if line and not line.isspace():
                yield _Numbered(number, line)


def _lines(stream: Any) -> Iterator[bytes]:
    """Lines without their ends; a byte order mark at the start is no part of the first."""
    rest = b""
    is_start = True
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        if is_start and lines:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            is_start = False
        yield from lines
    yield rest.removeprefix(b"\xef\xbb\xbf") if is_start else rest


def _read_json(file: InputFile, lane: Lane, rows: int) -> Iterator[_Numbered]:
    """Elements of an array, or lines of objects."""
    with _open(file) as stream:
        head = stream.read(1 << 10).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head.startswith(b"["):
            yield from _read_jsonl(file, lane, rows)
            return
        text = (head + stream.read()).decode(errors="surrogateescape")
    for number, element in enumerate(_elements(text, file.path), start=1):
        yield _Numbered(number, element.encode(errors="surrogateescape"))


_SPACE = re.compile(r"[ \t\r\n]*")


def _elements(text: str, path: str) -> Iterator[str]:
    """The elements of a JSON array, each as it is written.

    >>> list(_elements('[{"a": 1.50}, 2]', "x.json"))
    ['{"a": 1.50}', '2']
    """
    decoder = json.JSONDecoder()
    position = _skip(text, 1)
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is not a JSON array: {error}; repair it, or write one object per line"
            ) from None
        yield text[position:end]
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(
                f"{path} is not a JSON array: expected ',' or ']' at character {position}, got "
                f"{reprlib.repr(text[position : position + 20])}; repair it, or write one object per line"
            )
    end = _skip(text, position + 1)
    if end < len(text):
        raise DataError(
            f"{path} goes on after its JSON array, at character {end}: {reprlib.repr(text[end : end + 20])}; make it "
            "one array, or write one object per line"
        )


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _read_csv(file: InputFile, _lane: Lane, _rows: int, *, delimiter: str = ",") -> Iterator[_Numbered]:
    """Records of a table with a header; every field is text."""
    csv.field_size_limit(sys.maxsize)
    with _open(file) as stream:
        text = io.TextIOWrapper(
            io.BufferedReader(_Raw(stream)), "utf-8-sig", errors="surrogateescape", newline=""
        )
        records = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(records, [])
        if len(set(header)) != len(header):
            raise DataError(f"{file.path} has two columns of one name; got {header}: rename one of them")
        while True:
            number = records.line_num + 1
            try:
                record = next(records, None)
            except csv.Error as error:
                # A quote that is not closed takes in the lines after it: each of them may have been a row.
                yield _Numbered(number, Skipped("malformed_csv", str(error)))
                for line in range(number + 1, records.line_num + 1):
                    detail = f"taken for a part of the record that begins in line {number}"
                    yield _Numbered(line, Skipped("malformed_csv", detail))
                continue
            if record is None:
                return
            if len(record) == len(header):
                yield _Numbered(number, dict(zip(header, record, strict=True)))
            elif record:
                detail = f"{len(record)} fields under a header of {len(header)}"
                yield _Numbered(number, Skipped("malformed_csv", detail))


class _Raw(io.RawIOBase):
    """What TextIOWrapper wants of a stream: pyarrow's streams and fsspec's files differ in it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _read_tsv(file: InputFile, lane: Lane, rows: int) -> Iterator[_Numbered]:
    return _read_csv(file, lane, rows, delimiter="\t")


def _read_parquet(file: InputFile, lane: Lane, rows: int) -> Iterator[_Numbered]:
    with _open(file) as stream:
        parquet = pq.ParquetFile(stream, page_checksum_verification=True)
        names = _plain_columns(parquet.schema_arrow, lane.columns, file.path)
        yield from _batch_rows(parquet.iter_batches(batch_size=rows, columns=names), names)


def _read_arrow(file: InputFile, lane: Lane, rows: int) -> Iterator[_Numbered]:
    """An IPC stream, as `datasets` writes, or an IPC file."""
    with _open(file) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        names = _plain_columns(reader.schema, lane.columns, file.path)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        slices = (batch.slice(start, rows) for batch in batches for start in range(0, batch.num_rows, rows))
        yield from _batch_rows(slices, names)


def _batch_rows(batches: Iterator[pa.RecordBatch], names: Sequence[str]) -> Iterator[_Numbered]:
    number = 1
    for batch in batches:
        for row in _python_rows(batch.select(names)):
            yield _Numbered(number, row)
            number += 1


def _python_rows(batch: pa.RecordBatch) -> list[Row]:
    kinds = {field.name: field.type for field in batch.schema}
    try:
        return [
            {name: _as_written(value, kinds[name]) for name, value in row.items()}
            for row in batch.to_pylist()
        ]
    except ValueError as error:  # text that is no UTF-8, or a date that Python has not
        if batch.num_rows == 1:
            return [Skipped("malformed_row", str(error))]
        return [row for index in range(batch.num_rows) for row in _python_rows(batch.slice(index, 1))]


def _as_written(value: Any, kind: pa.DataType) -> Any:
    """A value as it would stand in a line of JSON: parsed where Arrow keeps it as JSON, as `datasets` does with what
    differs from row to row, and without the null fields that it adds wherever another row has a value."""
    if _is_json(kind):
        return None if value is None else json.loads(value)
    if isinstance(value, dict) and pa.types.is_struct(kind):
        kinds = {field.name: field.type for field in kind}
        return {name: _as_written(field, kinds[name]) for name, field in value.items() if field is not None}
    inner = getattr(kind, "value_type", None)  # of lists of any kind, but not of maps
    if isinstance(value, list) and inner is not None and (pa.types.is_nested(inner) or _is_json(inner)):
        return [_as_written(item, inner) for item in value]
    return value


def _plain_columns(schema: pa.Schema, wanted: frozenset[str], path: str) -> list[str]:
    """Columns of text, numbers, and lists and structs of them; raises DataError for pairs in an extension type.

    Extension types are never converted: Ray registers one that unpickles, which would run code from the file.
    """
    for field in schema:
        if schema.names.count(field.name) > 1:
            raise DataError(f"{path} has two columns named {field.name!r}: rename one of them")
        if field.name in wanted | OF_TEMPLATES and not _is_safe(field.type):
            raise DataError(
                f"column {field.name!r} of {path} has type {field.type}, which is not read because it may run code: "
                "write it as text, or as lists of messages"
            )
    return [field.name for field in schema if field.name in wanted or _is_plain(field.type)]


def _leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types inside a type.

    >>> list(map(str, _leaves(pa.list_(pa.struct({"role": pa.string(), "turn": pa.int32()})))))
    ['string', 'int32']
    """
    if isinstance(kind, pa.BaseExtensionType):
        yield kind
    elif pa.types.is_dictionary(kind):
        yield from _leaves(kind.value_type)
    elif pa.types.is_nested(kind):
        for index in range(kind.num_fields):
            yield from _leaves(kind.field(index).type)
    else:
        yield kind


def _is_safe(kind: pa.DataType) -> bool:
    return not any(isinstance(leaf, pa.BaseExtensionType) and not _is_json(leaf) for leaf in _leaves(kind))


def _is_json(kind: pa.DataType) -> bool:
    """Of Arrow's own extension, which is text."""
    return isinstance(kind, pa.JsonType)


def _is_plain(kind: pa.DataType) -> bool:
    return all(any(test(leaf) for test in _PLAIN) for leaf in _leaves(kind))


_PLAIN = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_null,
    _is_json,
)

_READERS = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}


# --- from bytes to a row ---


def parse(row: Row) -> Mapping[str, Any] | Skipped:
    """A row as a mapping of columns, or why it is none.

    >>> parse(b'{"chosen": "2024-01-01"}')
    {'chosen': '2024-01-01'}
    >>> parse(b'{"chosen": "a", "chosen": "b"}')
    Skipped(reason='malformed_json', detail="duplicate key 'chosen'")
    """
    if not isinstance(row, bytes):
        return row
    try:
        value = json.loads(row.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return Skipped("malformed_json", str(error))
    if not isinstance(value, dict):
        return Skipped("malformed_json", f"a row is an object; got {reprlib.repr(value)}")
    return value


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) != len(items):
        names = [name for name, _ in items]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return result
