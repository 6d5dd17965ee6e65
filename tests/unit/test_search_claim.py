"""Whose folder a search takes: its own, and no other's."""

from pathlib import Path

import pytest

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.search.tune import _claim
from ray_prefopt.training.folder import claim, refuse_other_config
from tests.unit.test_search_space import base, search

SEARCH = search(space={"loss.beta": {"uniform": [1, 10]}})


def config(folder: Path, *, force_new: bool = False) -> TrainConfig:
    return base(run={"name": "mine", "storage_path": str(folder), "force_new": force_new})


def test_a_run_stays_where_it_is(tmp_path: Path) -> None:
    folder = f"{tmp_path}/mine"
    claim(config(tmp_path), folder)
    for resume in (False, True):
        with pytest.raises(
            ConfigError, match=r"mine is the folder of a run of `train`: give the search another run"
        ):
            _claim(folder, config(tmp_path), SEARCH, resume=resume)
    assert [path.name for path in Path(folder).iterdir()] == ["config.json"]
    _claim(folder, config(tmp_path, force_new=True), SEARCH, resume=False)
    assert not Path(folder, "config.json").exists()
    (aside,) = tmp_path.glob("mine.old-*")
    assert (aside / "config.json").exists()


def test_a_search_stays_where_it_is(tmp_path: Path) -> None:
    folder = f"{tmp_path}/mine"
    _claim(folder, config(tmp_path), SEARCH, resume=False)
    with pytest.raises(
        ConfigError, match=r"mine is the folder of a search: give the run another run.name, or"
    ):
        refuse_other_config(config(tmp_path), folder)
    _claim(folder, config(tmp_path), SEARCH, resume=True)
    with pytest.raises(
        ConfigError, match=r"^--resume goes on with a search, and run.force_new begins it anew: leave"
    ):
        _claim(folder, config(tmp_path, force_new=True), SEARCH, resume=True)
    assert not list(tmp_path.glob("mine.old-*"))
