"""The model card of an exported model: README.md, with the metadata that the Hugging Face Hub reads at its head."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ray_prefopt import __version__
from ray_prefopt.config import TrainConfig
from ray_prefopt.data.sources import FORMATS, HUB_ID

MODEL_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

PAPERS = {
    "SimPO": (
        "2405.14734",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
    ),
    "CPO": (
        "2401.08417",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        "Xu, Haoran and Sharaf, Amr and Chen, Yunmo and Tan, Weiting and Shen, Lingfeng and Van Durme, Benjamin and "
        "Murray, Kenton and Kim, Young Jin",
    ),
    "IPO": (
        "2310.12036",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "Azar, Mohammad Gheshlaghi and Rowland, Mark and Piot, Bilal and Guo, Daniel and Calandriello, Daniele and "
        "Valko, Michal and Munos, R{\\'e}mi",
    ),
    "AlphaPO": ("2501.03884", "AlphaPO: Reward Shape Matters for LLM Alignment", "Gupta, Aman and others"),
}
"""arXiv id, title and authors of the paper of each method."""
METHODS = {"simpo": ("SimPO",), "cpo": ("CPO",), "cpo_simpo": ("CPO", "SimPO"), "ipo": ("IPO",)}
"""Names by loss.kind; two are combined."""

SETTINGS = (
    "loss", "optim", "data.max_length", "data.max_prompt_length", "data.max_completion_length", "model.dtype",
    "model.lora", "model.quantization", "run.num_workers", "run.global_batch", "run.epochs", "run.max_steps",
    "run.seed",
)  # fmt: skip
"""Fields and sections of the config that a card lists."""
RESULTS = ("loss", "nll_loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
"""Metrics that a card lists, of training and of each evaluation set."""
PACKAGES = ("transformers", "torch", "ray", "deepspeed", "peft")


@dataclass(frozen=True)
class CardDetails:
    """What a card says that its config does not know, or knows less well."""

    name: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


NO_DETAILS = CardDetails()


def model_card(
    config: TrainConfig,
    *,
    steps: int,
    metrics: Mapping[str, float],
    is_adapter: bool,
    details: CardDetails = NO_DETAILS,
) -> ModelCard:
    """The card of a model after so many steps of the run that the config describes; local paths are not named in it."""
    base_model = hub_model(details.base_model) or hub_model(config.model.path)
    datasets = list(details.datasets) or _hub_datasets(source.path for source in config.data.train_sources)
    methods = [*METHODS[config.loss.kind], *(["AlphaPO"] if getattr(config.loss, "alpha", 0.0) else [])]
    data = ModelCardData(
        base_model=base_model,
        datasets=datasets or None,
        library_name="peft" if is_adapter else "transformers",
        tags=list(dict.fromkeys(["ray_prefopt", config.loss.kind, "preference-optimization", *details.tags])),
    )
    what = " for ".join(
        [*(["A LoRA adapter"] if is_adapter else []), _link(base_model) if base_model else "a model"]
    )
    pairs = _enumerated([_link(name, "datasets/") for name in datasets]) or "preference pairs"
    papers = _enumerated([f"[{method}](https://arxiv.org/abs/{PAPERS[method][0]})" for method in methods])
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {details.name or config.run.name or config.loss.kind}",
        f"{what[0].upper()}{what[1:]}, fine-tuned on {pairs} with {papers} by ray_prefopt, in {steps} steps of "
        f"{config.run.global_batch} pairs.",
        f"## Settings\n\n{_table(_settings(config))}",
        *([f"## Results\n\n{_table(found)}"] if (found := _results(metrics)) else []),
        f"## Versions\n\n{_table(_versions())}",
        "## Citation\n\n```bibtex\n" + "\n".join(_citation(method) for method in methods) + "\n```",
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def hub_model(path: str | None) -> str | None:
    """The path, if it is that of a model on the Hub.

    >>> hub_model("org/model-1.5B"), hub_model("/data/model")
    ('org/model-1.5B', None)
    """
    return path if path and MODEL_ID.fullmatch(path) and not os.path.exists(path) else None


def _hub_datasets(paths: Iterable[str]) -> list[str]:
    """The datasets on the Hub among the paths of sources.

    >>> _hub_datasets(["org/pairs:train", "folder/pairs.jsonl", "/data/pairs", "s3://bucket/pairs"])
    ['org/pairs']
    """
    found = [HUB_ID.fullmatch(path) for path in paths if not os.path.exists(path)]
    return [hub["id"] for hub in found if hub and not hub["id"].endswith(tuple(FORMATS))]


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})"


def _enumerated(words: Sequence[str]) -> str:
    """
    >>> _enumerated(["a"]), _enumerated(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join([", ".join(words[:-1]), *words[-1:]] if len(words) > 1 else words)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """SETTINGS by their dotted names, without those that are not set."""
    dumped = config.model_dump(mode="json")
    values: dict[str, Any] = {}
    for name in SETTINGS:
        section, _, key = name.partition(".")
        values |= _flat(name, dumped[section][key] if key else dumped[section])
    return values


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: each for inner in value for key, each in _flat(f"{name}.{inner}", value[inner]).items()}
    return {} if value in (None, []) else {name: value}


def _results(metrics: Mapping[str, float]) -> dict[str, str]:
    endings = tuple(f"_{name}" for name in RESULTS)
    return {
        name: f"{value:.4f}"
        for name, value in metrics.items()
        if name in RESULTS or (name.startswith("eval_") and name.endswith(endings))
    }


def _versions() -> dict[str, str]:
    return {"ray_prefopt": __version__, **{package: version(package) for package in PACKAGES}}


def _table(rows: Mapping[str, Any]) -> str:
    cells = ((name, str(value).replace("|", "\\|")) for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *(f"| `{name}` | {value} |" for name, value in cells)])


def _citation(method: str) -> str:
    number, title, authors = PAPERS[method]
    return (
        f"@misc{{{method.lower()},\n  title = {{{{{title}}}}},\n  author = {{{authors}}},\n"
        f"  year = {{20{number[:2]}}},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n}}"
    )
