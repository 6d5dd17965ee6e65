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
the script stops at once when one of them is set to something else than its default, and is told what to do instead.
Where the numbers differ from TRL's is said in [losses](losses.md#differences-from-trl).

What is worth knowing beforehand:

- A step holds `per_device_train_batch_size` x `gradient_accumulation_steps` x workers pairs; the last one of an epoch
  takes what is left.
- The last step is always logged, evaluated (when there are evaluations at all) and saved.
- Prompts are cut, to `max_prompt_length`, before completions are; trl 1.16 cuts completions alone.
- Without `deepspeed` the engine is DeepSpeed ZeRO-2; with it, the stage that it names.
- The run lies in the folder `run_name`, or `run`, inside `output_dir`."""


def page() -> str:
    counts = {"honoured": len(HONOURED), "ignored": len(IGNORED), "refused": len(REFUSED)}
    parts = [
        HEAD.format(total=sum(counts.values()), **counts),
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
