"""Measures the peak memory of training steps, and compares it with `engine.memory.estimate`.

    python -m tests.benchmarks.memory [NAME ...]

Each configuration runs in fresh processes, one or two ranks of gloo: a tiny model first, after which the memory of the
libraries is there, then the measured one up to its third step. Measured is what its peak has more than that.
"""

import ctypes
import gc
import os
import resource
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.collate import collate, pack
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine.memory import MemoryEstimate, ModelSize, estimate
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, train_worker
from ray_prefopt.training.metrics import Record
from tests.gang import run_gang
from tests.tiny import write_blocks

STEPS = 3
MICRO_BATCHES = 2
"""Of a rank in a step: the second finds the gradients of the first."""
PROMPT, COMPLETION = 64, 96
ROOT = Path(__file__).resolve().parents[2]
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
"""38 million weights."""
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One configuration."""

    name: str
    ranks: int = 1
    stage: int | None = None
    dtype: str = "float32"
    checkpointing: bool = False
    lora: bool = False
    layout: str = "packed"
    pairs: int = 4
    threads: int = 1
    """Two compute micro-batches in halves."""
    model: Mapping[str, int] = field(default_factory=lambda: SMALL)

    def config(self, model: Mapping[str, int]) -> TrainConfig:
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
        shape = {"model_type": "qwen2", "tie_word_embeddings": True, **heads, **model}
        engine = {"kind": "plain"} if self.stage is None else {"kind": "zero", "zero_stage": self.stage}
        return TrainConfig.model_validate(
            {
                "model": {
                    "from_config": shape,
                    "tokenizer": str(ROOT / "examples" / "tokenizer"),
                    "dtype": self.dtype,
                    "gradient_checkpointing": self.checkpointing,
                    "layout": self.layout,
                    **({"lora": {"r": 16}} if self.lora else {}),
                },
                "data": {"train": "unread"},
                "loss": {"kind": "simpo"},
                "engine": engine,
                "run": {
                    "global_batch": MICRO_BATCHES * self.pairs * self.ranks,
                    "micro_batch": self.pairs,
                    "max_steps": STEPS,
                    "cpus_per_worker": self.threads,
                },
            }
        )


CASES = [
    Case("plain, 1 rank"),
    Case("plain, 1 rank, checkpointing", checkpointing=True),
    Case("plain, 1 rank, 16 pairs", pairs=16),
    Case("plain, 1 rank, 16 pairs, checkpointing", pairs=16, checkpointing=True),
    Case("plain, 1 rank, vocabulary of 65536", model=SMALL | {"vocab_size": 65536}),
    Case("plain, 1 rank, in halves", threads=2),
    Case("plain, 1 rank, in halves, checkpointing", threads=2, checkpointing=True),
    Case("plain, 1 rank, LoRA", lora=True),
    Case("plain, 1 rank, padded", layout="padded"),
    Case("plain, 1 rank, padded, vocabulary of 65536", layout="padded", model=SMALL | {"vocab_size": 65536}),
    *(
        Case(f"ZeRO {stage}, 2 ranks{', checkpointing' if again else ''}", 2, stage, checkpointing=again)
        for stage in range(4)
        for again in (False, True)
    ),
    *(Case(f"ZeRO {stage}, 2 ranks, bf16", 2, stage, dtype="bfloat16") for stage in range(4)),
    Case("ZeRO 3, 2 ranks, vocabulary of 65536", 2, 3, model=SMALL | {"vocab_size": 65536}),
]


@dataclass(frozen=True)
class Measured:
    """In bytes."""

    case: Case
    estimate: MemoryEstimate
    peak: int

    @property
    def error(self) -> float:
        return self.estimate.device / self.peak - 1


class StopError(Exception):
    """Ends a run before it saves."""


def _used() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _train(job: Job) -> int:
    """Train until the last step is logged; returns the highest memory that this process ever had."""

    def log(record: Record) -> None:
        if record["step"] == STEPS:
            raise StopError

    try:
        train_worker(job, torch.device("cpu"), Reports(_nothing, log, _nothing, _nothing, _nothing))
    except StopError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    raise AssertionError("the run was not stopped")


def _nothing(_: Any) -> None:
    pass


def _peak(warm_up: Job, job: Job) -> int:
    """What `job` needs on this rank."""
    _train(warm_up)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _used()
    return _train(job) - before


def measure(case: Case, folder: Path) -> Measured:
    pairs = [
        _pair(index, case.model["vocab_size"])
        for index in range(MICRO_BATCHES * case.pairs * case.ranks * STEPS)
    ]
    blocks = write_blocks(folder / "blocks", pairs)
    few = write_blocks(folder / "few", [_pair(index, TINY["vocab_size"]) for index in range(len(pairs))])
    jobs = [
        Job(case.config(model), str(folder / name), 0, data, {})
        for name, model, data in (("tiny", TINY, few), ("run", case.model, blocks))
    ]
    return Measured(case, expected(case), max(run_gang(case.ranks, _peak, *jobs)))


def expected(case: Case) -> MemoryEstimate:
    pairs = [_pair(index, case.model["vocab_size"]) for index in range(case.pairs)]
    packed, padded = pack(pairs), collate(pairs, pad_id=0)
    is_packed = case.layout == "packed"
    return estimate(
        size_of(case),
        tokens=packed.num_tokens if is_packed else padded.num_tokens,
        scored=len(packed.predicts_U if is_packed else padded.targets_S),
        chunked_head=is_packed,
        zero_stage=case.stage,
        world_size=case.ranks,
        is_half=case.dtype != "float32",
        checkpointing=case.checkpointing,
        in_halves=case.threads == 2,
        device="cpu",
    )


def size_of(case: Case) -> ModelSize:
    shape = dict(case.config(case.model).model.from_config or {})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    parameters = model.num_parameters()
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    key_value = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    adapters = (
        16 * layers * (4 * hidden + 2 * (hidden + key_value) + 3 * (hidden + shape["intermediate_size"]))
    )
    return ModelSize(
        parameters, hidden, layers, shape["vocab_size"], shape["intermediate_size"], key_value,
        adapters if case.lora else None,
    )  # fmt: skip


def _pair(seed: int, vocabulary: int) -> TokenizedPair:
    """Of fixed lengths, with ids that differ where the prompt ends."""
    ids = torch.randint(vocabulary, (PROMPT + 2 * COMPLETION,), generator=torch.Generator().manual_seed(seed))
    prompt, chosen, rejected = (
        ids.tolist()[:PROMPT],
        ids.tolist()[PROMPT:-COMPLETION],
        ids.tolist()[-COMPLETION:],
    )
    rejected[0] = (chosen[0] + 1) % vocabulary
    return TokenizedPair(prompt + chosen, prompt + rejected, PROMPT, PROMPT)


def row(found: Measured) -> str:
    part = found.estimate
    parts = (
        part.weights,
        part.gradients,
        part.optimizer,
        part.activations,
        part.head,
        part.working,
        part.reduction,
    )
    cells = [
        *(f"{value / MIB:.0f}" for value in (*parts, part.device, found.peak)),
        f"{100 * found.error:+.0f} %",
    ]
    return f"| {found.case.name} | {' | '.join(cells)} |"


HEAD = """\
| MiB | weights | gradients | optimizer | activations | head | working | reduction | estimate | measured | error |
|---|---|---|---|---|---|---|---|---|---|---|"""


ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
"""Of the ranks: what is freed goes back to the system at once, so that the peak is of what was in use."""


def main(names: list[str]) -> None:
    os.environ |= ENVIRONMENT
    sys.stdout.write(HEAD + "\n")
    for case in CASES:
        if not names or case.name in names:
            with tempfile.TemporaryDirectory() as folder:
                sys.stdout.write(row(measure(case, Path(folder))) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
