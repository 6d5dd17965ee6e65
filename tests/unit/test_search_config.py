"""The section `search`: what it takes, and what it says about the rest."""

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from ray_prefopt.errors import ConfigError
from ray_prefopt.search.presets import PRESETS
from ray_prefopt.search_config import Dimension, SearchConfig
from ray_prefopt.settings import config_schema, load_config, load_tune_config

BASE = """
model: {path: some/model}
data: {train: pairs.jsonl, eval: held-out.jsonl}
"""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "needs exactly one of uniform, loguniform, quniform, choice, grid; got none"),
        ({"uniform": [0, 1], "choice": [1]}, "needs exactly one of .*; got uniform, choice"),
        ({"uniform": [1, 1]}, "uniform goes from low to high; got 1 and 1"),
        ({"loguniform": [0, 1]}, "loguniform needs numbers above 0; got 0"),
        ({"quniform": [0, 1, 2]}, "quniform needs a step within its range; got 2"),
    ],
)
def test_dimensions_that_cannot_be(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Dimension.model_validate(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, r"set search.space \(a distribution for each field to vary\), or search.preset"),
        ({"preset": "simpo", "seeds": [1, 1]}, r"seeds has the same entry twice; got \[1, 1\]"),
        ({"preset": "simpo", "points": [{"a": 1}, {"a": 1}]}, "points has the same entry twice"),
        (
            {"preset": "simpo", "scheduler": "pbt", "seeds": [1, 2]},
            "pbt trains one population: give seeds one entry",
        ),
    ],
)
def test_searches_that_cannot_be(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        SearchConfig.model_validate(values)


def test_a_dimension_contains_what_it_can_give() -> None:
    assert Dimension(loguniform=(1, 10)).contains(10)
    assert not Dimension(loguniform=(1, 10)).contains(10.1)
    assert not Dimension(uniform=(0, 2)).contains(True)
    assert Dimension(choice=["simpo", "cpo"]).contains("cpo")
    assert Dimension(quniform=(0.1, 0.9, 0.2)).contains(0.7)


def test_every_preset_has_its_name_in_the_config() -> None:
    field = SearchConfig.model_fields["preset"].annotation
    assert set(get_args(get_args(field)[0])) == PRESETS.keys()
    for preset in PRESETS.values():
        for recipe in preset.recipes:
            held = {**preset.dimensions(lora=False), **preset.dimensions(lora="LoRA" in recipe.name)}
            assert all(held[name].contains(value) for name, value in recipe.values.items()), recipe


def test_a_file_and_flags_make_a_search(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(BASE + "search:\n  trials: 3\n  space:\n    loss.beta: {loguniform: [1, 10]}\n")
    flags = ["--search.trials=7", "--search.space.loss.gamma_beta_ratio={uniform: [0, 1]}", "--loss.beta=3"]
    config = load_tune_config([path], flags)
    assert config.search.trials == 7
    assert config.search.space == {
        "loss.beta": Dimension(loguniform=(1, 10)),
        "loss.gamma_beta_ratio": Dimension(uniform=(0, 1)),
    }
    assert config.base.loss.beta == 3
    assert type(config.base).__name__ == "TrainConfig"


def test_train_says_where_a_search_belongs(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(BASE + "search:\n  preset: simpo\n")
    expected = r"search.yaml:4: search is for `ray-prefopt tune`, which varies this config: leave it out here"
    with pytest.raises(ConfigError, match=expected):
        load_config([path])


def test_a_mistake_in_a_search_is_found_in_its_line(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(BASE + "search:\n  preset: simpo\n  trails: 3\n")
    with pytest.raises(
        ConfigError, match=r"search.yaml:6: search.trails is not a field. Did you mean search.trials\?"
    ):
        load_tune_config([path])


def test_the_schema_takes_both_kinds_of_file() -> None:
    schema = config_schema()
    assert "search" in schema["properties"]
    assert "search" not in schema["required"]
