"""What speaks against a model before it is loaded, and afterwards: asked once, said in a line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ray_prefopt.model import hub
from ray_prefopt.model.hub import why_missing, why_not_loaded


class Hub:
    """Stands for huggingface_hub: what it is asked, and what it answers."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, cached: object = None
    ) -> None:
        self.error = error
        self.asked: list[tuple[str, str | None, float]] = []
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "HfApi", lambda: self)
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: cached)

    def model_info(self, name: str, *, revision: str | None, timeout: float) -> None:
        self.asked.append((name, revision, timeout))
        if self.error is not None:
            raise self.error


ANSWER: Any = SimpleNamespace(headers={}, request=None)
"""What the errors of huggingface_hub look into."""


@pytest.mark.parametrize("path", ["/no/such/folder", "./here", "~/there", "a/b/c"])
def test_a_folder_that_does_not_exist(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Hub(monkeypatch).asked
    assert why_missing(path, None, "config.json") == "no such folder, and not a hub id (org/name)"
    assert asked == []


def test_the_hub_is_asked_once_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Hub(monkeypatch).asked
    assert why_missing("org/name", "v2", "config.json") is None
    assert why_missing("gpt2", None, "config.json") is None
    assert asked == [("org/name", "v2", 10), ("gpt2", None, 10)]


def test_the_hub_is_not_asked_for_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Hub(monkeypatch, cached="/cache/config.json").asked
    assert why_missing(str(tmp_path), None, "config.json") is None
    assert why_missing("org/name", None, "config.json") is None
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "try_to_load_from_cache", None)
    assert why_missing("org/name", None, "config.json") is None
    assert asked == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            RepositoryNotFoundError("404 Client Error.", response=ANSWER),
            "no such folder, and no model on the Hub that you may see: check the name, or set HF_TOKEN",
        ),
        (
            RevisionNotFoundError("404 Client Error.", response=ANSWER),
            "it has no revision 'v2' on the Hub; set model.revision to one that it has",
        ),
        (
            OSError("[Errno -2] Name or service not known"),
            "no such folder, and the Hub cannot be reached ([Errno -2] Name or service not known): check the network, "
            "or set HF_HUB_OFFLINE=1 to use what was downloaded before",
        ),
        (
            TimeoutError(),
            "no such folder, and the Hub cannot be reached (TimeoutError): check the network, or set HF_HUB_OFFLINE=1 "
            "to use what was downloaded before",
        ),
    ],
)
def test_what_the_hub_refuses_is_said(
    monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    Hub(monkeypatch, error)
    assert why_missing("org/name", "v2", "config.json") == sentence


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OSError("You are trying to access a gated repo.\nMake sure to have access to it."),
            "it is gated or private: ask for access on its hub page, then set HF_TOKEN",
        ),
        (
            OSError("401 Client Error: Unauthorized for url"),
            "it is gated or private: ask for access on its hub page, then set HF_TOKEN",
        ),
        (
            ValueError("The repository contains custom code.\nPlease pass `trust_remote_code=True`."),
            "it comes with its own code; read that code, then set model.trust_remote_code: true",
        ),
        (
            OSError("\n  org/name has no file named config.json.\nCheck it."),
            "org/name has no file named config.json.",
        ),
        (OSError("x" * 1000), "x" * 400),
        (KeyError(), "KeyError"),
    ],
)
def test_what_transformers_refuses_is_said(error: Exception, reason: str) -> None:
    assert why_not_loaded("org/name", error) == reason


def test_numbers_in_a_folders_error_are_no_status(tmp_path: Path) -> None:
    assert why_not_loaded(str(tmp_path), ValueError("size 401 is not 402")) == "size 401 is not 402"
