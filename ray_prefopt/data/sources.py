"""Which files a source means: paths, globs, folders, URIs, saved datasets, and datasets on the Hub."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import datasets
from fsspec import AbstractFileSystem
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.core import url_to_fs
from huggingface_hub import HfApi, constants

from ray_prefopt.config import Source
from ray_prefopt.data.rows import InputFile, Lane
from ray_prefopt.errors import DataError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
CONTENT_MARKS = (
    *("ETag", "etag", "md5Hash", "content_md5", "blob_id"),
    *("mtime", "LastModified", "last_modified", "created"),
)
"""What storages call a hash of the content, or the time it was written; the first that is known is used."""
HELD_OUT = re.compile(
    r"(^|[/._-])(tests?|eval(uation)?|validation|valid|val|dev|holdout|held[_-]?out)([._-]|$)", re.IGNORECASE
)
HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<split>\w[\w.-]*))?")

PairColumn = Literal["prompt", "chosen", "rejected"]
PAIR_COLUMNS: tuple[PairColumn, ...] = get_args(PairColumn)


def lanes(sources: Sequence[Source], columns: Mapping[PairColumn, str]) -> list[Lane]:
    """What is read side by side: each file by itself, or a whole source where its rows have to be counted.

    `columns` maps prompt/chosen/rejected to the files' own names.
    """
    names = frozenset(columns.get(ours, ours) for ours in PAIR_COLUMNS)
    result = []
    for number, source in enumerate(sources):
        files = tuple(expand(source))
        counted = source.rows is not None or not float(source.weight).is_integer()
        groups = [files] if counted else [(file,) for file in files]
        result += [Lane(number, index, group, source.rows, names) for index, group in enumerate(groups)]
    return result


def expand(source: Source) -> list[InputFile]:
    """The files of a source, sorted by name: a path, glob, folder, URI, saved dataset, or dataset on the Hub.

    Raises DataError when there are none, or none that can be read.
    """
    path = source.path
    fs, local = _filesystem(path)
    is_glob = any(character in path for character in "*?[") and not fs.exists(local)
    if not is_glob and not fs.exists(local):
        hub = HUB_ID.fullmatch(path)
        if hub and not _format(path):
            return _hub_files(source, hub["id"], hub["split"] or source.split or "train")
        raise DataError(
            f"{path} does not exist: data paths are files, globs, folders, URIs, or org/name on the Hub"
        )
    if fs.isdir(local):
        if fs.exists(f"{local}/state.json") or fs.exists(f"{local}/dataset_dict.json"):
            return _saved_files(fs, local, source)
        found = _folder_files(fs, local, path)
    elif is_glob:
        found = sorted(name for name in fs.glob(local) if fs.isfile(name) and not _base(name).startswith("."))
        if not found:
            raise DataError(f"no file matches {path}: check the pattern, or name a folder or file")
    else:
        found = [local]
    _refuse_split(source)
    files = [_input_file(fs, name) for name in found]
    if isinstance(fs, AbstractArchiveFileSystem):  # what a member's own stamp says may stay when it changes
        archive = path.partition("::")[2]
        mark = _stamp(*_filesystem(archive))
        files = [replace(file, path=f"{file.path}::{archive}", stamp=(*file.stamp, *mark)) for file in files]
    elif "::" in path and found == [local]:  # a chain of storages, of which the file's own name is a part
        files = [replace(files[0], path=path)]
    return _non_empty(files, path)


def _filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, local = url_to_fs(path)
    except (ValueError, ImportError) as error:  # a protocol that is unknown, or needs a package
        raise DataError(
            f"no storage for {path}: {error}; install its fsspec package, or use another path"
        ) from None
    fs.invalidate_cache()  # what was listed before may have changed
    return fs, local


def _format(path: str) -> str | None:
    """Format by suffix.

    >>> _format("pairs.jsonl.gz"), _format("org/name-v1.1")
    ('jsonl', None)
    """
    path = path.lower()
    stem = next((path.removesuffix(end) for end in COMPRESSIONS if path.endswith(end)), path)
    return next((FORMATS[end] for end in FORMATS if stem.endswith(end)), None)


def _input_file(fs: AbstractFileSystem, name: str) -> InputFile:
    kind = _format(name)
    if kind is None:
        raise DataError(
            f"{name} has no suffix that says how to read it: need one of {', '.join(FORMATS)}, and for text files "
            f"perhaps {', '.join(COMPRESSIONS)} after it"
        )
    compression = next((COMPRESSIONS[end] for end in COMPRESSIONS if name.lower().endswith(end)), None)
    if compression and kind in ("parquet", "arrow"):
        raise DataError(f"{name} is compressed from outside: decompress it, as {kind} compresses inside")
    return InputFile(_uri(fs, name), kind, compression, _stamp(fs, name))


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _uri(fs: AbstractFileSystem, name: str) -> str:
    return name if "file" in fs.protocol else str(fs.unstrip_protocol(name))


def _stamp(fs: AbstractFileSystem, name: str) -> tuple[str, ...]:
    """Size, and the best that the storage knows about the content."""
    info = fs.info(name)
    mark = next((f"{key} {info[key]}" for key in CONTENT_MARKS if info.get(key) is not None), "")
    return str(info.get("size")), mark


def _non_empty(files: list[InputFile], path: str) -> list[InputFile]:
    """All files, unless none of them has content."""
    if all(file.stamp[0] == "0" for file in files):
        raise DataError(
            f"{path} is empty: {len(files)} file(s) of 0 bytes; need at least one preference pair"
        )
    return files


def _refuse_split(source: Source) -> None:
    if source.split or source.name or source.revision:
        raise DataError(
            f"{source.path} is no Hugging Face dataset, so it has no split, name or revision: leave them out, "
            "and name the files of the split"
        )


def _folder_files(fs: AbstractFileSystem, local: str, path: str) -> list[str]:
    """Files with rows directly in a folder; others, such as README.md, are passed over."""
    names = sorted(  # of links fsspec says neither
        info["name"]
        for info in fs.ls(local, detail=True)
        if info["type"] == "file" or (info["type"] != "directory" and fs.isfile(info["name"]))
    )
    names = [name for name in names if _format(name) and not _base(name).startswith((".", "_"))]
    if not names:
        raise DataError(
            f"the folder {path} has no data file: need one of {', '.join(FORMATS)} directly in it"
        )
    held_out = [name for name in names if HELD_OUT.search(name.removeprefix(local))]
    others = [name for name in names if name not in held_out]
    if held_out and others:
        raise DataError(
            f"the folder {path} has held-out files beside others ({_base(held_out[0])}, {_base(others[0])}): "
            f"name the files, or a glob such as {path.rstrip('/')}/train*"
        )
    return names


def _saved_files(fs: AbstractFileSystem, local: str, source: Source) -> list[InputFile]:
    """The Arrow files of a folder written by `save_to_disk`."""
    if source.name or source.revision:
        raise DataError(
            f"{source.path} is a saved dataset: name and revision are for datasets on the Hub, leave them out"
        )
    if fs.exists(f"{local}/dataset_dict.json"):
        splits = json.loads(fs.cat_file(f"{local}/dataset_dict.json"))["splits"]
        split = source.split or "train"
        if split not in splits:
            raise DataError(f"{source.path} has no split {split!r}: set split to one of {splits}")
        local = f"{local}/{split}"
    elif source.split:
        raise DataError(
            f"{source.path} is a saved dataset without splits; got split {source.split!r}: leave it out"
        )
    names = [entry["filename"] for entry in json.loads(fs.cat_file(f"{local}/state.json"))["_data_files"]]
    return _non_empty([_input_file(fs, f"{local}/{name}") for name in names], source.path)


def _hub_files(source: Source, name: str, split: str) -> list[InputFile]:
    """The files of a split on the Hub at the commit that `revision` means now, read from there by every task.

    With HF_HUB_OFFLINE set: what `datasets` has in its cache.
    """
    try:
        if constants.HF_HUB_OFFLINE:
            cached = datasets.load_dataset(name, source.name, split=split, revision=source.revision)
            paths = [entry["filename"] for entry in cached.cache_files]
        else:
            commit = HfApi().dataset_info(name, revision=source.revision, timeout=10).sha
            builder = datasets.load_dataset_builder(name, source.name, revision=commit)
            splits = {str(key): files for key, files in (builder.config.data_files or {}).items()}
            if split not in splits:
                raise DataError(f"{name} has no split {split!r}: set split to one of {sorted(splits)}")
            paths = list(map(str, splits[split]))
    except DataError:
        raise
    except Exception as error:  # of huggingface_hub, httpx and datasets: no common base
        raise DataError(
            f"{source.path} is no local path, and as a dataset on the Hub it cannot be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}): check its path, `name` (one of its "
            "configurations), your token, or the network (HF_HUB_OFFLINE=1 reads what was downloaded before)"
        ) from error
    return [_input_file(*url_to_fs(path)) for path in paths]
