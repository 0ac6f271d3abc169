"""How far a preparation is."""

from __future__ import annotations

from typing import TextIO

from nmoe.bar import Bar


class Progress(Bar):
    """Counts the tokens of a source, of which there were `tokens` before."""

    def __init__(self, stream: TextIO | None, name: str, tokens: int = 0):
        super().__init__(stream, name)
        self._first_tokens = tokens

    def count(self, tokens: int, documents: int, fraction: float | None) -> None:
        """Report totals of the source; `fraction` of it is done, None if unknown."""
        rate = human((tokens - self._first_tokens) / self.seconds)
        self.update(fraction, f"{human(tokens)} tokens", f"{documents:,} documents", f"{rate} tokens/s")


def human(number: float) -> str:
    """1234567 → "1.23M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
