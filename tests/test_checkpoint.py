"""Checkpoints: what is loaded is what was saved at that step, whatever happened to process or files."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.checkpoint import Checkpointer
from nmoe.checkpoint_parts import Part, local
from nmoe.errors import CheckpointError

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["nmoe.checkpoint"])  # torch is imported once, not once a process
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest resets nmoe's filter
FILES = [".metadata", "__0_0.distcp", "manifest.json", "meta.json"]


def state(step: int, size: int = 8) -> dict[str, torch.Tensor]:
    """Tensors that tell of which step they are."""
    return {
        "embed": torch.arange(size * size, dtype=torch.float32).reshape(size, size) + step,
        "layers.0.norm": torch.full((size,), step, dtype=torch.bfloat16),
        "step": torch.tensor(step),
    }


def blank(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(
            a[name].contiguous().view(-1).view(torch.uint8), b[name].contiguous().view(-1).view(torch.uint8)
        )
        for name in a
    )


def save(dir: Path, *steps: int, keep: int = 3) -> None:
    with Checkpointer(dir, keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, state(step), {"step": step})


def load(dir: Path) -> tuple[int, dict[str, torch.Tensor], list[str]]:
    """Step, tensors and warnings of what a new process would go on from."""
    warnings: list[str] = []
    tensors = blank(state(0))
    with Checkpointer(dir, 1, on_warning=warnings.append) as checkpointer:
        found = checkpointer.load(tensors)
    assert found is not None
    assert found[1] == {"step": found[0]}
    return found[0], tensors, warnings


# Saving and loading


def test_nothing_to_load(tmp_path: Path) -> None:
    tensors = state(1)
    with Checkpointer(tmp_path / "none", 1) as checkpointer:
        assert checkpointer.load(tensors) is None
        assert checkpointer.steps() == []
    assert same(tensors, state(1))
    assert not (tmp_path / "none").exists(), "looking leaves no trace"


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
        torch.float4_e2m1fn_x2,
    ],
)
def test_bits_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (6, 16), dtype=torch.uint8)
    matrix = bits.view(dtype)
    tensors = {"matrix": matrix, "vector": matrix[0], "empty": matrix[:0], "scalar": matrix[0, 0]}
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(1, tensors, {})
        into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        assert checkpointer.load(into) == (1, {})
    assert [t.shape for t in into.values()] == [t.shape for t in tensors.values()]
    for name, tensor in tensors.items():
        assert bytes(into[name].reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8))


def test_parameters_and_views(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6))
    whole = torch.randn(100, 100)
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(
            1, {"weight": weight, "head": weight, "transposed": weight.T, "corner": whole[:2, :2]}, {}
        )
        into = torch.nn.Parameter(torch.zeros(4, 6))
        rest = {
            "head": torch.zeros(4, 6),
            "transposed": torch.zeros(4, 6).T,
            "corner": torch.zeros(3, 3)[:2, :2],
        }
        checkpointer.load({"weight": into, **rest})
    assert torch.equal(into, weight)
    assert into.requires_grad and into.grad_fn is None
    assert torch.equal(rest["head"], weight)
    assert torch.equal(rest["transposed"], weight.T)
    assert torch.equal(rest["corner"], whole[:2, :2])
    assert (tmp_path / "step_00000001" / "__0_0.distcp").stat().st_size < whole.nbytes, (
        "a view is not its storage"
    )


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path) -> None:
    tensors = state(0, size=512)
    with Checkpointer(tmp_path, 9) as checkpointer:
        for step in range(1, 5):
            for name, tensor in state(step, size=512).items():
                tensors[name].copy_(tensor)
            checkpointer.save(step, tensors, {"step": step})
            for tensor in tensors.values():
                tensor.fill_(-1)
    for step in (4, 3, 2, 1):
        with Checkpointer(tmp_path, 9) as checkpointer:
            found = checkpointer.load(tensors)
        assert found == (step, {"step": step})
        assert same(tensors, state(step, size=512))
        shutil.rmtree(tmp_path / f"step_{step:08d}")


def test_the_set_of_tensors_may_change_between_saves(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, 2) as checkpointer:
        checkpointer.save(1, {"a": torch.ones(2)}, {})
        checkpointer.save(2, {"b": torch.full((3,), 2.0)}, {}, wait=True)
        into = {"b": torch.zeros(3)}
        checkpointer.load(into)
    assert into["b"].tolist() == [2.0, 2.0, 2.0]


def test_layout_on_disk(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, 1) as checkpointer:
        checkpointer.save(7, state(7), {"tokens": 1 << 40, "config": {"seed": 0}}, wait=True)
        assert os.listdir(tmp_path) == ["step_00000007"], "complete when wait=True returns"
    folder = tmp_path / "step_00000007"
    assert sorted(os.listdir(folder)) == FILES
    assert json.loads((folder / "meta.json").read_text()) == {"tokens": 1 << 40, "config": {"seed": 0}}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], sorted(manifest["files"])) == (1, 7, FILES[:2] + FILES[3:])


@pytest.mark.parametrize("meta", [{"loss": float("nan")}, {"rng": torch.zeros(1)}])
def test_meta_that_is_not_json_is_refused_at_once(tmp_path: Path, meta: dict[str, Any]) -> None:
    with Checkpointer(tmp_path, 1) as checkpointer, pytest.raises((ValueError, TypeError)):
        checkpointer.save(1, state(1), meta)
    assert os.listdir(tmp_path) == []


# Retention


def test_the_newest_stay(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000015", "step_00000020"]


def test_damaged_checkpoints_do_not_crowd_out_intact_ones(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / "step_00000003" / "meta.json").unlink()
    tensors = blank(state(0))
    with Checkpointer(tmp_path, 2, on_warning=lambda text: None) as checkpointer:
        assert checkpointer.load(tensors) == (2, {"step": 2})
        checkpointer.save(4, state(4), {"step": 4}, wait=True)
        assert checkpointer.steps() == [2, 3, 4], "3 is damaged: 2 and 4 are the newest two"
        checkpointer.save(5, state(5), {"step": 5})
    assert checkpointer.steps() == [4, 5]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    with Checkpointer(tmp_path, 3) as checkpointer:
        checkpointer.save(2, state(9), {"step": 2})
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]
    step, tensors, _ = load(tmp_path)
    assert step == 2
    assert same(tensors, state(9))


def test_killed_while_replacing(tmp_path: Path) -> None:
    """Between the two renames of a replacement only the old folder is there, under another name."""
    save(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000001.replaced")
    assert load(tmp_path)[0] == 1
    save(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_what_dead_writers_left_is_removed_and_live_ones_are_left_alone(tmp_path: Path) -> None:
    dead = PROCESSES.Process()
    dead.start()
    dead.join()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f"step_00000009.tmp-{pid}").mkdir()
        (tmp_path / f"step_00000009.tmp-{pid}" / "__0_0.distcp").touch()
    save(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", f"step_00000009.tmp-{os.getppid()}"]
    assert load(tmp_path)[0] == 1


# Kill


def _train(dir: Path, progress: Connection) -> None:
    tensors = state(0, size=256)
    with Checkpointer(dir, 2) as checkpointer:
        found = checkpointer.load(tensors)
        start = found[0] if found else 0
        assert found is None or same(tensors, state(start, size=256))
        for step in range(start + 1, start + 10_000):
            for name, tensor in state(step, size=256).items():
                tensors[name].copy_(tensor)
            checkpointer.save(step, tensors, {"step": step})
            progress.send(step - 1)  # the previous one is on disk


def test_killed_at_any_instant(tmp_path: Path) -> None:
    rng = random.Random(0)
    tensors = blank(state(0, size=256))
    reached = 0
    for _ in range(20):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_train, args=(tmp_path, sender))
        process.start()
        sender.close()
        for _ in range(rng.randint(1, 3)):
            receiver.recv()
        time.sleep(rng.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        acknowledged = reached
        while True:
            try:
                acknowledged = receiver.recv()
            except EOFError:
                break
        warnings: list[str] = []
        with Checkpointer(tmp_path, 2, on_warning=warnings.append) as checkpointer:
            found = checkpointer.load(tensors)
        assert warnings == [], "a kill never leaves a damaged checkpoint"
        if found is None:
            assert acknowledged == 0
            continue
        step, meta = found
        assert step >= acknowledged
        assert meta == {"step": step}
        assert same(tensors, state(step, size=256))
        reached = step
    assert reached > 20
    with Checkpointer(tmp_path, 2) as checkpointer:
        checkpointer.save(reached + 1, tensors, {})
    assert sorted(os.listdir(tmp_path)) == [f"step_{reached:08d}", f"step_{reached + 1:08d}"], "no debris"


# Damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(key: str, value: object) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        manifest = json.loads(file.read_text())
        manifest[key] = value
        file.write_text(json.dumps(manifest))

    return apply


DAMAGE = [
    ("__0_0.distcp", cut, r"__0_0.distcp has \d+ bytes, expected \d+"),
    ("__0_0.distcp", flip, r"__0_0.distcp does not match its SHA-256"),
    ("__0_0.distcp", Path.unlink, r"__0_0.distcp is missing"),
    (".metadata", flip, r".metadata does not match its SHA-256"),
    (".metadata", Path.unlink, r".metadata is missing"),
    ("meta.json", lambda file: file.write_text("{}"), r"meta.json has 2 bytes, expected 14"),
    ("manifest.json", Path.unlink, r"manifest.json is missing"),
    ("manifest.json", cut, r"manifest.json is malformed: JSONDecodeError: .*"),
    ("manifest.json", lambda file: file.write_bytes(b"\xff"), r"manifest.json is malformed: UnicodeDecode.*"),
    ("manifest.json", lambda file: file.write_text("[]"), r"manifest.json is malformed: TypeError: .*"),
    ("manifest.json", lambda file: file.write_text("{}"), r"manifest.json is malformed: KeyError: 'format'"),
    ("manifest.json", edit("step", 3), r"manifest.json is of format 1, step 3"),
    ("manifest.json", edit("format", 2), r"manifest.json is of format 2, step 2"),
    ("manifest.json", edit("files", {}), r"manifest.json does not list .metadata"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "step_00000002" / name)
    step, tensors, [warning] = load(tmp_path)
    assert step == 1
    assert same(tensors, state(1))
    prefix = f"damaged checkpoint skipped: {tmp_path}/step_00000002: "
    suffix = "; step 1 is used instead"
    assert warning.startswith(prefix) and warning.endswith(suffix)
    assert re.fullmatch(message, warning[len(prefix) : -len(suffix)])


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dir = tmp_path_factory.mktemp("two_steps")
    save(dir, 1, 2)
    return dir


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_goes_unseen(two_steps: Path, data: st.DataObject) -> None:
    """One byte changed or a file cut, anywhere: step 1 is loaded, or step 2 exactly as it was saved."""
    file = two_steps / "step_00000002" / data.draw(st.sampled_from(FILES))
    content = file.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    if data.draw(st.booleans()):
        damaged[at] ^= data.draw(st.integers(1, 255))
    else:
        del damaged[at:]
    try:
        file.write_bytes(damaged)
        step, tensors, warnings = load(two_steps)
    finally:
        file.write_bytes(content)
    assert same(tensors, state(step))
    assert len(warnings) == (1 if step == 1 else 0)


def test_every_checkpoint_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step_00000001" / "meta.json").unlink()
    (tmp_path / "step_00000002" / ".metadata").unlink()
    tensors = state(7)
    with Checkpointer(tmp_path, 1) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.load(tensors)
    assert str(error.value) == (
        f"every checkpoint is damaged: {tmp_path}/step_00000002: .metadata is missing; "
        f"{tmp_path}/step_00000001: meta.json is missing; "
        "restore one, or start again in another [checkpoint] dir"
    )
    assert same(tensors, state(7))


# Mismatch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed": None}, "unexpected embed"),
        ({"head": torch.zeros(2)}, "missing head"),
        ({"embed": torch.zeros(8, 9)}, "embed is [8, 8] float32, expected [8, 9] float32"),
        ({"step": torch.zeros(())}, "step is [] int64, expected [] float32"),
        (
            {"step": None, "head": torch.zeros(2), "embed": torch.zeros(64)},
            "embed is [8, 8] float32, expected [64] float32; missing head; unexpected step",
        ),
        ({"embed": Part(torch.zeros(8), 56, 64)}, "embed is [8, 8] float32, expected [64] float32"),
        (
            {f"head.{i:02d}": torch.zeros(2) for i in range(25)},
            "; ".join(f"missing head.{i:02d}" for i in range(20)) + "; and 5 more",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: dict[str, torch.Tensor | Part | None], message: str
) -> None:
    save(tmp_path, 1)
    tensors = {name: tensor for name, tensor in (state(7) | change).items() if tensor is not None}
    before = {name: local(tensor).clone() for name, tensor in tensors.items()}
    with Checkpointer(tmp_path, 1) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.load(tensors)
    assert str(error.value) == f"{tmp_path}/step_00000001 does not fit the model: {message}"
    assert same({name: local(tensor) for name, tensor in tensors.items()}, before)


def test_the_meta_is_checked_before_the_tensors(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def refuse(meta: dict[str, Any]) -> None:
        raise CheckpointError(f"made by step {meta['step']}")

    with Checkpointer(tmp_path, 1) as checkpointer, pytest.raises(CheckpointError, match=r"^made by step 1$"):
        checkpointer.load({"other": torch.zeros(1)}, check=refuse)


# Places that cannot be written


def test_keep_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        Checkpointer(tmp_path, 0)
    assert str(error.value) == "[checkpoint] keep = 0: at least 1 checkpoint must stay"


@pytest.mark.parametrize("call", ["save", "load", "close"])
def test_an_error_in_the_background_is_raised_once_by_the_next_call(tmp_path: Path, call: str) -> None:
    (tmp_path / "file").touch()
    checkpointer = Checkpointer(tmp_path / "file" / "run", 1)
    checkpointer.save(1, state(1), {})
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: checkpointer.save(2, state(2), {}),
        "load": lambda: checkpointer.load(state(0)),
        "close": checkpointer.close,
    }
    with pytest.raises(CheckpointError) as error:
        calls[call]()
    assert str(error.value) == (
        f"{tmp_path}/file/run/step_00000001: checkpoint cannot be written: "
        f"[Errno 20] Not a directory: '{tmp_path}/file/run'; earlier checkpoints are untouched, "
        "so mend [checkpoint] dir and resume"
    )
    checkpointer.close()


def test_an_old_checkpoint_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2, keep=2)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with Checkpointer(tmp_path, 2) as checkpointer:
        monkeypatch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(CheckpointError) as error:
            checkpointer.save(3, state(3), {"step": 3}, wait=True)
    old = f"{tmp_path}/step_00000001"
    assert str(error.value) == (
        f"{old}: old checkpoint cannot be removed: [Errno 13] Permission denied: '{old}.tmp-{os.getpid()}'; "
        "remove it and resume"
    )
    assert load(tmp_path)[0] == 3, "the new one is complete"


def _save_with_little_space(dir: Path, bytes: int, messages: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Checkpointer(dir, 1) as checkpointer:
        checkpointer.save(1, state(1, size=256), {}, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))
        try:
            checkpointer.save(2, state(2, size=256), {"long": "x" * 5000}, wait=True)
        except CheckpointError as e:
            messages.send(str(e))


@pytest.mark.parametrize("bytes", [0, 4096, 100_000], ids=["anywhere", "in the metadata", "in the tensors"])
def test_disk_full(tmp_path: Path, bytes: int) -> None:
    """A limit on the file size stands in for the disk's end: the write fails in the kernel all the same."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_save_with_little_space, args=(tmp_path, bytes, sender))
    process.start()
    process.join()
    assert receiver.poll(), "an error was raised"
    assert receiver.recv() == (
        f"{tmp_path}/step_00000002: checkpoint cannot be written: [Errno 27] File too large; "
        "earlier checkpoints are untouched, so mend [checkpoint] dir and resume"
    )
    assert os.listdir(tmp_path) == ["step_00000001"], "no debris on a full disk"
    tensors = blank(state(0, size=256))
    with Checkpointer(tmp_path, 1) as checkpointer:
        assert checkpointer.load(tensors) == (1, {})
    assert same(tensors, state(1, size=256))


# Several ranks


def _rank(rank: int, dir: Path, results: Connection) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(dir / "store"), 2), rank=rank, world_size=2)
    own: dict[str, torch.Tensor | Part] = {
        "replica": torch.arange(4.0),
        f"experts.{rank}": torch.full((3,), rank + 1.0),
        "shared": Part(torch.arange(5.0)[2 * rank :][: 2 + rank], 2 * rank, 5),
    }
    with Checkpointer(dir / "run", 2, rank=rank, world=2, on_warning=lambda text: None) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, own, {"step": step}, wait=True)
        if rank == 0:
            flip(dir / "run" / "step_00000002" / "__1_0.distcp")
        into = {name: torch.zeros_like(local(tensor)) for name, tensor in own.items()}
        into |= {"shared": Part(torch.zeros(4 - 3 * rank), 4 * rank, 5)}  # cut elsewhere
        results.send(checkpointer.load(into))
        results.send({name: local(tensor).tolist() for name, tensor in into.items()})
        into = own | ({"other": torch.zeros(1)} if rank == 1 else {})
        try:
            checkpointer.load(into)
        except CheckpointError as e:
            results.send(str(e))
        if rank == 0:
            shutil.rmtree(dir / "run")
            (dir / "run").touch()
        try:
            checkpointer.save(3, own, {}, wait=True)
        except CheckpointError as e:
            results.send(str(e))
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(2)]
    processes = [
        PROCESSES.Process(target=_rank, args=(rank, tmp_path, sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    for rank, (receiver, _) in enumerate(pipes):
        assert receiver.recv() == (1, {"step": 1}), "step 2 is damaged"
        assert receiver.recv() == {
            "replica": [0.0, 1.0, 2.0, 3.0],
            f"experts.{rank}": [rank + 1.0] * 3,
            "shared": [[0.0, 1.0, 2.0, 3.0], [4.0]][rank],
        }
        assert receiver.recv() == f"{tmp_path}/run/step_00000001 does not fit the model: missing other"
        assert receiver.recv().startswith(
            f"{tmp_path}/run/step_00000003: checkpoint cannot be written: [Errno 17]"
        )
