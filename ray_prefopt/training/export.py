"""From a checkpoint to a Hugging Face folder: safetensors and tokenizer, or an adapter, or the adapter merged in."""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from torch import Tensor, nn

from ray_prefopt.config import ModelConfig, TrainConfig
from ray_prefopt.engine.base import kept_buffers
from ray_prefopt.engine.zero import full_weights
from ray_prefopt.errors import CheckpointError, ConfigError
from ray_prefopt.model.adapters import merged, name_base
from ray_prefopt.model.load import compute_dtype, load_architecture, load_model, save_model
from ray_prefopt.model.tokenizer import load_tokenizer
from ray_prefopt.training.card import NO_DETAILS, CardDetails, model_card
from ray_prefopt.training.checkpoint import WEIGHTS, Checkpoint, find_checkpoint, local_copy


def export(source: str, out: str, *, merge: bool = False, details: CardDetails = NO_DETAILS) -> str:
    """Write the model in a checkpoint, or in the newest checkpoint of a run, as a Hugging Face folder; returns `out`.

    With an adapter that is the adapter, or with `merge` the whole model, no longer quantized; README.md is its model
    card, to which `details` may add. Raises CheckpointError for a source that holds no whole checkpoint, ConfigError
    for `merge` without an adapter or an `out` that holds something else.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        raise CheckpointError(f"{source}: neither a checkpoint nor the folder of a run that has one")
    fs, target = url_to_fs(out)
    if fs.exists(target) and fs.ls(target) and not _holds_model(fs, target):
        raise ConfigError(f"{out} is not empty and holds no model: export into another folder")
    with local_copy(checkpoint) as folder:
        config = TrainConfig.model_validate_json((folder / "config.json").read_text())
        if merge and not config.model.has_adapter:
            raise ConfigError(f"{source} has no adapter to merge: it was trained without model.lora")
        weights = checkpoint_weights(config, folder)
        model = _with_weights(config.model, weights, seed=config.run.seed, dequantize=merge)
    if merge:
        model = merged(model)
    # Beside its place and then into it, so that nobody loads half a model.
    beside = str(Path(target).parent) if isinstance(fs, LocalFileSystem) else None
    fs.makedirs(str(Path(target).parent), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".export-") as temporary:
        staged = Path(temporary, "model")
        save_model(model, staged)
        name_base(staged, details.base_model)
        load_tokenizer(config.model, config.data.chat_template).save_pretrained(staged)
        card = model_card(
            config,
            steps=checkpoint.state.step,
            metrics=metrics_at(checkpoint),
            is_adapter=config.model.has_adapter and not merge,
            details=details,
        )
        card.save(staged / "README.md")  # in the place of peft's
        if isinstance(fs, LocalFileSystem):
            shutil.rmtree(target, ignore_errors=True)
            staged.rename(target)
        else:
            if fs.exists(target):
                fs.rm(target, recursive=True)  # a folder is put into one that is there
            fs.put(str(staged), target, recursive=True)
    return out


def _holds_model(fs: AbstractFileSystem, folder: str) -> bool:
    """Whether a folder is one of Hugging Face's: those of runs and checkpoints have another kind of config.json."""
    if fs.exists(f"{folder}/adapter_config.json"):
        return True
    try:
        return "model_type" in json.loads(fs.cat_file(f"{folder}/config.json"))
    except (FileNotFoundError, ValueError):
        return False


def metrics_at(checkpoint: Checkpoint) -> dict[str, float]:
    """The last value of every metric that its run logged up to this checkpoint; none where it lies by itself."""
    fs, folder = url_to_fs(checkpoint.path)
    log = f"{folder.rsplit('/', 2)[0]}/metrics.jsonl"
    if not fs.exists(log):
        return {}
    # The last line may be half written.
    records = [json.loads(line) for line in fs.cat_file(log).split(b"\n")[:-1]]
    return {
        name: value
        for record in records
        if record["step"] <= checkpoint.state.step
        for name, value in record.items()
    }


def checkpoint_weights(config: TrainConfig, folder: Path) -> dict[str, Tensor]:
    """The trained weights in a checkpoint's folder, whole, by the names of the model."""
    if (folder / WEIGHTS).exists():
        return load_file(folder / WEIGHTS)
    if config.engine.kind == "plain":
        return load_file(folder / "model.safetensors")
    return full_weights(folder)


def _with_weights(
    config: ModelConfig, weights: dict[str, Tensor], *, seed: int, dequantize: bool
) -> nn.Module:
    """The model with these weights; with an adapter they are its own, on top of the base model's."""
    dtype = compute_dtype(config, load_architecture(config))
    config = config.model_copy(update={"disable_dropout": False})  # it was off for this run alone
    load = partial(load_model, config, dtype=dtype, seed=seed, dequantize=dequantize)
    model = load(blank=not config.has_adapter)
    if not config.has_adapter and not kept_buffers(model).keys() <= weights.keys():
        model = load()  # buffers that the checkpoint does not hold are as they were
    try:
        _, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights are not those of the model: {error}") from error
    named = dict(model.named_parameters(remove_duplicate=False))
    loaded = {
        id(named[name]) for name in named.keys() & weights.keys()
    }  # tied weights are one, under several names
    missing = sorted(
        name for name, weight in named.items() if weight.requires_grad and id(weight) not in loaded
    )
    if unexpected or missing:
        raise CheckpointError(
            f"the checkpoint's weights are not those of the model: missing {missing[:3]}, unknown {unexpected[:3]}"
        )
    return model
