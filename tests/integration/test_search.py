"""A search on Ray: real trials with real workers, over tokens that are made once."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import ray
import ray.tune
from transformers import AutoModelForCausalLM

from ray_prefopt.compat.config import CPOConfig
from ray_prefopt.compat.trainer import CPOTrainer
from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError, ResourceError
from ray_prefopt.search import tune as tune_module
from ray_prefopt.search.tune import TuneResult, _slots, describe_search, tune
from ray_prefopt.search_config import SearchConfig
from ray_prefopt.settings import load_config
from ray_prefopt.training.room import asking_for_nodes
from tests.integration.conftest import STEPS, Toy

pytestmark = pytest.mark.ray
METRIC = "eval_logps_mean/accuracies"
GRID = SearchConfig.model_validate({"space": {"loss.beta": {"grid": [0.5, 4.0]}}, "scheduler": "fifo"})


def config(toy: Toy, folder: Path, **run: Any) -> TrainConfig:
    """One worker without DeepSpeed, so that a trial takes seconds; the pairs are named from where the driver is."""
    values = toy.values(name="sweep", storage_path=str(folder), num_workers=1, **run)
    pairs = {name: os.path.relpath(toy.folder / f"{name}.jsonl") for name in ("train", "eval")}
    return TrainConfig.model_validate(
        {**values, "data": {**values["data"], **pairs}, "engine": {"kind": "plain"}}
    )


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def swept(toy: Toy, storage: Path, ray_local: None) -> TuneResult:
    return tune(config(toy, storage), GRID)


def test_what_a_search_leaves_behind(swept: TuneResult, toy: Toy) -> None:
    with open(f"{swept.folder}/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["loss.beta"], row["status"]) for row in rows] == [
        ("1", str(swept.point["loss.beta"]), "finished"),
        ("2", str(4.5 - swept.point["loss.beta"]), "finished"),
    ]
    assert (rows[0]["trial"], float(rows[0][METRIC])) == (swept.trial, swept.value)
    assert swept.value >= float(rows[1][METRIC])
    assert swept.std is None
    assert swept.trials == {"finished": 2}
    assert Path(swept.report).stat().st_size > 1_000_000
    assert AutoModelForCausalLM.from_pretrained(swept.model).num_parameters() > 0
    for row in rows:
        result = json.loads(Path(swept.folder, row["trial"], "result.json").read_text())
        assert result["steps"] == STEPS
        assert float(row[METRIC]) == result["metrics"][METRIC]


def test_the_best_config_is_that_of_the_best_trial(swept: TuneResult) -> None:
    best = load_config([Path(swept.config)])
    trial = TrainConfig.model_validate_json(Path(swept.folder, swept.trial, "config.json").read_text())
    assert best.run.name == "sweep-best"
    assert (best.loss, best.optim, best.run.seed) == (trial.loss, trial.optim, trial.run.seed)
    assert best.loss.beta == swept.point["loss.beta"]


def test_tokens_are_made_once(swept: TuneResult, storage: Path) -> None:
    """Two sets of blocks, one for training and one for evaluation, and one attempt at each."""
    attempts = [path for path in storage.glob("blocks/*/*") if path.is_dir()]
    assert len(list(storage.glob("blocks/*/manifest.json"))) == 2
    assert len(attempts) == 2


def test_a_finished_search_is_not_run_again(swept: TuneResult, toy: Toy, storage: Path) -> None:
    with pytest.raises(ConfigError, match=r"search 'sweep' is in .* already: --resume goes on with it"):
        tune(config(toy, storage), GRID)
    other = GRID.model_copy(update={"scheduler": "asha"})
    with pytest.raises(ConfigError, match=r"was begun otherwise: search.scheduler: fifo -> asha"):
        tune(config(toy, storage), other, resume=True)
    before = {path: path.stat().st_mtime_ns for path in Path(swept.folder).glob("trial-*/result.json")}
    again = tune(config(toy, storage), GRID, resume=True)
    assert (again.trial, again.value, again.trials) == (swept.trial, swept.value, swept.trials)
    assert before == {
        path: path.stat().st_mtime_ns for path in Path(swept.folder).glob("trial-*/result.json")
    }


def test_a_trial_that_the_cluster_has_no_room_for(toy: Toy, tmp_path: Path, ray_local: None) -> None:
    base = config(toy, tmp_path, resource_timeout_s=2)
    large = base.model_copy(update={"run": base.run.model_copy(update={"num_workers": 5})})
    expected = r"a trial needs 5 CPU for its 5 workers; the cluster has 4 CPU in all, after waiting \d s"
    with pytest.raises(ResourceError, match=expected):
        tune(large, GRID)


def test_a_plan_without_ray(toy: Toy, tmp_path: Path) -> None:
    plan = describe_search(config(toy, tmp_path), GRID)
    assert plan["search"] == {
        "folder": f"{tmp_path}/sweep",
        "space": {"loss.beta": {"grid": [0.5, 4.0]}},
        "recipes": {},
        "trials": 2,
        "metric": METRIC,
        "scheduler": "fifo",
    }
    assert not Path(tmp_path, "sweep").exists()
    Path(tmp_path, "sweep").mkdir()
    Path(tmp_path, "sweep", "config.json").touch()
    with pytest.raises(ConfigError, match=r"sweep is the folder of a run of `train`"):
        describe_search(config(toy, tmp_path), GRID)


def test_nodes_are_asked_for_where_there_are_too_few(
    toy: Toy, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = Mock(wraps=asking_for_nodes)
    monkeypatch.setattr(tune_module, "asking_for_nodes", asking)
    assert _slots(config(toy, tmp_path), GRID) == 2
    asking.assert_not_called()
    with pytest.raises(ResourceError, match="a trial needs 5 CPU for its 1 workers"):
        _slots(config(toy, tmp_path, cpus_per_worker=5, resource_timeout_s=0.1), GRID)
    asking.assert_called_once()


def test_a_killed_trial_goes_on(toy: Toy, tmp_path: Path) -> None:
    """In a Ray with room for one trial, where the workers that it leaves behind must go."""
    program = textwrap.dedent("""
        import sys, ray
        from ray_prefopt import SearchConfig, TrainConfig, tune

        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        tune(*(kind.model_validate_json(text) for kind, text in zip((TrainConfig, SearchConfig), sys.argv[1:])))
    """)
    base = config(toy, tmp_path, save_steps=3, cpus_per_worker=2).model_dump_json()
    search = '{"space": {"loss.beta": {"grid": [0.5]}}, "scheduler": "fifo"}'
    command = [sys.executable, "-c", program, base, search]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "sweep/trial-000"
    while not list(run.glob("checkpoints/step-*/MANIFEST.json")):
        assert driver.poll() is None, driver.communicate()[1]
        time.sleep(0.05)
    children = psutil.Process(driver.pid).children(recursive=True)
    (trial,) = (child for child in children if child.name() == "ray::_Inner.train")
    trial.kill()
    _, errors = driver.communicate()
    assert driver.returncode == 0, errors
    assert len(list((run / "ray").iterdir())) == 2
    assert [record["step"] for record in records(run) if "loss" in record] == list(range(1, STEPS + 1))


@pytest.mark.soak
def test_a_killed_search_goes_on(toy: Toy, tmp_path: Path, ray_local: None) -> None:
    """Killed when one trial is finished and another has saved: the first stays, the second goes on from there."""
    path = tmp_path / "search.yaml"
    values = config(toy, tmp_path, save_steps=3).model_dump(mode="json")
    search = {"space": {"loss.beta": {"grid": [0.5, 1.0, 4.0]}}, "scheduler": "asha", "max_concurrent": 1}
    path.write_text(json.dumps({**values, "search": search}))
    command = [sys.executable, "-m", "ray_prefopt", "tune", "-c", str(path)]
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    saved = tmp_path / "sweep/trial-001/checkpoints"
    while not list(saved.glob("step-*/MANIFEST.json")):
        assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    first = json.loads((tmp_path / "sweep/trial-000/result.json").read_text())
    finished = (tmp_path / "sweep/trial-000/result.json").stat().st_mtime_ns

    done = subprocess.run(
        [*command, "--resume", "--json"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert sum(result["trials"].values()) == 3
    assert (tmp_path / "sweep/trial-000/result.json").stat().st_mtime_ns == finished
    assert first["steps"] == STEPS
    steps = [record["step"] for record in records(tmp_path / "sweep/trial-001") if "loss" in record]
    assert steps == sorted(set(steps))
    assert len(list((tmp_path / "sweep/trial-001/ray").iterdir())) == 2
    assert len(done.stderr.splitlines()) < 60

    more = subprocess.run(
        [*command, "--resume", "--json", "--search.trials=4"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert more.returncode == 0, more.stderr
    assert sum(json.loads(more.stdout)["trials"].values()) == 4
    assert (tmp_path / "sweep/trial-000/result.json").stat().st_mtime_ns == finished


@pytest.mark.soak
@pytest.mark.parametrize(
    ("field", "bad", "good"), [("optim.learning_rate", 1e-7, 1e-2), ("loss.beta", 1e-14, 2.0)]
)
def test_a_population_recovers_from_a_bad_start(
    field: str, bad: float, good: float, toy: Toy, tmp_path: Path, ray_local: None
) -> None:
    """Two trials: the one that learns nothing, for its rate or its beta, copies the other, weights and all.

    A trial has to be seen to be the better of two at one report before the other can copy it at another, and may have
    to be copied again where its copy does worse.
    """
    search = SearchConfig.model_validate(
        {
            "space": {field: {"loguniform": [bad, 4 * good]}},
            "points": [{field: bad}, {field: good}],
            "trials": 2,
            "scheduler": "pbt",
            "grace": 0.25,
        }
    )
    base = config(toy, tmp_path, eval_steps=0.25, epochs=30)  # long enough for the two to meet
    base = base.model_copy(update={"loss": base.loss.model_copy(update={"cpo_alpha": 0.0})})
    result = tune(base, search)
    rows = {row["name"]: row for row in json.loads(Path(result.folder, "trials.json").read_text())}
    copier = rows["trial-000"]
    assert copier["history"][0] == {field: bad}
    assert all(point[field] > 1e4 * bad for point in copier["history"][1:])
    assert copier["point"][field] > 1e4 * bad
    assert copier["run"].startswith("sweep/trial-000.")
    copied = TrainConfig.model_validate_json(Path(tmp_path, copier["run"], "config.json").read_text())
    section, name = field.split(".")
    assert getattr(getattr(copied, section), name) == copier["point"][field]
    assert copied.run.resume_from is not None
    assert "/sweep/trial-001/checkpoints/step-00000" in copied.run.resume_from
    first = records(Path(tmp_path, copier["run"]))[0]
    donor = records(tmp_path / "sweep/trial-001")
    same = next(record for record in donor if record["step"] == first["step"] and "loss" in record)
    for measured in ("logps/chosen", "logps/rejected"):  # of the donor's weights, before rate and beta tell
        assert first[measured] == same[measured]
    assert (first["loss"] == same["loss"]) == (field != "loss.beta")
    assert copier["metrics"][METRIC] > 0.9
    untouched = records(tmp_path / "sweep/trial-000")
    assert all(record[METRIC] < 0.7 for record in untouched if METRIC in record)


@pytest.mark.soak
@pytest.mark.parametrize(("scheduler", "slots"), [("hyperband", 4), ("median", 1)])
def test_a_scheduler_lets_the_better_trials_go_on(
    scheduler: str, slots: int, toy: Toy, tmp_path: Path, ray_local: None
) -> None:
    """Rates that learn nothing end early.

    The first of hyperband's brackets has two trials, which it leaves alone; the median is one of three trials or more.
    """
    points = [{"optim.learning_rate": rate} for rate in (1e-2, 2e-2, 3e-2, 1e-8, 2e-8)]
    search = SearchConfig.model_validate(
        {
            "space": {"optim.learning_rate": {"loguniform": [1e-8, 1e-1]}},
            "points": points,
            "trials": len(points),
            "scheduler": scheduler,
            "max_concurrent": slots,
        }
    )
    result = tune(config(toy, tmp_path, eval_steps=0.25, epochs=2), search)
    rows = {row["name"]: row for row in json.loads(Path(result.folder, "trials.json").read_text())}
    assert result.point["optim.learning_rate"] >= 1e-2
    assert result.value > 0.9
    assert [rows[f"trial-00{number}"]["status"] for number in (0, 1, 2)] == ["finished"] * 3
    assert [rows[f"trial-00{number}"]["status"] for number in (3, 4)] == ["stopped"] * 2
    for name in rows:
        steps = [record["step"] for record in records(tmp_path / "sweep" / name) if "loss" in record]
        assert steps == list(range(1, len(steps) + 1))


@pytest.mark.soak
def test_hyperparameter_search_of_the_trainers(toy: Toy, tmp_path: Path, ray_local: None) -> None:
    trainer = CPOTrainer(
        str(toy.folder / "model"),
        CPOConfig(
            str(tmp_path / "out"), loss_type="simpo", cpo_alpha=0.5, bf16=False, use_cpu=True, max_steps=4,
            learning_rate=1e-2, per_device_train_batch_size=4, max_length=128, report_to="none",
        ),
        train_dataset=str(toy.folder / "train.jsonl"),
        eval_dataset=str(toy.folder / "eval.jsonl"),
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        hp_space=lambda _: {"beta": ray.tune.grid_search([0.5, 4.0])}, n_trials=2, scheduler="fifo"
    )
    summary: Any = best.run_summary
    assert best.hyperparameters == {"beta": summary.point["loss.beta"]}
    assert best.objective == summary.value
    assert summary.trials == {"finished": 2}
    config = TrainConfig.model_validate_json(Path(summary.folder, best.run_id, "config.json").read_text())
    assert config.loss.beta == best.hyperparameters["beta"]
    assert config.run.max_steps == 4
