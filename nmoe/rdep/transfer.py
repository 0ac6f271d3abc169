"""Executes the protocol's tables over a transport: one transfer of a channel after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from nmoe.rdep.protocol import PROTOCOL, Channel, Protocol
from nmoe.rdep.transport import Part, Transport

_T = TypeVar("_T")


class Transfers:
    """Counts the epochs of each channel. All ranks make the same transfers in the same order."""

    def __init__(self, transport: Transport, protocol: Protocol = PROTOCOL) -> None:
        self.transport = transport
        self._protocol = protocol
        self._epochs: Counter[Channel] = Counter()

    def among(self, members: Sequence[int]) -> Transfers:
        """The same channels among some of the ranks, of which this is one. Every rank of the transport makes each
        transfer with the members that it belongs to."""
        part = Transfers(Part(self.transport, members), self._protocol)
        part._epochs = self._epochs
        return part

    def run(self, channel: Channel, put: Callable[[], None], read: Callable[[], _T]) -> _T:
        """What `read` returns. Every rank starts with the peer after it, so that not all put to the same one."""
        self._epochs[channel] += 1
        t = self.transport
        result: _T | None = None
        for action in self._protocol[channel]:
            epoch = self._epochs[channel] - action.lag
            if action.kind == "put":
                put()
            elif action.kind == "read":
                result = read()
            else:
                act = t.raise_flag if action.kind == "raise" else t.wait_flag
                for i in range(1, t.ranks):
                    act((t.rank + i) % t.ranks, f"{channel}.{action.flag}", epoch, ordered=action.ordered)
        return cast(_T, result)
