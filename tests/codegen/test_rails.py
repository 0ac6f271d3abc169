"""The kernels between hosts: on the emulator with a stand-in for NVSHMEM's puts; and linked with NVSHMEM's own device
code for both targets, where its package is installed."""

from __future__ import annotations

import importlib.metadata
import random
from typing import Any

import pytest
import torch

from nmoe.codegen import compiler
from nmoe.codegen.rails import CHUNK, RailFlagProblem, RailProblem
from nmoe.codegen.rdep import COLUMNS, FLAGS, LINE, REPORT, STATE
from nmoe.rdep.device import check, offsets
from nmoe.rdep.transport import Buffer, Missing

VERSION = "3.8.0"


class Host:
    """The ranks of all hosts on one emulated device: an arena of heaps of the same layout."""

    def __init__(self, problem: RailProblem, seed: int) -> None:
        from nmoe.codegen.emulator import Device, Options
        from nmoe.codegen.emulator.device import DeviceTensor

        self.device = Device(Options(seed=seed, races=True, limit=1 << 24))
        self.problem = problem
        lead, dtypes = (
            (problem.hosts - 1, problem.tokens),
            {"u8": torch.uint8, "i32": torch.int32, "f32": torch.float32},
        )
        buffers = {"flags": Buffer((len(FLAGS), problem.ranks, LINE), torch.int64)}
        for operand in problem.arguments():
            if operand.shape[:2] == lead:
                buffers[operand.name] = Buffer(operand.shape, dtypes[operand.format])
        at, self.size = offsets(buffers)
        arena = self.device.empty((problem.ranks * self.size,), torch.uint8)
        self.base = arena.pointer
        self.heaps: list[dict[str, DeviceTensor]] = []
        for rank in range(problem.ranks):
            heap = {}
            for name, buffer in buffers.items():
                start = rank * self.size + at[name]
                part = slice(start, start + buffer.bytes)
                view = arena.torch[part].view(buffer.dtype).view(buffer.shape)
                heap[name] = DeviceTensor(view, arena.written[part], arena.memory[part])
            heap["flags"].torch.zero_()
            heap["flags"].written[:] = 1
            self.heaps.append(heap)
        self.reports = [
            self.device.tensor(torch.zeros(problem.ranks, len(REPORT), dtype=torch.int64)) for _ in self.heaps
        ]
        self.states = []
        for report in self.reports:
            state = dict.fromkeys(STATE, 0) | {"timeout": 1000, "report": report.pointer}
            self.states.append(self.device.tensor(torch.tensor([state[name] for name in STATE])))
        table = [[heap["flags"].pointer if c == "flags" else 0 for c in COLUMNS] for heap in self.heaps]
        self.addresses = self.device.tensor(torch.tensor(table))
        self._functions: dict[Any, Any] = {}

    def launch(self, problem: Any, rank: int, *arguments: Any) -> None:
        from nmoe.codegen.emulator import bind

        config = problem.configs("sm_90a")[0]
        if problem not in self._functions:
            self._functions[problem] = bind(compiler.trace(problem, config, "sm_90a", "--generate-line-info"))
        table = (self.addresses, self.states[rank], rank, 7)
        self._functions[problem](self.device, *arguments, *table, 3, 0)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A stand-in takes NVSHMEM's place; where the heaps lie is to be written into what is returned."""
    import emulated_nvshmem

    from nmoe.codegen.templates import rdep_rail

    monkeypatch.setattr(rdep_rail, "Nvshmem", emulated_nvshmem.Nvshmem)
    return emulated_nvshmem.ARENA


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("ranks", "gpus", "parts", "fan", "describes"),
    [(4, 2, (64,), 3, True), (3, 1, (32, 16), 2, False)],
    ids=["two hosts of two", "three hosts of one, quantized"],
)
def test_rows_land_in_order_with_their_places(
    wire: dict[str, int], ranks: int, gpus: int, parts: tuple[int, ...], fan: int, describes: bool
) -> None:
    problem = RailProblem(ranks, gpus, VERSION, parts, 2 * CHUNK, fan, describes)
    host = Host(problem, seed=ranks)
    wire |= {"base": host.base, "size": host.size}
    wait, free = (RailFlagProblem(ranks, gpus, VERSION, a, problem.messages) for a in ("await", "raise"))
    generator = torch.Generator().manual_seed(ranks)
    capacity, order = 50, random.Random(ranks)
    span = gpus * capacity
    for sent in (
        (40, 64, 0, 5),
        (64, 1, 33, 0),
    ):  # tokens of each rank; a second transfer over what the first left
        rows = [[torch.randint(0, 256, (64, n), dtype=torch.uint8, generator=generator) for n in parts]
                for _ in range(ranks)]  # fmt: skip
        places = [
            torch.randint(-1, ranks * capacity, (64, fan), generator=generator).int() for _ in range(ranks)
        ]
        values = [torch.rand(64, fan, generator=generator) for _ in range(ranks)]
        for rank in order.sample(range(ranks), ranks):
            own = [*rows[rank], places[rank], *([values[rank]] if describes else [])]
            heap = host.heaps[rank]
            buffers = [heap[name] for name in heap if name != "flags"]
            tensors = [host.device.tensor(tensor) for tensor in own]
            host.launch(problem, rank, *tensors, *buffers, sent[rank], 0, span, span)
        for rank in order.sample(range(ranks), ranks):
            host.launch(wait, rank)
            heap, here = host.heaps[rank], rank // gpus
            for hop in range(problem.hosts - 1):
                source = (here + 1 + hop) % problem.hosts * gpus + rank % gpus
                near = places[source] - here * span
                near = torch.where((near >= 0) & (near < span), near, -1)
                near[sent[source] :] = -1
                for first in range(0, 64, CHUNK):
                    part = slice(first, first + CHUNK)
                    goes = (near[part] >= 0).any(1).nonzero().view(-1) + first
                    count = len(goes)
                    got = heap["landed places"].torch[hop, part]
                    assert torch.equal(got[:count], near[goes]) and (got[count:] == -1).all()
                    for i in range(len(parts)):
                        assert torch.equal(
                            heap[f"landed rows{i}"].torch[hop, part][:count], rows[source][i][goes]
                        )
                    if describes:
                        assert torch.equal(
                            heap["landed values"].torch[hop, part][:count], values[source][goes]
                        )
        for rank in range(ranks):
            host.launch(free, rank)


@pytest.mark.usefixtures("emulator")
def test_rows_wait_for_the_landing_and_a_missing_host_is_named(wire: dict[str, int]) -> None:
    from nmoe.codegen.emulator.device import EmulationError

    problem = RailProblem(4, 2, VERSION, (64,), CHUNK, 2, False)
    host = Host(problem, seed=1)
    wire |= {"base": host.base, "size": host.size}

    def send(rank: int) -> None:
        own = [torch.ones(CHUNK, 64, dtype=torch.uint8), torch.full((CHUNK, 2), 199, dtype=torch.int32)]
        heap = host.heaps[rank]
        tensors = [*(host.device.tensor(t) for t in own), *(heap[name] for name in heap if name != "flags")]
        host.launch(problem, rank, *tensors, CHUNK, 0, 100, 100)

    send(1)
    with pytest.raises(EmulationError, match="trap"):
        send(1)  # nobody has consumed the first
    with pytest.raises(Missing, match=r"layer 7: rank 1 waited 30 s for rails.free 1 \(seen 0\) of rank 3"):
        check(host.reports[1].torch, 30)
    with pytest.raises(EmulationError, match="trap"):
        host.launch(RailFlagProblem(4, 2, VERSION, "await", problem.messages), 1)
    with pytest.raises(Missing, match=r"layer 7: rank 1 waited 30 s for rails.full 2 \(seen 0\) of rank 3"):
        check(host.reports[1].torch, 30)


def test_what_cannot_be_sent_between_hosts_is_named() -> None:
    good = RailProblem(16, 8, VERSION, (4096,), 8192, 6, True)
    assert not good.violations(good.configs("sm_100a")[0], "sm_100a")
    bad = RailProblem(8, 8, VERSION, (4100,), 100, 6, True)
    found = bad.violations(bad.configs("sm_100a")[0], "sm_100a")
    assert [line.split(":")[0] for line in found] == [
        "8 ranks of 8 GPUs a host",
        "parts (4100,)",
        "100 tokens",
    ]


@pytest.mark.usefixtures("compiler")
def test_another_version_of_nvshmem_is_refused() -> None:
    from nmoe.codegen.templates.nvshmem import bitcode
    from nmoe.errors import UserError

    with pytest.raises(UserError, match=r"linked with nvidia-nvshmem-cu13 0\.0\.1, found"):
        bitcode(100, "0.0.1")


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_nvshmem_is_linked(target: str) -> None:
    """The machine code holds NVSHMEM's device state, and takes nothing but addresses and 32-bit scalars."""
    try:
        found = importlib.metadata.version("nvidia-nvshmem-cu13")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        pytest.skip(f"needs nvidia-nvshmem-cu13 {VERSION}, found {found}")
    problem = RailProblem(16, 8, VERSION, (4096,), 8192, 6, True)
    for rail in (problem, RailFlagProblem(16, 8, VERSION, "raise", problem.messages)):
        config = rail.configs(target)[0]
        compiled = compiler.trace(rail, config, target)
        assert b"nvshmemi_device_state_d" in compiled.__cubin__
        ptx = compiled.__ptx__
        entry = ptx[ptx.index(".entry") :].split(")")[0]
        kinds = ["b8" if ".b8" in line else "u32" for line in entry.splitlines() if ".param" in line]
        assert entry.count("[8]") == kinds.count("b8")
        assert kinds == ["u32" if not o.shape else "b8" for o in rail.operands(config)]
