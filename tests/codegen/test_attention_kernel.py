"""Attention's Triton templates in Triton's interpreter, and compiled for both targets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.codegen import compiler, verify
from nmoe.codegen.attention import AttentionConfig, AttentionProblem, Blocks
from nmoe.codegen.cache import Cache
from nmoe.codegen.verify import attention as oracle
from nmoe.codegen.verify.base import Mismatch

pytest.importorskip("triton")
SMALL = AttentionConfig(Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2))


def shares(problem: AttentionProblem, config: AttentionConfig, case: dict) -> dict[str, float]:
    return oracle.check(problem, case, verify.interpret(problem, config, "sm_90a", case))


DIMS, BLOCKS = [(16, 32, 16), (32, 16, 64)], [(32, 16), (16, 32)]


@given(st.sampled_from(["forward", "backward"]), st.integers(1, 100), st.integers(1, 2), st.integers(1, 3),
       st.sampled_from(DIMS), st.sampled_from(BLOCKS), st.integers(0, 99))  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_documents_windows_and_lengths_that_fill_no_block(
    kind, seq_len, sequences, heads, dims, blocks, seed
) -> None:
    config = AttentionConfig(Blocks(*blocks, 4, 2), Blocks(*blocks[::-1], 4, 2))
    problem = AttentionProblem(kind, heads, *dims)
    found = shares(problem, config, oracle.case(problem, config, seed, seq_len, sequences))
    assert set(found) == ({"o", "lse"} if kind == "forward" else {"dq", "dkv", "dk_rope"})


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_window_that_is_off_by_one_is_noticed(kind: str) -> None:
    problem = AttentionProblem(kind, 1, 16, 16, 16)
    case = oracle.case(problem, SMALL, 1, 80, 1)
    shares(problem, SMALL, case)
    case["positions"] = torch.arange(80, dtype=torch.int32)
    if kind == "backward":
        case["lse"].fill_(1.0)
    after = verify.interpret(problem, SMALL, "sm_90a", case | {"window": case["window"] + 1})
    with pytest.raises(Mismatch):
        oracle.check(problem, case, after)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_compiled_without_spills_on_tensor_cores(kind: str, target: str, tmp_path) -> None:
    """The shape of all shipped models: nope 128, rope 64, value 128."""
    problem = AttentionProblem(kind, 16, 128, 64, 128)
    entry = compiler.compile_problem(problem, problem.configs(target)[0], target, Cache(tmp_path))
    functions = [launch.function for launch in problem.launches(problem.configs(target)[0])]
    assert list(entry.report["functions"]) == functions
    for name in functions:
        assert (entry.folder / f"{name}.cubin").exists() and (entry.folder / f"{name}.ptx").exists()
    assert all(used["stack"] == used["local"] == 0 for used in entry.report["kernels"].values())
    product = {"sm_90a": "HGMMA", "sm_100a": "UTCHMMA"}[target]
    assert any(opcode.startswith(product) for opcode in entry.report["sass"]["mma"])
