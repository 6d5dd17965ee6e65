"""The report of a search, from its folder alone: one HTML file without references to anything else, and a picture."""

import html
import json
import shlex
from collections import Counter
from typing import Any

from fsspec.core import url_to_fs
from plotly.offline import get_plotlyjs

from ray_prefopt.search.figures import all_figures
from ray_prefopt.search.findings import Findings, position, read_findings
from ray_prefopt.search.picture import draw_picture
from ray_prefopt.search.space import show
from ray_prefopt.storage import write_text

NAME, PICTURE = "report.html", "report.png"
EDGE = 0.03
"""Share of a range next to its ends: a best value there may be better still outside."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #2b2f36; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .3rem }} p {{ margin: .3rem 0 }}
.note {{ color: #6a7078 }} pre {{ background: #f4f5f7; padding: .7rem; overflow-x: auto }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: 13px; white-space: nowrap }}
th, td {{ text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #d9dce1 }} th {{ cursor: pointer }}
tr.best {{ background: #e8f4ee }}
</style>
<script>{plotly}</script></head><body>
{body}
<script>
for (const head of document.querySelectorAll("th")) head.onclick = () => {{
  const body = head.closest("table").tBodies[0], column = head.cellIndex, number = (text) => parseFloat(text);
  const value = (row) => row.cells[column].textContent, up = head.dataset.up !== "1";
  head.dataset.up = up ? "1" : "0";
  const order = (a, b) => isNaN(number(a) - number(b)) ? a.localeCompare(b) : number(a) - number(b);
  [...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b))).forEach((row) => body.append(row));
}};
</script>
</body></html>
"""


def write_report(folder: str) -> str:
    """Write report.html and report.png of a search, finished or not; returns the path of the page.

    Raises CheckpointError when the folder holds no search.
    """
    found = read_findings(folder)
    fs, path = url_to_fs(folder)
    write_text(fs, f"{path}/{NAME}", page(found))
    with fs.open(f"{path}/{PICTURE}", "wb") as file:
        draw_picture(found).savefig(file, dpi=144, format="png")
    return f"{folder}/{NAME}"


def page(found: Findings) -> str:
    """The whole page."""
    body = [
        f"<h1>{html.escape(found.name)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in verdict(found)),
    ]
    if found.best is not None:
        body.append(f"<pre>{html.escape(command(found))}</pre>")
    for heading, note, figure in all_figures(found):
        drawn = figure.to_html(
            full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
        )
        body += [f"<h2>{heading}</h2>", f'<p class="note">{note}</p>', drawn]
    body += ["<h2>Trials</h2>", '<p class="note">Click a heading to sort.</p>', _table(found)]
    advice = next_space(found)
    if advice:
        body += ["<h2>A narrower space</h2>", f'<p class="note">{advice[0]}</p>', f"<pre>{advice[1]}</pre>"]
    return PAGE.format(title=html.escape(found.name), plotly=get_plotlyjs(), body="\n".join(body))


def verdict(found: Findings) -> list[str]:
    """The outcome in sentences."""
    counted = Counter(row.status for row in found.rows)
    hours = sum(row.seconds for row in found.rows) * found.workers / 3600
    lines = [
        f"{len(found.rows)} trials: {', '.join(f'{number} {status}' for status, number in counted.items())}; "
        f"{hours:.2f} worker-hours."
    ]
    best = found.best
    if best is None:
        return [*lines, "No trial has come to its end yet, so there is no winner."]
    std = best.std(found.metric)
    spread = f" ± {std:.4f} over {len(best.rows)} seeds" if std is not None else ""
    values = ", ".join(f"{name} {show(value)}" for name, value in best.point.items())
    lines.insert(
        0, f"Best: {best.rows[0].name} with {values}: {found.metric} {best.mean(found.metric):.4f}{spread}."
    )
    for recipe in found.space.recipes:
        group = next(
            (group for group in found.finished() if recipe.values.items() <= group.point.items()), None
        )
        if group is not None:
            lines.append(f"The published recipe {recipe.name} came to {group.mean(found.metric):.4f}.")
    lines += [
        f"{name} {show(value)} lies at the {side} end of its range: better ones may lie beyond it."
        for name, value, side in at_the_edge(found)
    ]
    return lines


def at_the_edge(found: Findings) -> list[tuple[str, float, str]]:
    """Values of the winner next to an end of their range."""
    edges = []
    for name, value in (found.best.point if found.best else {}).items():
        dimension = found.space.dimensions[name]
        if dimension.bounds is None:
            continue
        share = position(dimension, value)
        if min(share, 1 - share) < EDGE:
            edges.append((name, value, "lower" if share < 0.5 else "upper"))
    return edges


def command(found: Findings) -> str:
    """What trains the winner anew."""
    assert found.best is not None
    flags = shlex.join(
        word for name, value in found.best.point.items() for word in (f"--{name}", show_exactly(value))
    )
    return f"ray-prefopt train -c best_config.yaml    # or the base config with {flags}"


def show_exactly(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def next_space(found: Findings) -> tuple[str, str] | None:
    """Ranges that hold the better quarter of the points, as a note and YAML; None with too few of them."""
    finished = found.finished()
    top = finished[: len(finished) // 4]
    if len(top) < 3:
        return None
    lines = []
    for name, dimension in found.space.dimensions.items():
        values = [group.point[name] for group in top if name in group.point]
        if dimension.bounds is None or len(values) < 2:
            continue
        kind = next(kind for kind in ("uniform", "loguniform", "quniform") if getattr(dimension, kind))
        ends = [float(f"{min(values):.3g}"), float(f"{max(values):.3g}"), *(getattr(dimension, kind)[2:])]
        if ends[0] == ends[1]:
            continue
        lines.append(f"    {name}: {{{kind}: {json.dumps(ends)}}}")
    if not lines:
        return None
    note = f"What the best {len(top)} of {len(finished)} points span, to search once more."
    return note, "\n".join(["search:", "  space:", *lines])


def _table(found: Findings) -> str:
    names = list(found.space.dimensions)
    head = [
        "rank",
        "trial",
        *names,
        "seed",
        found.metric,
        "mean",
        "std",
        "status",
        "step",
        "seconds",
        "reason",
    ]
    lines = []
    for rank, group in enumerate(found.groups, start=1):
        for row in group.rows:
            std = group.std(found.metric)
            cells = [
                str(rank),
                row.name,
                *(show(row.point[name]) if name in row.point else "" for name in names),
                str(row.seed),
                _number(row.metrics.get(found.metric)),
                _number(group.mean(found.metric)),
                _number(std),
                row.status,
                str(row.step),
                f"{row.seconds:.0f}",
                (row.error or "").partition("\n")[0],
            ]
            kind = ' class="best"' if group is found.best else ""
            lines.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
