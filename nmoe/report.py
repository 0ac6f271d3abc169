"""What a run leaves for people: the loss curve as a picture."""

from __future__ import annotations

from pathlib import Path

import duckdb

SURFACE, INK, MUTED, LINE = "#fcfcfb", "#1f2328", "#6e7781", "#2a78d6"


def plot_loss(metrics: Path, picture: Path, title: str) -> bool:
    """Draws tag `loss` of a metrics file over the steps, with its running mean; False when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with duckdb.connect(str(metrics), read_only=True) as db:
        rows = db.execute(
            "SELECT step, value, avg(value) OVER (ORDER BY step ROWS BETWEEN 9 PRECEDING AND CURRENT ROW) "
            "FROM metrics WHERE tag = 'loss' ORDER BY step"
        ).fetchall()
    if not rows:
        return False
    steps, losses, means = zip(*rows, strict=True)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, facecolor=SURFACE)
    axes.set_facecolor(SURFACE)
    axes.plot(steps, losses, color=LINE, alpha=0.3, linewidth=1, label="each step")
    axes.plot(steps, means, color=LINE, linewidth=2, label="mean of 10 steps")
    axes.set_title(title, loc="left", color=INK)
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel("loss (nats per token)", color=MUTED)
    axes.annotate(
        f"{means[-1]:.3f}", (steps[-1], means[-1]), xytext=(6, 0), textcoords="offset points", color=INK
    )
    axes.grid(axis="y", color="#e4e4e2", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=MUTED, length=0)
    axes.legend(frameon=False, labelcolor=MUTED)
    figure.tight_layout()
    figure.savefig(picture, facecolor=SURFACE)
    pyplot.close(figure)
    return True
