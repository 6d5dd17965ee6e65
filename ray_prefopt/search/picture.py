"""The main picture of a search as a PNG: the metric against each parameter, and every learning curve."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ray_prefopt.search.findings import Findings, position
from ray_prefopt.search.space import show
from ray_prefopt.training.plots import CHOSEN, FAINT, INK, REJECTED, TRAIN

COLORS = {"finished": TRAIN, "stopped": "#b8bec7", "failed": REJECTED, "running": "#e08e1b"}
"""Of a trial, by how it ended."""
MOST = 3
"""Parameters that there is room for."""


def draw_picture(found: Findings) -> Figure:
    names = list(found.space.dimensions)[:MOST]
    figure = Figure(
        figsize=(4 * len(names) + 4.5, 4.1),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
        facecolor="white",
    )
    panels = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    for name, panel in zip(names, panels, strict=False):
        _parameter(panel, found, name)
    panels[0].set_ylabel(found.metric, color=INK)
    _curves(panels[-1], found)
    best = found.best
    heading = f"{found.name}: {len(found.rows)} trials"
    if best is not None:
        values = ", ".join(f"{name.rpartition('.')[2]} {show(value)}" for name, value in best.point.items())
        heading += f"; best {best.mean(found.metric):.4f} at {values}"
    figure.suptitle(heading, x=0.012, ha="left", color=INK, fontsize=12, fontweight="bold")
    return figure


def _parameter(panel: Axes, found: Findings, name: str) -> None:
    dimension = found.space.dimensions[name]
    _dress(panel, name)
    for group in found.groups:
        mean = group.mean(found.metric)
        if mean is None or name not in group.point:
            continue
        x = group.point[name] if dimension.bounds else position(dimension, group.point[name])
        is_best = group is found.best
        color = CHOSEN if is_best else COLORS[group.status]
        panel.errorbar(
            x, mean, yerr=group.std(found.metric), color=color, marker="x" if group.status == "stopped" else "o",
            markersize=9 if is_best else 6, linestyle="none", zorder=3 if is_best else 2,
        )  # fmt: skip
    if dimension.loguniform:
        panel.set_xscale("log")
    if dimension.values is not None:
        panel.set_xticks(
            [position(dimension, value) for value in dimension.values],
            [show(value) for value in dimension.values],
        )


def _curves(panel: Axes, found: Findings) -> None:
    _dress(panel, "Learning curves")
    best = {row.name for row in found.best.rows} if found.best else set()
    for row in found.rows:
        points = [
            (record["step"], record[found.metric])
            for record in found.curves.get(row.name, [])
            if math.isfinite(record[found.metric])
        ]
        if points:
            color = CHOSEN if row.name in best else COLORS[row.status]
            panel.plot(*zip(*points, strict=True), color=color, linewidth=2.5 if row.name in best else 1.0)
            panel.plot(*points[-1], color=color, marker="x" if row.status == "stopped" else ".")
    panel.set_xlabel("optimizer step", color=INK)


def _dress(panel: Axes, heading: str) -> None:
    panel.set_title(heading, loc="left", fontsize=11, color=INK)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)
    panel.grid(axis="y", color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, labelsize=9, length=0)
