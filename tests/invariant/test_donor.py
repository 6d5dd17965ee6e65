"""A run that starts from another's checkpoint with other values, as a trial of a population does."""

from pathlib import Path
from typing import Any

import pytest

from tests.gang import run_gang
from tests.invariant.training import Inputs, _run_all

ENGINES = ("plain", "zero0", "zero2", "zero3")
OWN: dict[str, dict[str, Any]] = {
    "loss": {"beta": 4.0, "gamma_beta_ratio": 0.1, "cpo_alpha": 0.25},
    "optim": {"learning_rate": 5e-3},
}


def test_it_begins_with_the_donors_weights_and_optimizer_and_its_own_values(
    inputs: Inputs, tmp_path: Path
) -> None:
    """At a learning rate of 0 after the copy, Adam's step differs from the donor's only in what the loss changes."""
    donors = {name: inputs.job(inputs.config(name), tmp_path / name) for name in ENGINES}
    (donated, *_) = run_gang(2, _run_all, [(job, None) for job in donors.values()])
    copies = []
    for name, job in donors.items():
        (checkpoint,) = Path(job.checkpoints).glob("step-00000002-*")
        for kind, changes in {"same": {}, "own": OWN}.items():
            config = inputs.config(name, **changes)
            run = config.run.model_copy(update={"resume_from": str(checkpoint)})
            copies.append(inputs.job(config.model_copy(update={"run": run}), tmp_path / f"{name}-{kind}"))
    (copied, *_) = run_gang(2, _run_all, [(job, None) for job in copies])

    for index, (name, records) in enumerate(zip(ENGINES, donated, strict=True)):
        third, fourth = (next(r for r in records if r["step"] == step and "loss" in r) for step in (3, 4))
        same, own = ([r for r in run if "loss" in r] for run in copied[2 * index : 2 * index + 2])
        assert [record["step"] for record in own] == [3, 4]
        for record, expected in zip(same, (third, fourth), strict=True):
            assert record["loss"] == expected["loss"], name
            assert record["learning_rate"] == expected["learning_rate"], name
        # Its first step: the donor's log-probabilities to the bit, under its own beta; half the donor's rate.
        assert own[0]["logps_mean/chosen"] == third["logps_mean/chosen"], name
        assert own[0]["nll_loss"] == third["nll_loss"], name
        assert own[0]["rewards/chosen"] == pytest.approx(2 * third["rewards/chosen"], rel=1e-6), name
        assert own[0]["loss"] != third["loss"], name
        for record, expected in zip(own, (third, fourth), strict=True):
            assert record["learning_rate"] == pytest.approx(expected["learning_rate"] / 2, rel=1e-9), name
