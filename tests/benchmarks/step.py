"""Speed and memory of the training step, beside TRL's CPOTrainer: the same model, pairs, order, optimizer and threads.

Every measurement is a process of its own, with the allocator that our workers have, but for TRL's (`--allocator`);
micro-batches and arms take turns, there and back, and what is reported are medians of the ratios of neighbours. Every
optimizer step is of 8 pairs, in micro-batches of 1 to 8. An arm whose losses are not those of TRL reports nothing.
Useful is what the arithmetic needs: layers and attention of tokens that are there once, the head at scored positions,
forward and backward, as a share of the fastest matrix product of this machine.

    python -m tests.benchmarks.step --quick
    python -m tests.benchmarks.step --shape smollm2-135m --profiles alpaca --pairs my_pairs.jsonl --out speed.json
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray_prefopt.allocator import allocator

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
              "num_key_value_heads": 6, "vocab_size": 16_384},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49_152},
}  # fmt: skip
PROFILES = {"ultrafeedback": (110, 260), "chat": (280, 130), "long-prompt": (600, 100)}
"""Median words of a prompt and of a completion: 0.42, 2.15 and 6 to 1."""
ARMS = {
    "trl": "TRL's CPOTrainer",
    "padded": "logits at scored positions only",
    "unshared": "and no padding",
    "shared": "and shared prompts",
    "headed": "and the head in one pass",
    "packed": "and the last layer where it is read",
    "halved": "and both halves of a micro-batch at once",
}
LOSS = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.5}
MAX_LENGTH = 1024
GLOBAL_BATCH = 8
"""Pairs of an optimizer step."""
EXACT = 1e-4
"""Largest difference of a loss from TRL's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument(
        "--profiles",
        nargs="+",
        default=list(PROFILES),
        help=f"of {', '.join(PROFILES)}, or names for --pairs",
    )
    parser.add_argument(
        "--pairs", help="JSON lines with prompt, chosen and rejected, instead of made-up words"
    )
    sizes = [1, 2, 4, 8]
    parser.add_argument(
        "--micro", nargs="+", type=int, choices=sizes, default=sizes, help="pairs in a micro-batch"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["trl", "halved"])
    parser.add_argument("--steps", type=int, default=6, help="measured, after two of warm-up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--allocator",
        nargs="*",
        choices=ARMS,
        default=[arm for arm in ARMS if arm != "trl"],
        help="arms with the allocator of our workers; all but TRL's when not given",
    )
    parser.add_argument("--quick", action="store_true", help="8 pairs a micro-batch, one repeat")
    parser.add_argument("--out", help="where the measurements go as JSON")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        json.dump(measure(json.loads(given.arm)), sys.stdout)
        return
    if given.quick:
        given.micro, given.repeats, given.steps = [8], 1, 4
    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        for profile in given.profiles:
            job = {
                "folder": f"{folder}/{profile}", "shape": given.shape, "profile": profile, "steps": given.steps,
                "threads": given.threads, "pairs": given.pairs,
            }  # fmt: skip
            prepare(job)
            turn = [(micro, arm) for micro in given.micro for arm in given.arms]
            for repeat in range(given.repeats):
                for micro, arm in turn if repeat % 2 == 0 else reversed(turn):
                    found = in_a_process(
                        {**job, "micro": micro, "arm": arm, "repeat": repeat},
                        threads=given.threads,
                        variables=allocator() if arm in given.allocator else {},
                    )
                    measurements.append(found)
                    print(json.dumps(found), file=sys.stderr)
    print(table(measurements, given.arms))
    if given.out:
        Path(given.out).write_text(json.dumps(measurements, indent=1))


def in_a_process(
    job: dict[str, Any],
    module: str = "tests.benchmarks.step",
    threads: int = 1,
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A job, and what the `--arm` of a benchmark finds; threads of tokenizers would run where another is measured."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **(variables or {}),
    }  # fmt: skip
    command = [sys.executable, "-m", module, "--arm", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {**job, **json.loads(done.stdout.splitlines()[-1])}


# --- What all arms share ---


def prepare(job: dict[str, Any]) -> None:
    """Pairs as text, a tokenizer and random weights."""
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = Path(job["folder"])
    if folder.exists():
        return
    folder.mkdir()
    vocabulary = SHAPES[job["shape"]]["vocab_size"]
    count = (job["steps"] + 2) * GLOBAL_BATCH
    if job["pairs"]:
        rows = [json.loads(line) for line in Path(job["pairs"]).read_text().splitlines()]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary - 2, special_tokens=["<eos>", "<pad>"])
        texts = (row[name] for row in rows for name in ("prompt", "chosen", "rejected"))
        tokenizer.train_from_iterator(texts, trainer)
        rows = rows[:count]
    else:
        rng = np.random.default_rng(0)
        prompt, completion = PROFILES[job["profile"]]
        longest = min(2.0, 0.95 * MAX_LENGTH / (prompt + completion))

        def words(median: int) -> str:
            length = int(np.clip(rng.lognormal(np.log(median), 0.5), 4, longest * median))
            return " ".join(f"w{n}" for n in rng.integers(vocabulary - 2, size=length))

        rows = [
            {"prompt": words(prompt), "chosen": f" {words(completion)}", "rejected": f" {words(completion)}"}
            for _ in range(count)
        ]
        ids = {"<eos>": 0, "<pad>": 1} | {f"w{n}": n + 2 for n in range(vocabulary - 2)}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder
    )
    config = AutoConfig.for_model(
        "llama", **SHAPES[job["shape"]], max_position_embeddings=2 * MAX_LENGTH, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Pairs per second, losses, and the peak memory above weights and optimizer, of one arm."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    meter = Meter()
    losses = (_trl if job["arm"] == "trl" else _ours)(job, meter)
    seconds = sum(meter.seconds[2:])
    return {
        "losses": losses,
        "pairs_per_second": GLOBAL_BATCH * job["steps"] / seconds,
        "peak_bytes": meter.peak_bytes(),
        "useful": sum(meter.useful_flops[2:]) / seconds / gemm_peak() if meter.useful_flops else None,
    }


def gemm_peak() -> float:
    """Multiplications and additions per second of the fastest of some square matrix products, by torch or as here."""
    import torch

    from ray_prefopt.model.onednn import linear

    best = 0.0
    for width in (512, 1024, 2048):
        one, other = torch.randn(width, width), torch.randn(width, width)
        for product in (torch.mm, linear):
            for _ in range(10):
                begun = time.perf_counter()
                product(one, other)
                best = max(best, 2 * width**3 / (time.perf_counter() - begun))
    return best


class Meter:
    """Seconds of each step, and the memory above that of the weights."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.useful_flops: list[float] = []
        self._weights = 0
        self._begun = 0.0

    def loaded(self, model: Any) -> None:
        """Weights are there, gradients and optimizer states are not; AdamW keeps two numbers for each weight."""
        parameters = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self._weights = pages * resource.getpagesize() + 2 * parameters

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._begun)

    def peak_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._weights


def _trl(job: dict[str, Any], meter: Meter) -> list[float]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end()

    with tempfile.TemporaryDirectory() as out:
        trainer = CPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32),
            args=CPOConfig(
                out, **LOSS, max_length=MAX_LENGTH, max_steps=job["steps"] + 2,
                per_device_train_batch_size=job["micro"], gradient_accumulation_steps=GLOBAL_BATCH // job["micro"],
                learning_rate=1e-4,
                train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False, use_cpu=True,
                report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
            ),
            train_dataset=load_dataset("json", data_files=f"{job['folder']}/pairs.jsonl", split="train", cache_dir=out),
            processing_class=AutoTokenizer.from_pretrained(job["folder"]),
            callbacks=[Timed()],
        )  # fmt: skip
        meter.loaded(trainer.model)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]


def _ours(job: dict[str, Any], meter: Meter) -> list[float]:
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from ray_prefopt.config import ModelConfig, OptimConfig, SimPOLoss
    from ray_prefopt.data import collate
    from ray_prefopt.data.formats import PreferencePair
    from ray_prefopt.data.tokenization import LengthLimits, tokenize_pairs
    from ray_prefopt.engine.plain import PlainEngine
    from ray_prefopt.losses.objective import Objective, StepTotals
    from ray_prefopt.model.layout import make_scorer
    from ray_prefopt.model.load import load_model
    from ray_prefopt.training.batches import costs_of
    from ray_prefopt.training.halves import in_halves
    from ray_prefopt.training.metrics import MetricSums
    from ray_prefopt.training.step import StepInput, train_step

    arm, micro = job["arm"], job["micro"]
    rows = [json.loads(line) for line in (Path(job["folder"]) / "pairs.jsonl").open()]
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    pairs = tokenize_pairs(
        [PreferencePair(row["prompt"], row["chosen"], row["rejected"]) for row in rows],
        tokenizer,
        LengthLimits(MAX_LENGTH, None, None, "keep_start"),
    )
    cpu = torch.device("cpu")
    config = ModelConfig(
        path=job["folder"], dtype="float32", layout="padded" if arm == "padded" else "packed"
    )
    module = load_model(config, dtype=torch.float32, seed=0)
    engine = PlainEngine(
        module,
        OptimConfig(learning_rate=1e-4, schedule="linear", warmup_steps=0),
        total_steps=job["steps"] + 2,
        dtype=torch.float32,
        device=cpu,
    )
    scorer, _ = make_scorer(engine.forward, module, config, torch.float32, cpu)
    if arm == "halved":
        scorer = in_halves(scorer, engine, costs_of(module.config, "packed"))
    if arm in ("unshared", "shared", "headed"):
        scorer = replace(scorer, spares_unread=False)
    if arm in ("unshared", "shared"):
        scorer = replace(scorer, head=None)
    if arm == "unshared":
        collate._common = lambda *_: 0
    loss = SimPOLoss(beta=2.0, gamma_beta_ratio=0.5, cpo_alpha=0.5, nll_average="micro_batch")
    objective = Objective(loss)
    meter.loaded(module)
    losses = []
    for step in range(job["steps"] + 2):
        ids = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        micro_ids = np.split(ids, GLOBAL_BATCH // micro)
        meter.begin()
        groups = [[pairs[index] for index in group] for group in micro_ids]
        make = partial(collate.collate, pad_id=1) if arm == "padded" else collate.pack
        batches = [make(group) for group in groups]
        totals = StepTotals(
            GLOBAL_BATCH, sum(len(pair.chosen) - pair.chosen_start for group in groups for pair in group)
        )
        metrics = MetricSums()
        train_step(engine, StepInput(step, totals, batches, micro_ids), objective, metrics, scorer=scorer)
        losses.append(metrics.reduce()["loss"])
        meter.end()
        meter.useful_flops.append(sum(useful_flops(module, collate.pack(group)) for group in groups))
    return losses


def useful_flops(model: Any, batch: Any) -> float:
    """Of forward and backward: 6 for each weight of a layer and token, or of the head and scored position; 12 for each
    number of a query and key that it sees. Of the last layer all but keys and values at scored positions."""
    config = model.config
    weights = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if f".layers.{config.num_hidden_layers - 1}." in name and weight.dim() > 1
    }
    kept = sum(size for name, size in weights.items() if "k_proj" in name or "v_proj" in name)
    whole, read = sum(weights.values()), len(batch.predicts_U)
    seen = [
        (shared + chosen) ** 2 / 2 + rejected * (shared + rejected / 2)
        for shared, chosen, rejected in batch.segments
    ]
    before = config.num_hidden_layers - 1
    return (
        6 * (before * whole + kept) * batch.num_tokens
        + 6 * (whole - kept + config.hidden_size * config.vocab_size) * read
        + 12 * config.hidden_size * (before + 1) * sum(seen)
        - 12 * config.hidden_size * sum(unread**2 / 2 for unread in batch.unread)
    )


# --- What came out ---


def table(measurements: list[dict[str, Any]], arms: list[str]) -> str:
    """Of each profile and micro-batch, and of the best micro-batch of each arm: medians, and their ratios to TRL's."""
    lines = [
        "| profile | pairs | arm | pairs/s | of TRL's (range) | useful | peak MiB | of TRL's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for profile in dict.fromkeys(each["profile"] for each in measurements):
        of_profile = [each for each in measurements if each["profile"] == profile]
        micros = sorted({each["micro"] for each in of_profile})
        best = {
            arm: max(micros, key=lambda micro, arm=arm: _median(of_profile, arm, micro, "pairs_per_second"))
            for arm in arms
        }
        for name, at in [*((str(micro), dict.fromkeys(arms, micro)) for micro in micros), ("best", best)]:
            for arm in arms:
                speed = _median(of_profile, arm, at[arm], "pairs_per_second")
                peak = _median(of_profile, arm, at[arm], "peak_bytes") / 2**20
                ratio, memory = "", ""
                useful = "" if arm == "trl" else f"{_median(of_profile, arm, at[arm], 'useful'):.2f}"
                if "trl" in at:
                    _check(of_profile, arm, at[arm])
                    ratios = [
                        one["pairs_per_second"] / other["pairs_per_second"]
                        for one, other in zip(
                            _of(of_profile, arm, at[arm]), _of(of_profile, "trl", at["trl"]), strict=True
                        )
                    ]
                    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                    memory = f"{peak * 2**20 / _median(of_profile, 'trl', at['trl'], 'peak_bytes'):.2f}"
                shown = f"{name} ({at[arm]})" if name == "best" else name
                lines.append(
                    f"| {profile} | {shown} | {arm} | {speed:.2f} | {ratio} | {useful} | {peak:.0f} | {memory} |"
                )
    return "\n".join(lines)


def _of(measurements: list[dict[str, Any]], arm: str, micro: int) -> list[dict[str, Any]]:
    found = [each for each in measurements if (each["arm"], each["micro"]) == (arm, micro)]
    return sorted(found, key=lambda each: each["repeat"])


def _median(measurements: list[dict[str, Any]], arm: str, micro: int, name: str) -> float:
    return statistics.median(each[name] for each in _of(measurements, arm, micro))


def _check(measurements: list[dict[str, Any]], arm: str, micro: int) -> None:
    """The losses of every step are TRL's."""
    for one, other in zip(_of(measurements, arm, micro), _of(measurements, "trl", micro), strict=True):
        worst = max(abs(mine - theirs) for mine, theirs in zip(one["losses"], other["losses"], strict=True))
        if not worst <= EXACT:
            raise SystemExit(
                f"{arm} at {micro} pairs has other losses than TRL, by up to {worst:.2g}: no speed is reported"
            )


if __name__ == "__main__":
    main()
