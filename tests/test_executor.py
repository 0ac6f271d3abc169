"""The executor takes exactly the memory that was planned, and none while it runs."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from test_model import initialise
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from nmoe.errors import UserError
from nmoe.executor import Executor, allocate, executor_bytes
from nmoe.schedule import lower
from nmoe.step import Step

PRECISIONS = ("fp32", "bf16", "mxfp8", "nvfp4")
EVERYTHING = {
    "model": {"mtp_depth": 1}, "attention": {"q_lora_rank": 32},
    "moe": {"balance_loss": 0.1, "z_loss": 0.1, "experts": 8, "groups": 4, "topk_groups": 2},
}  # fmt: skip


class Allocations(TorchDispatchMode):
    """Notes every aten call that returns memory other than `owned`, by the graph op that made it."""

    def __init__(self, executor: Executor) -> None:
        super().__init__()
        self.owned = {x.untyped_storage().data_ptr() for x in (executor.arena, *executor.tensors.values())}
        self.found: dict[str, set[str]] = defaultdict(set)  # op kind → aten calls
        self.kinds = {op.name: op.kind for op in executor.schedule.graph.ops}
        self.made: list[weakref.ref] = []
        self.running = ""
        executor.observe = self.observe

    @contextmanager
    def observe(self, name: str):
        self.running = self.kinds[name]
        yield

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor) and x.numel() and x.untyped_storage().data_ptr() not in self.owned:
                self.found[self.running].add(str(function))
                self.made.append(weakref.ref(x))
        return out


def prepared(**sections) -> Executor:
    schedule = lower(tiny_config(**(EVERYTHING | sections)))
    tensors = allocate(schedule)
    initialise(tensors, schedule, 0)
    tensors["scale"].fill_(0.1)
    return Executor(schedule, tensors)


def allocations(executor: Executor) -> Allocations:
    """Of the second step and micro-batch."""
    for phase in ("step", "micro"):
        executor.run(phase)
    with Allocations(executor) as seen:
        executor.run("step")
        executor.run("micro")
    return seen


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_a_step_allocates_nothing(score, precision, recompute):
    moe = {**EVERYTHING["moe"], "score": score}
    executor = prepared(moe=moe, schedule={"precision": precision, "recompute": recompute})
    assert allocations(executor).found == {}


@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_only_the_emulated_formats_allocate_and_keep_nothing(precision):
    """nmoe/formats works in temporaries of its own when it quantizes for, and dequantizes in, the CPU's GEMMs."""
    seen = allocations(prepared(schedule={"precision": precision}))
    assert set(seen.found) == {"quantize", "gemm", "grouped_gemm"}
    gc.collect()
    assert [ref for ref in seen.made if ref() is not None] == []


def test_allocations_are_noticed():
    executor = prepared()
    name, call = executor._phases["micro"][5]
    kept = []
    executor._phases["micro"][5] = (name, lambda: (call(), kept.append(executor.tensors["embed"] + 1)))
    seen = allocations(executor)
    assert seen.found == {seen.kinds[name]: {"aten.add.Tensor"}}
    assert len([ref for ref in seen.made if ref() is not None]) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_planned_bytes_are_what_is_allocated(precision, recompute):
    executor = prepared(schedule={"precision": precision, "recompute": recompute})
    schedule = executor.schedule
    assert executor_bytes(executor) == schedule.arena_bytes + sum(schedule.persistent_bytes().values())
    assert executor.arena.untyped_storage().nbytes() == schedule.arena_bytes


@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_parts_of_quantized_values_are_where_kernels_can_load_them(precision):
    """On 16 bytes, apart from each other, and all that was planned for the value."""
    executor = prepared(schedule={"precision": precision})
    schedule, base = executor.schedule, executor.arena.data_ptr()
    for op in schedule.graph.ops:
        if op.kind == "quantize":
            (name,), q = op.outputs, executor.operand(op.outputs[0])
            held = [t for t in (q.data, q.scale, q.amax) if t is not None]
            spans = sorted((t.data_ptr() - base, t.data_ptr() - base + t.nbytes) for t in held)
            assert len(spans) == {"mxfp8": 2, "nvfp4": 3}[precision]
            assert all(start % 16 == 0 for start, _ in spans), name
            assert all(end <= start < end + 16 for (_, end), (start, _) in pairwise(spans)), name
            assert spans[-1][1] - spans[0][0] == schedule.lifetimes[name].bytes, name


def test_an_arena_is_shared_by_schedules():
    """The last tokens of a run train in another precision, from another schedule, on the same memory."""
    low, high = (lower(tiny_config(schedule={"precision": p})) for p in ("mxfp8", "bf16"))
    arena = torch.empty(max(low.arena_bytes, high.arena_bytes), dtype=torch.uint8)
    tensors = allocate(low) | allocate(high)
    losses = []
    for schedule in (low, high, low, high):
        initialise(tensors, schedule, 0)
        tensors["scale"].fill_(1 / 64)
        tensors["loss.main"].zero_()
        executor = Executor(schedule, tensors, arena)
        executor.run("step")
        executor.run("micro")
        losses.append(tensors["loss.main"].item())
    assert losses[0] == losses[2] != losses[1] == losses[3]
    with pytest.raises(ValueError, match=rf"the arena has 8 bytes, the schedule needs {low.arena_bytes}"):
        Executor(low, tensors, arena[:8])


@pytest.mark.parametrize("wrong, found", [(None, "None"), (torch.zeros(96, 64, dtype=torch.float64), "float64"),
                                          (torch.zeros(95, 64), r"\(95, 64\)")])  # fmt: skip
def test_a_tensor_that_does_not_fit(wrong, found):
    schedule = lower(tiny_config())
    tensors = allocate(schedule)
    del tensors["embed"]
    with pytest.raises(ValueError, match=rf"embed is .*{found}.*, the schedule needs f32 \(96, 64\)"):
        Executor(schedule, tensors if wrong is None else {**tensors, "embed": wrong})


def test_another_device():
    config = tiny_config(target={"device": "sm_100a"}, schedule={"precision": "bf16"})
    with pytest.raises(UserError, match=r'\[target\] device = "sm_100a" runs on B200, .* set \[target\]'):
        Step(config)


def test_capacity_error_names_the_layer():
    schedule = lower(tiny_config(rdep={"capacity": 127}))
    executor = Executor(schedule, allocate(schedule))  # 64 tokens, topk 2
    with pytest.raises(
        UserError, match=r"^layers\.1\.moe\.plan: 128 expert rows arrived, the capacity is 127: raise"
    ):
        executor.run("micro")


def test_logits():
    config = tiny_config()
    schedule = lower(config, mode="logits", sequences=1, debug=True)
    tensors = allocate(schedule)
    initialise(tensors, schedule, 0)
    executor = Executor(schedule, tensors)
    executor.run("step")
    executor.run("micro")
    first = executor.operand("logits").clone()
    assert first.shape == (32, 96) and bool(first.isfinite().all())
    tensors["tokens"][-1] = 5
    executor.run("micro")
    changed = (executor.operand("logits") != first).any(1)
    assert changed[-1] and not changed[:-1].any()  # causal
