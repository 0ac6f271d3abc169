"""Layer graph → schedule: named passes over the graph, then placement of its ops and of its memory."""

from nmoe.schedule.lower import Call, Schedule, lower, place

__all__ = ["Call", "Schedule", "lower", "place"]
