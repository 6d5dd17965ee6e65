"""Means over pairs, tokens and steps from sums."""

import pytest
import torch

from ray_prefopt.training.metrics import MetricSums, means


def sums(**values: float) -> dict[str, torch.Tensor]:
    names = {"chosen_length": "completions/chosen_length", "margins": "rewards/margins"}
    values = {"nll_weight": values.get("chosen_length", 1.0), **values}
    return {names.get(name, name): torch.tensor(value) for name, value in values.items()}


def test_each_metric_has_its_own_denominator() -> None:
    """Two steps of two micro-batches; three pairs, the last micro-batch is filler."""
    metrics = MetricSums()
    metrics.add(sums(loss=1.0, pairs=1.0, margins=4.0, chosen_length=2.0, nll_loss=6.0))
    metrics.add(sums(loss=0.5, pairs=1.0, margins=-1.0, chosen_length=8.0, nll_loss=4.0))
    metrics.end_step()
    metrics.add(sums(loss=2.5, pairs=1.0, margins=0.0, chosen_length=10.0, nll_loss=0.0))
    metrics.add(sums(loss=0.0, pairs=0.0, margins=0.0, chosen_length=0.0, nll_loss=0.0))
    metrics.end_step()
    assert metrics.reduce() == pytest.approx(
        {
            "loss": (1.0 + 0.5 + 2.5) / 2,  # steps
            "rewards/margins": 3.0 / 3,  # pairs
            "completions/chosen_length": 20.0 / 3,
            "nll_loss": 10.0 / 20,  # tokens
        }
    )


def test_reading_begins_anew() -> None:
    metrics = MetricSums()
    for loss in (1.0, 3.0):
        metrics.add(sums(loss=loss, pairs=2.0, chosen_length=2.0))
        metrics.end_step()
        assert metrics.reduce()["loss"] == loss


def test_sums_of_many_steps_lose_nothing() -> None:
    """In fp32, 2^24 + 1 is 2^24."""
    metrics = MetricSums()
    metrics.add(sums(loss=0.0, pairs=1.0, chosen_length=2.0**24))
    for _ in range(10):
        metrics.add(sums(loss=0.0, pairs=0.0, chosen_length=1.0))
    metrics.end_step()
    assert metrics.reduce()["completions/chosen_length"] == 2**24 + 10


def test_half_precision_is_added_in_full() -> None:
    metrics = MetricSums()
    for _ in range(3):
        metrics.add(
            {name: value.bfloat16() for name, value in sums(loss=1.0, pairs=257.0).items()}
            | sums(chosen_length=1.0)
        )
    metrics.end_step()
    assert metrics.reduce()["completions/chosen_length"] == 3 / (
        3 * 256
    )  # 257 is 256 in bfloat16; the sum is exact


def test_a_mean_of_steps_equals_the_mean_of_all_pairs() -> None:
    values = {"loss": 4.0, "pairs": 8.0, "completions/chosen_length": 16.0, "nll_loss": 8.0, "aux_loss": 2.0}
    values |= {"nll_weight": 16.0}
    assert means(values, steps=4) == {
        "loss": 1.0,
        "completions/chosen_length": 2.0,
        "nll_loss": 0.5,
        "aux_loss": 0.25,
    }
