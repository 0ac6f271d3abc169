"""An MoE layer on two ranks, of one host or of two, with its GEMMs between dispatch and return, bound by the executors
as on GPUs, on the emulator: equal to one rank's layer bit for bit, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import emulated_ranks
import pytest
import torch
from emulated import EmulatedLauncher
from test_binding import config
from test_model import initialise
from torch import Tensor

from nmoe import binding, recipes
from nmoe.codegen.rdep import COLUMNS, REPORT, STATE, RdepProblem
from nmoe.codegen.transfers import payloads, transfers_of
from nmoe.executor import Executor
from nmoe.formats import buffers
from nmoe.graph import Spec
from nmoe.model import row_align
from nmoe.rdep.device import Group, offsets
from nmoe.rdep.device_layer import DeviceLayer
from nmoe.rdep.transport import Buffer
from nmoe.schedule import Schedule, lower

LAYER = "layers.0.moe"
RANKS = 2


def kernels(target: str):
    """Those of the MoE layer, with `combine` by itself so that its result exists on one rank, too; what reads scale
    factors in atoms has no other way."""
    every = binding.kernels(target)

    def some(graph, ops, fused):
        alone = ops[0].kind != "combine" or len(ops) == 1
        atoms = any(
            graph.tensors[n].spec.atoms for op in ops for n in (*op.inputs, *op.outputs) if n is not None
        )
        return every(graph, ops, fused) if alone and (atoms or f"{LAYER}." in ops[0].name) else None

    return some


class RankLauncher(EmulatedLauncher):
    """One rank's launches on the emulated device that all share."""

    def __init__(self, first: EmulatedLauncher, turns: emulated_ranks.Turns) -> None:
        super().__init__()
        self.device, self._functions, self._turns = first.device, first._functions, turns

    def bind(self, problem, config, target, arguments):
        transfer = isinstance(problem, RdepProblem)
        launch = super().bind(
            problem, emulated_ranks.config(problem) if transfer else config, target, arguments
        )

        def run() -> None:
            if transfer:
                self._turns.take(launch)
            else:
                with self._turns.lock:
                    launch()

        return run


def heaps(group: Group, arena_bytes: int) -> tuple[dict[str, Buffer], dict[str, int], int]:
    """What each rank's heap holds, where, and its size."""
    buffers = group.mailboxes() | {"arena": Buffer((arena_bytes,), torch.uint8)}
    return buffers, *offsets(buffers)


class Memory:
    """What symmetric.Heap is on a GPU: a part of `whole`, in which the heaps of all ranks lie."""

    def __init__(
        self, launcher: EmulatedLauncher, group: Group, rank: int, arena_bytes: int, whole: Tensor
    ) -> None:
        self.rank, self._launcher, self.peers = rank, launcher, [self]
        buffers, at, size = heaps(group, arena_bytes)
        own = whole[rank * size :]
        self._held = {n: own[at[n] :][: b.bytes].view(b.dtype).view(b.shape) for n, b in buffers.items()}
        self["flags"].zero_()
        self.report = self.empty(Buffer((group.ranks, len(REPORT)), torch.int64)).zero_()
        self.state = self.empty(Buffer((len(STATE),), torch.int64)).zero_()
        self.state[STATE.index("timeout")] = 1000
        self.state[STATE.index("report")] = self.report.data_ptr()

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name]

    def empty(self, buffer: Buffer) -> Tensor:
        return self._launcher.memory(_spec(buffer), 0xFF)

    def table(self, **places: Tensor) -> Tensor:
        own = {name: tensor.data_ptr() - self["arena"].data_ptr() for name, tensor in places.items()}

        def address(peer: Memory, column: str) -> int:
            if column in own:
                return peer["arena"].data_ptr() + own[column]
            return peer[column].data_ptr() if column in peer._held else 0

        found = self.empty(Buffer((len(self.peers), len(COLUMNS)), torch.int64))
        return found.copy_(torch.tensor([[address(p, c) for c in COLUMNS] for p in self.peers]))


def _spec(buffer: Buffer) -> Spec:
    names = {torch.int32: "i32", torch.int64: "i64", torch.float32: "f32", torch.bfloat16: "bf16"}
    return Spec(buffer.shape, names.get(buffer.dtype, "u8"))


def watched(schedule: Schedule) -> dict[str, list[str]]:
    """What a layer makes, by the op that makes it."""
    ops = {op.name: op for op in schedule.graph.ops}
    names = ("plan", "combine", "dispatch.bwd")
    return {f"{LAYER}.{n}": [out for out in ops[f"{LAYER}.{n}"].outputs if out is not None] for n in names}


def given(schedule: Schedule) -> dict[str, list[str]]:
    """What a layer is given: tokens, routing and output gradients, by the op that reads them first."""
    ops = {op.name: op for op in schedule.graph.ops}
    plan, rows, back = (ops[f"{LAYER}.{n}"].inputs for n in ("plan", "dispatch", "combine.bwd"))
    return {f"{LAYER}.plan": [plan[0], *rows[:2]], f"{LAYER}.combine.bwd": [back[0]]}


def parts(executor: Executor, names: Sequence[str]) -> dict[str, Tensor]:
    """The buffers of tensors: of rows in MXFP8 their elements, and their scale factors as "name scale"."""
    return {
        f"{name} scale" if index else name: buffer
        for name in names
        for index, buffer in enumerate(buffers(executor.operand(name)))
    }


def run(executor: Executor, inject: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A micro-batch; what the layer was given and what it made, by `parts`. `inject` replaces what it is given."""
    schedule, kept = executor.schedule, {}
    first, last = given(schedule), watched(schedule)

    @contextmanager
    def observe(name: str) -> Iterator[None]:
        for part, tensor in parts(executor, first.get(name, ())).items():
            if inject:
                tensor.copy_(inject[part])
            kept[part] = tensor.clone()
        yield
        kept.update({part: t.clone() for part, t in parts(executor, last.get(name, ())).items()})

    executor.observe = observe
    executor.run("step")
    executor.run("micro")
    kept |= {name: t.clone() for name, t in executor.tensors.items() if name.endswith(".grad")}
    return kept


def feed(
    executor: Executor, whole: dict[str, Tensor], rank: int, ranks: int, generator: torch.Generator
) -> None:
    """Weights by name, of experts this rank's; tokens of this rank."""
    for name, tensor in executor.tensors.items():
        if name in whole:
            value = whole[name]
            share = len(value) // ranks if ".experts." in name else 0
            tensor.copy_(value[rank * share :][:share] if share else value)
    for name in ("tokens", "targets"):
        tensor = executor.tensors[name]
        tensor.copy_(torch.randint(0, 96, tensor.shape, generator=generator))
    executor.tensors["positions"].copy_(torch.arange(len(executor.tensors["positions"])) % 32)
    executor.tensors["scale"].fill_(1 / 64)


@pytest.mark.usefixtures("emulator", "wire")
@pytest.mark.parametrize(
    ("gpus", "precision", "target"),
    [
        pytest.param(2, "bf16", "sm_90a", id="one host"),
        pytest.param(1, "bf16", "sm_90a", id="two hosts", marks=pytest.mark.slow),
        pytest.param(2, "mxfp8", "sm_90a", id="rows in MXFP8"),
        pytest.param(1, "mxfp8", "sm_90a", id="rows in MXFP8, two hosts", marks=pytest.mark.slow),
        pytest.param(2, "mxfp8", "sm_100a", id="rows in MXFP8, atoms", marks=pytest.mark.slow),
    ],
)
def test_a_layer_on_two_ranks_is_that_of_one(gpus: int, precision: str, target: str) -> None:
    base = config(target)
    base = replace(base, train=replace(base.train, batch_size=4), moe=replace(base.moe, topk=3))
    if precision == "mxfp8":
        latent = replace(base.model.attention, kv_lora_rank=128, qk_nope_head_dim=32, v_head_dim=64)
        base = replace(base, model=replace(base.model, hidden_size=recipes.PAYLOAD, attention=latent),
                       moe=replace(base.moe, intermediate_size=128),
                       schedule=replace(base.schedule, precision="mxfp8"))  # fmt: skip
    shared = replace(base, rdep=replace(base.rdep, ranks=RANKS))
    alone = lower(base, sequences=4, kernels=kernels(target))
    schedule = lower(shared, sequences=2, kernels=kernels(target))
    launcher = EmulatedLauncher()
    single = Executor(alone, launcher.tensors(alone, "param", "grad", "state", "input", "const"),
                      launcher.memory(Spec((alone.arena_bytes,), "u8"), 0xFF), launcher)  # fmt: skip
    initialise(single.tensors, alone, 0)
    whole = {t.name: single.tensors[t.name].clone() for t in alone.graph.of_kind("param", "state")}

    turns, dims, hidden = emulated_ranks.Turns(RANKS), schedule.dims, base.model.hidden_size
    align = row_align(shared)
    group = Group(
        RANKS,
        gpus,
        base.moe.experts,
        dims["T"],
        base.moe.topk,
        dims["R"],
        align,
        *payloads([schedule]),
        hidden,
    )
    assert group.parts == {"bf16": (2 * hidden,), "mxfp8": (hidden, hidden // 32)}[precision]
    assert set(transfers_of(schedule, gpus)) == set(group.problems().values())
    launchers = [RankLauncher(launcher, turns) for _ in range(RANKS)]
    _, _, size = heaps(group, schedule.arena_bytes)
    symmetric = launcher.memory(Spec((RANKS * size,), "u8"), 0xFF)
    emulated_ranks.ARENA.update(base=symmetric.data_ptr(), size=size)
    memories = [Memory(launchers[r], group, r, schedule.arena_bytes, symmetric) for r in range(RANKS)]
    executors = []
    for rank, memory in enumerate(memories):
        memory.peers = memories
        layer = DeviceLayer(group, memory, launchers[rank], target)
        tensors = launcher.tensors(schedule, "param", "grad", "state", "input", "const")
        executors.append(Executor(schedule, tensors, memory["arena"], launchers[rank], layer.implementations))
        feed(executors[-1], whole, rank, RANKS, torch.Generator().manual_seed(rank))
    with ThreadPoolExecutor(RANKS) as pool:
        for _ in range(2):  # flags and epochs go on
            for executor in executors:
                for name, tensor in executor.tensors.items():
                    if name.endswith((".grad", ".load")) or name.startswith("loss."):
                        tensor.zero_()
            ranks = list(pool.map(run, executors))
    assert not any(memory.report.any() for memory in memories)

    def both(name: str) -> Tensor:
        return torch.cat([found[name] for found in ranks])

    inject = {part: both(part) for names in given(schedule).values() for part in parts(executors[0], names)}
    feed(single, whole, 0, 1, torch.Generator().manual_seed(0))
    one = run(single, inject)
    made = [name for op, names in watched(schedule).items() for name in names if not op.endswith("plan")]
    assert len(made) == 3
    for name in made:
        assert one[name].any() and torch.equal(both(name).view(torch.uint8), one[name].view(torch.uint8)), (
            name
        )
    experts = [name for name in one if ".experts." in name]
    assert len(experts) == 2
    for name in experts:
        assert one[name].any() and torch.equal(both(name), one[name]), name
    load = f"{LAYER}.load"
    assert torch.equal(sum(found[load] for found in ranks), one[load])


def test_transfers_are_no_kernels_of_one_rank() -> None:
    shared = replace(config("sm_90a"), rdep=replace(config("sm_90a").rdep, ranks=RANKS))
    schedule = lower(shared, sequences=2, kernels=binding.kernels("sm_90a"))
    moved = [call for call in schedule.calls if call.ops[0].kind in ("moe_plan", "dispatch", "combine")]
    assert [len(call.ops) for call in moved] == [1] * 5
    assert all(call.workspace is None for call in moved)
    assert "dispatch" not in binding.by_torch(schedule)
    assert not any(schedule.scratch_names[call.name] for call in moved)
