"""A picture of a run from its metrics.jsonl alone: of one that is finished, still running, or copied from elsewhere."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from ray_prefopt.errors import CheckpointError

TRAIN, CHOSEN, REJECTED = "#3b5b92", "#2a9d6f", "#c8553d"
EVAL = (("#e08e1b", "o"), ("#8d5fb5", "s"), ("#2f9fb0", "^"), ("#a2536b", "D"), ("#7c8a2c", "v"))
"""Colour and marker of each evaluation set, in turn."""
INK, FAINT = "#2b2f36", "#d9dce1"
SMOOTH_ABOVE = 80
"""Points from which a training curve is drawn faint, with its running mean on top."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """The values of one metric and the steps they belong to; both (N,)."""

    steps: np.ndarray
    values: np.ndarray

    def smoothed(self) -> "Curve":
        """The mean over a window of a twentieth of the points around each; at the ends over what there is of it.

        >>> Curve(np.arange(3), np.array([1.0, 2.0, 6.0])).smoothed().values.tolist()
        [1.5, 3.0, 4.0]
        """
        window = max(3, len(self.values) // 20) | 1  # odd, so that it has a middle
        ones = np.ones(window)
        near = np.convolve(np.ones_like(self.values), ones, "same")
        return Curve(self.steps, np.convolve(self.values, ones, "same") / near)


def plot_run(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draw the curves of a run to a picture, `curves.png` in its folder when `out` is not given; returns its path.

    `out` may end in any suffix that matplotlib writes. Raises CheckpointError when the run has no metrics yet, or a
    line of them is damaged.
    """
    folder = Path(folder)
    records = read_records(folder / "metrics.jsonl")
    figure = make_figure(records, title=folder.absolute().name)
    picture = Path(out or folder / "curves.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=144)
    return picture


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that is still being written is left out."""
    try:
        lines = path.read_text().split("\n")[:-1]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: give the folder of a run that has logged a step"
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}:{number} is damaged ({error!r}): remove the line, or copy the file again"
            ) from error
    if not records:
        raise CheckpointError(f"{path} is empty: the run has not logged a step yet")
    return records


def _curve(records: Sequence[Record], name: str) -> Curve:
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return Curve(np.array(steps, float), np.array(values, float))


def eval_prefixes(records: Sequence[Record]) -> list[str]:
    """`eval_`, or `eval_<name>_` of each named set, in the order of the file.

    >>> eval_prefixes([{"eval_rewards/accuracies": 0.5}, {"eval_easy_rewards/accuracies": 0.9, "eval_easy_loss": 1}])
    ['eval_', 'eval_easy_']
    """
    ending = "rewards/accuracies"
    names = dict.fromkeys(name for record in records for name in record)
    return [name.removesuffix(ending) for name in names if name.startswith("eval_") and name.endswith(ending)]


def make_figure(records: Sequence[Record], *, title: str) -> Figure:
    """Six panels over the optimizer steps; training as lines, evaluation sets as dashed lines with markers."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=(13.5, 7.2), layout=layout, facecolor="white")
    last = records[-1]
    heading = f"{title}: step {last['step']:,}, epoch {last.get('epoch', 0):.2f}"
    figure.suptitle(heading, x=0.012, ha="left", color=INK, fontsize=14, fontweight="bold")
    axes = figure.subplots(2, 3, sharex=True)
    loss, accuracy, margin, logps, norm, rate = axes.flat
    for panel, heading in (
        (loss, "Loss"),
        (accuracy, "Reward accuracy"),
        (margin, "Reward margin"),
        (logps, "Mean log-probability per token"),
        (norm, "Gradient norm"),
        (rate, "Learning rate"),
    ):
        _dress(panel, heading)

    prefixes = eval_prefixes(records)
    for panel, name in ((loss, "loss"), (accuracy, "rewards/accuracies"), (margin, "rewards/margins")):
        _draw_train(panel, _curve(records, name), TRAIN, label="train")
        for number, prefix in enumerate(prefixes):
            _draw_eval(panel, _curve(records, prefix + name), number, label=prefix.strip("_"))
    for side, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
        _draw_train(logps, _curve(records, f"logps_mean/{side}"), color, label=side)
        for number, prefix in enumerate(prefixes):
            _draw_eval(logps, _curve(records, f"{prefix}logps_mean/{side}"), number, color=color)
    _draw_train(norm, _curve(records, "grad_norm"), TRAIN, label="before clipping")
    _draw_train(rate, _curve(records, "learning_rate"), TRAIN, smooth=False)

    accuracy.axhline(0.5, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    margin.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    accuracy.set_ylim(min(0.45, accuracy.get_ylim()[0]), 1.02)
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
    for panel in axes.flat:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(edgecolor="white", framealpha=0.85, fontsize=9.5, labelcolor=INK)
    for panel in axes[1]:
        panel.set_xlabel("optimizer step", color=INK)
    loss.set_xlim(-0.02 * last["step"] - 0.1, 1.02 * last["step"] + 0.1)
    return figure


def _dress(panel: Axes, heading: str) -> None:
    panel.set_title(heading, loc="left", fontsize=11.5, color=INK, pad=8)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(FAINT)
    panel.grid(axis="y", color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, labelsize=9.5, length=0, labelbottom=True)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _draw_train(
    panel: Axes, curve: Curve, color: str, *, label: str | None = None, smooth: bool = True
) -> None:
    if smooth and len(curve.steps) > SMOOTH_ABOVE:
        panel.plot(curve.steps, curve.values, color=color, alpha=0.25, linewidth=0.9)
        curve = curve.smoothed()
    if len(curve.steps):
        marker = "." if len(curve.steps) == 1 else ""
        panel.plot(curve.steps, curve.values, color=color, linewidth=1.8, marker=marker, label=label)


def _draw_eval(
    panel: Axes, curve: Curve, number: int, *, color: str | None = None, label: str | None = None
) -> None:
    """An evaluation set has its marker in all panels, and its colour where none is given."""
    default_color, marker = EVAL[number % len(EVAL)]
    if len(curve.steps):
        panel.plot(
            curve.steps,
            curve.values,
            color=color or default_color,
            linewidth=1.2,
            linestyle=(0, (4, 2)),
            marker=marker,
            markersize=6,
            markeredgecolor="white",
            label=label,
        )
