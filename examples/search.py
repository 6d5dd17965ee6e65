"""Search from Python: `python examples/search.py`, from the repository's root. Offline and small.

Every combination of three betas and three margins, each with two seeds, on the pairs of examples/quickstart.yaml.
"""

import sys
from pathlib import Path

from ray_prefopt import SearchConfig, TuneResult, load_config, tune


def main(storage_path: str = "runs", *flags: str) -> TuneResult:
    config = load_config(
        [Path("examples/quickstart.yaml")],
        ["--run.name=search-grid", "--run.num_workers=1", f"--run.storage_path={storage_path}", *flags],
    )
    search = SearchConfig(
        space={
            "loss.beta": {"grid": [0.5, 2.0, 8.0]},
            "loss.gamma_beta_ratio": {"grid": [0.0, 0.5, 1.0]},
        },
        seeds=[1, 2],
        scheduler="fifo",  # every trial to its end
    )
    result = tune(config, search, resume=True)  # the same call again goes on where it was interrupted
    spread = "" if result.std is None else f" ± {result.std:.3f}"  # over seeds
    print(f"{result.metric} {result.value:.3f}{spread} at {result.point}")
    print(f"pictures: {result.report}\nmodel: {result.model}\nits config: {result.config}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
