"""What a command would do, told without doing any of it."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from ray_prefopt.config import ModelConfig, Source, TrainConfig
from ray_prefopt.data.plan import Plan
from ray_prefopt.data.prepare import find_blocks
from ray_prefopt.model.load import compute_dtype
from ray_prefopt.training.batches import Batching
from ray_prefopt.training.checkpoint import latest_checkpoint
from ray_prefopt.training.folder import finished, refuse_other_config, resolved, run_folder
from ray_prefopt.training.footprint import Outline, footprint
from ray_prefopt.training.run import check, pairs_of


def describe(config: TrainConfig) -> dict[str, Any]:
    """What a command would do with this config, without Ray and without writing anything.

    Raises what it would raise before it asks for workers, but for rows that are not read yet.
    """
    is_named = config.run.name is not None
    config = resolved(config)
    architecture = check(config)
    run, data, engine = config.run, config.data, config.engine
    outline = Outline.of(config, architecture)
    plan: dict[str, Any] = {
        "model": _describe_model(config.model, architecture, outline.parameters),
        "pairs": {
            name or "eval": _describe_pairs(config, sources)
            for name, sources in {"train": data.train_sources, **data.eval_sets}.items()
            if sources
        },
        "workers": {
            "number": run.workers_text if run.is_elastic else run.max_workers,
            "each": f"{run.cpus_per_worker} CPU" + (", 1 GPU" if run.use_gpu else ""),
            "engine": f"ZeRO {engine.zero_stage}" if engine.kind == "zero" else "plain",
        },
    }
    if data.train_sources:
        blocks = find_blocks(data, config.model, data.train_sources, run.storage_path)
        pairs = pairs_of(config, blocks, outline) if blocks else None
        if (expected := footprint(config, outline, pairs, run.min_workers)) is not None:
            plan["workers"]["memory"] = str(expected)
        unnamed = {"folder": f"{run.storage_path}/{config.loss.kind}-DATE-TIME"}
        plan["run"] = _describe_run(config, pairs) | ({} if is_named else unnamed)
    return plan


def _describe_model(
    config: ModelConfig, architecture: PretrainedConfig, parameters: int | None
) -> dict[str, Any]:
    return {
        "architecture": architecture.model_type,
        "parameters": "known when it is loaded" if parameters is None else parameters,
        "dtype": str(compute_dtype(config, architecture)).removeprefix("torch."),
        "trained": _describe_trained(config),
    }


def _describe_trained(config: ModelConfig) -> str:
    if not config.has_adapter:
        return "all weights"
    return f"LoRA adapters of rank {config.lora.r}" if config.lora else f"the LoRA adapter {config.adapter}"


def _describe_pairs(config: TrainConfig, sources: Sequence[Source]) -> dict[str, Any]:
    blocks = find_blocks(config.data, config.model, sources, config.run.storage_path)
    if blocks is None:
        return {"sources": [source.path for source in sources], "prepared": False}
    return {
        "sources": [source.path for source in sources],
        "prepared": blocks.folder,
        "pairs": blocks.num_pairs,
        "tokens": int(blocks.total_lengths.sum()),
    }


def _describe_run(config: TrainConfig, pairs: tuple[Batching, Plan] | None) -> dict[str, Any]:
    run = config.run
    folder = run_folder(config)
    total_steps, micro_batches = run.max_steps, None
    if pairs is not None:
        batching, plan = pairs
        total_steps, micro_batches = plan.total_steps, batching.count(plan.step_ids(0), run.max_workers)
    elif run.micro_batch_tokens is None:
        micro_batches = math.ceil(run.global_batch / (run.max_workers * run.micro_batch))
    unknown, state = "known when the pairs are prepared", "new"
    if not run.force_new:
        refuse_other_config(config, folder)
        found = latest_checkpoint(f"{folder}/checkpoints", on_bad=run.on_bad_checkpoint, verify="sizes")
        state = f"resumes after step {found.state.step}" if found else state
        state = "finished" if finished(folder, export=run.export) else state
    return {
        "folder": folder,
        "state": state,
        "steps": total_steps or unknown,
        "pairs_per_step": run.global_batch,
        "micro_batches_per_step": micro_batches or unknown,
    }
