"""A head that ZeRO 3 shards: its logits come in chunks, and losses and gradients are those of whole weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.collate import collate, pack
from ray_prefopt.engine.build import build_engine
from ray_prefopt.losses import head
from ray_prefopt.losses.objective import Objective, StepTotals
from ray_prefopt.model.layout import make_scorer
from tests.gang import run_gang
from tests.tiny import save_tiny_model
from tests.unit.test_forward import pairs_of

VOCABULARY, ROWS = 512, 40
"""Logits of a position, and positions of a chunk: of a micro-batch there are two or three."""
CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"gradient_checkpointing": True},
    "frozen": {"lora": {"r": 4}},
    "trained beside an adapter": {"lora": {"r": 4, "modules_to_save": ["lm_head"]}},
    "under an adapter": {"lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}},
}
ARMS = {"padded": ("plain", "padded"), "zero 2": ("zero2", "auto"), "zero 3": ("zero3", "auto")}
HALF = ("untied", "frozen")


class Rows(TorchDispatchMode):
    """The most rows of any tensor that are as long as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dim() > 1 and made.shape[-1] == VOCABULARY:
            self.most = max(self.most, made.numel() // VOCABULARY)
        return made


@dataclass(frozen=True)
class Done:
    """What a rank did in a step."""

    losses: list[float]
    evaluated: Tensor
    """Log-probabilities before the step."""
    gradients: dict[str, Tensor]
    """Of the first rank."""
    has_head: bool
    rows: int
    held: int
    """The most elements of a weight that are there after the step."""


def _config(path: str, model: dict[str, Any], arm: str, dtype: str) -> TrainConfig:
    engine, layout = ARMS[arm]
    options = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    stage = {"kind": "zero", "zero_stage": int(engine[-1]), "deepspeed": options} if engine != "plain" else {}
    sgd = {
        "name": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "schedule": "constant",
        "warmup_ratio": 0.0,
    }
    return TrainConfig.model_validate(
        {
            "model": {"path": path, "layout": layout, "dtype": dtype, **model},
            "data": {"train": "unread"},
            "loss": {"kind": "cpo_simpo", "cpo_alpha": 0.5},
            "optim": sgd,
            "engine": stage or {"kind": "plain"},
        }
    )


def _step(config: TrainConfig) -> Done:
    """Of two micro-batches, with a learning rate of one: what weights lose is their gradient."""
    head.CHUNK_ELEMENTS["cpu"] = ROWS * VOCABULARY
    engine = build_engine(config, total_steps=2, device=CPU)
    scorer, _ = make_scorer(
        engine.forward, engine.module, config.model, getattr(torch, config.model.dtype), CPU
    )
    objective, totals, losses = Objective(config.loss), StepTotals(32, 200), []
    micro_batches = []
    for index in range(2):
        pairs = pairs_of(8, seed=2 * dist.get_rank() + index)
        micro_batches.append(pack(pairs) if scorer.is_packed else collate(pairs, pad_id=0))
    before = {name: weight.clone() for name, weight in engine.weights().items()}
    with Rows() as rows:
        with torch.no_grad():
            evaluated = torch.cat([scorer.logps(batch).chosen for batch in micro_batches])
        for batch in micro_batches:
            loss, _ = scorer.loss(
                batch, lambda logps, batch=batch: objective.loss(logps, batch.weights_B, totals)
            )
            engine.backward(loss)
            losses.append(float(loss.detach()))
    engine.step()
    after = engine.weights()
    gradients = {name: before[name] - weight for name, weight in after.items()}
    held = max(weight.numel() for weight in engine.module.parameters())
    return Done(losses, evaluated, gradients, scorer.head is not None, rows.most, held)


def _steps(configs: dict[tuple[str, str, str], TrainConfig]) -> dict[tuple[str, str, str], Done]:
    return {key: _step(config) for key, config in configs.items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Done]:
    """By model, arm and precision."""
    folder: Path = tmp_path_factory.mktemp("models")
    paths = {
        is_tied: save_tiny_model(
            folder / str(is_tied), vocab_size=VOCABULARY, tie_word_embeddings=is_tied, initializer_range=0.2
        )
        for is_tied in (True, False)
    }
    cases = [(name, arm, "float32") for name in MODELS for arm in ("padded", "zero 3")]
    cases += [(name, arm, "bfloat16") for name in HALF for arm in ("zero 2", "zero 3")]
    configs = {case: _config(paths[case[0] == "tied"], MODELS[case[0]], *case[1:]) for case in cases}
    first, _ = run_gang(2, _steps, configs)
    return first


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """How far gradients are from each other, relative to the second."""
    assert one.keys() == other.keys()
    difference = torch.stack([(one[name] - gradient).norm() for name, gradient in other.items()]).norm()
    return float(difference / torch.stack([gradient.norm() for gradient in other.values()]).norm())


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_whole_weights(done: dict[Any, Done], name: str) -> None:
    found, expected = done[name, "zero 3", "float32"], done[name, "padded", "float32"]
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    torch.testing.assert_close(found.evaluated, expected.evaluated, rtol=1e-6, atol=2e-5)
    assert apart(found.gradients, expected.gradients) < 1e-5


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_that_of_whole_weights_too(done: dict[Any, Done], name: str) -> None:
    """bf16 has 8 bits, and DeepSpeed reduces gradients in it."""
    exact = done[name, "padded", "float32"]
    found, whole = done[name, "zero 3", "bfloat16"], done[name, "zero 2", "bfloat16"]
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)
    assert apart(found.gradients, whole.gradients) < 1e-2
    assert apart(found.gradients, exact.gradients) < 5e-2


@pytest.mark.parametrize("name", MODELS)
def test_no_more_logits_are_there_than_a_chunk_has(done: dict[Any, Done], name: str) -> None:
    """A head under an adapter has all of them, as padded pairs do."""
    found, has_chunks = done[name, "zero 3", "float32"], name != "under an adapter"
    assert found.has_head == has_chunks
    assert (0 < found.rows <= ROWS) == has_chunks
    assert done[name, "padded", "float32"].rows > 2 * ROWS
    assert found.held == 0
