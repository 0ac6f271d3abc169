"""The schedule: every call of a step in order, the stream that it runs on and where its operands lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from nmoe import model
from nmoe.config import Config
from nmoe.differentiate import differentiate
from nmoe.graph import Graph, Op, Phase, Spec, check
from nmoe.ops import OPS, Cost, nbytes
from nmoe.schedule import memory, passes
from nmoe.schedule.fuse import fuse, internal, readers
from nmoe.schedule.overlap import COMM, MAIN, SIDE, TRANSFERS, assign_streams, late, reorder

ATOMS = ("sm_100a",)  # targets whose tensor cores read scale factors; the others dequantize from rows
GATHERS = ("sm_100a",)  # targets whose GEMMs load rows by their tokens

Workspace = tuple[Spec, ...]

# The kernel of a target for some ops of a graph, of whose values the set stay inside it: what it needs in memory beside
# its operands, or None where there is no such kernel.
Kernels = Callable[[Graph, tuple[Op, ...], frozenset[str]], Workspace | None]


def every_kernel(graph: Graph, ops: tuple[Op, ...], fused: frozenset[str]) -> Workspace | None:
    """A target with a kernel for whatever may be fused: what is planned for."""
    return ()


def no_kernel(graph: Graph, ops: tuple[Op, ...], fused: frozenset[str]) -> Workspace | None:
    """A target whose ops all run their reference."""
    return None


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel: an op with its epilogues, and its workspace. Or, with `workspace` None, ops that run their reference
    one after the other. Waits for the calls `waits` on other streams."""

    ops: tuple[Op, ...]
    stream: int = MAIN
    waits: tuple[int, ...] = ()
    workspace: Workspace | None = None

    @property
    def name(self) -> str:
        return self.ops[0].name

    @property
    def phase(self) -> Phase:
        return self.ops[0].phase

    @property
    def inputs(self) -> Iterator[str]:
        return (name for op in self.ops for name in op.inputs if name is not None)

    @property
    def outputs(self) -> Iterator[str]:
        return (name for op in self.ops for name in op.outputs if name is not None)


@dataclass(frozen=True)
class Schedule:
    """`offsets` places every activation that exists in memory in one arena of `arena_bytes`; `aliases` maps a tensor
    that took another's buffer to it; tensors in `fused` exist only inside the kernel that makes them. `scratch_names`
    are those of a kernel's workspace, or of the scratch of an op that runs its reference, by its first op's name."""

    graph: Graph
    target: str
    dims: Mapping[str, int]
    calls: tuple[Call, ...]
    offsets: Mapping[str, int]
    aliases: Mapping[str, str]
    fused: frozenset[str]
    lifetimes: Mapping[str, memory.Lifetime]
    arena_bytes: int
    scratch_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def spec(self, name: str) -> Spec:
        """The tensor's spec with its symbols bound."""
        return self.bind(self.graph.tensors[name].spec)

    def bind(self, spec: Spec) -> Spec:
        return bind(spec, self.dims)

    def scratch_specs(self, op: Op) -> list[Spec]:
        return scratch_specs(self.graph, op, self.dims)

    def cost(self, op: Op, rows: Mapping[str, int] | None = None) -> Cost:
        """Of one op; `rows` replaces dims, e.g. the expected instead of the worst-case expert rows."""
        dims = {**self.dims, **(rows or {})}

        def spec(name: str | None) -> Spec | None:
            return None if name is None else bind(self.graph.tensors[name].spec, dims)

        return OPS[op.kind].cost(op.attrs, [spec(n) for n in op.inputs], [spec(n) for n in op.outputs])

    def costs(self, call: Call, rows: Mapping[str, int] | None = None) -> Iterator[tuple[Op, Cost]]:
        """Of each op of a kernel. Values that stay inside it cost no traffic; what several of its ops read counts
        once."""
        dims, near = {**self.dims, **(rows or {})}, set(self.fused)

        def spec(name: str | None) -> Spec | None:
            if name is None:
                return None
            bound = bind(self.graph.tensors[name].spec, dims)
            return Spec(bound.shape, "register") if name in near else bound

        for op in call.ops:
            ins, outs = [spec(name) for name in op.inputs], [spec(name) for name in op.outputs]
            yield op, OPS[op.kind].cost(op.attrs, ins, outs)
            near.update(name for name in (*op.inputs, *op.outputs) if name is not None)

    def persistent_bytes(self) -> dict[str, int]:
        """Bytes outside the arena by kind: parameters as the GEMMs read them, FP32 gradients, state, inputs."""
        total: dict[str, int] = {}
        for tensor in self.graph.of_kind("param", "grad", "state", "input", "const"):
            total[tensor.kind] = total.get(tensor.kind, 0) + nbytes(self.spec(tensor.name))
        return total


def bind(spec: Spec, dims: Mapping[str, int]) -> Spec:
    return replace(spec, shape=tuple(dims[d] if isinstance(d, str) else d for d in spec.shape))


def scratch_specs(graph: Graph, op: Op, dims: Mapping[str, int]) -> list[Spec]:
    def specs(names: tuple[str | None, ...]) -> list[Spec | None]:
        return [None if n is None else bind(graph.tensors[n].spec, dims) for n in names]

    return OPS[op.kind].scratch(op.attrs, specs(op.inputs), specs(op.outputs))


def lower(
    config: Config,
    *,
    mode: model.Mode = "train",
    sequences: int = 0,
    activation: str | None = None,
    kernels: Kernels = every_kernel,
    debug: bool = False,
) -> Schedule:
    """The schedule of one micro-batch (and of what precedes it) on the config's target.

    `sequences`: of the micro-batch, default [train] micro_batch_size or the rank's whole share on one rank. `kernels`
    are those that the target has, if it is not the CPU. `debug` verifies the graph between passes.
    """
    sequences = sequences or config.train.micro_batch_size or config.train.batch_size
    graph = model.build(config, mode, activation=activation)
    stages = [differentiate, passes.merge_loss] if mode == "train" else []
    stages += [passes.split_loss] if config.target.device != "cpu" else []
    stages += [
        lambda g: passes.quantize_operands(g, atoms=config.target.device in ATOMS),
        lambda g: passes.recompute(g, config.schedule.recompute),
        lambda g: passes.gather_rows(g) if config.target.device in GATHERS else g,
        passes.drop_unused,
    ]
    for stage in stages:
        graph = stage(graph)
        if debug:
            check(graph)
    dims = model.bind_dims(config, sequences)
    return place(graph, config.target.device, dims, overlap=config.rdep.ranks > 1, kernels=kernels)


def place(
    graph: Graph,
    target: str,
    dims: Mapping[str, int],
    *,
    overlap: bool = False,
    kernels: Kernels = every_kernel,
) -> Schedule:
    """The schedule of a graph as it is: its ops grouped into calls, on streams (several if `overlap`), in memory.

    A kernel brings its workspace; an op without one gets its scratch. The CPU target has no kernels, nor has what runs
    once at start.
    """
    uses = readers(graph)

    def workspace(ops: tuple[Op, ...]) -> Workspace | None:
        if target == "cpu" or ops[0].phase == "init":
            return None
        return kernels(graph, ops, internal(graph, uses, ops))

    transfers = [op for op in graph.ops if overlap and op.kind in TRANSFERS]
    moved = frozenset(name for op in transfers for name in op.outputs if name is not None)
    groups = fuse(graph, lambda ops: not late(ops, moved) and (target == "cpu" or workspace(ops) is not None))
    calls = [Call(group, workspace=workspace(group)) for group in groups]
    kernel_calls = (call for call in calls if call.workspace is not None)
    fused = frozenset().union(*(internal(graph, uses, call.ops) for call in kernel_calls))
    return _plan_memory(
        graph, target, dims, assign_streams(reorder(calls)) if overlap else tuple(calls), fused
    )


def _clock(calls: tuple[Call, ...]) -> tuple[list[int], list[int]]:
    """For each call, on the main stream's clock (indices of main calls): after which main call it may start, and
    before which one it is known to have ended."""
    starts = [0] * len(calls)
    ends = [len(calls)] * len(calls)
    last_start = {MAIN: 0, COMM: 0, SIDE: 0}
    for index, call in enumerate(calls):
        if call.stream == MAIN:
            starts[index] = ends[index] = index
            continue
        start = max([last_start[call.stream], *(starts[w] for w in call.waits)])
        starts[index] = last_start[call.stream] = start
    bound = {COMM: len(calls), SIDE: len(calls)}  # the earliest later join of each side stream
    joins: list[dict[int, int]] = [{} for _ in calls]
    for index, call in enumerate(calls):
        for wait in call.waits:
            joins[wait][index] = index
    for index in range(len(calls) - 1, -1, -1):
        call = calls[index]
        if call.stream == MAIN:
            continue
        end = min([bound[call.stream], *(ends[j] for j in joins[index])])
        ends[index] = bound[call.stream] = end
    return starts, ends


def _plan_memory(
    graph: Graph,
    target: str,
    dims: Mapping[str, int],
    calls: tuple[Call, ...],
    fused: frozenset[str],
) -> Schedule:
    starts, ends = _clock(calls)
    last = len(calls)
    born: dict[str, int] = {}
    dies: dict[str, int] = {}
    users: dict[str, list[int]] = {}
    for index, call in enumerate(calls):
        for name in (*call.inputs, *call.outputs):
            born[name] = min(born.get(name, last), starts[index])
            until = last if call.phase != "micro" or graph.tensors[name].kind == "output" else ends[index]
            dies[name] = max(dies.get(name, 0), until)
            users.setdefault(name, []).append(index)

    def planned(name: str) -> bool:
        return graph.tensors[name].kind in ("activation", "output") and name not in fused

    aliases: dict[str, str] = {}
    for index, call in enumerate(calls):
        for op in call.ops:
            for label, operand in OPS[op.kind].inplace.items():
                out, source = op.outputs[OPS[op.kind].outputs.index(label)], op.inputs[operand]
                if out is None or source is None or not (planned(out) and planned(source)):
                    continue
                last_user = (
                    users[source][-1] == index and sum(source in member.inputs for member in call.ops) == 1
                )
                same = graph.tensors[out].spec == graph.tensors[source].spec
                if (
                    last_user
                    and same
                    and op.inputs.count(source) == 1
                    and graph.tensors[source].kind == "activation"
                ):
                    root = aliases.get(source, source)
                    aliases[out] = root
                    dies[root] = max(dies[root], dies[out])
                    if graph.tensors[out].kind == "output":
                        del aliases[out]

    lifetimes = {
        name: memory.Lifetime(name, nbytes(bind(graph.tensors[name].spec, dims)), born[name], dies[name])
        for name in born
        if planned(name) and name not in aliases
    }
    scratch_names: dict[str, tuple[str, ...]] = {}

    def add_scratch(index: int, op: Op, specs: Iterable[Spec]) -> None:
        names = []
        for i, spec in enumerate(specs):
            names.append(f"{op.name}#{i}")
            lifetimes[names[-1]] = memory.Lifetime(names[-1], nbytes(spec), starts[index], ends[index])
        scratch_names[op.name] = tuple(names)

    for index, call in enumerate(calls):
        if call.workspace is not None:
            add_scratch(index, call.ops[0], (bind(spec, dims) for spec in call.workspace))
        else:
            for op in call.ops:
                add_scratch(index, op, scratch_specs(graph, op, dims))
    turn = next((i for i, call in enumerate(calls) if call.ops[0].stage == "backward"), last + 1)
    offsets, arena = memory.place(lifetimes.values(), turn)
    return Schedule(graph, target, dims, calls, offsets, aliases, fused, lifetimes, arena, scratch_names)
