"""Which calls of a schedule are generated kernels, and what each is launched with.

    schedule ── kernels ──▶ groups that a template builds are calls; others are split into ops      lowered
    call ── KernelSpec ──▶ Problem and Config; operands in call order ──▶ a Launcher's launch       bind

A call without a kernel runs the reference math of its ops in torch, on the device. `by_torch` lists them, so that
nobody takes them for kernels.
"""

from __future__ import annotations

import fcntl
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from nmoe import autotune
from nmoe.codegen import families, optimizer
from nmoe.codegen.build import build, build_transfers
from nmoe.codegen.cache import Cache, default_root
from nmoe.codegen.launch import CudaLauncher, device_of
from nmoe.codegen.problem import EXTENTS, PARTS, ROWS, Operand, Problem, resolve, stored_formats
from nmoe.codegen.spec import KernelSpec, spec_of, specs
from nmoe.codegen.transfers import transfers_of
from nmoe.config import Config
from nmoe.errors import UserError
from nmoe.graph import Graph, Op, Spec
from nmoe.hosts import ranks_of_host
from nmoe.schedule import Call, Kernels, Schedule, Workspace, lower

if TYPE_CHECKING:
    import torch


Bound = Callable[[], None]
Argument: TypeAlias = "torch.Tensor | float | int"


SYMBOLS = {extent: symbol for symbol, extent in EXTENTS.items()}


class Launcher(Protocol):
    """Makes kernels callable: on a CUDA device (codegen/launch.py), or on the emulator in tests. `root`: the cache
    whose tuning chose the kernels' configs."""

    root: Path | None

    def bind(self, problem: Problem, config: Any, target: str, arguments: Sequence[Argument]) -> Bound:
        """A launch of the kernel on these operands, which neither allocates nor waits for the device."""


def kernels(target: str, root: Path | None = None) -> Kernels:
    """The kernels that the templates build for a target, in the configs that the tuning in the cache `root` chose."""
    found: dict[KernelSpec, Workspace | None] = {}

    def workspace(graph: Graph, ops: tuple[Op, ...], fused: frozenset[str]) -> Workspace | None:
        spec = spec_of(graph, target, ops, fused)
        if spec not in found:
            found[spec] = _workspace(spec, root)
        return found[spec]

    return workspace


def _workspace(spec: KernelSpec, root: Path | None) -> Workspace | None:
    problem = families.match(spec)
    if isinstance(problem, str):
        return None
    config, _ = autotune.choose(problem, spec.target, root)
    tensors = [o for o in problem.operands(config) if o.shape]
    given = sum(len(stored_formats(value.format)) for value in (*spec.inputs, *spec.outputs))
    # Without experts a GEMM's rows are tokens.
    symbols = SYMBOLS | ({} if any("R" in value.shape for value in spec.values) else {ROWS: "T"})
    return tuple(Spec(tuple(symbols.get(n, n) for n in o.shape), o.format) for o in tensors[given:])


def lowered(config: Config, sequences: int = 0, root: Path | None = None) -> Schedule:
    """The schedule of `sequences` at once (0: as `lower` does) as this build executes it on the config's target, with
    the cache `root`, by default the user's."""
    return lower(config, sequences=sequences, kernels=kernels(config.target.device, root or default_root()))


def by_torch(schedule: Schedule) -> str:
    """What has no kernel: "run by torch: attention 12x, …". Transfers between ranks have kernels of their own."""
    calls = (call for call in schedule.calls if call.workspace is None and call.phase != "init")
    kinds = Counter(op.kind for call in calls for op in call.ops if op.attrs.get("ranks", 1) == 1)
    listed = ", ".join(f"{kind} {count}x" for kind, count in kinds.most_common())
    return f"run by torch: {listed or 'nothing'}"


def needed(config: Config, schedules: Sequence[Schedule]) -> dict[KernelSpec, list[str]]:
    """Every kernel of a run and what uses it: those of the schedules, and on a GPU target the optimizer's."""
    uses: dict[KernelSpec, list[str]] = {}
    for schedule in schedules:
        for spec, calls in specs(schedule).items():
            uses.setdefault(spec, []).extend(calls)
    return uses if config.target.device == "cpu" else uses | optimizer.specs(config)


def launcher(config: Config, schedules: Sequence[Schedule], say: Callable[[str], None]) -> CudaLauncher:
    """For the schedules of a GPU target; compiles the kernels that its cache lacks, and tells `say` of it.

    Raises UserError when the device is another one or a kernel cannot be built.
    """
    import torch

    device_of(config.target.device)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # references sum in FP32
    root = default_root()
    wanted = list(needed(config, schedules))
    gpus = ranks_of_host(config.rdep.ranks)
    transfers = list(dict.fromkeys(problem for s in schedules for problem in transfers_of(s, gpus)))
    with _alone(root):
        made = build(wanted, root, progress=sys.stderr)
        moved = build_transfers(transfers, config.target.device, root)
    if made.failed:
        name, why = next((spec.name, why) for spec, why in made.failed.items())
        raise UserError(f"{len(made.failed)} kernels could not be built, first {name}: {why}")
    say(f"kernels: {len(made.warm)} from {root}, {len(made.built)} built, {made.seconds:.1f} s")
    for note in dict.fromkeys([*([moved] if transfers else []), *map(by_torch, schedules)]):
        say(note)
    return CudaLauncher(Cache(root))


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """The ranks of a run build one after the other: all but the first find the kernels there. Where nobody can write,
    nobody builds, and `build` says so of what is missing."""
    with ExitStack() as held:
        with suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context((root / "building").open("w")), fcntl.LOCK_EX)
        yield


def bind(
    schedule: Schedule,
    call: Call,
    operand: Callable[[str], Any],
    workspace: Sequence[torch.Tensor],
    launcher: Launcher,
) -> Bound:
    """The launch of a call's kernel. `operand` gives a tensor's storage by its name."""
    from nmoe.formats import buffers

    spec = spec_of(schedule.graph, schedule.target, call.ops, schedule.fused)
    problem = families.match(spec)
    assert isinstance(problem, Problem), f"{call.name} has no kernel: {problem}"
    config, _ = autotune.choose(problem, schedule.target, launcher.root)
    tensors = [t for name in _stored(schedule, call) for t in buffers(operand(name))] + list(workspace)
    operands = problem.operands(config)
    scalars = [_scalar(call, o) for o in operands if not o.shape]
    if len(operands) != len(tensors) + len(scalars):
        raise ValueError(
            f"{call.name}: {problem} takes {', '.join(o.name for o in operands)}, the schedule has "
            f"{len(tensors)} tensors"
        )
    _check_shapes(call, problem, [o for o in operands if o.shape], tensors)
    return launcher.bind(problem, config, schedule.target, [*tensors, *scalars])


def _check_shapes(
    call: Call, problem: Problem, operands: Sequence[Operand], tensors: Sequence[torch.Tensor]
) -> None:
    """Raises UserError where a tensor is not as the kernel will read it, or is empty: a launch without thread blocks is
    an error to CUDA, and a config's micro-batch has at least one token."""
    extents: dict[int, int] = {}
    for operand, tensor in zip(operands, tensors, strict=True):
        if not tensor.numel():
            raise UserError(
                f"{call.name}: {operand.name} has the shape {tuple(tensor.shape)}, kernels take at least one token: "
                "raise [train] micro_batch_size or seq_len"
            )
    for operand, tensor in zip(operands, tensors, strict=True):
        for code, size in zip(operand.shape, tensor.shape, strict=False):
            if -PARTS < code < 0:
                extents.setdefault(code, size)
    for operand, tensor in zip(operands, tensors, strict=True):
        try:
            expected = tuple(resolve(code, extents) for code in operand.shape)
        except KeyError:  # parts of an extent that no operand states whole: the kernel reads it elsewhere
            continue
        if tuple(tensor.shape) != expected:
            raise UserError(
                f"{call.name}: {operand.name} has the shape {tuple(tensor.shape)}, the kernel of {problem} takes "
                f"{expected}: this build cannot execute it; report the config"
            )


def _stored(schedule: Schedule, call: Call) -> Iterator[str]:
    """The names of a kernel's operands: what it reads in the order of first use, then what it writes."""
    made = set(call.outputs)
    yield from dict.fromkeys(name for name in call.inputs if name not in made)
    yield from dict.fromkeys(name for name in call.outputs if name not in schedule.fused)


def _scalar(call: Call, operand: Operand) -> float | int:
    """A launch argument: the attribute of its name of the call's first op that has it; "seed.2" that of op 2."""
    name, _, index = operand.name.partition(".")
    ops = [call.ops[int(index)]] if index else [op for op in call.ops if name in op.attrs]
    return ops[0].attrs[name]
