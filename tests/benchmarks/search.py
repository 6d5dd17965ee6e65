"""A search over the three numbers on pairs of which a fifth is labelled wrongly: what it finds, and what it costs.

    python -m tests.benchmarks.search [FOLDER]

Twelve trials chosen by Optuna and thinned by ASHA, two at a time. The winner and the default config are then compared
on pairs that neither training nor the search saw. A few minutes on two cores; see FOLDER/runs/sweep/report.html.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import ray

from ray_prefopt import SearchConfig, TrainConfig, evaluate, train, tune
from ray_prefopt.demo import demo_config, make_tokenizer, preference_rows, texts, write_rows

CPUS = 2
PAIRS, SEEN_BY_SEARCH, WRONG = 1400, 400, 0.2
METRIC = "eval_logps_mean/accuracies"
SEARCH = SearchConfig.model_validate(
    {
        "space": {
            "loss.beta": {"loguniform": [0.3, 300]},
            "loss.gamma_beta_ratio": {"uniform": [0, 1]},
            "loss.cpo_alpha": {"loguniform": [0.005, 1]},
        },
        "points": [{"loss.beta": 2.0, "loss.gamma_beta_ratio": 0.5, "loss.cpo_alpha": 0.05}],  # the defaults
        "trials": 12,
        "grace": 0.5,
    }
)


def write_task(folder: Path) -> TrainConfig:
    """The demo's model and questions, more of them held out; returns the config with the default loss."""
    folder.mkdir(parents=True)
    learned, held_out = preference_rows(seed=0, hidden_share=0.35)
    make_tokenizer([text for row in learned for text in texts(row)]).save_pretrained(folder / "tokenizer")
    rng = random.Random(0)
    wrong = [rng.random() < WRONG for _ in learned[:PAIRS]]
    rows = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if is_wrong else row
        for row, is_wrong in zip(learned, wrong, strict=False)
    ]
    for name, part in (
        ("train", rows),
        ("eval", held_out[:SEEN_BY_SEARCH]),
        ("unseen", held_out[SEEN_BY_SEARCH:]),
    ):
        write_rows(folder / f"{name}.jsonl", part)
    values = demo_config(folder).model_dump()
    run = {"name": "sweep", "num_workers": 1, "micro_batch": 32, "epochs": 1, "eval_steps": 0.25}
    return TrainConfig.model_validate(
        {
            **values,
            "loss": {"kind": "cpo_simpo"},
            "engine": {"kind": "plain"},
            "run": {**values["run"], **run, "eval_on_start": False},
        }
    )


def accuracy(base: TrainConfig, model: str, pairs: Path) -> float:
    """Of a model on the pairs of this file."""
    sections = {
        "model": base.model.model_copy(update={"path": model, "from_config": None, "tokenizer": None}),
        "data": base.data.model_copy(update={"train": [], "eval": str(pairs)}),
        "run": base.run.model_copy(update={"name": None}),
    }
    return evaluate(base.model_copy(update=sections)).metrics[METRIC]


def main(folder: Path) -> None:
    base = write_task(folder)
    ray.init(
        address="local", num_cpus=CPUS, include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    begun = time.monotonic()
    result = tune(base, SEARCH)
    wall = time.monotonic() - begun
    blocks = len(list(folder.glob("runs/blocks/*/manifest.json")))
    trials = json.loads(Path(result.folder, "trials.json").read_text())
    working = sum(trial["seconds"] for trial in trials) / CPUS
    run = base.run.model_copy(update={"name": "default"})
    default = train(base.model_copy(update={"run": run}))
    unseen = folder / "unseen.jsonl"
    defaults = trials[0]["metrics"][METRIC]
    found, given = accuracy(base, result.model, unseen), accuracy(base, default.model, unseen)
    print(f"trials                  {len(trials)}: {result.trials}")
    print(f"sets of tokens made     {blocks} (train and eval)")
    print(
        f"wall time               {wall:.0f} s: 1.10 x {working:.0f} s of trials + {wall - 1.1 * working:.0f} s"
    )
    print(f"winner                  {result.point}")
    print(f"on pairs of the search  {result.value:.3f}, the defaults {defaults:.3f}")
    print(f"on unseen pairs         {found:.3f}, the defaults {given:.3f}")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "search-benchmark"))
