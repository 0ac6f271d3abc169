"""One line that says how far something is."""

from __future__ import annotations

import time
from typing import TextIO

TERMINAL_INTERVAL, LOG_INTERVAL = 0.2, 10.0  # seconds between lines
BAR = 20  # characters


class Bar:
    """Redraws its line on a terminal, adds one every ten seconds to a log, is silent with `stream = None`."""

    def __init__(self, stream: TextIO | None, name: str):
        self._stream, self._name = stream, name
        self._terminal = stream is not None and stream.isatty()
        self._interval = TERMINAL_INTERVAL if self._terminal else LOG_INTERVAL
        self._first_fraction: float | None = None
        self._started = self._drawn = time.monotonic()
        self._width = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self._started, 1e-9)

    def update(self, fraction: float | None, *parts: str) -> None:
        """Say that `fraction` is done, None if unknown, and the parts."""
        now = time.monotonic()
        if self._stream is None or now - self._drawn < self._interval:
            return
        self._drawn = now
        cells = [self._name, *parts]
        if fraction is not None:
            if self._first_fraction is None:
                self._first_fraction = fraction
            cells.insert(1, f"[{'#' * int(BAR * fraction):.<{BAR}}] {fraction:4.0%}")
            if (gained := fraction - self._first_fraction) > 0:
                left = int(self.seconds * (1 - fraction) / gained)
                cells.append(f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
        self._write("  ".join(cells), keep=not self._terminal)

    def finish(self, line: str) -> None:
        """Replace the line by a last one."""
        if self._stream is not None:
            self._write(f"{self._name}  {line}", keep=True)

    def _write(self, line: str, keep: bool) -> None:
        assert self._stream is not None
        start = f"\r{line:<{self._width}}" if self._terminal else line
        self._width = len(line)
        self._stream.write(start + ("\n" if keep else ""))
        self._stream.flush()
