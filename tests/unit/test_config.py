"""The tree itself: defaults, contradictions, and what follows from values."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ray_prefopt.config import (
    CPOLoss,
    CPOSimPOLoss,
    DataConfig,
    EngineConfig,
    IPOLoss,
    LossConfig,
    ModelConfig,
    RunConfig,
    SimPOLoss,
    Source,
    TrainConfig,
)

MINIMAL = {"model": {"path": "m"}, "data": {"train": "pairs.jsonl"}}


def test_published_defaults() -> None:
    """SimPO: beta 2.0 and ratio 0.5 (princeton-nlp/SimPO); CPO: beta 0.1, alpha 1 (trl); CPO-SimPO: alpha 0.05."""
    losses = [SimPOLoss(), CPOLoss(), CPOSimPOLoss(), IPOLoss()]
    assert [loss.beta for loss in losses] == [2.0, 0.1, 2.0, 0.1]
    assert [loss.cpo_alpha for loss in losses] == [0.0, 1.0, 0.05, 1.0]
    assert SimPOLoss().gamma_beta_ratio == CPOSimPOLoss().gamma_beta_ratio == 0.5
    assert TrainConfig(**MINIMAL).loss == SimPOLoss()


def test_config_is_frozen() -> None:
    config = TrainConfig(**MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.epochs = 2  # type: ignore[misc]


def test_json_reads_back_equal() -> None:
    config = TrainConfig(
        model={"path": "m", "lora": {"r": 4}},
        data={"train": ["a.jsonl", {"path": "b", "weight": 0.5}], "eval": {"x": "c.jsonl"}},
        loss={"kind": "ipo", "alpha": 0.25},
        run={"epochs": 1.5, "log_steps": None, "eval_steps": 0.25, "save_steps": "epoch"},
    )
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ModelConfig, {}, r"set model\.path"),
        (
            ModelConfig,
            {"from_config": {"hidden_size": 8}, "tokenizer": "t"},
            r"model_type; got keys \['hidden_size'\]",
        ),
        (
            ModelConfig,
            {"path": "m", "from_config": {"model_type": "qwen2"}, "tokenizer": "t"},
            "path loads weights and from_config makes new ones: leave one out",
        ),
        (ModelConfig, {"from_config": {"model_type": "qwen2"}}, r"no tokenizer: set model\.tokenizer"),
        (
            DataConfig,
            {"train": "a", "max_length": 64, "max_prompt_length": 64},
            r"\(64\) must be smaller than max_length \(64\)",
        ),
        (
            SimPOLoss,
            {"link": "hinge", "label_smoothing": 0.1},
            "label_smoothing has no meaning for link: hinge",
        ),
        (EngineConfig, {"kind": "plain", "deepspeed": {"a": 1}}, "deepspeed belongs to engine.kind: zero"),
        (
            EngineConfig,
            {"kind": "plain", "offload_optimizer": "cpu"},
            "offload_optimizer belongs to engine.kind: zero",
        ),
        (EngineConfig, {"offload_param": "cpu"}, "offload_param needs zero_stage 3; got zero_stage 2"),
        (
            RunConfig,
            {"save_only_model": True, "max_failures": 1},
            "save_only_model keeps nothing that workers could be started again from, which max_failures asks for",
        ),
        (
            RunConfig,
            {"save_only_model": True, "num_workers": (1, 2)},
            "could be started again from, which num_workers that change asks for; leave one of them out",
        ),
        (
            EngineConfig,
            {"zero_stage": 0, "offload_optimizer": "cpu"},
            "needs zero_stage 1, 2 or 3; got zero_stage 0",
        ),
        (RunConfig, {"name": "../x"}, r"folder name of letters, digits, .*; got '\.\./x'"),
        (RunConfig, {"name": "x" * 129}, "must be a folder name"),
        (
            RunConfig,
            {"num_workers": [4, 2]},
            r"must be the fewest and the most workers, in this order; got \[4, 2\]",
        ),
        (RunConfig, {"num_workers": [0, 2]}, "greater than or equal to 1"),
    ],
)
def test_contradictions_are_refused(section: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**values)


def test_micro_batches_of_any_size_have_no_means_of_their_own() -> None:
    with pytest.raises(ValidationError, match=r"any number of pairs, and loss\.nll_average: micro_batch "):
        TrainConfig(
            **MINIMAL, loss={"kind": "cpo", "nll_average": "micro_batch"}, run={"micro_batch_tokens": 9}
        )
    config = TrainConfig(**MINIMAL, loss={"kind": "cpo"}, run={"micro_batch_tokens": 9})
    assert config.run.micro_batch_text == "run.micro_batch_tokens 9"
    assert TrainConfig(**MINIMAL).run.micro_batch_text == "run.micro_batch 4"


def test_a_field_of_another_loss_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        TypeAdapter(LossConfig).validate_python({"kind": "cpo", "gamma_beta_ratio": 0.3})


@pytest.mark.parametrize(
    ("number", "fewest", "most", "text", "is_elastic"),
    [(4, 4, 4, "4", False), ([2, 8], 2, 8, "2 to 8", True), ((3, 3), 3, 3, "3", False)],
)
def test_the_number_of_workers(number: Any, fewest: int, most: int, text: str, is_elastic: bool) -> None:
    run = RunConfig(num_workers=number)
    assert (run.min_workers, run.max_workers) == (fewest, most)
    assert (run.workers_text, run.is_elastic) == (text, is_elastic)
    assert RunConfig.model_validate_json(run.model_dump_json()) == run


def test_sources_become_tuples() -> None:
    data = DataConfig(train=["a", {"path": "b", "rows": 3}], eval="c")
    assert data.train_sources == (Source(path="a"), Source(path="b", rows=3))
    assert data.eval_sets == {"": (Source(path="c"),)}
    named = DataConfig(train="a", eval={"chat": "c", "code": ["d", "e"]})
    assert named.eval_sets == {"chat": (Source(path="c"),), "code": (Source(path="d"), Source(path="e"))}
    assert DataConfig(train="a").eval_sets == {}
    for given in ({"path": "c"}, {"path": "c", "split": "test"}, {"path": "c", "name": "n", "split": "test"}):
        assert DataConfig(train="a", eval=given).eval_sets == {"": (Source(**given),)}
    assert DataConfig(train="a", eval={"path": "c", "code": "d"}).eval_sets.keys() == {"path", "code"}


def test_environment_variables_may_be_whole_numbers() -> None:
    assert RunConfig(env_vars={"A": 1, "B": "two"}).env_vars == {"A": "1", "B": "two"}
    for other in (True, 0.5, None):
        with pytest.raises(ValidationError, match="valid string"):
            RunConfig(env_vars={"A": other})


def test_tokenizer_is_the_models_unless_told() -> None:
    assert ModelConfig(path="m").tokenizer_path == "m"
    assert ModelConfig(path="m", tokenizer="t").tokenizer_path == "t"
