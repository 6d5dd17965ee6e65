"""TRL's trainers over a run on Ray: the same constructor, methods and metrics, many workers.

A trainer is a driver: it puts what it was given where workers can read it, translates its arguments into a
TrainConfig, and hands over to `training.run`.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
)
from transformers.trainer_utils import TrainOutput

from ray_prefopt.compat.batches import LABEL_PAD, Batch, pairs_of, row_of, stacked
from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.compat.inputs import Pairs, model_values, pairs_source
from ray_prefopt.compat.translate import to_train_config
from ray_prefopt.config import CPOLoss, TrainConfig
from ray_prefopt.data.collate import collate
from ray_prefopt.data.formats import ChatTemplate, Skipped, to_pair
from ray_prefopt.data.prepare import length_limits
from ray_prefopt.data.tokenization import tokenize_pairs
from ray_prefopt.errors import ConfigError, DataError
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.losses.objective import StepTotals, make_objective, pair_losses
from ray_prefopt.losses.preference import alpha_reward
from ray_prefopt.model.forward import keeps_logits, pair_logps
from ray_prefopt.model.tokenizer import load_tokenizer
from ray_prefopt.training.checkpoint import latest_checkpoint
from ray_prefopt.training.export import export
from ray_prefopt.training.metrics import means
from ray_prefopt.training.run import TrainResult, evaluate, train

REFUSED = {
    "data_collator": "pairs are packed by ray_prefopt.data.collate, so that ranks carry equal work: leave it out",
    "callbacks": "workers report to metrics.jsonl and TensorBoard in the run's folder: read those",
    "optimizers": "an optimizer cannot be moved to the workers: name it in args.optim and args.lr_scheduler_type",
    "preprocess_logits_for_metrics": "logits are never held as a whole: leave it out",
    "compute_metrics": "evaluation reports TRL's reward metrics: leave it out",
}
"""Constructor arguments that the workers have no place for."""


class CPOTrainer:
    """Trains with CPO, SimPO or CPO-SimPO on Ray workers, called as TRL's trainer of the same name is.

    `model` is a path, hub id or PreTrainedModel; datasets may be in memory, Ray Datasets, or paths; `tokenizer` is the
    older name of `processing_class`. `scaling_config` says how many workers there are and whether each has a GPU; one
    on the CPU, or one for each GPU of this machine, when it is not given. Raises ConfigError for arguments that cannot
    be honoured, each with what to do instead.
    """

    _default_args: type[CPOConfig | SimPOConfig] = CPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | None = None,
        args: CPOConfig | SimPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Pairs | None = None,
        eval_dataset: Pairs | Mapping[str, Pairs] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        scaling_config: ray.train.ScalingConfig | None = None,
    ) -> None:
        _refuse(
            data_collator=data_collator,
            callbacks=callbacks or None,
            optimizers=None if tuple(optimizers) == (None, None) else optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_metrics=compute_metrics,
        )
        if (model is None) == (model_init is None):
            raise ConfigError("model, model_init: give one of the two")
        self.args: CPOConfig | SimPOConfig = (
            args if args is not None else self._default_args("trainer_output")
        )
        self.model: Any = model if model_init is None else model_init()
        self.processing_class = processing_class if processing_class is not None else tokenizer
        self.state = TrainerState()
        self._inputs = Path(str(self.args.output_dir)).absolute() / "inputs"
        scaling = scaling_config or _workers_of_this_machine()
        self._train, self._eval = train_dataset, eval_dataset
        self._translated = partial(
            to_train_config,
            self.args,
            model=model_values(self.model, self.processing_class, self._inputs),
            num_workers=_number_of(scaling),
            use_gpu=bool(scaling.use_gpu),
            peft_config=peft_config,
        )
        self._config = self._translated(
            data={"train": [], **({"eval": None} if eval_dataset is None else {})}
        )
        if self.processing_class is None:
            self.processing_class = load_tokenizer(self._config.model)
        self._result: TrainResult | None = None

    # --- Runs ---

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to the end; afterwards `model` holds the trained weights and `state` what was logged.

        `resume_from_checkpoint`: True goes on with the run in args.output_dir, a path with that checkpoint; otherwise
        the run begins anew, and an older one in args.output_dir is moved aside.
        """
        if trial is not None or ignore_keys_for_eval is not None:
            raise ConfigError("train: trial and ignore_keys_for_eval have no meaning here; leave them out")
        if self._train is None:
            raise ConfigError("train: got no train_dataset; give one to the constructor")
        run = self._beginning(resume_from_checkpoint or self.args.resume_from_checkpoint)
        pairs = pairs_source(self._train, self._inputs / "train")
        config = self._translated(data={"train": pairs, "eval": self._eval_sources(self._eval)})
        self._result = result = train(_changed(config, run=run))
        records = [json.loads(line) for line in Path(result.folder, "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if "loss" in record]
        self.state = TrainerState(
            epoch=result.metrics["epoch"],
            global_step=result.steps,
            max_steps=result.steps,
            log_history=records,
            best_model_checkpoint=result.best_checkpoint,
        )
        self._take_weights()
        mean_loss = sum(losses) / len(losses)
        return TrainOutput(result.steps, mean_loss, {**result.metrics, "train_loss": mean_loss})

    def evaluate(
        self,
        eval_dataset: Pairs | Mapping[str, Pairs] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of the model, trained or as it was given, on held-out pairs; also added to state.log_history."""
        if ignore_keys is not None:
            raise ConfigError("evaluate: ignore_keys has no meaning here; leave it out")
        if (pairs := eval_dataset if eval_dataset is not None else self._eval) is None:
            raise ConfigError("evaluate: got no eval_dataset, here or in the constructor; give one")
        model = {"path": self._checkpoint} if self._result is not None else {}
        found = evaluate(
            _changed(self._config, data={"eval": self._eval_sources(pairs)}, model=model)
        ).metrics
        metrics = {
            f"{metric_key_prefix}_{name.removeprefix('eval_')}": value for name, value in found.items()
        }
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the model, trained or as it was given, and its tokenizer as a Hugging Face folder."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        source = self._exported() if self._result is not None else str(self._config.model.path)
        if not Path(source).is_dir():
            raise ConfigError(
                f"save_model: {source} is on the Hub and was not trained; there is nothing to save"
            )
        shutil.copytree(source, folder, dirs_exist_ok=True)
        assert self.processing_class is not None
        self.processing_class.save_pretrained(folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Upload what `save_model` writes to args.hub_model_id, or to the name of args.output_dir."""
        hub = HfApi(token=token or self.args.hub_token)
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).name
        repository = hub.create_repo(name, private=self.args.hub_private_repo, exist_ok=True).repo_id
        folder = self._inputs / "upload"
        self.save_model(str(folder))
        upload: Any = hub.upload_folder  # its overloads want a literal for run_as_future
        return upload(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            run_as_future=not blocking,
        )

    def _beginning(self, resume: str | bool | None) -> dict[str, Any]:
        """Fields of `run` that say where training begins; raises ConfigError for an older checkpoint of this run."""
        if not isinstance(resume, str):
            return {"force_new": resume is not True}
        run = Path(self._config.run.storage_path, str(self._config.run.name)).absolute()
        if run not in Path(resume).absolute().parents:
            return {"force_new": True, "resume_from": resume}
        newest = latest_checkpoint(f"{run}/checkpoints")
        if newest is None or Path(newest.path).name != Path(resume).name:
            raise ConfigError(
                f"resume_from_checkpoint: {resume} is not the newest checkpoint of its run; copy it elsewhere to begin "
                "a new run from it, or give True to go on from the newest"
            )
        return {"force_new": False}

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
        if self._result.model is not None and self._checkpoint == self._result.checkpoint:
            return self._result.model
        return export(self._checkpoint, str(self._inputs / "trained"))

    def _take_weights(self) -> None:
        """Put the trained weights into `model`, or load it where a path was given."""
        folder = self._exported()
        if isinstance(self.model, PreTrainedModel) and self._config.model.lora is None:
            self.model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
        else:
            self.model = AutoModelForCausalLM.from_pretrained(folder)

    # --- Arithmetic, on tensors of the caller's ---

    def cpo_loss(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, chosen rewards and rejected rewards, each (B,), of the log-probabilities that the loss reads."""
        ones, zeros = torch.ones_like(policy_chosen_logps), torch.zeros_like(policy_chosen_logps)
        logps = PairLogps(policy_chosen_logps, policy_rejected_logps, ones, ones, zeros, zeros)
        loss = self._config.loss
        alpha = getattr(loss, "alpha", 0.0)
        rewards = [loss.beta * alpha_reward(each.detach(), alpha) for each in (logps.chosen, logps.rejected)]
        return pair_losses(loss, logps), rewards[0], rewards[1]

    @staticmethod
    def get_batch_logps(
        logits: Tensor, labels: Tensor, average_log_prob: bool = False, is_encoder_decoder: bool = False
    ) -> Tensor:
        """Summed or mean log-probabilities, (B,), of labels (B, T) under logits (B, T, V); label -100 is not scored."""
        if logits.shape[:-1] != labels.shape:
            raise ConfigError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together"
            )
        if is_encoder_decoder:
            raise ConfigError("is_encoder_decoder: only causal language models are trained here")
        is_scored = labels[:, 1:] != LABEL_PAD
        targets = labels[:, 1:].masked_fill(~is_scored, 0)
        logps = logits[:, :-1].float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        sums = (logps * is_scored).sum(-1)
        return sums / is_scored.sum(-1) if average_log_prob else sums

    def concatenated_forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Chosen and rejected log-probabilities (B,) as the loss reads them, their logits (B, T, V), and the mean NLL.

        With a router that reports it, the auxiliary loss comes last. Training itself never holds such logits.
        """
        ids, mask, labels = (stacked(batch, name) for name in ("input_ids", "attention_mask", "labels"))
        output = model(input_ids=ids, attention_mask=mask, use_cache=False)
        is_mean = not isinstance(self._config.loss, CPOLoss)
        logps = self.get_batch_logps(output.logits, labels, average_log_prob=is_mean)
        pairs = len(labels) // 2
        nll = -self.get_batch_logps(output.logits[:pairs], labels[:pairs]).sum()
        nll = nll / (labels[:pairs, 1:] != LABEL_PAD).sum()
        aux = [] if getattr(output, "aux_loss", None) is None else [output.aux_loss]
        return (logps[:pairs], logps[pairs:], output.logits[:pairs], output.logits[pairs:], nll, *aux)

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: Batch, train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, a scalar with gradient, and its metrics under TRL's names."""
        pairs = pairs_of(batch)
        collated = collate(pairs, pad_id=0).to(next(model.parameters()).device)
        logps = pair_logps(model, collated, keep_logits=keeps_logits(model))
        tokens = sum(len(pair.chosen) - pair.chosen_start for pair in pairs)
        aux_loss_coef = getattr(getattr(model, "config", None), "router_aux_loss_coef", 0.0)
        objective = make_objective(self._config.loss, aux_loss_coef=aux_loss_coef)
        loss, sums = objective(logps, collated.weights_B, StepTotals(len(pairs), tokens))
        prefix = "eval_" if train_eval == "eval" else ""
        values = means({name: value.item() for name, value in sums.items()}, steps=1)
        return loss, {prefix + name: value for name, value in values.items()}

    def tokenize_row(self, feature: Mapping[str, Any]) -> dict[str, list[int]]:
        """Ids, attention masks and labels of a row, as training sees them. Raises DataError when it is no pair."""
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
            (tokenized,) = tokenize_pairs([found], tokenizer, length_limits(data))
            if not isinstance(tokenized, Skipped):
                return row_of(tokenized)
            found = tokenized
        raise DataError(f"the row is no pair: {found.reason}, {found.detail}")


class SimPOTrainer(CPOTrainer):
    """The trainer of the SimPO document: `CPOTrainer` with its config and the document's names."""

    _default_args = SimPOConfig
    simpo_loss = CPOTrainer.cpo_loss


def _number_of(scaling: ray.train.ScalingConfig) -> int:
    if not isinstance(scaling.num_workers, int):
        raise ConfigError(f"scaling_config: num_workers must be one number; got {scaling.num_workers}")
    return scaling.num_workers


def _changed(config: TrainConfig, **sections: Mapping[str, Any]) -> TrainConfig:
    """The config with some values of some sections replaced."""
    parts = {
        name: getattr(config, name).model_copy(update=dict(changes)) for name, changes in sections.items()
    }
    return config.model_copy(update=parts)


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name}: {REFUSED[name]}")


def _workers_of_this_machine() -> ray.train.ScalingConfig:
    gpus = torch.cuda.device_count()
    return ray.train.ScalingConfig(num_workers=max(gpus, 1), use_gpu=gpus > 0)
