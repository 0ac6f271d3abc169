"""The CUDA streams of a schedule and the events between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from nmoe.schedule import Call
from nmoe.schedule.overlap import COMM, MAIN


class Streams:
    """`MAIN` is the stream that is current when a phase runs, the schedule's others belong to this object. They start
    after what was on it before the phase, and it goes on after them. Where a multiprocessor becomes free, transfers go
    first. Without a CUDA device, or with calls on MAIN only, nothing is done."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls = calls
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._ended: dict[int, torch.cuda.Event] = {}  # of the calls that others wait for
        if device.type == "cuda":
            used = {c.stream for c in calls} - {MAIN}
            self._streams = {s: torch.cuda.Stream(device, priority=-(s == COMM)) for s in used}
            self._ended = {index: torch.cuda.Event() for call in calls for index in call.waits}

    @contextmanager
    def all(self) -> Iterator[None]:
        """Surrounds a phase."""
        for stream in self._streams.values():
            stream.wait_stream(torch.cuda.current_stream())
        yield
        for stream in self._streams.values():
            torch.cuda.current_stream().wait_stream(stream)

    def place(self, index: int, run: Callable[[], None]) -> Callable[[], None]:
        """`run`, which is work of call `index`, on its stream and after the calls that it waits for."""
        return partial(self._run, index, run) if self._streams else run

    def _run(self, index: int, run: Callable[[], None]) -> None:
        call = self._calls[index]
        with torch.cuda.stream(self._streams.get(call.stream)):
            for wait in call.waits:
                if self._calls[wait].phase == call.phase:  # earlier phases have ended
                    torch.cuda.current_stream().wait_event(self._ended[wait])
            run()
            if index in self._ended:
                self._ended[index].record()
