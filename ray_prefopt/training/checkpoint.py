"""Checkpoints: every rank writes its own files, and a manifest that is written last says that they are whole.

A folder without a manifest does not exist; one whose files differ from its manifest is torn. Folder names carry a
random suffix, so that a retry or a worker thought dead can never write into another attempt's files.
"""

import json
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import fsspec
import xxhash
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ray_prefopt.errors import CheckpointError
from ray_prefopt.storage import write_text
from ray_prefopt.training import ranks

MANIFEST = "MANIFEST.json"
WEIGHTS = "weights.safetensors"
"""In a checkpoint of run.save_only_model: all that there is of the engine."""
FOLDER = re.compile(r"step-(\d{8})-[0-9a-f]{8}")
FORMAT_VERSION = 1
FileEntry = tuple[str, int, str]
"""Name relative to the checkpoint's folder, bytes, and xxh3-128."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoopState:
    """Where a run is. With the plan it gives back everything that is not weights: random numbers are seeded by step."""

    step: int = 0
    """Optimizer steps done."""
    order_hash: str = ""
    """Running hash of the pair ids of those steps (`data.plan.extend_hash`)."""
    best_value: float | None = None
    """Of the best checkpoint so far; higher is better."""
    best_step: int | None = None
    best_by: str = ""
    """The metric that decided, and its mode."""
    stopped: bool = False
    """A callback ended training here, before the last step."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint."""

    path: str
    """Folder or URI."""
    state: LoopState
    world_size: int
    files: tuple[FileEntry, ...]

    @property
    def is_resumable(self) -> bool:
        """Whether it holds more than weights."""
        return all(name != WEIGHTS for name, _, _ in self.files)

    def check_resumable(self) -> None:
        """Raises CheckpointError when training cannot go on from it."""
        if not self.is_resumable:
            raise CheckpointError(
                f"{self.path} holds weights alone (run.save_only_model): training cannot go on from it. Export it and "
                "set model.path to begin from its weights, or set run.force_new to begin anew"
            )

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size, _ in self.files)


def save_checkpoint(
    write: Callable[[Path], None], state: LoopState, folder: str, *, extra: dict[str, str], retained: int
) -> Checkpoint:
    """Save and commit a checkpoint under `folder`; called by all ranks. Returns what was committed.

    `write` puts this rank's files into an empty local folder; rank 0 adds `extra` (name to text). Afterwards all but
    the newest `retained` checkpoints and the best one are deleted. Raises CheckpointError on all ranks if any rank
    could not write, with nothing committed.
    """
    fs, root = url_to_fs(folder)
    name = ranks.broadcast(f"step-{state.step:08d}-{secrets.token_hex(4)}")
    target = f"{root}/{name}"
    own_extra = extra if ranks.rank() == 0 else {}
    try:
        with ExitStack() as stack:
            # All of them or none: an engine that writes waits for the other ranks.
            folders = _on_all_ranks(lambda: stack.enter_context(_private_folder(fs, target)))
            private = Path(folders[ranks.rank()])
            parts = _on_all_ranks(lambda: _write_part(fs, write, private, target, own_extra))
        files = tuple(sorted(file for part in parts for file in part))
        checkpoint = Checkpoint(f"{folder.rstrip('/')}/{name}", state, ranks.world_size(), files)
        _on_all_ranks(lambda: _commit(fs, target, checkpoint) if ranks.rank() == 0 else None)
    except _RankError as error:
        ranks.all_gather(None)  # until each has deleted its own folder
        if ranks.rank() == 0:
            _attempt(lambda: fs.rm(target, recursive=True))
        raise CheckpointError(
            f"step {state.step}: the checkpoint could not be written to {folder}: {error}. "
            "The one before it stands; free space or mend the storage, and start the same command again"
        ) from None
    if ranks.rank() == 0:
        _attempt(lambda: _retain(fs, root, retained, checkpoint))
    return checkpoint


class _RankError(Exception):
    """What went wrong, by rank; raised on all of them."""


def _on_all_ranks(action: Callable[[], T]) -> list[T]:
    """What each rank's action returns, on every rank. Raises _RankError on all ranks if any could not."""
    outcomes = ranks.all_gather(_attempt(action))
    failures = [f"rank {rank}: {each}" for rank, each in enumerate(outcomes) if isinstance(each, Exception)]
    if failures:
        raise _RankError("; ".join(failures))
    return [each for each in outcomes if not isinstance(each, Exception)]


def _attempt(action: Callable[[], T]) -> T | Exception:
    """The result, or the error as a value: the other ranks have to hear of it before anybody stops."""
    try:
        return action()
    except Exception as error:
        return error


def _private_folder(fs: fsspec.AbstractFileSystem, target: str) -> tempfile.TemporaryDirectory[str]:
    """An empty local folder of this rank."""
    fs.makedirs(target, exist_ok=True)
    beside = target if isinstance(fs, LocalFileSystem) else None  # so that publishing is a rename
    return tempfile.TemporaryDirectory(dir=beside, prefix=".rank-", ignore_cleanup_errors=True)


def _write_part(
    fs: fsspec.AbstractFileSystem,
    write: Callable[[Path], None],
    private: Path,
    target: str,
    extra: dict[str, str],
) -> list[FileEntry]:
    write(private)
    for file, text in extra.items():
        (private / file).write_text(text)
    return [_publish(fs, path, private, target) for path in _files(private)]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _publish(fs: fsspec.AbstractFileSystem, path: Path, private: Path, target: str) -> FileEntry:
    """Hash a file and put it in its place; a rename where the storage is local."""
    name = path.relative_to(private).as_posix()
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
        os.fsync(file.fileno())
    size = path.stat().st_size
    destination = f"{target}/{name}"
    if isinstance(fs, LocalFileSystem):
        Path(destination).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, destination)
    else:
        fs.put_file(str(path), destination)
    return name, size, digest.hexdigest()


def _commit(fs: fsspec.AbstractFileSystem, target: str, checkpoint: Checkpoint) -> None:
    body = {
        "format_version": FORMAT_VERSION,
        "state": asdict(checkpoint.state),
        "world_size": checkpoint.world_size,
        "files": checkpoint.files,
    }
    write_text(fs, f"{target}/{MANIFEST}", json.dumps({**body, "hash": _self_hash(body)}, indent=1))


def _self_hash(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def _retain(fs: fsspec.AbstractFileSystem, root: str, retained: int, saved: Checkpoint) -> None:
    """Delete what killed ranks left unfinished, another checkpoint of the step that is `saved`, which was passed over
    as torn, and all but the newest and the best ones.

    Manifests go first, so that no checkpoint is ever half there.
    """
    committed, state = _folders(fs, root), saved.state
    keep = {step for step, _ in committed[-retained:]} | {state.step, state.best_step}
    for step, folder in committed:
        is_other = step == state.step and not saved.path.endswith(folder.rsplit("/", 1)[-1])
        if is_other or step not in keep:
            fs.rm_file(f"{folder}/{MANIFEST}")
            fs.rm(folder, recursive=True)
    for _, folder in set(_named_folders(fs, root)) - set(committed):
        fs.rm(folder, recursive=True)


def _named_folders(fs: fsspec.AbstractFileSystem, root: str) -> list[tuple[int, str]]:
    """Folders of checkpoints as (step, folder), oldest first, committed or not."""
    if not fs.exists(root):
        return []
    paths = [path.rstrip("/") for path in fs.ls(root, detail=False)]
    named = [(FOLDER.fullmatch(path.rsplit("/", 1)[-1]), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in named if match)


def _folders(fs: fsspec.AbstractFileSystem, root: str) -> list[tuple[int, str]]:
    """Committed checkpoints as (step, folder), oldest first."""
    return [entry for entry in _named_folders(fs, root) if fs.exists(f"{entry[1]}/{MANIFEST}")]


def open_checkpoint(path: str, *, verify: Literal["sizes", "hashes"] = "hashes") -> Checkpoint:
    """The checkpoint in a folder. Raises CheckpointError, naming the file, when it is missing, torn or altered."""
    fs, folder = url_to_fs(path)
    try:
        body = json.loads(fs.cat_file(f"{folder}/{MANIFEST}"))
        stated = body.pop("hash")
        if stated != _self_hash(body):
            raise ValueError("its own hash does not match")
        if body["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {body['format_version']}; this version reads {FORMAT_VERSION}")
        state = LoopState(**body["state"])
        files = tuple((_inside(name), size, digest) for name, size, digest in body["files"])
        checkpoint = Checkpoint(path, state, body["world_size"], files)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no checkpoint here ({MANIFEST} is missing)") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}/{MANIFEST}: damaged ({error}); delete the folder to do without it"
        ) from error
    for name, size, digest in files:
        _verify(fs, f"{folder}/{name}", size, digest, verify)
    return checkpoint


def _inside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name!r} leads out of the folder")
    return name


def _verify(fs: fsspec.AbstractFileSystem, path: str, size: int, digest: str, verify: str) -> None:
    try:
        found = fs.info(path)["size"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; the checkpoint is not whole") from error
    if found != size:
        raise CheckpointError(f"{path}: {found} bytes, its manifest says {size}; the checkpoint is not whole")
    if verify == "hashes":
        actual = xxhash.xxh3_128()
        with fs.open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                actual.update(chunk)
        if actual.hexdigest() != digest:
            raise CheckpointError(f"{path}: its content is not what was saved (hash differs)")


def latest_checkpoint(
    folder: str,
    *,
    on_bad: Literal["refuse", "fallback"] = "refuse",
    verify: Literal["sizes", "hashes"] = "hashes",
) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None when none was ever committed: then, and only then, step 0.

    Raises CheckpointError when the newest is torn (`refuse`), or all of them are (`fallback`).
    """
    fs, root = url_to_fs(folder)
    folders = _folders(fs, root)
    for position, (_, path) in enumerate(reversed(folders)):
        try:
            return open_checkpoint(fs.unstrip_protocol(path) if "://" in folder else path, verify=verify)
        except CheckpointError as error:
            if on_bad == "refuse":
                raise CheckpointError(
                    f"{error}. run.on_bad_checkpoint: fallback uses the one before"
                ) from error
            if position == len(folders) - 1:
                raise CheckpointError(
                    f"none of the {len(folders)} checkpoints in {folder} is whole; last: {error}"
                ) from error
            logger.warning("%s; falling back to the checkpoint before", error)
    return None


def has_checkpoints(folder: str) -> bool:
    """Whether any was ever committed, whole or not."""
    return bool(_folders(*url_to_fs(folder)))


def begun_anew(checkpoint: Checkpoint) -> Checkpoint:
    """As another run begins with it: what is best, and where to stop, is for that run to find."""
    state = replace(checkpoint.state, best_value=None, best_step=None, best_by="", stopped=False)
    return replace(checkpoint, state=state)


def find_checkpoint(path: str) -> Checkpoint | None:
    """The checkpoint in this folder, or the newest one of the run in it; None when it is neither's."""
    fs, folder = url_to_fs(path)
    if fs.exists(f"{folder}/{MANIFEST}"):
        return open_checkpoint(path)
    return latest_checkpoint(f"{path.rstrip('/')}/checkpoints")


def checkpoint_at(folder: str, step: int) -> str | None:
    """Path of the newest committed checkpoint of this step, if there is one."""
    fs, root = url_to_fs(folder)
    paths = [path for found, path in _folders(fs, root) if found == step]
    return f"{folder.rstrip('/')}/{paths[-1].rsplit('/', 1)[-1]}" if paths else None


@contextmanager
def local_copy(checkpoint: Checkpoint, *, is_first: bool = True) -> Iterator[Path]:
    """A local folder with the checkpoint's files: its own where the storage is local, else a copy per node.

    Called by all ranks; `is_first` on one of each node.
    """
    fs, folder = url_to_fs(checkpoint.path)
    if isinstance(fs, LocalFileSystem):
        yield Path(folder)
        return

    def download(copy: Path) -> None:
        for name, _, _ in checkpoint.files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{folder}/{name}", str(copy / name))

    with made_once(download, is_first=is_first) as copy:
        yield copy


@contextmanager
def made_once(make: Callable[[Path], None], *, is_first: bool = True) -> Iterator[Path]:
    """A temporary folder per node that `make` fills, for all ranks to read; all of them raise what it raised on one."""
    folder = Path(tempfile.gettempdir(), ranks.broadcast(f"prefopt-{secrets.token_hex(8)}"))
    try:
        outcome = _attempt(lambda: _filled(folder, make)) if is_first else None
        for failure in ranks.all_gather(outcome):  # nobody reads before it is all there
            if failure is not None:
                raise failure
        yield folder
        ranks.all_gather(None)  # nor is it gone while somebody reads
    finally:
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _filled(folder: Path, make: Callable[[Path], None]) -> None:
    folder.mkdir()
    make(folder)


def better(state: LoopState, value: float, by: str) -> LoopState:
    """The state with `value` as the best one so far, if it is: higher is better, and NaN is nothing.

    `by` says what it is of; the best one by something else is none.
    """
    is_beaten = state.best_by == by and state.best_value is not None and value <= state.best_value
    if is_beaten or math.isnan(value):
        return state
    return replace(state, best_value=value, best_step=state.step, best_by=by)
