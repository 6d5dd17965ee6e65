"""Packed pairs on a GPU, whose attention kernels are others."""

import pytest
import torch

from ray_prefopt.data.collate import collate, pack
from ray_prefopt.model.forward import Scorer
from ray_prefopt.model.layout import make_scorer
from tests.unit.test_forward import pairs_of
from tests.unit.test_packed import CONFIG, LOSSES, assert_same, graded, model_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3_text", "gpt2"])
def test_loss_and_gradient_are_those_of_padded_pairs(kind: str) -> None:
    device = torch.device("cuda")
    model, pairs = model_of(kind).to(device), pairs_of(6, seed=3)
    packed, reason = make_scorer(model, model, CONFIG, torch.float32, device)
    assert (packed.is_packed, reason) == (True, None)
    expected = graded(Scorer(model), collate(pairs, pad_id=0).to(device), LOSSES[0], model)
    assert_same(graded(packed, pack(pairs).to(device), LOSSES[0], model), expected)
