"""A picture of a run, from its folder alone: whatever wrote metrics.jsonl, running, finished or copied from elsewhere."""

from pathlib import Path


def plot_run(folder: str | Path, out: str | Path | None = None) -> Path:
    return Path(out or Path(folder, "curves.png"))
