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

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.balance import Costs, Limit
from ray_prefopt.data.blocks import open_blocks
from ray_prefopt.data.plan import Order, Plan
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine import memory
from ray_prefopt.engine.memory import ModelSize, activation_bytes, estimate, layer_bytes
from ray_prefopt.training.batches import Batching, longest_pair
from ray_prefopt.training.describe import describe
from ray_prefopt.training.footprint import Footprint, Outline, Peak, footprint
from tests.benchmarks.memory import CASES, MIB, Case, Measured, expected, row
from tests.tiny import tiny_config, write_blocks

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
    # fp32: two norms of 2 x 4 numbers; queries, output twice: 3 x 4; keys and values twice: 4 x 2; the MLP: 2 x 8
    assert layer_bytes(TOY, "single") == 4 * (16 + 12 + 8 + 16) == 28 * 4 + 16 * 2 + 8 * 8
    assert layer_bytes(TOY, "half") == 2 * (16 + 12 + 8 + 16) == 14 * 4 + 8 * 2 + 4 * 8
    # autocast: a norm as in fp32, and its output in half besides
    assert layer_bytes(TOY, "autocast") == 2 * (32 + 8) + 2 * (12 + 8 + 16)
    # by tiles, queries, keys, values and output once; with adapters, all of the MLP
    assert layer_bytes(TOY, "single", tiled=True) == 4 * (16 + 2 * 4 + 2 * 2 + 16)
    adapted = ModelSize(**{**vars(TOY), "trainable": 40})
    assert layer_bytes(adapted, "single") == 4 * (16 + 12 + 8 + 32)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    layer, gradients = layer_bytes(TOY, "half"), 2 * (2 * 4 + 4 * 8)
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


def test_of_prepared_pairs_the_largest_micro_batch_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt once, and no last tokens: 30 + 20 - 10 - 2, 10 + 12 - 4 - 2, and six of 5 + 5 - 2 - 2."""
    pairs = [
        TokenizedPair([1] * 10, [2] * 12, 4, 4),
        TokenizedPair([1] * 30, [2] * 20, 10, 10),
        *[TokenizedPair([1] * 5, [2] * 5, 2, 2)] * 6,
    ]
    blocks = open_blocks(write_blocks(tmp_path / "blocks", pairs))
    monkeypatch.setattr("ray_prefopt.training.describe.find_blocks", lambda *_: blocks)
    # Two micro-batches of four pairs: 38 with three of 6.
    assert planned(tmp_path).endswith(" for 56 tokens at once")
    # 38 and a 6, 16 and five of 6, since two workers have as many micro-batches.
    assert planned(tmp_path, run={"micro_batch_tokens": 60}).endswith(" for 46 tokens at once")
    assert planned(tmp_path, run={"micro_batch_tokens": 20}).endswith(" for 38 tokens at once")
    # Eight rows as long as the longest.
    assert planned(tmp_path, model={"layout": "padded"}).endswith(" for 240 tokens at once")


def test_while_nothing_is_prepared_a_budget_is_full(tmp_path: Path) -> None:
    assert planned(tmp_path, run={"micro_batch_tokens": 8192}).endswith(" for 8,192 tokens at once")
    assert planned(tmp_path, run={"micro_batch_tokens": 100}).endswith(" for 512 tokens at once")


def test_all_logits_at_once_where_they_are_not_made_in_chunks(tmp_path: Path) -> None:
    """By hand: 50 logits and their gradient in half precision, and twice in fp32; else 50 in fp32, twice in half
    precision, and the gradient of 10 x 4 weights."""
    assert of(scored=5, chunked_head=False).head == 2 * 2 * 50 + 2 * 4 * 50
    assert of(scored=5).head == of(scored=5, zero_stage=3).head == (4 + 2 * 2) * 50 + 4 * 40
    size = ModelSize(148160, 64, 2, 512, 128, 64)
    for layout, dtype, stage in (
        ("padded", "float32", 0),
        ("packed", "float16", 0),
        ("packed", "float32", 3),
    ):
        found = estimate(
            size, tokens=2048, scored=2048, zero_stage=stage, world_size=2, is_half=dtype == "float16",
            chunked_head=layout == "packed", device="cpu",
        )  # fmt: skip
        text = planned(tmp_path, model={"layout": layout, "dtype": dtype}, engine={"zero_stage": stage})
        assert text.startswith(f"about {found.device / 1e6:.1f} MB, ")


def test_halves_have_heads_and_gradients_of_their_own(tmp_path: Path) -> None:
    """By hand: 25 logits each, and twice the gradients of 10 x 4 weights, and of all 1000."""
    found = of(scored=50, zero_stage=None, is_half=False, in_halves=True)
    assert (found.head, found.reduction) == (2 * (4 * 250 + 4 * 40), 2 * 4000)
    size = ModelSize(148160, 64, 2, 512, 128, 64)
    for engine, cpus, dtype, is_halved in (
        ({"kind": "plain"}, 2, "float32", True),
        ({"kind": "plain"}, 3, "float32", False),
        ({"kind": "plain"}, 2, "float16", False),
        ({"zero_stage": 0}, 2, "float32", False),
    ):
        estimated = estimate(
            size, tokens=2048, scored=2048, zero_stage=None if "kind" in engine else 0, world_size=2,
            is_half=dtype == "float16", in_halves=is_halved, device="cpu",
        )  # fmt: skip
        text = planned(tmp_path, model={"dtype": dtype}, engine=engine, run={"cpus_per_worker": cpus})
        assert text.startswith(f"about {estimated.device / 1e6:.1f} MB, ")


def test_models_that_are_not_packed_are_known_beforehand(tmp_path: Path) -> None:
    """BLOOM's positions are in its scores; a head with an adapter of its own has its logits at once."""
    config = TrainConfig.model_validate(
        {
            "model": {"path": "m", "dtype": "float32", "lora": {"r": 2, "target_modules": ["lm_head"]}},
            "data": {"train": "t"},
            "engine": {"kind": "plain"},
        }
    )
    qwen, bloom = (
        AutoConfig.for_model(**tiny_config()),
        AutoConfig.for_model(**tiny_config("bloom", n_head=4)),
    )
    no_lora = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    found = [Outline.of(*given) for given in ((config, qwen), (no_lora, qwen), (no_lora, bloom))]
    assert [(outline.costs.layout, outline.has_chunked_head) for outline in found] == [
        ("packed", False),
        ("packed", True),
        ("padded", False),
    ]


def test_without_tokens_of_all_steps_the_longest_pair_counts(tmp_path: Path) -> None:
    """A hundred steps are looked at, of which none needs to hold the longest pair."""
    pairs = [TokenizedPair([1] * 5, [2] * 5, 2, 2)] * 1000
    pairs[777] = TokenizedPair([1] * 40, [2] * 40, 2, 2)
    blocks = open_blocks(write_blocks(tmp_path, pairs, rows=1000))
    plan = Plan(Order((1000,), seed=0), blocks.total_lengths, global_batch=2)
    batching = Batching(blocks, Costs(), Limit(1))
    assert batching.largest(plan, 1) == (76, 76)
    assert longest_pair(blocks, Costs("padded")) == 80
    assert batching.shortest(np.array([777, 5])).tolist() == [5]


def test_of_quantized_weights_nothing_is_said() -> None:
    given = {"path": "m", "quantization": {"load_in_4bit": True}, "lora": {}}
    config = TrainConfig.model_validate({"model": given, "data": {"train": "t"}})
    outline = Outline(AutoConfig.for_model(**tiny_config()), 1000, 40, Costs(), True)
    assert footprint(config, outline, None, 1) is None


# --- What was seen ---


def test_of_a_small_model_without_a_gpu_nothing_can_be_seen(tmp_path: Path) -> None:
    small, large = (Footprint(of(tokens=tokens), tokens) for tokens in (10, 10**6))
    assert [found.is_comparable(use_gpu=False) for found in (small, large)] == [False, True]
    assert small.is_comparable(use_gpu=True)


def test_the_peak_is_above_what_there_was() -> None:
    """64 MiB, written to and given back."""
    peak = Peak(torch.device("cpu"))
    before = peak.read()
    torch.ones(2**24)
    assert before < 2**24
    assert 2**26 - 2**20 < peak.read() < 2**26 + 2**24
