"""Checkpoints of run.save_only_model: the same weights, nothing else, and no way back into training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_prefopt.config import TrainConfig
from ray_prefopt.engine.build import build_engine
from ray_prefopt.errors import CheckpointError
from ray_prefopt.training.checkpoint import WEIGHTS, latest_checkpoint
from ray_prefopt.training.export import _with_weights, checkpoint_weights, export
from ray_prefopt.training.run import _of_checkpoint
from tests.gang import run_gang
from tests.invariant.training import Inputs, curves, run, stop_at
from tests.tiny import save_tiny_model

ENGINES = {
    "plain": ("plain", "float32", False),
    "zero0": ("zero0", "float32", False),
    "zero1": ("zero1", "bfloat16", False),
    "zero2": ("zero2", "bfloat16", False),
    "zero3": ("zero3", "bfloat16", False),
    "zero2 LoRA": ("zero2", "float32", True),
    "zero3 LoRA": ("zero3", "float32", True),
}


def test_the_weights_are_those_of_a_whole_checkpoint(inputs: Inputs, tmp_path: Path) -> None:
    jobs = {}
    for name, (engine, dtype, lora) in ENGINES.items():
        for alone in (False, True):
            config = inputs.config(
                engine, dtype=dtype, lora=lora, run={"save_only_model": alone, "save_steps": None}
            )
            jobs[f"{name} {alone}"] = inputs.job(config, tmp_path / f"{name} {alone}")
    found = curves(jobs, world_size=2)
    for name in ENGINES:
        all_weights, weights = found[f"{name} False"].weights, found[f"{name} True"].weights
        assert weights.keys() <= all_weights.keys()  # of tied weights the first name alone
        assert all(torch.equal(weight, all_weights[each]) for each, weight in weights.items())
        whole, alone = (latest_checkpoint(jobs[f"{name} {each}"].checkpoints) for each in (False, True))
        assert whole is not None
        assert alone is not None
        assert {file for file, _, _ in alone.files} == {"config.json", WEIGHTS}
        assert alone.num_bytes < whole.num_bytes / 2
        assert (whole.is_resumable, alone.is_resumable) == (True, False)


@pytest.mark.parametrize("lora", [False, True])
def test_training_cannot_go_on_from_it_but_evaluations_can(
    lora: bool, inputs: Inputs, tmp_path: Path
) -> None:
    config = inputs.config("plain", lora=lora, run={"save_only_model": True, "storage_path": str(tmp_path)})
    job = inputs.job(config, tmp_path / "run")
    stop_at({"": job}, 1, step=2)
    with pytest.raises(CheckpointError) as caught:
        run(job)
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    assert str(caught.value) == (
        f"{checkpoint.path} holds weights alone (run.save_only_model): training cannot go on from it. Export it and "
        "set model.path to begin from its weights, or set run.force_new to begin anew"
    )
    asked = config.model_copy(update={"model": config.model.model_copy(update={"path": checkpoint.path})})
    measured = _of_checkpoint(asked)
    assert measured.run.resume_from is None
    assert measured.model.has_adapter == lora
    exported = export(checkpoint.path, str(tmp_path / "out"))
    used = Path(str(measured.model.adapter if lora else measured.model.path))
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (used / name).read_bytes() == Path(exported, name).read_bytes()


@pytest.mark.parametrize(("stage", "dtype"), [(1, "bfloat16"), (2, "float32")])
def test_states_that_deepspeed_cannot_convert_are_no_hindrance(
    stage: int, dtype: str, inputs: Inputs, tmp_path: Path
) -> None:
    """Of another optimizer than Adam: to export and to evaluate, but to training with another number of workers."""
    optim = {"name": "sgd", "learning_rate": 0.5}
    config = inputs.config(f"zero{stage}", dtype=dtype, optim=optim, run={"storage_path": str(tmp_path)})
    plain = inputs.config("plain", optim=optim)
    jobs = {"": inputs.job(config, tmp_path / "run"), "plain": inputs.job(plain, tmp_path / "plain")}
    found = curves(jobs, world_size=2)
    for name, weight in found[""].weights.items():
        torch.testing.assert_close(weight, found["plain"].weights[name], rtol=0.1, atol=0.01)
    checkpoint = latest_checkpoint(jobs[""].checkpoints)
    assert checkpoint is not None
    asked = config.model_copy(update={"model": config.model.model_copy(update={"path": checkpoint.path})})
    measured = _of_checkpoint(asked)
    assert measured.run.resume_from is None
    exported = load_file(Path(str(measured.model.path), "model.safetensors"))
    assert all(torch.equal(found[""].weights[name].to(each.dtype), each) for name, each in exported.items())
    longer = inputs.config(f"zero{stage}", dtype=dtype, optim=optim, run={"epochs": 2})
    with pytest.raises(
        CheckpointError, match=r"the states of Adam alone for another .*: go on with as many as wrote"
    ):
        run_gang(1, run, inputs.job(longer, tmp_path / "run"))


@pytest.mark.parametrize(
    ("engine", "dtype"), [("plain", "float32"), ("zero1", "bfloat16"), ("zero2", "float32")]
)
def test_buffers_that_a_model_saves_are_kept(engine: str, dtype: str, tmp_path: Path) -> None:
    """BART adds one to its logits."""
    folder = save_tiny_model(tmp_path / "bart", "bart")
    bias = {"final_logits_bias": torch.arange(512.0)[None] % 128}  # numbers that bf16 has
    save_file(
        {**load_file(f"{folder}/model.safetensors"), **bias}, f"{folder}/model.safetensors", {"format": "pt"}
    )
    inputs = Inputs(folder, "unread", "unread")
    config = inputs.config(engine, dtype=dtype, run={"save_only_model": True})
    (weights,) = run_gang(1, _weights, config, tmp_path / "checkpoint")
    for found in (weights, checkpoint_weights(config, tmp_path / "checkpoint")):
        assert torch.equal(found["final_logits_bias"].float(), bias["final_logits_bias"])
    for found in (weights, {name: each for name, each in weights.items() if name not in bias}):
        model = _with_weights(config.model, found, seed=0, dequantize=False)
        assert torch.equal(model.get_buffer("final_logits_bias").float(), bias["final_logits_bias"])


def _weights(config: TrainConfig, folder: Path) -> dict[str, torch.Tensor]:
    engine = build_engine(config, total_steps=1, device=torch.device("cpu"))
    folder.mkdir()
    engine.save(folder)
    return engine.weights()
