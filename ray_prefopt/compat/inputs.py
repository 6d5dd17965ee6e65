"""What a trainer is given in memory, put where every worker can read it: models, tokenizers and datasets as folders."""

import shutil
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import ray.data
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_prefopt.errors import ConfigError
from ray_prefopt.model.load import save_model

Pairs: TypeAlias = str | datasets.Dataset | datasets.IterableDataset | ray.data.Dataset


def model_values(model: Any, tokenizer: PreTrainedTokenizerBase | None, storage: Path) -> dict[str, Any]:
    """`path` and `tokenizer` of the model section; what is in memory is saved under `storage` first.

    Raises ConfigError for what is neither a path nor a whole model of transformers.
    """
    if isinstance(model, PeftModel):
        raise ConfigError(
            "model: got a PeftModel; give its base model as model and its LoraConfig as peft_config, "
            "or merge_and_unload() it first"
        )
    if not isinstance(model, str | PreTrainedModel):
        raise ConfigError(f"model: got {type(model).__name__}; give a path, a hub id, or a PreTrainedModel")
    values: dict[str, Any] = {"path": model}
    if isinstance(model, PreTrainedModel):
        values["path"] = str(storage / "model")
        save_model(model, storage / "model")
        values["tokenizer"] = model.name_or_path or None
    if tokenizer is not None:
        values["tokenizer"] = str(storage / "tokenizer")
        tokenizer.save_pretrained(values["tokenizer"])
    if isinstance(model, PreTrainedModel) and values["tokenizer"] is None:
        raise ConfigError(
            "processing_class: got none, and a model made in memory names no tokenizer; give one"
        )
    return values


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
