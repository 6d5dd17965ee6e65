"""Writes the tables of scaling.md that are computed: `python docs/scaling_tables.py`. A test compares the two."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_prefopt.engine.memory import MemoryEstimate, ModelSize, estimate

PAGE = Path(__file__).with_name("scaling.md")
GIB = 2**30


def qwen(
    hidden: int, layers: int, intermediate: int, key_value: int, vocabulary: int, *, tied: bool
) -> ModelSize:
    """A Qwen2.5 by the numbers of its config.json."""
    attention = 2 * hidden * hidden + 2 * hidden * key_value + hidden + 2 * key_value
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    parameters = layers * layer + hidden + (1 if tied else 2) * vocabulary * hidden
    return ModelSize(parameters, hidden, layers, vocabulary, intermediate, key_value)


MODELS = {
    "0.5B": qwen(896, 24, 4864, 128, 151936, tied=True),
    "1.5B": qwen(1536, 28, 8960, 256, 151936, tied=True),
    "7B": qwen(3584, 28, 18944, 512, 152064, tied=False),
    "14B": qwen(5120, 48, 13824, 1024, 152064, tied=False),
    "32B": qwen(5120, 64, 27648, 1024, 152064, tied=False),
    "72B": qwen(8192, 80, 29568, 1024, 152064, tied=False),
}
"""Qwen2.5, whose sizes cover those of other families."""
GPUS = {"24 GB": 24, "80 GB": 80, "141 GB": 141}
USABLE = 0.9
"""The rest is for CUDA, NCCL and the gaps between tensors."""
PAIR_TOKENS, PAIR_SCORED = 3072, 2048
"""The longest pair where data.max_length is 2048 and max_prompt_length 1024: a prompt and two completions."""
COUNTS = (1, 2, 4, 8, 16, 32, 64)
MICRO = (8, 4, 2, 1)


@dataclass(frozen=True)
class Choice:
    """A way to train a model."""

    gpus: int
    stage: int
    pairs: int

    def __str__(self) -> str:
        return f"{self.gpus} x ZeRO {self.stage}, {self.pairs}"


def needs(size: ModelSize, gpus: int, stage: int, pairs: int, *, offload: bool) -> MemoryEstimate:
    return estimate(
        size,
        tokens=pairs * PAIR_TOKENS,
        scored=pairs * PAIR_SCORED,
        zero_stage=stage,
        world_size=gpus,
        checkpointing=True,
        offload_optimizer=offload,
    )


def fewest(size: ModelSize, gigabytes: int, *, offload: bool) -> Choice | None:
    """The fewest GPUs that do, by the lowest stage that does, with the largest micro-batch."""
    room = USABLE * gigabytes * 1e9
    for gpus in COUNTS:
        for stage in (2, 3):
            for pairs in MICRO:
                if needs(size, gpus, stage, pairs, offload=offload).device <= room:
                    return Choice(gpus, stage, pairs)
    return None


def _table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def fits() -> str:
    def rows() -> Iterator[list[str]]:
        for name, size in MODELS.items():
            for offload in (False, True):
                choices = [fewest(size, memory, offload=offload) for memory in GPUS.values()]
                label = "`engine.offload_optimizer: cpu`" if offload else "all weights"
                yield [name, label, *(str(choice or "-") for choice in choices)]
            adapters = ModelSize(**{**vars(size), "trainable": size.parameters // 200})
            choices = [fewest(adapters, memory, offload=False) for memory in GPUS.values()]
            yield [name, "LoRA, half a percent trained", *(str(choice or "-") for choice in choices)]

    return _table(["model", "", *GPUS], rows())


def parts() -> str:
    def rows() -> Iterator[list[str]]:
        for gpus, stage, offload in (
            (1, 0, False), (8, 0, False), (8, 1, False), (8, 2, False), (8, 3, False),
            (64, 2, False), (64, 3, False), (1, 2, True), (8, 2, True),
        ):  # fmt: skip
            found = needs(MODELS["7B"], gpus, stage, 2, offload=offload)
            values = (
                found.weights, found.gradients, found.optimizer, found.activations, found.head, found.working,
                found.device, found.host,
            )  # fmt: skip
            label = f"{gpus} x ZeRO {stage}{', offloaded' if offload else ''}"
            yield [label, *(f"{value / GIB:.1f}" for value in values)]

    head = [
        "7B, 2 pairs, GiB",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "head",
        "working",
        "sum",
        "host",
    ]
    return _table(head, rows())


PEAK = {"A100": 312e12, "H100": 989e12}
"""Dense bf16 operations per second, by NVIDIA's data sheets."""
UTILISATION = 0.4
"""Share of it that training gets at best (published for DPO of 7B models: 0.22 to 0.40)."""


def bandwidth(tokens: int, stage: int, gpu: str) -> float:
    """Bytes per second into and out of each GPU at which communication takes as long as computing.

    Of a step of one micro-batch: 8 operations per weight and token with checkpointing. In bf16 stage 2 reduces 2 bytes
    per weight and gathers as many; stage 3 gathers them twice, and reduces once.
    """
    seconds = 8 * tokens / (UTILISATION * PEAK[gpu])
    return (3 if stage == 3 else 2) * 2 / seconds


def network() -> str:
    def rows() -> Iterator[list[str]]:
        for tokens in (1024, 4096, 16384, 65536):
            values = [bandwidth(tokens, stage, gpu) for gpu in PEAK for stage in (2, 3)]
            yield [f"{tokens:,}", *(f"{value / 1e9:.1f}" for value in values)]

    head = ["tokens per GPU and micro-batch", *(f"{gpu}, ZeRO {stage}" for gpu in PEAK for stage in (2, 3))]
    return _table(head, rows())


BLOCK_PAIRS = 1000
"""data.prepare.CHUNK_ROWS."""
HELD = 4 * 2 * 1024
"""Bytes of a pair in a worker: int32 ids of two sequences of 1024 tokens."""
STORED = 3700
"""Bytes of such a pair in a block: of ids drawn by Zipf's law, the prompt being half of each sequence."""
PLANNED = 44
"""Bytes per pair of its lengths and its place in the order, in every worker (tests/benchmarks/order.py)."""
WINDOW = 1_000_000
"""data.shuffle_window's default."""
PAIRS_PER_GPU = 6.65
"""Per second, of a 7B on an H100, as published by Wang and Hegde for shared prefixes."""


def size_text(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def data() -> str:
    def rows() -> Iterator[list[str]]:
        for power in range(4, 9):
            pairs = 10**power
            yield [
                f"10^{power}",
                f"{pairs // BLOCK_PAIRS:,}",
                size_text(pairs * STORED),
                size_text(pairs * PLANNED),
                size_text(min(pairs, WINDOW) * HELD),
                *(time_text(pairs / (PAIRS_PER_GPU * gpus)) for gpus in (8, 1000)),
                size_text(STORED * pairs * 1000),
            ]

    head = ["pairs", "blocks", "stored", "plan, per worker", "pairs held, per worker", "an epoch on 8 GPUs",
            "on 1000", "read by all 1000, per epoch"]  # fmt: skip
    return _table(head, rows())


def time_text(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


TABLES: dict[str, Callable[[], str]] = {"fits": fits, "parts": parts, "network": network, "data": data}


def page(text: str) -> str:
    """The page with every computed table as it should be."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        assert len(re.findall(pattern, text, re.DOTALL)) == 1, name
        text = re.sub(pattern, rf"\g<1>{table()}\n\g<2>", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
