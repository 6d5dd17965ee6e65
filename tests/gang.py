"""Ranks without Ray: several processes with a gloo group, for what is not Ray's business."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ray_prefopt.training.loop  # noqa: F401  the fork server imports it once for all gangs

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.gang"])


def run_gang(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns on each rank; raises what the first failing rank raised, traceback as a note."""
    with tempfile.TemporaryDirectory() as folder:
        results = CONTEXT.SimpleQueue()
        gang = [
            CONTEXT.Process(target=_rank_main, args=(rank, world_size, folder, results, work, args))
            for rank in range(world_size)
        ]
        for process in gang:
            process.start()
        found = dict(pickle.loads(results.get()) for _ in gang)
        for process in gang:
            process.join()
    for is_error, value in (found[rank] for rank in range(world_size)):
        if is_error:
            raise value
    return [found[rank][1] for rank in range(world_size)]


def _rank_main(
    rank: int, world_size: int, folder: str, results: Any, work: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(folder, 'store')}", rank=rank, world_size=world_size
    )
    # Pickled here: a queue would hand on the memory of tensors, which ends with this process.
    try:
        results.put(pickle.dumps((rank, (False, work(*args)))))
    except Exception as error:
        error.add_note(f"rank {rank}: {traceback.format_exc()}")
        results.put(pickle.dumps((rank, (True, error))))
    # Without a barrier: after an error the others may be anywhere.
    os._exit(0)
