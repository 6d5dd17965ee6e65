"""Runs as jobs of a real Ray head with its job server on this machine, asked for with a token."""

import csv
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ray_prefopt.settings import load_config
from tests.integration.conftest import Toy
from tests.integration.heads import ROOT, TOKEN, environment, head_ports, started_head
from tests.kustomize import render

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class Head:
    """A cluster of three CPUs, whose jobs' driver has none of them."""

    address: str

    def call(self, *words: str, token: str = TOKEN, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "ray_prefopt", words[0], "--address", self.address, *words[1:]],
            cwd=ROOT, env=environment(token), capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if words[0] != "status":  # `pytest -s` shows it
            sys.stdout.write(f"$ ray-prefopt {' '.join(words)}\n{done.stdout}{done.stderr}\n")
        return done

    def result(self, *words: str) -> dict[str, str]:
        done = self.call(words[0], "--json", *words[1:])
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return dict(found[0] if isinstance(found, list) else found)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    ports, out = head_ports(), tmp_path_factory.mktemp("head") / "out"
    flags = ("--dashboard-host", "127.0.0.1", "--num-cpus", "3")
    cluster = Head(f"http://127.0.0.1:{ports['dashboard-port']}")
    with started_head(ports, flags, environment(TOKEN), out) as process:
        wait(lambda: process.poll() is not None or cluster.call("status").returncode == 0, seconds=120)
        assert process.poll() is None, out.read_text()
        yield cluster


def wait(condition: Callable[[], bool], *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.5)


def is_over(head: Head, run: str) -> bool:
    return head.result("status", run)["status"] not in ("PENDING", "RUNNING")


def write_config(toy: Toy, folder: Path, **run: object) -> list[str]:
    values = toy.values(num_workers=1, storage_path=str(folder / "runs"), **run)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return ["-c", str(path)]


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.soak
def test_a_stopped_run_goes_on_under_its_name(head: Head, toy: Toy, tmp_path: Path) -> None:
    config = write_config(toy, tmp_path, name="again", epochs=15, save_steps=20, log_steps=20)
    folder = tmp_path / "runs" / "again"
    first = head.result("submit", "--", "train", *config)
    assert (first["job"], first["run"]) == ("again-1", "again")
    refused = head.call("submit", "--", "train", *config)
    assert refused.returncode == 2
    assert (
        "run 'again' is going on as job again-1: `ray-prefopt logs --follow again` follows it"
        in refused.stderr
    )
    wait(lambda: any(folder.glob("checkpoints/step-*")) or is_over(head, "again"), seconds=180)
    stopped = head.result("stop", "again")
    assert (stopped["job"], stopped["status"]) == ("again-1", "STOPPED")
    assert not (folder / "result.json").exists()

    done = head.call("submit", "--wait", "--", "train", *config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "again-2" in done.stderr
    assert yaml.safe_load(done.stdout[done.stdout.rindex("\njob: ") :])["status"] == "SUCCEEDED"
    assert json.loads((folder / "result.json").read_text())["steps"] == 180
    assert (folder / "model" / "model.safetensors").exists()
    steps = [int(record["step"]) for record in records(folder) if "loss" in record]
    assert steps == list(range(20, 181, 20))
    assert head.result("status", "again")["job"] == "again-2"
    assert "resum" in head.call("logs", "again").stdout


def test_the_smoke_job_of_kubernetes_runs(head: Head, tmp_path: Path) -> None:
    """The very entrypoint and config of the overlay, with the places of this machine for those of the image."""
    objects = render(ROOT / "cluster" / "kuberay" / "overlays" / "cpu-smoke")
    (entrypoint,) = (item["spec"]["entrypoint"] for item in objects if item["kind"] == "RayJob")
    (text,) = (item["data"]["run.yaml"] for item in objects if item["kind"] == "ConfigMap")
    (tmp_path / "run.yaml").write_text(
        text.replace("/opt/ray-prefopt", str(ROOT)).replace("/runs", str(tmp_path / "runs"))
    )
    program, *words = entrypoint.replace("/etc/ray-prefopt", str(tmp_path)).split()
    assert program == "ray-prefopt"
    wheel = write_wheel(tmp_path)
    done = head.call("submit", "--wait", "--wheel", str(wheel), "--env", "GREETING=hello", "--", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hello from the wheel" in done.stdout
    folder = tmp_path / "runs" / "smoke"
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 21
    assert result["metrics"]["eval_rewards/accuracies"] > 0.5
    assert (folder / "model" / "model.safetensors").exists()


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_search_of_kubernetes_runs(head: Head, toy: Toy, tmp_path: Path) -> None:
    """The very entrypoint and config of the overlay, with a toy's model and pairs, and flags that make it small."""
    objects = render(ROOT / "cluster" / "kuberay" / "overlays" / "tune")
    (entrypoint,) = (item["spec"]["entrypoint"] for item in objects if item["kind"] == "RayJob")
    (text,) = (item["data"]["run.yaml"] for item in objects if item["kind"] == "ConfigMap")
    places = {
        "Qwen/Qwen2.5-0.5B-Instruct": str(toy.folder / "model"),
        "HuggingFaceH4/ultrafeedback_binarized:train_prefs": str(toy.folder / "train.jsonl"),
        "HuggingFaceH4/ultrafeedback_binarized:test_prefs": str(toy.folder / "eval.jsonl"),
        "/runs": str(tmp_path / "runs"),
    }
    for place, here in places.items():
        assert place in text
        text = text.replace(place, here)
    (tmp_path / "run.yaml").write_text(text)
    program, *words = entrypoint.replace("/etc/ray-prefopt", str(tmp_path)).split()
    assert program == "ray-prefopt"
    words += ["--run.use_gpu", "false", "--run.cpus_per_worker", "1", "--run.global_batch", "8"]
    words += ["--data.max_length", "128", "--data.max_prompt_length", "64", "--search.trials", "3"]
    done = head.call("submit", "--wait", "--", *words, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "simpo-search"
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["rank"] for row in rows) == ["1", "2", "3"]
    assert (folder / "report.html").stat().st_size > 1_000_000
    best = load_config([folder / "best_config.yaml"])
    assert best.loss.beta == float(rows[0]["loss.beta"])
    assert (folder / "best" / "model.safetensors").exists()
    again = head.call("submit", "--wait", "--", *words, timeout=500)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout[again.stdout.rindex("\njob: ") :].count("simpo-search-2") == 1


def write_wheel(folder: Path) -> Path:
    """The package as a wheel, with a word of its own at the start of each process."""
    path = folder / "ray_prefopt-9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in sorted((ROOT / "ray_prefopt").rglob("*")):
            if file.is_file() and file.name != "__main__.py" and "__pycache__" not in file.parts:
                wheel.write(file, file.relative_to(ROOT))
        main = (ROOT / "ray_prefopt" / "__main__.py").read_text()
        greeting = "import os\nprint(os.environ['GREETING'], 'from the wheel')\n"
        wheel.writestr("ray_prefopt/__main__.py", greeting + main)
    return path


@pytest.mark.soak
def test_a_job_that_fails_says_so(head: Head, toy: Toy, tmp_path: Path) -> None:
    """Sent by the script, which builds the wheel, and leaves nothing behind."""
    config = write_config(toy, tmp_path, name="failing", global_batch=4096)
    before = {path.name for path in ROOT.iterdir()}
    done = subprocess.run(
        [ROOT / "cluster" / "submit.sh", "--address", head.address, "--wait", "--", "train", *config],
        env=environment(TOKEN), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert {path.name for path in ROOT.iterdir()} == before
    assert done.returncode == 1, done.stderr
    assert "error: 48 usable pairs do not fill one global batch of 4096" in done.stdout
    assert "error: job failing-1 failed: " in done.stderr
    assert head.result("status", "failing")["status"] == "FAILED"


def test_a_job_that_there_is_not(head: Head) -> None:
    done = head.call("stop", "nothing")
    assert done.returncode == 2
    assert "nothing is neither a run nor a job at http://127.0.0.1:" in done.stderr


def test_another_token_is_refused(head: Head) -> None:
    done = head.call("status", token="f" * 64)
    assert done.returncode == 4
    assert "does not take this token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in done.stderr
