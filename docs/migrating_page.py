"""Writes migrating-from-trl.md from the table of fields: `python docs/migrating_page.py`. A test compares the two."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path

from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.compat.table import HONOURED, IGNORED, REFUSED

PAGE = Path(__file__).with_name("migrating-from-trl.md")

HEAD = """\
# Migrating from TRL

A script that was written for TRL's `CPOTrainer`, or for the SimPO document's `SimPOTrainer`, runs on a Ray cluster when
its import is changed:

```python
from ray_prefopt import CPOConfig, CPOTrainer

args = CPOConfig(output_dir="Qwen2-0.5B-CPO", loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=1.375)
trainer = CPOTrainer(model="Qwen/Qwen2-0.5B-Instruct", args=args, train_dataset=train_dataset)
trainer.train()
```

`CPOConfig` has the fields and defaults of trl 1.16, `SimPOConfig` those of the SimPO document; both also take the names
that transformers and trl have dropped since, and both work with transformers' `HfArgumentParser`. Neither looks at the
machine it is made on: bf16 or a DeepSpeed config may be asked for where there is no GPU, since it is the workers that
train.

The arguments become one [config](config.md), which lies beside every checkpoint. Of the {total} fields of the two
classes {honoured} are honoured and {ignored} are ignored, since nothing is lost without them. {refused} are refused:
set to anything but its default, such a field stops the script at once, with a message that says what to use instead.
Where the numbers differ from TRL's is said in [losses](losses.md#differences-from-trl).

What is worth knowing beforehand:

- A step holds `per_device_train_batch_size` x `gradient_accumulation_steps` x workers pairs; the last one of an epoch
  takes what is left, and with fewer pairs than a step holds there is one step of all of them. With
  `ScalingConfig(num_workers=(2, 8))` the workers are 8 here, however many there are at the time.
- The last step is always logged, evaluated (when there are evaluations at all) and saved.
- Prompts are cut, to `max_prompt_length`, before completions are; trl 1.16 cuts completions alone.
- An encoder-decoder is one by its own config, whether it is given as a model or by name.
- Without `deepspeed` the engine is DeepSpeed ZeRO-2; with it, the stage that it names.
- The run lies in the folder `run_name`, or `run`, inside `output_dir`."""


TRAINER = """\
## The trainers

`CPOTrainer` and `SimPOTrainer` take what TRL's do: `model` (a path, hub id, `PreTrainedModel` or `PeftModel`) or
`model_init`, `args`, `train_dataset` and `eval_dataset` (a `Dataset` or `IterableDataset` of datasets, a Ray Dataset, or
any path that [data](data.md) describes; several evaluation sets as a mapping), `processing_class` or `tokenizer`,
`peft_config`, and the Python below. New are `scaling_config` and `run_config`, Ray Train's own: how many workers there
are and what each has; name, storage and failures of the run. Without `scaling_config` there is one worker for each GPU of the
machine that the script is on, or one on its CPU: on a cluster give `ScalingConfig(num_workers=8, use_gpu=True)`, and an
`output_dir` that all nodes see. What is in memory is saved under `output_dir/inputs`,
where workers read it.

| argument | on the workers |
|---|---|
| `callbacks` | every rank calls them at transformers' events, with a `TrainerState` and arguments that are true of that rank, the model, the optimizer and the schedule. `should_log`, `should_evaluate`, `should_save` and `should_training_stop` are followed, those of rank 0 where ranks differ; `should_epoch_stop` is refused. What a callback has gathered is in your own object when `train()` returns; one that keeps a state, such as `EarlyStoppingCallback`, goes on with it after a restart. |
| `compute_metrics` | gets an `EvalPrediction` of each whole evaluation set: `predictions` are the rewards of the chosen and the rejected completion of each pair, (N, 2), in the order of the set, `label_ids` are zeros. Its metrics may be `metric_for_best_model`. |
| `preprocess_logits_for_metrics` | gets those rewards, (B, 2), and labels, (B,), of each micro-batch, and returns what is kept. |
| `data_collator` | gets rows as `tokenize_row` makes them, and returns a padded batch; what it changes is trained on. Labels that leave out a part of a completion are refused. |
| `optimizers` | the optimizer is made again over the weights of the same names, the schedule with it; it must be new, and made over the `model` that is given. |

All weights of a model are trained, or with an adapter those that its config names; a model of which some weights are
frozen is refused.

`train`, `evaluate`, `predict`, `save_model`, `push_to_hub`, `create_model_card`, `add_callback`, `pop_callback`,
`remove_callback`, `log`, `log_metrics`, `save_metrics`, `save_state`, `state.log_history`, `tokenize_row`,
`get_batch_logps`, `concatenated_forward`, `get_batch_loss_metrics`, `cpo_loss` and `simpo_loss` do what they do in TRL.
Overriding those of them that make the loss, or a step, is refused: workers do not call them. `trainer.model` is what
was given, without the adapter of `peft_config`, until `train()` returns; then it holds the trained weights. A second
`train()` begins anew and moves the older run aside, unless `resume_from_checkpoint=True` says to go on."""  # noqa: E501  # rows of a table


def page() -> str:
    counts = {"honoured": len(HONOURED), "ignored": len(IGNORED), "refused": len(REFUSED)}
    parts = [
        HEAD.format(total=sum(counts.values()), **counts),
        TRAINER,
        _table("Honoured", "what it becomes", HONOURED),
        _table("Ignored", "why", IGNORED),
        _table("Refused", "instead", REFUSED),
    ]
    return "\n\n".join(parts) + "\n"


def _table(title: str, column: str, texts: Mapping[str, str]) -> str:
    """The fields of a list, with the default of each config; a dash where a config has no such field."""
    ours, theirs = _defaults(CPOConfig), _defaults(SimPOConfig)
    rows = [
        f"| `{name}` | {ours.get(name, '-')} | {theirs.get(name, '-')} | {text.replace('|', chr(92) + '|')} |"
        for name, text in texts.items()
    ]
    head = [f"## {title}", "", f"| field | `CPOConfig` | `SimPOConfig` | {column} |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _defaults(kind: type[CPOConfig | SimPOConfig]) -> dict[str, str]:
    """Defaults as they would be written in Python."""
    defaults = {}
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        defaults[field.name] = f"`{getattr(default, 'value', default)!r}`"  # an enumeration's text
    return defaults


if __name__ == "__main__":
    PAGE.write_text(page())
