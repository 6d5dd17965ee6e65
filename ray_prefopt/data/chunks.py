"""What one tokenizing task does: a chunk of rows becomes a block of pairs, and a report of what became of each row.

Tasks run this module on every CPU, so it imports neither torch nor ray.
"""

import os
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ray_prefopt.data.blocks import Lengths, encode_block, file_entry, write
from ray_prefopt.data.formats import AssistantHeader, ChatTemplate, Form, PreferencePair, Skipped, to_pair
from ray_prefopt.data.rows import Chunk, Row, copies, parse, read_chunks
from ray_prefopt.data.tokenization import LengthLimits, TokenizedPair, tokenize_pairs
from ray_prefopt.errors import PrefoptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 3
"""Rows that the manifest shows for each reason to drop one."""
EXAMPLE_LENGTH = 200


@dataclass(frozen=True, slots=True)
class TokenizeJob:
    """What every tokenizing task is told."""

    folder: str
    attempt: str
    tokenizer: bytes
    """Pickled on the driver, so that nodes need no access to its files, and all use the same."""
    limits: LengthLimits
    form: Form
    columns: Mapping[str, str]
    assistant_header: AssistantHeader
    weights: tuple[float, ...]
    is_encoder_decoder: bool = False


@dataclass(frozen=True, slots=True)
class Drop:
    """How many copies of rows were dropped for one reason, and where the first of them are."""

    count: int
    examples: tuple[tuple[str, str], ...]
    """Place and detail."""

    def __add__(self, other: "Drop") -> "Drop":
        return Drop(self.count + other.count, (self.examples + other.examples)[:EXAMPLES])


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a chunk."""

    key: tuple[int, int, int]
    block: dict[str, Any] | None
    """Its file in the manifest; none when no row was usable."""
    rows: int
    taken: int
    """Rows times their weights."""
    lengths: Lengths
    dropped: dict[str, Drop] = field(default_factory=dict)
    truncated: Counter[str] = field(default_factory=Counter)
    ties: int = 0


# --- what Ray Data maps over rows ---


# An error of ours is a result as well: raised in a task, it would come with the traces of Ray, which hide it.


def read_task(row: Mapping[str, Any], *, rows: int) -> Iterator[dict[str, Any]]:
    """The chunks of a lane, or the error at which they end."""
    try:
        for chunk in read_chunks(pickle.loads(row["lane"]), rows=rows):
            yield {"chunk": pickle.dumps(chunk)}
    except PrefoptError as error:
        yield {"chunk": pickle.dumps(error)}


def tokenize_task(row: Mapping[str, Any], *, job: TokenizeJob) -> dict[str, Any]:
    """The report on a chunk, whose block it writes; or an error, its own or that of reading."""
    chunk = pickle.loads(row["chunk"])
    try:
        result = chunk if isinstance(chunk, PrefoptError) else tokenize_chunk(chunk, job)
    except PrefoptError as error:
        result = error
    return {"result": pickle.dumps(result)}


# --- one chunk ---


def tokenize_chunk(chunk: Chunk, job: TokenizeJob) -> Report:
    """Turn a chunk into a block: pairs in the order of the rows, copies of a row next to each other."""
    tokenizer = _tokenizer(job.tokenizer)
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    weight = job.weights[chunk.source]
    times = [copies(chunk.first_row + index, weight) for index in range(len(chunk.rows))]
    taken = [index for index, count in enumerate(times) if count]
    formatted = {index: _format_row(chunk.rows[index], template, job) for index in taken}
    pairs = {index: pair for index, pair in formatted.items() if isinstance(pair, PreferencePair)}
    results = tokenize_pairs(
        list(pairs.values()), tokenizer, job.limits, is_encoder_decoder=job.is_encoder_decoder
    )
    tokenized = dict(zip(pairs, results, strict=True))

    kept: list[TokenizedPair] = []
    dropped: dict[str, Drop] = {}
    truncated: Counter[str] = Counter()
    ties = 0
    for index in taken:
        result = tokenized.get(index, formatted[index])
        if isinstance(result, TokenizedPair):
            kept += [result] * times[index]
            truncated.update(dict.fromkeys(result.truncated, times[index]))
            ties += times[index] * pairs[index].is_tie
        elif isinstance(result, Skipped):
            drop = Drop(
                times[index], ((f"{chunk.file}:{chunk.numbers[index]}", result.detail[:EXAMPLE_LENGTH]),)
            )
            dropped[result.reason] = dropped[result.reason] + drop if result.reason in dropped else drop
    return Report(
        key=chunk.key,
        block=_write_block(kept, chunk, job) if kept else None,
        rows=len(chunk.rows),
        taken=sum(times),
        lengths=Lengths.of(kept),
        dropped=dropped,
        truncated=truncated,
        ties=ties,
    )


@lru_cache(maxsize=1)
def _tokenizer(pickled: bytes) -> "PreTrainedTokenizerBase":
    """The tokenizer of this process. Its own threads would compete with the other tasks of the node."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer: PreTrainedTokenizerBase = pickle.loads(pickled)
    return tokenizer


def _format_row(row: Row, template: ChatTemplate | None, job: TokenizeJob) -> PreferencePair | Skipped:
    columns = parse(row)
    if isinstance(columns, Skipped):
        return columns
    return to_pair(
        columns,
        template,
        form=job.form,
        columns=job.columns,
        assistant_header=job.assistant_header,
    )


def _write_block(pairs: Sequence[TokenizedPair], chunk: Chunk, job: TokenizeJob) -> dict[str, Any]:
    name = "{}/part-{:03d}-{:05d}-{:06d}.parquet".format(job.attempt, *chunk.key)
    data = encode_block(pairs)
    write(job.folder, name, data)
    return file_entry(name, len(pairs), data)
