"""Every kernel of every shipped config, in all three precisions on both architectures: what its machine code holds, and
how its family does on the emulator under five warp schedules.

Each is half an hour of two cores the first time (`pytest -m slow tests/codegen/test_shipped.py`). Objects and verdicts
are kept in pytest's cache under keys of their own, so that a second run builds and judges what has changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nmoe import autotune
from nmoe.binding import lowered, needed
from nmoe.codegen import compiler, families, report, verify
from nmoe.codegen.attention import AttentionProblem
from nmoe.codegen.build import build
from nmoe.codegen.gemm import GemmConfig, GemmProblem
from nmoe.codegen.hardware import HARDWARE
from nmoe.codegen.problem import Config, Problem
from nmoe.codegen.rows import RowProblem
from nmoe.codegen.spec import KernelSpec
from nmoe.config import Target, load

CONFIGS = Path(__file__).parents[2] / "configs"
MMA = {"bf16": "UTCHMMA", "mxfp8": "UTCQMMA", "nvfp4": "UTCOMMA"}
DEPTH = {"bf16": 16, "mxfp8": 32, "nvfp4": 64}  # of one product on sm_100a
SCHEDULES = range(1, 6)  # of warps
ELEMENTS = {"bf16": 2.0, "mxfp8": 1.0, "nvfp4": 0.5}  # bytes


@pytest.fixture(params=["sm_100a", "sm_90a"])
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["bf16", "mxfp8", "nvfp4"])
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["quickstart", "moonlet", "moonlight", "dsv2", "dsv3"])
def wanted(request: pytest.FixtureRequest, tmp_path: Path, precision: str, target: str) -> list[KernelSpec]:
    """An empty cache chooses the configs: no tuning of this machine's."""
    config = load(CONFIGS / f"{request.param}.toml")
    config = replace(config, target=Target(target), schedule=replace(config.schedule, precision=precision))
    return list(needed(config, [lowered(config, root=tmp_path)]))


@pytest.fixture
def kept(request: pytest.FixtureRequest) -> pytest.Cache:
    assert request.config.cache is not None
    return request.config.cache


@pytest.mark.slow
@pytest.mark.usefixtures("emulator")
def test_every_family_runs_under_five_schedules(
    wanted: list[KernelSpec], kept: pytest.Cache, tmp_path: Path, target: str
) -> None:
    wrong = []
    for spec in wanted:
        problem = families.match(spec)
        assert not isinstance(problem, str), problem
        family, config = problem.small(), autotune.choose(problem, target, tmp_path)[0]
        place = f"verdicts/{verdict_key(family, config, target)}"
        if not kept.get(place, "").startswith("ok"):
            kept.set(place, verify.verify_family(family, config, target, SCHEDULES))
        if not (verdict := kept.get(place, "")).startswith("ok"):
            wrong.append(f"{spec.name} {family}, {config}: {verdict}")
    assert not wrong, "\n".join(wrong)


def verdict_key(family: Problem, config: Config, target: str) -> str:
    """The kernel's, and the sources of whatever judges it: the oracle, the formats and the emulator."""
    digest = hashlib.sha256(compiler.problem_key(family, config, target).encode())
    oracle = verify.ORACLES[family.family].__name__.split(".")[-1]
    judges = [compiler.PACKAGE / f"codegen/verify/{name}.py" for name in ("__init__", "base", "gemm", oracle)]
    for folder in ("codegen/emulator", "formats"):
        paths = compiler.PACKAGE.joinpath(folder).rglob("*")
        judges += sorted(path for path in paths if path.suffix in (".py", ".c", ".h", ".def"))
    for path in judges:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_every_kernel_of_the_shipped_configs(
    wanted: list[KernelSpec], kept: pytest.Cache, target: str
) -> None:
    built = build(wanted, kept.mkdir("kernels"))
    assert built.complete, [*built.failed.values(), *built.missing.values()]
    if report.tool("nvdisasm") is None:
        pytest.skip("no disassembler")
    wrong = []
    for spec, entry in {**built.warm, **built.built}.items():
        problem, config, _ = built.chosen[spec]
        found = [*_budget(entry.report, target, _spills(problem, target))]
        if isinstance(problem, GemmProblem) and isinstance(config, GemmConfig):
            found += _gemm(problem.tiled(config), config, entry.report, target)
        elif isinstance(problem, AttentionProblem):
            found += _attention(entry.report, target)
        elif entry.report["sass"]["mma"] or entry.report["tensor_columns"]:
            found.append("what has no product of matrices uses the tensor cores")
        wrong += [f"{spec.name} {problem}, {config}: {text}" for text in found]
    assert not wrong, "\n".join(wrong)


def _spills(problem: Problem, target: str) -> int:
    """Bytes of local memory that a thread may use where Hopper's kernel takes all registers that there are: a few
    values outside of its loops (docs/kernels.md)."""
    if target == "sm_100a" or not isinstance(problem, RowProblem):
        return 0
    if problem.two_passes:
        return 24
    return 72 if problem.statistic and len(problem.copies) == 2 else 0


def _budget(found: Mapping[str, Any], target: str, spills: int) -> list[str]:
    """What a kernel uses more of than there is, or than `spills` bytes of local memory a thread."""
    hardware = HARDWARE[target]
    kernels = found["kernels"]
    wrong = [f"{name}: {used}" for name, used in kernels.items() if used["stack"] > spills or used["local"]]
    wrong += [f"{name}: {used} registers" for name, used in kernels.items() if used["registers"] > 255]
    if found["sass"]["local"] and not spills:
        wrong.append(f"local memory: {found['sass']['local']}")
    if found["shared_bytes"] > hardware.shared:
        wrong.append(f"{found['shared_bytes']} bytes of shared memory")
    if found["tensor_columns"] > hardware.tensor_columns:
        wrong.append(f"{found['tensor_columns']} columns of tensor memory")
    return wrong


def _attention(found: Mapping[str, Any], target: str) -> list[str]:
    wanted = {"sm_100a": "UTCHMMA", "sm_90a": "HGMMA"}[target]
    others = [op for op in found["sass"]["mma"] if not op.startswith(wanted)]
    return (
        [f"products {found['sass']['mma']}, expected {wanted}"] if others or not found["sass"]["mma"] else []
    )


def _gemm(p: GemmProblem, c: GemmConfig, found: Mapping[str, Any], target: str) -> list[str]:
    """Where a GEMM's main loop is not what its problem and config say: products and copies of scale factors of a
    slice, bytes of its boxes, loads by the pair or by multicast."""
    blackwell, pair = target == "sm_100a", c.cluster == 2
    kind = p.precision if blackwell else "bf16"  # Hopper multiplies what it has dequantized
    wgrad = p.role == "wgrad"
    slice_ = min(128, int(128 / ELEMENTS[kind])) if wgrad else int(128 / ELEMENTS[kind])
    half = int(c.tile_n // 2 * slice_ * ELEMENTS[kind])
    boxes = [int(128 * slice_ * ELEMENTS[kind])]  # A; then B, of which a thread block of a pair loads half
    boxes += [half] * (1 if pair and blackwell else 2)
    atoms = 0  # of 128 lines × 4 scale factors, along the slice
    if kind != "bf16":
        atoms = slice_ // {"mxfp8": 128, "nvfp4": 64}[kind]
        boxes += [512 * atoms] * (1 + c.tile_n // 128)  # of A, and of each 128 columns of B
    waited = sum(boxes) * (
        2 if pair and blackwell else 1
    )  # one barrier waits for both thread blocks of a pair
    products = slice_ // DEPTH[kind]
    sass = found["sass"]
    loads = Counter({op: n for op, n in sass["tma"].items() if op.startswith("UTMALDG")})
    copies = sum(n for op, n in sass["tensor memory"].items() if op.startswith("UTCCP"))
    wrong = []
    if waited not in found["expected_bytes"]:
        wrong.append(f"waits for {found['expected_bytes']} bytes, the boxes of a slice have {waited}")
    if blackwell:
        wanted = MMA[kind] + ".2CTA" * pair + ".4X" * (kind == "nvfp4")
        if sass["mma"] != {wanted: products}:
            wrong.append(f"products {sass['mma']}, expected {products}x {wanted}")
        if copies != atoms * (1 + c.tile_n // 128):
            wrong.append(f"{copies} copies of scale factors, expected {atoms * (1 + c.tile_n // 128)}")
        # Two accumulators and a slice's scale factors; a power of two, and 512 where the accumulators overlap.
        columns = min(512, 1 << (2 * c.tile_n + 4 * atoms * (1 + c.tile_n // 128) - 1).bit_length())
        if found["tensor_columns"] != columns:
            wrong.append(f"{found['tensor_columns']} columns of tensor memory, expected {columns}")
        if any(".2CTA" in op for op in loads) != pair:
            wrong.append(f"loads of {c.cluster} thread blocks: {dict(loads)}")
        lines = {"": 0, "a": 128, "b": c.tile_n // c.cluster}[p.gathered]
        each = lines * slice_ // 512  # instructions of either warp: 4 rows of 64
        if sum(n for op, n in loads.items() if ".GATHER4" in op) != each:
            wrong.append(f"loads of {lines} x {slice_} elements of tokens' rows: {dict(loads)}")
    else:
        # A tile's first slice stands alone, and the loop over the others, if there are any, is cut by the tasks of the
        # tile before.
        wanted = f"HGMMA.64x{c.tile_n}x16.F32.BF16"
        count = sass["mma"].get(wanted, 0)
        if set(sass["mma"]) != {wanted} or count % products:
            wrong.append(f"products {sass['mma']}, expected {products}x {wanted} for each part of the loop")
        if any(".MULTICAST" in op for op in loads) != pair:
            wrong.append(f"loads of {c.cluster} thread blocks: {dict(loads)}")
    return wrong
