"""`hyperparameter_search`: from transformers' Ray backend to a SearchConfig."""

from typing import Any

import pytest
from ray import tune

from ray_prefopt.compat.config import CPOConfig
from ray_prefopt.compat.search import distribution, named_back, search_config
from ray_prefopt.errors import ConfigError
from ray_prefopt.search_config import Dimension, SearchConfig

ARGS = CPOConfig("out", loss_type="simpo", beta=2.0)


def asked(space: dict[str, Any], **settings: Any) -> SearchConfig:
    given = {"n_trials": 20, "direction": None, "compute_objective": None, "backend": "ray", **settings}
    return search_config(lambda _: space, ARGS, **given)


def test_arguments_become_fields_and_distributions_ours() -> None:
    space = {
        "beta": tune.loguniform(1, 10),
        "learning_rate": tune.choice([1e-6, 1e-5]),
        "label_smoothing": tune.quniform(0, 0.4, 0.1),
        "num_train_epochs": tune.randint(1, 4),
        "optim.warmup_steps": tune.qrandint(8, 64, 8),
        "run.max_steps": tune.randint(7, 8),
        "run.global_batch": tune.grid_search([32, 64]),
    }
    found = asked(space, n_trials=7, scheduler="fifo", seeds=[1, 2])
    assert (found.trials, found.scheduler, found.seeds) == (7, "fifo", [1, 2])
    assert found.space == {
        "loss.beta": Dimension(loguniform=(1, 10)),
        "optim.learning_rate": Dimension(choice=[1e-6, 1e-5]),
        "loss.label_smoothing": Dimension(quniform=(0, 0.4, 0.1)),
        "run.epochs": Dimension(quniform=(1, 3, 1)),
        "optim.warmup_steps": Dimension(quniform=(8, 64, 8)),
        "run.max_steps": Dimension(choice=[7]),
        "run.global_batch": Dimension(grid=[32, 64]),
    }


def test_gamma_is_divided_by_beta_and_multiplied_back() -> None:
    space = {"simpo_gamma": tune.uniform(0, 3)}
    assert asked(space).space == {"loss.gamma_beta_ratio": Dimension(uniform=(0, 1.5))}
    assert named_back({"loss.gamma_beta_ratio": 0.5}, space, ARGS) == {"simpo_gamma": 1.0}


@pytest.mark.parametrize(
    ("space", "settings", "expected"),
    [
        ({"batch": 1}, {}, "hp_space: batch cannot be searched over; alpha, beta"),
        ({"beta": tune.sample_from(lambda: 1)}, {}, "hp_space: beta is a Function; give uniform, loguniform"),
        (
            {"beta": tune.lograndint(1, 9)},
            {},
            "hp_space: beta is a Integer in steps on a logarithmic scale; give uniform",
        ),
        (
            {"beta": tune.qloguniform(1, 9, 1)},
            {},
            "hp_space: beta is a Float in steps on a logarithmic scale; give uniform",
        ),
        ({"beta": [1], "simpo_gamma": [1]}, {}, "simpo_gamma means another margin for every beta"),
        ({"beta": [1]}, {"backend": "optuna"}, "backend is ray here; got optuna"),
        (
            {"beta": [1]},
            {"compute_objective": sum},
            "compute_objective is not called, since a loss cannot be compared",
        ),
        (
            {"beta": [1]},
            {"direction": "minimize"},
            "held-out reward accuracy is maximized; leave direction out",
        ),
        ({"beta": [1]}, {"direction": ["maximize"]}, "direction is maximize or minimize; got"),
        (
            {"beta": [1]},
            {"schedular": "asha"},
            "schedular: Extra inputs are not permitted. Did you mean scheduler?",
        ),
    ],
)
def test_what_cannot_be_searched(space: dict[str, Any], settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(space, **settings)
    assert expected in str(caught.value)


def test_a_single_value_is_a_choice() -> None:
    assert distribution("beta", 2.5) == {"choice": [2.5]}
