"""One model and one set of pairs for all invariants."""

import pytest

from tests.invariant.training import PAIRS, Inputs
from tests.tiny import random_pairs, save_tiny_model, write_blocks


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    return Inputs(
        save_tiny_model(folder / "model"),
        write_blocks(folder / "blocks", random_pairs(PAIRS)),
        write_blocks(folder / "eval", random_pairs(7, seed=1)),
    )
