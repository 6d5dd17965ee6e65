"""Checkpoints are whole or do not exist, whoever fails and whenever; and what was damaged afterwards is named."""

import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash

from ray_prefopt.errors import CheckpointError
from ray_prefopt.training import checkpoint as checkpoint_module
from ray_prefopt.training import ranks
from ray_prefopt.training.checkpoint import (
    Checkpoint,
    LoopState,
    better,
    checkpoint_at,
    has_checkpoints,
    latest_checkpoint,
    local_copy,
    made_once,
    open_checkpoint,
    save_checkpoint,
)


def write_part(folder: Path) -> None:
    """Some files of this rank, one of them in a folder of its own."""
    (folder / "engine").mkdir()
    (folder / "engine" / f"rank-{ranks.rank()}.bin").write_bytes(bytes(range(200)))
    (folder / f"weights-{ranks.rank()}.bin").write_bytes(b"weights")


def save(
    folder: str | Path,
    step: int,
    *,
    write: Callable[[Path], None] = write_part,
    retained: int = 10,
    **state: Any,
) -> Checkpoint:
    return save_checkpoint(
        write,
        LoopState(step, order_hash=f"hash-{step}", **state),
        str(folder),
        extra={"config.json": "{}"},
        retained=retained,
    )


def steps_in(folder: str | Path) -> list[int]:
    return [step for step, _ in checkpoint_module._folders(*fsspec.core.url_to_fs(str(folder)))]


def on_ranks(world_size: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returned or raised on each of several threads that talk like ranks."""
    here = threading.local()
    box: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size, timeout=20)
    results: list[Any] = [None] * world_size

    def all_gather(value: Any) -> list[Any]:
        box[here.rank] = value
        barrier.wait()
        found = list(box)
        barrier.wait()
        return found

    def rank_main(rank: int) -> None:
        here.rank = rank
        try:
            results[rank] = work()
        except Exception as error:
            results[rank] = error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "rank", lambda: here.rank)
        patch.setattr(ranks, "world_size", lambda: world_size)
        patch.setattr(ranks, "all_gather", all_gather)
        patch.setattr(ranks, "broadcast", lambda value: all_gather(value)[0])
        threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


# --- saving ---


def test_what_was_saved_is_found(tmp_path: Path) -> None:
    saved = save(tmp_path, 3, best_value=0.5, best_step=2)
    assert latest_checkpoint(str(tmp_path)) == saved == open_checkpoint(saved.path)
    assert saved.state == LoopState(3, "hash-3", 0.5, 2)
    assert (saved.world_size, saved.num_bytes) == (1, 200 + 7 + 2)
    assert [(name, size) for name, size, _ in saved.files] == [
        ("config.json", 2),
        ("engine/rank-0.bin", 200),
        ("weights-0.bin", 7),
    ]
    with local_copy(saved) as folder:
        assert str(folder) == saved.path
        assert (folder / "engine/rank-0.bin").read_bytes() == bytes(range(200))
    everything = {path.relative_to(saved.path).as_posix() for path in Path(saved.path).rglob("*")}
    assert everything == {"engine", "MANIFEST.json", *(name for name, _, _ in saved.files)}


def test_each_rank_writes_its_part_and_rank_0_the_rest(tmp_path: Path) -> None:
    first, second = on_ranks(2, lambda: save(tmp_path, 1))
    assert first == second == latest_checkpoint(str(tmp_path))
    assert first.world_size == 2
    assert [name for name, _, _ in first.files] == [
        "config.json",
        "engine/rank-0.bin",
        "engine/rank-1.bin",
        "weights-0.bin",
        "weights-1.bin",
    ]


def test_a_failure_on_one_rank_stops_all_and_commits_nothing(tmp_path: Path) -> None:
    previous = save(tmp_path, 1)

    def full_on_rank_1(folder: Path) -> None:
        write_part(folder)
        if ranks.rank() == 1:
            raise OSError(28, "No space left on device")

    results = on_ranks(2, lambda: save(tmp_path, 2, write=full_on_rank_1))
    for error in results:
        assert isinstance(error, CheckpointError)
        assert str(error) == (
            f"step 2: the checkpoint could not be written to {tmp_path}: "
            "rank 1: [Errno 28] No space left on device. The one before it stands; "
            "free space or mend the storage, and start the same command again"
        )
    assert os.listdir(tmp_path) == [Path(previous.path).name]
    assert latest_checkpoint(str(tmp_path)) == previous


def test_no_rank_writes_where_one_has_no_folder(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that writes waits for the other ranks."""
    previous, make, wrote = save(bucket, 1), tempfile.TemporaryDirectory, []

    def full_on_rank_1(**options: Any) -> Any:
        assert options[
            "ignore_cleanup_errors"
        ]  # what NFS says of a folder that is deleted is no failure to save
        if ranks.rank() == 1:
            raise OSError(28, "No space left on device")
        return make(**{**options, "dir": tmp_path})

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full_on_rank_1)
    results = on_ranks(2, lambda: save(bucket, 2, write=wrote.append))
    assert {
        "rank 1: [Errno 28] No space left on device. The one before" in str(error) for error in results
    } == {True}
    assert wrote == list(tmp_path.iterdir()) == []
    assert steps_in(bucket) == [previous.state.step]


def test_a_failure_to_commit_stops_all_and_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = save(tmp_path, 1)

    def fail(*_: Any) -> None:
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_text", fail)
        results = on_ranks(2, lambda: save(tmp_path, 2))
    assert [type(error) for error in results] == [CheckpointError] * 2
    assert {"rank 0: Input/output error. The one before" in str(error) for error in results} == {True}
    assert os.listdir(tmp_path) == [Path(previous.path).name]


def test_every_rank_that_failed_is_named(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError(f"disk {ranks.rank()} is gone")

    results = on_ranks(3, lambda: save(tmp_path, 2, write=fail))
    found = {str(error) for error in results}
    assert len(found) == 1
    assert "rank 0: disk 0 is gone; rank 1: disk 1 is gone; rank 2: disk 2 is gone." in found.pop()
    assert latest_checkpoint(str(tmp_path)) is None


class Killed(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("survived", range(4))
def test_a_process_killed_while_saving_leaves_the_previous_one(tmp_path: Path, survived: int) -> None:
    """Three files and the manifest are put in place by renames; the last one is the commit."""
    previous = save(tmp_path, 1)
    replace, renamed = os.replace, []

    def replace_or_die(source: Any, target: Any) -> None:
        if len(renamed) == survived:
            raise Killed
        replace(source, target)
        renamed.append(Path(target).name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(Killed):
            save(tmp_path, 2)
    assert renamed == ["config.json", "rank-0.bin", "weights-0.bin", "MANIFEST.json"][:survived]
    assert latest_checkpoint(str(tmp_path)) == previous
    assert latest_checkpoint(str(tmp_path)) != save(tmp_path, 2) == latest_checkpoint(str(tmp_path))


def test_a_step_that_is_done_again_has_one_checkpoint(tmp_path: Path) -> None:
    """In a folder of its own; the other one may be torn, and have been passed over."""

    def other(folder: Path) -> None:
        (folder / "weights-0.bin").write_bytes(b"others!")

    first, one, two = save(tmp_path, 4), save(tmp_path, 5), save(tmp_path, 5, write=other)
    assert one.path != two.path
    assert sorted(os.listdir(tmp_path)) == sorted(Path(each.path).name for each in (first, two))
    assert latest_checkpoint(str(tmp_path)) == open_checkpoint(two.path) == two


# --- retention ---


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = []
    for step in range(1, 7):
        save(tmp_path, step, retained=2, best_step=2 if step >= 2 else None)
        kept.append(steps_in(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6]]
    assert len(os.listdir(tmp_path)) == 3


def test_a_better_one_takes_the_place_of_the_best(tmp_path: Path) -> None:
    state = LoopState(0)
    for step, value in enumerate([0.5, 0.7, math.nan, 0.7, 0.9, math.nan, 0.1], start=1):
        state = better(replace(state, step=step), value, "max eval_x")
        save_checkpoint(write_part, state, str(tmp_path), extra={}, retained=1)
    assert (state.best_value, state.best_step) == (0.9, 5)
    assert steps_in(tmp_path) == [5, 7]


def test_what_is_not_better() -> None:
    state = LoopState(8, "h", best_value=0.7, best_step=2, best_by="max eval_x")
    assert better(state, 0.7, "max eval_x") is state
    assert better(state, math.nan, "max eval_x") is state
    assert better(state, 0.71, "max eval_x") == replace(state, best_value=0.71, best_step=8)
    assert better(LoopState(4), -1.0, "min eval_loss") == LoopState(
        4, best_value=-1.0, best_step=4, best_by="min eval_loss"
    )
    assert better(LoopState(4), math.nan, "min eval_loss") == LoopState(4)


def test_the_best_one_by_something_else_is_none() -> None:
    state = LoopState(8, best_value=0.7, best_step=2, best_by="max eval_x")
    assert better(state, -4.5, "min eval_loss") == LoopState(
        8, best_value=-4.5, best_step=8, best_by="min eval_loss"
    )


def test_deleting_begins_with_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that stops half way leaves no checkpoint that looks torn."""
    save(tmp_path, 1)
    fs = type(fsspec.filesystem("file"))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(fs, "rm", fail)
    newest = save(tmp_path, 2, retained=1)
    assert len(os.listdir(tmp_path)) == 2
    assert steps_in(tmp_path) == [2]
    assert latest_checkpoint(str(tmp_path)) == newest


# --- damage ---


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads((folder / "MANIFEST.json").read_text())
    edit(body)
    (folder / "MANIFEST.json").write_text(json.dumps(body))


def signed(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest that is consistent with itself, and wrong."""

    def sign(body: dict[str, Any]) -> None:
        del body["hash"]
        edit(body)
        body["hash"] = checkpoint_module._self_hash(body)

    edit_manifest(folder, sign)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (
        lambda folder: os.truncate(folder / "engine/rank-0.bin", 199),
        r"/engine/rank-0\.bin: 199 bytes, its manifest says 200; the checkpoint is not whole",
    ),
    "appended": (
        lambda folder: (folder / "weights-0.bin").write_bytes(b"weights!"),
        r"/weights-0\.bin: 8 bytes, its manifest says 7; the checkpoint is not whole",
    ),
    "altered": (
        lambda folder: (folder / "weights-0.bin").write_bytes(b"weighty"),
        r"/weights-0\.bin: its content is not what was saved \(hash differs\)",
    ),
    "missing": (
        lambda folder: (folder / "config.json").unlink(),
        r"/config\.json: missing; the checkpoint is not whole",
    ),
    "manifest cut": (
        lambda folder: os.truncate(folder / "MANIFEST.json", 40),
        r"/MANIFEST\.json: damaged \(.*\); delete the folder to do without it",
    ),
    "manifest empty": (
        lambda folder: (folder / "MANIFEST.json").write_bytes(b""),
        r"/MANIFEST\.json: damaged \(.*\); delete the folder to do without it",
    ),
    "manifest binary": (
        lambda folder: (folder / "MANIFEST.json").write_bytes(b"\xff\xfe"),
        r"/MANIFEST\.json: damaged \(.*\)",
    ),
    "manifest a list": (
        lambda folder: (folder / "MANIFEST.json").write_text("[]"),
        r"/MANIFEST\.json: damaged \(.*\)",
    ),
    "manifest without hash": (
        lambda folder: edit_manifest(folder, lambda body: body.pop("hash")),
        r"/MANIFEST\.json: damaged \('hash'\)",
    ),
    "manifest altered": (
        lambda folder: edit_manifest(folder, lambda body: body["state"].update(step=9)),
        r"/MANIFEST\.json: damaged \(its own hash does not match\)",
    ),
    "manifest of another kind": (
        lambda folder: signed(folder, lambda body: body.pop("files")),
        r"/MANIFEST\.json: damaged \('files'\)",
    ),
    "state of another kind": (
        lambda folder: signed(folder, lambda body: body["state"].update(epoch=1)),
        r"/MANIFEST\.json: damaged \(.*unexpected keyword argument 'epoch'\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_refused_by_name_or_passed_over(tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    previous, newest = save(tmp_path, 1), save(tmp_path, 2)
    spoil(Path(newest.path))
    with pytest.raises(CheckpointError, match=f"^{re.escape(newest.path)}{message}"):
        open_checkpoint(newest.path)
    with pytest.raises(
        CheckpointError, match=rf"{message}.*\. run\.on_bad_checkpoint: fallback uses the one before$"
    ):
        latest_checkpoint(str(tmp_path))
    assert latest_checkpoint(str(tmp_path), on_bad="fallback") == previous


def test_falling_back_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    Path(newest.path, "config.json").unlink()
    latest_checkpoint(str(tmp_path), on_bad="fallback")
    assert [record.getMessage() for record in caplog.records] == [
        f"{newest.path}/config.json: missing; the checkpoint is not whole; falling back to the checkpoint before"
    ]


def test_when_all_are_torn_the_run_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        Path(save(tmp_path, step).path, "config.json").unlink()
    assert has_checkpoints(str(tmp_path))
    with pytest.raises(
        CheckpointError,
        match=rf"^none of the 3 checkpoints in {re.escape(str(tmp_path))} is whole; last: "
        r".*step-00000001-.*/config\.json: missing",
    ):
        latest_checkpoint(str(tmp_path), on_bad="fallback")


def test_without_a_manifest_a_checkpoint_does_not_exist(tmp_path: Path) -> None:
    previous, newest = save(tmp_path, 1), save(tmp_path, 2)
    Path(newest.path, "MANIFEST.json").unlink()
    assert latest_checkpoint(str(tmp_path)) == previous
    with pytest.raises(CheckpointError, match=r"no checkpoint here \(MANIFEST\.json is missing\)"):
        open_checkpoint(newest.path)


def test_a_run_without_checkpoints_begins_at_step_0(tmp_path: Path) -> None:
    (tmp_path / "step-00000001-0123abcd").mkdir()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "notes.txt").touch()
    assert latest_checkpoint(str(tmp_path)) is None
    assert latest_checkpoint(str(tmp_path / "nowhere")) is None
    assert not has_checkpoints(str(tmp_path))


def test_a_checkpoint_is_found_by_its_step(tmp_path: Path) -> None:
    one, two, three = (save(tmp_path, step) for step in (1, 2, 3))
    Path(three.path, "MANIFEST.json").unlink()
    found = [checkpoint_at(f"{tmp_path}/", step) for step in (1, 2, 3, 4)]
    assert found == [one.path, two.path, None, None]
    in_bucket = save("memory://bucket/by-step", 7)
    assert checkpoint_at("memory://bucket/by-step", 7) == in_bucket.path


def test_sizes_alone_can_be_verified(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    Path(saved.path, "weights-0.bin").write_bytes(b"weighty")
    assert latest_checkpoint(str(tmp_path), verify="sizes") == saved
    os.truncate(Path(saved.path, "weights-0.bin"), 3)
    with pytest.raises(CheckpointError, match="3 bytes, its manifest says 7"):
        latest_checkpoint(str(tmp_path), verify="sizes")


# --- remote storage ---


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    return f"memory://bucket/{request.node.name}/checkpoints"


def test_remote_storage_keeps_the_same_promises(bucket: str) -> None:
    for step in range(1, 5):
        on_ranks(2, lambda step=step: save(bucket, step, retained=2, best_step=1))
    assert steps_in(bucket) == [1, 3, 4]
    newest = latest_checkpoint(bucket)
    assert newest is not None
    assert (newest.state.step, newest.world_size, len(newest.files)) == (4, 2, 5)
    with local_copy(newest) as folder:
        assert (folder / "engine/rank-1.bin").read_bytes() == bytes(range(200))
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        assert names == [name for name, _, _ in newest.files]
    assert not folder.exists()

    fs, path = fsspec.core.url_to_fs(newest.path)
    fs.pipe_file(f"{path}/weights-1.bin", b"weighty")
    with pytest.raises(CheckpointError, match=r"weights-1\.bin: its content is not what was saved"):
        latest_checkpoint(bucket)
    fallen_back = latest_checkpoint(bucket, on_bad="fallback")
    assert fallen_back is not None
    assert fallen_back.state.step == 3
    fs.rm_file(f"{path}/MANIFEST.json")
    assert latest_checkpoint(bucket) == fallen_back


def test_remote_storage_that_fails_commits_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, root = fsspec.core.url_to_fs(bucket)
    save(bucket, 1)
    put_file = type(fs).put_file

    def fail_for_rank_1(self: Any, source: str, target: str, **options: Any) -> None:
        if target.endswith("-1.bin"):
            raise PermissionError(f"access denied: {target.rsplit('/', 1)[-1]}")
        put_file(self, source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "put_file", fail_for_rank_1)
        results = on_ranks(2, lambda: save(bucket, 2))
    assert {
        f"written to {bucket}: rank 1: access denied: rank-1.bin." in str(error) for error in results
    } == {True}
    assert steps_in(bucket) == [1]
    assert len(fs.ls(root)) == 1


def test_a_copy_is_made_once_per_node_and_read_by_all(bucket: str) -> None:
    saved = save(bucket, 1)

    def read() -> tuple[Path, bytes]:
        with local_copy(saved, is_first=ranks.rank() == 0) as folder:
            return folder, (folder / "weights-0.bin").read_bytes()

    (first, data), *others = on_ranks(3, read)
    assert others == [(first, data)] * 2
    assert data == b"weights"
    assert not first.exists()
    assert first.parent == Path(tempfile.gettempdir())


def test_what_cannot_be_made_fails_on_all_ranks() -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise CheckpointError(f"cannot convert into {folder}")

    def use() -> None:
        with made_once(fail, is_first=ranks.rank() == 0):
            raise AssertionError("nobody gets here")

    errors = on_ranks(2, use)
    assert [type(error) for error in errors] == [CheckpointError] * 2
    (folder,) = {str(error).removeprefix("cannot convert into ") for error in errors}
    assert not Path(folder).exists()


def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = _committed(tmp_path)
    _rewrite(folder, files=[["../../secret", 3, "0"]])
    with pytest.raises(CheckpointError, match=r"damaged \('\.\./\.\./secret' leads out of the folder\)"):
        open_checkpoint(str(folder))


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = _committed(tmp_path)
    _rewrite(folder, format_version=2)
    with pytest.raises(CheckpointError, match=r"damaged \(format 2; this version reads 1\)"):
        open_checkpoint(str(folder))


def _committed(tmp_path: Path) -> Path:
    saved = save_checkpoint(
        lambda _: None, LoopState(1), str(tmp_path), extra={"config.json": "{}"}, retained=1
    )
    return Path(saved.path)


def _rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest, and its hash with it."""
    body = json.loads((folder / "MANIFEST.json").read_text()) | changes
    del body["hash"]
    text = json.dumps(body, sort_keys=True).encode()
    body["hash"] = xxhash.xxh3_128_hexdigest(text)
    (folder / "MANIFEST.json").write_text(json.dumps(body))


def test_what_killed_ranks_left_is_deleted_by_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / "step-00000003-0123abcd"
    left.mkdir()
    (left / "shard").write_text("half")
    other = tmp_path / "mine"
    other.mkdir()
    kept = _committed(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([other, kept])
