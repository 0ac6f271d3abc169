"""Checkpoints: torch.distributed.checkpoint folders, written in the background, atomic, verified before use.

`{dir}/step_00001000/` holds DCP's files, `meta.json` (whatever the trainer needs besides tensors) and
`manifest.json` (size and SHA-256 of every other file). A folder has that name only once it is complete and on
disk; until then it is `step_00001000.tmp-<pid>`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nmoe.checkpoint_parts import LoadPlanner, Part, SavePlanner, chunk, local
from nmoe.errors import CheckpointError
from nmoe.files import sync, write_synced

_FORMAT = 1
_LISTED = 20  # differences that an error message spells out
_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# One process without a process group is a supported way to run, not an oversight that DCP need point out.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpointer:
    """The checkpoints of one run in `dir`, of which the newest `keep` stay.

    `dir` belongs to one run at a time; to read from it meanwhile is safe. Tensors are known by name. With
    `world` > 1 every method is collective, `dir` is shared by all ranks, and tensors of one name on several ranks
    are replicas, of which one is written, or parts, which together are the whole.
    `on_collective` is called, from any thread, before each collective of gloo.
    An error of a background write is raised, as CheckpointError, by the next call of any method but `steps`.
    """

    def __init__(
        self,
        dir: Path,
        keep: int,
        *,
        rank: int = 0,
        world: int = 1,
        on_warning: Callable[[str], None] = _log.warning,
        on_collective: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"[checkpoint] keep = {keep}: at least 1 checkpoint must stay")
        self._dir = Path(dir)
        self._keep = keep
        self._rank = rank
        self._group = dist.new_group(backend="gloo") if world > 1 else None
        self._warn, self._collective = on_warning, on_collective
        self._staged: dict[str, Tensor | Part] = {}
        self._damaged: set[int] = set()  # steps found damaged by `load`; retention does not count them
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self, step: int, tensors: Mapping[str, Tensor | Part], meta: Mapping[str, Any], *, wait: bool = False
    ) -> None:
        """Save `tensors` and the JSON-serialisable `meta` as the checkpoint of `step`.

        Returns once both are copied, so that the caller may change them while a thread writes the copy; with
        `wait`, once they are on disk. The previous save is completed first. The copy takes host memory of the
        tensors' size, which later saves reuse. A checkpoint of the same step is replaced.
        """
        text = json.dumps(meta, indent=1, sort_keys=True, allow_nan=False)
        self._complete_pending()
        self._stage(tensors)
        self._pending = self._writer.submit(self._write, step, text)
        if wait:
            self._complete_pending()

    def load(
        self, tensors: Mapping[str, Tensor | Part], *, check: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """Read the newest intact checkpoint into `tensors`; its step and meta, or None when there is none.

        A checkpoint that does not match its manifest is passed over with a warning. CheckpointError when all
        are damaged, or when names, shapes or dtypes differ from those of `tensors`. `check` sees the meta
        before these are compared and may raise. Tensors change only after all of this has passed.
        """
        self._complete_pending()
        choice = self._on_first_rank(self._newest_intact)
        if choice is None:
            return None
        step, path = choice
        meta = json.loads((path / "meta.json").read_text())
        if check is not None:
            check(meta)
        reader = FileSystemReader(path)
        self._require_match(path, reader.read_metadata().state_dict_metadata, tensors)
        self._collective()
        dcp.load(
            dict(tensors), storage_reader=reader, planner=LoadPlanner(), process_group=self._group,
            no_dist=self._group is None,
        )  # fmt: skip
        return step, meta

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return sorted(self._folders())

    def close(self) -> None:
        """Complete the save in progress."""
        try:
            self._complete_pending()
        finally:
            self._writer.shutdown()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # Saving

    def _complete_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _stage(self, tensors: Mapping[str, Tensor | Part]) -> None:
        if _held(self._staged) != _held(tensors):
            self._staged = {name: _host_copy(tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            local(self._staged[name]).copy_(local(tensor), non_blocking=True)
        if any(local(tensor).is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def _write(self, step: int, meta: str) -> None:
        target = self._dir / f"step_{step:08d}"
        temporary = self._on_first_rank(lambda: self._prepare(target))
        self._collective()
        try:
            writer = FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
            dcp.save(
                self._staged, storage_writer=writer, planner=SavePlanner(), process_group=self._group,
                no_dist=self._group is None,
            )  # fmt: skip
        except CheckpointException as e:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._failure(target, _root(next(iter(e.failures.values()))[0])) from e
        self._on_first_rank(lambda: self._publish(temporary, target, step, meta))

    def _prepare(self, target: Path) -> Path:
        """The folder to write into, after clearing away what killed writers left."""
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            for path in self._dir.glob("step_*.tmp-*"):
                pid = path.name.rpartition("-")[2]
                if pid == str(os.getpid()) or not Path("/proc", pid).exists():
                    shutil.rmtree(path)
        except OSError as e:
            raise self._failure(target, e) from e
        return target.with_name(f"{target.name}.tmp-{os.getpid()}")

    def _publish(self, temporary: Path, target: Path, step: int, meta: str) -> None:
        try:
            write_synced(temporary / "meta.json", meta.encode())
            files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
            manifest = {"format": _FORMAT, "step": step, "files": files}
            write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
            sync(temporary)
            replaced = target.with_name(f"{target.name}.replaced")  # counts as `target` while that is missing
            if target.exists():
                if replaced.exists():
                    shutil.rmtree(replaced)
                target.rename(replaced)
            temporary.rename(target)
            sync(self._dir)
        except OSError as e:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._failure(target, e) from e
        self._damaged.discard(step)
        self._retain(step)

    def _retain(self, newest: int) -> None:
        """Remove all but the `keep` newest that are intact; what is later than `newest` stays out of it."""
        intact = [step for step in self.steps() if step <= newest and step not in self._damaged]
        oldest = intact[-self._keep :][0]
        for path in self._dir.glob("step_*"):
            step, suffix = _parse(path)
            if step is not None and (step < oldest or (suffix and path.with_suffix("").exists())):
                doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
                try:
                    path.rename(doomed)  # first, so that half a folder never has a checkpoint's name
                    shutil.rmtree(doomed)
                except OSError as e:
                    raise CheckpointError(
                        f"{path}: old checkpoint cannot be removed: {e}; remove it and resume"
                    ) from e

    def _failure(self, target: Path, cause: BaseException) -> CheckpointError:
        return CheckpointError(
            f"{target}: checkpoint cannot be written: {cause}; earlier checkpoints are untouched, "
            "so mend [checkpoint] dir and resume"
        )

    # Loading

    def _folders(self) -> dict[int, Path]:
        found = {}
        # In descending order step_1.replaced comes before step_1, which prevails where both exist.
        for path in sorted(self._dir.glob("step_*"), reverse=True):
            step, _ = _parse(path)
            if step is not None:
                found[step] = path
        return found

    def _newest_intact(self) -> tuple[int, Path] | None:
        problems: list[str] = []
        for step, path in sorted(self._folders().items(), reverse=True):
            problem = _problem(path, step)
            if problem is None:
                for text in problems:
                    self._warn(f"damaged checkpoint skipped: {text}; step {step} is used instead")
                return step, path
            problems.append(f"{path}: {problem}")
            self._damaged.add(step)
        if problems:
            raise CheckpointError(
                f"every checkpoint is damaged: {'; '.join(problems)}; restore one, or start again in another "
                "[checkpoint] dir"
            )
        return None

    def _require_match(
        self, path: Path, found: Mapping[str, Any], tensors: Mapping[str, Tensor | Part]
    ) -> None:
        wanted = _layout(tensors)
        stored = {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in found.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        known = set().union(*self._gather(list(wanted)))  # on any rank: each may hold tensors of its own
        problems = [f"missing {name}" for name in wanted if name not in stored]
        problems += [f"unexpected {name}" for name in stored if name not in known]
        problems += [
            f"{name} is {_describe(stored[name])}, expected {_describe(layout)}"
            for name, layout in wanted.items()
            if name in stored and stored[name] != layout
        ]
        problems = sorted(set().union(*self._gather(problems)))
        if len(problems) > _LISTED:
            problems[_LISTED:] = [f"and {len(problems) - _LISTED} more"]
        if problems:
            raise CheckpointError(f"{path} does not fit the model: {'; '.join(problems)}")

    # Ranks

    def _on_first_rank(self, work: Callable[[], _T]) -> _T:
        """The result of `work`, which rank 0 alone does; an error of it is raised on every rank."""
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = work()
            except Exception as e:
                outcome[1] = e
        if self._group is not None:
            self._collective()
            dist.broadcast_object_list(outcome, group_src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _gather(self, words: list[str]) -> list[list[str]]:
        """`words` of every rank."""
        if self._group is None:
            return [words]
        self._collective()
        gathered: list[list[str]] = [[] for _ in range(self._group.size())]
        dist.all_gather_object(gathered, words, group=self._group)
        return gathered


def _problem(path: Path, step: int) -> str | None:
    """What is wrong with the checkpoint folder `path`; None when every file is as its manifest says."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if (manifest["format"], manifest["step"]) != (_FORMAT, step):
            return f"manifest.json is of format {manifest['format']}, step {manifest['step']}"
        for required in (".metadata", "meta.json"):
            if required not in manifest["files"]:
                return f"manifest.json does not list {required}"
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if _fingerprint(path / name)["sha256"] != expected["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as e:
        return f"{Path(e.filename).name} is missing"
    except OSError as e:
        return f"cannot be read: {e}"
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return f"manifest.json is malformed: {type(e).__name__}: {e}"
    return None


def _root(error: BaseException) -> BaseException:
    """The operating system's error behind `error`, if any: torch's zip writer reports a follow-up of it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _parse(path: Path) -> tuple[int | None, str]:
    match = re.fullmatch(r"step_(\d{8,})(\.replaced)?", path.name)
    return (int(match[1]), match[2] or "") if match else (None, "")


def _layout(tensors: Mapping[str, Tensor | Part]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Of the whole tensors."""
    return {
        name: ((x.size,) if isinstance(x, Part) else tuple(x.shape), local(x).dtype)
        for name, x in tensors.items()
    }


def _held(tensors: Mapping[str, Tensor | Part]) -> dict[str, tuple[Any, ...]]:
    """What a copy of this rank's has to have in common with them."""
    return {name: (chunk(x), local(x).dtype) for name, x in tensors.items()}


def _host_copy(x: Tensor | Part) -> Tensor | Part:
    """Room for it."""
    tensor = local(x)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return replace(x, tensor=copy) if isinstance(x, Part) else copy


def _describe(layout: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{list(layout[0])} {str(layout[1]).removeprefix('torch.')}"


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": os.fstat(file.fileno()).st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
