"""Files are replaced whole, and folders make way, on a disk and in a bucket."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ray_prefopt.storage import move_aside, write_file, write_text


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, path = fsspec.filesystem("file"), str(tmp_path / "folder" / "a")
    write_file(fs, path, b"first")
    write_text(fs, path, "größer")
    assert Path(path).read_text() == "größer"

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(fs, path, b"third")
    assert Path(path).read_text() == "größer"


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_folder_makes_way(kind: str, tmp_path: Path) -> None:
    fs, folder = fsspec.filesystem(kind), f"{tmp_path}/run"
    write_text(fs, f"{folder}/a", "1")
    move_aside(fs, folder)
    assert not fs.exists(folder)
    (aside,) = fs.ls(str(tmp_path), detail=False)
    assert aside.startswith(f"{folder}.old-20")
    assert fs.cat_file(f"{aside}/a") == b"1"
    move_aside(fs, folder)
    assert fs.ls(str(tmp_path), detail=False) == [aside]
