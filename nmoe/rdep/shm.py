"""The transport of processes on one host: a segment of shared memory a rank, mapped by all.

Ordering. A flag is an aligned 8-byte word, written and read by one machine instruction. On x86-64 stores become
visible in the order of the program, and loads are made in it (Intel SDM vol. 3 §9.2.3.2; the C library fences the
streaming stores of its large copies), and every access here is a call into compiled code that no compiler moves across
another. So a plain store is a release there and a plain load an acquire. Python offers neither elsewhere: on other
machines this transport refuses to start.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import platform
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nmoe.errors import UserError
from nmoe.rdep.transport import FLAGS, Buffer, Missing

FOLDER = Path("/dev/shm")
LINE = 128  # bytes: a flag word has a cache line, and its prefetched neighbour, to itself
SPINS = 100  # polls before a waiting rank lets others run
PATIENCE = 2000  # polls, about 0.1 s, after which a waiting rank looks whether its peer lives
# STATE: 1 + the rank that a rank waits for, 1 + the one that it gave up on, or 0; the collectives that it has come to
MAPPED, STATE = "mapped", "state"


class Shm:
    """One rank's view of the group. `key` names the group and must be new: no other run, dead or alive, has used it.

    All ranks pass the same `buffers`. The constructor returns once all have mapped all segments, whose names are then
    gone: whatever becomes of the processes, nothing stays behind. `timeout`, in seconds, bounds every wait; time in
    which this process itself was stopped does not count. A rank holds a lock on its segment's file, which the kernel
    releases when it dies, however it dies: so the others can tell a dead rank from one that waits or is stuck, and a
    wait for a dead rank ends at once.
    """

    def __init__(
        self, key: str, rank: int, ranks: int, buffers: Mapping[str, Buffer], *, timeout: float = 30.0
    ) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise UserError(
                "several ranks on a CPU need x86-64, whose memory order the shared-memory transport relies on; this "
                f"is {platform.machine()}: set [rdep] ranks = 1"
            )
        self.rank, self.ranks, self._timeout = rank, ranks, timeout
        self._files: list[BinaryIO] = []
        self._arriving = threading.Lock()
        flags = {f"flag {name}": Buffer((ranks, LINE // 8), torch.int64) for name in (MAPPED, *FLAGS)}
        layout = {STATE: Buffer((LINE // 8,), torch.int64), **flags, **buffers}
        size = sum(_bytes(buffer) for buffer in layout.values())
        own = FOLDER / f"nmoe-{key}-{rank}"
        draft = own.with_name(f"{own.name}.{os.getpid()}")
        try:
            self._lock = draft.open("xb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.posix_fallocate(
                self._lock.fileno(), 0, size
            )  # a full /dev/shm fails here, not with a SIGBUS later
            draft.rename(own)
            self._views = [self._map(key, peer, size, layout) for peer in range(ranks)]
            for peer in range(ranks):
                self.raise_flag(peer, MAPPED, 1)
            for peer in range(ranks):
                self.wait_flag(peer, MAPPED, 1)
        except OSError as error:
            raise UserError(
                f"rank {rank} cannot make {size:,} bytes of shared memory in {FOLDER}: {error.strerror}; enlarge it or "
                "lower [rdep] capacity"
            ) from error
        finally:
            draft.unlink(missing_ok=True)
            own.unlink(missing_ok=True)

    def local(self, buffer: str) -> Tensor:
        return self._views[self.rank][buffer]

    def put(self, peer: int, buffer: str, index: Tensor, values: Tensor) -> None:
        self._views[peer][buffer].index_copy_(0, index, values)

    def raise_flag(self, peer: int, flag: str, epoch: int, *, ordered: bool = True) -> None:
        self._views[peer][f"flag {flag}"][self.rank, 0] = epoch

    def wait_flag(self, peer: int, flag: str, epoch: int, *, ordered: bool = True) -> None:
        word = self._views[self.rank][f"flag {flag}"][peer]
        if int(word[0]) >= epoch:
            return
        state = self._views[self.rank][STATE]
        state[0] = peer + 1
        clock = _Clock(self._timeout)
        while True:
            expired = clock.expired()
            if int(word[0]) >= epoch:
                state[0] = 0
                return
            # What a peer said before it died counts, so that the word is read once more after the look at the peer.
            if (expired or (clock.looks % PATIENCE == 0 and self._lost(peer))) and int(word[0]) < epoch:
                break
        chain = self._chain(peer)
        state[1] = chain[-1] + 1
        through = "".join(f", which waits for rank {rank}" for rank in chain[1:])
        fate = "is stuck" if self._alive(chain[-1]) else "has died"
        raise Missing(
            f"rank {self.rank} waited {clock.seconds:.1f} s for {flag} {epoch} (seen {int(word[0])}) of rank {peer}"
            f"{through}: rank {chain[-1]} of {self.ranks} {fate}. Look for the first error in its log, then continue "
            "with --resume"
        )

    def arrive(self) -> None:
        """This rank has come to a collective outside of this transport, the next in a count. From any thread."""
        with self._arriving:
            self._views[self.rank][STATE][2] += 1

    def dead(self) -> list[int]:
        """The ranks whose processes are gone."""
        return [peer for peer in range(self.ranks) if peer != self.rank and not self._alive(peer)]

    def late(self) -> list[int]:
        """The ranks that have come to fewer collectives than this one."""
        come = [int(views[STATE][2]) for views in self._views]
        return [peer for peer in range(self.ranks) if come[peer] < come[self.rank]]

    def _lost(self, peer: int) -> bool:
        """Whether a peer will never answer: it has died, or given up on another rank."""
        return bool(self._views[peer][STATE][1]) or not self._alive(peer)

    def _chain(self, peer: int) -> list[int]:
        """From the rank that this one waits for, along who waits for whom, to the one that has died or is stuck."""
        chain = [peer]
        while True:
            waits, gave_up = self._views[chain[-1]][STATE][:2].tolist()
            after = (gave_up or (waits if self._alive(chain[-1]) else 0)) - 1
            if after < 0 or after in (self.rank, *chain):
                return chain
            chain.append(after)

    def _alive(self, peer: int) -> bool:
        try:
            fcntl.flock(self._files[peer], fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._files[peer], fcntl.LOCK_UN)
        return False

    def _map(self, key: str, peer: int, size: int, layout: Mapping[str, Buffer]) -> dict[str, Tensor]:
        path, clock = FOLDER / f"nmoe-{key}-{peer}", _Clock(self._timeout)
        while not path.exists():
            if clock.expired():
                raise Missing(
                    f"rank {self.rank} waited {clock.seconds:.1f} s for rank {peer} of {self.ranks} to start. Look "
                    "for the first error in its log"
                )
        file = path.open("r+b")
        self._files.append(file)
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise UserError(
                f"rank {peer} has {found:,} bytes of buffers, rank {self.rank} has {size:,}: start all ranks with the "
                "same config"
            )
        memory = mmap.mmap(file.fileno(), size)
        views, at = {}, 0
        for name, buffer in layout.items():
            flat = torch.frombuffer(memory, dtype=buffer.dtype, count=math.prod(buffer.shape), offset=at)
            views[name] = flat.view(buffer.shape)
            at += _bytes(buffer)
        return views


class _Clock:
    """Time that passes while this process runs: a gap of more than a second between two looks counts as one."""

    def __init__(self, timeout: float) -> None:
        self.seconds, self.looks = 0.0, 0
        self._timeout, self._last = timeout, time.monotonic()

    def expired(self) -> bool:
        """Whether the time is over; from the first few looks on, each lets other processes run."""
        self.looks += 1
        if self.looks > SPINS:
            time.sleep(0 if self.looks < 10 * SPINS else 1e-4)
        now = time.monotonic()
        self.seconds += min(now - self._last, 1.0)
        self._last = now
        return self.seconds > self._timeout


def _bytes(buffer: Buffer) -> int:
    """Of a buffer in a segment: a multiple of a line, so that the next one is aligned."""
    return -(-math.prod(buffer.shape) * buffer.dtype.itemsize // LINE) * LINE
