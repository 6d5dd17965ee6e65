"""Files that are there whole or not at all, and folders that make way, on local disks and in object stores."""

import os
from datetime import datetime

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem


def write_file(fs: AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a file so that a reader finds the old one, or the whole new one. Raises OSError."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)  # object stores put whole objects
        return
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(fs: AbstractFileSystem, path: str, text: str) -> None:
    """The same with text."""
    write_file(fs, path, text.encode())


def move_aside(fs: AbstractFileSystem, path: str) -> None:
    """Give a folder a name with the time in it; nothing where there is none."""
    if fs.exists(path):
        fs.mv(path, f"{path}.old-{datetime.now():%Y%m%d-%H%M%S}", recursive=True)
