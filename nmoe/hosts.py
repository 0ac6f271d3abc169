"""Where torchrun put the processes: rank numbers go host by host, as many on each."""

from __future__ import annotations

import os

from nmoe.errors import UserError


def ranks_of_host(group: int) -> int:
    """How many of a group's consecutive ranks are on each host that it spans; without torchrun it spans one.

    Raises UserError when that is not the same number everywhere.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", group))
    if group % local and local % group:
        raise UserError(
            f"[rdep] ranks = {group} with {local} processes a host: a group takes whole hosts or an equal part of one; "
            "change either so that one divides the other"
        )
    return min(group, local)
