"""What is measured: sums on the device, with one reduction and one host sync when somebody reads them; and rates."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

Record = dict[str, float]
"""Values by the names of metrics."""
METRICS = (
    "loss", "nll_loss", "aux_loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected", "logps_mean/chosen", "logps_mean/rejected", "logps_mean/accuracies",
    "logits/chosen", "logits/rejected", "completions/chosen_length", "completions/rejected_length",
)  # fmt: skip
"""Everything that `losses.objective` measures (`aux_loss`: of models with a router)."""


class MetricSums:
    """Adds up what `losses.objective` returns, over micro-batches and steps; reads as means over all ranks."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._steps = 0

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch; each has the same names. No host sync, no collective, and few operations on the device."""
        values = torch.stack(list(sums.values())).double()
        self._names, self._sums = tuple(sums), values if self._sums is None else self._sums + values

    def end_step(self) -> None:
        """The sums so far belong to one more optimizer step; `loss` is a mean over steps."""
        self._steps += 1

    def reduce(self) -> dict[str, float]:
        """Means since the last call, over all ranks, under TRL's names; starts anew. Called by all ranks."""
        totals, steps = self._sums, self._steps
        assert totals is not None
        self._sums, self._steps = None, 0
        if dist.is_initialized():
            dist.all_reduce(totals)
        return means(dict(sorted(zip(self._names, totals.tolist(), strict=True))), steps)


def means(sums: dict[str, float], steps: int) -> dict[str, float]:
    """Means over pairs from sums; of `loss` over steps, of `nll_loss` over `nll_weight`.

    >>> means({"loss": 3.0, "pairs": 4.0, "rewards/margins": 2.0, "nll_loss": 4.0, "nll_weight": 8.0}, 2)
    {'loss': 1.5, 'rewards/margins': 0.5, 'nll_loss': 0.5}
    """
    weights = {"loss": steps, "nll_loss": sums["nll_weight"]}
    return {
        name: value / weights.get(name, sums["pairs"])
        for name, value in sums.items()
        if name not in ("pairs", "nll_weight")
    }


class Meter:
    """Rates of training since the last reading; pairs and tokens are those of all ranks, padding not counted.

    `tokens_seen` are those of the steps before.
    """

    def __init__(self, tokens_seen: int = 0) -> None:
        self._since, self._pairs, self._tokens, self._waited = time.perf_counter(), 0, 0, 0.0
        self.tokens_seen = tokens_seen

    def add(self, pairs: int, tokens: int) -> None:
        self._pairs += pairs
        self._tokens += tokens
        self.tokens_seen += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training: evaluating, saving."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def read(self, wait_s: float) -> Record:
        """`data_wait` is the share of the time that this rank waited for pairs."""
        elapsed = time.perf_counter() - self._since
        record = {
            "pairs_per_second": self._pairs / elapsed,
            "tokens_per_second": self._tokens / elapsed,
            "data_wait": (wait_s - self._waited) / elapsed,
            "num_input_tokens_seen": self.tokens_seen,
        }
        self._since, self._pairs, self._tokens, self._waited = time.perf_counter(), 0, 0, wait_s
        return record
