"""Layer graph → schedule: named passes over the graph, then placement of its ops and of its memory."""

from nmoe.schedule.lower import Call, Kernels, Schedule, Workspace, lower, no_kernel, place

__all__ = ["Call", "Kernels", "Schedule", "Workspace", "lower", "no_kernel", "place"]
