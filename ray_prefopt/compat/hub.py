"""Uploads to the Hugging Face Hub, all of them by the driver."""

import logging
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from huggingface_hub import HfApi

from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.errors import HubError
from ray_prefopt.model.hub import first_line
from ray_prefopt.training.card import CardDetails
from ray_prefopt.training.checkpoint import local_copy, open_checkpoint
from ray_prefopt.training.export import export
from ray_prefopt.training.log import Event

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub that may be written to."""

    hub: HfApi
    id: str
    revision: str | None

    @classmethod
    def of(
        cls,
        args: CPOConfig | SimPOConfig,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Self:
        """The one that the arguments name, made when it is not there. Raises HubError when it cannot be."""
        hub = HfApi(token=token or args.hub_token or args.push_to_hub_token)
        name = repository_name(args)
        try:
            made = hub.create_repo(
                name, private=args.hub_private_repo if private is None else private, exist_ok=True
            )
        except Exception as error:  # of huggingface_hub and its HTTP client: no common base
            raise HubError(
                f"no repository {name} to push to ({first_line(error)}): check hub_model_id, and hub_token or HF_TOKEN"
            ) from error
        return cls(hub, made.repo_id, revision or args.hub_revision)

    def upload(
        self, folder: str | Path, message: str | None, *, inside: str | None = None, blocking: bool = True
    ) -> Any:
        """Commit a folder, at its root or `inside` a folder of the repository.

        Returns the commit, or a future of it. Raises HubError when it fails; the future raises as huggingface_hub does.
        """
        upload: Any = self.hub.upload_folder  # its overloads want a literal for run_as_future
        try:
            return upload(
                repo_id=self.id,
                folder_path=folder,
                path_in_repo=inside,
                commit_message=message,
                revision=self.revision,
                run_as_future=not blocking,
            )
        except Exception as error:  # as above
            raise HubError(f"nothing could be pushed to {self.id}: {first_line(error)}") from error


def repository_name(args: CPOConfig | SimPOConfig) -> str:
    """args.hub_model_id, or what its older spellings say; the name of args.output_dir when there are none."""
    if args.hub_model_id is not None:
        return args.hub_model_id
    name = args.push_to_hub_model_id or Path(str(args.output_dir)).absolute().name
    return f"{args.push_to_hub_organization}/{name}" if args.push_to_hub_organization else name


class Pushes:
    """Pushes the checkpoints of a run while it goes on, as args.hub_strategy says: an observer of its events.

    A thread of its own exports and uploads them, one after the other; what is saved meanwhile is left out, unless
    args.hub_always_push is set. A push that fails is a warning.
    """

    def __init__(self, args: CPOConfig | SimPOConfig, details: CardDetails) -> None:
        self._repository = Repository.of(args)
        self._strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
        self._always = args.hub_always_push
        self._details = details
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=error is None, cancel_futures=error is not None)

    def __call__(self, event: Event) -> None:
        kind, value = event
        is_busy = self._last is not None and not self._last.done()
        if kind == "saved" and self._strategy != "end" and (self._always or not is_busy):
            self._last = self._thread.submit(self._push, *value)

    def _push(self, path: str, step: int) -> None:
        message = f"Training in progress, step {step}"
        try:
            with tempfile.TemporaryDirectory() as folder:
                model = export(path, f"{folder}/model", details=self._details)
                self._repository.upload(model, message)
            if self._strategy in ("checkpoint", "all_checkpoints"):
                inside = (
                    "last-checkpoint" if self._strategy == "checkpoint" else f"checkpoints/{Path(path).name}"
                )
                with local_copy(open_checkpoint(path, verify="sizes")) as folder:
                    self._repository.upload(folder, f"{message}, checkpoint", inside=inside)
        except Exception as error:
            logger.warning("training goes on without a push of step %d: %s", step, first_line(error))
