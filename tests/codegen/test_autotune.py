"""What a device measured is kept, chosen from, and printed; what nobody measured is untuned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmoe import autotune
from nmoe.autotune import cost, measure, records
from nmoe.codegen import compiler
from nmoe.codegen.cache import Cache
from nmoe.codegen.gemm import GemmProblem
from nmoe.errors import UserError

PROBLEM = GemmProblem("fprop", 8, 512, 512, "store")
TARGET = "sm_90a"


def record(order: int = -1) -> autotune.Record:
    """Measured on a device that likes the model's last candidate best, or its first."""
    configs = measure.candidates(PROBLEM, TARGET)[::order]
    timings = tuple(
        records.Timing(c.json(), str(c), {"uniform": 100.0 + i, "zipf": 120.0 + i}, 50.0 - i * order)
        for i, c in enumerate(configs)
    )
    return autotune.Record("NVIDIA H100 80GB HBM3", "2026-11-22", 16384, timings)


def test_the_measured_best_is_chosen(tmp_path: Path) -> None:
    assert autotune.choose(PROBLEM, TARGET, tmp_path) == (cost.choose(PROBLEM, TARGET), None)
    kept = record()
    records.save(tmp_path, PROBLEM, TARGET, kept)
    config, found = autotune.choose(PROBLEM, TARGET, tmp_path)
    assert found == kept and config == measure.candidates(PROBLEM, TARGET)[-1] != cost.choose(PROBLEM, TARGET)
    other = replace(PROBLEM, k=520)
    assert autotune.choose(other, TARGET, tmp_path)[1] is None, "another problem"
    assert autotune.choose(PROBLEM, "sm_100a", tmp_path)[1] is None, "another target"


def test_a_choice_does_not_outlive_the_code_that_was_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.save(tmp_path, PROBLEM, TARGET, record())
    monkeypatch.setattr(compiler, "sources", lambda template: "edited")
    assert autotune.choose(PROBLEM, TARGET, tmp_path)[1] is None


def test_a_record_of_a_config_that_is_no_candidate_is_not_followed(tmp_path: Path) -> None:
    kept = record()
    gone = replace(kept.timings[0], config={**kept.timings[0].config, "stages": 99})
    records.save(tmp_path, PROBLEM, TARGET, replace(kept, timings=(gone, *kept.timings[1:])))
    assert autotune.choose(PROBLEM, TARGET, tmp_path) == (cost.choose(PROBLEM, TARGET), None)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '"x"', '{"timings": [{}]}', '{"timings": [], "device": "x"}']
)
def test_a_damaged_record_is_as_none(tmp_path: Path, content: str) -> None:
    place = records.path(tmp_path, PROBLEM, TARGET)
    place.parent.mkdir(parents=True)
    place.write_text(content)
    assert autotune.choose(PROBLEM, TARGET, tmp_path) == (cost.choose(PROBLEM, TARGET), None)


def test_the_evidence_says_how_far_the_model_was_off() -> None:
    configs = measure.candidates(PROBLEM, TARGET)
    lines = str(record()).splitlines()
    assert lines[0].startswith(
        f"on NVIDIA H100 80GB HBM3, 2026-11-22, 16384 rows: {configs[-1]}; the cost model's choice takes "
    )
    assert len(lines) == 1 + len(configs)
    assert lines[1].endswith(f"{configs[-1]}: uniform 100, zipf 120 µs, +0.0 %, predicted 50 µs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tuning_without_the_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"^--tune times kernels .* runs on H100 SXM, and torch finds no CUDA .*; or leave out --tune$",
    ):
        measure.tune(PROBLEM, TARGET, Cache(tmp_path))


@given(st.integers(1, 64), st.integers(1, 5000), st.sampled_from(measure.ROUTINGS), st.integers(0, 99))
def test_routings_hand_out_every_row(experts: int, rows: int, routing: str, seed: int) -> None:
    found = measure.counts(experts, rows, routing, seed)
    assert len(found) == experts and sum(found) == rows and min(found) >= 0


def test_zipf_favours_the_first_experts() -> None:
    found = measure.counts(64, 100_000, "zipf", 1)
    assert found[0] > 1.8 * found[1] > 3 * found[3]
    assert max(measure.counts(64, 100_000, "uniform", 1)) < 2000


@given(st.integers(1, 5), st.data())
def test_medians_leave_the_warm_up_out(kernels: int, data: st.DataObject) -> None:
    """Kernel i takes 10·i + noise below 5, far more while the chip warms up."""
    rounds = measure.WARM_UP + measure.REPEATS
    noise = data.draw(st.lists(st.floats(0, 5), min_size=rounds * kernels, max_size=rounds * kernels))
    taken = [
        10 * (i % kernels) + x + (1e6 if i < measure.WARM_UP * kernels else 0) for i, x in enumerate(noise)
    ]
    assert all(10 * i <= m <= 10 * i + 5 for i, m in enumerate(measure.medians(taken, kernels)))
