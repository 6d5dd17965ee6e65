"""What a cluster costs and gives: steps in Ray Train beside a bare loop, two workers beside one, and the first step.

    python -m tests.benchmarks.cluster --quick
    python -m tests.benchmarks.cluster overhead scaling --repeats 5 --out cluster.json

`overhead` runs the same micro-batches, to the same losses, in `ray_prefopt.train` and in a loop around `train_step`;
`scaling` runs the same global batches on two workers and on one, and, for what the machine itself gives, in two
processes that know nothing of each other; `first-step` starts `ray-prefopt train` over pairs that are prepared already.
Every measurement is a process of its own with a Ray of its own; the arms take turns, and what is reported are medians,
and the range of the ratios of neighbours.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_prefopt.allocator import allocator

VOCABULARY = 16_384
SHAPE = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "vocab_size": VOCABULARY,
}  # fmt: skip
WARM_UP = 2
"""Steps that do not count."""
MICRO_BATCH = 4
LONG, SHORT = (120, 140), (10, 10)
"""Median words of a prompt and of a completion: of steps that take a while, and of pairs that are soon prepared."""
SIZES = (1_000, 10_000, 100_000)
SAME = 1e-5
"""Largest difference of a loss between arms, relative: the order of sums."""
PATIENCE_S = 300.0
Job = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*MEASURES, []], help="all when not given")
    parser.add_argument("--steps", type=int, default=8, help=f"measured, after {WARM_UP} of warm-up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="of the one worker of `overhead`")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[8, 16], help="pairs in a step of `scaling`"
    )
    parser.add_argument("--engines", nargs="+", default=["plain", "zero1", "zero2"], help="of `scaling`")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="pairs of `first-step`")
    parser.add_argument("--quick", action="store_true", help="one repeat, the plain engine, 16 pairs")
    parser.add_argument("--out", help="where the measurements go as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job = json.loads(given.job)
        print(json.dumps(ARMS[job["arm"]](job)))
        return
    if given.quick:
        given.repeats, given.engines, given.batches = 1, ["plain"], [16]
    found: dict[str, list[Job]] = {}
    with tempfile.TemporaryDirectory(prefix="cl-") as folder:
        for what in given.what or MEASURES:
            measure, table = MEASURES[what]
            found[what] = measure(given, Path(folder))
            print(f"{what}\n\n{table(found[what])}\n", flush=True)
    if given.out:
        Path(given.out).write_text(json.dumps(found, indent=1))


# --- What all measurements share ---


def write_inputs(folder: Path, pairs: int, words: tuple[int, int]) -> None:
    """Pairs of made-up words, a tokenizer that knows them, and random weights."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    rng = np.random.default_rng(0)

    def text(median: int) -> str:
        length = int(np.clip(rng.lognormal(np.log(median), 0.3), 2, 2 * median))
        return " ".join(f"w{n}" for n in rng.integers(VOCABULARY - 2, size=length))

    prompt, completion = words
    folder.mkdir(parents=True)
    with open(folder / "pairs.jsonl", "w") as file:
        for _ in range(pairs):
            row = {
                "prompt": text(prompt),
                "chosen": f" {text(completion)}",
                "rejected": f" {text(completion)}",
            }
            file.write(json.dumps(row) + "\n")
    ids = {"<eos>": 0, "<pad>": 1} | {f"w{n}": n + 2 for n in range(VOCABULARY - 2)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder
    )
    config = AutoConfig.for_model(
        "llama", **SHAPE, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def config_of(job: Job) -> dict[str, Any]:
    """A `TrainConfig`, as a mapping."""
    stage = job["engine"].removeprefix("zero")
    return {
        "model": {"path": job["folder"], "dtype": "float32"},
        "data": {"train": f"{job['folder']}/pairs.jsonl"},
        "optim": {"learning_rate": 1e-4},
        "engine": {"kind": "plain"} if stage == "plain" else {"kind": "zero", "zero_stage": int(stage)},
        "run": {
            "name": job["arm"],
            "storage_path": f"{job['folder']}/runs",
            "num_workers": job["workers"],
            "cpus_per_worker": job["threads"],
            "global_batch": job["global_batch"],
            "micro_batch": job["micro_batch"],
            "max_steps": job["steps"],
            "force_new": True,
            "export": False,
        },
    }


def start(job: Job, *command: str, **options: Any) -> subprocess.Popen[str]:
    """A process of its own, whose Ray is its own too; a bare loop has the allocator that workers have."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false",
        "RAY_TMPDIR": job["folder"], **(allocator() if ARMS[job["arm"]] is run_bare else {}),
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen([sys.executable, "-m", *command], env=environment, text=True, **options)


def in_processes(*jobs: Job) -> list[Job]:
    """What each arm finds, all at the same time; one, mostly."""
    processes = [
        start(job, "tests.benchmarks.cluster", "--job", json.dumps(job),
              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for job in jobs
    ]  # fmt: skip
    found = []
    for job, process in zip(jobs, processes, strict=True):
        out, err = process.communicate()
        if process.returncode:
            raise SystemExit(err)
        found.append({**job, **json.loads(out.splitlines()[-1])})
    print(json.dumps(found), file=sys.stderr)
    return found


def turns(arms: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """Each arm once per repeat, in one order and the other."""
    return [
        (repeat, arm) for repeat in range(repeats) for arm in (arms if repeat % 2 == 0 else reversed(arms))
    ]


def seconds(found: Job) -> float:
    """Of a step."""
    return statistics.median(found["seconds"][WARM_UP:])


def ratios(found: Sequence[Job], one: str, other: str) -> list[float]:
    """Of the steps of an arm to those of another, repeat by repeat."""
    of = {(each["arm"], each["repeat"]): seconds(each) for each in found}
    return [of[one, repeat] / of[other, repeat] for arm, repeat in of if arm == one]


def shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def check_losses(found: Sequence[Job]) -> None:
    """Those of every step are the same in all arms."""
    for each in found:
        for step, (mine, theirs) in enumerate(zip(each["losses"], found[0]["losses"], strict=True)):
            if not abs(mine - theirs) <= SAME * abs(theirs):
                raise SystemExit(
                    f"{each['arm']} has a loss of {mine} in step {step + 1}, {found[0]['arm']} of {theirs}: "
                    "no speed is reported"
                )


# --- Arms ---


def run_prepare(job: Job) -> Job:
    from ray_prefopt import TrainConfig
    from ray_prefopt.training.run import prepare_data

    prepare_data(TrainConfig.model_validate(config_of(job)))
    return {}


def run_train(job: Job) -> Job:
    """`ray_prefopt.train` with its logging as it is; the time of a step is that from one record to the next."""
    from ray_prefopt import TrainConfig, train

    result = train(TrainConfig.model_validate(config_of(job)))
    records = [json.loads(line) for line in Path(result.folder, "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": [job["global_batch"] / record["pairs_per_second"] for record in records],
        "losses": [record["loss"] for record in records],
        "data_wait": statistics.median(record["data_wait"] for record in records[WARM_UP:]),
    }


def run_bare(job: Job) -> Job:
    """A loop over the same micro-batches, which are there before it begins."""
    import torch
    import torch.distributed as dist

    from ray_prefopt import TrainConfig
    from ray_prefopt.data.collate import pack
    from ray_prefopt.data.prepare import find_blocks
    from ray_prefopt.data.stream import PairReader
    from ray_prefopt.engine.build import build_engine
    from ray_prefopt.losses.objective import Objective
    from ray_prefopt.model.layout import make_scorer
    from ray_prefopt.training.batches import batching_of, costs_of, layout_of, step_inputs
    from ray_prefopt.training.halves import in_halves
    from ray_prefopt.training.job import make_plan
    from ray_prefopt.training.metrics import MetricSums
    from ray_prefopt.training.step import train_step

    torch.set_num_threads(job["threads"])
    config = TrainConfig.model_validate(config_of(job))
    if config.engine.kind == "zero":
        os.environ |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    blocks = find_blocks(config.data, config.model, config.data.train_sources, config.run.storage_path)
    assert blocks is not None
    plan, cpu = make_plan(config, blocks), torch.device("cpu")
    engine = build_engine(config, total_steps=plan.total_steps, device=cpu)
    scorer, _ = make_scorer(engine.forward, engine.module, config.model, torch.float32, cpu)
    architecture: Any = engine.module.config
    costs = costs_of(architecture, layout_of(architecture, is_packed=scorer.is_packed))
    scorer, batching = in_halves(scorer, engine, costs), batching_of(blocks, config, costs)
    steps = list(
        step_inputs(plan, batching, PairReader(blocks), 0, lambda pairs, weight: pack(pairs, weight=weight))
    )
    objective, metrics = Objective(config.loss), MetricSums()
    taken, losses = [], []
    for inputs in steps:
        begun = time.perf_counter()
        train_step(engine, inputs, objective, metrics, scorer=scorer)
        taken.append(time.perf_counter() - begun)
        losses.append(metrics.reduce()["loss"])
    return {"seconds": taken, "losses": losses}


ARMS = {
    "prepare": run_prepare, "bare": run_bare, "train": run_train, "one": run_train, "two": run_train,
    "apart": run_bare,
}  # fmt: skip


# --- Steps ---


def prepared(given: argparse.Namespace, folder: Path, global_batch: int = 8) -> Job:
    """A job over pairs that suffice for every step."""
    steps = given.steps + WARM_UP
    job = {
        "folder": str(folder / str(global_batch)), "engine": "plain", "workers": 1, "threads": 1, "steps": steps,
        "global_batch": global_batch, "micro_batch": MICRO_BATCH,
    }  # fmt: skip
    if not Path(job["folder"]).exists():
        write_inputs(Path(job["folder"]), steps * global_batch, LONG)
        in_processes({**job, "arm": "prepare"})
    return job


def overhead(given: argparse.Namespace, folder: Path) -> list[Job]:
    job = prepared(given, folder)
    return [
        each
        for threads in given.threads
        for repeat, arm in turns(["bare", "train"], given.repeats)
        for each in in_processes({**job, "threads": threads, "arm": arm, "repeat": repeat})
    ]


def overhead_table(found: list[Job]) -> str:
    lines = [
        "| threads | bare loop, s | inside Ray Train, s | ratio (range) | data wait |",
        "|---|---|---|---|---|",
    ]
    for threads in dict.fromkeys(each["threads"] for each in found):
        here = [each for each in found if each["threads"] == threads]
        check_losses(here)
        bare, ours = ([each for each in here if each["arm"] == arm] for arm in ("bare", "train"))
        cells = [
            *(f"{statistics.median(map(seconds, each)):.3f}" for each in (bare, ours)),
            shown(ratios(here, "train", "bare")),
            f"{statistics.median(each['data_wait'] for each in ours):.2%}",
        ]
        lines.append(f"| {threads} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scaling(given: argparse.Namespace, folder: Path) -> list[Job]:
    found = []
    for global_batch in given.batches:
        job = prepared(given, folder, global_batch)
        for engine in given.engines:
            for repeat, arm in turns(["one", "two"], given.repeats):
                mine = {**job, "engine": engine, "arm": arm, "repeat": repeat}
                found += in_processes({**mine, "workers": 2 if arm == "two" else 1})
    job = prepared(given, folder, given.batches[0])
    for repeat, arm in turns(["bare", "apart"], given.repeats):
        mine = {**job, "arm": arm, "repeat": repeat}
        found.append(slowest(in_processes(*[mine] * (2 if arm == "apart" else 1))))
    return found


def slowest(found: Sequence[Job]) -> Job:
    """Of processes that ran at the same time."""
    return max(found, key=seconds)


def scaling_table(found: list[Job]) -> str:
    lines = [
        "| engine | pairs per step | 1 worker, s | 2 workers, s | times as fast (range) |",
        "|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int], list[Job]] = {}
    for each in found:
        engine = each["engine"] if each["arm"] in ("one", "two") else "two loops, each with all"
        groups.setdefault((engine, each["global_batch"]), []).append(each)
    for (engine, global_batch), here in groups.items():
        check_losses(here)
        alone, together, work = (
            ("one", "two", 1) if here[0]["arm"] in ("one", "two") else ("bare", "apart", 2)
        )
        cells = [
            f"{statistics.median(seconds(each) for each in here if each['arm'] == arm):.3f}"
            for arm in (alone, together)
        ]
        gains = shown([work * gain for gain in ratios(here, alone, together)])
        lines.append(f"| {engine} | {global_batch} | {' | '.join(cells)} | {gains} |")
    return "\n".join(lines)


# --- The first step ---


PHASES = {
    "imports and checks": "Ray begins",
    "Ray": "blocks found",
    "workers": "is up",
    "plan": "are planned",
    "model": "engine is built",
    "layout": "training begins",
    "first step": "first step",
}
"""What happens, and with what it ends: words of the driver or of rank 0."""


def first_step(given: argparse.Namespace, folder: Path) -> list[Job]:
    jobs = {}
    for size in given.sizes:
        job = {
            "folder": str(folder / str(size)), "engine": "zero2", "workers": 1, "threads": 1, "steps": None,
            "global_batch": 64, "micro_batch": 16, "pairs": size, "arm": "train",
        }  # fmt: skip
        write_inputs(Path(job["folder"]), size, SHORT)
        in_processes({**job, "arm": "prepare"})
        jobs[str(size)] = job
    found = []
    for repeat, size in turns(list(jobs), given.repeats):
        found.append({**jobs[size], "repeat": repeat, "ends": until_first_step(jobs[size])})
        print(json.dumps(found[-1]), file=sys.stderr)
    return found


def until_first_step(job: Job) -> dict[str, float]:
    """When each phase of `ray-prefopt train` ends, in seconds after its process began; it is interrupted then."""
    folder = Path(job["folder"])
    config, records, errors = (folder / name for name in ("run.json", "runs/train/metrics.jsonl", "errors"))
    config.write_text(json.dumps(config_of(job)))
    shutil.rmtree(folder / "ray", ignore_errors=True)
    ends: dict[str, float] = {}
    with open(errors, "w") as stderr:
        begun = time.time()
        process = start(
            job, "ray_prefopt", "train", "-c", str(config), stderr=stderr, stdout=subprocess.DEVNULL
        )
        while "first step" not in ends:
            if process.poll() is not None or time.time() - begun > PATIENCE_S:
                process.kill()
                raise SystemExit(f"no first step: {errors.read_text()}")
            time.sleep(0.01)
            if "Ray begins" not in ends and list(folder.glob("ray/session_2*")):
                ends["Ray begins"] = time.time()
            if "blocks found" not in ends and "blocks found" in errors.read_text():
                ends["blocks found"] = time.time()
            if records.exists() and records.stat().st_mtime > begun and records.stat().st_size:
                ends["first step"] = time.time()
        ends |= worker_ends(folder / "ray")
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
    return {phase: ends[end] - begun for phase, end in PHASES.items()}


def worker_ends(folder: Path) -> dict[str, float]:
    """When rank 0 said the words of a phase."""
    (log,) = folder.glob("session_2*/logs/train/ray-train-app-worker-*.log")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        end: entry["timestamp_ns"] / 1e9
        for end in PHASES.values()
        for entry in entries
        if end in entry["message"]
    }


def first_step_table(found: list[Job]) -> str:
    """Medians of each phase, and of their sum."""
    lines = [f"| pairs | {' | '.join(PHASES)} | all (range) |", f"|{'---|' * (len(PHASES) + 2)}"]
    for size in dict.fromkeys(each["pairs"] for each in found):
        ends = [list(each["ends"].values()) for each in found if each["pairs"] == size]
        phases = [[end - before for before, end in zip([0.0, *each], each, strict=False)] for each in ends]
        cells = [f"{statistics.median(values):.2f}" for values in zip(*phases, strict=True)]
        lines.append(f"| {size:,} | {' | '.join(cells)} | {shown([each[-1] for each in ends])} |")
    return "\n".join(lines)


MEASURES = {
    "overhead": (overhead, overhead_table),
    "scaling": (scaling, scaling_table),
    "first-step": (first_step, first_step_table),
}

if __name__ == "__main__":
    main()
