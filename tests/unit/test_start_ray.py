"""Which cluster a run connects to; no address of one that is gone makes it wait."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_prefopt.errors import ResourceError
from ray_prefopt.training import workers

pytestmark = pytest.mark.ray  # it takes this machine by its outer address


@pytest.fixture
def inits(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The address of each ray.init, where this process has no Ray and no other runs here; none is for a dashboard."""
    found: list[str | None] = []

    def init(address: str | None, *, include_dashboard: bool, **_: Any) -> None:
        assert not include_dashboard
        found.append(address)

    monkeypatch.setattr(workers.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(workers.ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", frozenset)
    return found


@pytest.fixture
def left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `ray start` writes the address of its cluster."""
    path = tmp_path / "ray_current_cluster"
    monkeypatch.setattr("ray._private.utils.get_ray_address_file", lambda _: str(path))
    return path


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    with socket.create_server(("", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_ray_of_its_own(inits: list[str | None], left_behind: Path) -> None:
    workers.start_ray()
    assert inits == [None]


def test_the_cluster_of_ray_start(
    inits: list[str | None], left_behind: Path, listening: str, closed: str
) -> None:
    left_behind.write_text(listening)
    workers.start_ray()
    left_behind.write_text(closed)
    workers.start_ray()
    assert inits == [None, "local"]


def test_an_address_where_nothing_answers(
    inits: list[str | None], left_behind: Path, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(
        ResourceError,
        match=r"no Ray cluster answers at .*, which RAY_ADDRESS=.* set RAY_ADDRESS=local to run",
    ):
        workers.start_ray()
    assert not inits


@pytest.mark.parametrize(
    ("address", "words"),
    [("auto", "Could not find any running Ray instance"), ("nowhere", "Invalid address format: nowhere")],
)
def test_an_address_of_no_cluster(
    inits: list[str | None], left_behind: Path, address: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourceError, match=f"RAY_ADDRESS={address} names no Ray cluster: {words}"):
        workers.start_ray()
    assert not inits


@pytest.mark.parametrize("address", ["local", "ray://nowhere:10001"])
def test_what_ray_reads_itself(
    inits: list[Any], left_behind: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    workers.start_ray()
    assert inits == [None]
