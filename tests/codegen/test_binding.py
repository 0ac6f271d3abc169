"""A model's MoE layers run through the generated kernels, bound by the executor as on a GPU, on the emulator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulated import EmulatedLauncher
from test_model import initialise
from tiny import tiny_config

from nmoe import binding
from nmoe.codegen.gemm import GemmProblem
from nmoe.config import Config, LayerGroup
from nmoe.errors import UserError
from nmoe.executor import Executor, allocate
from nmoe.graph import Spec
from nmoe.schedule import Schedule, lower, no_kernel


def config(target: str) -> Config:
    return tiny_config(target={"device": target}, model={"layers": (LayerGroup("moe"),)},
                       schedule={"precision": "bf16"})  # fmt: skip


def moe_kernels(target: str):
    """The kernels of the MoE layer; the rest of the model is left to torch."""
    every = binding.kernels(target)
    return lambda graph, ops, fused: every(graph, ops, fused) if ".moe." in ops[0].name else None


def run(executor: Executor) -> dict[str, torch.Tensor]:
    """Loss and gradients of one micro-batch, by name."""
    tensors = executor.tensors
    initialise(tensors, executor.schedule, 0)
    generator = torch.Generator().manual_seed(1)
    for name in ("tokens", "targets"):
        tensors[name].copy_(torch.randint(0, 96, (64,), generator=generator))
    tensors["positions"].copy_(torch.arange(64) % 32)
    tensors["scale"].fill_(1 / 64)
    executor.run("step")
    executor.run("micro")
    return {n: t.double().clone() for n, t in tensors.items() if n.endswith(".grad") or n.startswith("loss.")}


def by_torch(schedule: Schedule) -> dict[str, torch.Tensor]:
    arena = torch.full((schedule.arena_bytes,), 0xFF, dtype=torch.uint8)
    return run(Executor(schedule, allocate(schedule), arena))


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_a_moe_layer_of_generated_kernels(target: str) -> None:
    """Results are as far from float64 as those of the reference math in BF16, which rounds at the same places."""
    schedule = lower(config(target), kernels=moe_kernels(target))
    launcher = EmulatedLauncher()
    tensors = launcher.tensors(schedule, "param", "grad", "state", "input", "const")
    arena = launcher.memory(Spec((schedule.arena_bytes,), "u8"), 0xFF)
    found = run(Executor(schedule, tensors, arena, launcher))
    kernels = [call for call in schedule.calls if call.workspace is not None]
    assert sum(launcher.launches.values()) == len(kernels) >= 12
    gathered = [p.role for p in launcher.launches if isinstance(p, GemmProblem) and p.gathered]
    wanted = ["dgrad", "fprop", "wgrad", "wgrad"] if target == "sm_100a" else []
    assert sorted(gathered) == wanted
    reference = by_torch(lower(config(target), kernels=no_kernel))
    exact = by_torch(lower(config("cpu"), activation="f64"))
    assert found.keys() == reference.keys() == exact.keys()
    for name, want in exact.items():
        ours, theirs = ((x[name] - want).norm() / want.norm() for x in (found, reference))
        assert ours <= 1.5 * theirs + 1e-6, f"{name}: {ours:.2e} from float64, the reference {theirs:.2e}"


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gathering_changes_no_bit_of_the_reference(recompute: str) -> None:
    """The graph whose GEMMs have dispatches of their own, run op by op, against the one that dispatches once."""
    blackwell, hopper = (
        by_torch(lower(replace(c, schedule=replace(c.schedule, recompute=recompute)), kernels=no_kernel))
        for c in map(config, ("sm_100a", "sm_90a"))
    )
    assert blackwell.keys() == hopper.keys()
    assert all(torch.equal(blackwell[name], hopper[name]) for name in hopper)


@pytest.mark.usefixtures("emulator")
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_a_moe_model_in_low_precision(precision: str, target: str) -> None:
    """Copies, their scale factors in the target's layout and products: as far from float64 as the CPU's numerics."""
    wide = {"hidden_size": 128, "layers": (LayerGroup("moe"),)}
    latent = {"kv_lora_rank": 128, "qk_nope_head_dim": 32, "v_head_dim": 64}
    ours, cpu = (tiny_config(target={"device": t}, model=wide, attention=latent, moe={"intermediate_size": 128},
                             schedule={"precision": precision}) for t in (target, "cpu"))  # fmt: skip
    schedule = lower(ours, kernels=binding.kernels(target))
    launcher = EmulatedLauncher()
    tensors = launcher.tensors(schedule, "param", "grad", "state", "input", "const")
    arena = launcher.memory(Spec((schedule.arena_bytes,), "u8"), 0xFF)
    found = run(Executor(schedule, tensors, arena, launcher))
    reference = by_torch(lower(cpu))
    exact = by_torch(lower(replace(cpu, schedule=replace(cpu.schedule, precision="fp32")), activation="f64"))
    for name, want in exact.items():
        error, theirs = ((x[name] - want).norm() / want.norm() for x in (found, reference))
        assert error <= 1.5 * theirs + 1e-6, f"{name}: {error:.2e} from float64, the reference {theirs:.2e}"


class NoLauncher:
    """Binds anything and launches nothing."""

    root = None

    def bind(self, *launch: object) -> binding.Bound:
        return lambda: None


def test_kernels_are_not_bound_to_no_tokens() -> None:
    """A launch of an empty grid would be CUDA's "invalid argument" at the first step."""
    schedule = lower(config("sm_90a"), kernels=moe_kernels("sm_90a"))
    Executor(schedule, allocate(schedule), launcher=NoLauncher())
    empty = replace(schedule, dims={**schedule.dims, "T": 0})
    with pytest.raises(
        UserError, match=r"^layers\.0\.moe.*: x has the shape \(0, 64\), .* at least one token"
    ):
        Executor(empty, allocate(empty), launcher=NoLauncher())


def test_a_group_without_a_kernel_is_split_and_its_values_exist() -> None:
    """Here gemm2 has no kernel of its own and the down projection's only without what follows it."""

    def some(graph, ops, fused):
        if len(ops) == 1 and ops[0].kind == "gemm":
            return (Spec(("T", 3), "f32"),)
        return () if [op.kind for op in ops] == ["grouped_gemm", "swiglu"] else None

    whole, split = (lower(config("sm_90a"), kernels=k) for k in (lambda *_: (), some))
    assert [op for call in split.calls for op in call.ops] == split.graph.ops == whole.graph.ops
    assert whole.fused > split.fused
    for call in split.calls:
        kinds = [op.kind for op in call.ops]
        if kinds == ["gemm"]:
            (name,) = split.scratch_names[call.name]
            assert split.lifetimes[name].bytes == 64 * 3 * 4
        elif kinds != ["grouped_gemm", "swiglu"]:
            assert call.workspace is None and len(kinds) == 1
            assert not split.fused & set(call.outputs)
    assert binding.by_torch(whole) == "run by torch: nothing"
    assert binding.by_torch(split).startswith("run by torch: ")
    assert "gemm " not in binding.by_torch(split).replace("grouped_gemm ", "")


def test_a_cache_that_cannot_be_written_needs_no_lock(tmp_path: Path) -> None:
    """One that was shipped may be read-only."""
    (tmp_path / "file").write_text("")
    with binding._alone(tmp_path / "file" / "kernels"):
        pass
    with binding._alone(tmp_path / "kernels"):
        assert (tmp_path / "kernels" / "building").exists()
