"""What `ray_prefopt` offers by name, in a process that has imported nothing of it yet."""

import subprocess
import sys

import pytest

import ray_prefopt

MODEL_TO_REFUSE = "TrainConfig(model={'path': './no-such-model'}, data={'train': 'pairs.jsonl'})"


@pytest.mark.parametrize(
    "imports",
    [
        "from ray_prefopt import TrainConfig, train",
        "from ray_prefopt import TrainConfig, TrainResult, train",
        "import ray_prefopt.train.run; from ray_prefopt import TrainConfig, train",
        "from ray_prefopt import TrainConfig, train as again, evaluate; from ray_prefopt import train",
    ],
)
def test_train_is_called_in_whatever_order_things_are_imported(imports: str) -> None:
    """`train` is a function of the API and the package it lives in."""
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}\ntrain({MODEL_TO_REFUSE})"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ModelError: model ./no-such-model: no such folder" in done.stderr.splitlines()[-1]


def test_every_name_is_there() -> None:
    assert {name for name in ray_prefopt.__all__ if getattr(ray_prefopt, name, None) is None} == set()
    assert ray_prefopt.load_config.__module__ == "ray_prefopt.settings"
    assert ray_prefopt.export.__module__ == "ray_prefopt.train.export"
    assert ray_prefopt.evaluate.__module__ == "ray_prefopt.train.run"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'ray_prefopt' has no attribute 'tune_up'"):
        ray_prefopt.tune_up  # noqa: B018


def test_importing_it_loads_neither_torch_nor_ray() -> None:
    code = "import sys, ray_prefopt; ray_prefopt.TrainConfig; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
