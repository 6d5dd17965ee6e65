"""What a trainer is given in memory, put where every worker can read it: models, tokenizers and datasets as folders."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import ray.data
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_prefopt.errors import ConfigError
from ray_prefopt.model.adapters import save_base
from ray_prefopt.model.load import save_model

Pairs: TypeAlias = str | datasets.Dataset | datasets.IterableDataset | ray.data.Dataset


def model_values(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, storage: Path, *, has_new_adapter: bool
) -> dict[str, Any]:
    """`path`, `adapter` and `tokenizer` of the model section; what is in memory is saved under `storage` first.

    With a new adapter, whatever the model trains now is frozen. Raises ConfigError for what is neither a path nor a
    whole model of transformers, with adapters of peft or without, and for one that would train other weights than
    workers do.
    """
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ConfigError(
            f"model: got {type(model).__name__}; give a path, a hub id, a PreTrainedModel or a PeftModel"
        )
    values: dict[str, Any] = {"path": model if isinstance(model, str) else str(storage / "model")}
    if isinstance(model, PeftModel):
        if not has_new_adapter:
            _check_base_is_frozen(model)
        save_base(model, storage / "model")
        values["adapter"] = _saved_adapter(model, storage / "adapter")
    elif isinstance(model, PreTrainedModel):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ConfigError(
                "model: got a model into which transformers has put an adapter; give a PeftModel, such as "
                "PeftModel.from_pretrained(base, adapter)"
            )
        if not has_new_adapter and not getattr(model, "is_quantized", False):
            _check_nothing_is_frozen(model)
        save_model(model, storage / "model")
    if not isinstance(model, str):
        values["tokenizer"] = model.name_or_path or None
    if tokenizer is not None:
        values["tokenizer"] = str(storage / "tokenizer")
        tokenizer.save_pretrained(values["tokenizer"])
    if not isinstance(model, str) and values["tokenizer"] is None:
        raise ConfigError(
            "processing_class: got none, and a model made in memory names no tokenizer; give one"
        )
    return values


def _check_base_is_frozen(model: PeftModel) -> None:
    """Workers train the adapter alone."""
    prefixes = (str(model.base_model.prefix), "modules_to_save.", "trainable_tokens_")
    others = sorted(
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and not any(prefix in name for prefix in prefixes)
    )
    if others and getattr(model.active_peft_config, "bias", "none") == "none":
        raise ConfigError(
            f"model: got a PeftModel whose base is trained too: {', '.join(others[:3])} ({len(others)} in all); "
            "name these modules in modules_to_save of its LoraConfig"
        )


def _check_nothing_is_frozen(model: PreTrainedModel) -> None:
    """Workers train all weights."""
    frozen = _frozen(model)
    if frozen:  # some may be so from the start, which is no choice of the user's
        with suppress(Exception), torch.device("meta"):
            frozen -= _frozen(type(model)(model.config))
    if frozen:
        names = ", ".join(sorted(frozen)[:3])
        raise ConfigError(
            f"model: got frozen weights: {names} ({len(frozen)} in all). All weights are trained, or "
            "with a peft_config those that it names, such as whole modules by modules_to_save: give one, or unfreeze"
        )


def _frozen(model: PreTrainedModel) -> set[str]:
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


def _saved_adapter(model: PeftModel, folder: Path) -> str:
    """The folder of the adapter that is active."""
    if len(model.active_adapters) != 1:
        raise ConfigError(
            f"model: got a PeftModel with the adapters {', '.join(model.active_adapters)} active; set_adapter() the "
            "one to train"
        )
    (name,) = model.active_adapters
    model.save_pretrained(str(folder), selected_adapters=[name])
    return str(folder if name == "default" else folder / name)  # where peft puts it


def pairs_source(pairs: Pairs, folder: Path) -> str:
    """A path that `data.train` takes; a dataset in memory is saved in `folder`, or beside it under its fingerprint."""
    if isinstance(pairs, str):
        return pairs
    if isinstance(pairs, datasets.Dataset):
        saved = folder.with_name(f"{folder.name}-{pairs._fingerprint}")
        if not (saved / "state.json").exists():
            pairs.save_to_disk(saved)
        return str(saved)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if isinstance(pairs, ray.data.Dataset):
        pairs.write_parquet(str(folder))
        return str(folder)
    if isinstance(pairs, datasets.IterableDataset):
        pairs.to_parquet(str(folder / "pairs.parquet"))
        return str(folder)
    raise ConfigError(
        f"train_dataset, eval_dataset: got {type(pairs).__name__}; give a datasets.Dataset or IterableDataset, "
        "a Ray Dataset, or a path"
    )
