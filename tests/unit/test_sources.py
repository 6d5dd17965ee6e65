"""Files in, rows out: every format, with the text exactly as it was written, and files that are not there."""

import bz2
import csv
import datetime
import gzip
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from hypothesis import given
from hypothesis import strategies as st

from ray_prefopt.config import Source
from ray_prefopt.data import sources
from ray_prefopt.data.formats import Skipped
from ray_prefopt.data.rows import Chunk, InputFile, Lane, copies, parse, read_chunks
from ray_prefopt.data.sources import expand, lanes
from ray_prefopt.errors import DataError

ROWS = [
    {"prompt": "2024-01-01", "chosen": "1.50", "rejected": "123456789012345678901234567890"},
    {
        "prompt": "  spaces\tand\ttabs  ",
        "chosen": 'quotes " and, commas',
        "rejected": "line\nbreaks\r\nof two kinds",
    },
    {"prompt": "null", "chosen": "true", "rejected": "NaN"},
    {"prompt": "你好 🙂", "chosen": "\u2028 is no line break", "rejected": "Straße \x00 \x7f"},
    {"prompt": "", "chosen": "007", "rejected": "1e5"},
]
"""Text that looks like something else."""


def chunks_of(*given: Source, rows: int = 1000, **columns: Any) -> list[Chunk]:
    return [chunk for lane in lanes(given, columns) for chunk in read_chunks(lane, rows=rows)]


def rows_of(*given: Source, rows: int = 1000, **columns: Any) -> list[Any]:
    return [parse(row) for chunk in chunks_of(*given, rows=rows, **columns) for row in chunk.rows]


def reasons_of(path: Path) -> list[str | None]:
    """Per row: why it was skipped, or None."""
    return [row.reason if isinstance(row, Skipped) else None for row in rows_of(Source(path=str(path)))]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def csv_bytes(rows: list[dict[str, str]], **how: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], **how)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet_bytes(rows: list[dict[str, Any]], **how: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **how)
    return buffer.getvalue()


def ipc_bytes(rows: list[dict[str, Any]], new: Any) -> bytes:
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return buffer.getvalue()


FILES = {
    "rows.jsonl": jsonl(ROWS),
    "rows.ndjson": jsonl(ROWS).removesuffix(b"\n"),
    "UPPER.JSONL": jsonl(ROWS),
    "crlf.jsonl": jsonl(ROWS).replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(ROWS),
    "blank-lines.jsonl": b"\n" + jsonl(ROWS).replace(b"\n", b"\n \t\n\n"),
    "escaped.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in ROWS),
    "rows.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "two-members.jsonl.gz": gzip.compress(jsonl(ROWS[:2])) + gzip.compress(jsonl(ROWS[2:])),
    "rows.jsonl.bz2": bz2.compress(jsonl(ROWS)),
    "rows.jsonl.zst": pa.compress(jsonl(ROWS), codec="zstd", asbytes=True),
    "array.json": b" \n" + json.dumps(ROWS, ensure_ascii=False, indent=2).encode() + b"\n",
    "array.json.gz": gzip.compress(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "lines.json": jsonl(ROWS),
    "rows.csv": csv_bytes(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + csv_bytes(ROWS),
    "unix.csv": csv_bytes(ROWS, lineterminator="\n", quoting=csv.QUOTE_ALL),
    "rows.csv.gz": gzip.compress(csv_bytes(ROWS)),
    "rows.tsv": csv_bytes(ROWS, delimiter="\t"),
    "rows.parquet": parquet_bytes(ROWS),
    "groups.parquet": parquet_bytes(ROWS, row_group_size=2, compression="zstd"),
    "stream.arrow": ipc_bytes(ROWS, pa.ipc.new_stream),
    "file.arrow": ipc_bytes(ROWS, pa.ipc.new_file),
}


@pytest.mark.parametrize("rows", [1000, 2])
@pytest.mark.parametrize("name", FILES)
def test_text_arrives_as_it_was_written(tmp_path: Path, name: str, rows: int) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert rows_of(Source(path=str(tmp_path / name)), rows=rows) == ROWS


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(ROWS[0], st.text())), min_size=1), st.integers(1, 5))
def test_any_text_survives_every_format(tmp_path_factory: Any, rows: list[dict[str, str]], size: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name, data in {
        "a.jsonl": jsonl(rows),
        "a.json": json.dumps(rows).encode(),
        "a.csv": csv_bytes(rows),
        "a.parquet": parquet_bytes(rows),
    }.items():
        (folder / name).write_bytes(data)
        assert rows_of(Source(path=str(folder / name)), rows=size) == rows


@given(st.binary(), st.sampled_from(["a.jsonl", "a.csv", "a.json", "a.parquet", "a.arrow", "a.jsonl.gz"]))
def test_no_bytes_crash_a_reader(tmp_path_factory: Any, data: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    refusal, rows = "", []
    try:
        rows = rows_of(Source(path=str(path)))
    except DataError as error:
        refusal = str(error)
    assert all(isinstance(row, dict | Skipped) for row in rows)
    assert not refusal or name in refusal


# --- bad rows ---

GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}'
NASTY = {
    "not JSON": (b"{chosen: a}", "malformed_json"),
    "truncated": (GOOD[:-5], "malformed_json"),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', "malformed_json"),
    "duplicate key": (b'{"chosen": "a", "chosen": "b"}', "malformed_json"),
    "inner duplicate key": (b'{"chosen": [{"role": "user", "role": "tool"}]}', "malformed_json"),
    "array": (b'["a", "b"]', "malformed_json"),
    "text": (b'"a"', "malformed_json"),
    "number": (b"1", "malformed_json"),
    "null": (b"null", "malformed_json"),
    "two objects": (GOOD + GOOD, "malformed_json"),
    "too deep": (b"[" * 100_000, "malformed_json"),
    "too long a number": (b'{"n": ' + b"1" * 5000 + b"}", "malformed_json"),
    "NaN in another column": (b'{"score": NaN, "chosen": "a"}', None),
    "30 digits": (b'{"chosen": 123456789012345678901234567890}', None),
    "lone surrogate": (b'{"chosen": "\\ud800"}', None),
    "null column": (b'{"chosen": null}', None),
}
"""Lines and why they are no row; None where to_pair is the judge."""


@pytest.mark.parametrize("name", NASTY)
def test_a_bad_line_costs_itself_only(tmp_path: Path, name: str) -> None:
    line, reason = NASTY[name]
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    assert reasons_of(tmp_path / "a.jsonl") == [None, reason, None]


def test_large_numbers_stay_exact() -> None:
    assert parse(b'{"chosen": 123456789012345678901234567890}') == {"chosen": 123456789012345678901234567890}


def test_what_a_bad_line_was_is_said() -> None:
    assert parse(b'{"a": 1, "a": 2}') == Skipped("malformed_json", "duplicate key 'a'")
    assert parse(b"[1]") == Skipped("malformed_json", "a row is an object; got [1]")


def test_bad_elements_of_an_array_cost_themselves_only(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, 3, {"a": 1, "a": 2}, {"a": "\xff"}, {"a": 2}]')
    reasons = reasons_of(tmp_path / "a.json")
    assert reasons == [None, "malformed_json", "malformed_json", "malformed_json", None]


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1},,]', "[tru]", "["])
def test_a_broken_array_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(
        DataError, match=r"a\.json is not a JSON array: .*; repair it, or write one object per line"
    ):
        rows_of(Source(path=str(tmp_path / "a.json")))


@pytest.mark.parametrize("text", ['[{"a": 1}]\n[{"a": 2}]\n', '[{"a": 1}] ]'])
def test_what_comes_after_an_array_is_not_lost(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(
        DataError, match=r"a\.json goes on after its JSON array, at character 1[01]: .*; make it one"
    ):
        rows_of(Source(path=str(tmp_path / "a.json")))


def test_bad_csv_records_cost_themselves_only(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'chosen,rejected\na,b\nonly one\na,b,c\n"x"y,b\n\na,\xff\n"last\n1,2')
    assert rows_of(Source(path=str(path))) == [
        {"chosen": "a", "rejected": "b"},
        Skipped("malformed_csv", "1 fields under a header of 2"),
        Skipped("malformed_csv", "3 fields under a header of 2"),
        Skipped("malformed_csv", "',' expected after '\"'"),
        {"chosen": "a", "rejected": "\udcff"},
        Skipped("malformed_csv", "unexpected end of data"),
        Skipped("malformed_csv", "taken for a part of the record that begins in line 8"),
    ]


def test_lines_after_a_quote_that_is_not_closed_are_counted(tmp_path: Path) -> None:
    """None of them is a row that nobody hears of; a quoted field of several lines is one."""
    path = tmp_path / "a.tsv"
    path.write_text('chosen\trejected\na\t"b\nb"\n"c\td\n' + "e\tf\n" * 4 + '"g\th\n' + "i\tj\n" * 3)
    assert rows_of(Source(path=str(path)))[0] == {"chosen": "a", "rejected": "b\nb"}
    assert reasons_of(path) == [None, *["malformed_csv"] * 6, *[None] * 3]


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("chosen,rejected\n" + "x" * 200_000 + ",b\n")
    assert len(rows_of(Source(path=str(tmp_path / "a.csv")))[0]["chosen"]) == 200_000


def test_a_csv_header_has_each_name_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("chosen,chosen\na,b\n")
    with pytest.raises(
        DataError, match=r"a\.csv has two columns of one name; got \['chosen', 'chosen'\]: rename one"
    ):
        rows_of(Source(path=str(tmp_path / "a.csv")))


def test_text_in_parquet_that_is_no_utf8_costs_itself_only(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"a\xff\xfeb")]
    )
    pq.write_table(pa.table({"chosen": broken}), tmp_path / "a.parquet")
    good, bad, last = rows_of(Source(path=str(tmp_path / "a.parquet")))
    assert (good, bad.reason, last) == ({"chosen": "a"}, "malformed_row", {"chosen": "b"})


# --- columns of Arrow ---


def test_conversations_and_nulls_in_parquet(tmp_path: Path) -> None:
    rows = [{"chosen": [{"role": "user", "content": "hi"}], "score": 0.5}, {"chosen": None, "score": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert rows_of(Source(path=str(tmp_path / "a.parquet"))) == rows


def test_columns_of_other_kinds_are_left_where_they_are(tmp_path: Path) -> None:
    beyond = pa.array([2**62], pa.timestamp("us"))  # no datetime of Python can hold it
    image = pa.array([b"png"], pa.binary())
    pq.write_table(pa.table({"chosen": ["a"], "when": beyond, "image": image}), tmp_path / "a.parquet")
    assert rows_of(Source(path=str(tmp_path / "a.parquet"))) == [{"chosen": "a"}]


def test_a_pair_column_of_another_kind_is_judged_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"chosen": pa.array([datetime.date(2024, 1, 1)])}), tmp_path / "a.parquet")
    assert rows_of(Source(path=str(tmp_path / "a.parquet"))) == [{"chosen": datetime.date(2024, 1, 1)}]


class _Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("column", "mapped"), [("chosen", {}), ("better", {"chosen": "better"}), ("other", {})]
)
def test_a_column_that_unpickles_runs_no_code(
    tmp_path: Path, suffix: str, column: str, mapped: dict[str, str]
) -> None:
    import ray.data  # registers the type  # noqa: F401
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    payload = pa.array([pickle.dumps(_Payload(tmp_path / "ran"))], pa.large_binary())
    evil = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), payload)
    table = pa.table({column: evil, "rejected": ["b"]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)

    if column == "other":
        assert rows_of(Source(path=str(path))) == [{"rejected": "b"}]
    else:
        with pytest.raises(
            DataError, match=f"column '{column}' of .*a.{suffix} has type .* may run code: write it as"
        ):
            rows_of(Source(path=str(path)), **mapped)
    assert not (tmp_path / "ran").exists()


def test_arrow_columns_have_each_name_once(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["chosen", "chosen"])
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"a\.arrow has two columns named 'chosen': rename one of them"):
        rows_of(Source(path=str(tmp_path / "a.arrow")))


# --- files that cannot be read ---


@pytest.mark.parametrize(
    ("name", "data", "format_name"),
    [
        ("half.jsonl.gz", gzip.compress(jsonl(ROWS * 100), mtime=0)[:100], "gzip jsonl"),
        ("not.jsonl.gz", jsonl(ROWS), "gzip jsonl"),
        ("half.jsonl.zst", pa.compress(jsonl(ROWS * 100), codec="zstd", asbytes=True)[:100], "zstd jsonl"),
        ("half.parquet", parquet_bytes(ROWS)[:200], "parquet"),
        ("not.parquet", jsonl(ROWS), "parquet"),
        ("not.arrow", jsonl(ROWS), "arrow"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    tmp_path: Path, name: str, data: bytes, format_name: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        DataError, match=f"{name} cannot be read as {format_name}: .*; check that it is whole"
    ):
        rows_of(Source(path=str(tmp_path / name)))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (lane,) = lanes([Source(path=str(tmp_path / "a.jsonl"))], {})
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read as jsonl"):
        list(read_chunks(lane, rows=10))


# --- which files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl.gz", "c.parquet"):
        (tmp_path / name).write_bytes(FILES[f"rows.{name.partition('.')[2]}"])
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    (tmp_path / "_tmp.jsonl").write_text("{}")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "d.jsonl").write_bytes(FILES["rows.jsonl"])
    return tmp_path


def names_of(**source: Any) -> list[str]:
    return [Path(file.path).name for file in expand(Source(**source))]


def test_a_folder_is_its_data_files_by_name(folder: Path) -> None:
    assert names_of(path=str(folder)) == ["a.jsonl.gz", "b.jsonl", "c.parquet"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl*", ["_tmp.jsonl", "a.jsonl.gz", "b.jsonl"]),
        ("[ab].jsonl*", ["a.jsonl.gz", "b.jsonl"]),
        ("*.parquet", ["c.parquet"]),
        ("**/d.jsonl", ["d.jsonl"]),
    ],
)
def test_a_glob_is_the_files_it_matches(folder: Path, pattern: str, names: list[str]) -> None:
    assert names_of(path=f"{folder}/{pattern}") == names


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(GOOD)
    assert rows_of(Source(path=str(tmp_path / "a[1].jsonl"))) == [json.loads(GOOD)]


def test_another_storage_is_named_by_its_uri() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/pairs/a.jsonl", jsonl(ROWS))
    assert [file.path for file in expand(Source(path="memory://pairs/*.jsonl"))] == [
        "memory:///pairs/a.jsonl"
    ]
    assert rows_of(Source(path="memory://pairs")) == ROWS


def test_a_changed_file_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    (before,) = expand(Source(path=str(path)))
    os.utime(path, (1, 1))
    (touched,) = expand(Source(path=str(path)))
    assert before.stamp != touched.stamp == (str(len(GOOD)), "mtime 1.0")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "missing.jsonl",
            r"missing\.jsonl does not exist: data paths are files, globs, folders, URIs, or org/name",
        ),
        ("missing/*.jsonl", r"no file matches .*missing/\*\.jsonl: check the pattern"),
        ("README.md", r"README\.md has no suffix that says how to read it: need one of \.jsonl, .*\.gz"),
        ("empty.jsonl", r"empty\.jsonl is empty: 1 file\(s\) of 0 bytes; need at least one preference pair"),
        ("nothing", r"the folder .*nothing has no data file: need one of \.jsonl"),
        (
            "x.parquet.gz",
            r"x\.parquet\.gz is compressed from outside: decompress it, as parquet compresses inside",
        ),
    ],
)
def test_paths_that_lead_to_no_rows(folder: Path, path: str, message: str) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "nothing").mkdir()
    (folder / "x.parquet.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        expand(Source(path=str(folder / path)))


def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"no storage for nosuch://bucket/a\.jsonl: .*; install its fsspec package"
    ):
        expand(Source(path="nosuch://bucket/a.jsonl"))


def test_an_empty_shard_is_no_harm(folder: Path) -> None:
    (folder / "aa.jsonl").touch()
    assert len(rows_of(Source(path=str(folder / "[ab]*.jsonl")))) == len(ROWS)


def test_linked_files_are_files(folder: Path, tmp_path: Path) -> None:
    """As all files are in the cache of the Hub."""
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "linked.jsonl").symlink_to(folder / "b.jsonl")
    (tmp_path / "links" / "gone.jsonl").symlink_to(folder / "nothing.jsonl")
    assert names_of(path=str(tmp_path / "links")) == ["linked.jsonl"]


@pytest.mark.parametrize(
    ("name", "held_out"),
    [("train-00000", "test-00000"), ("pairs", "held_out"), ("pairs", "Evaluation"), ("pairs", "tests")],
)
def test_held_out_files_are_not_trained_on(name: str, held_out: str, tmp_path: Path) -> None:
    for each in (name, held_out):
        (tmp_path / f"{each}.jsonl").write_bytes(GOOD)
    with pytest.raises(
        DataError, match=rf"has held-out files beside others \({held_out}\.jsonl, {name}.*train\*"
    ):
        expand(Source(path=str(tmp_path)))
    assert names_of(path=f"{tmp_path}/{name[:5]}*") == [f"{name}.jsonl"]
    (tmp_path / f"{name}.jsonl").unlink()
    assert names_of(path=str(tmp_path)) == [f"{held_out}.jsonl"]


def test_a_file_inside_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("pairs.jsonl", GOOD)
    for path in ("pairs.jsonl", "*.jsonl", ""):
        assert rows_of(Source(path=f"zip://{path}::{tmp_path}/a.zip")) == [json.loads(GOOD)]


def test_another_archive_of_the_same_sizes_is_another_source(tmp_path: Path) -> None:
    source = Source(path=f"zip://pairs.jsonl::{tmp_path}/a.zip")
    stamps = []
    for second in (1, 2):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("pairs.jsonl", GOOD)
        os.utime(tmp_path / "a.zip", (second, second))
        stamps += [file.stamp for file in expand(source)]
    assert stamps[0] != stamps[1]


def test_maps_beside_pairs_are_no_harm(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    turns = [[{"role": "assistant", "content": "a"}]]
    table = pa.table(
        {
            "prompt": ["p"],
            "chosen": pa.array(turns, kind),
            "rejected": pa.array(turns, pa.large_list(kind.value_type)),
            "scores": pa.array([[("a", 1.0)]], pa.map_(pa.string(), pa.float64())),
            "label": pa.array(["x"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = rows_of(Source(path=str(tmp_path / "a.parquet")))
    assert (row["chosen"], row["rejected"], row["label"]) == (turns[0], turns[0], "x")


def test_what_arrow_keeps_as_json_is_read(tmp_path: Path) -> None:
    """`datasets` makes it of values that differ from row to row, such as tools and the arguments of their calls."""
    rows = [
        {
            "tools": [{"name": "f", "parameters": {name: {"type": "string"}}}],
            "chosen": [{"role": "assistant", "tool_calls": [{"arguments": {name: None}}]}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for name in ("city", "date")
    ]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    saved = load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert str(saved.data.schema).count("arrow.json") > 1
    saved.save_to_disk(str(tmp_path / "saved"))
    assert rows_of(Source(path=str(tmp_path / "saved"))) == rows


def test_null_fields_that_arrow_adds_are_gone(tmp_path: Path) -> None:
    """Rows whose tool calls have different arguments; a null in a column of its own stays."""
    rows = [
        {"chosen": [{"role": "assistant", "tool_calls": [{"arguments": {name: 1}}]}], "prompt": None}
        for name in ("city", "sum")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert rows_of(Source(path=str(tmp_path / "a.parquet"))) == rows


@pytest.mark.parametrize("option", ["split", "name", "revision"])
def test_files_have_no_split(tmp_path: Path, option: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(
        DataError, match=r"a\.jsonl is no Hugging Face dataset, so it has no split, name or revision"
    ):
        expand(Source(path=str(tmp_path / "a.jsonl"), **{option: "main"}))


# --- Hugging Face ---


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).select([3, 1]).save_to_disk(tmp_path / "saved", num_shards=2)
    assert rows_of(Source(path=str(tmp_path / "saved"))) == [ROWS[3], ROWS[1]]
    with pytest.raises(
        DataError, match="saved is a saved dataset without splits; got split 'test': leave it out"
    ):
        expand(Source(path=str(tmp_path / "saved"), split="test"))
    with pytest.raises(DataError, match="name and revision are for datasets on the Hub, leave them out"):
        expand(Source(path=str(tmp_path / "saved"), revision="main"))


def test_a_split_of_a_saved_dataset_is_read(tmp_path: Path) -> None:
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert rows_of(Source(path=str(tmp_path / "saved"))) == ROWS
    assert rows_of(Source(path=str(tmp_path / "saved"), split="test")) == ROWS[:1]
    with pytest.raises(DataError, match=r"has no split 'dev': set split to one of \['train', 'test'\]"):
        expand(Source(path=str(tmp_path / "saved"), split="dev"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A Hub with one dataset, `org/pairs`, whose files are local; returns what was asked for."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(jsonl(ROWS[: 1 if split == "test" else None]))
    asked: list[Any] = []

    class Api:
        def dataset_info(self, name: str, *, revision: str | None, timeout: float) -> Any:
            assert timeout <= 10
            asked.append((name, revision))
            if name != "org/pairs":
                raise OSError(f"404: {name}")
            return SimpleNamespace(sha="c0ffee")

    def load_dataset_builder(name: str, config: str | None, *, revision: str) -> Any:
        asked.append((name, config, revision))
        files = {split: [str(tmp_path / f"{split}.jsonl")] for split in ("train", "test")}
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "HfApi", Api)
    monkeypatch.setattr(sources.datasets, "load_dataset_builder", load_dataset_builder)
    return asked


def test_a_hub_dataset_is_read_at_one_commit(hub: list[Any]) -> None:
    assert rows_of(Source(path="org/pairs", revision="main", name="en")) == ROWS
    assert hub == [("org/pairs", "main"), ("org/pairs", "en", "c0ffee")]


@pytest.mark.parametrize("source", [{"path": "org/pairs:test"}, {"path": "org/pairs", "split": "test"}])
def test_the_split_of_a_hub_dataset(hub: list[Any], source: dict[str, str]) -> None:
    assert rows_of(Source(**source)) == ROWS[:1]


def test_hub_datasets_that_are_not_there(hub: list[Any]) -> None:
    with pytest.raises(
        DataError, match=r"org/pairs has no split 'dev': set split to one of \['test', 'train'\]"
    ):
        expand(Source(path="org/pairs:dev"))
    with pytest.raises(
        DataError, match=r"org/none is no local path, .*404: org/none.*: check its path, `name` \(one"
    ):
        expand(Source(path="org/none"))


def test_offline_the_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    cached = load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda *_, **__: cached)
    assert len(rows_of(Source(path="org/pairs"))) == len(ROWS)


def test_offline_a_dataset_that_is_not_cached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"org/none is no local path, and as a dataset on the Hub it cannot be loaded"
    ):
        expand(Source(path="org/none"))


# --- chunks, limits and weights ---


def test_a_chunk_knows_where_its_rows_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD, b"", GOOD, GOOD, b" ", b"bad"]))
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    chunks = chunks_of(Source(path=str(tmp_path), rows=5), rows=3)
    assert [(Path(chunk.file).name, chunk.key, chunk.first_row, chunk.numbers) for chunk in chunks] == [
        ("a.jsonl", (0, 0, 0), 0, [1, 3, 4]),
        ("a.jsonl", (0, 0, 1), 3, [6]),
        ("b.jsonl", (0, 0, 2), 4, [1]),
    ]


def test_files_are_read_side_by_side_unless_rows_are_counted(folder: Path) -> None:
    assert [len(lane.files) for lane in lanes([Source(path=str(folder))], {})] == [1, 1, 1]
    assert [len(lane.files) for lane in lanes([Source(path=str(folder), weight=3)], {})] == [1, 1, 1]
    assert [len(lane.files) for lane in lanes([Source(path=str(folder), weight=0.5)], {})] == [3]
    assert [len(lane.files) for lane in lanes([Source(path=str(folder), rows=7)], {})] == [3]


@pytest.mark.parametrize(("limit", "found"), [(1, 1), (5, 5), (6, 6), (12, 12), (15, 15), (99, 15)])
@pytest.mark.parametrize("rows", [2, 1000])
def test_a_limit_counts_over_files(folder: Path, limit: int, found: int, rows: int) -> None:
    assert rows_of(Source(path=str(folder), rows=limit), rows=rows) == (ROWS * 3)[:found]


def test_a_chunk_of_long_lines_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_prefopt.data.rows.CHUNK_BYTES", 2 * len(GOOD))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD] * 5))
    assert [len(chunk.rows) for chunk in chunks_of(Source(path=str(tmp_path / "a.jsonl")))] == [2, 2, 1]


@given(st.integers(0, 300), st.floats(0.01, 5.0))
def test_weights_take_an_exact_share(rows: int, weight: float) -> None:
    times = [copies(row, weight) for row in range(rows)]
    assert sum(times) == int(rows * weight)
    assert set(times) <= {int(weight), int(weight) + 1}


def test_a_lane_can_be_sent() -> None:
    lane = Lane(0, 1, (InputFile("a.jsonl", "jsonl", None, ("1", "mtime 1")),), None, frozenset({"chosen"}))
    assert pickle.loads(pickle.dumps(lane)) == lane
