"""Processes over shared memory: the bits of one rank, and what happens when a process stops, dies or differs."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from functools import partial

import pytest
import torch
from layer import Problem, equal, joined, run
from processes import CONTEXT, Group

from nmoe.errors import UserError
from nmoe.ranks import Ranks
from nmoe.rdep import shm
from nmoe.rdep.exchange import Exchange
from nmoe.rdep.shm import Shm
from nmoe.rdep.transport import Local, Missing

PROBLEM = Problem(experts=12, skew=3)


class Sleepy(Shm):
    """Sleeps now and then before it raises a flag."""

    def raise_flag(self, peer, flag, epoch, *, ordered=True):
        if random.random() < 0.2:
            time.sleep(random.random() * 2e-3)
        super().raise_flag(peer, flag, epoch, ordered=ordered)


def _layer(key, rank, ranks, steps, timeout=30.0):
    return run(PROBLEM, Exchange(Sleepy(key, rank, ranks, PROBLEM.buffers(ranks), timeout=timeout)), steps)


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_give_the_bits_of_one_rank(ranks):
    group = Group(ranks, partial(_layer, steps=25))
    found = group.join(ranks)
    for result in found.values():
        assert not isinstance(result, Exception), result
    assert equal(
        joined([found[r] for r in range(ranks)]),
        joined([run(PROBLEM, Exchange(Local(PROBLEM.buffers(1))), 25)]),
    )
    assert not list(shm.FOLDER.glob(f"nmoe-{group.key}*"))


def _running(key, rank, ranks, timeout, events, steps):
    """Layer after layer, `steps` of them or until an error; says so once they have begun."""
    exchange = Exchange(Shm(key, rank, ranks, PROBLEM.buffers(ranks), timeout=timeout))
    run(PROBLEM, exchange)
    events[rank].set()
    return run(PROBLEM, exchange, steps)


def _begun(ranks, **keys):
    events = [CONTEXT.Event() for _ in range(ranks)]
    group = Group(ranks, partial(_running, events=events, **keys))
    for event in events:
        assert event.wait(20)
    return group


def test_survivors_of_a_killed_rank_name_it_within_the_timeout():
    group = _begun(3, timeout=1.5, steps=10**6)
    time.sleep(random.random() * 0.05)  # wherever it is
    group.processes[1].kill()
    begin = time.monotonic()
    errors = group.join(2)
    assert time.monotonic() - begin < 1.5 + 5  # the rest is for a busy machine
    assert sorted(errors) == [0, 2]
    for error in errors.values():
        assert isinstance(error, Missing) and "rank 1 of 3 has died" in str(error), error
    assert not list(shm.FOLDER.glob(f"nmoe-{group.key}*"))


def test_a_stopped_and_continued_rank_is_survived():
    group = _begun(2, timeout=20, steps=60)
    os.kill(group.processes[1].pid, signal.SIGSTOP)
    time.sleep(1.0)
    assert group.results.empty(), "the run ended before the rank was stopped"
    os.kill(group.processes[1].pid, signal.SIGCONT)
    found = group.join(2)
    assert equal(
        joined([found[0], found[1]]), joined([run(PROBLEM, Exchange(Local(PROBLEM.buffers(1))), 60)])
    )


# ---- one process, several views ----


def _views(ranks, timeout=0.2):
    """The transports of all ranks in this process, made at once as they wait for each other."""
    from concurrent.futures import ThreadPoolExecutor

    key = f"test-{os.urandom(6).hex()}"
    make = partial(Shm, key, ranks=ranks, buffers=PROBLEM.buffers(ranks), timeout=timeout)
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: make(rank=rank), range(ranks)))


def test_a_wait_that_expires_names_the_rank_on_which_all_wait():
    views = _views(4)
    views[0]._views[2][shm.STATE][0] = 4  # rank 2 waits for rank 3, which waits for nobody
    expected = [
        (1, 2, "rank 1 waited 0.2 s for rows.full 1 (seen 0) of rank 2, which waits for rank 3: rank 3 of 4 is stuck. "
               "Look for the first error in its log, then continue with --resume"),
        (0, 1, "of rank 1, which waits for rank 3: rank 3 of 4 is stuck."),  # rank 1 has said so
    ]  # fmt: skip
    for rank, peer, message in expected:
        with pytest.raises(Missing, match=re.escape(message)):
            views[rank].wait_flag(peer, "rows.full", 1)


def test_a_rank_that_died_while_it_waited_is_named():
    views = _views(2)
    views[1]._views[1][shm.STATE][0] = 1  # it waits for rank 0
    views[1]._lock.close()
    with pytest.raises(Missing, match="of rank 1: rank 1 of 2 has died"):
        views[0].wait_flag(1, "rows.full", 1)


def test_a_rank_that_gave_up_is_not_blamed():
    views = _views(3)
    with pytest.raises(Missing, match="rank 1 of 3 is stuck"):
        views[2].wait_flag(1, "rows.full", 1)
    views[2]._lock.close()
    with pytest.raises(Missing, match="of rank 2, which waits for rank 1: rank 1 of 3 is stuck"):
        views[0].wait_flag(2, "rows.full", 1)


def test_who_keeps_a_collective_waiting_is_named():
    views = _views(3)
    ranks = [Ranks(view) for view in views]
    for rank in (0, 1, 2, 0, 1):
        ranks[rank].arrive()
    gloo = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc] Timed out waiting 1000ms for recv")
    for rank in (0, 1):
        assert str(ranks[rank].explain(gloo)).startswith("rank 2 of 3 is stuck. Look for")
    assert str(ranks[2].explain(gloo)).startswith("one of 3 has died or is stuck"), (
        "it sees nobody behind itself"
    )
    views[1]._lock.close()
    assert str(ranks[0].explain(gloo)).startswith("rank 1 of 3 has died")
    other = ValueError("no collective's")
    assert ranks[0].explain(other) is other


def test_what_a_flag_says_stays_said():
    views = _views(2)
    views[0].put(1, "rows.data", torch.tensor([2]), torch.full((1, PROBLEM.width), 7.0))
    views[0].raise_flag(1, "rows.full", 3)
    for epoch in (1, 2, 3):
        views[1].wait_flag(0, "rows.full", epoch)
    assert views[1].local("rows.data")[2].tolist() == [7.0] * PROBLEM.width
    with pytest.raises(Missing, match=re.escape("for rows.full 4 (seen 3) of rank 0")):
        views[1].wait_flag(0, "rows.full", 4)
    with pytest.raises(Missing):
        views[0].wait_flag(1, "rows.full", 1)


def test_time_in_which_the_waiting_process_itself_was_stopped_does_not_count(monkeypatch):
    now = iter([0.0, 1000.0, 1000.5, 1001.5])
    monkeypatch.setattr(shm.time, "monotonic", lambda: next(now))
    clock = shm._Clock(2.0)
    assert [clock.expired() for _ in range(3)] == [False, False, True]


def test_ranks_of_different_layouts_refuse_each_other():
    key = f"test-{os.urandom(6).hex()}"
    found = shm.FOLDER / f"nmoe-{key}-1"
    found.write_bytes(bytes(100))
    try:
        message = r"rank 1 has 100 bytes of buffers, rank 0 has [\d,]+: start all ranks with the same config"
        with pytest.raises(UserError, match=f"^{message}$"):
            Shm(key, 0, 2, PROBLEM.buffers(2), timeout=0.2)
    finally:
        found.unlink()
    assert not list(shm.FOLDER.glob(f"nmoe-{key}*"))


def test_a_rank_that_never_starts_is_named():
    with pytest.raises(
        Missing,
        match=r"^rank 0 waited 0\.2 s for rank 1 of 2 to start\. Look for the first error in its log$",
    ):
        Shm(f"test-{os.urandom(6).hex()}", 0, 2, PROBLEM.buffers(2), timeout=0.2)


def test_more_than_the_shared_memory_holds_is_an_error_with_a_remedy(monkeypatch):
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shm.os, "posix_fallocate", full)
    with pytest.raises(
        UserError, match=r"cannot make [\d,]+ bytes .* No space left on device; enlarge it or lower"
    ):
        Shm("test-full", 0, 1, PROBLEM.buffers(1))
    assert not list(shm.FOLDER.glob("nmoe-test-full*"))


def test_machines_of_another_memory_order_are_refused(monkeypatch):
    monkeypatch.setattr(shm.platform, "machine", lambda: "aarch64")
    with pytest.raises(UserError, match=r"need x86-64, .* this is aarch64: set \[rdep\] ranks = 1$"):
        Shm("test", 0, 2, {})
