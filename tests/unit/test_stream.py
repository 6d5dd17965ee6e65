"""Pairs by id from blocks, and the thread that reads them ahead."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_prefopt.data import stream
from ray_prefopt.data.blocks import Blocks, open_blocks, read_block
from ray_prefopt.data.plan import Order
from ray_prefopt.data.stream import PairReader, Prefetched
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.errors import DataError
from tests.tiny import write_blocks

SIZES = (4, 4, 4, 3)
"""Rows of the blocks."""


def pair_of(pair_id: int) -> TokenizedPair:
    """A pair that knows its id, with sequences of different lengths."""
    rng = np.random.default_rng(pair_id)
    prompt = [pair_id, *rng.integers(0, 2**31 - 1, pair_id % 3).tolist()]
    chosen, rejected = (rng.integers(0, 2**31 - 1, rng.integers(1, 5)).tolist() for _ in range(2))
    return TokenizedPair(prompt + chosen, prompt + rejected, len(prompt), len(prompt))


def prepared(folder: str) -> Blocks:
    return open_blocks(
        write_blocks(folder, [pair_of(pair_id) for pair_id in range(sum(SIZES))], rows=SIZES[0])
    )


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return prepared(str(tmp_path_factory.mktemp("blocks")))


@pytest.fixture
def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that readers fetch from storage, in order."""
    fetched: list[int] = []

    def counted(blocks: Blocks, index: int) -> pa.Table:
        fetched.append(index)
        return read_block(blocks, index)

    monkeypatch.setattr(stream, "read_block", counted)
    return fetched


def as_lists(pair: TokenizedPair) -> tuple[list[int], list[int], int, int]:
    return list(pair.chosen), list(pair.rejected), pair.chosen_start, pair.rejected_start


# --- PairReader ---


@given(st.lists(st.integers(0, sum(SIZES) - 1), max_size=20), st.integers(1, 20))
def test_pairs_are_those_written_in_any_order(blocks: Blocks, ids: list[int], max_pairs: int) -> None:
    found = PairReader(blocks, max_pairs=max_pairs).read(np.array(ids, np.int64))
    assert [as_lists(pair) for pair in found] == [as_lists(pair_of(pair_id)) for pair_id in ids]


def test_pairs_come_from_any_storage() -> None:
    found = PairReader(prepared("memory://bucket/stream/blocks")).read(np.array([14, 0]))
    assert [as_lists(pair) for pair in found] == [as_lists(pair_of(pair_id)) for pair_id in (14, 0)]


@pytest.mark.parametrize("window", [1, 4, 8, 1000])
def test_an_epoch_in_windows_reads_every_block_once_and_holds_one_window(
    blocks: Blocks, blocks_read: list[int], window: int
) -> None:
    reader = PairReader(blocks, max_pairs=window)
    most = 0
    for pair_id in Order(SIZES, seed=3, window=window).epoch(0):
        reader.read(np.array([pair_id]))
        most = max(most, sum(table.num_rows for table in reader._held.values()))
    assert sorted(blocks_read) == [0, 1, 2, 3]
    assert most <= max(window, *SIZES)


def test_the_block_that_was_needed_longest_ago_goes_first(blocks: Blocks, blocks_read: list[int]) -> None:
    reader = PairReader(blocks, max_pairs=8)
    for pair_id in (0, 4, 0, 8, 4):  # blocks 0, 1, 0 again, 2 in place of 1, 1 once more
        reader.read(np.array([pair_id]))
    assert blocks_read == [0, 1, 2, 1]


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    blocks = prepared(str(tmp_path))
    path = tmp_path / "try/0002.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    reader = PairReader(blocks)
    reader.read(np.array([0, 4, 12]))
    with pytest.raises(DataError, match=r"0002\.parquet is damaged: expected checksum .*; remove "):
        reader.read(np.array([8]))


# --- Prefetched ---


def test_items_come_in_order_and_then_end() -> None:
    with closing(Prefetched(iter(range(50)), ahead=3)) as items:
        assert list(items) == list(range(50))
        assert list(items) == []


def test_an_error_comes_where_its_item_was_asked_for() -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("part-2.parquet is damaged")

    with closing(Prefetched(failing())) as items:
        assert [next(items), next(items)] == [1, 2]
        for _ in range(2):
            with pytest.raises(DataError, match=r"part-2\.parquet is damaged"):
                next(items)


def test_it_runs_a_few_items_ahead_and_no_more() -> None:
    made: list[int] = []

    def counted() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with closing(Prefetched(counted(), ahead=4)) as items:
        assert next(items) == 0
        wait_until(lambda: len(made) == 6)  # four are ready, and one waits for its place
        time.sleep(0.05)
        assert len(made) == 6
    assert len(made) == 6


def test_closing_in_the_middle_stops_the_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 0

    items = Prefetched(endless(), ahead=1)
    next(items)
    items.close()
    assert not items._thread.is_alive()
    items.close()


def test_waiting_is_counted() -> None:
    gate = threading.Event()

    def slow() -> Iterator[int]:
        gate.wait()
        yield 1

    with closing(Prefetched(slow())) as items:
        threading.Timer(0.1, gate.set).start()
        assert next(items) == 1
        waited = items.wait_s
        assert waited >= 0.09
        assert list(items) == []
        assert items.wait_s < waited + 0.09


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
