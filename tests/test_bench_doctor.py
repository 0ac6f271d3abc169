"""bench: what is recorded, compared and refused. doctor: a finding for everything, an exception for nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nmoe import bench, doctor
from nmoe.bench import Ranges, Statistics, format_bench, statistics
from nmoe.config import Target
from nmoe.doctor import Gpu
from nmoe.errors import UserError


class Clock:
    """Stands in for the time module: time passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    return clock


# ---- ranges -------------------------------------------------------------------------------------------------


def test_ranges_add_up_within_a_step_and_start_anew_in_the_next(clock: Clock) -> None:
    ranges = Ranges()
    for seconds in (0.001, 0.003):
        with ranges.step():
            for _ in range(2):
                with ranges.range("gemm"):
                    clock.now += seconds
            clock.now += 0.010
    assert [{name: pytest.approx(ms) for name, ms in step.items()} for step in ranges.steps] == [
        {"gemm": 2.0, "step": 12.0},
        {"gemm": 6.0, "step": 16.0},
    ]


def test_a_range_that_a_step_lacks_counts_as_zero(clock: Clock) -> None:
    ranges = Ranges()
    for index in range(4):
        with ranges.step():
            if index == 0:
                with ranges.range("rare"):
                    clock.now += 0.008
    assert ranges.statistics()["rare"] == Statistics(pytest.approx(2.0), 0.0, pytest.approx(8.0))


def test_nested_ranges_each_count_their_own_time(clock: Clock) -> None:
    ranges = Ranges()
    with ranges.step(), ranges.range("outer"):
        clock.now += 0.001
        with ranges.range("inner"):
            clock.now += 0.002
    assert ranges.steps[0] == {
        k: pytest.approx(v) for k, v in {"inner": 2.0, "outer": 3.0, "step": 3.0}.items()
    }


def test_percentiles_are_samples() -> None:
    assert statistics([float(i) for i in range(100, 0, -1)]) == Statistics(50.5, 50.0, 95.0)
    assert statistics([3.0]) == Statistics(3.0, 3.0, 3.0)
    assert statistics([4.0, 2.0]) == Statistics(3.0, 2.0, 4.0)


def test_cuda_ranges_are_nvtx_ranges_timed_by_events_read_once_a_step(monkeypatch) -> None:
    """A stand-in for CUDA whose events carry the order in which they were recorded."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = -1

        def record(self) -> None:
            log.append("record")
            self.at = len(log)

        def elapsed_time(self, other: Event) -> float:
            assert log[-1] == "synchronize"
            return float(other.at - self.at)

    nvtx = SimpleNamespace(range_push=lambda n: log.append(f"push {n}"), range_pop=lambda: log.append("pop"))
    fake = SimpleNamespace(
        is_available=lambda: True, Event=Event, nvtx=nvtx, synchronize=lambda: log.append("synchronize")
    )
    monkeypatch.setattr(bench.torch, "cuda", fake)
    ranges = Ranges()
    with ranges.step(), ranges.range("gemm"):
        log.append("work")
    assert log == [
        "push step",
        "record",
        "push gemm",
        "record",
        "work",
        "record",
        "pop",
        "record",
        "pop",
        "synchronize",
    ]
    assert ranges.steps == [{"gemm": 2.0, "step": 6.0}]


# ---- the command --------------------------------------------------------------------------------------------


def test_bench_runs_the_trainers_step(tiny, tmp_path: Path) -> None:
    config = tiny(train={"micro_batch_size": 1}, model={"mtp_depth": 1})
    saved = tmp_path / "new folder" / "baseline.json"
    found, before = bench.bench(config, steps=2, save=saved)
    assert before is None
    assert (found.steps, found.tokens_per_step) == (2, 64)
    assert list(found.ranges) == ["zero", "weights", "forward_backward", "optimizer", "step"]
    assert {"attention", "attention_bwd", "gemm.fprop", "grouped_gemm.wgrad", "moe_plan"} <= set(found.kinds)
    assert bench.read(saved) == found
    # the ops lie inside the range that runs them
    assert sum(kind.mean for kind in found.kinds.values()) < found.ranges["forward_backward"].mean
    again, before = bench.bench(config, steps=1, baseline=saved)
    assert before == found
    assert "change of the mean" in format_bench((again, before))


def test_synthetic_batches_repeat_and_differ_by_step(tiny) -> None:
    config = tiny(model={"mtp_depth": 1})
    batches = bench.synthetic(config)
    first, again, other = batches(0), batches(0), batches(1)
    assert np.array_equal(first.tokens, again.tokens) and not np.array_equal(first.tokens, other.tokens)
    assert first.targets.shape == (2, 2, 32) and first.valid == 64
    assert np.array_equal(first.targets[0][:, :-1], first.tokens[:, 1:])
    assert np.array_equal(first.targets[1][:, :-1], first.targets[0][:, 1:])
    assert first.tokens.max() < config.model.vocab_size and first.tokens.dtype == np.int32


@pytest.fixture
def baseline(clock: Clock, tiny) -> bench.Result:
    ranges, kinds = Ranges(), Ranges()
    with ranges.step(), ranges.range("optimizer"):
        clock.now += 0.2
    with kinds.step(), kinds.range("rope"):
        clock.now += 0.1
    return bench.result(tiny(), 1000, ranges, kinds)


def test_the_delta_table(baseline: bench.Result) -> None:
    quick = Statistics(150.0, 150.0, 150.0)
    now = replace(baseline, ranges={"step": quick, "fresh": quick}, kinds=dict(baseline.kinds))
    lines = format_bench((now, replace(baseline, date="yesterday", git="abc"))).splitlines()
    assert lines[1] == "6,667 tokens/s at the median step, +33.3%"
    assert lines[2] == "against yesterday, git abc"
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:] if line}
    assert rows["step"] == ["150.00", "150.00", "150.00", "-50.00", "ms", "-25.0%"]
    assert rows["fresh"] == ["150.00", "150.00", "150.00", "new"]
    assert rows["optimizer"] == ["gone"]
    assert rows["rope"] == ["100.00", "100.00", "100.00", "+0.00", "ms", "+0.0%"]


def test_without_a_baseline_nothing_is_compared(baseline: bench.Result) -> None:
    text = format_bench((baseline, None))
    assert "change" not in text and "%" not in text and "5,000 tokens/s at the median step" in text


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("config", "quickstart", "config quickstart, this is tiny: times of another config are"),
        ("device", "NVIDIA B200", "device NVIDIA B200, this is {device}: times of another device are"),
        ("threads", 99, "number of threads 99, this is {threads}: times of another number of threads are"),
        ("fingerprint", "f" * 64, "config ffffffffffffffff, this is {fingerprint}: times of another config are"),
    ],
)  # fmt: skip
def test_a_baseline_of_something_else_is_refused(tiny, tmp_path, baseline, field, value, what) -> None:
    path = tmp_path / "b.json"
    bench.write(replace(baseline, **{field: value}), path)
    with pytest.raises(UserError) as caught:
        bench.bench(tiny(), steps=1, baseline=path)
    here = {"device": baseline.device, "threads": baseline.threads, "fingerprint": baseline.fingerprint[:16]}
    assert str(caught.value) == (
        f"the baseline {path} was measured with {what.format(**here)} not comparable; make a baseline here with --save"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"ranges": {}, "kinds": {}}', '{"ranges": 3, "kinds": {}}', "\x00"]
)
def test_a_file_that_is_no_baseline(tiny, tmp_path, text) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        bench.bench(tiny(), steps=1, baseline=path)
    assert str(caught.value) == f"{path} is no baseline of this version; make one with --save {path}"


def test_bench_refusals(tiny, tmp_path, baseline) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(UserError) as caught:
        bench.bench(tiny(), baseline=path)
    assert str(caught.value) == (
        f"cannot read the baseline {path}: No such file or directory; make one with --save {path}"
    )
    with pytest.raises(UserError, match=r"^nmoe bench: found --steps 0, expected at least 1$"):
        bench.bench(tiny(), steps=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"^cannot write the baseline .*/file/b.json: .*; choose another --save$"
    ):
        bench.write(baseline, tmp_path / "file" / "b.json")
    with pytest.raises(UserError, match=r'^\[target\] device = "sm_100a" runs on B200'):
        bench.bench(replace(tiny(schedule={"precision": "bf16"}), target=Target("sm_100a")), steps=1)


def test_a_baseline_file_is_plain_json(tmp_path, baseline) -> None:
    path = tmp_path / "b.json"
    bench.write(baseline, path)
    raw = json.loads(path.read_text())
    assert raw["ranges"]["step"] == {
        "mean": pytest.approx(200),
        "p50": pytest.approx(200),
        "p95": pytest.approx(200),
    }
    assert set(raw["versions"]) == {"nmoe", "torch", "python"} and raw["date"].endswith("+00:00")
    assert list(tmp_path.iterdir()) == [path]


# ---- doctor -------------------------------------------------------------------------------------------------


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    return named


def test_this_machine() -> None:
    found = by_name(doctor.report())
    assert found["python"].state == found["torch"].state == found["target cpu"].state == "ok"
    assert {"duckdb", "datasets", "gpu", "nvidia-cutlass-dsl", "triton", "nvshmem", "gcc", "disk", "target sm_100a",
            "target sm_90a"} <= set(found)  # fmt: skip
    for finding in found.values():
        assert finding.found and "\n" not in finding.found + finding.remedy
        assert finding.state == "ok" or finding.remedy, finding


def test_nothing_installed(monkeypatch, tmp_path) -> None:
    def gone(package: str) -> str:
        raise doctor.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.importlib.metadata, "version", gone)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e9))
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setitem(__import__("sys").modules, "nmoe.executor", None)
    found = by_name(doctor.report())
    states = {name: finding.state for name, finding in found.items()}
    assert states == {
        "python": "ok", "torch": "missing", "duckdb": "missing", "datasets": "missing", "gpu": "missing",
        "nvidia-cutlass-dsl": "missing", "triton": "missing", "nvshmem": "missing", "gcc": "missing",
        "disk": "problem", "targets": "missing",
    }  # fmt: skip
    assert found["torch"].remedy == "pip install torch==2.13.0"
    assert found["nvshmem"].remedy == found["triton"].remedy == "pip install 'nmoe[cuda]'"
    assert all(finding.remedy for name, finding in found.items() if name != "python")


def test_a_check_that_breaks_is_a_finding(monkeypatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise PermissionError("no")

    for name in ("which", "disk_usage"):
        monkeypatch.setattr(doctor.shutil, name, broken)
    monkeypatch.setattr(doctor.importlib.metadata, "version", broken)
    found = by_name(doctor.report())
    assert found["disk"] == doctor.Finding(
        "disk", "problem", "the check failed: PermissionError: no", "report it with this line"
    )
    assert found["gpu"].state == "missing"


@pytest.mark.parametrize(
    ("gpus", "compiler", "expected"),
    [
        ([], False, "can be planned; no compiler for its kernels"),
        ([], True, "compiles here, no such GPU to run it"),
        ([Gpu("NVIDIA H100", "9.0", "580")], True, "runs here"),
        ([Gpu("NVIDIA B200", "10.0", "580")], True, "compiles here, no such GPU to run it"),
    ],
)
def test_what_can_be_done_with_sm_90a(monkeypatch, gpus, compiler, expected) -> None:
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0" if compiler else None)
    assert by_name(doctor.report())["target sm_90a"].found == expected


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        ("NVIDIA H100 80GB HBM3, 9.0, 580.95\n" * 2, 0, [Gpu("NVIDIA H100 80GB HBM3", "9.0", "580.95")] * 2),
        ("NVIDIA-SMI has failed\n", 9, []),
        ("No devices were found\n", 0, []),
    ],
)
def test_reading_nvidia_smi(monkeypatch, output, code, expected) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=output, returncode=code)
    )
    assert doctor.nvidia_gpus() == expected
    shown = doctor._gpu(expected)
    assert shown.state == ("ok" if expected else "missing")
    if expected:
        assert shown.found == "2 x NVIDIA H100 80GB HBM3 (compute 9.0), driver 580.95"


def test_the_printout_has_a_remedy_under_each_problem() -> None:
    text = doctor.format_findings(
        [doctor.Finding("a", "ok", "1.0"), doctor.Finding("b", "missing", "no b", "pip install b")]
    )
    assert [line.split() for line in text.splitlines()] == [
        ["a", "ok", "1.0"], ["b", "missing", "no", "b"], ["->", "pip", "install", "b"]]  # fmt: skip
