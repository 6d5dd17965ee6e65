"""The trainers on Ray: scripts as TRL's documents have them, but for the import and a local model."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import ray.data
import torch
from datasets import Dataset, load_from_disk
from ray.train import ScalingConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.utils import DPODataCollatorWithPadding

from ray_prefopt import CPOConfig, CPOTrainer, PrefoptError, SimPOConfig, SimPOTrainer
from ray_prefopt.compat.inputs import pairs_source
from ray_prefopt.errors import ConfigError, DataError
from ray_prefopt.training.folder import TrainResult
from ray_prefopt.training.hooks import Hooks, check_portable
from tests.tiny import chat_row, save_tiny_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.ray

TWO_WORKERS = ScalingConfig(num_workers=2)
SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "max_length": 64,
    "max_prompt_length": 32,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def chats(count: int, start: int = 0) -> Dataset:
    numbers = range(start, start + count)
    return Dataset.from_list(
        [chat_row(f"What is {n} plus {n}?", f"It is {n + n}.", f"{n}? No idea.") for n in numbers]
    )


def test_the_quick_start_of_the_cpo_document(model_folder: str, tmp_path: Path, ray_local: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    before = copy.deepcopy(model.state_dict())
    training_args = CPOConfig(output_dir=str(tmp_path / "CPO"), eval_strategy="steps", eval_steps=2, **SMALL)
    trainer = CPOTrainer(
        model=model,
        args=training_args,
        processing_class=tokenizer,
        train_dataset=chats(16),
        eval_dataset=chats(5, start=100),
        scaling_config=TWO_WORKERS,
    )
    output = trainer.train()

    assert output.global_step == trainer.state.global_step == 4
    logged = trainer.state.log_history
    assert [record["step"] for record in logged if "loss" in record] == [1, 2, 3, 4]
    assert [record["step"] for record in logged if "eval_rewards/accuracies" in record] == [2, 4]
    losses = [record["loss"] for record in logged if "loss" in record]
    assert output.training_loss == pytest.approx(sum(losses) / 4)
    assert losses[-1] < losses[0] - 0.5
    # the very model that was given now holds the trained weights, which are those of the exported folder
    assert trainer.model is model
    exported = load_file(tmp_path / "CPO" / "run" / "model" / "model.safetensors")
    for name, weight in exported.items():
        assert torch.equal(model.state_dict()[name], weight)
        assert not torch.equal(before[name], weight)

    assert output.metrics["train_samples_per_second"] > output.metrics["train_steps_per_second"] > 0
    metrics = trainer.evaluate()
    assert metrics["eval_samples_per_second"] >= metrics["eval_steps_per_second"] > 0
    assert (metrics["eval_runtime"] > 0, metrics["epoch"]) == (True, trainer.state.epoch)
    last = next(record for record in reversed(logged[:-1]) if "eval_loss" in record)
    assert metrics["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]

    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, saved.state_dict()[name]) for name, weight in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == tokenizer.chat_template

    (newest,) = (tmp_path / "CPO" / "run" / "checkpoints").iterdir()
    for checkpoint in (True, str(newest), newest):  # it is finished
        assert trainer.train(resume_from_checkpoint=checkpoint).global_step == 4
    with pytest.raises(
        ConfigError, match=r"older is not the newest checkpoint of its run; copy it elsewhere to"
    ):
        trainer.train(resume_from_checkpoint=str(newest.with_name("older")))
    assert not list((tmp_path / "CPO").glob("run.old-*"))


SIMPO_ROWS = {
    "prompt": ["hello", "how are you", "What is your name?", "Which is the best programming language?"] * 2,
    "chosen": ["hi nice to meet you", "I am fine", "My name is Mary", "Python"] * 2,
    "rejected": ["leave me alone", "I am not fine", "Whats it to you?", "Javascript"] * 2,
}


def test_the_example_of_the_simpo_document_with_adapters(tmp_path: Path, ray_local: None) -> None:
    simpo_config = SimPOConfig(output_dir=str(tmp_path), beta=2.5, gamma_beta_ratio=0.25, **SMALL)
    model = tiny_model().train()
    model.name_or_path = "some/base"
    trainer = SimPOTrainer(
        model,
        args=simpo_config,
        train_dataset=Dataset.from_dict(SIMPO_ROWS),
        tokenizer=tiny_tokenizer("plain"),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "run" / "model", tmp_path / "saved"):
        assert (
            json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
        )
    assert any("lora_B" in name for name, _ in trainer.model.named_parameters())
    losses_of, chosen, rejected = trainer.simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]))
    assert losses_of.item() == pytest.approx(-torch.nn.functional.logsigmoid(torch.tensor(2.5 * 0.75)).item())
    assert (chosen.item(), rejected.item()) == (-2.5, -5.0)


@pytest.mark.soak
def test_the_best_model_is_taken_when_asked_for(model_folder: str, tmp_path: Path, ray_local: None) -> None:
    """By a metric that only falls, the best evaluation is the first one."""
    args = CPOConfig(
        output_dir=str(tmp_path),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="logps/rejected",
        greater_is_better=True,
        **{**SMALL, "max_steps": 3, "loss_type": "simpo", "cpo_alpha": 0.0},
    )
    trainer = CPOTrainer(model_folder, args, train_dataset=chats(8), eval_dataset=chats(3, start=100))
    trainer.train()
    measured = [
        record["eval_logps/rejected"] for record in trainer.state.log_history if "eval_loss" in record
    ]
    assert measured == sorted(measured, reverse=True)
    assert Path(str(trainer.state.best_model_checkpoint)).name.startswith("step-00000001-")
    last = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(
        not torch.equal(weight, last[name])
        for name, weight in trainer.model.state_dict().items()
        if name in last
    )
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(weight, trainer.model.state_dict()[name]) for name, weight in saved.items())


# --- What needs no run ---


def test_arguments_that_are_left_out_are_those_of_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for trainer, kind in ((CPOTrainer, CPOConfig), (SimPOTrainer, SimPOConfig)):
        made = trainer(tiny_model(), processing_class=tiny_tokenizer("plain"))
        assert type(made.args) is kind
        assert made.args.output_dir == "trainer_output"


def test_evaluations_need_pairs(tmp_path: Path) -> None:
    args = CPOConfig(output_dir=str(tmp_path), eval_strategy="epoch")
    with pytest.raises(ConfigError, match="eval_strategy"):
        CPOTrainer(tiny_model(), args, processing_class=tiny_tokenizer("plain"))


def small(tmp_path: Path, **arguments: Any) -> CPOTrainer:
    given = {"model": tiny_model(), "processing_class": tiny_tokenizer("plain"), **arguments}
    return CPOTrainer(args=CPOConfig(output_dir=str(tmp_path / "out"), **SMALL), **given)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": None}, "model, model_init: give one of the two"),
        ({"model_init": tiny_model}, "model, model_init: give one of the two"),
        ({"model": 3}, "model: got int; give a path, a hub id, a PreTrainedModel or a PeftModel"),
        (
            {"processing_class": None},
            "processing_class: got none, and a model made in memory names no tokenizer",
        ),
        (
            {"optimizers": (None, object())},
            "optimizers: got a scheduler without its optimizer; give both, or name it in args.lr_scheduler_type",
        ),
        (
            {"model": "folder", "optimizers": (torch.optim.SGD([torch.zeros(1)]), None)},
            "optimizers: an optimizer needs the model that it was made over; give that as model, not its path",
        ),
        (
            {"peft_config": {"r": 2}, "optimizers": (torch.optim.SGD([torch.zeros(1)]), None)},
            "optimizers: with peft_config the weights that are trained are not made yet; give a PeftModel as model",
        ),
    ],
)
def test_constructors_that_make_no_sense(arguments: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^" + text.replace("(", r"\(")):
        small(tmp_path, **arguments)


def test_calls_that_make_no_sense(tmp_path: Path) -> None:
    trainer = small(tmp_path)
    for call, text in (
        (trainer.train, "train: got no train_dataset; give one to the constructor"),
        (lambda: trainer.train(trial=1), "train: trial has no meaning here; leave it out"),
        (
            lambda: trainer.predict({"a": "x.jsonl"}),
            "predict: got several sets; call it for one after the other",
        ),  # type: ignore[arg-type]
        (trainer.evaluate, "evaluate: got no eval_dataset, here or in the constructor; give one"),
        (
            lambda: trainer.tokenize_row({"prompt": "a", "chosen": "", "rejected": "b"}),
            "the row is no pair: empty_com",
        ),
        (
            lambda: pairs_source(3, tmp_path / "x"),
            "train_dataset, eval_dataset: got int; give a datasets.Dataset",
        ),  # type: ignore[arg-type]
        (
            lambda: trainer.get_batch_logps(torch.zeros(1, 2, 3), torch.zeros(1, 3)),
            "logits (1, 2, 3) and labels (1, 3) do not belong together",
        ),
    ):
        with pytest.raises(PrefoptError) as caught:
            call()
        assert str(caught.value).startswith(text)
    assert issubclass(DataError, PrefoptError)


def test_every_kind_of_dataset_becomes_a_path(tmp_path: Path, ray_local: None) -> None:
    rows = chats(6)
    saved = pairs_source(rows, tmp_path / "train")
    assert load_from_disk(saved).to_list() == rows.to_list()
    assert pairs_source(rows, tmp_path / "train") == saved
    assert pairs_source("pairs.jsonl", tmp_path / "train") == "pairs.jsonl"
    for kind in (rows.to_iterable_dataset(), ray.data.from_items(rows.to_list())):
        folder = pairs_source(kind, tmp_path / "other")
        found = pq.read_table(folder).to_pylist()
        assert sorted(found, key=str) == sorted(rows.to_list(), key=str)


def test_experts_are_taken_over_by_the_names_that_they_have_in_files(tmp_path: Path) -> None:
    """transformers fuses them in memory."""
    trained = tiny_model("mixtral", seed=1)
    trained.save_pretrained(tmp_path / "trained")
    trainer = small(tmp_path, model=tiny_model("mixtral"))
    trainer._result = TrainResult("run", "", 1, {}, "step", "step", str(tmp_path / "trained"))
    trainer._take_weights()
    for name, weight in trained.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight)


def test_a_model_is_made_the_same_each_time(tmp_path: Path) -> None:
    def made(trial: Any) -> Any:
        assert trial is None
        return AutoModelForCausalLM.from_config(tiny_model().config)

    one, two = (small(tmp_path, model=None, model_init=made).model.state_dict() for _ in range(2))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    saved = save_tiny_model(tmp_path / "saved")
    small(tmp_path, model=None, model_init=partial(AutoModelForCausalLM.from_pretrained, saved))


@pytest.mark.parametrize("masked", [slice(-1, None), slice(None)])
def test_labels_that_leave_out_a_part_of_a_completion_are_refused(tmp_path: Path, masked: slice) -> None:
    trainer = small(tmp_path)
    rows = [trainer.tokenize_row({"prompt": "1 2", "chosen": " 3 4 5", "rejected": " 6"})]
    batch = DPODataCollatorWithPadding(pad_token_id=0)(rows)
    batch["chosen_labels"][0, masked] = -100
    with pytest.raises(
        ConfigError, match=r"^labels: a completion is scored as a whole; got labels that leave out"
    ):
        trainer.get_batch_loss_metrics(trainer.model, batch)


def test_a_subclass_that_makes_its_own_loss_is_refused(tmp_path: Path) -> None:
    class Mine(SimPOTrainer):
        def compute_loss(self, *_: Any) -> Any: ...

        def cpo_loss(self, *_: Any) -> Any: ...

    class Harmless(CPOTrainer):
        def save_model(self, *_: Any) -> Any: ...

    with pytest.raises(
        ConfigError, match=r"^Mine overrides compute_loss, cpo_loss, which workers do not call: use"
    ):
        Mine(str(tmp_path), train_dataset="pairs.jsonl")
    Harmless(
        tiny_model(), CPOConfig(str(tmp_path / "out"), **SMALL), processing_class=tiny_tokenizer("plain")
    )


def test_the_output_is_a_folder() -> None:
    args = CPOConfig("s3://bucket/out", **SMALL)
    with pytest.raises(
        ConfigError, match=r"^output_dir must be a folder, .*; got s3://bucket/out: give a URI as run_c"
    ):
        CPOTrainer(tiny_model(), args, processing_class=tiny_tokenizer("plain"))


def test_a_trainer_stays_on_the_driver(tmp_path: Path) -> None:
    class Asks(TrainerCallback):
        def __init__(self, trainer: CPOTrainer) -> None:
            self.trainer = trainer

    trainer = small(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^callbacks\[0\]: a trainer stays on the driver: callbacks get the model"
    ):
        check_portable(Hooks(callbacks=(Asks(trainer),)))
    assert trainer.accelerator.is_main_process
    assert trainer.accelerator.unwrap_model(trainer.model) is trainer.model
    assert trainer.tokenizer is trainer.processing_class


def test_a_tokenizer_without_pad_token_pads_with_its_eos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("plain")
    tokenizer.pad_token = None
    small(tmp_path, processing_class=tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_datasets_are_where_callbacks_of_trl_look_for_them(tmp_path: Path) -> None:
    trainer = small(tmp_path, train_dataset=chats(2), eval_dataset="held_out.jsonl")
    assert len(trainer.train_dataset) == 2
    assert trainer.eval_dataset == "held_out.jsonl"


def test_a_run_begins_anew_unless_it_is_told_to_go_on(tmp_path: Path) -> None:
    trainer = small(tmp_path)
    assert trainer._beginning(None) == trainer._beginning(False) == {"force_new": True}
    assert trainer._beginning(True) == {"force_new": False}
    other = tmp_path / "other"
    assert trainer._beginning(other) == {"force_new": True, "resume_from": str(other)}


ERNIE = {
    "model_type": "ernie4_5_moe", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2,
    "pad_token_id": 0,
}  # fmt: skip


def frozen(model: Any, name: str) -> Any:
    model.get_parameter(name).requires_grad_(False)
    return model


def test_weights_that_workers_would_train_otherwise_are_refused(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    with pytest.raises(
        ConfigError, match=rf"^model: got frozen weights: {name} \(1 in all\). All weights are"
    ):
        small(tmp_path, model=frozen(tiny_model(), name))
    small(tmp_path, model=frozen(tiny_model(), name), peft_config={"r": 2})
    by_design = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ERNIE))
    assert not by_design.get_parameter(
        "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"
    ).requires_grad
    small(tmp_path, model=by_design)
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, modules_to_save=["norm"]))
    small(tmp_path, model=adapted)
    adapted.get_parameter("base_model.model.model.embed_tokens.weight").requires_grad_(True)
    with pytest.raises(
        ConfigError, match=r"^model: got a PeftModel whose base is trained too: base_model.mod"
    ):
        small(tmp_path, model=adapted)


def test_an_untrained_model_is_saved_as_it_is(tmp_path: Path) -> None:
    trainer = small(tmp_path)
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(
        torch.equal(weight, saved.state_dict()[name]) for name, weight in tiny_model().state_dict().items()
    )
