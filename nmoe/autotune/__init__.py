"""Which config a kernel is built with. Until a device has measured them the cost model chooses: "untuned"."""

from nmoe.autotune.cost import choose, predict

__all__ = ["choose", "predict"]
