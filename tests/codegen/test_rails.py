"""The kernels between hosts: what their config must be, who is missing, and NVSHMEM's own device code linked in, where
its package is installed. That rows arrive is test_rdep.py's."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from nmoe.codegen import compiler
from nmoe.codegen.rails import (
    VERSION,
    RailCountsProblem,
    RailFlagProblem,
    RailReturnsProblem,
    RailRowsProblem,
)
from nmoe.rdep.device import Group, check
from nmoe.rdep.transport import Missing


@pytest.mark.usefixtures("emulator", "wire")
def test_rows_wait_for_the_landing_and_a_missing_host_is_named() -> None:
    from emulated_ranks import group_of

    from nmoe.codegen.emulator.device import EmulationError

    group = Group(4, 2, 4, 32, 2, 64, 32, (64,), 32)
    rank = group_of(group, "sm_90a", seed=1)[1]
    rail = group.problems()["resend_rows rail"]
    own = torch.ones(32, 64, dtype=torch.uint8), torch.full((32, 2), 199, dtype=torch.int32)
    mail = [rank.heap[f"rows {o.name}"] for name in ("staged", "landed") for o in rail.mailboxes(name)]
    tables = rank.addresses, rank.state, 1, 7

    def send() -> None:
        rank.run(rail, *map(rank.device.tensor, own), *mail, group.capacity, group.choices, *tables)

    send()
    with pytest.raises(EmulationError, match="trap"):
        send()  # nobody has consumed the first
    with pytest.raises(Missing, match=r"layer 7: rank 1 waited 30 s for rails.free 1 \(seen 0\) of rank 3"):
        check(rank.report.torch, 30)
    with pytest.raises(EmulationError, match="trap"):
        rank.run(group.problems()["await_rails"], *tables)
    with pytest.raises(Missing, match=r"layer 7: rank 1 waited 30 s for rails.full 1 \(seen 0\) of rank 3"):
        check(rank.report.torch, 30)


def test_what_cannot_be_sent_between_hosts_is_named() -> None:
    good = RailRowsProblem(16, 8, (4096,), 8192, 4, True, 6)
    assert not good.violations(good.configs("sm_100a")[0], "sm_100a")
    bad = RailRowsProblem(8, 8, (4100,), 100, 8, True, 6)
    found = bad.violations(bad.configs("sm_100a")[0], "sm_100a")
    assert [line.split(":")[0] for line in found] == [
        "8 ranks of 8 GPUs a host",
        "parts (4100,)",
        "100 rows",
    ]


@pytest.mark.usefixtures("compiler")
def test_another_version_of_nvshmem_is_refused() -> None:
    from nmoe.codegen.templates.nvshmem import bitcode
    from nmoe.errors import UserError

    with pytest.raises(UserError, match=r"linked with nvidia-nvshmem-cu13 0\.0\.1, found"):
        bitcode(100, "0.0.1")


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_nvshmem_is_linked(target: str) -> None:
    """The machine code holds NVSHMEM's device state, and takes nothing but addresses and 32-bit scalars."""
    try:
        found = importlib.metadata.version("nvidia-nvshmem-cu13")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        pytest.skip(f"needs nvidia-nvshmem-cu13 {VERSION}, found {found}")
    sizes = (16, 8, (4096,), 8192, 4, True, 6)
    rails = RailRowsProblem(*sizes), RailReturnsProblem(*sizes)
    for problem in (*rails, RailCountsProblem(16, 8, 64), RailFlagProblem(16, 8, "raise")):
        config = problem.configs(target)[0]
        compiled = compiler.trace(problem, config, target)
        assert b"nvshmemi_device_state_d" in compiled.__cubin__
        ptx = compiled.__ptx__
        assert compiler.entry(ptx)["threads"] == 32 * config.warps
        entry = ptx[ptx.index(".entry") :].split(")")[0]
        kinds = ["b8" if ".b8" in line else "u32" for line in entry.splitlines() if ".param" in line]
        assert entry.count("[8]") == kinds.count("b8")
        assert kinds == ["u32" if not o.shape else "b8" for o in problem.operands(config)]
