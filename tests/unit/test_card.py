"""The README.md of exported models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from ray_prefopt.config import TrainConfig
from ray_prefopt.training.card import METHODS, CardDetails, model_card
from ray_prefopt.training.export import export
from tests.tiny import save_tiny_model
from tests.unit.test_export import trained

METRICS = {
    "step": 400,
    "epoch": 1.0,
    "loss": 0.51234,
    "rewards/accuracies": 0.75,
    "logps/chosen": -1.5,
    "eval_loss": 0.6,
    "eval_short_rewards/margins": 0.25,
    "eval_short_logits/chosen": 3.0,
    "tokens_per_second": 1000.0,
}


def config_of(**sections: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "org/model-1.5B"},
            "data": {"train": "org/pairs"},
            **sections,
            "run": {"name": "first", "global_batch": 64, **sections.get("run", {})},
        }
    )


def card_of(config: TrainConfig, **given: Any) -> ModelCard:
    return model_card(config, **{"steps": 400, "metrics": METRICS, "is_adapter": False, **given})


def section(card: ModelCard, title: str) -> dict[str, str]:
    """The table under a heading."""
    text = card.text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(.*)` \| (.*) \|$", text, re.MULTILINE))


def test_the_card_of_a_simpo_run() -> None:
    card = card_of(config_of(loss={"kind": "simpo", "beta": 2.5}, optim={"learning_rate": 3e-7}))
    assert card.data.to_dict() == {
        "base_model": "org/model-1.5B",
        "datasets": ["org/pairs"],
        "library_name": "transformers",
        "tags": ["ray_prefopt", "simpo", "preference-optimization"],
    }
    assert card.text.splitlines()[1:4] == [
        "# first",
        "",
        "[org/model-1.5B](https://huggingface.co/org/model-1.5B), fine-tuned on "
        "[org/pairs](https://huggingface.co/datasets/org/pairs) with [SimPO](https://arxiv.org/abs/2405.14734) by "
        "ray_prefopt, in 400 steps of 64 pairs.",
    ]
    settings = section(card, "Settings")
    assert (
        settings
        | {
            "loss.kind": "simpo",
            "loss.beta": "2.5",
            "loss.gamma_beta_ratio": "0.5",
            "optim.learning_rate": "3e-07",
            "optim.warmup_ratio": "0.1",
            "run.global_batch": "64",
            "model.dtype": "bfloat16",
        }
        == settings
    )
    assert (
        not {"optim.warmup_steps", "run.max_steps", "data.max_completion_length"} & settings.keys()
    )  # not set
    assert section(card, "Results") == {
        "loss": "0.5123",
        "rewards/accuracies": "0.7500",
        "eval_loss": "0.6000",
        "eval_short_rewards/margins": "0.2500",
    }
    assert {"ray_prefopt", "torch", "transformers"} <= section(card, "Versions").keys()
    assert re.findall(r"eprint = \{(.*)\}", card.text) == ["2405.14734"]
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize(
    ("loss", "papers"),
    [
        ({"kind": "cpo"}, ["2401.08417"]),
        ({"kind": "cpo_simpo"}, ["2401.08417", "2405.14734"]),
        ({"kind": "ipo"}, ["2310.12036"]),
        ({"kind": "simpo", "alpha": 0.25}, ["2405.14734", "2501.03884"]),
    ],
)
def test_the_papers_of_a_loss_are_cited(loss: dict[str, Any], papers: list[str]) -> None:
    card = card_of(config_of(loss=loss))
    assert re.findall(r"eprint = \{(.*)\}", card.text) == papers
    assert re.findall(r"arxiv.org/abs/([\d.]+)", card.text) == papers
    assert [f"year = {{20{paper[:2]}}}" in card.text for paper in papers] == [True] * len(papers)


def test_every_loss_has_a_paper() -> None:
    kinds = {name for name in METHODS if card_of(config_of(loss={"kind": name})).text}
    assert kinds == {"simpo", "cpo", "cpo_simpo", "ipo"}


def test_what_lies_on_this_machine_is_not_named(tmp_path: Path) -> None:
    """Neither paths that exist, nor files that existed once."""
    (tmp_path / "model").mkdir()
    config = config_of(
        model={"path": str(tmp_path / "model")},
        data={"train": ["/data/secret.jsonl", "folder/pairs.jsonl", {"path": "s3://bucket/secret"}]},
    )
    card = card_of(config)
    assert not {"base_model", "datasets"} & card.data.to_dict().keys()
    assert "A model, fine-tuned on preference pairs with [SimPO]" in card.text
    assert not re.search(r"secret|folder|bucket|" + re.escape(str(tmp_path)), str(card))


def test_what_is_known_better_takes_its_place() -> None:
    card = card_of(
        config_of(data={"train": ["org/pairs:train", "other/pairs"]}),
        details=CardDetails("mine", "org/other", tags=("chat", "simpo")),
        metrics={},
    )
    assert (card.data.base_model, card.data.datasets) == ("org/other", ["org/pairs", "other/pairs"])
    assert card.data.tags == ["ray_prefopt", "simpo", "preference-optimization", "chat"]
    assert card.text.startswith("\n# mine\n")
    assert "## Results" not in card.text
    named = card_of(config_of(), details=CardDetails(base_model="/data/base", datasets=("some/set",)))
    assert (named.data.base_model, named.data.datasets) == ("org/model-1.5B", ["some/set"])


def test_an_adapter_is_one(tmp_path: Path) -> None:
    config = config_of(model={"path": "org/model", "lora": {"r": 8, "target_modules": "q_proj|v_proj"}})
    card = card_of(config, is_adapter=True)
    assert card.data.library_name == "peft"
    assert "\nA LoRA adapter for [org/model](https://huggingface.co/org/model), fine-tuned on " in card.text
    settings = section(card, "Settings")
    assert (settings["model.lora.r"], settings["model.lora.target_modules"]) == ("8", r"q_proj\|v_proj")


# --- exported ---


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def trainable(base: str, **model: Any) -> TrainConfig:
    return config_of(model={"path": base, "dtype": "float32", **model}, engine={"kind": "plain"})


def test_an_exported_model_has_the_results_of_its_step(base: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, trainable(base), steps=2)
    records = [{"step": step, "loss": loss} for step, loss in ((1, 0.9), (2, 0.8), (3, 0.7))]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "lo'
    )
    (first,) = (run / "checkpoints").glob("step-00000001-*")
    for source, steps, loss in ((run, 2, "0.8000"), (first, 1, "0.9000")):
        export(str(source), str(tmp_path / "out"))
        card = ModelCard.load(tmp_path / "out/README.md")
        assert f"in {steps} steps of 64 pairs" in card.text
        assert section(card, "Results") == {"loss": loss}


@pytest.mark.parametrize(("merge", "library"), [(False, "peft"), (True, "transformers")])
def test_an_exported_adapter_has_our_card_and_not_that_of_peft(
    base: str, tmp_path: Path, merge: bool, library: str
) -> None:
    trained(tmp_path / "run", trainable(base, lora={"r": 4}))
    export(str(tmp_path / "run"), str(tmp_path / "out"), merge=merge)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == library
    assert card.text.startswith("\n# first\n")
    assert "[More Information Needed]" not in card.text
