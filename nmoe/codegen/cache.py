"""Compiled kernels on disk, each in a folder named by the hash of everything that it was made from.

    <root>/<first 2 digits>/<key>/   kernel.so  kernel.ptx  kernel.cubin  report.json  manifest.json
                                     of Triton a cubin and PTX for each function, and no kernel.so
    <root>/quarantine/               what was found damaged, for inspection

An entry appears whole, by the rename of a temporary folder, so readers need no lock and writers may race: the loser
discards its own copy. The manifest, written last, holds each file's SHA-256; whatever does not agree with it, or was
built for another target, is set aside and rebuilt, never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe.files import write_synced

FORMAT = 3  # of an entry's files and its report; part of every key
MANIFEST = "manifest.json"
FUNCTION = "nmoe_kernel"  # the symbol that kernel.so exports


@dataclass(frozen=True)
class Entry:
    """An intact artifact: its folder and what the manifest says of it."""

    folder: Path
    target: str
    report: Mapping[str, Any]

    @property
    def library(self) -> Path:
        return self.folder / "kernel.so"


def default_root() -> Path:
    """$NMOE_HOME/kernels, or ~/.cache/nmoe/kernels."""
    home = os.environ.get("NMOE_HOME")
    return Path(home) / "kernels" if home else Path.home() / ".cache" / "nmoe" / "kernels"


class Cache:
    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: str) -> Path:
        return self.root / key[:2] / key

    def get(self, key: str, target: str) -> Entry | None:
        """The entry, or None when there is none; a damaged one is set aside and counts as none."""
        folder = self.folder(key)
        while folder.exists():
            reason = _damage(folder, key, target)
            if reason is not None:
                self._quarantine(folder, key, target, reason)
                return None
            try:
                return Entry(folder, target, json.loads((folder / "report.json").read_text()))
            except FileNotFoundError:  # another process has just set it aside: look again
                continue
        return None

    def put(self, key: str, target: str, files: Mapping[str, bytes], report: Mapping[str, Any]) -> Entry:
        """Stores an artifact; keeps the entry that another writer stored meanwhile."""
        folder = self.folder(key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{key[:16]}.", dir=folder.parent))
        try:
            text = json.dumps(report, indent=1)
            content = {**files, "report.json": text.encode()}
            digests = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
            manifest = {"format": FORMAT, "key": key, "target": target, "files": digests}
            for name, data in {**content, MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
                write_synced(temporary / name, data)
            temporary.chmod(0o755)
            while True:
                try:
                    temporary.rename(folder)
                    break
                except OSError:  # not empty: another writer was first
                    if self.get(key, target) is not None:
                        break
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return Entry(folder, target, json.loads(text))

    def _quarantine(self, folder: Path, key: str, target: str, reason: str) -> None:
        """Moves a damaged entry out of the way; whoever comes second finds it gone, or repaired and puts it back."""
        aside = self.root / "quarantine"
        aside.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f"{folder.name[:16]}.", dir=aside))
        moved = place / folder.name
        try:
            folder.rename(moved)
            if _damage(moved, key, target) is not None:
                (place / "reason.txt").write_text(reason + "\n")
                return
            moved.rename(folder)
        except OSError:  # gone, or another writer has put an entry there meanwhile
            pass
        shutil.rmtree(place, ignore_errors=True)

    def quarantined(self) -> list[str]:
        """The reasons of everything set aside so far."""
        return sorted(path.read_text().strip() for path in self.root.glob("quarantine/*/reason.txt"))


def _damage(folder: Path, key: str, target: str) -> str | None:
    """What is wrong with an entry, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        found = (manifest["format"], manifest["key"], manifest["target"])
        if found != (FORMAT, key, target):
            return f"{folder.name}: manifest of {found}, expected {(FORMAT, key, target)}"
        for name, digest in manifest["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return f"{folder.name}/{name}: its SHA-256 is not the manifest's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder.name}: {type(error).__name__}: {error}"
    return None
