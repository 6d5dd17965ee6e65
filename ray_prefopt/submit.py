"""Runs as jobs of a Ray cluster, over the job server that its dashboard has.

A job brings its config files, and a wheel of this package or a folder when asked to: nothing else of the machine that
submits it. The token that a cluster asks for is Ray's own, from RAY_AUTH_TOKEN or ~/.ray/auth_token.
"""

import asyncio
import itertools
import os
import shlex
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ray_prefopt.errors import ConfigError, ResourceError, TrainingError

LARGEST_FOLDER = 100 * 2**20
"""Bytes; Ray keeps what a job brings in the memory of its head."""
STOPPED_WITHIN_S = 30.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parcel:
    """A job as it is sent: what it runs, and what it brings along."""

    run: str
    """Name of the run, by which its jobs are found again."""
    command: Sequence[str]
    """Arguments of `ray-prefopt`; config files by the names that they have in `files`."""
    files: Mapping[str, Path]
    """Config files by their names in the job's working directory."""
    wheel: Path | None = None
    """Of this package, instead of what the nodes have installed."""
    folder: Path | None = None
    """Becomes the job's working directory, to which relative paths of the config refer."""
    env: Mapping[str, str] = field(default_factory=dict)
    num_cpus: float | None = None
    """Of the driver; none are reserved when not given."""
    resources: Mapping[str, float] = field(default_factory=dict)


class Jobs:
    """The jobs of a cluster. All methods raise ResourceError when the job server cannot be used."""

    def __init__(self, address: str | None) -> None:
        """`address` is the dashboard's; when not given, Ray's RAY_API_SERVER_ADDRESS or the cluster of this machine."""
        asked = address or os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
        self._address = asked if asked == "auto" or "://" in asked else f"http://{asked}"
        self._client: JobSubmissionClient = self._ask(lambda: JobSubmissionClient(self._address))

    def submit(self, parcel: Parcel) -> str:
        """Start the job and return its id. Raises ConfigError when a job of this run is going on already."""
        jobs = self._ask(self._client.list_jobs)
        unfinished = [
            str(job.submission_id) for job in _of_run(jobs, parcel.run) if not job.status.is_terminal()
        ]
        if unfinished:
            raise ConfigError(
                f"run {parcel.run!r} is going on as job {unfinished[0]}: `ray-prefopt logs --follow {parcel.run}` "
                f"follows it, `ray-prefopt stop {parcel.run}` ends it, another run.name starts another"
            )
        taken = {job.submission_id for job in jobs}
        stem = parcel.run.replace("/", "-")
        number = next(number for number in itertools.count(1) if f"{stem}-{number}" not in taken)
        with tempfile.TemporaryDirectory() as folder:
            _pack(parcel, Path(folder))
            return self._ask(
                lambda: self._client.submit_job(
                    entrypoint=shlex.join(["python", "-m", "ray_prefopt", *parcel.command]),
                    submission_id=f"{stem}-{number}",
                    runtime_env={"working_dir": folder, "env_vars": dict(parcel.env)},
                    metadata={"run": parcel.run},
                    entrypoint_num_cpus=parcel.num_cpus,
                    entrypoint_resources=dict(parcel.resources) or None,
                )
            )

    def status(self, name: str | None = None) -> list[dict[str, Any]]:
        """Of the newest job of a run, or of a job by its id; of all jobs, the newest first, when not given."""
        jobs = sorted(self._ask(self._client.list_jobs), key=lambda job: job.start_time or 0, reverse=True)
        return [_described(job) for job in ([self._find(name)] if name else jobs) if job.submission_id]

    def stop(self, name: str) -> dict[str, Any]:
        """End a job; returns its status. What its run has saved stays, and the same name goes on from there."""
        job = str(self._find(name).submission_id)
        self._ask(lambda: self._client.stop_job(job))
        until = time.monotonic() + STOPPED_WITHIN_S
        while time.monotonic() < until and not self._find(job).status.is_terminal():
            time.sleep(0.5)
        return _described(self._find(job))

    def logs(self, name: str) -> str:
        """What a job has printed so far."""
        job = str(self._find(name).submission_id)
        return self._ask(lambda: self._client.get_job_logs(job))

    def follow(self, name: str, say: Callable[[str], None]) -> dict[str, Any]:
        """Say what a job prints until it ends; returns its status. Raises TrainingError when it failed."""
        job = str(self._find(name).submission_id)

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job):
                say(text)

        self._ask(lambda: asyncio.run(tail()))
        ended = self._find(job)
        if ended.status == JobStatus.FAILED:
            raise TrainingError(f"job {job} failed: {ended.message}")
        return _described(ended)

    def _find(self, name: str) -> JobDetails:
        """A job by its id, or the newest of a run."""
        jobs = self._ask(self._client.list_jobs)
        found = [job for job in jobs if job.submission_id == name] or _of_run(jobs, name)
        if not found:
            known = sorted({str((job.metadata or {}).get("run", job.submission_id)) for job in jobs})
            raise ConfigError(
                f"{name} is neither a run nor a job at {self._address}; it has {known or 'no jobs'}"
            )
        return max(found, key=lambda job: job.start_time or 0)

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except AuthenticationError:
            raise ResourceError(
                f"{self._address} does not take this token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) to the cluster's"
            ) from None
        except (ConnectionError, requests.RequestException, OSError) as error:
            raise ResourceError(
                f"no job server at {self._address} ({type(error).__name__}): give the dashboard's address with "
                "--address, as http://HEAD:8265"
            ) from error
        except RuntimeError as error:
            raise ResourceError(f"{self._address}: {error}") from error


def _of_run(jobs: Sequence[JobDetails], run: str) -> list[JobDetails]:
    return [job for job in jobs if (job.metadata or {}).get("run") == run]


def _described(job: JobDetails) -> dict[str, Any]:
    described = {"job": job.submission_id, "run": (job.metadata or {}).get("run"), "status": job.status.value}
    return described | ({"message": job.message} if job.message else {})


def _pack(parcel: Parcel, folder: Path) -> None:
    """Lay out the job's working directory: all of it, since Ray leaves out what ignore files name, such as data."""
    if parcel.folder is not None:
        _check_size(parcel.folder)
        left_out = shutil.ignore_patterns(".git", ".gitignore", ".rayignore", "__pycache__")
        shutil.copytree(
            parcel.folder, folder, dirs_exist_ok=True, ignore=left_out, ignore_dangling_symlinks=True
        )
    if parcel.wheel is not None:
        with zipfile.ZipFile(parcel.wheel) as wheel:
            wheel.extractall(folder)
    for name, path in parcel.files.items():
        shutil.copyfile(path, folder / name)


def _check_size(folder: Path) -> None:
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.parts
    }
    total = sum(sizes.values())
    if total > LARGEST_FOLDER:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        listed = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        raise ConfigError(
            f"--working-dir {folder} has {total / 2**20:.0f} MiB, and a job may bring {LARGEST_FOLDER // 2**20}: leave "
            f"data and models on storage that all nodes see. The largest files: {listed}"
        )
