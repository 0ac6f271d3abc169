"""Who updates what: shares that together are the model, however many ranks, and a norm that does not see them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from nmoe import model, norm
from nmoe.optim import AdamW
from nmoe.parameters import Parameters
from nmoe.plan import memory_plan
from nmoe.schedule import lower
from nmoe.shards import ALIGNMENT, layout

BLOCK = norm.BLOCK
worlds = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4), (6, 2), (8, 4), (64, 4)])


def graph(group: int = 1, precision: str = "bf16"):
    return model.build(
        tiny_config(schedule={"precision": precision}, rdep={"ranks": group}, model={"mtp_depth": 1})
    )


@given(worlds)
@settings(max_examples=10, deadline=None)
def test_shares_are_equal_aligned_and_all_of_a_segment(size):
    world, group = size
    whole = graph(group)
    alike = [layout(whole, rank, world, group) for rank in range(world)]
    for number, first in enumerate(alike[0][0]):
        same = [segments[number] for segments, _ in alike]
        assert {(s.start, s.end) for s in same} == {(first.start, first.end)}, "memory is alike on all ranks"
        assert first.start % ALIGNMENT == first.share % ALIGNMENT == 0
        assert first.owners == (world // group if first.group == "expert" else world)
        for share in range(group if first.group == "expert" else 1):
            owners = [s for rank, s in enumerate(same) if first.group != "expert" or rank % group == share]
            cuts = [s.own for s in owners]
            assert [cut.start for cut in cuts] == [i * first.share for i in range(len(cuts))]
            assert cuts[-1].stop == first.end - first.start
    segments, places = alike[0]
    for name, place in places.items():
        segment = segments[place.segment]
        assert segment.start <= place.start and place.start % ALIGNMENT == 0
        assert place.start + math.prod(place.shape) <= segment.end, name
    used = sum(-(-math.prod(p.shape) // ALIGNMENT) * ALIGNMENT for p in places.values())
    assert segments[-1].end - used < sum(s.owners for s in segments) * ALIGNMENT, (
        "no more padding than shares need"
    )


@pytest.mark.parametrize(("world", "group"), [(1, 1), (2, 1), (3, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ranks_parts_are_the_masters_of_one(world, group, precision):
    """Whatever a rank initialises or is given; and the weights of all are those masters, rounded."""
    alone = Parameters(graph(precision=precision))
    alone.initialise(5, 0.1)
    wanted = alone.parts([shard.master for shard in alone.shards])
    assert all(part.start == 0 and len(part.tensor) == part.size for part in wanted.values())
    found = {name: torch.full_like(part.tensor, torch.nan) for name, part in wanted.items()}
    written = {name: torch.zeros(part.size) for name, part in wanted.items()}
    for rank in range(world):
        own = Parameters(graph(group, precision), rank=rank, world=world, group=group)
        own.initialise(5, 0.1)
        for name, part in own.parts([shard.master for shard in own.shards]).items():
            at = slice(part.start, part.start + len(part.tensor))
            found[name][at] = part.tensor
            written[name][at] += 1
        for name, weights in own.weights.items():
            every = alone.weights[name]
            first = rank % group * len(weights) if model.group_of(name) == "expert" else 0
            assert torch.equal(weights, every[first : first + len(weights)]), name
        given = {name: weights.float() + 1 for name, weights in own.weights.items()}
        for name, values in given.items():
            own.assign(name, values)
        before = [shard.weights.clone() for shard in own.shards]
        own.refresh()
        assert all(torch.equal(a, s.weights) for a, s in zip(before, own.shards, strict=True))
        assert all(
            torch.equal(own.weights[n], values.to(own.weights[n].dtype)) for n, values in given.items()
        )
    for name, part in wanted.items():
        assert torch.equal(found[name], part.tensor), name
        assert bool((written[name] == 1).all()), f"{name}: every element has one owner"


@pytest.mark.parametrize(("world", "group"), [(1, 1), (2, 2), (4, 2), (8, 1)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_masters_and_moments_take_what_the_plan_says(world, group, precision, moments):
    config = tiny_config(
        schedule={"precision": precision}, optim={"state_precision": moments}, rdep={"ranks": group},
        train={"batch_size": 8},
    )  # fmt: skip
    schedule = lower(config)
    planned = memory_plan(config, world, schedule, world)
    for rank in range(world):
        parameters = Parameters(schedule.graph, rank=rank, world=world, group=group)
        optimizer = AdamW(parameters, config.optim)
        masters = sum(s.master.untyped_storage().nbytes() for s in parameters.shards if s.segment.narrow)
        assert masters == planned["FP32 masters"]
        assert optimizer.m.nbytes + optimizer.v.nbytes == planned["moments"]
    assert (planned["FP32 masters"] == 0) == (precision == "fp32")
    one = memory_plan(config, group, schedule, world)
    padding = 4 * world * ALIGNMENT * 8  # four segments
    assert planned["moments"] <= one["moments"] * group / world + padding


# ---- the norm -----------------------------------------------------------------------------------------------


def values(blocks: int, seed: int) -> torch.Tensor:
    """Of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(-40, 40, (blocks, 1), generator=generator)
    return (torch.randn(blocks, BLOCK, generator=generator) * 2.0**scale).view(-1)


@given(st.integers(1, 60), st.integers(0, 999), st.integers(1, 8), st.randoms())
@settings(max_examples=40, deadline=None)
def test_no_cut_of_the_gradient_changes_its_norm(blocks, seed, ranks, chooser):
    whole = values(blocks, seed)
    cuts = sorted(chooser.randrange(blocks + 1) * BLOCK for _ in range(3 * ranks - 1))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    chooser.shuffle(parts)
    found = norm.norm(torch.stack([norm.squares(parts[rank::ranks]) for rank in range(ranks)]))
    assert found == norm.norm(norm.squares([whole])[None])
    # A block's sum of squares: FP32 products, 127 sums in any order, a root, its square.
    exact = math.sqrt(float(whole.double().square().sum()))
    assert found == pytest.approx(exact, rel=(BLOCK + 4) * 2.0**-24)


def test_sums_of_blocks_are_exact():
    """Where each block's sum is a power of two, large and small ones in between: as if added without rounding."""
    powers = torch.tensor([2.0**e for e in (30, -30, 0, -60, 30, 1, -70, -1)])
    whole = torch.zeros(8, BLOCK)
    whole[:, 3] = powers
    total = sum(Fraction(p) ** 2 for p in powers.tolist())
    bins = norm.squares([whole.view(-1)])
    counted = sum(Fraction(int(c)) * Fraction(2) ** (i - 148 - 24) for i, c in enumerate(bins.tolist()))
    assert counted == total
    assert norm.norm(bins[None]) == math.sqrt(total)


def test_a_gradient_that_is_not_finite_has_no_norm():
    for bad in (math.nan, math.inf, -math.inf):
        whole = values(3, 0)
        whole[BLOCK + 1] = bad
        assert math.isnan(norm.norm(norm.squares([whole])[None]))
    assert norm.norm(norm.squares([torch.zeros(2 * BLOCK)])[None]) == 0.0
