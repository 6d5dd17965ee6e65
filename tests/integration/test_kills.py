"""Whatever dies, the run goes on from its last checkpoint and ends with the weights of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from ray_prefopt.errors import TrainingError
from ray_prefopt.settings import dump_yaml
from ray_prefopt.training.folder import TrainResult
from ray_prefopt.training.run import train
from tests.integration.conftest import STEPS, Toy
from tests.integration.test_train import assert_same_weights, records_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
PATIENCE_S = 400


def step_of(folder: Path) -> int:
    """The last step in a run's metrics."""
    try:
        return max((int(record["step"]) for record in records_of(str(folder))), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def hear_ctrl_c() -> None:
    """In a process that was started by another in the background, where a shell has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(folder: Path, step: int, process: subprocess.Popen[str] | None = None) -> None:
    """Wait until a run has come to a step, while its process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while step_of(folder) < step:
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        assert time.monotonic() < deadline, f"{folder} did not come to step {step}"
        time.sleep(0.01)


def processes(name: str) -> list[psutil.Process]:
    """Those of this one's Ray that live, with this in their name."""
    ours = psutil.Process().children(recursive=True)
    living = [child for child in ours if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if name in " ".join(child.cmdline())]


@contextmanager
def killing(name: str, folder: Path) -> Iterator[None]:
    """A process with this in its name dies after the fifth step of the run in a folder."""
    killed: list[int] = []

    def kill_one() -> None:
        wait_for(folder, 5)
        process = processes(name)[0]
        process.kill()
        killed.append(process.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    yield
    killer.join()
    assert killed


def test_a_killed_worker(straight: TrainResult, toy: Toy) -> None:
    with killing("RayTrainWorker", toy.folder / "runs" / "killed"):
        result = train(toy.config(name="killed", max_failures=2))
    assert result.steps == STEPS
    assert_same_weights(result.model, straight.model)
    steps = [record["step"] for record in records_of(result.folder) if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


def test_a_killed_controller(straight: TrainResult, toy: Toy) -> None:
    """Its workers, which hold the room of those to come, go with it."""
    config = toy.config(name="headless", save_steps=4)
    words = "^Ray Train's controller died, The actor is dead because its .*Start the same command again"
    with (
        killing("TrainController", toy.folder / "runs" / "headless"),
        pytest.raises(TrainingError, match=words),
    ):
        train(config)
    _, alive = psutil.wait_procs(processes("RayTrainWorker"), timeout=PATIENCE_S)
    assert not alive
    result = train(config)
    assert_same_weights(result.model, straight.model)
    assert [record["step"] for record in records_of(result.folder) if "loss" in record] == list(
        range(1, STEPS + 1)
    )


@pytest.mark.soak
def test_the_whole_run_interrupted_then_killed(straight: TrainResult, toy: Toy, tmp_path: Path) -> None:
    """Each time by itself, with a Ray of its own: Ctrl-C, then SIGKILL to all of its processes, then to the end."""
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(toy.config(name="alone", save_steps=1)))
    command = [sys.executable, "-m", "ray_prefopt", "train", "-c", str(config)]
    folder = toy.folder / "runs" / "alone"
    # Ray Train looks after its workers twice a second, and each save takes as long: steps that can be caught.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=hear_ctrl_c,
        )  # fmt: skip

    first = start()
    wait_for(folder, 4, first)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 130, errors
    assert errors.rstrip().endswith(f"interrupted; go on with: ray-prefopt train -c {config}"), errors

    second = start()
    wait_for(folder, 7, second)
    family = [psutil.Process(second.pid), *psutil.Process(second.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    second.communicate(timeout=PATIENCE_S)

    third = start()
    output, errors = third.communicate(timeout=PATIENCE_S)
    assert third.returncode == 0, errors
    assert "no pair is repeated or skipped" in errors
    assert_same_weights(str(folder / "model"), straight.model)
    steps = [record["step"] for record in records_of(str(folder)) if "loss" in record]
    assert steps == list(range(1, STEPS + 1))
    assert f"steps: {STEPS}" in output
