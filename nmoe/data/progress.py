"""One line that says how far a preparation is."""

from __future__ import annotations

import time
from typing import TextIO

TERMINAL_INTERVAL, LOG_INTERVAL = 0.2, 10.0  # seconds between lines
BAR = 20  # characters


class Progress:
    """Redraws its line on a terminal, adds one every ten seconds to a log, is silent with `stream = None`."""

    def __init__(self, stream: TextIO | None, name: str, tokens: int = 0):
        self._stream, self._name = stream, name
        self._terminal = stream is not None and stream.isatty()
        self._interval = TERMINAL_INTERVAL if self._terminal else LOG_INTERVAL
        self._first_tokens = tokens
        self._first_fraction: float | None = None
        self._started = self._drawn = time.monotonic()
        self._width = 0

    def update(self, tokens: int, documents: int, fraction: float | None) -> None:
        """Report totals of the source; `fraction` of it is done, None if unknown."""
        now = time.monotonic()
        if self._stream is None or now - self._drawn < self._interval:
            return
        self._drawn = now
        seconds = max(now - self._started, 1e-9)
        parts = [self._name, f"{human(tokens)} tokens", f"{documents:,} documents"]
        parts.append(f"{human((tokens - self._first_tokens) / seconds)} tokens/s")
        if fraction is not None:
            if self._first_fraction is None:
                self._first_fraction = fraction
            parts.insert(1, f"[{'#' * int(BAR * fraction):.<{BAR}}] {fraction:4.0%}")
            if (gained := fraction - self._first_fraction) > 0:
                left = int(seconds * (1 - fraction) / gained)
                parts.append(f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
        self._write("  ".join(parts), keep=not self._terminal)

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


def human(number: float) -> str:
    """1234567 → "1.23M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
