"""The kernel cache: whole entries or none, whatever damages, races or kills."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from nmoe.codegen import compiler as kernel_compiler
from nmoe.codegen.cache import Cache, Entry, default_root

KEY, TARGET = "ab" * 32, "sm_100a"
FILES = {"kernel.so": b"\x7fELF" + bytes(range(256)), "kernel.ptx": b".version 9.0\n"}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "kernels")


def put(cache: Cache) -> Entry:
    return cache.put(KEY, TARGET, FILES, {"config": "128x256"})


def test_what_is_put_comes_back(cache: Cache) -> None:
    assert cache.get(KEY, TARGET) is None
    put(cache)
    entry = cache.get(KEY, TARGET)
    assert entry is not None
    assert entry.library.read_bytes() == FILES["kernel.so"]
    assert entry.report == {"config": "128x256"}
    assert cache.quarantined() == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


OTHER = {"format": 99, "key": KEY, "target": TARGET, "files": {}}
DAMAGE = {
    "a flipped bit in the object": (lambda f: flip(f / "kernel.so"), "kernel.so: its SHA-256 is not the manifest's"),
    "a truncated object": (lambda f: (f / "kernel.so").write_bytes(b""), "kernel.so: its SHA-256"),
    "a changed report": (lambda f: (f / "report.json").write_text("{}"), "report.json: its SHA-256"),
    "a missing file": (lambda f: (f / "kernel.ptx").unlink(), "FileNotFoundError"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "FileNotFoundError"),
    "a torn manifest": (lambda f: (f / "manifest.json").write_text('{"format": 1, "ke'), "JSONDecodeError"),
    "a manifest of another shape": (lambda f: (f / "manifest.json").write_text("[]"), "TypeError"),
    "another format": (
        lambda f: (f / "manifest.json").write_text(json.dumps(OTHER)),
        "manifest of (99,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_set_aside_and_rebuilt(cache: Cache, damage: str) -> None:
    put(cache)
    harm, reason = DAMAGE[damage]
    harm(cache.folder(KEY))
    assert cache.get(KEY, TARGET) is None
    (found,) = cache.quarantined()
    assert found.startswith(KEY) and reason in found
    assert not cache.folder(KEY).exists()
    put(cache)
    assert cache.get(KEY, TARGET) is not None


def test_an_object_for_another_target_is_never_loaded(cache: Cache) -> None:
    put(cache)
    assert cache.get(KEY, "sm_90a") is None
    assert "'sm_100a'), expected" in cache.quarantined()[0] and "'sm_90a')" in cache.quarantined()[0]


def test_the_second_writer_keeps_the_first_entry(cache: Cache) -> None:
    put(cache)
    inode = cache.folder(KEY).stat().st_ino
    put(cache)
    assert cache.folder(KEY).stat().st_ino == inode
    assert [p.name for p in cache.folder(KEY).parent.iterdir()] == [KEY]


def test_a_writer_replaces_a_damaged_entry(cache: Cache) -> None:
    put(cache)
    flip(cache.folder(KEY) / "kernel.so")
    put(cache)
    assert cache.get(KEY, TARGET) is not None
    assert len(cache.quarantined()) == 1


def test_a_killed_writers_remains_are_not_an_entry(cache: Cache) -> None:
    put(cache)
    folder = cache.folder(KEY)
    shutil.move(folder, folder.parent / f".{KEY[:16]}.remains")
    assert cache.get(KEY, TARGET) is None
    assert cache.quarantined() == []


def _race(root: Path, damage: bool) -> bool:
    cache = Cache(root)
    for i in range(30):
        put(cache)
        if damage and i % 5 == 0:
            (cache.folder(KEY) / "kernel.ptx").unlink(missing_ok=True)
        entry = cache.get(KEY, TARGET)
        if entry is not None and not damage and entry.library.read_bytes() != FILES["kernel.so"]:
            return False
    return True


@pytest.mark.parametrize("damage", [False, True])
def test_concurrent_writers_and_readers(cache: Cache, damage: bool) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert all(pool.starmap(_race, [(cache.root, damage)] * 4))
    put(cache)
    assert cache.get(KEY, TARGET) is not None
    left = [p.name for p in cache.folder(KEY).parent.iterdir()]
    assert left == [KEY]


def test_the_default_root_follows_nmoe_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NMOE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "kernels"


def test_an_edited_source_names_another_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "codegen/templates/rows.py": "from nmoe.codegen.rows import A\n"
        "from nmoe.codegen.templates import (\n    sums,\n)\n",
        "codegen/templates/sums.py": "",
        "codegen/rows.py": "    from nmoe.storage import BLOCK  # in a function\n",
        "storage.py": "from nmoe.train import train\n",
        "codegen/templates/plan.py": "",
        "train.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(kernel_compiler, "PACKAGE", tmp_path)
    before = kernel_compiler.sources.__wrapped__("rows")
    changed = set()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "# edited\n")
        if kernel_compiler.sources.__wrapped__("rows") != before:
            changed.add(name)
        (tmp_path / name).write_text(text)
    assert changed == set(files) - {"codegen/templates/plan.py", "train.py"}
