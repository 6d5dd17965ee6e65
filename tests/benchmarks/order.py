"""What the order of training costs a worker, by the number of pairs.

    python -m tests.benchmarks.order [PAIRS ...]

Blocks have 1000 pairs and a step 1024, as on 1000 GPUs; no token is read. Memory is what a process has more for it.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ray_prefopt.data.balance import Costs, Limit, micro_batches
from ray_prefopt.data.blocks import Lengths
from ray_prefopt.data.plan import Order, Plan, extend_hash

BLOCK, STEP, RANKS = 1000, 1024, 1000
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(pairs: int) -> str:
    empty = memory()
    columns = [np.full(pairs, value, np.int32) for value in (768, 640, 256, 256)]
    lengths = Lengths(*columns)
    order = Order((BLOCK,) * (pairs // BLOCK), seed=0)
    plan = Plan(order, lengths.chosen + lengths.rejected, STEP)
    _, first = timed(lambda: plan.step_ids(0))
    steps = min(plan.total_steps, 1000)
    _, ids = timed(lambda: [plan.step_ids(step) for step in range(steps)])

    def deal(step: int) -> None:
        micro_batches(Costs().of(lengths.take(plan.step_ids(step))), Limit(1), 7, RANKS)

    _, dealt = timed(lambda: [deal(step) for step in range(steps)])

    def check() -> str:
        digest = ""
        for step in range(steps):
            digest = extend_hash(digest, plan.step_ids(step))
        return digest

    _, checked = timed(check)
    whole = checked / steps * plan.total_steps
    cells = [
        f"{first:.1f} s",
        *(f"{1000 * value / steps:.2f} ms" for value in (ids, dealt)),
        f"{whole:.0f} s",
    ]
    return f"| 10^{len(str(pairs)) - 1} | {' | '.join(cells)} | {(memory() - empty) / 2**20:.0f} MiB |"


HEAD = """\
| pairs | order of an epoch | ids of a step | a rank's part of it | checking the order of a whole epoch | memory |
|---|---|---|---|---|---|"""


def main(given: list[str]) -> None:
    """Each in a process of its own."""
    if len(given) == 1:
        sys.stdout.write(measure(int(given[0])) + "\n")
        return
    sys.stdout.write(HEAD + "\n")
    for pairs in given or ["1000000", "10000000", "100000000"]:
        command = [sys.executable, "-m", "tests.benchmarks.order", pairs]
        sys.stdout.write(subprocess.check_output(command, text=True))


if __name__ == "__main__":
    main(sys.argv[1:])
