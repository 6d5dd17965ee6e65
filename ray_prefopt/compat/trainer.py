"""TRL's trainers over a run on Ray: the same constructor, methods and metrics, many workers.

A trainer is a driver: it puts what it was given where workers can read it, translates its arguments into a
TrainConfig, and hands over to `training.run`.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from os import PathLike, fspath
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NoReturn

import ray.train
import torch
from fsspec.core import url_to_fs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.data.data_collator import DataCollator
from transformers.trainer_pt_utils import log_metrics, save_metrics, save_state
from transformers.trainer_utils import BestRun, PredictionOutput, TrainOutput, speed_metrics

from ray_prefopt.compat.batches import LABEL_PAD, Batch, inputs_of, pairs_of, repacked, row_of, stacked
from ray_prefopt.compat.cluster import run_values
from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.compat.hub import Pushes, Repository, repository_name
from ray_prefopt.compat.inputs import Pairs, model_values, pairs_source
from ray_prefopt.compat.search import HpSpace, named_back, search_config
from ray_prefopt.compat.translate import to_train_config
from ray_prefopt.config import CPOLoss, RunConfig, TrainConfig
from ray_prefopt.data.collate import collate
from ray_prefopt.data.formats import ChatTemplate, Skipped, to_pair
from ray_prefopt.data.prepare import length_limits
from ray_prefopt.data.tokenization import tokenize_pairs
from ray_prefopt.errors import ConfigError, DataError, HubError
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.losses.objective import Objective, StepTotals, pair_losses, pair_rewards
from ray_prefopt.model.adapters import base_of, name_base, with_adapter
from ray_prefopt.model.forward import can_restrict_logits, pair_logps
from ray_prefopt.model.load import (
    compute_dtype,
    decoder_start_id,
    load_architecture,
    load_model,
    model_class,
)
from ray_prefopt.model.tokenizer import load_tokenizer
from ray_prefopt.search.tune import tune
from ray_prefopt.training.card import CardDetails, model_card
from ray_prefopt.training.checkpoint import latest_checkpoint, open_checkpoint
from ray_prefopt.training.export import export, metrics_at
from ray_prefopt.training.folder import TrainResult, absolute, resolved, run_folder
from ray_prefopt.training.hooks import ComputeMetrics, Hooks
from ray_prefopt.training.metrics import means
from ray_prefopt.training.optimizers import PackedOptimizer
from ray_prefopt.training.run import EvalResult, evaluate, train


class CPOTrainer:
    """Trains with CPO, SimPO or CPO-SimPO on Ray workers, called as TRL's trainer of the same name is.

    `model` is a path, hub id, PreTrainedModel or PeftModel; datasets may be in memory, Ray Datasets, or paths;
    `tokenizer` is the older name of `processing_class`. Callbacks, metrics, collator and optimizer are sent to the
    workers; what callbacks gather there is theirs here when `train` returns. `scaling_config` says how many workers
    there are and what each has; one on the CPU, or one for each GPU of this machine, when it is not given. With a pair
    of numbers a step has the pairs of the larger one. `run_config` names the run and its storage. Raises ConfigError
    for arguments that cannot be honoured, each with what to do instead.
    """

    _default_args: type[CPOConfig | SimPOConfig] = CPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None = None,  # a PeftModel is an nn.Module
        args: CPOConfig | SimPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Pairs | None = None,
        eval_dataset: Pairs | Mapping[str, Pairs] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: Any = None,
        compute_metrics: ComputeMetrics | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        scaling_config: ray.train.ScalingConfig | None = None,
        run_config: ray.train.RunConfig | None = None,
    ) -> None:
        if (model is None) == (model_init is None):
            raise ConfigError("model, model_init: give one of the two")
        _check_own_methods(type(self))
        self.args: CPOConfig | SimPOConfig = (
            args if args is not None else self._default_args("trainer_output")
        )
        if "://" in str(self.args.output_dir):
            raise ConfigError(
                f"output_dir must be a folder, which all nodes see; got {self.args.output_dir}: give a URI as "
                "run_config=RunConfig(storage_path=...), and a folder for what is in memory"
            )
        self.model: Any = model if model_init is None else _made(model_init, seed=self.args.seed)
        self.processing_class = processing_class if processing_class is not None else tokenizer
        if self.processing_class is not None and self.processing_class.pad_token is None:
            self.processing_class.pad_token = self.processing_class.eos_token  # as TRL does
        self.callbacks = [each() if isinstance(each, type) else each for each in callbacks or ()]
        self.state = TrainerState()
        self._inputs = Path(str(self.args.output_dir)).absolute() / "inputs"
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        own_optimizer = _own_optimizer(optimizers, self.model, peft_config)
        cluster = run_values(scaling_config, run_config)
        self._translate = partial(
            to_train_config,
            self.args,
            model=model_values(
                self.model, self.processing_class, self._inputs, has_new_adapter=peft_config is not None
            ),
            num_workers=cluster.pop("num_workers"),
            use_gpu=cluster.pop("use_gpu"),
            peft_config=peft_config,
            cluster=cluster,
        )
        unread: dict[str, Any] = {"train": [], **({"eval": None} if eval_dataset is None else {})}
        self._architecture = load_architecture(self._translate(data=unread).model)
        self.is_encoder_decoder = bool(self._architecture.is_encoder_decoder)
        self._translate = partial(self._translate, is_encoder_decoder=self.is_encoder_decoder)
        self._config = self._translate(data=unread)
        self._hooks = Hooks(
            arguments=self.args,
            compute_metrics=None if self.args.prediction_loss_only else compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            include_for_metrics=_included(self.args),
            repack=None
            if data_collator is None
            else partial(repacked, data_collator, is_encoder_decoder=self.is_encoder_decoder),
            own_optimizer=own_optimizer,
        )
        if self.processing_class is None:
            self.processing_class = load_tokenizer(self._config.model)
        self._result: TrainResult | None = None
        self._notify("on_init_end")

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a trainer stays on the driver: callbacks get the model, arguments and state of their worker; for other "
            "sets to evaluate on give eval_dataset={...}"
        )

    @property
    def tokenizer(self) -> Any:
        """The older name of `processing_class`."""
        return self.processing_class

    @property
    def accelerator(self) -> SimpleNamespace:
        """What scripts ask accelerate for: the driver is a single process, the main one."""
        return SimpleNamespace(
            is_main_process=True,
            is_local_main_process=True,
            process_index=0,
            num_processes=1,
            device=torch.device("cpu"),
            print=print,
            wait_for_everyone=lambda: None,
            unwrap_model=lambda model, **_: model,
        )

    # --- Runs ---

    def train(
        self,
        resume_from_checkpoint: str | PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,  # noqa: ARG002  # TRL's signature
    ) -> TrainOutput:
        """Train to the end; afterwards `model` holds the trained weights and `state` what was logged.

        `resume_from_checkpoint`: True goes on with the run in args.output_dir, a path with that checkpoint; otherwise
        the run begins anew, and an older one in args.output_dir is moved aside. `ignore_keys_for_eval` has no effect:
        no output of the model is gathered but the rewards.
        """
        if trial is not None:
            raise ConfigError("train: trial has no meaning here; leave it out")
        if self.train_dataset is None:
            raise ConfigError("train: got no train_dataset; give one to the constructor")
        resume = resume_from_checkpoint
        run = self._beginning(self.args.resume_from_checkpoint if resume is None else resume)
        pairs = pairs_source(self.train_dataset, self._inputs / "train")
        config = self._translate(data={"train": pairs, "eval": self._eval_sources(self.eval_dataset)})
        hooks = replace(self._hooks, callbacks=tuple(self.callbacks))
        begun = time.time()
        with Pushes(self.args, self._card_details()) if self.args.push_to_hub else nullcontext() as observer:
            self._result = result = train(_changed(config, run=run), hooks=hooks, observer=observer)
        records = _records(result.folder)
        self.state = TrainerState(
            epoch=result.metrics["epoch"],
            global_step=result.steps,
            max_steps=result.steps,
            num_input_tokens_seen=int(result.metrics["num_input_tokens_seen"]),
            log_history=records,
            best_model_checkpoint=result.best_checkpoint,
            **_best(records, self._config.run),
        )
        self._take_weights()
        summary = _summary(records, begun, result.pairs)
        self._logged(summary)
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(result.steps, summary["train_loss"], {**result.metrics, **summary})

    def evaluate(
        self,
        eval_dataset: Pairs | Mapping[str, Pairs] | None = None,
        ignore_keys: list[str] | None = None,  # noqa: ARG002  # TRL's signature
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of the model, trained or as it was given, on held-out pairs; also added to state.log_history.

        `ignore_keys` has no effect: no output of the model is gathered but the rewards.
        """
        if (pairs := eval_dataset if eval_dataset is not None else self.eval_dataset) is None:
            raise ConfigError("evaluate: got no eval_dataset, here or in the constructor; give one")
        _, metrics = self._measured(pairs, self._hooks, metric_key_prefix)
        self._logged(metrics)
        self._notify("on_evaluate", metrics=metrics)
        return metrics

    def predict(
        self,
        test_dataset: Pairs,
        ignore_keys: list[str] | None = None,  # noqa: ARG002  # TRL's signature
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Rewards of every pair, (N, 2), the labels that `compute_metrics` gets, and the metrics of `evaluate`."""
        if isinstance(test_dataset, Mapping):
            raise ConfigError("predict: got several sets; call it for one after the other")
        hooks = replace(self._hooks, keep_predictions=True)
        found, metrics = self._measured(test_dataset, hooks, metric_key_prefix)
        self._notify("on_predict", metrics=metrics)
        kept = found.predictions["eval"]
        return PredictionOutput(kept.predictions, kept.label_ids, metrics)

    def _measured(
        self, pairs: Pairs | Mapping[str, Pairs], hooks: Hooks, prefix: str
    ) -> tuple[EvalResult, dict[str, float]]:
        """What was found, and its metrics as transformers names them, with how fast it was."""
        model = {"path": self._checkpoint} if self._result is not None else {}
        changed = _changed(self._config, data={"eval": self._eval_sources(pairs)}, model=model)
        begun, run = time.time(), changed.run
        found = evaluate(changed, hooks=hooks)
        metrics = {f"{prefix}_{name.removeprefix('eval_')}": value for name, value in found.metrics.items()}
        number = sum(found.pairs.values())
        steps = math.ceil(number / ((run.eval_micro_batch or run.micro_batch) * run.max_workers))
        metrics |= speed_metrics(prefix, begun, number, steps)
        return found, metrics if self.state.epoch is None else {**metrics, "epoch": self.state.epoch}

    def hyperparameter_search(
        self,
        hp_space: HpSpace | None = None,
        compute_objective: Any = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        backend: Any = "ray",
        hp_name: Callable[[Any], str] | None = None,
        **settings: Any,
    ) -> BestRun:
        """Search over arguments on Ray Tune: each trial is a run, and the best is by held-out reward accuracy.

        `hp_space` returns distributions of ray.tune by argument; `settings` are fields of `SearchConfig`, such as
        scheduler or seeds. The result's run_summary is a `TuneResult`: folder, report, and the best model.
        """
        if self.train_dataset is None:
            raise ConfigError("hyperparameter_search: got no train_dataset; give one to the constructor")
        search = search_config(
            hp_space,
            self.args,
            n_trials=n_trials,
            direction=direction,
            compute_objective=compute_objective,
            backend=backend,
            **settings,
        )
        pairs = pairs_source(self.train_dataset, self._inputs / "train")
        config = self._translate(data={"train": pairs})
        data = {"eval": self._eval_sources(self.eval_dataset)}  # whatever args.eval_strategy says
        run = {"name": hp_name(None) if hp_name else f"{config.run.name}-search", "force_new": True}
        hooks = replace(self._hooks, callbacks=tuple(self.callbacks))
        result = tune(_changed(config, data=data, run=run), search, hooks=hooks)
        found = named_back(result.point, hp_space(None), self.args) if hp_space else result.point
        return BestRun(result.trial, result.value, found, result)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Call this one too."""
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """Call this one no more, or the first of this class; returns it, or None when there is none."""
        for each in self.callbacks:
            if each == callback or (isinstance(callback, type) and isinstance(each, callback)):
                self.callbacks.remove(each)
                return each
        return None

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """As `pop_callback`."""
        self.pop_callback(callback)

    def _notify(self, event: str, **values: Any) -> None:
        """Call an event that happens here, not on the workers."""
        for callback in self.callbacks:
            getattr(callback, event)(
                self.args,
                self.state,
                TrainerControl(),
                model=self.model,
                processing_class=self.processing_class,
                **values,
            )

    def _logged(self, record: Mapping[str, float]) -> None:
        self.state.log_history.append({**record, "step": self.state.global_step})
        self._notify("on_log", logs=dict(record))

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the model, trained or as it was given, and its tokenizer as a Hugging Face folder."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        given = self._config.model.adapter or self._config.model.path
        source = self._exported() if self._result is not None else str(given)
        if not Path(source).is_dir():
            raise ConfigError(
                f"save_model: {source} is on the Hub and was not trained; there is nothing to save"
            )
        shutil.copytree(source, folder, dirs_exist_ok=True)
        assert self.processing_class is not None
        self.processing_class.save_pretrained(folder)
        if self._result is not None:
            self._write_card(folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Upload what `save_model` writes to args.hub_model_id, or to the name of args.output_dir.

        `card` is given to `create_model_card`. Returns the commit, or unless `blocking` a future of it.
        """
        self._notify("on_push_begin")
        repository = Repository.of(self.args, token=token, revision=revision, private=private)
        folder = self._inputs / "upload"
        self.save_model(str(folder))
        self._write_card(folder, **card)
        try:
            return repository.upload(folder, commit_message, blocking=blocking)
        except HubError as error:
            raise HubError(
                f"{error}. The model and its card lie in {folder}; call push_to_hub() again"
            ) from error

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write README.md in args.output_dir: how the model was trained, and what to cite."""
        self._write_card(Path(str(self.args.output_dir)), model_name, dataset_name, tags)

    def _write_card(
        self,
        folder: Path,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        checkpoint = open_checkpoint(self._checkpoint, verify="sizes") if self._result else None
        source = self.train_dataset
        card = model_card(
            _changed(self._config, data={"train": source if isinstance(source, str) else []}),
            steps=checkpoint.state.step if checkpoint else 0,
            metrics=metrics_at(checkpoint) if checkpoint else {},
            is_adapter=self._config.model.has_adapter,
            details=self._card_details(model_name, dataset_name, tags),
        )
        card.save(folder / "README.md")

    def _card_details(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> CardDetails:
        return CardDetails(
            model_name or repository_name(self.args).rpartition("/")[2],
            self._base_name,
            (dataset_name,) if dataset_name else (),
            (tags,) if isinstance(tags, str) else tuple(tags or ()),
        )

    def _beginning(self, resume: str | PathLike[str] | bool | None) -> dict[str, Any]:
        """Fields of `run` that say where training begins; raises ConfigError for an older checkpoint of this run."""
        if resume is None or isinstance(resume, bool):
            return {"force_new": not resume}
        resume = fspath(resume)
        run = run_folder(resolved(self._config))
        if not absolute(resume).startswith(f"{run}/"):
            return {"force_new": True, "resume_from": resume}
        newest = latest_checkpoint(f"{run}/checkpoints")
        if newest is None or Path(newest.path).name != Path(resume).name:
            raise ConfigError(
                f"resume_from_checkpoint: {resume} is not the newest checkpoint of its run; copy it elsewhere to begin "
                "a new run from it, or give True to go on from the newest"
            )
        return {"force_new": False}

    @property
    def _base_name(self) -> str | None:
        """Of the model that was given, or that is under its adapter; None where it was made in memory."""
        return getattr(base_of(self.model), "name_or_path", None) or None

    def _eval_sources(self, pairs: Pairs | Mapping[str, Pairs] | None) -> Any:
        """What `data.eval` takes."""
        if pairs is None:
            return None
        if isinstance(pairs, Mapping):
            return {name: pairs_source(each, self._inputs / f"eval-{name}") for name, each in pairs.items()}
        return pairs_source(pairs, self._inputs / "eval")

    @property
    def _checkpoint(self) -> str:
        """The one that training ended with, or the best one for args.load_best_model_at_end."""
        assert self._result is not None
        return self._result.best_checkpoint if self.args.load_best_model_at_end else self._result.checkpoint

    def _exported(self) -> str:
        """Hugging Face folder of that checkpoint."""
        assert self._result is not None
        folder = self._result.model
        if folder is None or "://" in folder or self._checkpoint != self._result.checkpoint:
            folder = export(self._checkpoint, str(self._inputs / "trained"))
        name_base(Path(folder), self._base_name)
        return folder

    def _take_weights(self) -> None:
        """Put the trained weights into `model`, or load it where a path was given."""
        folder, config = self._exported(), self._config.model
        architecture = load_architecture(config)
        if isinstance(self.model, str) and config.has_adapter:
            ends = {"lora": None, "adapter": folder, "neftune_noise_alpha": None, "compile": None}
            dtype = compute_dtype(config, architecture)
            self.model = load_model(config.model_copy(update=ends), dtype=dtype, seed=self._config.run.seed)
        elif isinstance(self.model, str):
            kind = model_class(architecture)
            self.model = kind.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        elif config.has_adapter:
            self.model = with_adapter(self.model, folder)
        else:
            # By transformers, which has other names for some weights in files than in memory.
            trained = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
            self.model.load_state_dict(trained.state_dict())

    # --- Arithmetic, on tensors of the caller's ---

    def cpo_loss(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, chosen rewards and rejected rewards, each (B,), of the log-probabilities that the loss reads."""
        ones, zeros = torch.ones_like(policy_chosen_logps), torch.zeros_like(policy_chosen_logps)
        logps = PairLogps(policy_chosen_logps, policy_rejected_logps, ones, ones, zeros, zeros)
        chosen, rejected = pair_rewards(self._config.loss, logps)
        return pair_losses(self._config.loss, logps), chosen.detach(), rejected.detach()

    @staticmethod
    def get_batch_logps(
        logits: Tensor, labels: Tensor, average_log_prob: bool = False, is_encoder_decoder: bool = False
    ) -> Tensor:
        """Summed or mean log-probabilities, (B,), of labels (B, T) under logits (B, T, V); label -100 is not scored.

        A decoder's logits predict the next label, those of an encoder-decoder the label at their own place.
        """
        if logits.shape[:-1] != labels.shape:
            raise ConfigError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together"
            )
        if not is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        is_scored = labels != LABEL_PAD
        targets = labels.masked_fill(~is_scored, 0)
        logps = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        sums = (logps * is_scored).sum(-1)
        return sums / is_scored.sum(-1) if average_log_prob else sums

    def concatenated_forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Chosen and rejected log-probabilities (B,) as the loss reads them, their logits (B, T, V), and the mean NLL.

        With a router that reports it, the auxiliary loss comes last. Training itself never holds such logits.
        """
        start = decoder_start_id(self._architecture)
        output = model(**inputs_of(batch, pad_id=self._pad_id, decoder_start_id=start), use_cache=False)
        labels = stacked(batch, "labels")
        is_mean = not isinstance(self._config.loss, CPOLoss)
        is_split = self.is_encoder_decoder
        logps = self.get_batch_logps(output.logits, labels, is_mean, is_encoder_decoder=is_split)
        pairs = len(labels) // 2
        of_tokens = self.get_batch_logps(output.logits[:pairs], labels[:pairs], is_encoder_decoder=is_split)
        nll = -of_tokens.sum() / (labels[:pairs, 0 if is_split else 1 :] != LABEL_PAD).sum()
        aux = [] if getattr(output, "aux_loss", None) is None else [output.aux_loss]
        return (logps[:pairs], logps[pairs:], output.logits[:pairs], output.logits[pairs:], nll, *aux)

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: Batch, train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, a scalar with gradient, and its metrics under TRL's names."""
        pairs = pairs_of(batch)
        collated = collate(pairs, pad_id=self._pad_id, decoder_start_id=decoder_start_id(self._architecture))
        collated = collated.to(next(model.parameters()).device)
        logps = pair_logps(model, collated, restrict_logits=can_restrict_logits(model))
        tokens = sum(len(pair.chosen) - pair.chosen_start for pair in pairs)
        aux_loss_coef = getattr(getattr(model, "config", None), "router_aux_loss_coef", 0.0)
        objective = Objective(self._config.loss, aux_loss_coef)
        loss = objective.loss(logps, collated.weights_B, StepTotals(len(pairs), tokens))
        sums = objective.sums(logps, collated.weights_B, loss)
        prefix = "eval_" if train_eval == "eval" else ""
        values = means({name: value.item() for name, value in sums.items()}, steps=1)
        return loss, {prefix + name: value for name, value in values.items()}

    @property
    def _pad_id(self) -> int:
        assert self.processing_class is not None
        return self.processing_class.pad_token_id or 0  # what is padded is masked

    def tokenize_row(self, feature: Mapping[str, Any], model: Any = None) -> dict[str, list[int]]:  # noqa: ARG002
        """Ids, attention masks and labels of a row, as training sees them. Raises DataError when it is no pair.

        `model`, of which TRL asks how a decoder starts, is not needed.
        """
        data = self._config.data
        tokenizer = self.processing_class
        assert tokenizer is not None
        render = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        found = to_pair(
            feature,
            render,
            form=data.format,
            columns=dict(data.columns.items()),
            assistant_header=data.assistant_header,
        )
        if not isinstance(found, Skipped):
            (tokenized,) = tokenize_pairs(
                [found], tokenizer, length_limits(data), is_encoder_decoder=self.is_encoder_decoder
            )
            if not isinstance(tokenized, Skipped):
                return row_of(tokenized, is_encoder_decoder=self.is_encoder_decoder)
            found = tokenized
        raise DataError(f"the row is no pair: {found.reason}, {found.detail}")

    # --- What scripts call around a run ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002  # TRL's signature
        """Add a record to state.log_history, for callbacks to hear of."""
        self._logged(logs if self.state.epoch is None else {**logs, "epoch": self.state.epoch})

    log_metrics = log_metrics
    save_metrics = save_metrics
    save_state = save_state

    @staticmethod
    def is_world_process_zero() -> bool:
        """Whether this process may write; the driver is the only one that runs the script."""
        return True

    is_local_process_zero = is_world_process_zero


ON_WORKERS = {
    "cpo_loss", "simpo_loss", "compute_loss", "get_batch_loss_metrics", "concatenated_forward", "get_batch_logps",
    "tokenize_row", "training_step", "prediction_step", "evaluation_loop", "get_train_dataloader",
    "get_eval_dataloader", "create_optimizer", "create_scheduler", "create_optimizer_and_scheduler",
}  # fmt: skip
"""Methods by which subclasses of TRL's trainer change what is trained; here none of them is called in a run."""


def _check_own_methods(kind: type) -> None:
    """Raises ConfigError for a subclass that would be trained otherwise than it says."""
    own = sorted(
        {name for each in kind.__mro__ if each.__module__ != __name__ for name in vars(each)} & ON_WORKERS
    )
    if own:
        raise ConfigError(
            f"{kind.__name__} overrides {', '.join(own)}, which workers do not call: use the arguments of the loss, "
            "callbacks, data_collator, compute_metrics and optimizers"
        )


class SimPOTrainer(CPOTrainer):
    """The trainer of the SimPO document: `CPOTrainer` with its config and the document's names."""

    _default_args = SimPOConfig
    simpo_loss = CPOTrainer.cpo_loss


def _changed(config: TrainConfig, **sections: Mapping[str, Any]) -> TrainConfig:
    """The config with some values of some sections replaced."""
    parts = {
        name: getattr(config, name).model_copy(update=dict(changes)) for name, changes in sections.items()
    }
    return config.model_copy(update=parts)


def _included(args: CPOConfig | SimPOConfig) -> tuple[str, ...]:
    """What compute_metrics gets besides predictions and labels."""
    named = [*args.include_for_metrics, *(["inputs"] if args.include_inputs_for_metrics else [])]
    unknown = sorted(set(named) - {"inputs", "loss"})
    if unknown:
        raise ConfigError(f"include_for_metrics: {', '.join(unknown)} is not known; inputs and loss are")
    return tuple(named)


def _own_optimizer(optimizers: tuple[Any, Any], model: Any, peft_config: Any) -> PackedOptimizer | None:
    """What a trainer is given as `optimizers`; raises ConfigError when it cannot be moved to the workers."""
    optimizer, schedule = optimizers
    if optimizer is None:
        if schedule is not None:
            raise ConfigError(
                "optimizers: got a scheduler without its optimizer; give both, or name it in args.lr_scheduler_type"
            )
        return None
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "optimizers: an optimizer needs the model that it was made over; give that as model, not its path"
        )
    if peft_config is not None:
        raise ConfigError(
            "optimizers: with peft_config the weights that are trained are not made yet; give a PeftModel as model, "
            "and an optimizer over its parameters"
        )
    return PackedOptimizer.of(optimizer, schedule, model)


def _records(folder: str) -> list[dict[str, float]]:
    """What a run has logged."""
    fs, path = url_to_fs(folder)
    return [json.loads(line) for line in fs.cat_file(f"{path}/metrics.jsonl").splitlines()]


def _summary(records: Sequence[Mapping[str, float]], begun: float, pairs: int) -> dict[str, float]:
    """What transformers logs when training has ended; the loss is the mean of all steps.

    `pairs` are those of an epoch.
    """
    lines = [record for record in records if "loss" in record]
    steps, epoch = [line["step"] for line in lines], lines[-1]["epoch"]
    weights = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    loss = sum(weight * line["loss"] for weight, line in zip(weights, lines, strict=True)) / steps[-1]
    speed = speed_metrics("train", begun, round(epoch * pairs), steps[-1])
    return {**speed, "train_loss": loss, "epoch": epoch}


def _made(model_init: Callable[..., PreTrainedModel], *, seed: int) -> PreTrainedModel:
    """The same each time; without a trial, which transformers gives to a function that takes one."""
    set_seed(seed)
    parameters = signature(model_init).parameters
    takes_trial = "trial" in parameters or any(
        each.default is each.empty and each.kind == each.POSITIONAL_OR_KEYWORD for each in parameters.values()
    )
    return model_init(None) if takes_trial else model_init()


def _best(records: Sequence[Mapping[str, float]], run: RunConfig) -> dict[str, Any]:
    """Value and step of the best evaluation after the first step, as TrainerState names them; the first of equals."""
    metric = run.best_metric or ""
    found = [
        (record[metric], int(record["step"]))
        for record in records
        if record["step"] and not math.isnan(record.get(metric, math.nan))
    ]
    if not found:
        return {}
    value, step = (min if run.is_lower_better(metric) else max)(found, key=lambda entry: entry[0])
    return {"best_metric": value, "best_global_step": step}
