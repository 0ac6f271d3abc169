"""Files that survive a crash whole: what is written is on disk before anything refers to it."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Makes a file's bytes, or the renames in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Writes `path` and waits until it is on disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`: after a crash it holds the old bytes or the new ones, never a mixture."""
    temporary = path.with_name(path.name + ".tmp")
    write_synced(temporary, content)
    os.replace(temporary, path)
    sync(path.parent)
