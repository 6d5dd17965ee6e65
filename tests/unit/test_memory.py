"""The estimate of memory, by hand for sizes that can be counted, and by transformers for models that are published.

How far it is from what is measured is in docs/scaling.md, by tests/benchmarks/memory.py.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.blocks import open_blocks
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine import memory
from ray_prefopt.engine.memory import ModelSize, activation_bytes, estimate, layer_bytes
from ray_prefopt.training.run import describe
from tests.benchmarks.memory import CASES, MIB, Case, Measured, expected, row
from tests.tiny import write_blocks

ROOT = Path(__file__).resolve().parents[2]
TOY = ModelSize(parameters=1000, hidden=4, layers=3, vocabulary=10, intermediate=8, key_value=2)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    path = ROOT / "docs" / "scaling_tables.py"
    spec = importlib.util.spec_from_file_location("scaling_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_tables"] = module
    spec.loader.exec_module(module)
    return module


def of(size: ModelSize = TOY, **given: Any) -> memory.MemoryEstimate:
    return estimate(
        size, **{"tokens": 0, "scored": 0, "zero_stage": 2, "world_size": 4, "device": "cpu", **given}
    )


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (None, 4000, 4000, 8000),
        (0, 4000, 4000, 8000),
        (1, 2000, 6000, 3000),  # bf16 weights; gradients in both; a quarter of master weights and two moments
        (2, 2000, 1000, 3000),
        (3, 500, 1000, 3000),
    ],
)
def test_what_each_stage_shards(stage: int | None, weights: int, gradients: int, optimizer: int) -> None:
    found = of(zero_stage=stage)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_adapters_have_gradients_and_states_of_their_own_alone() -> None:
    found = of(ModelSize(**{**vars(TOY), "trainable": 40}))
    assert (found.weights, found.gradients, found.optimizer) == (2000, 40, 120)


def test_what_is_offloaded_is_on_the_host() -> None:
    found = of(zero_stage=3, offload_optimizer=True, offload_param=True)
    assert (found.weights, found.gradients, found.optimizer, found.host) == (0, 0, 0, 4500)


def test_activations_of_a_layer() -> None:
    # fp32: two norms of 3 x 4 numbers; queries, output twice: 3 x 4; keys and values twice: 4 x 2; the MLP: 4 x 8
    assert layer_bytes(TOY, "single") == 4 * (24 + 12 + 8 + 32) == 36 * 4 + 16 * 2 + 16 * 8
    # half: a norm has 4 numbers in fp32 and 8 in half
    assert layer_bytes(TOY, "half") == 2 * (16 + 16) + 2 * (12 + 8 + 32) == 22 * 4 + 8 * 2 + 8 * 8
    # autocast: a norm as in fp32, and its output in half besides
    assert layer_bytes(TOY, "autocast") == 2 * (48 + 8) + 2 * (12 + 8 + 32)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    layer, gradients = layer_bytes(TOY, "half"), 2 * (2 * 4 + 2 * 8)
    assert activation_bytes(TOY, 5, "half", checkpointing=False) == 5 * (3 * layer + gradients)
    assert activation_bytes(TOY, 5, "half", checkpointing=True) == 5 * (3 * 2 * 4 + layer + gradients)


def test_it_is_light() -> None:
    probe = (
        "import sys, ray_prefopt.engine.memory; print([m for m in ('deepspeed', 'ray') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", probe], text=True).strip() == "[]"


@pytest.mark.parametrize("name", ["0.5B", "7B"])
def test_sizes_of_published_models(tables: ModuleType, name: str) -> None:
    """The table's arithmetic gives what transformers counts, and what a model's config says."""
    expected = tables.MODELS[name]
    heads = {"0.5B": (14, 2), "7B": (28, 4)}[name]
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=expected.hidden,
        num_hidden_layers=expected.layers,
        intermediate_size=expected.intermediate,
        vocab_size=expected.vocabulary,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        tie_word_embeddings=name == "0.5B",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert ModelSize.of(config, model.num_parameters()) == expected


def test_of_a_config_that_says_too_little_there_is_no_estimate() -> None:
    assert ModelSize.of(SimpleNamespace(hidden_size=4), 1000) is None


def test_the_page_is_up_to_date(tables: ModuleType) -> None:
    text = tables.PAGE.read_text()
    assert tables.page(text) == text, "run: PYTHONPATH=. python docs/scaling_tables.py"


def test_the_page_has_the_formula(tables: ModuleType) -> None:
    text = tables.PAGE.read_text()
    found = re.search(r"`(\d+)h \+ (\d+)k \+ (\d+)f` bytes.*?`(\d+)h \+ (\d+)k \+ (\d+)f`", text, re.DOTALL)
    assert found is not None
    numbers = [int(number) for number in found.groups()]
    for index, precision in ((0, "single"), (3, "half")):
        h, k, f = numbers[index : index + 3]
        assert h * TOY.hidden + k * TOY.key_value + f * TOY.intermediate == layer_bytes(TOY, precision)


def test_choices_of_the_page_fit(tables: ModuleType) -> None:
    """The 7B on 80 GB: four GPUs do under stage 2, three micro-batches fewer or two GPUs do not."""
    size, room = tables.MODELS["7B"], 0.9 * 80e9
    assert str(tables.fewest(size, 80, offload=False)) == "4 x ZeRO 2, 8"
    assert tables.needs(size, 4, 2, 8, offload=False).device <= room
    assert tables.needs(size, 2, 3, 1, offload=False).device > room


def test_bandwidth(tables: ModuleType) -> None:
    """1024 tokens: 8 operations for each, of which an A100 does 125 million million a second; 4 bytes per weight."""
    assert tables.bandwidth(1024, 2, "A100") == pytest.approx(4 / (8 * 1024 / 124.8e12))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_measurements_of_the_page_are_compared_with_this_estimate(tables: ModuleType, case: Case) -> None:
    """`python -m tests.benchmarks.memory` measures; the error of a case is at most a tenth."""
    line = next(line for line in tables.PAGE.read_text().splitlines() if line.startswith(f"| {case.name} |"))
    found = Measured(case, expected(case), int(line.split(" | ")[-2]) * MIB)
    assert row(found) == line
    assert abs(found.error) < 0.1


# --- In the plan of a run ---


def planned(tmp_path: Path, **sections: Any) -> str:
    """What `--dry-run` says of the quickstart's model, with pairs of at most 256 tokens, 4 at once."""
    values = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    values["model"]["tokenizer"] = str(ROOT / "examples" / "tokenizer")
    values["data"]["train"] = str(ROOT / "examples" / "pairs.jsonl")
    for section, changes in {"run": {}, **sections}.items():
        values[section] |= changes
    values["run"]["storage_path"] = str(tmp_path)
    config = TrainConfig.model_validate(values)
    return str(describe(config)["workers"].get("memory"))


def test_the_plan_of_a_run_says_it(tmp_path: Path) -> None:
    """Two completions of 256 tokens for each of four pairs, while nothing is prepared."""
    size = ModelSize(148160, 64, 2, 512, 128, 64)
    found = estimate(size, tokens=2048, scored=2048, zero_stage=2, world_size=2, is_half=False, device="cpu")
    text = planned(tmp_path)
    assert text == (
        f"about {found.device / 1e6:.1f} MB, of which {found.activations / 1e6:.1f} MB for 2,048 tokens at once"
    )


def test_adapters_need_less(tmp_path: Path) -> None:
    """Rank 4 on queries and values, in two layers: 4 * (64 + 64) * 2 * 2 weights."""
    size = ModelSize(148160, 64, 2, 512, 128, 64, trainable=2048)
    found = estimate(size, tokens=2048, scored=2048, zero_stage=2, world_size=2, is_half=False, device="cpu")
    assert planned(tmp_path, model={"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}).startswith(
        f"about {found.device / 1e6:.1f} MB, "
    )


def test_what_is_offloaded_is_named(tmp_path: Path) -> None:
    """Gradients, master weights and moments: 16 bytes per weight, shared by two."""
    text = planned(tmp_path, engine={"offload_optimizer": "cpu"})
    assert text.endswith(" for 2,048 tokens at once; 1.2 MB of the host")


def test_of_prepared_pairs_the_longest_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [
        TokenizedPair([1] * 10, [2] * 12, 4, 4),
        TokenizedPair([1] * 30, [2] * 20, 10, 10),
        *[TokenizedPair([1] * 5, [2] * 5, 2, 2)] * 6,
    ]
    blocks = open_blocks(write_blocks(tmp_path / "blocks", pairs))
    monkeypatch.setattr("ray_prefopt.training.run.find_blocks", lambda *_: blocks)
    # The prompt once: 30 + 20 - 10, 10 + 12 - 4, and two of 5 + 5 - 2.
    assert planned(tmp_path).endswith(" for 74 tokens at once")
    assert planned(tmp_path, model={"layout": "padded"}).endswith(" for 92 tokens at once")


def test_of_quantized_weights_nothing_is_said(tmp_path: Path) -> None:
    from ray_prefopt.training import run

    given = {"path": "m", "quantization": {"load_in_4bit": True}, "lora": {}}
    config = TrainConfig.model_validate({"model": given, "data": {"train": "t"}})
    assert run._describe_memory(config, SimpleNamespace(is_encoder_decoder=False), None) == {}  # type: ignore[arg-type]
