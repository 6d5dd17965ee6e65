"""What `ray-prefopt submit` makes of a command line before a cluster hears of it."""

import re
import threading
import zipfile
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ray_prefopt.cli import main
from ray_prefopt.submit import LARGEST_FOLDER, Jobs, Parcel, _pack

Submit = Callable[..., dict[str, Any]]
CONFIG = "model: {path: m}\ndata: {train: a.jsonl}\nrun: {name: first, storage_path: /shared/runs}\n"
UNNAMED = r"simpo-\d{8}-\d{6}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "more.yml").write_text("loss: {beta: 3}\n")
    return tmp_path


@pytest.fixture
def parcel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Parcel]:
    """What a command line would send."""
    sent: list[Parcel] = []

    class SentError(Exception):
        pass

    def submit(self: Jobs, parcel: Parcel) -> str:
        sent.append(parcel)
        raise SentError

    monkeypatch.setattr(Jobs, "__init__", lambda self, address: None)
    monkeypatch.setattr(Jobs, "submit", submit)

    def send(line: str) -> Parcel:
        assert main(line.split()) == 1
        return sent.pop()

    return send


def test_files_travel_under_names_of_their_own(parcel: Callable[[str], Parcel]) -> None:
    for line in (
        "submit -- train -c run.yaml --optim.learning_rate 5e-7 --config=more.yml --run.use-gpu",
        "submit -- train --optim.learning_rate=5e-7 -crun.yaml --run.use-gpu --config more.yml",
    ):
        sent = parcel(line)
        assert sent.run == "first"
        assert sent.files == {"config-0.yaml": Path("run.yaml"), "config-1.yml": Path("more.yml")}
        words = list(sent.command)
        assert words[0] == "train"
        assert [word for word in words if word.startswith("config-")] == ["config-0.yaml", "config-1.yml"]
        assert words[-2:] == ["--optim.learning_rate=5e-7", "--run.use-gpu"]


@pytest.mark.parametrize(
    ("line", "run", "command"),
    [
        ("train -c run.yaml", "first", "train -c config-0.yaml"),
        ("train -c run.yaml --run.name x/y", "x/y", "train -c config-0.yaml --run.name=x/y"),
        ("train -c more.yml -c run.yaml --run.name null", UNNAMED, "train -c config-0.yml -c config-1.yaml "
         "--run.name=null --run.name=RUN"),
        ("tune -c run.yaml --search.preset simpo", "first", "tune -c config-0.yaml --search.preset=simpo --resume"),
        ("tune --resume -c run.yaml --search.preset simpo", "first", "tune --resume -c config-0.yaml "
         "--search.preset=simpo"),
        ("tune -c run.yaml --run.force_new true --search.preset simpo", "first", "tune -c config-0.yaml "
         "--run.force_new=true --search.preset=simpo"),
        ("tokenize -c run.yaml", "first-tokenize", "tokenize -c config-0.yaml"),
        (
            "evaluate org/m --data.eval e.jsonl --run.storage_path s3://b/runs",
            f"{UNNAMED}-evaluate",
            "evaluate org/m --data.eval=e.jsonl --run.storage_path=s3://b/runs",
        ),
    ],
)  # fmt: skip
def test_a_retry_is_the_same_run(parcel: Callable[[str], Parcel], line: str, run: str, command: str) -> None:
    sent = parcel(f"submit -- {line}")
    assert re.fullmatch(run, sent.run)
    assert " ".join(sent.command) == command.replace("RUN", sent.run)


def test_what_else_is_sent(parcel: Callable[[str], Parcel], folder: Path) -> None:
    zipfile.ZipFile("w.whl", "w").close()
    sent = parcel(
        'submit --wheel w.whl --working-dir . --env A=1 --env B=x=y --cpus 2 --resources {"a":1} -- train -c run.yaml'
    )
    assert (sent.wheel, sent.folder, sent.env) == (Path("w.whl"), Path(), {"A": "1", "B": "x=y"})
    assert (sent.num_cpus, sent.resources) == (2.0, {"a": 1.0})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("submit", "nothing to submit: give a command after --, as in submit -- train -c run.yaml"),
        (
            "submit train -c run.yaml",
            "train is one argument too many for ray-prefopt submit. See ray-prefopt submit --help",
        ),
        ("submit -- demo", "demo cannot be submitted; what can is train, tune, tokenize, evaluate"),
        (
            "submit -- train -c run.yaml --loss.bata 3",
            "--loss.bata is not a field. Did you mean --loss.beta?",
        ),
        (
            "submit -- train -c run.yaml --run.storage_path runs",
            "run.storage_path runs would be in a folder that goes with the job: give a path or URI that all nodes see",
        ),
        ("submit --env A -- train -c run.yaml", "--env A has no value: --env NAME=VALUE"),
        (
            "submit --wheel run.yaml -- train -c run.yaml",
            "--wheel run.yaml is no wheel: build one with `pip wheel --no-deps .`",
        ),
        ("submit --working-dir nowhere -- train -c run.yaml", "--working-dir nowhere is no folder"),
        (
            "submit --env HF_TOKEN=x -- train -c run.yaml",
            "--env HF_TOKEN: everybody who reaches the cluster's job server can read what a job brings; "
            "set secrets in the environment of the nodes",
        ),
        (
            "submit --resources 3 -- train -c run.yaml",
            "--resources must be JSON such as '{\"driver\": 1}'; got '3'",
        ),
        ("stop --loss.beta 3 x", "--loss.beta is a config field; ray-prefopt stop reads no config"),
    ],
)
def test_what_is_wrong_is_said_here(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9"])
def test_a_cluster_that_there_is_not(folder: Path, capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert main(["status", "--address", address]) == 4
    assert capsys.readouterr().err == (
        "error: no job server at http://127.0.0.1:9 (ConnectionError): give the dashboard's address with --address, "
        "as http://HEAD:8265\n"
    )


def test_something_else_at_the_address(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert main(["status", "--address", address]) == 4
        server.shutdown()
    assert f"error: {address}: Version check returned 404." in capsys.readouterr().err


def test_a_job_brings_its_configs_its_wheel_and_its_folder(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile("w.whl", "w") as wheel:
        wheel.writestr("ray_prefopt/__init__.py", "")
    brought = folder / "brought"
    for name in ("data/a.jsonl", ".git/objects", "m/__pycache__/x.pyc"):
        (brought / name).parent.mkdir(parents=True)
        (brought / name).write_text("x")
    (brought / ".gitignore").write_text("data/\n*.yaml\nray_*\n")  # which Ray would follow
    (brought / "gone").symlink_to("nowhere")
    out = folder / "out"
    out.mkdir()
    _pack(Parcel("r", [], {"config-0.yaml": Path("run.yaml")}, Path("w.whl"), brought), out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"config-0.yaml", "data/a.jsonl", "ray_prefopt/__init__.py"}
    assert (out / "config-0.yaml").read_text() == CONFIG


def test_a_folder_that_is_too_large(folder: Path) -> None:
    with (folder / "model.bin").open("wb") as file:
        file.truncate(LARGEST_FOLDER + 2**20)
    with pytest.raises(
        ValueError,
        match=r"--working-dir .* has 101 MiB, and a job may bring 100: .* files: model.bin \(101 MiB\), run",
    ):
        _pack(Parcel("r", [], {}, folder=folder), folder / "out")
