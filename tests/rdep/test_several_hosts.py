"""What the host decides by, between hosts: sums through gloo, and who has died or is late on this one. Processes of one
machine stand for those of two hosts of two."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import Group

from nmoe.errors import UserError
from nmoe.gpu_ranks import Gathered, Several
from nmoe.hosts import ranks_of_host
from nmoe.ranks import Ranks
from nmoe.rdep.shm import Shm
from nmoe.rdep.sums import ROW, tree_sum

WORLD, LOCAL = 4, 2


def term(rank: int) -> torch.Tensor:
    return torch.randn(2 * ROW, generator=torch.Generator().manual_seed(rank))


def work(folder: str, key: str, rank: int, world: int):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    shm = Shm(f"{key}-{rank // LOCAL}", rank % LOCAL, LOCAL, {})
    ranks = Ranks(shm, LOCAL, Several(shm))

    def run(collectives):
        ranks.arrive()
        for collective in collectives:
            collective(async_op=True).wait()

    ranks._sums = Gathered(run)
    total, every = term(rank), torch.zeros(world, 2 * ROW)
    every[rank] = total
    ranks.add_everywhere(total)
    ranks.gather_everywhere(every)
    sums = total, every
    found = ranks.any(rank == 2), ranks.any(False)
    seen = Path(folder, "seen")
    if rank == 3:
        while not seen.exists():
            time.sleep(0.01)
        return (ranks.rank, ranks.world), sums, found, "left"
    if rank == 2:
        ranks.arrive()
        late = ranks._peers.late(), str(ranks.missing())
        seen.touch()
        while not ranks._peers.dead():
            time.sleep(0.01)
        return (ranks.rank, ranks.world), sums, found, (late, str(ranks.missing()))
    return (ranks.rank, ranks.world), sums, found, str(ranks.missing())


def test_sums_and_who_is_missing() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Group(WORLD, partial(work, folder)).join(WORLD)
    terms = [term(rank) for rank in range(WORLD)]
    for rank, result in results.items():
        assert not isinstance(result, Exception), result
        who, sums, found, _ = result
        assert who == (rank, WORLD) and found == (True, False)
        total, every = sums
        assert torch.equal(total, tree_sum(terms)) and torch.equal(every, torch.stack(terms))
    assert results[0][3].startswith("one of 4 has died or is stuck"), "it cannot see another host's"
    (late, stuck), dead = results[2][3]
    assert (
        late == [3] and stuck.startswith("rank 3 of 4 is stuck") and dead.startswith("rank 3 of 4 has died")
    )


def test_groups_take_whole_hosts_or_an_equal_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_of_host(8) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [ranks_of_host(group) for group in (1, 2, 4, 8, 16)] == [1, 2, 4, 4, 4]
    with pytest.raises(UserError, match=r"\[rdep\] ranks = 6 with 4 processes a host"):
        ranks_of_host(6)
