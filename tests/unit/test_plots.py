"""The picture of a run: what is drawn where, and what is said about a record that cannot be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from ray_prefopt.errors import CheckpointError
from ray_prefopt.training.plots import SMOOTH_ABOVE, Curve, make_figure, plot_run, read_records


def trained(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 1 / (step + 1),
        "rewards/accuracies": 0.5 + step / 16,
        "rewards/margins": float(step),
        "logps_mean/chosen": -1.0,
        "logps_mean/rejected": -1.0 - step,
        "grad_norm": 2.0 * step,
        "learning_rate": 1e-6 * step,
    }


def evaluated(step: int, prefix: str = "eval_") -> dict[str, Any]:
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps_mean/chosen", "logps_mean/rejected")
    return {"step": step, "epoch": step / 10, **{prefix + name: trained(step)[name] + 3 for name in names}}


def write(folder: Path, records: list[dict[str, Any]], rest: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + rest)
    return folder


Panels = dict[str, dict[str, tuple[list[float], list[float]]]]


def lines_of(records: list[dict[str, Any]]) -> Panels:
    """Heading of a panel, label of a curve (the learning rate has none), its points."""
    found: Panels = {}
    for panel in make_figure(records, title="run").axes:
        curves = found.setdefault(panel.get_title(loc="left"), {})
        for line in panel.lines:
            label = str(line.get_label())
            if not label.startswith("_") or not panel.get_legend():
                points = np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()
                curves[label if panel.get_legend() else ""] = points
    return found


def test_each_metric_is_drawn_in_its_panel() -> None:
    panels = lines_of([trained(1), trained(3), evaluated(3)])
    assert panels["Loss"] == {"train": ([1, 3], [0.5, 0.25]), "eval": ([3], [3.25])}
    assert panels["Reward accuracy"] == {"train": ([1, 3], [0.5625, 0.6875]), "eval": ([3], [3.6875])}
    assert panels["Reward margin"] == {"train": ([1, 3], [1, 3]), "eval": ([3], [6])}
    assert panels["Mean log-probability per token"] == {
        "chosen": ([1, 3], [-1, -1]),
        "rejected": ([1, 3], [-2, -4]),
    }
    assert panels["Gradient norm"] == {"before clipping": ([1, 3], [2, 6])}
    assert panels["Learning rate"] == {"": ([1, 3], [1e-6, 3e-6])}


def test_named_evaluation_sets_have_a_curve_each() -> None:
    both = {**evaluated(2, "eval_helpful_"), **evaluated(2, "eval_nll_")}
    panels = lines_of([trained(1), trained(2), both])
    assert list(panels["Loss"]) == ["train", "eval_helpful", "eval_nll"]
    assert panels["Reward margin"]["eval_nll"] == ([2], [5])


def test_a_long_curve_is_drawn_twice_and_its_mean_runs_over_neighbours() -> None:
    records = [trained(step) for step in range(1, SMOOTH_ABOVE + 2)]
    steps, norms = lines_of(records)["Gradient norm"]["before clipping"]
    assert len(steps) == SMOOTH_ABOVE + 1
    assert norms[40] == pytest.approx(2 * steps[40])  # in the middle of a straight line the mean is the value
    assert norms[0] == pytest.approx(2 * (1 + 2 + 3) / 3)  # window of 5, of which the first point has 3
    assert lines_of(records)["Learning rate"][""][1][0] == 1e-6


def test_smoothing_by_hand() -> None:
    values = np.array([0.0, 3.0, 6.0, 0.0])
    assert Curve(np.arange(4), values).smoothed().values.tolist() == [1.5, 3.0, 3.0, 3.0]


def test_the_picture_lies_in_the_run_folder(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [evaluated(0), trained(1), evaluated(1)])
    assert plot_run(run) == run / "curves.png"
    height, width, _ = imread(run / "curves.png").shape
    assert width > height > 800
    assert imread(run / "curves.png").std() > 0.05  # not a blank page


def test_the_picture_can_lie_elsewhere(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [trained(1)])
    out = plot_run(run, tmp_path / "new" / "picture.svg")
    assert "<svg" in out.read_text()[:1000]


def test_a_run_that_is_only_evaluated_so_far(tmp_path: Path) -> None:
    assert plot_run(write(tmp_path, [evaluated(0)])).exists()


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = write(tmp_path, [trained(1)], rest='{"step": 2, "lo')
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [1]


def test_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl does not exist: give the folder of a run"):
        plot_run(tmp_path)


@pytest.mark.parametrize("rest", ["", '{"step": 1'])
def test_metrics_without_a_record(tmp_path: Path, rest: str) -> None:
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is empty: the run has not logged a step yet"):
        plot_run(write(tmp_path, [], rest))


@pytest.mark.parametrize("line", ["half of a", '{"loss": 1.0}', "[1]", '{"step": null}'])
def test_damaged_metrics(tmp_path: Path, line: str) -> None:
    run = write(tmp_path, [trained(1)], rest=line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2 is damaged .*: remove the line, or copy"):
        plot_run(run)
