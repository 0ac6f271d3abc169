"""The CUDA streams of a schedule and the events between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from nmoe.schedule import Call
from nmoe.schedule.lower import MAIN


class Streams:
    """`MAIN` is the stream that is current when a phase runs, the schedule's others belong to this object. They start
    after what was on it before the phase, and it goes on after them. Without a CUDA device, or with calls on MAIN
    only, nothing is done."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls = calls
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._ended: dict[int, torch.cuda.Event] = {}  # of the calls that others wait for
        if device.type == "cuda":
            self._streams = {s: torch.cuda.Stream(device) for s in {c.stream for c in calls} - {MAIN}}
            self._ended = {index: torch.cuda.Event() for call in calls for index in call.waits}

    @contextmanager
    def all(self) -> Iterator[None]:
        """Surrounds a phase."""
        for stream in self._streams.values():
            stream.wait_stream(torch.cuda.current_stream())
        yield
        for stream in self._streams.values():
            torch.cuda.current_stream().wait_stream(stream)

    def of(self, index: int) -> AbstractContextManager[None]:
        """Surrounds the work of call `index`: on its stream, after the calls that it waits for."""
        return self._on(index) if self._streams else nullcontext()

    @contextmanager
    def _on(self, index: int) -> Iterator[None]:
        call = self._calls[index]
        with torch.cuda.stream(self._streams.get(call.stream)):
            for wait in call.waits:
                if self._calls[wait].phase == call.phase:  # earlier phases have ended
                    torch.cuda.current_stream().wait_event(self._ended[wait])
            yield
            if index in self._ended:
                self._ended[index].record()
