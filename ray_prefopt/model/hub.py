"""Whether a model is there to be loaded, and why it could not be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import logging


def why_missing(path: str, revision: str | None, file: str) -> str | None:
    """Why a folder or hub id cannot be loaded from, or None when nothing speaks against it.

    The Hub is asked once, and only when `file` is not in the cache: loading would go on asking for half a minute when
    it cannot be reached.
    """
    if Path(path).exists():
        return None
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        return "no such folder, and not a hub id (org/name)"
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(path, file, revision=revision), str):
        return None
    try:
        HfApi().model_info(path, revision=revision, timeout=10)
    except RevisionNotFoundError:
        return f"it has no revision {revision!r} on the Hub; set model.revision to one that it has"
    except RepositoryNotFoundError:
        return "no such folder, and no model on the Hub that you may see: check the name, or set HF_TOKEN"
    except Exception as error:  # of huggingface_hub and its HTTP client: no common base
        return (
            f"no such folder, and the Hub cannot be reached ({first_line(error)}): check the network, or set "
            "HF_HUB_OFFLINE=1 to use what was downloaded before"
        )
    return None


def why_not_loaded(path: str, error: Exception) -> str:
    """What a user can do about a model that transformers could not load, in a line."""
    if "trust_remote_code" in str(error):
        return "it comes with its own code; read that code, then set model.trust_remote_code: true"
    if not Path(path).is_dir() and ("gated" in str(error).lower() or "401" in str(error)):
        return "it is gated or private: ask for access on its hub page, then set HF_TOKEN"
    return first_line(error)


def first_line(error: Exception) -> str:
    """Errors of transformers are a paragraph; the first line says what is wrong."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:400]


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
