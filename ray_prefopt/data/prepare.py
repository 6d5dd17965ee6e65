"""Rows to blocks, once: Ray Data reads, formats and tokenizes on every CPU of the cluster.

The folder of the blocks is named by a fingerprint of everything they depend on, so epochs, restarts and trials of a
sweep find them there. Pair ids follow the order of sources, files and rows, whatever finishes first.
"""

import hashlib
import json
import logging
import os
import pickle
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
import tokenizers
import transformers
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from ray.data import DataContext, TaskPoolStrategy
from ray.util.debug import log_once
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ray_prefopt.allocator import allocator
from ray_prefopt.config import DataConfig, ModelConfig, Source
from ray_prefopt.data.blocks import (
    BLOCK_SCHEMA,
    FORMAT,
    Blocks,
    Lengths,
    encode,
    file_entry,
    has_blocks,
    open_blocks,
    write,
    write_manifest,
)
from ray_prefopt.data.chunks import Drop, Report, TokenizeJob, read_task, tokenize_task
from ray_prefopt.data.rows import Lane
from ray_prefopt.data.sources import lanes
from ray_prefopt.data.tokenization import LengthLimits
from ray_prefopt.errors import DataError, PrefoptError
from ray_prefopt.model.load import load_architecture
from ray_prefopt.model.tokenizer import load_tokenizer

CHUNK_ROWS = 1000
CPUS_PER_READER = 16
CPUS_PER_TASK = 0.66
"""Less than it uses, so that another is at work while Ray Data, which takes a while, hands out the next."""
NOTE_EVERY_S = 30.0
DEAD_AFTER = timedelta(days=1)
"""Age from which an unfinished attempt at writing blocks is taken for dead."""


def prepare(
    data: DataConfig,
    model: ModelConfig,
    sources: Sequence[Source],
    storage: str,
    *,
    progress: bool = True,
    chunk_rows: int = CHUNK_ROWS,
) -> Blocks:
    """The blocks of these sources, found in `<storage>/blocks/<fingerprint>` or made there.

    Raises DataError when files or columns are missing, or more rows than data.max_bad_fraction are unusable,
    ModelError when there is no tokenizer, and ResourceError when the storage cannot be written.
    """
    console = Console(stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True)
    preparation = _preparation(data, model, sources, storage, chunk_rows)
    if has_blocks(preparation.folder):
        blocks = _found(preparation, data, sources)
        console.print(f"blocks found: {blocks.num_pairs:,} pairs in {preparation.folder}")
        return blocks

    started = time.perf_counter()
    attempt = uuid.uuid4().hex
    job = TokenizeJob(
        folder=preparation.folder,
        attempt=attempt,
        tokenizer=pickle.dumps(preparation.tokenizer),
        limits=length_limits(data),
        form=data.format,
        columns=dict(data.columns.items()),
        assistant_header=data.assistant_header,
        weights=tuple(source.weight for source in sources),
        is_encoder_decoder=preparation.recipe["encoder_decoder"],
    )
    try:
        reports = sorted(
            _watched(_run(preparation.work, job, chunk_rows), console), key=lambda report: report.key
        )
        counts = _counts(reports)
        _refuse_unusable(counts, data.max_bad_fraction, sources)
        manifest = _write_lengths(reports, preparation.folder, attempt) | {
            "format": FORMAT,
            "fingerprint": _fingerprint(preparation.recipe),
            "attempt": attempt,
            "recipe": preparation.recipe,
            "date": date.today().isoformat(),
            "counts": counts,
            "blocks": [report.block for report in reports if report.block],
            "schema": {column.name: str(column.type) for column in BLOCK_SCHEMA},
        }
        if has_blocks(preparation.folder):  # another driver was first, and others may read its blocks already
            _remove(preparation.folder, attempt)
        else:
            write_manifest(preparation.folder, manifest)
    except BaseException:
        _remove(preparation.folder, attempt)
        raise
    blocks = open_blocks(preparation.folder)
    _remove_dead_attempts(preparation.folder, blocks.manifest["attempt"])
    console.print(_summary(counts, time.perf_counter() - started, preparation.folder))
    return blocks


def find_blocks(
    data: DataConfig, model: ModelConfig, sources: Sequence[Source], storage: str
) -> Blocks | None:
    """The blocks that `prepare` would find; None when it would have to make them. Raises as `prepare` does."""
    preparation = _preparation(data, model, sources, storage, CHUNK_ROWS)
    return _found(preparation, data, sources) if has_blocks(preparation.folder) else None


# --- what the blocks depend on ---


@dataclass(frozen=True, slots=True)
class _Preparation:
    """What is to be tokenized by what, and the folder where its blocks belong."""

    tokenizer: PreTrainedTokenizerBase
    work: list[Lane]
    recipe: dict[str, Any]
    folder: str


def _preparation(
    data: DataConfig, model: ModelConfig, sources: Sequence[Source], storage: str, chunk_rows: int
) -> _Preparation:
    if not sources:
        raise DataError(
            "there is nothing to prepare: a list of sources is empty; name a file in data.train or data.eval"
        )
    tokenizer = load_tokenizer(model, data.chat_template)
    work = lanes(sources, data.columns)
    recipe = _recipe(data, sources, work, tokenizer, load_architecture(model), chunk_rows)
    return _Preparation(tokenizer, work, recipe, _blocks_folder(storage, _fingerprint(recipe)))


def _found(preparation: _Preparation, data: DataConfig, sources: Sequence[Source]) -> Blocks:
    """They may have been made when more unusable rows were allowed."""
    blocks = open_blocks(preparation.folder)
    _refuse_unusable(blocks.manifest["counts"], data.max_bad_fraction, sources)
    return blocks


def length_limits(data: DataConfig) -> LengthLimits:
    """The bounds on tokens that a data section sets."""
    return LengthLimits(
        data.max_length, data.max_prompt_length, data.max_completion_length, data.truncation_mode
    )


def _recipe(
    data: DataConfig,
    sources: Sequence[Source],
    work: Sequence[Lane],
    tokenizer: PreTrainedTokenizerBase,
    architecture: PretrainedConfig,
    chunk_rows: int,
) -> dict[str, Any]:
    """Everything that decides what is in the blocks, as JSON."""
    # A template may write today's date. That is not in here: a run that is resumed tomorrow goes on with these pairs.
    return {
        "format": FORMAT,
        "sources": [source.model_dump() for source in sources],
        "files": [[lane.source, file.path, *file.stamp] for lane in work for file in lane.files],
        "chunk_rows": chunk_rows,
        "limits": asdict(length_limits(data)),
        "form": data.format,
        "columns": dict(sorted(data.columns.items())),
        "assistant_header": data.assistant_header,
        "encoder_decoder": architecture.is_encoder_decoder,
        "tokenizer": _sha256(tokenizer.backend_tokenizer.to_str()),
        "empty_target": list(tokenizer(text_target="")["input_ids"]),
        "special_tokens": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "chat_template": _sha256(json.dumps(tokenizer.chat_template)),
        "tokenizers": ".".join(tokenizers.__version__.split(".")[:2]),
        "transformers": transformers.__version__.split(".")[0],
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(recipe: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(recipe, sort_keys=True))[:20]


def _blocks_folder(storage: str, fingerprint: str) -> str:
    fs, path = url_to_fs(storage)
    root = os.path.abspath(path) if isinstance(fs, LocalFileSystem) else storage.rstrip("/")
    return f"{root}/blocks/{fingerprint}"


# --- Ray Data ---


def _run(work: Sequence[Lane], job: TokenizeJob, chunk_rows: int) -> Iterator[Report]:
    """The reports of all chunks as they finish. Raises what a task found wrong."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # each chunk by itself, so that one big file keeps every CPU busy
    readers = 1 + _cluster_cpus() // CPUS_PER_READER
    with DataContext.current(context), _few_words():
        # Reading asks for no CPU: it waits most of the time, and must neither be fused with tokenizing nor block it.
        results = (
            ray.data.from_items(
                [{"lane": pickle.dumps(lane)} for lane in work], override_num_blocks=len(work)
            )
            .flat_map(partial(read_task, rows=chunk_rows), num_cpus=0, compute=TaskPoolStrategy(size=readers))
            .map(
                partial(tokenize_task, job=job),
                num_cpus=CPUS_PER_TASK,
                runtime_env={"env_vars": allocator()},
            )
        )
        for row in results.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, PrefoptError):
                raise result
            yield result


@contextmanager
def _few_words() -> Iterator[None]:
    """Of Ray Data's messages only warnings, less the one that its progress bars are off: there is ours."""
    log_once("ray_data_progress_manager_disabled")
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _cluster_cpus() -> int:
    resources: dict[str, float] = ray.cluster_resources()
    return int(resources.get("CPU", 1))


def _watched(reports: Iterable[Report], console: Console) -> Iterator[Report]:
    """The same reports, with their pairs counted: in place on a terminal, else in a line now and then."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    started = told = time.perf_counter()
    done = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("preparing: starting Ray Data", total=None)
        for report in reports:
            done += len(report.lengths.chosen)
            now = time.perf_counter()
            text = f"preparing: {done:,} pairs, {done / (now - started):,.0f} pairs/s"
            bar.update(task, description=text)
            if not console.is_terminal and now - told >= NOTE_EVERY_S:
                console.print(text)
                told = now
            yield report


# --- the sum of all chunks ---


def _counts(reports: Sequence[Report]) -> dict[str, Any]:
    """Rows in, pairs out, and what lies between; every row taken is a pair or was dropped for a reason."""
    dropped: dict[str, Drop] = {}
    truncated = Counter({"prompt": 0, "chosen": 0, "rejected": 0})
    for report in reports:
        truncated.update(report.truncated)
        for reason, drop in report.dropped.items():
            dropped[reason] = dropped[reason] + drop if reason in dropped else drop
    taken = sum(report.taken for report in reports)
    pairs = sum(len(report.lengths.chosen) for report in reports)
    assert taken == pairs + sum(drop.count for drop in dropped.values())
    return {
        "rows": sum(report.rows for report in reports),
        "taken": taken,
        "pairs": pairs,
        "ties": sum(report.ties for report in reports),
        "dropped": {reason: _as_json(drop) for reason, drop in sorted(dropped.items())},
        "truncated": dict(truncated),
    }


def _as_json(drop: Drop) -> dict[str, Any]:
    return {"count": drop.count, "examples": [{"at": at, "detail": detail} for at, detail in drop.examples]}


def _refuse_unusable(counts: Mapping[str, Any], max_bad_fraction: float, sources: Sequence[Source]) -> None:
    bad, taken = counts["taken"] - counts["pairs"], counts["taken"]
    if counts["pairs"] and bad <= max_bad_fraction * taken:
        return
    if not taken:
        paths = ", ".join(source.path for source in sources)
        raise DataError(
            f"no preference pair in {counts['rows']} rows of {paths}: check the files, and rows and weight"
        )
    reasons = [
        f"\n  {drop['count']} {reason}: "
        + "; ".join(f"{example['at']}: {example['detail']}" for example in drop["examples"])
        for reason, drop in counts["dropped"].items()
    ]
    remedies = ["repair these rows"]
    if counts["dropped"].keys() & {"missing_column", "empty_prompt", "no_prompt"}:
        remedies.insert(0, "set data.columns, as in {prompt: question, chosen: better, rejected: worse}")
    if counts["pairs"]:
        remedies.append("raise data.max_bad_fraction")
    allowed = (
        f"data.max_bad_fraction allows {max_bad_fraction:g} of them" if counts["pairs"] else "no pair is left"
    )
    raise DataError(
        f"{bad} of {taken} rows are unusable, and {allowed}:{''.join(reasons)}\n{', or '.join(remedies)}"
    )


def _write_lengths(reports: Sequence[Report], folder: str, attempt: str) -> dict[str, Any]:
    """The lengths of all pairs as a file of its own, so that planning reads no block."""
    lengths = Lengths.concatenate([report.lengths for report in reports])
    name, data = f"{attempt}/lengths.parquet", encode(lengths.to_table())
    write(folder, name, data)
    spread = {
        "prompt": lengths.chosen_start,
        "chosen": lengths.chosen - lengths.chosen_start,
        "rejected": lengths.rejected - lengths.rejected_start,
        "total": np.maximum(lengths.chosen, lengths.rejected),
    }
    return {
        "lengths": file_entry(name, len(lengths.chosen), data),
        "percentiles": {part: _percentiles(values) for part, values in spread.items()},
    }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    """Lengths that this share of the pairs does not exceed."""
    found = np.percentile(values, [50, 95, 99, 100], method="inverted_cdf")
    return dict(zip(("p50", "p95", "p99", "max"), map(int, found), strict=True))


def _summary(counts: Mapping[str, Any], seconds: float, folder: str) -> str:
    notes = [f"{drop['count']:,} dropped as {reason}" for reason, drop in counts["dropped"].items()]
    notes += [f"{count:,} {part} truncated" for part, count in counts["truncated"].items() if count]
    notes += [f"{counts['ties']:,} ties"] if counts["ties"] else []
    rate = counts["pairs"] / seconds
    return (
        f"prepared {counts['pairs']:,} pairs of {counts['rows']:,} rows in {seconds:.1f} s ({rate:,.0f} pairs/s)"
        f"{''.join(f', {note}' for note in notes)}: {folder}"
    )


# --- attempts that came to nothing ---


def _remove(folder: str, attempt: str) -> None:
    """Remove what an attempt has written, if that can be done: what stays takes space and does no harm."""
    fs, path = url_to_fs(folder)
    with suppress(OSError):
        if fs.exists(f"{path}/{attempt}"):
            fs.rm(f"{path}/{attempt}", recursive=True)


def _remove_dead_attempts(folder: str, living: str) -> None:
    """Remove what attempts have left that wrote nothing for a day; a younger one may be another driver at work."""
    fs, path = url_to_fs(folder)
    with suppress(OSError, NotImplementedError):  # a file gone meanwhile; a storage without times
        for info in fs.ls(path, detail=True):
            attempt = info["name"].rstrip("/").rpartition("/")[2]
            if info["type"] == "directory" and attempt != living:
                newest = max(map(fs.modified, fs.find(info["name"])), default=None)
                if newest is not None and datetime.now(UTC) - newest > DEAD_AFTER:
                    _remove(folder, attempt)
