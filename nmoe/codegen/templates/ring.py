"""A ring of shared-memory stages between one producer and several consumers: two mbarriers a stage.

    producer                      full[s]                consumers
    wait empty[s]  ── TMA ──▶  bytes arrive  ──▶  wait full[s], read the stage
         ▲                                                 │
         └──────────────── empty[s] ◀── one arrival a consumer warp, in every CTA that fills the stage

A position in the ring is (stage, phase). Barriers start in phase 0: waiting for phase 1 of a fresh barrier returns
at once, so a producer starts at (0, 1) and finds all stages empty, a consumer at (0, 0).
"""

from __future__ import annotations

from cutlass import Int32, cute

from nmoe.codegen.templates.fixed import Fixed


class Ring(Fixed):
    def __init__(self, barriers: cute.Pointer, stages: int) -> None:
        self.full, self.empty, self.stages = barriers, barriers + stages, stages

    def init(self, arrivals: int) -> None:
        """By one thread, before the cluster synchronises. `arrivals`: consumer warps that release a stage."""
        for stage in range(self.stages):
            cute.arch.mbarrier_init(self.full + stage, 1)
            cute.arch.mbarrier_init(self.empty + stage, arrivals)

    @cute.jit
    def after(self, stage: Int32, phase: Int32):  # type: ignore[no-untyped-def]
        """The next position."""
        stage += 1
        if stage == self.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase
