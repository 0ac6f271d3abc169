"""Every interleaving of the protocol is safe, ends, and fails well; nothing in it can be left out."""

from __future__ import annotations

import pytest
from checker import Checker, Violation, check, mutants, program

from nmoe.rdep.protocol import BACKWARD, FORWARD, GPU_PROTOCOL, PROTOCOL, RECOMPUTE, SUM

STEP = FORWARD + BACKWARD + SUM
RECOMPUTED = FORWARD + RECOMPUTE + BACKWARD + SUM * 2


@pytest.mark.parametrize(
    ("ranks", "sequence"),
    [
        (2, STEP * 4),
        (2, RECOMPUTED * 4),
        (2, FORWARD * 3 + BACKWARD * 3),
        (3, STEP * 2),
        (3, RECOMPUTED),
        (4, FORWARD),
    ],
    ids=["steps", "recomputed", "layers", "three ranks", "three ranks recomputed", "four ranks"],
)
def test_safe(ranks, sequence):
    assert check(PROTOCOL, sequence, ranks) > 100


GPU_LAYER = ("counts", "rows", "returns", *RECOMPUTE, *BACKWARD)  # the plan on GPUs needs no rows of its own


@pytest.mark.parametrize(("ranks", "sequence"), [(2, GPU_LAYER * 4), (3, GPU_LAYER), (2, ("rows",) * 6)])
def test_safe_on_gpus(ranks, sequence):
    assert check(GPU_PROTOCOL, sequence, ranks) > 100


@pytest.mark.parametrize("name", [n for n in mutants(GPU_PROTOCOL) if "rows" in n])
def test_nothing_can_be_left_out_on_gpus(name):
    with pytest.raises(Violation):
        check(mutants(GPU_PROTOCOL)[name], GPU_LAYER * 2, 2)


@pytest.mark.parametrize("mutant", mutants(PROTOCOL).values(), ids=mutants(PROTOCOL).keys())
def test_nothing_can_be_left_out(mutant):
    with pytest.raises(Violation):
        check(mutant, RECOMPUTED * 2, 2)


def test_free_flags_on_every_channel_would_be_waste():
    """Why counts and returns have none: the rows' flags alone are enough, in any order that layers produce."""
    for sequence in (STEP * 2, RECOMPUTED * 2, FORWARD * 2 + BACKWARD * 2):
        check(PROTOCOL, sequence, 2)
    with pytest.raises(Violation, match=r"puts counts 2 over rows that rank . still reads"):
        check(PROTOCOL, ("counts", "counts"), 2)
    with pytest.raises(Violation, match=r"puts returns 2 over rows that rank . still reads"):
        check(PROTOCOL, ("returns", "returns"), 2)


@pytest.mark.parametrize("epoch", [1, 2])
def test_overflow_stops_all_ranks_before_any_row_travels(epoch):
    check(PROTOCOL, STEP * 2, 2, overflow=epoch)
    check(PROTOCOL, FORWARD * 2, 3, overflow=epoch)
    acts = program(PROTOCOL, STEP * 2, 0, 2, epoch)
    assert sum(act.kind == "put" and act.channel == "rows" for act in acts) == 3 * (epoch - 1)


def test_ranks_that_decide_for_themselves_about_overflow_hang():
    """The checker sees it when one rank stops and the others go on."""
    programs = [program(PROTOCOL, STEP, 0, 2, overflow=1), program(PROTOCOL, STEP, 1, 2)]
    with pytest.raises(Violation, match="waits for ever"):
        Checker(programs).run()


@pytest.mark.parametrize(("ranks", "sequence"), [(2, RECOMPUTED * 2), (3, FORWARD)])
def test_a_crash_at_any_act_leaves_the_others_waiting_for_the_dead(ranks, sequence):
    """No survivor reads what has not arrived, and whom it waits for, in the end, is the rank that died."""
    for acts in range(len(program(PROTOCOL, sequence, 0, ranks))):
        check(PROTOCOL, sequence, ranks, dead={0: acts})


def test_rows_after_rows_need_the_free_flag():
    """With a return after every transfer of rows the flag would be waste."""
    bare = {**PROTOCOL, "rows": tuple(a for a in PROTOCOL["rows"] if a.flag != "free")}
    check(bare, ("counts", "rows", "returns", "rows", "returns") * 2, 2)
    with pytest.raises(Violation, match="puts rows 2 over rows"):
        check(bare, FORWARD, 2)
