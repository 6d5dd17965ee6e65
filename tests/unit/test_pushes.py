"""Pushes to the Hub, to a stand-in for it on this machine."""

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.compat.hub import Pushes, Repository, repository_name
from ray_prefopt.errors import HubError
from ray_prefopt.training.card import CardDetails
from ray_prefopt.training.checkpoint import open_checkpoint
from tests.hub import Hub, local_hub
from tests.tiny import save_tiny_model
from tests.unit.test_export import config_of, trained

CPO = CPOConfig


@pytest.fixture
def hub() -> Iterator[Hub]:
    with local_hub() as found:
        yield found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of two steps."""
    folder = tmp_path_factory.mktemp("run")
    trained(folder, config_of(save_tiny_model(folder / "base")), steps=2)
    return sorted(str(path) for path in (folder / "checkpoints").iterdir())


def saved(*checkpoints: str) -> list[tuple[str, Any]]:
    return [("saved", (path, open_checkpoint(path).state.step)) for path in checkpoints]


def pushed(args: CPOConfig, events: list[tuple[str, Any]]) -> None:
    with Pushes(args, CardDetails("mine")) as pushes:
        for event in events:
            pushes(event)


# --- where to ---


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (CPO("some/folder/out"), "out"),
        (CPO("out", hub_model_id="org/model"), "org/model"),
        (CPO("out", push_to_hub_model_id="model"), "model"),
        (SimPOConfig("out", push_to_hub_organization="org"), "org/out"),
        (CPO("out", push_to_hub_organization="org", push_to_hub_model_id="model"), "org/model"),
        (CPO("out", hub_model_id="org/model", push_to_hub_model_id="other"), "org/model"),
    ],
)
def test_the_name_of_the_repository(args: CPOConfig | SimPOConfig, name: str) -> None:
    assert repository_name(args) == name


@pytest.mark.parametrize(
    ("args", "given", "token", "visibility"),
    [
        (CPO("out", hub_token="one"), {}, "one", None),
        (CPO("out", push_to_hub_token="older"), {}, "older", None),
        (CPO("out", hub_token="one", hub_private_repo=True), {}, "one", "private"),
        (CPO("out", hub_token="one"), {"token": "two", "private": True}, "two", "private"),
    ],
)
def test_the_repository_is_made(
    hub: Hub, args: CPOConfig, given: dict[str, Any], token: str, visibility: str | None
) -> None:
    assert Repository.of(args, **given).id == "me/out"
    (created,) = hub.created
    assert (created["name"], created.get("visibility")) == ("out", visibility)
    assert hub.tokens == {token}


def test_a_folder_is_committed(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_text("hello")
    args = CPO("out", hub_token="one", hub_revision="mine")
    Repository.of(args).upload(tmp_path, "first")
    future = Repository.of(args, revision="other").upload(tmp_path, "second", inside="there", blocking=False)
    assert future.result().oid == f"{2:040x}"
    first, second = hub.commits
    assert (first.repository, first.revision, first.message) == ("me/out", "mine", "first")
    assert first.files == {"sub/a.txt": b"hello"}
    assert (second.revision, second.files) == ("other", {"there/sub/a.txt": b"hello"})


def test_a_hub_that_refuses(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    args = CPO("out", hub_token="one")
    repository = Repository.of(args)
    hub.refuses = {"create", "commit"}
    with pytest.raises(
        HubError,
        match=r"^no repository out to push to \(403 Forbidden: not you.*\): check hub_model_id, and hub_t",
    ):
        Repository.of(args)
    with pytest.raises(HubError, match=r"^nothing could be pushed to me/out: 403 Forbidden: not you"):
        repository.upload(tmp_path, "first")


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is set in tests."""
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(HubError, match=r"no repository out to push to .*offline mode is enabled"):
        Repository.of(CPO("out", hub_token="one"))


# --- while training goes on ---


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("end", {}),
        ("every_save", {"Training in progress, step 1": ""}),
        (
            "checkpoint",
            {
                "Training in progress, step 1": "",
                "Training in progress, step 1, checkpoint": "last-checkpoint/",
            },
        ),
        (
            "all_checkpoints",
            {
                "Training in progress, step 1": "",
                "Training in progress, step 1, checkpoint": "checkpoints/step-",
            },
        ),
    ],
)
def test_what_is_pushed_when(
    hub: Hub, checkpoints: list[str], tmp_path: Path, strategy: str, expected: dict[str, str]
) -> None:
    events = [("started", None), ("metrics", {"step": 1}), *saved(checkpoints[0]), ("warning", "")]
    pushed(CPO("out", hub_token="one", hub_strategy=strategy), events)
    assert hub.messages() == list(expected)
    for commit, place in zip(hub.commits, expected.values(), strict=True):
        assert all(name.startswith(place) for name in commit.files)
    if hub.commits:
        model = hub.commits[0].files
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= model.keys()
        assert ModelCard(model["README.md"].decode()).text.startswith("\n# mine\n")
    for commit in hub.commits[1:]:
        for name, data in commit.files.items():
            path = tmp_path / Path(name).relative_to(
                Path(*Path(name).parts[: 2 - (strategy == "checkpoint")])
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        assert open_checkpoint(str(tmp_path)).state.step == 1


@pytest.mark.parametrize(("always", "steps"), [(False, [1]), (True, [1, 2])])
def test_a_checkpoint_that_is_saved_during_a_push(
    hub: Hub, checkpoints: list[str], always: bool, steps: list[int]
) -> None:
    hub.open.clear()
    args = CPO("out", hub_token="one", hub_strategy="every_save", hub_always_push=always)
    with Pushes(args, CardDetails()) as pushes:
        for event in saved(*checkpoints):
            pushes(event)  # returns at once, though no commit is taken
        assert hub.commits == []
        hub.open.set()
    assert hub.messages() == [f"Training in progress, step {step}" for step in steps]


def test_a_push_that_fails_is_a_warning(
    hub: Hub, checkpoints: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.refuses = {"commit"}
    args = CPO("out", hub_token="one", hub_always_push=True)
    with caplog.at_level(logging.WARNING, "ray_prefopt"):
        pushed(args, [*saved(checkpoints[0]), ("saved", ("/gone", 7))])
    refused, gone = (record.getMessage() for record in caplog.records if record.name.endswith("compat.hub"))
    assert refused.startswith(
        "training goes on without a push of step 1: nothing could be pushed to me/out: 403 "
    )
    assert gone.startswith(
        "training goes on without a push of step 7: /gone: neither a checkpoint nor the folder"
    )


def test_nobody_waits_for_pushes_of_a_run_that_failed(hub: Hub, checkpoints: list[str]) -> None:
    hub.open.clear()
    args = CPO("out", hub_token="one", hub_always_push=True)
    with suppress(ZeroDivisionError), Pushes(args, CardDetails()) as pushes:
        for event in saved(*checkpoints):
            pushes(event)
        raise ZeroDivisionError
    hub.open.set()
    for thread in threading.enumerate():
        if thread.name.startswith("push"):
            thread.join()
    assert hub.messages() == ["Training in progress, step 1"]  # the other one was not begun
