"""How large the exchange and its sums can get: plain integers, for a plan of memory."""

from __future__ import annotations

from nmoe.errors import UserError


class CapacityError(UserError):
    """More expert rows would arrive than the buffers hold; nothing was sent or overwritten."""


def worst_case(ranks: int, tokens: int, topk: int, experts: int, align: int) -> int:
    """Slots that no routing exceeds: every rank's tokens choose as many of one rank's experts as they may, and all
    these experts end one row past a multiple of `align`."""
    local = experts // ranks
    rows = ranks * tokens * min(topk, local) + local * (align - 1)
    return rows // align * align


def depth(terms: int) -> int:
    """Partial sums that exist at once when the tree is walked term by term."""
    return (terms - 1).bit_length() + 1
