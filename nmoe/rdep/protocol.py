"""The protocol of RDEP as data: what a rank does, in order, to send rows and to receive them.

`exchange` executes these tables and tests/rdep explores all their interleavings, so what is proven is what runs.

A channel is a buffer on every rank with two kinds of flag words, each word with one writer: `full[source]` on the
receiver says that the rows of an epoch have arrived, `free[receiver]` on the source that those of an epoch were
consumed. A flag holds the last epoch it was raised for and is never reset. Epochs count the transfers of a channel.

- counts, returns: no `free`. A rank sends counts, or rows, only after it has read the returns of the round before;
  whoever writes to it next has waited for that message, hence the buffer has been read.
- terms, totals: no `free`, for the same reason. A rank sends terms only after it has read the totals before, and
  totals only after it has read the terms.
- rows: `free`, because rows may follow rows (recomputation dispatches again) with no return in between.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """One act of a rank. `ordered`: a raise is a release (what was put before is seen by whoever sees the flag), a
    wait an acquire (what comes after it sees at least that)."""

    kind: Literal["put", "raise", "wait", "read"]
    flag: Literal["", "full", "free"] = ""
    lag: int = 0  # waits for this many epochs before the current one
    ordered: bool = True


PUT, READ = Action("put"), Action("read")
SEND = (PUT, Action("raise", "full"))
RECEIVE = (Action("wait", "full"), READ)

Channel = Literal["counts", "rows", "returns", "terms", "totals"]
Protocol = dict[Channel, tuple[Action, ...]]

PROTOCOL: Protocol = {
    "counts": (*SEND, *RECEIVE),
    "rows": (Action("wait", "free", lag=1), *SEND, *RECEIVE, Action("raise", "free")),
    "returns": (*SEND, *RECEIVE),
    "terms": (*SEND, *RECEIVE),
    "totals": (*SEND, *RECEIVE),
}

# On GPUs (device_layer.py) rows go to a place of their own in the arena, and what was there before is consumed when the
# next transfer begins, by the memory plan: leave for it is given only then.
GPU_PROTOCOL: Protocol = {
    **PROTOCOL,
    "rows": (Action("raise", "free", lag=1), Action("wait", "free", lag=1), *SEND, *RECEIVE),
}

# What a layer transfers, on all ranks alike. The first rows of FORWARD are the choices that the slots hold.
FORWARD: tuple[Channel, ...] = ("counts", "rows", "rows", "returns")
BACKWARD: tuple[Channel, ...] = ("rows", "returns")
RECOMPUTE: tuple[Channel, ...] = ("rows",)  # before BACKWARD: the forward dispatch again, into the same slots
SUM: tuple[Channel, ...] = ("terms", "totals")  # of gradients over ranks, in as many pieces as it takes
