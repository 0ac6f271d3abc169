"""Grouped GEMMs as the templates see them: what is multiplied, in which layout, and what follows in the epilogue.

Says nothing of CuTeDSL, so that specs can be matched and listed on a machine without the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Mode = tuple[int, int]


@dataclass(frozen=True)
class GemmProblem:
    """One grouped GEMM over W[experts, n, k] and packed rows.

    role fprop: rows · Wᵀ, [R, n]; dgrad: rows · W, [R, k]; wgrad: Σ over an expert's rows, [experts, n, k].
    `epilogue`: store; swiglu (fprop, n = 2·pairs); dswiglu (dgrad); accumulate (wgrad).
    """

    role: Literal["fprop", "dgrad", "wgrad"]
    experts: int
    n: int
    k: int
    epilogue: Literal["store", "swiglu", "dswiglu", "accumulate"]

    @property
    def ragged(self) -> Literal["rows", "depth"]:
        return "depth" if self.role == "wgrad" else "rows"

    @property
    def rows(self) -> int:
        return self.n

    @property
    def columns(self) -> int:
        """Columns of the result; pairs for swiglu."""
        if self.epilogue == "swiglu":
            return self.n // 2
        return self.n if self.role == "fprop" else self.k

    @property
    def depth_slices(self) -> int:
        depth = self.k if self.role == "fprop" else self.n
        return -(-depth // 64)

    @property
    def a_mn_major(self) -> bool:
        return self.role == "wgrad"

    @property
    def b_mn_major(self) -> bool:
        return self.role != "fprop"

    @cached_property
    def views(self) -> dict[str, tuple[Mode, ...]]:
        n, k, e = self.n, self.k, self.experts
        if self.role == "fprop":
            pairs = n // 2
            views = {"a": ((-1, k), (k, 1))}
            if self.epilogue == "swiglu":
                views["b"] = ((pairs, k), (k, 1), (2, pairs * k), (e, n * k))
                views["h"] = ((-1, n), (pairs, 1), (2, pairs))
                views["act"] = ((-1, pairs), (pairs, 1))
            else:
                views["b"] = ((n, k), (k, 1), (1, 0), (e, n * k))
                views["y"] = ((-1, n), (n, 1))
            return views
        if self.role == "dgrad":
            views = {"a": ((-1, n), (n, 1)), "b": ((k, 1), (n, k), (1, 0), (e, n * k))}
            if self.epilogue == "dswiglu":
                views["h"] = views["dh"] = ((-1, 2 * k), (k, 1), (2, k))
            else:
                views["y"] = ((-1, k), (k, 1))
            return views
        return {
            "a": ((n, 1), (-1, n)),
            "b": ((k, 1), (-1, k), (1, 0), (1, 0)),
            "dw": ((n, k), (k, 1), (e, n * k)),
        }

    @property
    def stored(self) -> tuple[str, ...]:
        return {"store": ("y",), "swiglu": ("h", "act"), "dswiglu": ("dh",), "accumulate": ("dw",)}[self.epilogue]

    @property
    def names(self) -> tuple[str, ...]:
        tail = {"store": ("y",), "swiglu": ("s", "h", "act"), "dswiglu": ("h", "s", "dh", "ds", "partial"),
                "accumulate": ("dw",)}[self.epilogue]
        return ("a", "b", "offsets", *tail)


@dataclass(frozen=True)
class GemmConfig:
    tile_m: int = 128
    tile_n: int = 256
    stages: int = 4
    cluster: int = 2
    band: int = 8
