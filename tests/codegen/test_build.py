"""Building a config's kernels: reports of Blackwell's kernels, cold and warm, and what is honestly missing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from nmoe.autotune import cost
from nmoe.codegen import compiler, report
from nmoe.codegen.build import Build, build, emit, format_build
from nmoe.codegen.cache import Cache
from nmoe.codegen.gemm import Epilogue, GemmProblem, Role
from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.rows import Copy, RowProblem
from nmoe.codegen.spec import KernelSpec, specs
from nmoe.config import Target, load
from nmoe.schedule import lower

MOONLET = Path(__file__).parents[2] / "configs" / "moonlet.toml"


@pytest.fixture(scope="module")
def moonlet() -> list[KernelSpec]:
    """The kernels of one MoE layer's experts, and the embedding's gradient, which has no template."""
    config = load(MOONLET)
    config = replace(config, target=Target("sm_100a"), schedule=replace(config.schedule, precision="bf16"))
    return [spec for spec in specs(lower(config)) if spec.anchor.kind in ("grouped_gemm", "embedding_bwd")]


@pytest.fixture(scope="module")
def built(moonlet: list[KernelSpec], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Build, str]:
    root, log = tmp_path_factory.mktemp("kernels"), StringIO()
    return root, build(moonlet, root, progress=log), log.getvalue()


@pytest.mark.usefixtures("compiler")
def test_blackwells_kernels_keep_within_their_budgets(built: tuple[Path, Build, str]) -> None:
    _, result, log = built
    assert len(result.built) == 6 and not result.failed and not result.complete
    assert re.fullmatch(r"compiling  6 kernels in \d+\.\d s on \d+ cores", log.splitlines()[-1])
    for spec, entry in result.built.items():
        found = entry.report
        assert found["shared_bytes"] <= HARDWARE["sm_100a"].shared
        if report.tool("nvdisasm") is None:
            continue
        assert found["sass"]["local"] == {}, spec.name
        assert all(used["stack"] == used["local"] == 0 for used in found["kernels"].values())
        assert found["sass"]["mma"] == {"UTCHMMA.2CTA": 4}, "one slice of 64 is four products of k16"
        assert found["expected_bytes"][-1] == 2 * (128 + 128) * 64 * 2, (
            "a slice of A and B of both thread blocks"
        )
        gathers = found["sass"]["tma"].get("UTMALDG.2D.GATHER4.2CTA", 0)
        assert gathers == (16 if spec.gathers else 0), (
            "128 x 64 elements, 4 rows of 128 bytes each, by two warps"
        )
    assert sum(spec.gathers for spec in result.built) == 4


@pytest.mark.usefixtures("compiler")
def test_a_warm_build_compiles_nothing(built: tuple[Path, Build, str], moonlet: list[KernelSpec]) -> None:
    root, cold, _ = built
    warm = build(moonlet, root)
    assert set(warm.warm) == set(cold.built) and not warm.built
    text = format_build("moonlet", warm)
    assert "6 of 7 kernels ready (6 cached, 0 built), 0 failed, 1 without a template" in text.splitlines()[-1]


@pytest.mark.usefixtures("compiler")
def test_emit_writes_what_the_report_was_read_from(built: tuple[Path, Build, str], tmp_path: Path) -> None:
    _, result, _ = built
    assert emit(result, tmp_path / "out").startswith("PTX, SASS and reports of 6 kernels are in ")
    for spec, entry in result.built.items():
        place = tmp_path / "out" / f"{spec.name}-{spec.key}"
        assert ".target sm_100a" in (place / "kernel.ptx").read_text()
        assert json.loads((place / "report.json").read_text()) == json.loads(json.dumps(entry.report))
        if report.tool("nvdisasm"):
            assert report.count((place / "kernel.sass").read_text()) == entry.report["sass"]


@pytest.mark.usefixtures("compiler")
def test_a_damaged_kernel_is_rebuilt_and_reported(
    built: tuple[Path, Build, str], moonlet: list[KernelSpec]
) -> None:
    root, cold, _ = built
    spec, entry = next(iter(cold.built.items()))
    entry.library.write_bytes(b"")
    again = build(moonlet, root, workers=1)
    assert list(again.built) == [spec] and len(again.warm) == 5
    assert "damaged entry set aside and rebuilt: " in format_build("moonlet", again)


@pytest.mark.usefixtures("compiler")
def test_a_damaged_kernel_where_nothing_can_be_built(
    moonlet: list[KernelSpec],
    built: tuple[Path, Build, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = shutil.copytree(built[0], tmp_path / "kernels")
    next(iter(build(moonlet, root).warm.values())).library.write_bytes(b"")
    monkeypatch.setattr(compiler, "_package_folders", list)
    with pytest.raises(
        compiler.CompilerError,
        match=r"1 kernels .* are not in .* \(damaged and set aside: .*/kernel\.so: its SHA-256.*runtime library alone",
    ):
        build(moonlet, root)


def test_what_has_no_template_is_named(moonlet: list[KernelSpec], tmp_path: Path) -> None:
    without = [spec for spec in moonlet if spec.name == "embedding_bwd"]
    result = build(without, tmp_path)
    assert not result.complete
    assert (
        format_build("moonlet", result)
        .splitlines()[2]
        .endswith("embedding_bwd: no template for embedding_bwd")
    )


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_cannot_be_written_is_an_error_before_anything_is_compiled(
    moonlet: list[KernelSpec], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(compiler.CompilerError) as error:
        build(moonlet, tmp_path / "file" / "kernels")
    assert str(error.value) == (
        f"6 kernels (grouped_gemm.fprop, grouped_gemm.wgrad, grouped_gemm.dgrad) are not in the cache {tmp_path}/file/"
        "kernels, which cannot be written (Not a directory): choose another by --cache or NMOE_HOME"
    )


def test_without_the_compiler_the_remedies_are_named(
    moonlet: list[KernelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nmoe.codegen.compiler.TOOLCHAIN", {"nvidia-no-such-compiler": "1.0"})
    with pytest.raises(compiler.CompilerError) as error:
        build(moonlet, tmp_path)
    assert str(error.value).endswith(
        "and cannot be built here: kernels are compiled with nvidia-no-such-compiler 1.0, found nothing: pip install "
        "nvidia-no-such-compiler==1.0; or bring a cache that nmoe compile has filled elsewhere, with the same nmoe"
    )


@pytest.mark.usefixtures("compiler")
def test_a_failing_kernel_fails_alone(
    moonlet: list[KernelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no gcc in the workers; found by the parent's check below
    monkeypatch.setattr("nmoe.codegen.compiler.check_toolchain", lambda: None)
    wgrad = [spec for spec in moonlet if spec.name == "grouped_gemm.wgrad"][:1]
    result = build(wgrad, tmp_path, workers=1)
    assert list(result.failed) == wgrad
    assert "kernels are linked with gcc, found none: apt-get install gcc" in result.failed[wgrad[0]]


def test_where_every_kernel_fails_the_error_is_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> dict[str, bytes]:
        raise compiler.CompilerError("no device code")

    monkeypatch.setattr(compiler, "check_toolchain", lambda: None)
    monkeypatch.setattr(compiler, "generate", fail)
    problem = RowProblem("load", -1, 64)
    with pytest.raises(compiler.CompilerError, match="no device code"):
        compiler.compile_problem(problem, problem.configs("sm_90a")[0], "sm_90a", Cache(tmp_path))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("role, epilogue", [("fprop", "store"), ("dgrad", "store"), ("fprop", "swiglu"),
                                            ("dgrad", "dswiglu"), ("wgrad", "accumulate")])  # fmt: skip
def test_hoppers_products_follow_each_other_without_waits(role: Role, epilogue: Epilogue) -> None:
    """ptxas may serialize wgmma: a wait after each instead of one for the four of a slice, a tenth of the speed."""
    if report.tool("nvdisasm") is None:
        pytest.skip("needs nvdisasm")
    problem = GemmProblem(role, 8, 2816, 2048, epilogue)
    cubin = compiler.generate(problem, cost.choose(problem, "sm_90a"), "sm_90a")["kernel.cubin"]
    products = [line for line in (report.disassemble(cubin) or "").splitlines() if "HGMMA" in line]
    slices = sum("gsb0" in line for line in products)
    assert slices > 1 and len(products) == 4 * slices, (
        "a slice is four products, and only its last is committed"
    )


def test_what_ptxas_miscompiles_is_refused() -> None:
    """On an H100 every square NVFP4 copy was wrong, and on the emulator, which runs PTX, right."""
    pair = "cvt.rn.satfinite.e4m3x2.f32 \t%rs{}, %r4, %r3;\n"
    for text in (
        pair.format(5),
        pair.format(5) + "mov.b32 \t%r7, {%rs5, %rs6};",
        "mov.b32 \t%r7, {%rs5, %rs5};",
    ):
        compiler.check_ptx(text)
    with pytest.raises(
        compiler.CompilerError, match="twice the pair of codes %rs5, of which ptxas loses one"
    ):
        compiler.check_ptx(pair.format(5) + "mov.b32 \t%r7, {%rs5, %rs5};")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_square_copies_convert_a_scale_once(target: str) -> None:
    scales = "blocked" if target == "sm_100a" else "rows"
    square = tuple(Copy("nvfp4", axis, scales, square=True) for axis in (1, 0))
    problem = RowProblem("load", 160, 416, keeps_body=False, copies=square)
    compiler.check_ptx(compiler.trace(problem, problem.configs(target)[0], target).__ptx__)
