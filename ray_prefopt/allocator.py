"""The allocator of workers on CPUs and of tasks that tokenize: the jemalloc that comes with Ray, not the C library's.

That of glibc leaves gaps between the tensors of a step which no other tensor fits into, and takes longer for the many
short strings of a tokenizer. As PyTorch's performance tuning guide has it, large tensors have no arena of their own,
where they could not fill the gaps of others, and freed pages are kept: fresh ones cost a CPU more than much of its
arithmetic. A small tensor may be cut from a gap 4,096 times its size; jemalloc would stop at 64 and take fresh pages.
"""

import os
import platform
from importlib.util import find_spec
from pathlib import Path

LIBRARY = Path(getattr(find_spec("ray"), "origin", "")).parent / "core" / "libjemalloc.so"
SETTINGS = "oversize_threshold:0,lg_extent_max_active_fit:12,dirty_decay_ms:-1,muzzy_decay_ms:-1"


def allocator() -> dict[str, str]:
    """What a process needs in its environment to begin with it; nothing where it is not there, or where LD_PRELOAD has
    been set."""
    if platform.machine() != "x86_64" or not LIBRARY.exists() or os.environ.get("LD_PRELOAD"):
        return {}
    return {"LD_PRELOAD": str(LIBRARY), "MALLOC_CONF": SETTINGS}
