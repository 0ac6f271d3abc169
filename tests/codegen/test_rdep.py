"""RDEP's kernels on the emulator, several ranks in one memory: slots, rows and sums equal to nmoe.rdep.plan and to one
rank's, bit for bit, forward and backward; overflow and a missing rank are reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nmoe.codegen.rdep import MoveProblem, RdepConfig
from nmoe.rdep import plan as slots
from nmoe.rdep.device import Group, check
from nmoe.rdep.plan import CapacityError
from nmoe.rdep.sizes import worst_case
from nmoe.rdep.transport import Missing


def sized(group: Group) -> Group:
    worst = worst_case(group.ranks, group.tokens, group.topk, group.experts, group.align)
    return replace(group, capacity=worst)


# Tokens of each rank beside it: more than a tile of choices, one, none that fill a unit of the ring.
QUANTIZED = sized(Group(2, 2, 8, 700, 2, 0, 16, (128, 16), 64)), (700, 513)
BF16 = sized(Group(4, 4, 12, 40, 3, 0, 8, (96,), 48)), (40, 1, 5, 33)
HOSTS = sized(Group(4, 2, 8, 64, 3, 0, 32, (96,), 48)), (64,) * 4
RAIL = sized(Group(3, 1, 6, 32, 2, 0, 32, (128, 16), 64)), (32,) * 3
ALONE = sized(Group(1, 1, 6, 50, 2, 0, 8, (96,), 48)), (50,)


def draw(group: Group, tokens: tuple[int, ...], hot: float, generator: torch.Generator) -> list[Tensor]:
    """int32[T, k] of each rank; the first experts are the likelier the larger `hot` is."""
    weight = torch.arange(group.experts, 0, -1).float() ** hot
    return [torch.multinomial(weight.expand(t, -1), group.topk, generator=generator).int() for t in tokens]


@pytest.mark.usefixtures("emulator", "wire")
@pytest.mark.parametrize(
    ("target", "case", "seed"),
    [
        ("sm_90a", QUANTIZED, 0),
        ("sm_90a", BF16, 1),
        ("sm_90a", ALONE, 2),
        ("sm_100a", BF16, 3),
        ("sm_90a", HOSTS, 4),
        pytest.param("sm_90a", RAIL, 5, marks=pytest.mark.slow),
    ],
    ids=[
        "two-quantized",
        "four",
        "alone",
        "four-sm_100a",
        "two hosts of two",
        "three hosts of one, quantized",
    ],
)
def test_rows_reach_their_slots_and_return(
    target: str, case: tuple[Group, tuple[int, ...]], seed: int
) -> None:
    from emulated_ranks import Rank, group_of
    from emulated_ranks import each as on_each

    group, tokens = case
    generator = torch.Generator().manual_seed(seed)
    ranks = group_of(group, target, seed)
    device = ranks[0].device

    def each(step: Callable[[Rank], None]) -> None:
        on_each(ranks, step, seed)

    def draw_rows(sizes: tuple[int, ...]) -> list[list[Tensor]]:
        return [
            [torch.randint(0, 256, (t, n), dtype=torch.uint8, generator=generator) for n in sizes]
            for t in tokens
        ]

    for layer, hot in enumerate(
        (0.0, 4.0)
    ):  # two layers on one heap: epochs go on, other slots hold old rows
        chosen = draw(group, tokens, hot, generator)
        values = [torch.rand(t, group.topk, generator=generator) for t in tokens]
        rows, grads = draw_rows(group.parts), draw_rows(group.parts)
        indices = [device.tensor(i) for i in chosen]
        routing = [rank.routing(t) for rank, t in zip(ranks, tokens, strict=True)]
        want = slots.plan(torch.stack([slots.count(i, group.experts) for i in chosen]), group.align)
        placed = [slots.place(want, i, s) for s, i in enumerate(chosen)]

        def arrived(sent: list[Tensor], owner: int, fill: float = 0) -> Tensor:
            """What lies in the owner's slots when each rank sends a row a choice."""
            out = torch.full((want.totals[owner], *sent[0].shape[1:]), fill, dtype=sent[0].dtype)  # noqa: B023
            for (to, slot), tensor in zip(placed, sent, strict=True):  # noqa: B023
                mine = to.view(-1) == owner
                out[slot.view(-1)[mine]] = tensor[mine]
            return out

        def everyone(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.repeat_interleave(group.topk, 0) for tensor in tensors]

        each(lambda r: r.exchange.send_counts(indices[r.rank], routing[r.rank], layer))  # noqa: B023
        each(lambda r: r.exchange.receive_counts(indices[r.rank], routing[r.rank], layer))  # noqa: B023
        for rank, (owner, slot) in zip(ranks, placed, strict=True):
            assert torch.equal(routing[rank.rank].slots.torch.long(), owner * group.capacity + slot)
            assert torch.equal(routing[rank.rank].offsets.torch.long(), want.offsets[rank.rank])
            by_expert = chosen[rank.rank].view(-1).argsort(stable=True)
            assert torch.equal(routing[rank.rank].order.torch.view(-1).long(), by_expert)

        for sent, weights in ((rows, values), (grads, None)):  # forward and backward, to the same slots
            parts = [tuple(device.tensor(part) for part in mine) for mine in sent]
            given = [None if weights is None else device.tensor(weights[i]) for i in range(group.ranks)]
            each(lambda r: r.exchange.send_rows(parts[r.rank], given[r.rank], routing[r.rank], layer))  # noqa: B023
            each(lambda r: r.exchange.receive_rows(layer))  # noqa: B023
            for rank in ranks:
                total, heap = want.totals[rank.rank], rank.heap
                for i, column in enumerate(("data", "scale")[: len(group.parts)]):
                    expected = arrived(everyone([mine[i] for mine in sent]), rank.rank)
                    assert torch.equal(heap[column].torch[:total], expected)
                origins = [s * group.choices + torch.arange(i.numel()).int() for s, i in enumerate(chosen)]
                assert torch.equal(heap["origin"].torch[:total], arrived(origins, rank.rank, -1))
                weight = arrived([v.view(-1) for v in values], rank.rank)
                assert torch.equal(heap["value"].torch[:total], weight)

            shape = (group.capacity, group.width)
            outputs = [torch.randn(shape, generator=generator).bfloat16() for _ in ranks]
            sums = [torch.rand(group.capacity, 1, generator=generator) for _ in ranks]
            brought = [None if weights is not None else device.tensor(s) for s in sums]
            y = [device.empty((t, group.width), torch.bfloat16) for t in tokens]
            each(
                lambda r: r.exchange.send_returns(
                    device.tensor(outputs[r.rank].view(torch.uint8)),  # noqa: B023
                    brought[r.rank],  # noqa: B023
                    r.column("origin"),
                    routing[r.rank],  # noqa: B023
                    layer,  # noqa: B023
                )
            )
            each(lambda r: r.exchange.release_rows(layer))  # noqa: B023
            each(lambda r: r.exchange.receive_returns(y[r.rank], layer))  # noqa: B023
            for rank, (owner, slot) in zip(ranks, placed, strict=True):
                total = torch.zeros(tokens[rank.rank], group.width)
                for k in range(group.topk):
                    total += torch.stack(outputs)[owner[:, k], slot[:, k]].float()
                assert torch.equal(y[rank.rank].torch, total.bfloat16())
                if weights is None:
                    got = rank.heap["returned value"].torch[: owner.numel()]
                    assert torch.equal(got, torch.stack(sums)[owner, slot].view(-1))


@pytest.mark.usefixtures("emulator")
def test_an_overflow_is_reported_by_all_and_moves_nothing() -> None:
    from emulated_ranks import group_of

    group, tokens = BF16
    chosen = draw(group, tokens, 4.0, torch.Generator().manual_seed(4))
    want = slots.plan(torch.stack([slots.count(i, group.experts) for i in chosen]), group.align)
    group = replace(group, capacity=max(want.totals) - 1)
    ranks = group_of(group, "sm_90a", 0)
    device = ranks[0].device
    indices = [device.tensor(i) for i in chosen]
    routing = [rank.routing(t) for rank, t in zip(ranks, tokens, strict=True)]
    for rank in ranks:
        rank.exchange.send_counts(indices[rank.rank], routing[rank.rank], 7)
    for rank in ranks:
        rank.exchange.receive_counts(indices[rank.rank], routing[rank.rank], 7)
    for rank in ranks:
        t = tokens[rank.rank]
        rows = device.tensor(torch.ones(t, group.parts[0], dtype=torch.uint8))
        rank.exchange.send_rows((rows,), device.tensor(torch.ones(t, group.topk)), routing[rank.rank], 7)
    said = []
    for rank in ranks:
        rank.exchange.receive_rows(7)  # peers raise their flags although they sent nothing
        assert not rank.heap["data"].written.any()
        assert not routing[rank.rank].offsets.torch.any()
        with pytest.raises(CapacityError) as error:
            check(rank.report.torch, 1)
        said.append(str(error.value))
    assert set(said) == {said[0]}
    assert said[0].startswith(f"layer 7: rank 0 would receive {want.totals[0]} expert rows")


@pytest.mark.usefixtures("emulator")
def test_a_wait_for_a_missing_rank_ends_with_a_record() -> None:
    from emulated_ranks import group_of

    from nmoe.codegen.emulator.device import EmulationError

    group, tokens = BF16
    ranks = group_of(group, "sm_90a", 0)
    device = ranks[0].device
    chosen = draw(group, tokens, 0.0, torch.Generator().manual_seed(5))
    for rank in ranks:
        if rank.rank != 2:
            rank.exchange.send_counts(
                device.tensor(chosen[rank.rank]), rank.routing(tokens[rank.rank]), layer=5
            )
    first = ranks[0]
    check(first.report.torch, 30)  # nothing yet
    with pytest.raises(EmulationError, match="trap"):
        first.exchange.receive_counts(device.tensor(chosen[0]), first.routing(tokens[0]), layer=5)
    with pytest.raises(Missing, match=r"layer 5: rank 0 waited 30 s for counts.full 1 \(seen 0\) of rank 2"):
        check(first.report.torch, 30)


def test_every_config_is_legal_and_what_breaks_a_limit_is_named() -> None:
    rows = MoveProblem(2, 2, "rows", (14336,), 8, 128, True)
    for target in ("sm_90a", "sm_100a"):
        for problem in (rows, replace(rows, channel="returns"), replace(rows, parts=(7168, 224))):
            assert problem.configs(target)
            assert not any(problem.violations(config, target) for config in problem.configs(target))
    found = replace(rows, parts=(4100,)).violations(RdepConfig(8, 4, 2, 8, 2), "sm_90a")
    assert [line.split(":")[0] for line in found] == [
        "263488 bytes of shared memory",
        "parts (4100,)",
        "2 of 2 stages behind",
        "8 rows of 8 destinations",
    ]
