"""Specs become GEMM problems, configs are legal or say why not, keys name what matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmoe import autotune
from nmoe.binding import lowered
from nmoe.codegen import compiler, families
from nmoe.codegen.gemm import Blocks, GemmConfig, GemmProblem, refusal
from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import ROWS, IllegalConfig
from nmoe.codegen.report import count
from nmoe.codegen.spec import specs
from nmoe.config import Config, Target, load
from nmoe.schedule import lower

CONFIGS = Path(__file__).parents[2] / "configs"


def with_precision(name: str, precision: str, target: str) -> Config:
    config = load(CONFIGS / f"{name}.toml")
    return replace(config, target=Target(target), schedule=replace(config.schedule, precision=precision))


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_the_gemms_of_moonlet_in_bf16_have_templates(target: str) -> None:
    found = {spec: families.match(spec) for spec in specs(lower(with_precision("moonlet", "bf16", target)))}
    grouped = {p for s, p in found.items() if s.anchor.kind == "grouped_gemm"}
    of_a, of_b = ({"gathered": x, "topk": 6} if target == "sm_100a" else {} for x in "ab")
    assert grouped == {
        GemmProblem("fprop", 64, 2816, 2048, "swiglu", **of_a),
        GemmProblem("fprop", 64, 2048, 1408, "store"),
        GemmProblem("dgrad", 64, 2048, 1408, "dswiglu", **of_a),
        GemmProblem("dgrad", 64, 2816, 2048, "store"),
        GemmProblem("wgrad", 64, 2048, 1408, "accumulate", **of_a),
        GemmProblem("wgrad", 64, 2816, 2048, "accumulate", **of_b),
    }
    dense = [p for s, p in found.items() if s.anchor.kind == "gemm"]
    assert not [p for p in dense if isinstance(p, str)]
    assert GemmProblem("fprop", 0, 5632, 2048, "swiglu") in dense, "the shared experts"
    assert GemmProblem("fprop", 0, 2048, 2816, "store", addends=2) in dense, (
        "their residual and the routed experts"
    )


SHIPPED = ("moonlet", "moonlight", "dsv2", "dsv3")


@pytest.mark.parametrize("precision", ["bf16", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_gemm_of_the_shipped_models_has_a_template(name: str, precision: str, target: str) -> None:
    for spec in specs(lowered(with_precision(name, precision, target))):
        if spec.anchor.kind in ("gemm", "grouped_gemm"):
            problem = families.match(spec)
            assert isinstance(problem, GemmProblem), (str(spec.parts), problem)
            assert problem.configs(target) and problem.small().configs(target)


def test_only_rows_that_nobody_else_reads_are_gathered() -> None:
    config = with_precision("moonlet", "bf16", "sm_100a")
    gathering = [spec for spec in specs(lower(config)) if spec.gathers]
    assert len(gathering) == 4
    for spec in gathering:
        rows = spec.parts[0].outputs[0]
        stored = tuple(replace(v, stored=v.stored or i == rows) for i, v in enumerate(spec.values))
        for other in (replace(spec, values=stored), replace(spec, target="sm_90a")):
            assert "dispatched by a kernel of their own" in str(families.match(other))


def test_copies_are_made_in_a_tile_only_where_that_can_be() -> None:
    """MXFP8's on Blackwell. NVFP4's need an amax first, Hopper's are made by kernels of their own."""
    for target, precision, fused in (
        ("sm_100a", "mxfp8", True),
        ("sm_100a", "nvfp4", False),
        ("sm_90a", "mxfp8", False),
    ):
        found = [families.match(s) for s in specs(lowered(with_precision("moonlet", precision, target)))]
        copies = {
            p.copies for p in found if isinstance(p, GemmProblem) and p.epilogue in ("swiglu", "dswiglu")
        }
        assert copies == ({("row",), ("col", "row")} if fused else {()})


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (GemmProblem("fprop", 0, 384, 256, "swiglu", "mxfp8", "blocked"), "192 pairs: gate and up need whole atoms"),
        (GemmProblem("dgrad", 0, 256, 264, "store", "mxfp8", "rows"), "sizes 256 x 264 in mxfp8: TMA needs rows"),
        (GemmProblem("fprop", 0, 256, 48, "store", "nvfp4", "blocked"), "sizes 256 x 48 in nvfp4: TMA needs rows"),
        (GemmProblem("fprop", 1025, 256, 64, "store"), "1025 experts on a rank: at most 1024"),
        (GemmProblem("dgrad", 0, 256, 96, "dswiglu", "mxfp8", "blocked", 0, ("row",)), "96 columns: copies are stored"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_build_is_said(problem: GemmProblem, message: str) -> None:
    assert refusal(problem).startswith(message)


ROLES = {"fprop": ("store", "swiglu"), "dgrad": ("store", "dswiglu"), "wgrad": ("accumulate",)}
problems = st.builds(
    lambda role, i, e, n, k: GemmProblem(role, e, 16 * n, 8 * k, ROLES[role][i % len(ROLES[role])]),
    st.sampled_from(sorted(ROLES)), st.integers(0, 1), st.integers(0, 256), st.integers(1, 512), st.integers(1, 1024),
)  # fmt: skip
targets = st.sampled_from(sorted(HARDWARE))


@given(problems, targets)
def test_candidates_are_legal_and_use_the_shared_memory(problem: GemmProblem, target: str) -> None:
    found = problem.configs(target)
    assert found and autotune.choose(problem, target)[0] in found
    for config in found:
        assert problem.violations(config, target) == []
        more = replace(config, stages=config.stages + 1)
        assert config.stages == 8 or "bytes of shared memory" in " ".join(problem.violations(more, target))
        assert 0 < autotune.predict(problem, config, target)["roofline"] <= 1


@given(problems, targets)
def test_operands_cover_what_the_views_index(problem: GemmProblem, target: str) -> None:
    """The largest offset of every view is the last element of its operand."""
    rows = 640
    for operand in problem.operands(GemmConfig(256, 2, 1)):
        if operand.name not in ("a", "b", "h", *problem.stored):
            continue
        size = 1
        for extent in operand.shape:
            size *= rows if extent == ROWS else extent
        modes = problem.modes(operand.name)
        last = sum(((rows if extent == ROWS else extent) - 1) * stride for extent, stride in modes)
        assert last == size - 1


@pytest.mark.parametrize(
    ("config", "problem", "target", "message"),
    [
        (GemmConfig(192, 4, 2), "store", "sm_90a", "tile_n 192: a half of B is a box of whole 64-element"),
        (GemmConfig(256, 4, 3), "store", "sm_90a", "cluster 3: 1, or 2 that load half"),
        (GemmConfig(256, 5, 1), "store", "sm_90a", "279552 bytes of shared memory: H100 SXM gives"),
        (GemmConfig(256, 7, 2), "store", "sm_100a", "263168 bytes of shared memory: B200 gives"),
        (GemmConfig(128, 4, 2), "swiglu", "sm_90a", "2 buffers for 3 epilogue pieces: at least 2, each"),
        (GemmConfig(256, 1, 2), "store", "sm_100a", "stages 1: loads overlap the products"),
        (GemmConfig(256, 4, 2, transposed=True), "store", "sm_90a", "transposed fprop: only a wgrad's result"),
    ],
)  # fmt: skip
def test_an_illegal_config_names_the_limit(
    config: GemmConfig, problem: str, target: str, message: str
) -> None:
    case = GemmProblem("fprop", 8, 512, 512, problem)  # type: ignore[arg-type]
    with pytest.raises(IllegalConfig) as error:
        case.require_legal(config, target)
    assert message in str(error.value)
    assert str(error.value).startswith(f"bf16 fprop 512x512 for {target}, 128x{config.tile_n} x")


def test_a_wgrad_is_computed_the_way_of_fewer_tiles() -> None:
    """1408 columns are 5.5 tiles of 256 and 11 of 128; on Hopper no thread block of a cluster is left without rows."""
    down, square = (
        GemmProblem("wgrad", 64, 2048, 1408, "accumulate"),
        GemmProblem("wgrad", 8, 2048, 2048, "accumulate"),
    )
    wide = GemmConfig(256, 4, 2)
    turned = replace(wide, transposed=True)
    assert (down.tiles(wide, "sm_90a"), down.tiles(turned, "sm_90a")) == (48, 44)
    assert (down.tiles(wide, "sm_100a"), down.tiles(turned, "sm_100a")) == (48, 48)
    assert {c.transposed for c in down.configs("sm_90a") if c.tile_n == 256} == {True}
    assert not any(c.transposed for c in square.configs("sm_90a"))
    assert not any(c.transposed for c in down.configs("sm_100a") if c.cluster == 2)


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 2), st.booleans())
def test_blocks_hold_every_tile_and_fewer_too_many_where_they_part(
    rows: int, columns: int, cluster: int, parts: bool
) -> None:
    spare = Blocks(columns, cluster, parts).count(rows) * cluster - rows * columns
    assert 0 <= spare <= (1 if parts else (cluster - 1) * columns)


def test_hoppers_loads_do_not_gather() -> None:
    case = GemmProblem("fprop", 8, 512, 512, "store", gathered="a", topk=6)
    case.require_legal(GemmConfig(256, 4, 2), "sm_100a")
    with pytest.raises(
        IllegalConfig, match="rows of tokens: TMA gathers them from sm_100a on, H100 SXM reads"
    ):
        case.require_legal(GemmConfig(256, 4, 2), "sm_90a")


def test_the_key_names_problem_config_and_target() -> None:
    problem, config = GemmProblem("fprop", 8, 512, 512, "store"), GemmConfig(256, 4, 2)
    keys = {
        compiler.problem_key(problem, config, "sm_90a"),
        compiler.problem_key(problem, config, "sm_100a"),
        compiler.problem_key(problem, replace(config, buffers=4), "sm_90a"),
        compiler.problem_key(replace(problem, k=520), config, "sm_90a"),
    }
    assert len(keys) == 4
    assert compiler.problem_key(problem, config, "sm_90a") in keys


def test_another_version_of_the_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "TOOLCHAIN", {"pytest": "0.0.1"})
    with pytest.raises(
        compiler.CompilerError, match=r"compiled with pytest 0\.0\.1, found [0-9.]+: pip install"
    ):
        compiler.check_toolchain()
    monkeypatch.setattr(compiler, "TOOLCHAIN", {"no-such-package": "1"})
    with pytest.raises(compiler.CompilerError, match="found nothing: pip install no-such-package==1"):
        compiler.check_toolchain()


def test_a_runtime_without_its_compiler_is_told_from_one_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.metadata.version", (compiler.TOOLCHAIN | compiler.TRITON).__getitem__)
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(compiler, "_package_folders", lambda: [str(tmp_path)])
    with pytest.raises(compiler.CompilerError, match=r"found its runtime library alone .*: pip install"):
        compiler.check_toolchain()
    library = tmp_path / compiler.COMPILER.replace("*", ".cu12")
    library.parent.mkdir(parents=True)
    library.touch()
    compiler.check_toolchain()


def test_instructions_are_counted_by_kind() -> None:
    sass = """
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0020*/              @P0  STL [R1], R3 ;
        /*0030*/             @!UP1 UTMALDG.2D [UR8], [UR4] ;
        /*0040*/                   FADD R1, R2, R3 ;
    """
    assert count(sass) == {
        "mma": {"HGMMA.64x256x16.F32.BF16": 1},
        "tma": {"UTMALDG.2D": 1},
        "tensor memory": {},
        "local": {"STL": 1},
    }
