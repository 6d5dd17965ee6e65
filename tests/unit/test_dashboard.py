"""The Grafana dashboard: its form, that it asks for metrics that exist, and what is written about watching a run."""

import inspect
import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from ray.train.v2._internal import exceptions as ray_exceptions

import ray_prefopt
from ray_prefopt.training.gauges import METRICS, PREFIX
from tests.kustomize import render

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
FILE = CLUSTER / "grafana" / "ray_prefopt.json"
OURS = {metric.name: metric for metric in METRICS.values()}
OF_RAY = {PREFIX + name for name in METRICS_GAUGES} | set(
    re.findall(rf"\b{PREFIX}\w+", inspect.getsource(default_dashboard_panels))
)
"""What Ray's agent measures of a node, and what Ray's own dashboard asks for."""


class Strict(BaseModel):
    """What Grafana reads of a dashboard of schema 39, as far as this one uses it."""

    model_config = ConfigDict(extra="forbid")


class DataSource(Strict):
    type: Literal["prometheus"]
    uid: Literal["${datasource}"]


class Target(Strict):
    refId: str = Field(pattern="^[A-Z]$")
    datasource: DataSource
    expr: str = Field(min_length=1)
    legendFormat: str


class Position(Strict):
    x: int = Field(ge=0)
    y: int = Field(ge=0)
    w: int = Field(gt=0)
    h: int = Field(gt=0)

    def cells(self) -> set[tuple[int, int]]:
        return set(itertools.product(range(self.x, self.x + self.w), range(self.y, self.y + self.h)))


class Row(Strict):
    id: int
    type: Literal["row"]
    title: str
    collapsed: Literal[False]
    gridPos: Position
    panels: list[Any] = Field(max_length=0)


class Threshold(Strict):
    color: str
    value: float | None


class Thresholds(Strict):
    mode: Literal["absolute"]
    steps: list[Threshold]


class Defaults(Strict):
    unit: Literal["Bps", "bytes", "none", "percent", "percentunit", "s"]
    min: float | None = None
    max: float | None = None
    thresholds: Thresholds | None = None


class FieldConfig(Strict):
    defaults: Defaults
    overrides: list[Any] = Field(max_length=0)


class Shown(Strict):
    id: int
    title: str = Field(min_length=1)
    description: str = Field(pattern=r"\.$")
    gridPos: Position
    datasource: DataSource
    targets: list[Target] = Field(min_length=1)
    fieldConfig: FieldConfig


class Legend(Strict):
    displayMode: Literal["list"]
    placement: Literal["bottom"]


class Tooltip(Strict):
    mode: Literal["multi"]
    sort: Literal["desc"]


class SeriesOptions(Strict):
    legend: Legend
    tooltip: Tooltip


class Series(Shown):
    type: Literal["timeseries"]
    options: SeriesOptions


class Reduced(Strict):
    calcs: list[Literal["lastNotNull"]]
    fields: str
    values: bool


class StatOptions(Strict):
    reduceOptions: Reduced
    colorMode: Literal["none", "value"]
    graphMode: Literal["none"]
    textMode: Literal["auto"]


class Stat(Shown):
    type: Literal["stat"]
    options: StatOptions


class SourceVariable(Strict):
    name: Literal["datasource"]
    label: str
    type: Literal["datasource"]
    query: Literal["prometheus"]


class Query(Strict):
    query: str
    refId: str


class Current(Strict):
    text: list[str]
    value: list[str]


class QueryVariable(Strict):
    name: Literal["run"]
    label: str
    type: Literal["query"]
    datasource: DataSource
    query: Query
    definition: str
    refresh: Literal[1, 2]
    sort: int
    includeAll: bool
    multi: bool
    allValue: str
    current: Current


class Templating(Strict):
    list: tuple[SourceVariable, QueryVariable]


class Period(Strict):
    from_: str = Field(alias="from")
    to: str


class Annotations(Strict):
    list: tuple[()]


class Dashboard(Strict):
    uid: str = Field(max_length=40)
    title: str
    description: str
    tags: list[str]
    schemaVersion: Literal[39]
    version: int
    editable: bool
    graphTooltip: Literal[0, 1, 2]
    timezone: str
    refresh: str
    time: Period
    templating: Templating
    annotations: Annotations
    panels: list[Annotated[Row | Series | Stat, Field(discriminator="type")]]


@pytest.fixture(scope="module")
def dashboard() -> Dashboard:
    return Dashboard.model_validate_json(FILE.read_text())


def shown(dashboard: Dashboard) -> list[Series | Stat]:
    return [panel for panel in dashboard.panels if not isinstance(panel, Row)]


def test_a_wrong_key_is_caught() -> None:
    text = FILE.read_text().replace('"expr"', '"expression"', 1)
    with pytest.raises(ValidationError, match="expression\n  Extra inputs are not permitted"):
        Dashboard.model_validate_json(text)


def test_panels_have_ids_and_places_of_their_own(dashboard: Dashboard) -> None:
    ids = [panel.id for panel in dashboard.panels]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard.panels:
        cells = panel.gridPos.cells()
        assert panel.gridPos.x + panel.gridPos.w <= 24
        assert not cells & taken, panel.title
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken))  # no gaps, which Grafana would close
    for panel in shown(dashboard):
        letters = [target.refId for target in panel.targets]
        assert len(set(letters)) == len(letters), panel.title


def test_every_query_asks_for_metrics_that_exist(dashboard: Dashboard) -> None:
    asked: set[str] = set()
    for panel in shown(dashboard):
        for target in panel.targets:
            found = set(re.findall(rf"\b{PREFIX}\w+", target.expr))
            assert found, target.expr
            assert found <= OURS.keys() | OF_RAY, target.expr
            assert target.expr.count("(") == target.expr.count(")")
            asked |= found
    assert asked >= OURS.keys()
    _, run = dashboard.templating.list
    assert run.definition == run.query.query == "label_values(ray_prefopt_starts, run)"


def test_our_metrics_are_those_of_the_chosen_runs_by_tags_they_have(dashboard: Dashboard) -> None:
    for panel in shown(dashboard):
        for target in panel.targets:
            for name in set(re.findall(r"\bray_prefopt_\w+", target.expr)):
                tags = OURS[name].tags
                assert re.search(rf'\b{name}{{run=~"\$run"}}', target.expr), target.expr
                used = set(re.findall(r"{{(\w+)}}", target.legendFormat))
                used |= set(re.findall(r"by \((\w+)\)", target.expr))
                assert used <= set(tags), target.legendFormat


# --- What is written about it ---


def test_the_page_has_every_metric() -> None:
    page = (CLUSTER / "README.md").read_text()
    for metric in METRICS.values():
        by_rank = " By `rank`." if "rank" in metric.tags else ""
        assert f"| `{metric.name}` | {metric.description}{by_rank} |\n" in page


def test_what_an_operator_sees_is_what_is_said() -> None:
    """Every message of the table is in our source or Ray's, and every panel on the dashboard."""
    page = (CLUSTER / "README.md").read_text()
    table = page.split("### What an operator sees")[1].split("\n## ")[0]
    source = "".join(path.read_text() for path in sorted(Path(ray_prefopt.__file__).parent.rglob("*.py")))
    source += inspect.getsource(ray_exceptions)
    # as one line: implicit concatenation and fields taken away
    said = re.sub(r"{[^{}]*}", "...", re.sub(r'"\s+f?"', "", source))
    said = re.sub(r"%[dgs]", "...", said)
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| ")]
    messages = [text for row in rows[1:] for text in re.findall(r"`([^`]+)`", row[1]) if " " in text]
    assert len(messages) >= 10
    for message in messages:
        if not message.startswith("run."):
            parts = [part for part in message.split("...") if part.strip()]
            assert re.search(r"[^\n]*?".join(map(re.escape, parts)), said), message
    titles = {panel.title for panel in Dashboard.model_validate_json(FILE.read_text()).panels}
    assert set(re.findall(r"\*([A-Z][\w ]+)\*", table)) <= titles


def test_prometheus_finds_and_reaches_the_pods() -> None:
    monitor = yaml.safe_load((CLUSTER / "grafana" / "podmonitor.yaml").read_text())
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"
    objects = {item["kind"]: item for item in render(CLUSTER / "kuberay" / "overlays" / "interactive")}
    spec = objects["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        labels = group["template"]["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    rules = objects["NetworkPolicy"]["spec"]["ingress"]
    assert {"protocol": "TCP", "port": 8080} in [port for rule in rules for port in rule.get("ports", [])]
