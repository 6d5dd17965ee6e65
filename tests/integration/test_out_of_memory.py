"""A run whose first micro-batches are too large ends as one that had the right ones from the beginning."""

import json
from pathlib import Path

import pytest

from ray_prefopt.config import TrainConfig
from ray_prefopt.training.folder import TrainResult
from ray_prefopt.training.hooks import Hooks
from ray_prefopt.training.run import train
from tests.integration.conftest import STEPS, Toy
from tests.integration.test_train import assert_same_weights, records_of
from tests.unit.test_out_of_memory import Hungry

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.soak
def test_micro_batches_become_smaller_while_steps_stay(
    straight: TrainResult, toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker has two pairs in a step, so both sizes cut them in the same way: equal bit for bit."""
    config = toy.config(name="hungry", micro_batch=4, eval_micro_batch=2, auto_find_batch_size=True)
    result = train(config, hooks=Hooks(callbacks=(Hungry(fits=2, at_step=4),)))
    assert_same_weights(result.model, straight.model)
    assert [record["step"] for record in records_of(result.folder) if "loss" in record] == list(
        range(1, STEPS + 1)
    )
    shown = capsys.readouterr().err
    assert "warning: out of memory with run.micro_batch 4: [enforce fail" in shown
    assert "(Cannot allocate memory); going on with 2\n" in shown
    assert "workers were started again: going on after step 3" in shown
    for file in (Path(result.folder, "config.json"), Path(result.checkpoint, "config.json")):
        used = TrainConfig.model_validate(json.loads(file.read_text())).run
        assert (used.global_batch, used.micro_batch, used.eval_micro_batch) == (4, 2, 1)
    assert train(config) == result  # it is the same run, and finished
