"""The files for `ray up`: Ray's own checks of them, and what their nodes start with."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cluster" / "vm").glob("*.yaml"))
RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def load(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    assert isinstance(config, dict)
    return config


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """With Ray's defaults, as `ray up` checks it."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return dict(prepared)


def test_clouds() -> None:
    assert [path.stem for path in FILES] == ["aws", "gcp", "on-premise"]
    assert [load(path)["provider"]["type"] for path in FILES] == ["aws", "gcp", "local"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_takes_it(path: Path) -> None:
    config = checked(load(path))
    assert config["docker"]["image"] == f"registry.example.com/ray-prefopt:{RAY}-gpu"
    workers = [node for node in config["available_node_types"].values() if node["max_workers"]]
    assert [node["min_workers"] for node in workers] == [2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("place", [(), ("docker",), ("auth",)], ids=str)
def test_a_wrong_key_is_caught(path: Path, place: tuple[str, ...]) -> None:
    config = load(path)
    section = config
    for key in place:
        section = section[key]
    section["wrong"] = 1
    with pytest.raises(jsonschema.ValidationError, match="'wrong' was unexpected"):
        checked(config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nodes_ask_for_the_token_and_the_head_takes_no_work(path: Path) -> None:
    config = load(path)
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    given = {}
    for role in ("head", "worker"):
        stop, command = config[f"{role}_start_ray_commands"]
        assert stop == "ray stop"
        mode, program, name, *words = shlex.split(command)
        assert (mode, program, name) == ("RAY_AUTH_MODE=token", "ray", "start")
        given[role] = start.make_context("start", words).params  # refuses an option that there is not
    assert given["head"]["dashboard_host"] == "127.0.0.1"
    assert given["worker"]["address"] == f"$RAY_HEAD_IP:{given['head']['port']}"
    node_types = config.get("available_node_types")
    cpus = (
        node_types[config["head_node_type"]]["resources"]["CPU"] if node_types else given["head"]["num_cpus"]
    )
    assert cpus == 0


def test_the_autoscaler_is_told_what_nodes_of_google_have() -> None:
    """It adds none for a GPU that it does not know of; Amazon's types it looks up by itself."""
    worker = load(ROOT / "cluster" / "vm" / "gcp.yaml")["available_node_types"]["workers"]
    assert worker["node_config"]["machineType"] == f"g2-standard-{worker['resources']['CPU']}"
    assert worker["resources"]["GPU"] == 4
