"""Which config a kernel is built with. Until a device has measured them the cost model chooses: "untuned"."""

from nmoe.autotune.cost import candidates, choose, predict

__all__ = ["candidates", "choose", "predict"]
