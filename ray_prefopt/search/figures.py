"""The pictures of the report, by plotly; each is a heading, a note on how to read it, and a figure."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from optuna.distributions import CategoricalDistribution, FloatDistribution
from plotly.subplots import make_subplots

from ray_prefopt.search.findings import Findings, is_logarithmic, position
from ray_prefopt.search.picture import COLORS
from ray_prefopt.search.space import label, show
from ray_prefopt.search.table import Group
from ray_prefopt.search_config import Dimension
from ray_prefopt.training.plots import CHOSEN, FAINT, INK, REJECTED, TRAIN

SCALE: list[tuple[float, str]] = [(0.0, "#dbe3ef"), (0.5, "#6d8fc4"), (1.0, "#1f3a6e")]
PER_ROW = 3
ENOUGH = 8
"""Finished points from which the importance of parameters is estimated."""
CELLS = 40
"""Of the contour, along each side."""
Entry = tuple[str, str, go.Figure]


def all_figures(found: Findings) -> Iterator[Entry]:
    """Those that the search has the trials for."""
    measured = [group for group in found.groups if _is_finite(group.mean(found.metric))]
    if not measured:
        return
    yield by_parameter(found, measured)
    if len(found.space.dimensions) > 1:
        yield parallel_coordinates(found, measured)
    pair = contour_pair(found)
    if pair is not None:
        yield contour(found, pair)
    yield learning_curves(found)
    weights = importance(found)
    if weights:
        yield importances(weights, len(found.finished()))
    if any(len(group.rows) > 1 for group in found.groups):
        yield spread(found, measured)
    yield likelihood(found, measured)
    yield cost(found)


def _is_finite(value: float | None) -> bool:
    """Whether it can be drawn."""
    return value is not None and math.isfinite(value)


def _layout(figure: go.Figure, height: int, **more: Any) -> go.Figure:
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 60, "r": 20, "t": 30, "b": 50},
        font={"color": INK, "size": 12}, colorway=[TRAIN, CHOSEN, REJECTED], **more,
    )  # fmt: skip
    return figure


def _hover(found: Findings, group: Group) -> str:
    lines = [f"<b>{group.rows[0].name.partition('-seed-')[0]}</b> {group.status}"]
    lines += [f"{name} {show(value)}" for name, value in group.point.items()]
    mean, std = group.mean(found.metric), group.std(found.metric)
    lines.append(f"{found.metric} {mean:.4f}" + ("" if std is None else f" ± {std:.4f}"))
    return "<br>".join(lines)


def by_parameter(found: Findings, measured: Sequence[Group]) -> Entry:
    names = list(found.space.dimensions)
    rows = math.ceil(len(names) / PER_ROW)
    figure = make_subplots(rows, min(len(names), PER_ROW), shared_yaxes=True, horizontal_spacing=0.04)
    for index, name in enumerate(names):
        place = {"row": index // PER_ROW + 1, "col": index % PER_ROW + 1}
        for status, color in COLORS.items():
            shown = [group for group in measured if group.status == status and name in group.point]
            if not shown:
                continue
            stds = [group.std(found.metric) or 0.0 for group in shown]
            figure.add_scatter(
                x=[_axis_value(found.space.dimensions[name], group.point[name]) for group in shown],
                y=[group.mean(found.metric) for group in shown],
                error_y={"type": "data", "array": stds, "visible": any(stds)},
                mode="markers", name=status, legendgroup=status, showlegend=index == 0,
                marker={"color": color, "size": 9, "symbol": "x-thin" if status == "stopped" else "circle",
                        "line": {"color": color if status == "stopped" else "white", "width": 1}},
                text=[_hover(found, group) for group in shown], hovertemplate="%{text}<extra></extra>", **place,
            )  # fmt: skip
        values = {recipe.values[name] for recipe in found.space.recipes if name in recipe.values}
        for value in sorted(values):
            figure.add_vline(x=value, line={"color": CHOSEN, "dash": "dot", "width": 1}, **place)
        kind = "log" if is_logarithmic(found.space.dimensions[name]) else None
        figure.update_xaxes(title=name, type=kind, exponentformat="e", **place)
    figure.update_yaxes(title=found.metric, col=1)
    note = "One mark per point, by how its trials ended."
    note += " Dotted: published values." if found.space.recipes else ""
    return "Metric against each parameter", note, _layout(figure, 90 + 290 * rows)


def _axis_value(dimension: Dimension, value: Any) -> Any:
    return value if dimension.bounds is not None or isinstance(value, int | float) else show(value)


def parallel_coordinates(found: Findings, measured: Sequence[Group]) -> Entry:
    names = list(found.space.dimensions)
    values = [group.mean(found.metric) or 0.0 for group in measured]
    low, high = min(values), max(values)
    figure = go.Figure()
    for group, value in sorted(zip(measured, values, strict=True), key=lambda pair: pair[1]):
        heights = [
            position(found.space.dimensions[name], group.point[name]) if name in group.point else None
            for name in names
        ]
        share = (value - low) / (high - low) if high > low else 1.0
        figure.add_scatter(
            x=[*names, found.metric], y=[*heights, share], mode="lines+markers", showlegend=False,
            line={"color": _shade(share), "width": 3 if group is found.best else 1.5},
            marker={"size": 5}, opacity=1.0 if group.status == "finished" else 0.5,
            text=[_hover(found, group)] * (len(names) + 1), hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    for name in names:
        dimension = found.space.dimensions[name]
        ends = dimension.bounds or ((dimension.values or [""])[0], (dimension.values or [""])[-1])
        _ends(figure, name, ends)
    _ends(figure, found.metric, (float(f"{low:.4g}"), float(f"{high:.4g}")))
    figure.update_yaxes(visible=False, range=[-0.12, 1.12])
    figure.update_xaxes(showgrid=True, gridcolor=FAINT, type="category")
    note = "A line per point through its values, dark for the best; each axis as its values are drawn."
    return "Parallel coordinates", note, _layout(figure, 380)


def _ends(figure: go.Figure, name: str, ends: tuple[Any, Any]) -> None:
    for y, value, shift in ((0.0, ends[0], -14), (1.0, ends[1], 14)):
        figure.add_annotation(x=name, y=y, text=show(value), showarrow=False, yshift=shift, font={"size": 11})


def _shade(share: float) -> str:
    """Between the ends of SCALE."""
    colors = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for _, color in SCALE]
    low, high, part = (
        (colors[0], colors[1], 2 * share) if share < 0.5 else (colors[1], colors[2], 2 * share - 1)
    )
    return "rgb(" + ",".join(str(round(a + (b - a) * part)) for a, b in zip(low, high, strict=True)) + ")"


def contour_pair(found: Findings) -> tuple[str, str] | None:
    """The two numbers that are drawn against each other: beta and its margin when both are varied."""
    numbers = [
        name
        for name, dimension in found.space.dimensions.items()
        if all(isinstance(value, int | float) for value in dimension.bounds or dimension.values or [])
    ]
    wanted = ("loss.beta", "loss.gamma_beta_ratio")
    chosen = [
        *(name for name in wanted if name in numbers),
        *(name for name in numbers if name not in wanted),
    ]
    if len(chosen) < 2:
        return None
    pair = chosen[0], chosen[1]
    points = {tuple(group.point[name] for name in pair) for group in _with_both(found, pair)}
    return pair if len(points) > 3 else None


def _with_both(found: Findings, pair: tuple[str, str]) -> list[Group]:
    """The finished points that have these two, and a number for the metric."""
    return [
        group
        for group in found.finished()
        if all(name in group.point for name in pair) and _is_finite(group.mean(found.metric))
    ]


def contour(found: Findings, pair: tuple[str, str]) -> Entry:
    dimensions = [found.space.dimensions[name] for name in pair]
    groups = _with_both(found, pair)
    z = np.array([group.mean(found.metric) for group in groups])
    spots = np.array(
        [[position(d, g.point[n]) for d, n in zip(dimensions, pair, strict=True)] for g in groups], float
    )
    axes = [np.array(sorted(set(spots[:, side]))) for side in (0, 1)]
    is_grid = len(axes[0]) * len(axes[1]) == len({tuple(spot) for spot in spots})
    if not is_grid:
        axes = [np.linspace(0, 1, CELLS)] * 2
    surface = smooth(spots, z, axes[0], axes[1], nearest=is_grid)
    figure = go.Figure(
        go.Contour(
            x=[_at(dimensions[0], x) for x in axes[0]], y=[_at(dimensions[1], y) for y in axes[1]], z=surface,
            colorscale=SCALE, colorbar={"title": {"text": found.metric, "side": "right"}},
            contours={"showlabels": True}, hoverinfo="skip",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=[group.point[pair[0]] for group in groups], y=[group.point[pair[1]] for group in groups],
        mode="markers", marker={"color": "white", "size": 8, "line": {"color": INK, "width": 1}},
        text=[_hover(found, group) for group in groups], hovertemplate="%{text}<extra></extra>", showlegend=False,
    )  # fmt: skip
    kinds = ["log" if is_logarithmic(dimension) else "linear" for dimension in dimensions]
    figure.update_xaxes(title=pair[0], type=kinds[0])
    figure.update_yaxes(title=pair[1], type=kinds[1])
    note = "Finished points" + (" of the grid." if is_grid else "; between them the surface is interpolated.")
    return f"{pair[0]} and {pair[1]}", note, _layout(figure, 460)


def _at(dimension: Dimension, share: float) -> float:
    """The number at a position: the inverse of `findings.position`."""
    if dimension.values is not None:
        return float(dimension.values[round(share * (len(dimension.values) - 1))])
    assert dimension.bounds is not None
    low, high = dimension.bounds
    return float(low * (high / low) ** share if dimension.loguniform else low + share * (high - low))


def smooth(
    spots: np.ndarray, values: np.ndarray, x: np.ndarray, y: np.ndarray, *, nearest: bool
) -> np.ndarray:
    """Values (N,) at spots (N, 2) on the lattice of x (X,) and y (Y,): weighted by inverse distance; (Y, X).

    >>> spots, values = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([1.0, 3.0])
    >>> smooth(spots, values, np.array([0.0, 0.5, 1.0]), np.array([0.0]), nearest=False).round(3).tolist()
    [[1.0, 2.0, 3.0]]
    """
    lattice = np.stack(np.meshgrid(x, y), axis=-1)
    distances = ((lattice[:, :, None, :] - spots) ** 2).sum(-1)
    weights = 1 / (distances + 1e-9) ** (20 if nearest else 1.5)
    return np.asarray((weights * values).sum(-1) / weights.sum(-1))


def learning_curves(found: Findings) -> Entry:
    figure = go.Figure()
    best = {row.name for row in found.best.rows} if found.best else set()
    for row in found.rows:
        records = found.curves.get(row.name, [])
        if not records:
            continue
        figure.add_scatter(
            x=[record["step"] for record in records], y=[record[found.metric] for record in records],
            mode="lines+markers", name=row.name,
            line={"color": CHOSEN if row.name in best else COLORS[row.status], "width": 3 if row.name in best else 1.2},
            marker={"size": [0.1] * (len(records) - 1) + [8], "symbol": "x" if row.status == "stopped" else "circle"},
            hovertemplate=f"{row.name}<br>step %{{x}}: %{{y:.4f}}<extra></extra>", showlegend=False,
        )  # fmt: skip
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title=found.metric)
    note = "Evaluations of every trial; green: the winner, grey with a cross: stopped early."
    return "Learning curves", note, _layout(figure, 400)


def importance(found: Findings) -> dict[str, float]:
    """Share of the metric's variance that each parameter explains (fANOVA); none with too few points for it."""
    finished = [group for group in found.finished() if _is_finite(group.mean(found.metric))]
    names = [name for name in found.space.dimensions if len({show(g.point.get(name)) for g in finished}) > 1]
    finished = [group for group in finished if all(name in group.point for name in names)]
    values = [group.mean(found.metric) for group in finished]
    if len(finished) < ENOUGH or len(names) < 2 or len(set(values)) < 2:
        return {}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    optuna.logging.set_verbosity(verbosity)
    kinds = {name: _distribution(found.space.dimensions[name]) for name in names}
    for group, value in zip(finished, values, strict=True):
        params = {name: label(group.point[name]) for name in names}
        study.add_trial(optuna.create_trial(params=params, distributions=kinds, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _distribution(dimension: Dimension) -> Any:
    if dimension.values is not None:
        return CategoricalDistribution([label(value) for value in dimension.values])
    assert dimension.bounds is not None
    low, high = dimension.bounds
    return FloatDistribution(low, high, log=dimension.loguniform is not None)


def importances(weights: dict[str, float], points: int) -> Entry:
    names = sorted(weights, key=lambda name: weights[name])
    figure = go.Figure(
        go.Bar(
            x=[weights[name] for name in names], y=names, orientation="h", marker={"color": TRAIN},
            text=[f"{weights[name]:.0%}" for name in names],
        )
    )  # fmt: skip
    figure.update_xaxes(title="share of the variance", tickformat=".0%")
    note = f"fANOVA over {points} finished points" + (
        "; so few of them give a rough guess." if points < 30 else "."
    )
    return "Importance", note, _layout(figure, 140 + 40 * len(names))


def spread(found: Findings, measured: Sequence[Group]) -> Entry:
    figure = go.Figure()
    shown = [group for group in measured if len(group.rows) > 1][:20]
    names = [group.rows[0].name.partition("-seed-")[0] for group in shown]
    for group, name in zip(shown, names, strict=True):
        figure.add_scatter(
            x=group.values(found.metric), y=[name] * len(group.values(found.metric)), mode="markers",
            marker={"color": TRAIN, "size": 8, "symbol": "line-ns-open"}, showlegend=False,
            hovertemplate="%{x:.4f}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[group.mean(found.metric) for group in shown], y=names, mode="markers", name="mean and std",
        error_x={"type": "data", "array": [group.std(found.metric) or 0.0 for group in shown]},
        marker={"color": CHOSEN, "size": 9},
        text=[_hover(found, group) for group in shown], hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title=found.metric)
    figure.update_yaxes(autorange="reversed", type="category")
    note = "Each seed of the best points, their mean and standard deviation: smaller differences are luck."
    return "Spread over seeds", note, _layout(figure, 130 + 28 * len(shown))


def likelihood(found: Findings, measured: Sequence[Group]) -> Entry:
    chosen = f"{found.prefix}logps_mean/chosen"
    figure = go.Figure(
        go.Scatter(
            x=[group.mean(chosen) for group in measured], y=[group.mean(found.metric) for group in measured],
            mode="markers", marker={"color": [COLORS[group.status] for group in measured], "size": 9},
            text=[_hover(found, group) for group in measured], hovertemplate="%{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title=chosen)
    figure.update_yaxes(title=found.metric)
    note = "Mean log-probability per token of the chosen completions at the last evaluation: points far to the left "
    note += "have unlearned to write, whatever their accuracy."
    return "Likelihood of the chosen completions", note, _layout(figure, 360)


def cost(found: Findings) -> Entry:
    figure = go.Figure()
    for status, color in COLORS.items():
        rows = [row for row in found.rows if row.status == status]
        if rows:
            figure.add_bar(
                x=[row.name for row in rows], y=[row.seconds * found.workers / 60 for row in rows],
                name=status, marker={"color": color}, hovertemplate="%{x}: %{y:.1f} min<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=[row.name for row in found.rows]
    )
    figure.update_yaxes(title="worker-minutes")
    hours = sum(row.seconds for row in found.rows) * found.workers / 3600
    note = f"{hours:.2f} worker-hours in all."
    whole = [row.seconds for row in found.rows if row.status == "finished"]
    stopped = [row for row in found.rows if row.status == "stopped" and row.progress > 0]
    if whole and stopped:
        saved = sum(max(sum(whole) / len(whole) - row.seconds, 0) for row in stopped) * found.workers / 3600
        note += f" Stopping early has saved about {saved:.2f}."
    return "Cost", note, _layout(figure, 320)
