"""Steps of pairs of similar length, epochs without their last step, and the seed of the order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from ray_prefopt.config import DataConfig, TrainConfig
from ray_prefopt.data.blocks import open_blocks
from ray_prefopt.data.plan import Order, Plan, grouped
from ray_prefopt.training.job import make_plan
from tests.tiny import random_pairs, write_blocks


def lengths_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(2, 300, count)


def plan_of(*block_rows: int, **options: Any) -> Plan:
    window = options.pop("window", 1000)
    order = Order(block_rows, seed=options.pop("seed", 0), window=window)
    return Plan(order, lengths_of(order.num_pairs), **options)


# --- similar lengths ---


def test_stretches_are_sorted_and_the_longest_step_comes_first() -> None:
    """Two stretches of two steps of two: 5 3 2 1 | 9 8 7 4; the step 9 8 changes places with the first."""
    lengths = np.array([3, 1, 2, 5, 7, 9, 4, 8])
    ids = grouped(np.arange(8), lengths, global_batch=2, stretch=4, window_ends=np.array([8]))
    assert lengths[ids].tolist() == [9, 8, 2, 1, 5, 3, 7, 4]


def test_no_stretch_crosses_a_window() -> None:
    lengths = np.arange(9)
    ids = grouped(np.arange(9), lengths, global_batch=3, stretch=6, window_ends=np.array([5, 9]))
    assert ids.tolist() == [
        8,
        7,
        6,
        1,
        0,
        5,
        4,
        3,
        2,
    ]  # 4 3 2 1 0 | 5 | 8 7 6 but for the first and last step


def test_a_longest_pair_in_a_smaller_last_step() -> None:
    lengths = np.array([3, 2, 1, 0, 9])
    ids = grouped(np.arange(5), lengths, global_batch=2, stretch=2, window_ends=np.array([5]))
    assert lengths[ids].tolist() == [9, 2, 1, 0, 3]


def test_sorted_stretches_are_those_of_transformers() -> None:
    """From the same permutation, where the longest is in the first stretch of both."""
    lengths = lengths_of(1000)
    lengths[int(torch.randperm(1000, generator=torch.Generator().manual_seed(3))[7])] = 400
    theirs = get_length_grouped_indices(lengths.tolist(), 4, generator=torch.Generator().manual_seed(3))
    permuted = torch.randperm(1000, generator=torch.Generator().manual_seed(3)).numpy()
    assert grouped(permuted, lengths, 4, 50 * 4, np.array([1000])).tolist() == theirs


def test_small_sets_have_four_stretches_as_in_transformers() -> None:
    plan = plan_of(100, global_batch=5, group_by_length=True)
    ids = np.concatenate([plan.step_ids(step) for step in range(1, plan.total_steps)])
    grows = np.flatnonzero(np.diff(plan.lengths[ids]) > 0)
    assert len(grows) in (3, 4)  # between stretches, and where the first step was put


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 9),
    st.integers(1, 100),
    st.integers(0, 3),
)
def test_an_epoch_by_length_has_every_pair_once(
    block_rows: list[int], global_batch: int, window: int, seed: int
) -> None:
    global_batch = min(global_batch, sum(block_rows))
    plan = plan_of(
        *block_rows, global_batch=global_batch, window=window, seed=seed, epochs=2, group_by_length=True
    )
    steps = [plan.step_ids(step) for step in range(plan.total_steps)]
    half = plan.steps_per_epoch
    for epoch in (steps[:half], steps[half:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(sum(block_rows)))
        assert plan.lengths[epoch[0]].max() == plan.lengths.max()


def test_pairs_of_a_step_are_closer_in_length_than_at_random() -> None:
    spread = {
        grouping: np.mean([np.ptp(plan.lengths[plan.step_ids(step)]) for step in range(plan.total_steps)])
        for grouping in (False, True)
        for plan in [plan_of(4000, global_batch=8, group_by_length=grouping)]
    }
    assert spread[True] < spread[False] / 20


def test_the_order_by_length_is_a_function_of_its_arguments() -> None:
    """What an exact resume needs: a plan made anew, asked for any step first, gives the same pairs."""
    one, other = (plan_of(30, 40, global_batch=6, epochs=3, group_by_length=True) for _ in range(2))
    later = [other.step_ids(step).tolist() for step in reversed(range(other.total_steps))]
    assert [one.step_ids(step).tolist() for step in range(one.total_steps)] == later[::-1]
    assert later[-1] != later[-1 - one.steps_per_epoch]


def test_grouping_sorts_what_was_shuffled() -> None:
    with pytest.raises(
        ValueError, match=r"group_by_length sorts shuffled pairs; got shuffle: false. Leave one"
    ):
        DataConfig(train="pairs.jsonl", shuffle=False, group_by_length=True)


# --- the last step ---


def test_the_last_step_can_be_left_out() -> None:
    plan = plan_of(7, global_batch=3, epochs=2, drop_last=True)
    assert (plan.steps_per_epoch, plan.total_steps) == (2, 4)
    assert [len(plan.step_ids(step)) for step in range(4)] == [3, 3, 3, 3]
    assert [plan.epoch_at(step) for step in range(5)] == [0, 0.5, 1, 1.5, 2]
    orders = [plan.order.epoch(epoch).tolist() for epoch in (0, 1)]
    assert [plan.step_ids(step).tolist() for step in range(4)] == [
        orders[0][:3], orders[0][3:6], orders[1][:3], orders[1][3:6],
    ]  # fmt: skip


def test_nothing_is_left_out_of_epochs_of_whole_steps() -> None:
    kept, dropped = (
        plan_of(6, global_batch=3, epochs=1.5, drop_last=drop_last) for drop_last in (False, True)
    )
    assert kept.total_steps == dropped.total_steps == 3
    assert [kept.epoch_at(step) for step in range(4)] == [dropped.epoch_at(step) for step in range(4)]


# --- from a config ---


def config_of(**sections: dict[str, Any]) -> TrainConfig:
    values: dict[str, dict[str, Any]] = {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "run": {"global_batch": 4},
    }
    return TrainConfig.model_validate({name: {**values[name], **sections.get(name, {})} for name in values})


def test_the_config_decides(tmp_path: Path) -> None:
    blocks = open_blocks(write_blocks(tmp_path, random_pairs(18)))
    plan = make_plan(config_of(data={"group_by_length": True}, run={"drop_last": True}), blocks)
    assert (plan.group_by_length, plan.drop_last, plan.total_steps) == (True, True, 4)
    of_the_order, of_the_run, both = (
        make_plan(config_of(data=data, run=run), blocks).step_ids(0).tolist()
        for data, run in (({"seed": 7}, {}), ({}, {"seed": 7}), ({"seed": 7}, {"seed": 9}))
    )
    assert of_the_order == of_the_run == both
    assert of_the_order != make_plan(config_of(), blocks).step_ids(0).tolist()


def test_tokens_are_counted_by_steps(tmp_path: Path) -> None:
    blocks = open_blocks(write_blocks(tmp_path, random_pairs(10)))
    plan = make_plan(config_of(run={"epochs": 2}), blocks)
    every = int(blocks.total_lengths.sum())
    first = int(blocks.total_lengths[plan.step_ids(0)].sum())
    assert [plan.tokens_until(step) for step in (0, 1, 3, 6)] == [0, first, every, 2 * every]
