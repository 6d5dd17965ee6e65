"""`hyperparameter_search` of the trainers: the names and distributions of transformers' Ray backend for ours."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Quantized

from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.errors import ConfigError, suggest
from ray_prefopt.search_config import SearchConfig

FIELDS = {
    "alpha": "loss.alpha",
    "beta": "loss.beta",
    "cpo_alpha": "loss.cpo_alpha",
    "gamma_beta_ratio": "loss.gamma_beta_ratio",
    "label_smoothing": "loss.label_smoothing",
    "learning_rate": "optim.learning_rate",
    "max_grad_norm": "optim.max_grad_norm",
    "num_train_epochs": "run.epochs",
    "sft_weight": "loss.cpo_alpha",
    "simpo_gamma": "loss.gamma_beta_ratio",
    "weight_decay": "optim.weight_decay",
}
"""Arguments that may be searched over, and what they are here; simpo_gamma is divided by beta."""
HpSpace = Callable[[Any], Mapping[str, Any]]


def search_config(
    hp_space: HpSpace | None,
    args: CPOConfig | SimPOConfig,
    *,
    n_trials: int,
    direction: str | list[str] | None,
    compute_objective: Any,
    backend: Any,
    **settings: Any,
) -> SearchConfig:
    """What `hyperparameter_search` was asked for. Raises ConfigError for what cannot be searched or compared."""
    if str(getattr(backend, "value", backend) or "ray") != "ray":
        raise ConfigError(f"hyperparameter_search: backend is ray here; got {backend}")
    if compute_objective is not None:
        raise ConfigError(
            "hyperparameter_search: compute_objective is not called, since a loss cannot be compared between trials; "
            "name a metric with metric='eval_...', or leave both out for held-out reward accuracy"
        )
    if direction not in (None, "maximize", "minimize"):
        raise ConfigError(f"hyperparameter_search: direction is maximize or minimize; got {direction}")
    if direction == "minimize" and "metric" not in settings:
        raise ConfigError("hyperparameter_search: held-out reward accuracy is maximized; leave direction out")
    mode = {"maximize": "max", "minimize": "min"}.get(str(direction))
    given = dict(hp_space(None)) if hp_space else {}
    if {"beta", "simpo_gamma"} <= given.keys():
        raise ConfigError(
            "hp_space: simpo_gamma means another margin for every beta; search over gamma_beta_ratio instead"
        )
    space = {field_of(name): scaled(name, value, args) for name, value in given.items()}
    asked = {"space": space, "trials": n_trials, **({"mode": mode} if mode else {}), **settings}
    try:
        return SearchConfig.model_validate(asked)
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(map(str, found["loc"]))
        raise ConfigError(
            f"hyperparameter_search: {name or 'search'}: {found['msg']}.{suggest(name, SearchConfig.model_fields)}"
        ) from None


def field_of(name: str) -> str:
    """The config's field for an argument's name; a dotted field is itself."""
    if "." in name:
        return name
    if name not in FIELDS:
        raise ConfigError(
            f"hp_space: {name} cannot be searched over; {', '.join(FIELDS)} can, and fields of the config such as "
            f"run.global_batch.{suggest(name, FIELDS)}"
        )
    return FIELDS[name]


def scaled(name: str, value: Any, args: CPOConfig | SimPOConfig) -> dict[str, Any]:
    """A distribution of ray.tune as one of ours, for the field that stands for the argument."""
    found = distribution(name, value)
    if name != "simpo_gamma":
        return found
    (kind, numbers), *_ = found.items()
    return {kind: [number / float(args.beta) for number in numbers]}


def distribution(name: str, value: Any) -> dict[str, Any]:
    """Ours for one of ray.tune's; a list is a choice, and any other value is the only one.

    >>> from ray import tune
    >>> distribution("beta", tune.loguniform(1, 10)), distribution("beta", tune.choice([1, 2]))
    ({'loguniform': [1, 10]}, {'choice': [1, 2]})
    """
    if isinstance(value, Mapping) and set(value) == {"grid_search"}:
        return {"grid": list(value["grid_search"])}
    if isinstance(value, Categorical):
        return {"choice": list(value.categories)}
    sampler: Any = getattr(value, "sampler", None)
    is_quantized = isinstance(sampler, Quantized)
    is_logarithmic = isinstance(sampler.sampler if is_quantized else sampler, LogUniform)
    if isinstance(value, Integer) and not is_logarithmic:
        step = sampler.q if is_quantized else 1
        end = value.upper + 1 if is_quantized else value.upper  # which randint leaves out, as in numpy
        numbers = range(value.lower, end, step)
        if len(numbers) == 1:
            return {"choice": list(numbers)}
        return {"quniform": [numbers[0], numbers[-1], step]}
    if isinstance(value, Float) and not (is_quantized and is_logarithmic):
        ends = [value.lower, value.upper]
        if is_quantized:
            return {"quniform": [*ends, sampler.q]}
        return {"loguniform" if is_logarithmic else "uniform": ends}
    if isinstance(value, Domain):
        steps = " in steps on a logarithmic scale" if is_logarithmic else ""
        raise ConfigError(
            f"hp_space: {name} is a {type(value).__name__}{steps}; give uniform, loguniform, quniform, randint, choice "
            "or grid_search of ray.tune"
        )
    return {"choice": list(value) if isinstance(value, list | tuple) else [value]}


def named_back(
    point: Mapping[str, Any], names: Mapping[str, Any], args: CPOConfig | SimPOConfig
) -> dict[str, Any]:
    """A point under the names it was asked for by."""
    values = {name: point[field_of(name)] for name in names if field_of(name) in point}
    return {
        name: value * float(args.beta) if name == "simpo_gamma" else value for name, value in values.items()
    }
