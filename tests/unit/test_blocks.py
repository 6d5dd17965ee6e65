"""Blocks in storage: what is written is what is read, and whatever was damaged is refused by name."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_prefopt.data import blocks as blocks_module
from ray_prefopt.data.blocks import (
    BLOCK_SCHEMA,
    FORMAT,
    LENGTHS_SCHEMA,
    Blocks,
    Lengths,
    encode,
    encode_block,
    file_entry,
    has_blocks,
    open_blocks,
    read_block,
    write_manifest,
)
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.errors import DataError
from ray_prefopt.storage import write_file

PAIRS = [
    TokenizedPair(chosen=[1, 2, 3, 4], rejected=[1, 2, 9], chosen_start=2, rejected_start=2),
    TokenizedPair(chosen=[7, 8], rejected=[7, 5, 6, 151_642], chosen_start=1, rejected_start=1),
    TokenizedPair(chosen=[0, 2**31 - 1], rejected=[0, 3], chosen_start=1, rejected_start=1),
]


def write_blocks(folder: str, parts: list[list[TokenizedPair]], **changes: Any) -> None:
    """What prepare does with its parts."""
    fs, path = fsspec.core.url_to_fs(folder)

    def put(name: str, rows: int, data: bytes) -> dict[str, Any]:
        write_file(fs, f"{path}/{name}", data)
        return file_entry(name, rows, data)

    entries = [put(f"try/part-{i}.parquet", len(part), encode_block(part)) for i, part in enumerate(parts)]
    pairs = [pair for part in parts for pair in part]
    lengths = put("try/lengths.parquet", len(pairs), encode(Lengths.of(pairs).to_table()))
    manifest = {"format": FORMAT, "fingerprint": "f", "attempt": "try", "blocks": entries, "lengths": lengths}
    write_manifest(folder, manifest | changes)


def read_all(blocks: Blocks) -> list[dict[str, Any]]:
    return [row for index in range(len(blocks.files)) for row in read_block(blocks, index).to_pylist()]


def as_row(pair: TokenizedPair) -> dict[str, Any]:
    return {name: getattr(pair, name) for name in BLOCK_SCHEMA.names}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    path = str(tmp_path / "blocks")
    write_blocks(path, [PAIRS[:2], PAIRS[2:]])
    return path


def test_pairs_come_back(folder: str) -> None:
    blocks = open_blocks(folder)
    assert read_all(blocks) == [as_row(pair) for pair in PAIRS]
    assert blocks.files == (("try/part-0.parquet", 2), ("try/part-1.parquet", 1))
    assert (blocks.num_pairs, blocks.fingerprint) == (3, "f")


def test_any_storage_will_do() -> None:
    write_blocks("memory://bucket/run/blocks", [PAIRS])
    assert read_all(open_blocks("memory://bucket/run/blocks")) == [as_row(pair) for pair in PAIRS]


def test_lengths_are_those_of_the_pairs(folder: str) -> None:
    blocks = open_blocks(folder)
    assert blocks.chosen_lengths.tolist() == [2, 1, 1]
    assert blocks.rejected_lengths.tolist() == [1, 3, 1]
    assert blocks.total_lengths.tolist() == [7, 6, 4]
    assert blocks.lengths.chosen_start.tolist() == [2, 1, 1]
    assert {array.dtype for array in (blocks.chosen_lengths, blocks.total_lengths)} == {np.dtype(np.int32)}


def test_the_schema_is_exactly_this() -> None:
    ids = pa.list_(pa.int32())
    written = pq.ParquetFile(io.BytesIO(encode_block(PAIRS)))
    assert written.schema_arrow.equals(
        pa.schema(
            [("chosen", ids), ("rejected", ids), ("chosen_start", pa.int32()), ("rejected_start", pa.int32())]
        )
    )
    assert written.metadata.row_group(0).column(0).compression == "ZSTD"


def test_the_same_pairs_are_the_same_bytes() -> None:
    assert encode_block(PAIRS) == encode_block(list(PAIRS))


# --- damage ---


def flip_a_bit(path: Path, seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1 << random.Random(seed).randrange(8)
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    one_data, other_data = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_data)
    other.write_bytes(one_data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "expected .* bytes, found"),
    "appended": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "expected .* bytes, found"),
    "empty": (lambda path: path.write_bytes(b""), "expected .* bytes, found 0 bytes"),
    "flipped": (flip_a_bit, "expected checksum .*, found"),
}


@pytest.mark.parametrize("name", ["part-0.parquet", "part-1.parquet", "lengths.parquet"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name(folder: str, name: str, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(Path(folder, "try", name))
    with pytest.raises(
        DataError, match=rf"{name} is damaged: .*{message}.*; remove .* and prepare the data again"
    ):
        read_all(open_blocks(folder))


def test_every_flipped_bit_is_noticed(folder: str) -> None:
    path = Path(folder, "try/part-0.parquet")
    data = path.read_bytes()
    blocks = open_blocks(folder)
    for seed in range(60):
        path.write_bytes(data)
        flip_a_bit(path, seed)
        with pytest.raises(DataError, match=r"part-0\.parquet is damaged"):
            read_block(blocks, 0)


def test_pages_carry_checksums_of_their_own() -> None:
    data = bytearray(encode_block([TokenizedPair(list(range(500)), [1, 2], 1, 1)]))
    data[200] ^= 1
    with pytest.raises(OSError, match="CRC"):
        blocks_module.decode(bytes(data), BLOCK_SCHEMA)


def test_blocks_of_equal_size_cannot_change_places(tmp_path: Path) -> None:
    one = TokenizedPair([1, 2], [1, 3], 1, 1)
    other = TokenizedPair([4, 5], [4, 6], 1, 1)
    write_blocks(str(tmp_path), [[one], [other]])
    swap(tmp_path / "try/part-0.parquet", tmp_path / "try/part-1.parquet")
    with pytest.raises(DataError, match=r"part-0\.parquet is damaged"):
        read_block(open_blocks(str(tmp_path)), 0)


def test_a_file_that_vanishes_after_opening_is_named(folder: str) -> None:
    blocks = open_blocks(folder)
    Path(folder, "try/part-1.parquet").unlink()
    with pytest.raises(DataError, match=r"part-1\.parquet is damaged: no such file"):
        read_block(blocks, 1)


def test_another_schema_is_refused_before_it_is_read(tmp_path: Path) -> None:
    write_blocks(str(tmp_path), [PAIRS])
    data = encode(pa.table({"chosen": [1]}))
    (tmp_path / "try/part-0.parquet").write_bytes(data)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    del manifest["sha256"]
    write_manifest(str(tmp_path), manifest | {"blocks": [file_entry("try/part-0.parquet", 1, data)]})
    with pytest.raises(
        DataError, match=r"part-0.*expected columns chosen: list<.*int32>, .*, found chosen: int64"
    ):
        read_block(open_blocks(str(tmp_path)), 0)


# --- the manifest ---


def test_without_a_manifest_there_are_no_blocks(folder: str) -> None:
    assert has_blocks(folder)
    Path(folder, "manifest.json").unlink()
    assert not has_blocks(folder)
    with pytest.raises(
        DataError, match=r"no prepared blocks in .*: it has no manifest\.json; prepare the data first"
    ):
        open_blocks(folder)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        (b'{"format": 1', "JSONDecodeError: Expecting ',' delimiter: line 1 column 13 (char 12)"),
        (b"3", "AttributeError: 'int' object has no attribute 'pop'"),
        (b"{}", "KeyError: 'sha256'"),
        (
            b"\xff",
            "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        (b'{"sha256": "0", "format": 1}', "it does not match its own checksum"),
    ],
)
def test_a_torn_manifest_is_refused(folder: str, data: bytes, what: str) -> None:
    Path(folder, "manifest.json").write_bytes(data)
    with pytest.raises(DataError) as error:
        open_blocks(folder)
    assert str(error.value) == (
        f"{folder}/manifest.json is damaged: {what}; remove {folder} and prepare the data again"
    )


def test_a_changed_manifest_is_refused(folder: str) -> None:
    path = Path(folder, "manifest.json")
    path.write_text(path.read_text().replace('"rows": 2', '"rows": 1'))
    with pytest.raises(DataError, match=r"manifest\.json is damaged: it does not match its own checksum"):
        open_blocks(folder)


def test_another_format_is_refused(tmp_path: Path) -> None:
    write_blocks(str(tmp_path), [PAIRS], format=99)
    with pytest.raises(
        DataError, match=rf"has format 99; this version reads {FORMAT}: prepare the data again"
    ):
        open_blocks(str(tmp_path))


def test_any_text_may_be_in_a_manifest(tmp_path: Path) -> None:
    write_blocks(str(tmp_path), [PAIRS], counts={"detail": "\ud800 你好"})
    assert open_blocks(str(tmp_path)).manifest["counts"] == {"detail": "\ud800 你好"}


def test_lengths_of_parts_are_joined_in_order() -> None:
    joined = Lengths.concatenate([Lengths.of(PAIRS[:1]), Lengths.of([]), Lengths.of(PAIRS[1:])])
    assert joined.to_table().equals(Lengths.of(PAIRS).to_table())
    assert joined.to_table().schema.equals(LENGTHS_SCHEMA)
