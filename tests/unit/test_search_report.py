"""The report, from a folder that is written here by hand, in a real browser where there is one."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from ray_prefopt.errors import CheckpointError
from ray_prefopt.search.figures import contour_pair, importance
from ray_prefopt.search.findings import read_findings
from ray_prefopt.search.report import at_the_edge, next_space, verdict, write_report
from ray_prefopt.search.table import Row
from ray_prefopt.search_config import TuneConfig

METRIC = "eval_logps_mean/accuracies"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


def write_search(
    folder: Path, points: list[dict[str, Any]], search: dict[str, Any], seeds: tuple[int, ...] = (1,)
) -> str:
    """A finished search whose metric is best where beta is 3 and the margin 0.5."""
    sections = {"model": {"path": "m"}, "data": {"train": "a", "eval": "b"}, "search": search}
    run = {"name": folder.name, "storage_path": str(folder.parent)}
    folder.mkdir()
    (folder / "search.json").write_text(TuneConfig.model_validate({**sections, "run": run}).model_dump_json())
    rows = []
    for number, point in enumerate(points):
        for seed in seeds:
            name = f"trial-{number:03d}" + (f"-seed-{seed}" if len(seeds) > 1 else "")
            best = (
                0.8
                - 0.02 * (point["loss.beta"] - 3) ** 2
                - 0.1 * (point.get("loss.gamma_beta_ratio", 0) - 0.5) ** 2
            )
            curve = [
                {
                    "step": step,
                    METRIC: best - 0.2 / step + 0.001 * seed,
                    "eval_logps_mean/chosen": -1.0,
                    "eval_logps_mean/rejected": -1.2,
                }
                for step in (1, 2, 4, 8)
            ]
            (folder / name).mkdir()
            (folder / name / "metrics.jsonl").write_text(
                "".join(json.dumps(record) + "\n" for record in curve)
            )
            metrics = {key: value for key, value in curve[-1].items() if key != "step"}
            rows.append(
                Row(
                    name,
                    point,
                    seed,
                    "finished",
                    f"{folder.name}/{name}",
                    curve[-1][METRIC],
                    8,
                    1.0,
                    30.0,
                    metrics,
                )
            )
    (folder / "trials.json").write_text(json.dumps([asdict(row) for row in rows]))
    return str(folder)


GRID = {
    "space": {"loss.beta": {"grid": [1, 3, 5]}, "loss.gamma_beta_ratio": {"grid": [0.0, 0.5, 1.0]}},
    "seeds": [1, 2],
}


@pytest.fixture(scope="module")
def gridded(tmp_path_factory: pytest.TempPathFactory) -> str:
    points = [
        {"loss.beta": beta, "loss.gamma_beta_ratio": ratio} for beta in (1, 3, 5) for ratio in (0.0, 0.5, 1.0)
    ]
    return write_search(tmp_path_factory.mktemp("grid") / "sweep", points, GRID, seeds=(1, 2))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    points = [
        {"loss.beta": float(rng.uniform(2, 10)), "loss.gamma_beta_ratio": float(rng.uniform(0, 1))}
        for _ in range(16)
    ]
    points.append({"loss.beta": 2.5, "loss.gamma_beta_ratio": 0.55})
    space = {"loss.beta": {"uniform": [2, 10]}, "loss.gamma_beta_ratio": {"uniform": [0, 1]}}
    return write_search(
        tmp_path_factory.mktemp("drawn") / "sweep", points, {"space": space, "preset": "simpo"}
    )


def test_the_verdict_names_winner_spread_and_recipes(gridded: str, drawn: str) -> None:
    first, second, *_ = verdict(read_findings(gridded))
    expected = 0.8 - 0.2 / 8 + 0.0015
    assert first == (
        f"Best: trial-004-seed-1 with loss.beta 3, loss.gamma_beta_ratio 0.5: {METRIC} {expected:.4f} "
        "± 0.0007 over 2 seeds."
    )
    assert second == "18 trials: 18 finished; 0.15 worker-hours."


def test_an_edge_and_a_narrower_space(drawn: str) -> None:
    found = read_findings(drawn)
    note, text = next_space(found) or ("", "")
    assert note == "What the best 4 of 17 points span, to search once more."
    low, high = json.loads(re.findall(r"loss.beta: {uniform: (.*)}", text)[0])
    assert 2 <= low < 3 < high < 5
    assert at_the_edge(found) == []


def test_importance_finds_what_matters(drawn: str) -> None:
    weights = importance(read_findings(drawn))
    assert weights["loss.beta"] > 0.8
    assert sum(weights.values()) == pytest.approx(1)


def test_beta_and_the_margin_are_drawn_against_each_other(gridded: str) -> None:
    assert contour_pair(read_findings(gridded)) == ("loss.beta", "loss.gamma_beta_ratio")


def test_what_no_point_has_is_not_drawn(tmp_path: Path) -> None:
    points = [{"loss.kind": "cpo", "loss.beta": beta} for beta in (2.0, 3.0, 4.0, 5.0, 6.0)]
    space = {
        "loss.kind": {"choice": ["simpo", "cpo"]},
        "loss.beta": {"uniform": [2, 10]},
        "loss.gamma_beta_ratio": {"uniform": [0, 1], "when": {"loss.kind": "simpo"}},
    }
    folder = write_search(tmp_path / "sweep", points, {"space": space})
    assert contour_pair(read_findings(folder)) is None
    assert Path(write_report(folder)).exists()


def test_what_is_no_number_is_not_drawn(drawn: str, tmp_path: Path) -> None:
    """Of a metric that was NaN or infinite, such as a loss that has overflowed."""
    shutil.copytree(drawn, tmp_path / "sweep")
    rows = json.loads((tmp_path / "sweep" / "trials.json").read_text())
    for row, value in zip(rows[1:4], (math.nan, math.inf, math.nan), strict=True):
        row["metrics"][METRIC] = value
    rows[3]["status"] = "stopped"
    (tmp_path / "sweep" / "trials.json").write_text(json.dumps(rows))
    assert Path(write_report(str(tmp_path / "sweep"))).exists()
    assert importance(read_findings(str(tmp_path / "sweep")))["loss.beta"] > 0.8


def test_a_folder_without_trials(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no trials: give the folder of a search that has begun"):
        write_report(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gridded", "drawn"])
def test_a_browser_draws_every_picture_without_complaint(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    report = write_report(request.getfixturevalue(name))
    assert Path(report).with_name("report.png").stat().st_size > 20_000
    text = Path(report).read_text().replace(get_plotlyjs(), "")
    assert not re.findall(r'(?:src|href)="https?:', text)
    pictures = text.count("plotly-graph-div")
    assert pictures >= 7
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium is installed: apt-get install chromium-headless-shell")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--virtual-time-budget=10000", "--window-size=1150,4000", f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{report}"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    assert len(re.findall(r'class="[^"]*svg-container"', done.stdout)) == pictures
    assert done.stdout.count('class="main-svg"') >= pictures
