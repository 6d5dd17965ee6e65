"""A process that begins with what `allocator` says has jemalloc, with these settings; workers on CPUs do."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_prefopt.allocator import allocator
from ray_prefopt.config import TrainConfig
from ray_prefopt.training.workers import _environment

ASK = """
import ctypes
def ask(name, kind):
    value, size = kind(), ctypes.c_size_t(ctypes.sizeof(kind))
    failed = ctypes.CDLL(None).mallctl(name, ctypes.byref(value), ctypes.byref(size), None, 0)
    return value.value if not failed else "unknown"
print(ask(b"opt.dirty_decay_ms", ctypes.c_ssize_t), ask(b"opt.muzzy_decay_ms", ctypes.c_ssize_t),
      ask(b"opt.oversize_threshold", ctypes.c_size_t), ask(b"opt.lg_extent_max_active_fit", ctypes.c_size_t))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is for x86-64")
def test_a_process_has_it_with_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, **allocator()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["-1", "-1", "0", "12"]
    assert not done.stderr  # jemalloc and the linker complain there


def test_another_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    assert allocator() == {}


def test_none_where_it_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr("ray_prefopt.allocator.LIBRARY", tmp_path / "libjemalloc.so")
    assert allocator() == {}
    (tmp_path / "libjemalloc.so").touch()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")  # pages may be larger than it was built for
    assert allocator() == {}


def test_workers_on_cpus_have_it_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)

    def preloaded(**run: Any) -> str | None:
        config = {"model": {"path": "m"}, "data": {"train": "d"}, "run": {"name": "n", **run}}
        return _environment(TrainConfig.model_validate(config)).get("LD_PRELOAD")

    assert preloaded() == allocator().get("LD_PRELOAD")
    assert preloaded(use_gpu=True) is None
    assert preloaded(env_vars={"LD_PRELOAD": ""}) == ""
