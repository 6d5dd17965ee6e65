"""TRL's flat configs: `CPOConfig` with the fields and defaults of trl 1.16, and `SimPOConfig`.

Both also take the names that transformers and trl have dropped since their documents were written. What becomes of each
field is said in `compat.table` and done in `compat.translate`.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


def _option(default: Any, text: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": text, **({"choices": list(choices)} if choices else {})})


@dataclass
class _PreferenceConfig(TrainingArguments):
    """What the two configs share: lengths, model and data, and names that transformers has dropped."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012  # not a field

    max_completion_length: int | None = _option(None, "Most tokens of a completion.")
    max_prompt_length: int | None = _option(None, "Tokens that a prompt is cut to when a pair is too long.")
    truncation_mode: str = _option("keep_end", "Which end of a prompt is kept.", "keep_end", "keep_start")
    disable_dropout: bool = _option(True, "Set every dropout probability of the model to zero.")
    label_smoothing: float = _option(0.0, "Share of pairs that are taken to be labelled the wrong way round.")
    label_pad_token_id: int = _option(-100, "Label of positions that are not scored.")
    padding_value: int | None = _option(None, "Token id that fills short rows.")
    generate_during_eval: bool = _option(False, "Sample completions in evaluations.")
    is_encoder_decoder: bool | None = _option(None, "Whether the model has an encoder and a decoder.")
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of from_pretrained for a model that is given by its name, as JSON."},
    )
    dataset_num_proc: int | None = _option(None, "Processes that tokenize.")

    overwrite_output_dir: bool = _option(False, "Move aside what an earlier run left in output_dir.")
    per_gpu_train_batch_size: int | None = _option(None, "Older name of per_device_train_batch_size.")
    per_gpu_eval_batch_size: int | None = _option(None, "Older name of per_device_eval_batch_size.")
    warmup_ratio: float = _option(0.0, "Share of the steps during which the learning rate rises.")
    logging_dir: str | None = _option(None, "Folder of TensorBoard events.")
    save_safetensors: bool = _option(True, "Write weights as safetensors.")
    no_cuda: bool = _option(False, "Older name of use_cpu.")
    use_mps_device: bool = _option(False, "Train on Apple's GPUs.")
    jit_mode_eval: bool = _option(False, "Trace the model for evaluations.")
    use_ipex: bool = _option(False, "Use Intel's extension of torch.")
    fp16_opt_level: str = _option("O1", "Level of Apex.")
    half_precision_backend: str = _option("auto", "What computes in half precision.")
    fp16_backend: str = _option("auto", "Older name of half_precision_backend.")
    tpu_num_cores: int | None = _option(None, "Cores of a TPU.")
    tpu_metrics_debug: bool = _option(False, "Print metrics of a TPU.")
    past_index: int = _option(-1, "Where a model returns its state.")
    fsdp_min_num_params: int = _option(0, "Smallest module that FSDP wraps.")
    fsdp_transformer_layer_cls_to_wrap: str | None = _option(None, "Layers that FSDP wraps.")
    adafactor: bool = _option(False, "Older spelling of optim: adafactor.")
    group_by_length: bool = _option(False, "Older spelling of train_sampling_strategy: group_by_length.")
    use_legacy_prediction_loop: bool = _option(False, "Evaluate with an older loop.")
    include_inputs_for_metrics: bool = _option(False, "Older spelling of include_for_metrics: inputs.")
    include_tokens_per_second: bool = _option(False, "Log tokens per second.")
    push_to_hub_model_id: str | None = _option(None, "Older spelling of hub_model_id.")
    push_to_hub_organization: str | None = _option(None, "Older spelling of hub_model_id.")
    push_to_hub_token: str | None = _option(None, "Older name of hub_token.")
    mp_parameters: str = _option("", "Set by the launcher of SageMaker.")
    torchdynamo: str | None = _option(None, "Older name of torch_compile_backend.")
    ray_scope: str | None = _option("last", "Which result of a trial a search compares.")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16
        if self.activation_checkpointing is None:  # transformers' newer name, or it warns of the older one
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        # transformers looks whether this machine can do these, and prepares it for them; it is the workers that train.
        on_workers = {
            name: getattr(self, name) for name in ("bf16", "bf16_full_eval", "tf32", "deepspeed", "fsdp")
        }
        for name in on_workers:
            setattr(self, name, None)
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name, value in on_workers.items():
            setattr(self, name, value)


@dataclass
class CPOConfig(_PreferenceConfig):
    """Arguments of CPO, SimPO (`loss_type="simpo", cpo_alpha=0`) and CPO-SimPO, with the defaults of trl 1.16."""

    bf16: bool | None = field(  # type: ignore[assignment]  # trl's type and default
        default=None,
        metadata={
            "help": "Train in bfloat16; the default is true, unless fp16 is set.",
            "nargs": "?",
            "const": True,
        },
    )
    learning_rate: float = _option(1e-6, "Peak learning rate.")
    logging_steps: float = _option(10, "Steps between lines of the log; below 1, a share of all steps.")
    gradient_checkpointing: bool = _option(
        True, "Recompute activations in the backward pass: less memory, more time."
    )
    max_length: int | None = _option(1024, "Most tokens of prompt and completion.")
    max_prompt_length: int | None = _option(512, "Tokens that a prompt is cut to when a pair is too long.")
    beta: float = _option(0.1, "Scale of the reward.")
    loss_type: str = _option(
        "sigmoid", "Which preference loss.", "sigmoid", "hinge", "ipo", "simpo", "alphapo"
    )
    cpo_alpha: float = _option(1.0, "Weight of the negative log-likelihood of the chosen completion.")
    simpo_gamma: float = _option(0.5, "Target margin of SimPO; beta times the gamma_beta_ratio.")
    alpha: float = _option(0.0, "Shape of AlphaPO's reward; 0 is the log-probability itself.")
    trust_remote_code: bool = _option(False, "Run Python code that comes with the model.")


@dataclass
class SimPOConfig(_PreferenceConfig):
    """Arguments of SimPO, with the defaults of its document."""

    bf16: bool = _option(False, "Train in bfloat16.")
    max_length: int | None = _option(None, "Most tokens of prompt and completion; 512 when not given.")
    max_target_length: int | None = _option(None, "Most tokens of a target of an encoder-decoder.")
    beta: float = _option(2.0, "Scale of the reward.")
    gamma_beta_ratio: float = _option(0.25, "Target margin divided by beta.")
    sft_weight: float = _option(0.0, "Weight of the negative log-likelihood of the chosen completion.")
    loss_type: str = _option("sigmoid", "Which link the margin goes through.", "sigmoid", "hinge")
    evaluation_strategy: str | None = _option(None, "Older name of eval_strategy.")
    dispatch_batches: bool | None = _option(None, "Let the first process read the data for all.")
    split_batches: bool | None = _option(None, "Split a batch over the processes.")

    def __post_init__(self) -> None:
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        super().__post_init__()
