"""Mutation testing of a kernel's synchronisation: break one instruction, run, see whether anything notices.

A mutant that nobody notices is either redundant in that problem or a hole in the checks; both deserve a look.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nmoe.codegen.emulator import ptx
from nmoe.codegen.emulator.execution import EmulationError, Options, Report

# What is broken, and how: `delete` leaves nothing, `true` answers a wait at once, `bytes` counts 16 bytes too many,
# `relaxed` takes acquire and release away, `narrow` takes the next smaller scope.
ACTIONS: tuple[tuple[str, str], ...] = (
    (r"mbarrier\.(try|test)_wait\b.*", "true"),
    (r"mbarrier\.arrive(_drop)?(?!.*expect_tx)\b.*", "delete"),
    (r"mbarrier\.arrive\.expect_tx\b.*", "bytes"),
    (r"(bar|barrier)\.((cta|warp)\.)?(sync|arrive)\b.*", "delete"),
    (r"barrier\.cluster\.arrive\b.*", "delete"),
    (r"barrier\.cluster\.wait\b.*", "delete"),
    (r"(fence|membar)\b.*", "delete"),
    (r"tcgen05\.(commit|cp|wait|fence|dealloc)\b.*", "delete"),
    (r"cp\.async\.(bulk\.)?(commit|wait)_(group|all)\b.*", "delete"),
    (r"cp\.async\.mbarrier\b.*", "delete"),
    (r"(ld|st|atom|red)\..*\b(acquire|release|acq_rel)\b.*", "relaxed"),
    (r"(ld|st|atom|red|fence|membar)\b.*\.(sys|gpu|gl)\b.*", "narrow"),
    (r"wgmma\.(wait_group|commit_group|fence)\b.*", "delete"),
)


@dataclass(frozen=True)
class Mutant:
    """One broken instruction of `kernel`; `module` is the whole PTX with it."""

    kernel: str
    index: int
    action: str
    instruction: ptx.Instr
    module: ptx.Module


@dataclass(frozen=True)
class Verdict:
    """`noticed` is the first line of the error, `wrong result`, or None for a survivor; `options` noticed it."""

    mutant: Mutant
    noticed: str | None
    options: Options | None


def mutants(module: ptx.Module, reports: Sequence[Report]) -> list[Mutant]:
    """Every single break of ACTIONS among the instructions that the launches of `reports` executed."""
    executed: dict[str, np.ndarray] = {}
    for report in reports:
        executed[report.kernel] = executed.get(report.kernel, 0) + report.executed
    found = []
    for name, counts in executed.items():
        entry = module.entries[name]
        for index in np.flatnonzero(counts):
            instruction = entry.instructions[index]
            for pattern, action in ACTIONS:
                if re.fullmatch(pattern, instruction.opcode):
                    broken = _broken(module, name, int(index), action)
                    found.append(Mutant(name, int(index), action, instruction, broken))
    return found


def _broken(module: ptx.Module, kernel: str, index: int, action: str) -> ptx.Module:
    entry = module.entries[kernel]
    old = entry.instructions[index]
    if action == "true":
        target = old.operands[0]
        new = dataclasses.replace(old, opcode="setp.eq.u32", operands=(target, ptx.Imm(0), ptx.Imm(0)))
    elif action == "bytes":
        *kept, count = old.operands
        extra = entry.registers | {"%mutant": 32}
        entry = dataclasses.replace(entry, registers=extra)
        add = dataclasses.replace(old, opcode="add.u32", operands=(ptx.Reg("%mutant"), count, ptx.Imm(16)))
        new = dataclasses.replace(old, operands=(*kept, ptx.Reg("%mutant")))
        return _with(
            module,
            kernel,
            entry,
            [*entry.instructions[:index], add, new, *entry.instructions[index + 1 :]],
            {name: at + (at > index) for name, at in entry.labels.items()},
        )
    elif action == "relaxed":
        opcode = re.sub(r"\b(acquire|release|acq_rel)\b", "relaxed", old.opcode)
        new = dataclasses.replace(old, opcode=opcode)
    elif action == "narrow":
        smaller = {"sys": "gl" if old.opcode.startswith("membar") else "gpu", "gpu": "cta", "gl": "cta"}
        opcode = re.sub(r"(?<=\.)(sys|gpu|gl)\b", lambda m: smaller[m[0]], old.opcode)
        new = dataclasses.replace(old, opcode=opcode)
    else:
        new = dataclasses.replace(old, opcode="nanosleep.u32", operands=())
    return _with(
        module,
        kernel,
        entry,
        [*entry.instructions[:index], new, *entry.instructions[index + 1 :]],
        entry.labels,
    )


def _with(
    module: ptx.Module, kernel: str, entry: ptx.Entry, instructions: list[ptx.Instr], labels: dict[str, int]
) -> ptx.Module:
    changed = dataclasses.replace(entry, instructions=instructions, labels=labels)
    return dataclasses.replace(module, entries={**module.entries, kernel: changed})


def survey(
    candidates: Sequence[Mutant], run: Callable[[ptx.Module, Options], bool], schedules: Sequence[Options]
) -> list[Verdict]:
    """Run each mutant under the schedules until one notices it.

    `run(module, options)` executes the problem and tells whether its results are right.
    """
    verdicts = []
    for mutant in candidates:
        verdict = Verdict(mutant, None, None)
        for options in schedules:
            try:
                noticed = None if run(mutant.module, options) else "wrong result"
            except EmulationError as error:
                noticed = str(error).splitlines()[0]
            if noticed:
                verdict = Verdict(mutant, noticed, options)
                break
        verdicts.append(verdict)
    return verdicts
