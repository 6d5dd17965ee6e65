"""What can go wrong, as seen by a user: one class per kind, each with the exit code of the command line.

Every message says what happened, what was found, and what to do. Import-light: neither torch nor ray.
"""

import difflib
from collections.abc import Iterable


class PrefoptError(ValueError):
    """Base of every error that is meant for a user; the command line prints its text without a traceback."""

    exit_code = 1


class ConfigError(PrefoptError):
    """An unknown or misplaced key, a value of the wrong kind, or values that contradict each other."""

    exit_code = 2


class DataError(PrefoptError):
    """The preference pairs cannot be read, are too few, or too many of them are unusable."""

    exit_code = 3


class ModelError(PrefoptError):
    """The model or its tokenizer cannot be loaded, or cannot be trained in the way that was asked for."""

    exit_code = 3


class ResourceError(PrefoptError):
    """The cluster, or its storage, does not have what the run needs."""

    exit_code = 4


class OutOfMemoryError(ResourceError):
    """A micro-batch does not fit into the memory of a worker."""


class CheckpointError(PrefoptError):
    """A checkpoint is torn, incomplete, belongs to another run, or cannot be written."""

    exit_code = 4


class HubError(PrefoptError):
    """The Hugging Face Hub cannot be reached, or does not take what is pushed to it."""

    exit_code = 4


class NonFiniteError(PrefoptError):
    """A loss or gradient is NaN or infinite; raised before the optimizer moves."""


class TrainingError(PrefoptError):
    """The run failed on the cluster; the text is that of the first rank that failed."""


def suggest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest of the known words, or nothing.

    >>> suggest("simpoo", ["simpo", "cpo"])
    ' Did you mean simpo?'
    """
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""
