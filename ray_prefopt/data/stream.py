"""Pairs by id, from prepared blocks, ahead of the step that needs them."""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from ray_prefopt.data.blocks import Blocks, read_block
from ray_prefopt.data.plan import Ids
from ray_prefopt.data.tokenization import TokenizedPair

T = TypeVar("T")


class PairReader:
    """Random access to the pairs of a set of blocks, holding at most `max_pairs` of them (and at least one block).

    Blocks stay Arrow tables, so a held pair costs its bytes; only rows that are asked for are sliced out, as arrays.
    """

    def __init__(self, blocks: Blocks, *, max_pairs: int = 1_000_000) -> None:
        self._blocks = blocks
        self._starts = np.concatenate([[0], np.cumsum([rows for _, rows in blocks.files])])
        self._max_pairs = max_pairs
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

    def read(self, ids: Ids) -> list[TokenizedPair]:
        """The pairs with these ids, in this order. Raises DataError on a damaged block."""
        block_of = np.searchsorted(self._starts, ids, side="right") - 1
        return [
            self._pair(int(block), int(pair - self._starts[block]))
            for block, pair in zip(block_of, ids, strict=True)
        ]

    def _pair(self, block: int, row: int) -> TokenizedPair:
        table = self._table(block)
        return TokenizedPair(
            chosen=table["chosen"][row].values.to_numpy(),
            rejected=table["rejected"][row].values.to_numpy(),
            chosen_start=table["chosen_start"][row].as_py(),
            rejected_start=table["rejected_start"][row].as_py(),
        )

    def _table(self, block: int) -> pa.Table:
        if block in self._held:
            self._held.move_to_end(block)
            return self._held[block]
        table = read_block(self._blocks, block).combine_chunks()
        self._held[block] = table
        while len(self._held) > 1 and sum(held.num_rows for held in self._held.values()) > self._max_pairs:
            self._held.popitem(last=False)
        return table


class Prefetched(Generic[T]):
    """An iterator whose items are made by a background thread, a few ahead; adds up the time spent waiting for it."""

    def __init__(self, items: Iterable[T], *, ahead: int = 8) -> None:
        self.wait_s = 0.0
        self._queue: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(iter(items),), daemon=True, name="prefetch")
        self._thread.start()

    def _fill(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put((True, item)):
                    return
            self._put((False, None))
        except BaseException as error:  # handed over, and raised where the item was asked for
            self._put((False, error))

    def _put(self, entry: tuple[bool, T | BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        is_item, value = self._queue.get()
        self.wait_s += time.perf_counter() - started
        if is_item:
            return value  # type: ignore[return-value]
        self._queue.put((False, value))  # asking again gives the same end
        if value is None:
            raise StopIteration
        raise value  # type: ignore[misc]

    def close(self) -> None:
        """Stop the thread; items not yet taken are lost."""
        self._stopped.set()
        self._thread.join()
