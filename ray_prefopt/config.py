"""The one configuration tree: YAML files, command line flags, Tune samples and TRL's arguments all become this.

Frozen and strict: a value is what the user wrote or a default from here, and never changes afterwards; what follows
from several values is a property. Imports pydantic alone, so that reading a config never waits for torch or ray.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]
"""A name or place; an empty one comes from an unset variable of a shell."""
Workers = Annotated[int, Field(ge=1)]
Interval = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0.0, lt=1.0)] | Literal["epoch"]
"""Optimizer steps, a share of all of them, or the end of each epoch."""


class Config(BaseModel):
    """Base of every section: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class LoraConfig(Config):
    """Low-rank adapters, with peft's own option names."""

    r: int = Field(16, ge=1)
    """Rank of the update matrices."""
    lora_alpha: float = 32
    """Scale of the update: the adapter's output is multiplied by lora_alpha / r."""
    lora_dropout: Fraction = 0.0
    """Share of the adapter's inputs that are dropped in training."""
    target_modules: str | list[str] | None = "all-linear"
    """Module names, a regular expression, or `all-linear`; none: what peft has for the architecture."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved beside the adapter."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too."""
    use_rslora: bool = False
    """Divide lora_alpha by the square root of r instead (arXiv 2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of the weights apart from their direction (arXiv 2402.09353)."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further options of peft's LoraConfig: `init_lora_weights`, `layers_to_transform`, `rank_pattern`, ..."""


class CompileConfig(Config):
    """torch.compile, with its own option names."""

    backend: str = "inductor"
    """What makes the code: `inductor`, `aot_eager`, `cudagraphs`, ..."""
    mode: str | None = None
    """How much inductor tries: `default`, `reduce-overhead`, `max-autotune`, `max-autotune-no-cudagraphs`."""


class ModelConfig(Config):
    """Which model is trained, and how it is built."""

    path: Text | None = None
    """Folder or hub id of the model (and of its tokenizer, unless `tokenizer` says otherwise)."""
    from_config: dict[str, Any] | None = None
    """Architecture to initialise at random instead of loading weights: `{model_type: qwen2, hidden_size: 64, ...}`."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Settings of the saved model to have otherwise: `{output_router_logits: true, router_aux_loss_coef: 0.01}`."""
    tokenizer: Text | None = None
    """Folder or hub id of the tokenizer; `path` when not given."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the forward and backward pass; `auto` is that of the saved weights. Master weights are fp32."""
    attn_implementation: str | None = None
    """Attention of transformers: `sdpa`, `eager`, `flash_attention_2`, ...; transformers chooses when not given."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """`packed`: the completions of a pair share the tokens they begin with, and nothing is padded; `padded`: each has
    a row of its own. `auto` packs where a probe finds the same log-probabilities, and says why where it does not."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    disable_dropout: bool = True
    """Set every dropout probability of the model to zero (as TRL does)."""
    neftune_noise_alpha: float | None = Field(None, gt=0.0)
    """Size of the uniform noise on the embeddings in training (NEFTune, arXiv 2310.05914); none when not given."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of fp32 matrix products: `high` allows TF32 on GPUs that have it, `medium` bf16."""
    compile: CompileConfig | None = None
    """Compile the forward and backward pass with torch.compile."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights."""
    adapter: Text | None = None
    """Folder or hub id of a saved LoRA adapter to go on training, instead of the new one of `lora`."""
    quantization: dict[str, Any] | None = None
    """Load the frozen weights under an adapter in 4 or 8 bits: fields of transformers' BitsAndBytesConfig, such as
    `{load_in_4bit: true, bnb_4bit_quant_type: nf4}`; bnb_4bit_compute_dtype is `dtype` when not given."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if self.path is None and self.from_config is None:
            raise ValueError(
                "set model.path (a folder or hub id), or model.from_config (an architecture to initialise)"
            )
        if self.path is not None and self.from_config is not None:
            raise ValueError(
                "path loads weights and from_config makes new ones: leave one out (tokenizer may be set by itself)"
            )
        if self.from_config is not None:
            if "model_type" not in self.from_config:
                raise ValueError(f"from_config needs model_type; got keys {sorted(self.from_config)}")
            if self.tokenizer_path is None:
                raise ValueError("from_config has no tokenizer: set model.tokenizer to a folder or hub id")
            given = [name for name in ("overrides", "adapter", "quantization") if getattr(self, name)]
            if given:
                raise ValueError(
                    f"{', '.join(given)} belongs to a saved model: set path instead of from_config"
                )
        return self

    @model_validator(mode="after")
    def _has_one_adapter(self) -> Self:
        if self.lora is not None and self.adapter is not None:
            raise ValueError("lora makes a new adapter and adapter goes on with a saved one: leave one out")
        if self.quantization is not None and not self.has_adapter:
            raise ValueError(
                "quantization freezes the weights: set lora or adapter, or there is nothing to train"
            )
        return self

    @property
    def tokenizer_path(self) -> str | None:
        return self.tokenizer or self.path

    @property
    def has_adapter(self) -> bool:
        """Whether low-rank adapters are trained, on frozen weights."""
        return self.lora is not None or self.adapter is not None


class Source(Config):
    """One place to read preference pairs from. A plain string in `data.train` is a Source with that path."""

    path: Text
    """File, glob, folder, fsspec URI, or Hugging Face dataset id (`org/name`, `org/name:split`)."""
    weight: float = Field(1.0, gt=0.0)
    """How often the source is seen in an epoch: 0.5 takes every other row, 2 takes every row twice."""
    rows: int | None = Field(None, ge=1)
    """Read the first rows only."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str | None = None
    """Split of a Hugging Face dataset; `train` when not given."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""


def _numbers_as_text(values: Any) -> Any:
    """`NCCL_DEBUG: 1` is as good as `"1"`."""
    if not isinstance(values, Mapping):
        return values
    return {key: str(value) if type(value) is int else value for key, value in values.items()}


Sources = Text | Source | list[Text | Source]


class DataConfig(Config):
    """Where preference pairs come from and how they become tokens."""

    train: Sources
    """Training pairs: a path, glob, URI or hub id, or a list of them (each may be `{path, weight, rows, split}`)."""
    eval: Sources | dict[str, Sources] | None = None
    """Held-out pairs; a mapping names several sets, whose metrics are then `eval_<name>_...`."""
    format: Literal["auto", "standard", "conversational"] = "auto"
    """Form of the rows; `auto` looks at each row."""
    columns: dict[Literal["prompt", "chosen", "rejected"], str] = Field(default_factory=dict)
    """Column names of yours for ours: `{prompt: question, chosen: answer_a, rejected: answer_b}`; `{prompt: ""}` where
    the prompt is what both completions begin with."""
    chat_template: str | None = None
    """Jinja text, or path of a file with it; the tokenizer's own template when not given."""
    assistant_header: Literal["trl", "official"] = "trl"
    """Where the template's assistant header goes: into the prompt (TRL) or into the response (princeton-nlp/SimPO)."""
    max_length: int = Field(1024, ge=2)
    """Upper bound on the tokens of prompt + completion; of each of them, where an encoder reads the prompt."""
    max_prompt_length: int | None = Field(512, ge=1)
    """The prompt is cut to this when prompt + completion exceed max_length; none: cut to max_length - 1.
    An encoder's prompt is always cut to this; none: to max_length."""
    max_completion_length: int | None = Field(None, ge=1)
    """Upper bound on the tokens of a completion by itself."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of a prompt survives."""
    max_bad_fraction: Fraction = 0.05
    """Share of unusable rows above which the run stops, before any worker is asked for."""
    shuffle: bool = True
    """Permute the pairs anew in each epoch; off: the order of the files."""
    shuffle_window: int = Field(1_000_000, ge=1)
    """Pairs that are permuted together, hence at most this many training pairs are held by a worker."""
    group_by_length: bool = False
    """Steps of pairs of similar length: the permuted pairs of 50 steps are sorted, the longest first."""
    seed: int | None = Field(None, ge=0)
    """Of the order of the pairs; run.seed when not given."""

    @field_validator("eval", mode="before")
    @classmethod
    def _one_source_or_named_sets(cls, value: Any) -> Any:
        """`{path: a.jsonl, split: test}` is a source, and no sets with the names path and split."""
        has_path = isinstance(value, Mapping) and isinstance(value.get("path"), str)
        is_source = has_path and value.keys() <= Source.model_fields.keys()
        return Source.model_validate(value) if is_source else value

    @model_validator(mode="after")
    def _grouping_needs_shuffling(self) -> Self:
        if self.group_by_length and not self.shuffle:
            raise ValueError(
                "group_by_length sorts shuffled pairs; got shuffle: false. Leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _prompt_leaves_room(self) -> Self:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be smaller than max_length ({self.max_length}), "
                "or no completion would fit"
            )
        return self

    @property
    def train_sources(self) -> tuple[Source, ...]:
        return _as_sources(self.train)

    @property
    def eval_sets(self) -> dict[str, tuple[Source, ...]]:
        """Evaluation sets by name; a single unnamed set has the name ''."""
        if self.eval is None:
            return {}
        if isinstance(self.eval, Mapping):
            return {name: _as_sources(sources) for name, sources in self.eval.items()}
        return {"": _as_sources(self.eval)}


def eval_prefix(name: str) -> str:
    """What the metrics of an evaluation set begin with.

    >>> eval_prefix(""), eval_prefix("easy")
    ('eval_', 'eval_easy_')
    """
    return f"eval_{name}_" if name else "eval_"


def _as_sources(value: Sources) -> tuple[Source, ...]:
    items: Sequence[str | Source] = [value] if isinstance(value, str | Source) else value
    return tuple(Source(path=item) if isinstance(item, str) else item for item in items)


class _Loss(Config):
    """What every loss has."""

    kind: str
    beta: float = Field(0.1, gt=0.0)
    """Scale of the reward."""
    cpo_alpha: float = Field(0.0, ge=0.0)
    """Weight of the behaviour-cloning term, the negative log-likelihood of the chosen completion."""
    nll_average: Literal["step", "micro_batch"] = "step"
    """Denominator of that term: chosen tokens of the whole optimizer step, or of each micro-batch as in TRL."""


class _LinkedLoss(_Loss):
    """Losses that put the reward margin through a link function."""

    link: Literal["sigmoid", "hinge"] = "sigmoid"
    """Logistic loss, or the hinge max(0, 1 - beta * margin) of SLiC."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed share of swapped labels (sigmoid link only)."""

    @model_validator(mode="after")
    def _smoothing_needs_sigmoid(self) -> Self:
        if self.link == "hinge" and self.label_smoothing:
            raise ValueError("label_smoothing has no meaning for link: hinge; leave one of them out")
        return self


class CPOLoss(_LinkedLoss):
    """Contrastive preference optimization: summed log-probabilities plus behaviour cloning (arXiv 2401.08417)."""

    kind: Literal["cpo"] = "cpo"
    cpo_alpha: float = Field(1.0, ge=0.0)
    """Weight of the behaviour-cloning term, the negative log-likelihood of the chosen completion."""


class IPOLoss(_Loss):
    """Identity preference optimization without a reference model, on mean log-probabilities (arXiv 2310.12036)."""

    kind: Literal["ipo"] = "ipo"
    cpo_alpha: float = Field(1.0, ge=0.0)
    """Weight of the behaviour-cloning term, the negative log-likelihood of the chosen completion."""
    alpha: float = 0.0
    """Shape of the AlphaPO reward; 0 is the log-probability itself."""


class _SimPOFields(_LinkedLoss):
    """What SimPO and CPO-SimPO share."""

    beta: float = Field(2.0, gt=0.0)
    """Scale of the reward."""
    gamma_beta_ratio: float = Field(0.5, ge=0.0)
    """Target margin divided by beta (TRL's simpo_gamma is gamma_beta_ratio * beta)."""
    alpha: float = 0.0
    """Shape of the AlphaPO reward (arXiv 2501.03884); 0 is the log-probability itself."""


class SimPOLoss(_SimPOFields):
    """Simple preference optimization: mean log-probability as reward, and a target margin (arXiv 2405.14734)."""

    kind: Literal["simpo"] = "simpo"
    """Which loss."""


class CPOSimPOLoss(_SimPOFields):
    """SimPO plus behaviour cloning; the default weight is the one published in fe1ixxu/CPO_SIMPO."""

    kind: Literal["cpo_simpo"] = "cpo_simpo"
    cpo_alpha: float = Field(0.05, ge=0.0)
    """Weight of the behaviour-cloning term, the negative log-likelihood of the chosen completion."""


LossConfig = Annotated[SimPOLoss | CPOLoss | CPOSimPOLoss | IPOLoss, Field(discriminator="kind")]


class OptimConfig(Config):
    """Optimizer and learning rate schedule, by transformers' names."""

    learning_rate: float = Field(1e-6, gt=0.0)
    """Peak learning rate; the one number that matters most (official SimPO recipes: 3e-7 to 1e-6)."""
    name: str = "adamw_torch_fused"
    """Any of transformers' optimizer names: `adamw_torch_fused`, `adamw_torch`, `adafactor`, `lion_32bit`, ..."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of that optimizer."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decay of Adam's averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0.0)
    """Added to the denominator of Adam's update."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Applied to every weight except biases and norms."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    schedule: str = "cosine"
    """Any of transformers' scheduler names: `cosine`, `linear`, `constant_with_warmup`, `inverse_sqrt`, ..."""
    schedule_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of that schedule."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps during which the learning rate rises."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps during which the learning rate rises; when given, warmup_ratio has no say."""


class EngineConfig(Config):
    """What moves gradients and weights between workers."""

    kind: Literal["zero", "plain"] = "zero"
    """DeepSpeed ZeRO, or plain data parallelism in torch."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """Shard nothing (0), optimizer states (1), also gradients (2), also weights (3)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep optimizer states in host memory (stages 1 to 3)."""
    offload_param: Literal["none", "cpu"] = "none"
    """Keep weights in host memory (stage 3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """A DeepSpeed config (as in its JSON file) that is merged over ours."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        zero_only = {
            "offload_optimizer": self.offload_optimizer != "none",
            "offload_param": self.offload_param != "none",
            "deepspeed": bool(self.deepspeed),
        }
        given = [name for name, is_set in zero_only.items() if is_set]
        if self.kind == "plain" and given:
            raise ValueError(f"{', '.join(given)} belongs to engine.kind: zero; got engine.kind: plain")
        if self.offload_param != "none" and self.zero_stage != 3:
            raise ValueError(f"offload_param needs zero_stage 3; got zero_stage {self.zero_stage}")
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3; got zero_stage 0")
        return self


RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127})*")
"""A folder in the storage, or one in a folder of several runs: the trials of a search are named `search/trial-003`."""


class RunConfig(Config):
    """The run: its name and folder, its size on the cluster, and when it logs, evaluates and saves."""

    name: str | None = None
    """Name of the run; the same name resumes it. Made from the loss and the time when not given."""
    storage_path: Text = "runs"
    """Folder or URI for runs and prepared blocks; with several nodes, one that all of them see."""
    num_workers: Workers | tuple[Workers, Workers] = 1
    """Ray Train workers, that is ranks. `[2, 8]`: as many as the cluster has room for, at least 2; when a node is lost
    the run goes on with fewer, when one is added with more. The result is the same up to rounding."""
    resize_interval_s: float = Field(60.0, ge=0.0)
    """Least time between two changes to another number of workers. All of them are started anew then, which takes a
    minute or so. It is done after a checkpoint, so that no step is repeated: never where save_steps is unset."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPUs reserved for each worker; also its number of compute threads."""
    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    """Further resources of each worker, by the names that the nodes give them in Ray."""
    accelerator_type: str | None = None
    """Ray's name of the GPU that each worker gets: `A100`, `H100`, ...; any when not given."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Whether Ray puts workers together on few nodes, or spreads them over many."""
    env_vars: Annotated[dict[str, str], BeforeValidator(_numbers_as_text)] = Field(default_factory=dict)
    """Environment variables of the workers."""
    global_batch: int = Field(128, ge=1)
    """Pairs per optimizer step, over all workers."""
    shrink_batch: bool = False
    """With fewer pairs than global_batch, make a step of those there are; off: that is an error."""
    micro_batch: int = Field(4, ge=1)
    """Pairs per forward pass of a worker."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens per forward pass of a worker, padding among them where there is any: as many pairs as fit, and a longer
    one by itself. When given, micro_batch has no say."""
    auto_find_batch_size: bool = False
    """Where a worker runs out of memory, go on with half the micro_batch, or micro_batch_tokens; the global batch stays
    as it is."""
    eval_micro_batch: int | None = Field(None, ge=1)
    """Pairs per forward pass of an evaluation; as in training when not given."""
    epochs: int | float = Field(1, gt=0)
    """Times that every pair is seen; 1.5 sees the first half of the second epoch's order."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever epochs says."""
    drop_last: bool = False
    """Leave out the smaller step at the end of an epoch, and with it the pairs that do not fill a global batch."""
    seed: int = Field(42, ge=0)
    """Of the order of the pairs, of new weights and of dropout."""
    full_determinism: bool = False
    """Use deterministic algorithms alone (slower); without it a run on GPUs repeats up to rounding."""
    log_steps: Interval | None = 1
    """Optimizer steps per line of metrics.jsonl, a share of all steps (0.05), or `epoch`; none: the last alone."""
    log_first_step: bool = False
    """A line for the first step as well."""
    eval_steps: Interval | None = None
    """Optimizer steps between evaluations, a share of all steps, or `epoch`; when not given, one at the end."""
    eval_delay: int | float = Field(0, ge=0)
    """Optimizer steps before the first evaluation; epochs when eval_steps is `epoch`."""
    eval_on_start: bool = False
    """Evaluate before the first step as well."""
    eval_samples: int = Field(0, ge=0)
    """Completions that are sampled in each evaluation, for as many prompts of each set; written to samples.jsonl."""
    eval_sample_tokens: int = Field(256, ge=1)
    """Most tokens of a sampled completion."""
    save_steps: Interval | None = 500
    """Optimizer steps between checkpoints, a share of all steps, or `epoch`; none: one at the end alone."""
    save_only_model: bool = False
    """Checkpoints hold the weights alone, a quarter of the size or less: to export and evaluate, not to resume."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept, besides the best one."""
    report_to: list[Text] = Field(default_factory=list)
    """Trackers besides metrics.jsonl and TensorBoard, by transformers' names: `wandb`, `mlflow`, `trackio`, ..."""
    best_metric: str | None = None
    """Metric whose best checkpoint is kept: `eval_rewards/accuracies` when there is an evaluation set."""
    best_mode: Literal["max", "min"] | None = None
    """Whether its largest or its smallest value is best; when not given, the smallest of metrics that end in `loss`."""
    max_failures: int = Field(0, ge=-1)
    """Times the workers are started again after one of them died; -1 is without limit."""
    resume_from: Text | None = None
    """Checkpoint folder of another run to start from. A run that has checkpoints of its own goes on from these."""
    on_bad_checkpoint: Literal["refuse", "fallback"] = "refuse"
    """When the newest checkpoint is torn: stop with its name, or use the one before."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written: stop the run, or go on and try at the next one."""
    force_new: bool = False
    """Start anew under a name that is taken; the old run's folder is moved aside."""
    export: bool = True
    """Write the Hugging Face folder when training is done."""
    collective_timeout_s: int = Field(1800, ge=1)
    """Longest that a worker waits for the others, at the start or in a step, before it takes them for lost. A node that
    falls silent is noticed by Ray itself, after a minute."""
    resource_timeout_s: float = Field(60.0, gt=0.0)
    """Longest wait for the cluster to have room for the workers, the fewest of them, when the run begins."""
    restart_timeout_s: float = Field(3600.0, gt=0.0)
    """The same when they are to be started again: a node may take its time to come back. It is said each minute what is
    missing. Then the run ends; the same command goes on from its last checkpoint."""

    @property
    def min_workers(self) -> int:
        """What a run needs to go on."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """What a run takes where it can."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def workers_text(self) -> str:
        """`8`, or `2 to 8`."""
        return f"{self.min_workers} to {self.max_workers}" if self.is_elastic else str(self.max_workers)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change in the course of a run."""
        return self.min_workers < self.max_workers

    @property
    def micro_batch_text(self) -> str:
        """What bounds a micro-batch: `run.micro_batch 4`, or `run.micro_batch_tokens 8192`."""
        tokens = self.micro_batch_tokens
        return f"run.micro_batch {self.micro_batch}" if tokens is None else f"run.micro_batch_tokens {tokens}"

    def is_lower_better(self, metric: str) -> bool:
        """Whether the smallest value of this metric is the best."""
        return self.best_mode == "min" or (self.best_mode is None and metric.endswith("loss"))

    @field_validator("num_workers")
    @classmethod
    def _ascending(cls, number: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(number, int) and number[0] > number[1]:
            raise ValueError(f"must be the fewest and the most workers, in this order; got {list(number)}")
        return number

    @model_validator(mode="after")
    def _has_something_to_go_on_from(self) -> Self:
        if self.save_only_model and (self.is_elastic or self.max_failures):
            what = "num_workers that change" if self.is_elastic else "max_failures"
            raise ValueError(
                f"save_only_model keeps nothing that workers could be started again from, which {what} asks for; leave "
                "one of them out"
            )
        return self

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str | None) -> str | None:
        if name is not None and not RUN_NAME.fullmatch(name):
            raise ValueError(f"must be a folder name of letters, digits, '.', '_' and '-'; got {name!r}")
        return name


class TrainConfig(Config):
    """Everything a run depends on."""

    model: ModelConfig
    data: DataConfig
    loss: LossConfig = Field(default_factory=SimPOLoss)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @field_validator("run")
    @classmethod
    def _averages_over_as_many_pairs(cls, run: RunConfig, others: ValidationInfo) -> RunConfig:
        loss: _Loss | None = others.data.get("loss")
        if run.micro_batch_tokens is not None and loss is not None and loss.nll_average == "micro_batch":
            raise ValueError(
                "micro_batch_tokens makes micro-batches of any number of pairs, and loss.nll_average: micro_batch "
                "gives them means of their own; leave one of them out"
            )
        return run
