"""Prepared pairs in storage: Parquet blocks of token ids, their lengths, and the manifest that makes them exist.

A folder of blocks holds `manifest.json` and one folder per attempt at writing it. Only what the manifest names counts:
it is written last and in one piece, so blocks are either whole or not there. Storage is whatever fsspec can address.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.errors import DataError, ResourceError
from ray_prefopt.storage import write_file

FORMAT = 2
"""Version of this layout, and of how rows become pairs; part of the fingerprint, so that another is another folder."""

MANIFEST = "manifest.json"

BLOCK_SCHEMA = pa.schema(
    [
        ("chosen", pa.list_(pa.int32())),
        ("rejected", pa.list_(pa.int32())),
        ("chosen_start", pa.int32()),
        ("rejected_start", pa.int32()),
    ]
)
"""Ids of prompt + completion, and the index of the first completion token. The row is the pair: ids are implied."""

Tokens = npt.NDArray[np.int32]

LENGTHS_SCHEMA = pa.schema(
    [(name, pa.int32()) for name in ("chosen", "rejected", "chosen_start", "rejected_start")]
)
"""Tokens of prompt + completion, and of the prompt in it, for every pair."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens per pair, in pair_id order; each array is (N,) int32."""

    chosen: Tokens
    """Prompt + chosen completion."""
    rejected: Tokens
    chosen_start: Tokens
    """Prompt in front of the chosen completion."""
    rejected_start: Tokens

    @classmethod
    def of(cls, pairs: Sequence[TokenizedPair]) -> "Lengths":
        columns = (
            [len(pair.chosen) for pair in pairs],
            [len(pair.rejected) for pair in pairs],
            [pair.chosen_start for pair in pairs],
            [pair.rejected_start for pair in pairs],
        )
        return cls(*(np.array(column, np.int32) for column in columns))

    @classmethod
    def concatenate(cls, parts: Sequence["Lengths"]) -> "Lengths":
        columns = ([getattr(part, name) for part in parts] for name in LENGTHS_SCHEMA.names)
        return cls(*(np.concatenate(column) for column in columns))

    def take(self, ids: npt.NDArray[np.int64]) -> Tokens:
        """Those of some pairs, (4, n)."""
        return np.stack([getattr(self, name)[ids] for name in LENGTHS_SCHEMA.names])

    def to_table(self) -> pa.Table:
        return pa.table([getattr(self, name) for name in LENGTHS_SCHEMA.names], schema=LENGTHS_SCHEMA)


@dataclass(frozen=True, slots=True)
class Blocks:
    """N tokenized pairs with dense ids 0 to N-1: the rows of the files, one file after the other."""

    folder: str
    """Path or URI of the folder with the manifest."""
    files: tuple[tuple[str, int], ...]
    """Name relative to the folder, and rows, of each block."""
    lengths: Lengths
    manifest: Mapping[str, Any]

    @property
    def num_pairs(self) -> int:
        return len(self.lengths.chosen)

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def chosen_lengths(self) -> Tokens:
        """Tokens of each chosen completion, (N,)."""
        return self.lengths.chosen - self.lengths.chosen_start

    @property
    def rejected_lengths(self) -> Tokens:
        """Tokens of each rejected completion, (N,)."""
        return self.lengths.rejected - self.lengths.rejected_start

    @property
    def total_lengths(self) -> Tokens:
        """Tokens of both sequences of each pair, prompts counted twice, (N,)."""
        return self.lengths.chosen + self.lengths.rejected


# --- reading ---


def has_blocks(folder: str) -> bool:
    """Whether a manifest is there: the one sign that blocks were finished."""
    fs, path = url_to_fs(folder)
    fs.invalidate_cache()  # other processes may have written since this one looked
    return bool(fs.isfile(f"{path}/{MANIFEST}"))


def open_blocks(folder: str) -> Blocks:
    """The blocks in a folder; reads the manifest and the lengths, lists the files, opens none of them.

    Raises DataError when the folder has no manifest, or a manifest or file that is damaged or missing.
    """
    fs, path = url_to_fs(folder)
    fs.invalidate_cache()
    manifest = _read_manifest(fs, f"{path}/{MANIFEST}", folder)
    attempt = str(manifest["attempt"])
    sizes = {
        f"{attempt}/{info['name'].rpartition('/')[2]}": info["size"]
        for info in _list(fs, f"{path}/{attempt}")
    }
    for entry in (*manifest["blocks"], manifest["lengths"]):
        if sizes.get(entry["file"]) != entry["bytes"]:
            found = f"{sizes[entry['file']]} bytes" if entry["file"] in sizes else "no such file"
            raise _damaged(folder, entry["file"], f"expected {entry['bytes']} bytes, found {found}")
    table = _read_table(fs, path, folder, manifest["lengths"], LENGTHS_SCHEMA)
    return Blocks(
        folder=folder,
        files=tuple((entry["file"], entry["rows"]) for entry in manifest["blocks"]),
        lengths=Lengths(*(table[name].to_numpy() for name in LENGTHS_SCHEMA.names)),
        manifest=manifest,
    )


def read_block(blocks: Blocks, index: int) -> pa.Table:
    """One block, in BLOCK_SCHEMA. Raises DataError with its name when it is not byte for byte what was written."""
    fs, path = url_to_fs(blocks.folder)
    return _read_table(fs, path, blocks.folder, blocks.manifest["blocks"][index], BLOCK_SCHEMA)


def _list(fs: AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    try:
        return list(fs.ls(path, detail=True))
    except FileNotFoundError:
        return []


def _read_table(
    fs: AbstractFileSystem, path: str, folder: str, entry: Mapping[str, Any], schema: pa.Schema
) -> pa.Table:
    """A file of the manifest, checked by the manifest's checksum, by its schema, and by the checksum of each page."""
    name = entry["file"]
    try:
        data = fs.cat_file(f"{path}/{name}")
    except FileNotFoundError:
        raise _damaged(folder, name, "no such file") from None
    if (found := zlib.crc32(data)) != entry["crc32"]:
        raise _damaged(folder, name, f"expected checksum {entry['crc32']:08x}, found {found:08x}")
    try:
        return decode(data, schema)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(folder, name, str(error)) from error


def decode(data: bytes, schema: pa.Schema) -> pa.Table:
    """A table in this schema from Parquet. Raises ArrowException or OSError on another schema or a damaged page.

    The schema is compared before any column is read, because other types can run code when they are converted.
    """
    parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    if not parquet.schema_arrow.equals(schema):
        raise pa.ArrowInvalid(f"expected columns {_brief(schema)}, found {_brief(parquet.schema_arrow)}")
    return parquet.read(columns=schema.names)


def _brief(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _read_manifest(fs: AbstractFileSystem, path: str, folder: str) -> dict[str, Any]:
    try:
        data = fs.cat_file(path)
    except FileNotFoundError:
        raise DataError(
            f"no prepared blocks in {folder}: it has no {MANIFEST}; prepare the data first"
        ) from None
    try:
        manifest = json.loads(data)
        stated = manifest.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, MANIFEST, f"{type(error).__name__}: {error}") from None
    if stated != _digest(manifest):
        raise _damaged(folder, MANIFEST, "it does not match its own checksum")
    if manifest["format"] != FORMAT:
        raise DataError(
            f"{path} has format {manifest['format']}; this version reads {FORMAT}: prepare the data again"
        )
    return dict(manifest)


def _damaged(folder: str, name: str, what: str) -> DataError:
    return DataError(f"{folder}/{name} is damaged: {what}; remove {folder} and prepare the data again")


# --- writing ---


def encode_block(pairs: Sequence[TokenizedPair]) -> bytes:
    """A block as a Parquet file: zstd, with a checksum in each page."""
    columns = [[getattr(pair, name) for pair in pairs] for name in BLOCK_SCHEMA.names]
    return encode(pa.table(columns, schema=BLOCK_SCHEMA))


def encode(table: pa.Table) -> bytes:
    """A table as a Parquet file in memory."""
    buffer = io.BytesIO()
    # Dictionaries and statistics of token ids take time and space, and nobody asks for them.
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return buffer.getvalue()


def write(folder: str, name: str, data: bytes) -> None:
    """A file in a folder of blocks. Raises ResourceError when the storage refuses."""
    fs, path = url_to_fs(folder)
    try:
        write_file(fs, f"{path}/{name}", data)
    except OSError as error:
        raise ResourceError(
            f"{folder}/{name} cannot be written ({error}): free some space or allow the access, or set "
            "run.storage_path to another place"
        ) from error


def file_entry(name: str, rows: int, data: bytes) -> dict[str, Any]:
    """What the manifest says about a file."""
    return {"file": name, "rows": rows, "bytes": len(data), "crc32": zlib.crc32(data)}


def write_manifest(folder: str, manifest: Mapping[str, Any]) -> None:
    """Make the blocks exist. Everything that the manifest names must have been written."""
    signed = {**manifest, "sha256": _digest(manifest)}
    write(folder, MANIFEST, json.dumps(signed, indent=1).encode())


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
