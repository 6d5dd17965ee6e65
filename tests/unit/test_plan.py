"""The order of training: every pair once per epoch, in steps that do not depend on who computes them."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_prefopt.data import plan as plan_module
from ray_prefopt.data.plan import Order, Plan, extend_hash
from ray_prefopt.errors import DataError


@cache
def lengths_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(2, 300, count).astype(np.int32)


def make(block_rows: tuple[int, ...], global_batch: int, *, seed: int = 0, **options: int) -> Plan:
    order_options = {name: options.pop(name) for name in ("shuffle", "window") if name in options}
    order = Order(block_rows, seed=seed, **order_options)
    return Plan(order, lengths_of(order.num_pairs), global_batch, **options)


# --- the order of an epoch ---


def test_without_shuffling_the_order_is_that_of_the_files() -> None:
    order = Order((2, 3), seed=1, shuffle=False)
    assert [order.epoch(epoch).tolist() for epoch in (0, 9)] == [[0, 1, 2, 3, 4]] * 2


def test_the_order_of_a_seed_and_epoch_is_recorded() -> None:
    """A checkpoint counts on it: another order, say of another numpy, could not be resumed."""
    order = Order((4, 3, 5), seed=7)
    assert [order.epoch(epoch).tolist() for epoch in (0, 1)] == RECORDED
    plan_module._shuffled.cache_clear()
    assert Order((4, 3, 5), seed=7).epoch(1).tolist() == RECORDED[1]


RECORDED = [
    [3, 5, 9, 11, 1, 4, 0, 10, 7, 8, 6, 2],
    [10, 11, 1, 6, 8, 0, 9, 4, 5, 3, 7, 2],
]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 100),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_an_epoch_has_every_pair_once_and_blocks_stay_in_a_window(
    block_rows: list[int], window: int, seed: int, epoch: int
) -> None:
    ids = Order(tuple(block_rows), seed=seed, window=window).epoch(epoch)
    assert sorted(ids.tolist()) == list(range(sum(block_rows)))
    block_of = np.repeat(np.arange(len(block_rows)), block_rows)[ids]
    for block, rows in enumerate(block_rows):
        places = np.flatnonzero(block_of == block)
        assert places[-1] - places[0] < max(window, rows)


def test_blocks_of_a_window_are_mixed() -> None:
    ids = Order((100, 100, 100), seed=0, window=200).epoch(0)
    windows = [ids[:200] // 100, ids[200:] // 100]
    one, other = sorted(set(windows[0].tolist()))
    assert 30 < (windows[0][:100] == one).sum() < 70
    assert {one, other, *windows[1].tolist()} == {0, 1, 2}
    assert len(set(windows[1].tolist())) == 1


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(Order((50,), seed=seed).epoch(epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


# --- steps ---


def test_the_last_step_of_an_epoch_takes_what_is_left() -> None:
    plan = make((3, 4), global_batch=3, epochs=2, shuffle=False)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 6)
    assert [plan.step_ids(step).tolist() for step in range(4)] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]
    assert [plan.epoch_at(step) for step in range(6)] == pytest.approx([0, 3 / 7, 6 / 7, 1, 10 / 7, 13 / 7])


def test_max_steps_overrides_epochs() -> None:
    plan = make((5,), global_batch=2, epochs=1, max_steps=7)
    assert plan.total_steps == 7
    assert sorted(np.concatenate([plan.step_ids(step) for step in (3, 4, 5)]).tolist()) == [0, 1, 2, 3, 4]


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"7 usable pairs do not fill one global batch of 8: add pairs, or set run\.global_batch to fewer",
    ):
        make((3, 4), global_batch=8)
    assert make((3, 4), global_batch=7).total_steps == 1


@st.composite
def cases(draw: st.DrawFn) -> Plan:
    block_rows = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6).map(tuple))
    return make(
        block_rows,
        draw(st.integers(1, sum(block_rows))),
        seed=draw(st.integers(0, 5)),
        epochs=draw(st.integers(1, 2)),
        window=draw(st.integers(1, 100)),
    )


@given(cases())
def test_an_epoch_has_every_pair_in_one_step(plan: Plan) -> None:
    ids = np.concatenate([plan.step_ids(step) for step in range(plan.total_steps)])
    assert (np.sort(ids.reshape(plan.epochs, -1)) == np.arange(plan.order.num_pairs)).all()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (1.5, 5), (0.5, 2), (2, 6), (0.01, 1)])
def test_a_started_step_of_a_fractional_epoch_is_one(epochs: float, steps: int) -> None:
    """Five pairs in steps of two: 3 steps in an epoch, rounded up as transformers rounds num_train_epochs."""
    plan = Plan(Order((5,), seed=0), np.ones(5), global_batch=2, epochs=epochs)
    assert plan.total_steps == steps


# --- the running hash ---


def test_the_hash_tells_pairs_order_and_steps_apart() -> None:
    def hash_of(*steps: list[int]) -> str:
        digest = ""
        for ids in steps:
            digest = extend_hash(digest, np.array(ids))
        return digest

    different = [hash_of([0, 1], [2]), hash_of([0], [1, 2]), hash_of([1, 0], [2]), hash_of([0, 1]), hash_of()]
    assert len(set(different)) == len(different)
    assert hash_of([0, 1], [2]) == different[0]
    assert extend_hash("", np.array([0, 1], np.int32)) == hash_of([0, 1])
    assert extend_hash("", np.arange(4)[::2]) == hash_of([0, 2])
