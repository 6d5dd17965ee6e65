"""The engine that a config asks for, around a freshly built model."""

import torch

from ray_prefopt.config import TrainConfig
from ray_prefopt.engine.base import Engine
from ray_prefopt.engine.ds_config import build_ds_config
from ray_prefopt.engine.optimizer import OwnOptimizer
from ray_prefopt.engine.plain import PlainEngine
from ray_prefopt.engine.zero import ZeroEngine, sharded_construction
from ray_prefopt.model.load import compute_dtype, load_architecture, load_model


def build_engine(
    config: TrainConfig,
    *,
    total_steps: int,
    device: torch.device,
    is_universal: bool = False,
    own_optimizer: OwnOptimizer | None = None,
) -> Engine:
    """Model, optimizer and schedule, spread over the ranks; called by all of them.

    `is_universal`: the checkpoint to be loaded next is in DeepSpeed's universal format. `own_optimizer` takes the place
    of the optim section.
    """
    dtype = compute_dtype(config.model, load_architecture(config.model))
    if config.engine.kind == "plain":
        module = load_model(config.model, dtype=torch.float32, seed=config.run.seed, device=device)
        return PlainEngine(
            module,
            config.optim,
            total_steps=total_steps,
            dtype=dtype,
            device=device,
            own_optimizer=own_optimizer,
        )
    ds_config = build_ds_config(
        config.engine,
        dtype=str(dtype).removeprefix("torch."),
        max_grad_norm=config.optim.max_grad_norm,
        use_gpu=device.type == "cuda",
    )
    if is_universal:
        ds_config["checkpoint"] = {"load_universal": True}
    weights_dtype = dtype if config.engine.zero_stage else torch.float32
    sharded = sharded_construction(ds_config) if config.engine.zero_stage == 3 else None
    module = load_model(config.model, dtype=weights_dtype, seed=config.run.seed, device=device)
    del sharded
    if config.engine.zero_stage < 3:
        module = module.to(device)
    return ZeroEngine(
        module,
        config.optim,
        total_steps=total_steps,
        ds_config=ds_config,
        device=device,
        own_optimizer=own_optimizer,
    )
