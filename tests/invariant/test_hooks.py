"""Python of the user's in the worker loop: which events come when, what they see, and what they can ask for."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    TrainerCallback,
    TrainingArguments,
)

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.errors import ConfigError
from ray_prefopt.training import metrics as metrics_module
from ray_prefopt.training.callbacks import STATE_FILE, Returned
from ray_prefopt.training.checkpoint import latest_checkpoint
from ray_prefopt.training.export import export
from ray_prefopt.training.hooks import Hooks, check_portable
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, evaluate_worker, train_worker
from ray_prefopt.training.metrics import Record
from ray_prefopt.training.optimizers import PackedOptimizer
from tests.gang import run_gang
from tests.invariant.training import STEPS, Inputs, StopError, curves, run, stop_at
from tests.tiny import random_pairs


class Recorder(TrainerCallback):
    """Notes every event with the step it came at."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []
        self.seen: dict[str, Any] = {}

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name not in ("on_log", "on_evaluate", "on_step_end"):
            return functools.partial(object.__getattribute__(self, "_note"), name)
        return object.__getattribute__(self, name)

    def _note(self, event: str, args: Any, state: Any, control: Any, **values: Any) -> None:
        self.events.append((event, state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **values: Any) -> None:
        self._note("on_log", args, state, control)
        assert state.log_history[-1] == logs
        self.logs.append(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **values: Any) -> None:
        self._note("on_evaluate", args, state, control)
        self.seen["metrics"] = metrics

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **values: Any) -> None:
        self._note("on_step_end", args, state, control)
        self.seen |= {
            "lr": values["optimizer"].param_groups[0]["lr"],
            "scheduled": values["lr_scheduler"].get_last_lr()[0],
            "vocabulary": len(values["processing_class"]),
            "weights": sum(weight.numel() for weight in model.parameters()),
            "epoch": state.epoch,
            "max_steps": state.max_steps,
            "is_first": state.is_world_process_zero,
            "flags": (control.should_log, control.should_evaluate, control.should_save),
        }


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class AskAt(TrainerCallback):
    """Asks for everything after one step that has nothing of it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if state.global_step == 3:
            control.should_log = control.should_evaluate = control.should_save = True


class AskEarly(TrainerCallback):
    """Asks while a step begins for what comes after it, and keeps the last one from being saved."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if state.global_step == 2:
            control.should_log = control.should_evaluate = control.should_save = True

    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if state.global_step == STEPS:
            control.should_save = False


def worked(job: Job, *, die_at: int | None = None) -> tuple[list[Record], list[Any]]:
    """Records, and callbacks as they are afterwards; dies after the checkpoint of a step if told so."""
    records: list[Record] = []
    returned: list[Returned] = []

    def saved(checkpoint: Any) -> None:
        if checkpoint.state.step == die_at:
            raise StopError

    reports = Reports(lambda _: None, records.append, saved, lambda _: None, lambda _: None, returned.append)
    try:
        train_worker(job, torch.device("cpu"), reports)
    except StopError:
        return records, []
    kept = [attributes for each in returned for attributes in each.attributes if attributes is not None]
    return records, [cloudpickle.loads(attributes) for attributes in kept]


def saved_steps(job: Job) -> list[int]:
    return sorted(int(folder.name[5:13]) for folder in Path(job.checkpoints).iterdir())


class Options(TrainerCallback):
    """Those of the optimizer when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.found = {name: optimizer.param_groups[0][name] for name in ("weight_decay", "betas", "eps")}
        self.found["max_grad_norm"] = getattr(optimizer, "clip_grad", None)


def job_of(inputs: Inputs, config: TrainConfig, folder: Path, **hooks: Any) -> Job:
    return dataclasses.replace(inputs.job(config, folder), hooks=Hooks(**hooks))


def test_events_come_in_the_order_of_transformers(inputs: Inputs, tmp_path: Path) -> None:
    """50 pairs in steps of 16 by micro-batches of 4: four steps of 4, 4, 4 and 1 micro-batches, one epoch."""
    config = inputs.config(run={"eval_steps": 2, "save_steps": 2, "log_steps": 2, "log_first_step": True})
    records, (recorder,) = worked(job_of(inputs, config, tmp_path, callbacks=(Recorder(),)))
    step = [
        ("on_step_begin", 0),
        *[("on_substep_end", 0)] * 3,
        ("on_pre_optimizer_step", 0),
        ("on_optimizer_step", 0),
    ]
    done = ["on_log", "on_log", "on_evaluate", "on_save"]  # of training, then of the evaluation
    expected: list[tuple[str, int]] = [("on_train_begin", 0), ("on_epoch_begin", 0)]
    for number in range(1, STEPS + 1):
        within = step if number < STEPS else [event for event in step if event[0] != "on_substep_end"]
        expected += [(event, number - 1) for event, _ in within] + [("on_step_end", number)]
        expected += [("on_epoch_end", number)] if number == STEPS else []
        expected += [("on_log", 1)] if number == 1 else []
        expected += [(event, number) for event in done] if number % 2 == 0 else []
    assert recorder["events"] == [*expected, ("on_train_end", STEPS)]
    assert recorder["logs"] == records
    assert recorder["seen"]["metrics"] == {
        name: value for name, value in records[-1].items() if name.startswith("eval_")
    }
    seen = recorder["seen"]
    assert seen["lr"] == seen["scheduled"] == 0.0  # the linear schedule is at its end
    assert (seen["epoch"], seen["max_steps"], seen["is_first"]) == (1.0, STEPS, True)
    assert seen["flags"] == (True, True, True)
    assert seen["weights"] > seen["vocabulary"] > 100


def _worked(jobs: list[Job]) -> list[tuple[list[Record], list[Any]]]:
    return [worked(job) for job in jobs]


@pytest.mark.parametrize("engine", ["plain", "zero3"])
def test_training_stops_where_a_callback_says(engine: str, inputs: Inputs, tmp_path: Path) -> None:
    """With a line of the log and a checkpoint of that step, on all ranks."""
    config = inputs.config(engine, run={"save_steps": None, "log_steps": None})
    job = job_of(inputs, config, tmp_path, callbacks=(StopAt(3), Recorder()))
    for records, (_, recorder) in (found[0] for found in run_gang(2, _worked, [job])):
        assert [record["step"] for record in records] == [3]
        assert recorder["events"][-2:] == [("on_save", 3), ("on_train_end", 3)]
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    assert (checkpoint.state.step, checkpoint.state.stopped) == (3, True)


class Ranks(TrainerCallback):
    """Notes what the arguments say of this process."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        self.found = (
            args.process_index,
            args.world_size,
            args.should_save,
            args.should_log,
            str(args.device),
        )


@pytest.mark.parametrize("is_given", [True, False])
def test_arguments_are_those_of_each_rank(is_given: bool, inputs: Inputs, tmp_path: Path) -> None:
    """Also such as were made, and asked, where there was one process."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True) if is_given else None
    assert arguments is None or (arguments.process_index, arguments.world_size) == (0, 1)
    config = inputs.config(run={"max_steps": 1})
    job = job_of(inputs, config, tmp_path, callbacks=(Ranks(),), arguments=arguments)
    found = [callback["found"] for ((_, (callback,)),) in run_gang(2, _worked, [job])]
    assert found == [(0, 2, True, True, "cpu"), (1, 2, False, False, "cpu")]


class StopOnRank(TrainerCallback):
    """Ranks do not agree: only one that is not the first wants to stop."""

    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        control.should_training_stop = not state.is_world_process_zero


def test_where_ranks_differ_the_first_one_decides(inputs: Inputs, tmp_path: Path) -> None:
    job = job_of(inputs, inputs.config(), tmp_path, callbacks=(StopOnRank(),))
    for records, _ in (found[0] for found in run_gang(2, _worked, [job])):
        assert records[-1]["step"] == STEPS


class AskOnRankZero(TrainerCallback):
    """The first rank alone wants more, when it has seen a line of the log or an evaluation."""

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        control.should_evaluate |= state.is_world_process_zero and state.global_step == 1

    def on_evaluate(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        control.should_save |= state.is_world_process_zero


def test_ranks_do_together_what_the_first_one_wants_later(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs.config(run={"eval_steps": 3, "save_steps": None, "log_steps": 1, "keep_checkpoints": 5})
    job = job_of(inputs, config, tmp_path, callbacks=(AskOnRankZero(),))
    for records, _ in (found[0] for found in run_gang(2, _worked, [job])):
        assert [record["step"] for record in records if "eval_loss" in record] == [1, 3, STEPS]
    assert saved_steps(job) == [1, 3, STEPS]


class StopOnLog(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        control.should_training_stop |= state.global_step == 2


def test_a_stop_after_a_line_of_the_log_is_at_once(inputs: Inputs, tmp_path: Path) -> None:
    job = job_of(inputs, inputs.config(run={"save_steps": None}), tmp_path, callbacks=(StopOnLog(),))
    worked(job)
    assert saved_steps(job) == [2]


def test_a_run_that_was_stopped_stays_so_when_its_workers_are_lost(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs.config(run={"save_steps": None})
    job = job_of(inputs, config, tmp_path / "run", callbacks=(StopAt(2),))
    worked(job, die_at=2)
    records, (callback,) = worked(job)
    assert (records, callback) == ([], {"step": 2})
    assert saved_steps(job) == [2]
    stopped = latest_checkpoint(job.checkpoints)
    assert stopped is not None
    config = config.model_copy(update={"run": config.run.model_copy(update={"resume_from": stopped.path})})
    other = job_of(inputs, config, tmp_path / "other")
    assert [record["step"] for record in worked(other)[0] if "loss" in record] == [3, STEPS]


@pytest.mark.parametrize(
    ("callback", "every"), [(AskAt(), None), (AskEarly(), 4)], ids=["at the end", "at the beginning"]
)
def test_callbacks_can_ask_for_more(
    inputs: Inputs, tmp_path: Path, callback: TrainerCallback, every: int | None
) -> None:
    """And the last step is saved whatever is wished: there would else be no model of it."""
    config = inputs.config(run={"log_steps": every, "save_steps": every, "keep_checkpoints": 5})
    job = job_of(inputs, config, tmp_path, callbacks=(callback,))
    records, _ = worked(job)
    assert [(record["step"], "eval_loss" in record) for record in records] == [
        (3, False), (3, True), (4, False), (4, True),
    ]  # fmt: skip
    assert saved_steps(job) == [3, 4]


@pytest.mark.parametrize(("engine", "clips"), [("plain", False), ("zero2", True), ("zero3", True)])
def test_options_are_those_of_the_run_that_begins_with_anothers_states(
    inputs: Inputs, tmp_path: Path, engine: str, clips: bool
) -> None:
    donor = inputs.job(inputs.config(engine), tmp_path / "donor")
    run_gang(1, run, donor, 2)
    start = latest_checkpoint(donor.checkpoints)
    assert start is not None
    optim = {"weight_decay": 0.3, "betas": (0.8, 0.99), "eps": 1e-5, "max_grad_norm": 0.01}
    config = inputs.config(engine, optim=optim, run={"resume_from": start.path})
    ((_, (options,)),) = run_gang(1, worked, job_of(inputs, config, tmp_path / "own", callbacks=(Options(),)))
    norm = optim.pop("max_grad_norm")
    assert {**options["found"], "betas": tuple(options["found"]["betas"])} == {
        **optim,
        "max_grad_norm": norm if clips else None,
    }


def test_early_stopping_goes_on_counting_after_a_restart(inputs: Inputs, tmp_path: Path) -> None:
    """With a rate of nearly nothing no evaluation is better than the first by 0.1: patience of 3 ends at the fourth."""
    config = inputs.config(
        optim={"learning_rate": 1e-12},
        run={"epochs": 3, "eval_steps": 1, "save_steps": 1, "best_metric": "eval_loss"},
    )
    job = job_of(inputs, config, tmp_path, callbacks=(EarlyStoppingCallback(3, 0.1),))
    worked(job, die_at=3)
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    state = json.loads(Path(checkpoint.path, STATE_FILE).read_text())
    assert state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"] == {
        "early_stopping_patience_counter": 2
    }
    assert state["best_metric"] == pytest.approx(checkpoint.state.best_value * -1)
    again = job_of(inputs, config, tmp_path, callbacks=(EarlyStoppingCallback(3, 0.1),))
    records, _ = worked(again)
    assert records[-1]["step"] == 4
    stopped = latest_checkpoint(job.checkpoints)
    assert stopped is not None
    assert stopped.state.stopped


def test_another_run_counts_anew(inputs: Inputs, tmp_path: Path) -> None:
    """Which begins with the checkpoint of one that was stopped early: nothing of that is its own."""
    run = {"epochs": 3, "eval_steps": 1, "save_steps": 1, "best_metric": "eval_loss"}
    config = inputs.config(optim={"learning_rate": 1e-12}, run=run)
    first = job_of(inputs, config, tmp_path / "one", callbacks=(EarlyStoppingCallback(2, 0.1),))
    worked(first)
    stopped = latest_checkpoint(first.checkpoints)
    assert stopped is not None
    assert stopped.state.step == 3
    config = inputs.config(optim={"learning_rate": 1e-12}, run={**run, "resume_from": stopped.path})
    second = job_of(inputs, config, tmp_path / "two", callbacks=(EarlyStoppingCallback(2, 0.1),))
    records, _ = worked(second)
    assert [record["step"] for record in records if "eval_loss" in record] == [4, 5, 6]
    checkpoint = latest_checkpoint(second.checkpoints)
    assert checkpoint is not None
    state = json.loads(Path(checkpoint.path, STATE_FILE).read_text())
    assert state["best_global_step"] >= 4
    assert str(state["best_model_checkpoint"]).startswith(second.checkpoints)


class EndEpoch(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        control.should_epoch_stop = True


def test_an_epoch_cannot_be_cut_short(inputs: Inputs, tmp_path: Path) -> None:
    job = job_of(inputs, inputs.config(), tmp_path, callbacks=(EndEpoch(),))
    with pytest.raises(
        ConfigError, match="should_epoch_stop: the pairs of every step are fixed before training"
    ):
        worked(job)


# --- Metrics of the user's own ---


def accuracy(found: EvalPrediction) -> dict[str, float]:
    best = np.argmax(found.predictions, axis=1)
    return {
        "accuracy": float((best == found.label_ids).mean()),
        "margin": float(-np.diff(found.predictions).mean()),
    }


def halved(rewards: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert labels.tolist() == [0] * len(rewards)
    return rewards / 2


def _evaluated(job: Job) -> Any:
    return evaluate_worker(job, torch.device("cpu"))


def test_predictions_are_those_of_every_pair_in_the_order_of_the_set(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs.config(run={"micro_batch": 2})
    hooks = {"compute_metrics": accuracy, "keep_predictions": True, "include_for_metrics": ("inputs", "loss")}
    job = job_of(inputs, config, tmp_path, **hooks)
    one = _evaluated(job)
    found = one.predictions[""]
    assert found.predictions.shape == (7, 2)
    margins = found.predictions[:, 0] - found.predictions[:, 1]
    assert one.record["eval_accuracy"] == pytest.approx(one.record["eval_rewards/accuracies"])
    assert one.record["eval_margin"] == pytest.approx(one.record["eval_rewards/margins"], rel=1e-5)
    # the loss of each pair follows from its rewards: beta 2, gamma_beta_ratio 0.5
    np.testing.assert_allclose(found.losses, np.log1p(np.exp(-(margins - 2 * 0.5))), rtol=1e-5)
    for row, pair in zip(found.inputs, random_pairs(7, seed=1), strict=True):
        assert row[row != -100].tolist() == list(pair.chosen)
    for other in run_gang(3, _evaluated, job):  # one more rank than micro-batches for one of them
        np.testing.assert_allclose(other.predictions[""].predictions, found.predictions, rtol=1e-5)
        assert other.record == pytest.approx(one.record, rel=1e-5)
    half = _evaluated(job_of(inputs, config, tmp_path, preprocess_logits_for_metrics=halved, **hooks))
    assert half.record["eval_margin"] == pytest.approx(one.record["eval_margin"] / 2)


def test_a_metric_of_the_users_own_can_be_the_best_one(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs.config(run={"eval_steps": 2, "best_metric": "eval_margin"})
    records, _ = worked(job_of(inputs, config, tmp_path, compute_metrics=accuracy))
    values = [record["eval_margin"] for record in records if "eval_margin" in record]
    checkpoint = latest_checkpoint(f"{tmp_path}/checkpoints")
    assert checkpoint is not None
    assert checkpoint.state.best_value == pytest.approx(max(values))


class Scripted:
    """A metric whose values are known, one for each evaluation."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, found: EvalPrediction) -> dict[str, float]:
        return {"x": self.values.pop(0)}


def test_rates_are_those_of_training_alone(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that an evaluation sets a thousand seconds forward, and everything else by one."""
    clock = itertools.count()

    def slow(found: EvalPrediction) -> dict[str, float]:
        nonlocal clock
        clock = itertools.count(next(clock) + 1000)
        return {"x": 0.0}

    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    config = inputs.config(run={"eval_on_start": True, "eval_steps": 1, "log_steps": 1})
    records, _ = worked(job_of(inputs, config, tmp_path, compute_metrics=slow))
    rates = [record["pairs_per_second"] for record in records if "pairs_per_second" in record]
    assert len(rates) == STEPS
    assert min(rates) > 2 / 100


@pytest.mark.parametrize(
    ("run", "values", "best", "kept"),
    [
        ({"eval_steps": 1, "save_steps": 2}, [0.8, 0.7, 0.9, 0.1], 2, [2, 4]),  # 0.8 and 0.9 are not saved
        ({"eval_steps": 1, "save_steps": 1, "eval_on_start": True}, [0.9, 0.1, 0.8, 0.2, 0.3], 2, [2, 4]),
        ({"eval_steps": 1, "save_steps": 1}, [0.9, np.nan, 0.3, 0.2], 1, [1, 4]),
        ({"eval_steps": 1, "save_steps": 1}, [np.nan, 0.3, np.nan, 0.2], 2, [2, 4]),
    ],
)
def test_the_best_checkpoint_is_one_that_there_is(
    run: dict[str, Any], values: list[float], best: int, kept: list[int], inputs: Inputs, tmp_path: Path
) -> None:
    config = inputs.config(run={"best_metric": "eval_x", "keep_checkpoints": 1, **run})
    job = job_of(inputs, config, tmp_path, compute_metrics=Scripted(*values))
    worked(job)
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    assert checkpoint.state.best_step == best
    assert saved_steps(job) == kept


def test_another_best_metric_begins_anew(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs.config(run={"eval_steps": 1, "save_steps": 1, "best_metric": "eval_x"})
    worked(job_of(inputs, config, tmp_path, compute_metrics=Scripted(9, 8, 7)), die_at=2)
    changes = {"best_metric": "eval_loss"}
    config = config.model_copy(update={"run": config.run.model_copy(update=changes)})
    job = job_of(inputs, config, tmp_path, compute_metrics=Scripted(6, 5))
    records, _ = worked(job)
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    losses = {record["eval_loss"]: record["step"] for record in records if "eval_loss" in record}
    assert checkpoint.state.best_step == losses[min(losses)]
    assert checkpoint.state.best_by == "min eval_loss"


def nothing(found: EvalPrediction) -> Any:
    return None


def broken(found: EvalPrediction) -> Any:
    raise ZeroDivisionError("of mine")


@pytest.mark.parametrize(
    ("hooks", "text"),
    [
        (
            {"compute_metrics": nothing},
            "compute_metrics returned NoneType, not numbers by name; it gets an EvalPred",
        ),
        ({"compute_metrics": broken}, "compute_metrics raised ZeroDivisionError: of mine"),
        (
            {
                "compute_metrics": accuracy,
                "preprocess_logits_for_metrics": lambda rewards, labels: rewards.sum(),
            },
            r"must return a tensor with a row for each of the 3 pairs; got \(\)",
        ),
    ],
)
def test_metrics_that_are_none(hooks: dict[str, Any], text: str, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        _evaluated(job_of(inputs, inputs.config(), tmp_path, **hooks))


def test_a_best_metric_that_nobody_computes(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs.config(run={"best_metric": "eval_none"})
    with pytest.raises(ConfigError, match=r"run\.best_metric 'eval_none' is not among .*, eval_margin$"):
        worked(job_of(inputs, config, tmp_path, compute_metrics=accuracy))


# --- Pairs on their way ---


def swapped(pairs: list[TokenizedPair]) -> list[TokenizedPair]:
    return [
        TokenizedPair(pair.rejected, pair.chosen, pair.rejected_start, pair.chosen_start) for pair in pairs
    ]


def test_pairs_can_be_changed_before_they_become_tensors(inputs: Inputs, tmp_path: Path) -> None:
    config = inputs.config(loss={"kind": "simpo", "cpo_alpha": 0.0})
    plain = _evaluated(job_of(inputs, config, tmp_path)).record
    other = _evaluated(job_of(inputs, config, tmp_path, repack=swapped)).record
    assert other["eval_rewards/margins"] == pytest.approx(-plain["eval_rewards/margins"], abs=2e-6)
    records, _ = worked(job_of(inputs, config, tmp_path, repack=swapped))
    before, _ = worked(job_of(inputs, config, tmp_path / "plain"))
    assert records[0]["rewards/margins"] == pytest.approx(-before[0]["rewards/margins"], rel=1e-4)


# --- There and back ---


class Holder(TrainerCallback):
    def __init__(self, held: Any) -> None:
        self.held = held


def test_what_cannot_travel_is_refused_by_name(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(ConfigError) as caught:
        check_portable(Hooks(callbacks=(Recorder(), Holder(file))))
    assert str(caught.value).startswith("callbacks[1] cannot be sent to the workers (PicklingError: ")
    assert str(caught.value).endswith(
        "open files, connections and locks where it is first called, not when it is made"
    )


def test_callbacks_come_back_to_the_objects_that_were_given(tmp_path: Path) -> None:
    mine, unmovable = Holder(1), Holder(2)
    with (tmp_path / "file").open("w") as file:
        returned = Returned.of([Holder([1, 2]), Holder(file)])
    assert returned.give_back([mine, unmovable]) == ["Holder"]
    assert (mine.held, unmovable.held) == ([1, 2], 2)


# --- An optimizer of the user's own ---


def own_optimizer(inputs: Inputs, config: TrainConfig) -> PackedOptimizer:
    """What the optim section of the config describes, made by hand: decay of what is not norm, and a linear fall."""
    model = AutoModelForCausalLM.from_pretrained(inputs.model)
    decayed = [weight for name, weight in model.named_parameters() if weight.ndim > 1]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2, eps=1e-6
    )
    return PackedOptimizer.of(optimizer, LambdaLR(optimizer, lambda step: 1 - step / STEPS), model)


@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3"])
def test_an_optimizer_of_ones_own_does_what_the_same_one_of_the_config_does(
    engine: str, inputs: Inputs, tmp_path: Path
) -> None:
    config = inputs.config(engine, optim={"warmup_ratio": 0.0, "name": "adamw_torch"})
    hooks = Hooks(own_optimizer=own_optimizer(inputs, config))
    jobs = {
        "config": inputs.job(config, tmp_path / "config"),
        "own": dataclasses.replace(inputs.job(config, tmp_path / "own"), hooks=hooks),
    }
    found = curves(jobs, world_size=2)
    assert [record["learning_rate"] for record in found["own"].steps] == [1e-2, 7.5e-3, 5e-3, 2.5e-3]
    assert found["own"].steps[-1]["loss"] == found["config"].steps[-1]["loss"]
    for name, weight in found["config"].weights.items():
        assert torch.equal(weight, found["own"].weights[name])


def test_another_optimizer_goes_on_where_it_was(inputs: Inputs, tmp_path: Path) -> None:
    """SGD with momentum, and no schedule of its own: the config has that."""
    model = AutoModelForCausalLM.from_pretrained(inputs.model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    hooks = Hooks(own_optimizer=PackedOptimizer.of(sgd, None, model))
    config = inputs.config("zero2", optim={"schedule": "constant", "warmup_ratio": 0.0})
    jobs = {
        name: dataclasses.replace(inputs.job(config, tmp_path / name), hooks=hooks)
        for name in ("whole", "halves")
    }
    stop_at({"halves": jobs["halves"]}, 2, step=2)
    found = curves(jobs, world_size=2)
    assert [record["learning_rate"] for record in found["whole"].steps] == [0.5] * 4
    assert found["halves"].steps[-1]["loss"] == found["whole"].steps[-1]["loss"]
    for name, weight in found["whole"].weights.items():
        assert torch.equal(weight, found["halves"].weights[name])


def test_optimizers_that_do_not_belong_to_the_model(inputs: Inputs) -> None:
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ConfigError) as caught:
        PackedOptimizer.of(torch.optim.SGD(torch.nn.Linear(5, 4).parameters()), None, model)
    assert str(caught.value) == (
        "optimizers: the optimizer has a weight of shape (4, 5) that the model has not; "
        "make it over the parameters of the model that you give"
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(
        ConfigError, match=r"^optimizers: the optimizer has taken steps already; give a new one$"
    ):
        PackedOptimizer.of(optimizer, None, model)


# --- Samples ---


def sampled(job: Job) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    reports = Reports(*[lambda _: None] * 5, samples=found.extend)
    train_worker(job, torch.device("cpu"), reports)
    return found


@pytest.mark.parametrize("engine", ["plain", "zero3"])
def test_samples_are_what_the_model_writes_after_the_prompt(
    engine: str, inputs: Inputs, tmp_path: Path
) -> None:
    """With a top_k of 1 in the model's generation settings there is one completion: that of the exported model."""
    model = AutoModelForCausalLM.from_pretrained(inputs.model)
    model.generation_config.do_sample, model.generation_config.top_k = True, 1
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    tokenizer.save_pretrained(tmp_path / "model")
    config = inputs.config(
        engine,
        model={"path": str(tmp_path / "model")},
        run={"eval_samples": 3, "eval_sample_tokens": 5, "save_steps": None},
    )
    job = inputs.job(config, tmp_path)
    first, second = run_gang(2, sampled, job)
    assert first == second
    assert [sample["step"] for sample in first] == [STEPS] * 3
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    trained = AutoModelForCausalLM.from_pretrained(export(checkpoint.path, str(tmp_path / "out"))).float()
    pairs = [random_pairs(7, seed=1)[index] for index in (0, 3, 6)]
    for sample, pair in zip(first, pairs, strict=True):
        prompt = list(pair.chosen[: pair.chosen_start])
        written = trained.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=5, pad_token_id=tokenizer.pad_token_id
        )[0, len(prompt) :]
        assert sample["sample"] == tokenizer.decode(written, skip_special_tokens=True)
        assert sample["chosen"] == tokenizer.decode(
            pair.chosen[pair.chosen_start :], skip_special_tokens=True
        )
        assert sample["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True)
