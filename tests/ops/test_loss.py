"""The head with cross-entropy: loss, gradients, and both from one pass over the logits."""

from __future__ import annotations

import pytest
import torch
from harness import compare, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from nmoe.ops import loss
from nmoe.schedule import passes

STAGES = [passes.merge_loss, passes.split_loss]  # both at once; then GEMMs and a kernel between them
DTYPES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check(targets, dim, vocab, chunk, weight, seed, dtype, stages):
    targets = torch.tensor(targets, dtype=torch.int32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([0.37], dtype=wide)

    def oracle(h, w, targets, scale):
        kept = targets >= 0
        log_probability = (h @ w.T).log_softmax(-1)[kept]
        picked = log_probability.gather(1, targets[kept].long()[:, None])
        total = -picked.sum() * scale.item()
        # The op accumulates the plain loss and differentiates `weight` times it.
        return {"loss": (total * weight + (total * (1 - weight)).detach())[None]}

    h, w = randn(seed, len(targets), dim, dtype=dtype), randn(seed + 1, vocab, dim, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_ELEMENTS", chunk * vocab)
        compare("linear_cross_entropy", [h, w, targets, scale], {"weight": weight}, oracle, params=[1],
                into={"loss": torch.tensor([2.5], dtype=wide)}, tolerance=DTYPES[dtype],
                stages=STAGES[:stages])  # fmt: skip


@given(st.lists(st.integers(-2, 6), min_size=1, max_size=20), st.integers(1, 9), st.integers(1, 20),
       st.sampled_from([1.0, 0.3]), st.integers(0, 99), st.sampled_from(list(DTYPES)), st.integers(0, 2))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_linear_cross_entropy(targets, dim, chunk, weight, seed, dtype, stages):
    check(targets, dim, 7, chunk, weight, seed, dtype, stages)


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_all_targets_ignored(stages):
    check([-1, -100, -1], 4, 5, 2, 1.0, 0, torch.float64, stages)


def test_chunks_cover_every_row():
    assert loss.chunk_rows(10, 1) == 10
    assert loss.chunk_rows(10**6, loss.CHUNK_ELEMENTS // 3) == 3
    assert loss.chunk_rows(10, loss.CHUNK_ELEMENTS * 2) == 1
