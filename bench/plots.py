"""The charts of README.md and docs/, from what the benches measured: `python bench/plots.py` rewrites them all.

bench/results/NAME.json is what `bench/NAME.py run … --json` wrote on a GPU, copied there; a "note" in it is printed
below the chart. Needs matplotlib.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
OURS, THEIRS = "#1f4e8c", "#b8bec8"
pyplot.rcParams |= {
    "svg.fonttype": "none",  # text stays text: small files, and letters that can be searched
    "svg.hashsalt": "nmoe",  # the same file from the same numbers
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
}


def bars(axes: Axes, title: str, groups: Mapping[str, Mapping[str, float]], unit: str, digits: int) -> None:
    """Horizontal bars, a block for each group, their numbers at their ends. Ours are those named "nmoe…"."""
    place, ticks, labels = 0.0, [], []
    for group, values in groups.items():
        for i, (name, value) in enumerate(values.items()):
            axes.barh(place, value, 0.8, color=OURS if name.startswith("nmoe") else THEIRS)
            axes.text(value, place, f" {value:,.{digits}f} {unit}", va="center")
            ticks.append(place)
            labels.append(name if len(groups) == 1 else f"{group}   {name}" if i == 0 else name)
            place += 1
        place += 0.6
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.margins(x=0.18)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")


def moe_peers(found: Mapping[str, Any]) -> None:
    shapes = {"moonlet": "moonlet", "dsv3-ep8": "dsv3, a rank of EP8"}
    names = {
        "ours": "nmoe",
        "SonicMoE": "SonicMoE",
        "torch compiled": "torch, compiled",
        "torch": "torch, eager",
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for at, (shape, title) in zip(axes, shapes.items(), strict=True):
        times = {name: statistics.median(each) for name, each in found[shape]["ms"].items()}
        groups = {
            label: {shown: times[name + suffix] for name, shown in names.items()}
            for label, suffix in (("forward", ", forward"), ("forward + backward", ""))
        }
        bars(at, title, groups, "ms", 1)
    save(figure, "moe_layer.svg", found, "one MoE layer, BF16, at the power limit")


def rdep(found: Mapping[str, Any]) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 2.6), layout="constrained")
    rates, times = {}, {}
    for label in ("moonlight", "dsv3"):
        rows = found[label]
        rates[label] = {
            "nmoe dispatch": max(_those(rows, "dispatch", "GB/s")),
            "peer copy": max(_those(rows, "peer copy", "GB/s")),
        }
        times[label] = {"nmoe": min(_those(rows, "ours", "us")), "NCCL": min(_those(rows, "NCCL", "us"))}
    bars(axes[0], "rows sent to the other GPU", rates, "GB/s", 0)
    bars(axes[1], "plan, dispatch, return, sum", times, "µs", 0)
    save(figure, "rdep.svg", found, "two GPUs, BF16 rows")


def _those(rows: Mapping[str, Any], name: str, unit: str) -> list[float]:
    """What a bench's part measured of the entries that begin so."""
    return [
        float(v[unit]) for key, v in rows.items() if key.startswith(name) and isinstance(v, dict) and v[unit]
    ]


def save(figure: Any, name: str, found: Mapping[str, Any], what: str) -> None:
    notes = [what, f"{found['device']}, {found['date']}", *([found["note"]] if "note" in found else [])]
    figure.supxlabel("; ".join(notes), fontsize=8, x=0.01, ha="left", color="#555555")
    figure.savefig(DOCS / name, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    for draw in (moe_peers, rdep):
        draw(json.loads((RESULTS / f"{draw.__name__}.json").read_text()))


if __name__ == "__main__":
    main()
