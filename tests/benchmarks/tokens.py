"""Speed of tokenization: prepared blocks, beside `tokenizers.encode_batch` and the three maps of TRL's CPOTrainer.

What counts are the tokens of prompt, chosen and rejected, each encoded once, over seconds. Every measurement is a
process of its own; the arms take turns, and what is reported are medians of the ratios of neighbours. An arm whose ids
are not those of TRL reports nothing.

    python -m tests.benchmarks.tokens --quick
    python -m tests.benchmarks.tokens --repeats 5 --out tokens.json
    python -m tests.benchmarks.tokens --pairs my_pairs.jsonl --pairs-count 20000
"""

import argparse
import gzip
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tests.benchmarks.step import PROFILES, in_a_process

ARMS = {
    "raw": "`encode_batch`, a process for each core",
    "blocks": "files to blocks, on Ray Data",
    "trl": "TRL's maps",
    "trl-cores": "TRL's maps, `num_proc` the cores",
    "raw-1": "`encode_batch`, one process",
    "pairs-1": "`tokenize_pairs`, one process",
}
SHARE = {"trl": 0.2, "trl-cores": 0.4, "raw-1": 0.5, "pairs-1": 0.5}
"""Of the pairs that an arm is given; the slower ones get fewer."""
RATIOS = {"blocks": ("raw", "trl", "trl-cores"), "pairs-1": ("raw-1",), "trl-cores": ("trl",)}
"""What an arm is compared with."""
VOCABULARY = 16_384
BATCH = 1000
"""Pairs of a batch of `encode_batch`, and of a block."""
CHECKED = 200
"""Pairs whose ids are compared."""
ROOM = 1_000_000
"""A max_length that cuts nothing."""
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n\n{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
"""As Llama 3's. A turn ends with EOS and nothing after it, as TRL would add another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument(
        "--pairs", help="JSON lines with prompt, chosen and rejected, instead of made-up ones"
    )
    parser.add_argument(
        "--pairs-count", type=int, default=12_000, help="rows of a file; those of --pairs recur"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="chats, 4,000 pairs, one repeat")
    parser.add_argument("--out", help="where the measurements go as JSON")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        job = json.loads(given.arm)
        json.dump(MEASURES[job["arm"]](job), sys.stdout)
        return
    if given.quick:
        given.profiles, given.pairs_count, given.repeats = ["chat"], 4_000, 1
    measurements = []
    for profile in ["pairs"] if given.pairs else given.profiles:
        with tempfile.TemporaryDirectory() as folder:
            job = {"folder": folder, "profile": profile, "cores": given.cores, "count": given.pairs_count}
            job["tokens_per_pair"] = prepare(job, given.pairs)
            for repeat in range(given.repeats):
                for arm in given.arms if repeat % 2 == 0 else reversed(given.arms):
                    found = in_a_process({**job, "arm": arm, "repeat": repeat}, "tests.benchmarks.tokens")
                    measurements.append(found)
                    print(json.dumps(measurements[-1]), file=sys.stderr)
    print(table(measurements))
    if given.out:
        Path(given.out).write_text(json.dumps(measurements, indent=1))


# --- What all arms share ---


def prepare(job: dict[str, Any], pairs: str | None) -> float:
    """A byte-level BPE trained on the texts, and files of pairs as messages; returns the tokens of a pair."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = Path(job["folder"])
    rows = list(_rows(job["profile"], pairs, job["count"]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        (json.dumps(row, ensure_ascii=False).replace("\\n", "\n") for row in rows[:5000]),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", extra_special_tokens=["<|start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    lines = [json.dumps(row) + "\n" for row in islice(cycle(rows), job["count"])]
    for share in {1.0, *SHARE.values()}:
        for part in (share / 2, share):
            _file(job, part).write_text("".join(lines[: round(job["count"] * part)]))
    texts = _texts(tokenizer, lines)
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) / job["count"]


def _rows(profile: str, pairs: str | None, count: int) -> Iterator[dict[str, Any]]:
    """Pairs of a file, or made up of passages from Python's own manual."""
    if pairs:
        with gzip.open(pairs, "rt") if pairs.endswith(".gz") else open(pairs) as file:
            for line in islice(file, count):
                yield {
                    name: value
                    for name, value in json.loads(line).items()
                    if name in ("prompt", "chosen", "rejected")
                }
        return
    from pydoc_data.topics import topics

    import numpy as np

    rng = np.random.default_rng(0)
    words = " ".join(topics.values()).split(" ")
    prompt, completion = PROFILES[profile]

    def message(role: str, median: int) -> dict[str, str]:
        length = int(np.clip(rng.lognormal(np.log(median), 0.5), 4, 8 * median))
        start = rng.integers(len(words) - length)
        return {"role": role, "content": " ".join(words[start : start + length])}

    for _ in range(count):
        yield {
            "prompt": [message("user", prompt)],
            "chosen": [message("assistant", completion)],
            "rejected": [message("assistant", completion)],
        }


def _file(job: dict[str, Any], part: float) -> Path:
    """The file with this part of the pairs."""
    return Path(job["folder"]) / f"{round(job['count'] * part)}.jsonl"


def _texts(tokenizer: Any, lines: list[str]) -> list[str]:
    """Prompt, chosen and rejected of each pair, as the template writes them."""
    return [text for pair in _pairs(tokenizer, lines) for text in (pair.prompt, pair.chosen, pair.rejected)]


def _pairs(tokenizer: Any, lines: list[str]) -> list[Any]:
    from ray_prefopt.data.formats import ChatTemplate, to_pair

    render = ChatTemplate(tokenizer)
    return [
        to_pair(json.loads(line), render, form="auto", columns={}, assistant_header="trl") for line in lines
    ]


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _by_slope(job: dict[str, Any], work: Callable[[Path], object]) -> float:
    """Pairs per second, by what the second half of the pairs takes longer than the first."""
    share = SHARE.get(job["arm"], 1.0)
    half, whole = (_timed(lambda part=part: work(_file(job, part))) for part in (share / 2, share))
    return job["count"] * share / 2 / (whole - half)


def _digest(pairs: Iterator[tuple[list[int], list[int], int, int]]) -> str:
    """Of the ids of both sequences, and of where completions begin, of the first pairs."""
    first = [(list(chosen), list(rejected), *starts) for chosen, rejected, *starts in islice(pairs, CHECKED)]
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()


# --- The arms ---


def _raw(job: dict[str, Any]) -> dict[str, Any]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    processes = 1 if job["arm"] == "raw-1" else job["cores"]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, _meet_at, (barrier,)) as pool:
        seconds = pool.map(_encode, [job] * processes, range(processes), [processes] * processes)
    # The sum of all, so that none is charged for one that something else has slowed down.
    share = job["count"] * SHARE.get(job["arm"], 1.0) / processes
    return {"pairs_per_second": sum(share / each for each in seconds)}


def _meet_at(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _encode(job: dict[str, Any], index: int, processes: int) -> float:
    """Seconds that a process takes for its part of the texts, from when all are ready."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    lines = _file(job, SHARE.get(job["arm"], 1.0)).read_text().splitlines()[index::processes]
    texts = _texts(tokenizer, lines)
    batches = [texts[start : start + 3 * BATCH] for start in range(0, len(texts), 3 * BATCH)]
    backend = tokenizer.backend_tokenizer
    backend.encode_batch(batches[0], add_special_tokens=False)
    _barrier.wait()
    return _timed(lambda: [len(backend.encode_batch(batch, add_special_tokens=False)) for batch in batches])


def _pairs_1(job: dict[str, Any]) -> dict[str, Any]:
    """Of the pairs as texts; `to_pair` and the blocks are not in it."""
    from transformers import AutoTokenizer

    from ray_prefopt.data.tokenization import LengthLimits, tokenize_pairs

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    pairs = _pairs(tokenizer, _file(job, SHARE["pairs-1"]).read_text().splitlines())
    batches = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    limits = LengthLimits(ROOM, None, None, "keep_end")
    first = tokenize_pairs(batches[0], tokenizer, limits)
    seconds = _timed(lambda: [len(tokenize_pairs(batch, tokenizer, limits)) for batch in batches])
    digest = _digest((pair.chosen, pair.rejected, pair.chosen_start, pair.rejected_start) for pair in first)
    return {"pairs_per_second": len(pairs) / seconds, "digest": digest}


def _blocks(job: dict[str, Any]) -> dict[str, Any]:
    """What `ray_prefopt prepare` does. The first run, which starts the workers, is timed by itself."""
    import ray

    from ray_prefopt.config import DataConfig, ModelConfig
    from ray_prefopt.data import prepare as ours
    from ray_prefopt.data.blocks import Blocks, read_block

    model = ModelConfig(from_config={"model_type": "llama"}, tokenizer=job["folder"])
    ray.init(
        "local",
        num_cpus=job["cores"],
        include_dashboard=False,
        object_store_memory=2**30,
        logging_level="ERROR",
        log_to_driver=False,
    )
    with tempfile.TemporaryDirectory() as storage:

        def blocks(file: Path, attempt: str = "") -> Blocks:
            data = DataConfig(train=str(file), max_length=ROOM)
            return ours.prepare(
                data, model, data.train_sources, storage + attempt, progress=False, chunk_rows=BATCH
            )

        half = _file(job, 0.5)
        first = _timed(lambda: blocks(half, "/first"))
        rate = _by_slope(job, blocks)
        digest = _digest(map(tuple, zip(*read_block(blocks(half), 0).to_pydict().values(), strict=True)))
    ray.shutdown()
    return {"pairs_per_second": rate, "digest": digest, "start_seconds": first - job["count"] / 2 / rate}


def _trl(job: dict[str, Any]) -> dict[str, Any]:
    from types import MethodType, SimpleNamespace

    from datasets import Dataset, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    trainer = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=ROOM)
    trainer.build_tokenized_answer = MethodType(CPOTrainer.build_tokenized_answer, trainer)
    tokenize_row = MethodType(CPOTrainer.tokenize_row, trainer)
    processes = job["cores"] if job["arm"] == "trl-cores" else None
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:

        def rows(file: Path) -> Dataset:
            return load_dataset("json", data_files=str(file), split="train", cache_dir=cache)

        def maps(file: Path) -> Dataset:
            given = {"processing_class": tokenizer}
            prompts = loaded[file].map(maybe_extract_prompt, num_proc=processes)
            texts = prompts.map(maybe_apply_chat_template, fn_kwargs=given, num_proc=processes)
            return texts.map(tokenize_row, num_proc=processes)

        share = SHARE[job["arm"]]
        loaded = {file: rows(file) for file in (_file(job, share / 2), _file(job, share))}
        rate = _by_slope(job, maps)
        found = maps(_file(job, share / 2))
        digest = _digest(
            (row["chosen_input_ids"], row["rejected_input_ids"],
             row["chosen_labels"].count(-100), row["rejected_labels"].count(-100))
            for row in found
        )  # fmt: skip
    return {"pairs_per_second": rate, "digest": digest}


MEASURES = {
    "raw": _raw, "raw-1": _raw, "pairs-1": _pairs_1, "blocks": _blocks, "trl": _trl, "trl-cores": _trl,
}  # fmt: skip


# --- What came out ---


def table(measurements: list[dict[str, Any]]) -> str:
    """Of each profile and arm: the median, and its ratio to that of other arms."""
    _check(measurements)
    lines = ["| profile | arm | tokens/s | ratio (range) |", "|---|---|---|---|"]
    for profile in dict.fromkeys(each["profile"] for each in measurements):
        speeds: dict[str, list[float]] = {}
        for each in sorted(measurements, key=lambda each: each["repeat"]):
            if each["profile"] == profile:
                speed = each["pairs_per_second"] * each["tokens_per_pair"]
                speeds.setdefault(each["arm"], []).append(speed)
        for arm in (arm for arm in ARMS if arm in speeds):
            others = [other for other in RATIOS.get(arm, ()) if other in speeds]
            ratios = "; ".join(f"{_ratio(speeds[arm], speeds[other])} of {other}" for other in others)
            speed = statistics.median(speeds[arm])
            lines.append(f"| {profile} | {arm}: {ARMS[arm]} | {speed:,.0f} | {ratios} |")
    return "\n".join(lines)


def _ratio(one: list[float], other: list[float]) -> str:
    ratios = [mine / theirs for mine, theirs in zip(one, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _check(measurements: list[dict[str, Any]]) -> None:
    """All arms of a profile have the same ids."""
    for profile in dict.fromkeys(each["profile"] for each in measurements):
        found = {
            each["arm"]: each["digest"]
            for each in measurements
            if each["profile"] == profile and "digest" in each
        }
        if len(set(found.values())) > 1:
            raise SystemExit(
                f"{profile}: {', '.join(found)} have other ids than each other: no speed is reported"
            )


if __name__ == "__main__":
    main()
