"""Optimizers and schedules by transformers' names, and what is refused before any worker is asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Adafactor

from ray_prefopt.config import OptimConfig
from ray_prefopt.engine import optimizer as optimizer_module
from ray_prefopt.engine.optimizer import build_optimizer, build_schedule, check_names, check_optim
from ray_prefopt.errors import ConfigError
from tests.tiny import tiny_model


def optim(**changes: Any) -> OptimConfig:
    return OptimConfig(**{"learning_rate": 0.25, "weight_decay": 0.1, **changes})


def groups_by_decay(module: nn.Module) -> dict[float, set[str]]:
    """Names of the trained weights by their weight decay."""
    names = {weight: name for name, weight in module.named_parameters()}
    groups = build_optimizer(module, optim()).param_groups
    return {group["weight_decay"]: {names[weight] for weight in group["params"]} for group in groups}


# --- parameter groups ---


@pytest.mark.parametrize(
    ("kind", "norm_or_bias"), [("qwen2", ("norm", "bias")), ("gpt2", (".ln_", "bias")), ("llama", ("norm",))]
)
def test_neither_biases_nor_norms_decay(kind: str, norm_or_bias: tuple[str, ...]) -> None:
    model = tiny_model(kind)
    groups = groups_by_decay(model)
    assert groups.keys() == {0.1, 0.0}
    assert groups[0.1] | groups[0.0] == {name for name, _ in model.named_parameters()}
    assert groups[0.0] == {
        name for name, _ in model.named_parameters() if any(part in name for part in norm_or_bias)
    }


def test_frozen_weights_have_no_optimizer_state() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    groups = groups_by_decay(model)
    assert groups.keys() == {0.1}  # an empty group would be refused by some optimizers
    assert len(groups[0.1]) == 4
    assert all("lora_" in name for name in groups[0.1])


# --- names ---


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adamw_torch", torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-5, "fused": None}),
        ("adamw_torch_fused", torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-5, "fused": True}),
        ("adafactor", Adafactor, {"scale_parameter": False, "relative_step": False}),
        ("sgd", torch.optim.SGD, {}),
        ("adagrad", torch.optim.Adagrad, {}),
        ("rmsprop", torch.optim.RMSprop, {}),
    ],
)
def test_optimizers_of_transformers(name: str, kind: type, options: dict[str, Any]) -> None:
    found = build_optimizer(tiny_model(), optim(name=name, betas=(0.8, 0.9), eps=1e-5))
    assert type(found) is kind
    assert found.defaults["lr"] == 0.25
    assert {key: found.defaults[key] for key in options} == options
    check_optim(optim(name=name))


def test_args_reach_the_optimizer() -> None:
    found = build_optimizer(nn.Linear(1, 1), optim(name="sgd", args={"momentum": 0.5, "nesterov": True}))
    assert (found.defaults["momentum"], found.defaults["nesterov"]) == (0.5, True)
    found = build_optimizer(nn.Linear(1, 1), optim(name="adamw_torch", args={"amsgrad": True}))
    assert found.defaults["amsgrad"] is True


# --- schedules ---

# of ten steps, two are warm-up
RATES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "linear": ({}, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    "constant": ({}, [1] * 10),
    "constant_with_warmup": ({}, [0, 0.5] + [1] * 8),
    "polynomial": ({"power": 2.0, "lr_end": 0.0}, [0, 0.5] + [(1 - n / 8) ** 2 for n in range(8)]),
    "warmup_stable_decay": (
        {"num_decay_steps": 4, "decay_type": "linear"},
        [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
    ),
}


def rates(config: OptimConfig, total_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = build_schedule(optimizer, config, total_steps)
    found = []
    for _ in range(total_steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", RATES)
def test_schedules_of_transformers(name: str) -> None:
    arguments, expected = RATES[name]
    found = rates(optim(schedule=name, schedule_args=arguments, warmup_ratio=0.2), 10)
    assert found == pytest.approx([0.25 * rate for rate in expected], abs=1e-6)


def test_the_cosine_is_half_way_at_half_time() -> None:
    found = rates(optim(warmup_ratio=0.2), 10)
    assert found[:3] == [0, 0.125, 0.25]
    assert found[6] == pytest.approx(0.125)
    assert found[4] + found[8] == pytest.approx(0.25)


@pytest.mark.parametrize(("ratio", "warmup"), [(0.0, 0), (0.01, 1), (0.1, 1), (0.11, 2), (1.0, 10)])
def test_a_started_step_of_warm_up_is_one(ratio: float, warmup: int) -> None:
    found = rates(optim(schedule="constant_with_warmup", warmup_ratio=ratio), 10)
    assert found == pytest.approx(
        [0.25 * min(1, step / max(warmup, 1)) if warmup else 0.25 for step in range(10)]
    )


@pytest.mark.parametrize("steps", [0, 3, 20])
def test_warm_up_by_steps_leaves_the_ratio_out(steps: int) -> None:
    found = rates(optim(schedule="constant_with_warmup", warmup_ratio=0.5, warmup_steps=steps), 10)
    assert found == pytest.approx([0.25 * min(1, step / steps) if steps else 0.25 for step in range(10)])


# --- refusals ---


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": (
        {"name": "adamw_torh"},
        r"^optim\.name: 'adamw_torh' is not known to transformers\. Did you mean adamw_torch\?$",
    ),
    "schedule": (
        {"schedule": "cosin"},
        r"^optim\.schedule: 'cosin' is not known to transformers\. Did you mean cosine\?$",
    ),
    "args": (
        {"name": "sgd", "args": {"speed": 3}},
        r"^optim\.args: sgd does not take \{'speed': 3\}: .*unexpected keyword argument 'speed'$",
    ),
    "value": (
        {"name": "sgd", "args": {"nesterov": True}},
        r"^optim\.args: sgd does not take \{'nesterov': True\}: Nesterov momentum requires a momentum",
    ),
    "rate": ({"args": {"lr": 1.0}}, r"^optim\.args\.lr is set by optim\.learning_rate: use that instead$"),
    "decay": (
        {"args": {"weight_decay": 0}},
        r"^optim\.args\.weight_decay is set by optim\.weight_decay: use that instead$",
    ),
    "schedule_args": (
        {"schedule_args": {"cycles": 2}},
        r"^optim\.schedule_args: cosine does not take \{'cycles': 2\}: .*unexpected keyword argument 'cycles'$",
    ),
    "schedule_args missing": (
        {"schedule": "warmup_stable_decay"},
        r"^optim\.schedule_args: warmup_stable_decay does not take \{\}: .*'num_decay_steps'$",
    ),
    "plateau": (
        {"schedule": "reduce_lr_on_plateau"},
        r"^optim\.schedule: reduce_lr_on_plateau follows a metric; use one of steps, such as cosine$",
    ),
    "greedy": ({"schedule": "greedy"}, r"^optim\.schedule: greedy follows a metric; use one of steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        check_optim(optim(**changes))


def test_names_alone_can_be_checked() -> None:
    check_names(optim(name="lion_32bit", schedule="greedy"))
    with pytest.raises(ConfigError, match=r"optim\.name: 'x' is not known to transformers\.$"):
        check_names(optim(name="x"))


def answer(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    """What transformers says about an optimizer that need not be installed here."""
    monkeypatch.setattr(optimizer_module.TRAINER, "get_optimizer_cls_and_kwargs", staticmethod(function))


def test_an_optimizer_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise ImportError("You need to install `bitsandbytes`")

    answer(monkeypatch, missing)
    with pytest.raises(
        ConfigError, match=r"optim\.name: lion_32bit cannot be used here: You need to install `bitsandbytes`"
    ):
        check_optim(optim(name="lion_32bit"))


@pytest.mark.parametrize("options", [{"params": []}, {"optimizer_dict": {}}, {"model": None}])
def test_an_optimizer_over_whole_layers_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    answer(monkeypatch, lambda *_: (torch.optim.SGD, options))
    with pytest.raises(ConfigError, match=LAYERWISE):
        check_optim(optim(name="galore_adamw"))


def test_an_optimizer_factory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, lambda *_: (lambda **_: None, {}))
    with pytest.raises(ConfigError, match=LAYERWISE):
        check_optim(optim(name="lomo"))


LAYERWISE = (
    r"^optim\.name: (galore_adamw|lomo) builds itself from whole layers, which ZeRO shards: "
    r"use an optimizer over parameters, such as adamw_torch_fused or adafactor$"
)
