"""Every example runs: as it is where that needs no network, else with a small model and rows of its own form."""

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_prefopt.config import TrainConfig
from ray_prefopt.demo import make_tokenizer, run_demo
from ray_prefopt.search.tune import describe_search, tune
from ray_prefopt.settings import load_config, load_tune_config
from ray_prefopt.training.export import export
from ray_prefopt.training.run import train
from tests.tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples name their files as seen from there."""
    monkeypatch.chdir(ROOT)


def example(name: str, storage: Path, *flags: str) -> TrainConfig:
    return load_config([EXAMPLES / name], [f"--run.storage_path={storage}", *flags])


def on_cpu(storage: Path) -> list[str]:
    """Flags that make a run on GPUs a few steps of a small model on this machine."""
    return [
        f"--model.path={save_tiny_model(storage / 'model', max_position_embeddings=1024)}",
        "--model.dtype=float32",
        "--run.use_gpu=false",
        "--run.num_workers=1",
        "--run.cpus_per_worker=1",
        "--run.global_batch=4",
        "--run.max_steps=2",
    ]


def test_the_tokenizer_of_the_examples_is_one_of_bytes() -> None:
    kept, made = AutoTokenizer.from_pretrained(EXAMPLES / "tokenizer"), make_tokenizer([])
    assert len(kept) == 256 + 3
    assert kept.get_vocab() == made.get_vocab()
    assert kept.chat_template == made.chat_template
    assert len(kept("Größe")["input_ids"]) == 7  # ö and ß are two bytes each


@pytest.mark.ray
@pytest.mark.soak
def test_quickstart(tmp_path: Path, ray_local: None) -> None:
    config = example("quickstart.yaml", tmp_path)
    result = train(config)
    # 40 pairs and twice 8 conversations are seven steps of eight, three times
    assert result.steps == 21
    assert result.metrics["epoch"] == 3.0
    records = [json.loads(line) for line in Path(result.folder, "metrics.jsonl").read_text().splitlines()]
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)


@pytest.mark.ray
@pytest.mark.soak
def test_simpo_on_ultrafeedback(tmp_path: Path, ray_local: None) -> None:
    row = {
        "prompt": "Is ice cold?",
        "chosen": [{"role": "user", "content": "Is ice cold?"}, {"role": "assistant", "content": "It is."}],
        "rejected": [{"role": "user", "content": "Is ice cold?"}, {"role": "assistant", "content": "Ice?"}],
        "score_chosen": 8.0,
    }
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text((json.dumps(row) + "\n") * 8)
    flags = [*on_cpu(tmp_path), f"--data.train={pairs}", f"--data.eval={pairs}"]
    result = train(example("ultrafeedback_simpo.yaml", tmp_path, *flags))
    assert result.steps == 2
    # assistant_header: official, so the header is part of what is scored
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    answer = tokenizer("<|im_start|>assistant\nIt is.<|im_end|>\n")["input_ids"]
    assert result.metrics["completions/chosen_length"] == len(answer)


@pytest.mark.ray
@pytest.mark.soak
def test_cpo_for_translation(tmp_path: Path, ray_local: None) -> None:
    result = train(example("translation_cpo.yaml", tmp_path, *on_cpu(tmp_path)))
    assert result.model is not None
    assert result.steps == 2
    assert Path(result.model, "adapter_config.json").exists()
    merged = export(result.folder, str(tmp_path / "merged"), merge=True)
    assert AutoModelForCausalLM.from_pretrained(merged).num_parameters() > 0
    assert not Path(merged, "adapter_config.json").exists()


def script(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "flags", "weights"),
    [
        ("cpo.py", ["--loss_type", "simpo", "--cpo_alpha", "0.05"], "model.safetensors"),
        ("simpo.py", ["--use_peft", "--lora_r", "4", "--beta", "2.5"], "adapter_model.safetensors"),
    ],
)
def test_scripts_with_the_arguments_of_trl(
    name: str,
    flags: list[str],
    weights: str,
    tmp_path: Path,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "--model_name_or_path", save_tiny_model(tmp_path / "model"), "--dataset_name", "examples/pairs.jsonl",
        "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--per_device_train_batch_size", "4",
        "--bf16", "false", "--use_cpu", "--max_length", "256", *flags,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", [name, *arguments])
    script(name).main()
    assert capsys.readouterr().out.startswith("2 steps, mean loss ")
    assert {weights, "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.ray
@pytest.mark.soak
def test_from_python(tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]) -> None:
    result = script("train_from_python.py").main(str(tmp_path), max_steps=2)
    assert result.steps == 2
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed[:2]] == [
        "eval_facts_rewards/accuracies",
        "eval_chat_rewards/accuracies",
    ]
    assert "What do bees make? " in printed[2]


@pytest.mark.ray
@pytest.mark.soak
def test_a_search(tmp_path: Path, ray_local: None) -> None:
    flags = [f"--run.storage_path={tmp_path}", "--run.max_steps=2", "--search.trials=2"]
    config = load_tune_config([EXAMPLES / "search.yaml"], flags)
    result = tune(config, config.search)
    assert sum(result.trials.values()) == 2
    assert load_config([Path(result.config)]).run.name == "search-best"


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_search_from_python(tmp_path: Path, ray_local: None) -> None:
    result = script("search.py").main(str(tmp_path), "--run.max_steps=2")
    assert result.trials == {"finished": 18}
    assert result.std is not None
    assert Path(result.report).stat().st_size > 1_000_000


def test_the_plan_of_a_search_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eighteen trials take minutes: what they would be is enough."""
    example = script("search.py")
    assert len((EXAMPLES / "search.py").read_text().splitlines()) < 40
    plans: list[Any] = []
    monkeypatch.setattr(
        example, "tune", lambda config, search, resume: plans.append(describe_search(config, search))
    )
    with pytest.raises(AttributeError):  # there is no result
        example.main(str(tmp_path))
    assert (plans[0]["search"]["trials"], plans[0]["run"]["steps"]) == (
        18,
        "known when the pairs are prepared",
    )


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_learns_the_order_of_things(tmp_path: Path, ray_local: None) -> None:
    result = run_demo(tmp_path / "demo")
    assert 0.4 < result.accuracy_before < 0.6
    assert result.accuracy_after >= 0.9
    assert result.answers_right >= 0.6
    assert Path(result.picture).stat().st_size > 10_000
    assert load_config([Path(result.config)]).loss.kind == "cpo_simpo"
    assert AutoModelForCausalLM.from_pretrained(result.model).config.model_type == "qwen2"


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.parametrize(
    ("script", "arguments", "steps"),
    [("train_cpo.py", [str(EXAMPLES / "chat.jsonl")], 3), ("train_simpo.py", [], 3)],
)
def test_the_documents_own_examples(
    script: str,
    arguments: list[str],
    steps: int,
    tmp_path: Path,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight conversations, and seven rows: both are one step, three times."""
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, model, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    (run,) = tmp_path.glob("*/run")
    assert json.loads((run / "result.json").read_text())["steps"] == steps
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert any(not torch.equal(before[name].to(weight.dtype), weight) for name, weight in after.items())
