"""The space of a search: what may be varied, which config a point is, which points are drawn."""

import json
import random
from typing import Any

import optuna
import pytest

from ray_prefopt.config import CPOLoss, SimPOLoss, TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.search.measure import Measure, check_metric
from ray_prefopt.search.points import first_points, number_of_points
from ray_prefopt.search.schedulers import Explorer, perturbed
from ray_prefopt.search.space import make_space
from ray_prefopt.search.tune import _population
from ray_prefopt.search_config import Dimension, SearchConfig


def base(**sections: Any) -> TrainConfig:
    values = {"model": {"path": "some/model"}, "data": {"train": "a.jsonl", "eval": "b.jsonl"}, **sections}
    return TrainConfig.model_validate(values)


def search(**values: Any) -> SearchConfig:
    return SearchConfig.model_validate(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"space": {"loss.bata": {"uniform": [1, 2]}}},
            r"search.space: loss.bata is not a field. Did you mean loss.beta\?",
        ),
        (
            {"space": {"run.seed": {"choice": [1, 2]}}},
            "run.seed cannot be varied: list seeds in search.seeds",
        ),
        ({"space": {"run.name": {"choice": ["a"]}}}, "run.name cannot be varied: every trial has its own"),
        (
            {"space": {"data.max_length": {"quniform": [64, 128, 2]}}},
            "data.max_length decides the tokens, which are made once .*: give it a choice or a grid",
        ),
        ({"preset": "cpo"}, "search.preset cpo is for loss.kind cpo; got loss.kind simpo"),
        (
            {
                "space": {
                    "loss.kind": {"choice": ["simpo", "cpo"]},
                    "loss.gamma_beta_ratio": {"uniform": [0, 1]},
                }
            },
            r"search.space has a point that is no config \(loss.kind cpo, .*\): .*is not a field of loss.kind cpo",
        ),
        (
            {"space": {"loss.beta": {"uniform": [-1, 1]}}},
            r"search.space has a point that is no config \(loss.beta -.*\): loss.beta must be > 0",
        ),
        (
            {"space": {"loss.beta": {"uniform": [1, 2]}}, "points": [{"loss.beta": 3}]},
            "search.points: loss.beta 3 is not in the space; widen search.space",
        ),
        (
            {
                "space": {
                    "loss.beta": {"uniform": [1, 2], "when": {"loss.cpo_alpha": 0.1}},
                    "loss.cpo_alpha": {"choice": [0.1], "when": {"loss.beta": 1}},
                }
            },
            "the conditions of loss.beta, loss.cpo_alpha go round in a circle",
        ),
        (
            {"space": {"run.global_batch": {"choice": [32, 64]}}, "scheduler": "pbt"},
            "pbt changes fields in the middle of a run, which run.global_batch does not allow",
        ),
    ],
)
def test_spaces_that_cannot_be(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_space(base(), search(**values))


def test_a_point_becomes_a_config() -> None:
    space = make_space(
        base(loss={"kind": "simpo", "beta": 3}, optim={"learning_rate": 1e-5}),
        search(space={"loss.gamma_beta_ratio": {"uniform": [0, 1]}, "engine.deepspeed.a.b": {"choice": [1]}}),
    )
    config = space.config_at({"loss.gamma_beta_ratio": 0.25, "engine.deepspeed.a.b": 1})
    assert config.loss == SimPOLoss(beta=3, gamma_beta_ratio=0.25)
    assert config.engine.deepspeed == {"a": {"b": 1}}
    assert (config.optim.learning_rate, space.base.loss.beta) == (1e-5, 3)


def test_another_loss_begins_with_its_own_defaults() -> None:
    """`when` keeps the margin to the loss that has one."""
    dimensions = {
        "loss.gamma_beta_ratio": {"uniform": [0, 1], "when": {"loss.kind": ["simpo", "cpo_simpo"]}},
        "loss.kind": {"choice": ["simpo", "cpo"]},
    }
    space = make_space(base(loss={"kind": "simpo", "beta": 7}), search(space=dimensions))
    assert list(space.dimensions) == ["loss.kind", "loss.gamma_beta_ratio"]
    assert space.config_at({"loss.kind": "cpo"}).loss == CPOLoss()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [space.suggest(study.ask()) for _ in range(20)]
    assert {("loss.gamma_beta_ratio" in point) for point in points if point["loss.kind"] == "cpo"} == {False}
    assert {("loss.gamma_beta_ratio" in point) for point in points if point["loss.kind"] == "simpo"} == {True}


def test_draws_stay_in_their_dimension() -> None:
    rng = random.Random(0)
    dimensions = [
        Dimension(loguniform=(1e-7, 1e-5)),
        Dimension(quniform=(32, 128, 32)),
        Dimension(choice=[[1, 2], "a"]),
    ]
    space = make_space(
        base(),
        search(space={"optim.learning_rate": dimensions[0], "run.global_batch": dimensions[1]}),
    )
    points = [space.draw(rng) for _ in range(200)]
    rates = sorted(point["optim.learning_rate"] for point in points)
    assert all(dimensions[0].contains(rate) for rate in rates)
    assert rates[100] == pytest.approx(1e-6, rel=0.5)  # the middle of the orders of magnitude
    assert {point["run.global_batch"] for point in points} == {32, 64, 96, 128}


def test_presets_fit_what_is_trained_and_bring_their_recipes() -> None:
    full = make_space(base(), search(preset="simpo"))
    assert full.dimensions["optim.learning_rate"] == Dimension(loguniform=(3e-7, 1e-6))
    assert [recipe.values["loss.beta"] for recipe in full.recipes] == [10, 2.5, 2, 10, 2, 2.5]
    lora = make_space(base(model={"path": "m", "lora": {}}), search(preset="simpo"))
    assert lora.dimensions["optim.learning_rate"] == Dimension(loguniform=(1e-5, 2e-4))
    assert lora.recipes[0].values == {
        "loss.beta": 10,
        "loss.gamma_beta_ratio": 0.3,
    }  # whose rate was for all weights
    own = {"loss.beta": {"choice": [2.5, 4]}}
    narrower = make_space(base(), search(preset="simpo", space=own))
    assert narrower.dimensions["loss.beta"].choice == [2.5, 4]
    assert make_space(base(), search(preset="simpo", recipes=False)).recipes == ()


def test_grids_are_walked_through_and_points_come_first() -> None:
    space = {
        "loss.beta": {"grid": [1, 2, 4]},
        "loss.gamma_beta_ratio": {"grid": [0.0, 0.5, 1.0]},
        "loss.label_smoothing": {"uniform": [0, 0.1]},
    }
    asked = search(space=space, points=[{"loss.beta": 4, "loss.gamma_beta_ratio": 1.0}])
    found = make_space(base(), asked)
    first = first_points(found, asked)
    assert number_of_points(found, asked) == 9
    assert len(first) == 9
    assert first[:2] == [
        {"loss.beta": 4, "loss.gamma_beta_ratio": 1.0},
        {"loss.beta": 1, "loss.gamma_beta_ratio": 0.0},
    ]


def test_every_value_of_a_grid_is_tried_beside_points_and_recipes() -> None:
    asked = search(preset="simpo", space={"loss.beta": {"grid": [4, 6, 8]}})
    found = make_space(base(), asked)
    first = first_points(found, asked)
    assert first[-3:] == [{"loss.beta": 4}, {"loss.beta": 6}, {"loss.beta": 8}]
    assert number_of_points(found, asked) == len(first) == len(found.recipes) + 3


def test_combinations_that_mean_the_same_are_one() -> None:
    """A field without a meaning at a point is no part of it; one that is still open may have one."""
    gamma = {"grid": [0.0, 0.5], "when": {"loss.kind": "simpo"}}
    space = {"loss.kind": {"grid": ["simpo", "cpo"]}, "loss.gamma_beta_ratio": gamma}
    assert make_space(base(), search(space=space)).grid() == [
        {"loss.kind": "simpo", "loss.gamma_beta_ratio": 0.0},
        {"loss.kind": "simpo", "loss.gamma_beta_ratio": 0.5},
        {"loss.kind": "cpo"},
    ]
    smoothing = {"grid": [0.0, 0.1], "when": {"loss.gamma_beta_ratio": 0.0}}
    assert make_space(base(), search(space={**space, "loss.label_smoothing": smoothing})).grid() == [
        {"loss.kind": "simpo", "loss.gamma_beta_ratio": 0.0, "loss.label_smoothing": 0.0},
        {"loss.kind": "simpo", "loss.gamma_beta_ratio": 0.0, "loss.label_smoothing": 0.1},
        {"loss.kind": "simpo", "loss.gamma_beta_ratio": 0.5},
        {"loss.kind": "cpo"},
    ]
    space["loss.kind"] = {"choice": ["simpo", "cpo"]}
    cpo = base(loss={"kind": "cpo"})
    assert make_space(cpo, search(space=space)).grid() == [
        {"loss.gamma_beta_ratio": 0.0},
        {"loss.gamma_beta_ratio": 0.5},
    ]


def test_points_of_lists_can_be_counted() -> None:
    gamma = {"choice": [0.0, 0.5], "when": {"loss.kind": "simpo"}}
    space: dict[str, Any] = {"loss.kind": {"choice": ["simpo", "cpo"]}, "loss.gamma_beta_ratio": gamma}
    assert make_space(base(), search(space=space)).size == 3
    assert make_space(base(), search(space=space | {"loss.beta": {"uniform": [1, 2]}})).size is None
    assert make_space(base(), search(space={"loss.beta": {"quniform": [1, 3, 0.5]}})).size == 5
    many = {name: {"choice": list(range(1, 200))} for name in ("run.global_batch", "optim.warmup_steps")}
    assert make_space(base(), search(space=many)).size is None


def test_a_population_has_no_more_trials_than_points() -> None:
    space = {"loss.beta": {"choice": [1, 2, 4]}}
    asked = search(space=space, scheduler="pbt", points=[{"loss.beta": 2}])
    found = make_space(base(), asked)
    assert sorted(point["loss.beta"] for point in _population(found, asked)) == [1, 2, 4]
    with pytest.raises(
        ConfigError,
        match=r"^search.trials 4: each trial of a population begins at a .* has 3; set search.trials to",
    ):
        make_space(base(), search(space=space, scheduler="pbt", trials=4))


def test_points_that_are_the_same_when_they_are_whole_are_one() -> None:
    asked = search(
        space={"loss.beta": {"choice": [1, 2]}, "loss.label_smoothing": {"choice": [0.0, 0.1]}},
        scheduler="pbt",
        points=[
            {"loss.beta": 1},
            {"loss.label_smoothing": 0.0},
            {"loss.beta": 1, "loss.label_smoothing": 0.0},
        ],
    )
    for seed in range(8):
        points = _population(make_space(base(), asked), asked.model_copy(update={"seed": seed}))
        assert len({json.dumps(point) for point in points}) == len(points) == 4


def test_tokens_are_prepared_for_where_a_field_does_not_apply() -> None:
    limit = {"choice": [192, 224], "when": {"loss.kind": "simpo"}}
    space = make_space(
        base(data={"train": "a", "eval": "b", "max_length": 600, "max_prompt_length": 100}),
        search(space={"loss.kind": {"choice": ["simpo", "cpo"]}, "data.max_length": limit}),
    )
    assert {config.data.max_length for config in space.data_variants()} == {192, 224, 600}


def test_tokens_are_prepared_for_points_that_there_are_alone() -> None:
    """A prompt of 128 tokens would not fit in 96."""
    prompts = {"choice": [64, 128], "when": {"data.max_length": 256}}
    space = make_space(
        base(data={"train": "a", "eval": "b", "max_length": 256, "max_prompt_length": 32}),
        search(space={"data.max_length": {"choice": [96, 256]}, "data.max_prompt_length": prompts}),
    )
    assert [(config.data.max_length, config.data.max_prompt_length) for config in space.data_variants()] == [
        (96, 32),
        (256, 64),
        (256, 128),
    ]


def test_each_way_of_making_tokens_is_prepared() -> None:
    space = make_space(
        base(),
        search(space={"data.max_length": {"grid": [600, 700]}, "data.shuffle": {"choice": [True, False]}}),
    )
    assert [config.data.max_length for config in space.data_variants()] == [600, 700]
    plain = make_space(base(), search(preset="simpo"))
    assert [config.data for config in plain.data_variants()] == [plain.base.data]


# --- What is compared ---


@pytest.mark.parametrize(
    ("metric", "varied", "expected"),
    [
        (
            "eval_loss",
            set(),
            "cannot be compared between trials: its value changes with beta, the margin and cpo_alpha",
        ),
        ("eval_rewards/margins", set(), "rewards are multiplied by beta. Use eval_logps_mean/accuracies"),
        (
            "eval_rewards/accuracies",
            {"loss.kind"},
            "cpo sums log-probabilities where the other losses average them",
        ),
        ("eval_acuracy", set(), "search.metric 'eval_acuracy' is not a metric of these trials"),
    ],
)
def test_metrics_that_cannot_rank(metric: str, varied: set[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_metric(base(), search(preset="simpo", metric=metric), varied)


def test_ranking_needs_held_out_pairs() -> None:
    with pytest.raises(ConfigError, match=r"trials are compared on held-out pairs: got no data.eval"):
        check_metric(base(data={"train": "a.jsonl"}), search(preset="simpo"), set())


def test_the_first_evaluation_set_ranks() -> None:
    config = base(data={"train": "a.jsonl", "eval": {"easy": "b.jsonl", "hard": "c.jsonl"}})
    assert check_metric(config, search(preset="simpo"), set())[0] == "eval_easy_logps_mean/accuracies"
    metric = "eval_hard_rewards/accuracies"
    assert check_metric(config, search(preset="simpo", metric=metric), set()) == (metric, "eval_hard_")


def test_the_margin_decides_between_equals_and_never_outweighs_a_pair() -> None:
    """Ten pairs: 0.7 + 1/80 for a margin of 1 (1 / (1 + 1) of a quarter of a pair)."""
    measure = Measure("accuracies", "max", ("c", "r"), num_pairs=10)

    def score(accuracy: float, margin: float) -> float:
        return measure.score({"accuracies": accuracy, "c": margin, "r": 0.0})

    assert score(0.7, 1.0) == pytest.approx(0.7 + 0.5 / 40)
    assert score(0.7, 2.0) > score(0.7, 1.0) > score(0.7, -1.0)
    assert score(0.8, -1e9) > score(0.7, 1e9)
    assert score(float("nan"), 1.0) == -float("inf")
    assert (
        Measure("eval_nll_loss", "min", ("c", "r"), 10).score({"eval_nll_loss": 2.0, "c": 0, "r": 0}) == -2.0
    )


# --- Populations ---


def test_a_copied_point_is_perturbed_within_its_space() -> None:
    dimensions = {
        "loss.beta": Dimension(loguniform=(1, 10)),
        "loss.gamma_beta_ratio": Dimension(quniform=(0, 1, 0.25)),
        "loss.cpo_alpha": Dimension(choice=[0.5, 0.1, 1.0]),
    }
    point = {"loss.beta": 9.0, "loss.gamma_beta_ratio": 0.5, "loss.cpo_alpha": 0.5}
    found = [perturbed(point, dimensions, random.Random(seed)) for seed in range(60)]
    assert all(dimensions[name].contains(value) for near in found for name, value in near.items())
    betas = [near["loss.beta"] for near in found]
    assert betas.count(7.2) > 5  # 9 * 0.8
    assert betas.count(10.0) > 5  # 9 * 1.25, cut off
    assert {near["loss.cpo_alpha"] for near in found} == {0.1, 0.5, 1.0}


@pytest.mark.parametrize("quniform", [(0, 0.49, 0.1), (0, 0.3, 0.1)])
def test_values_stay_on_steps_and_in_their_range(quniform: tuple[float, float, float]) -> None:
    """Neither rounding up nor what is lost in sums of decimals leads out of it."""
    dimensions = {"loss.label_smoothing": Dimension(quniform=quniform)}
    rng = random.Random(0)
    point, seen = {"loss.label_smoothing": 0.2}, set()
    for _ in range(200):
        point = perturbed(point, dimensions, rng)
        seen.add(point["loss.label_smoothing"])
    last = int(quniform[1] * 10)
    assert sorted(seen) == pytest.approx([number / 10 for number in range(last + 1)])
    assert max(seen) <= quniform[1]
    steps = optuna.distributions.FloatDistribution(0, quniform[1], step=0.1)
    assert all(steps._contains(value) for value in seen)


def test_exploring_changes_the_point_alone_each_time_otherwise() -> None:
    """Two trials that copy the same one would else go on as the very same run."""
    space = make_space(base(), search(space={"loss.beta": {"uniform": [1, 10]}}))
    config = {"point": {"loss.beta": 4.0}, "seed": 3}
    explorer = Explorer(space, 1)
    found = [explorer(config) for _ in range(8)]
    assert {copied["seed"] for copied in found} == {3}
    assert all(copied["point"] != config["point"] for copied in found)
    assert len({copied["point"]["loss.beta"] for copied in found}) > 2
