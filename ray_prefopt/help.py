"""The help texts of the `ray-prefopt` command: its own arguments, and every field of the config as a flag."""

import argparse
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ray_prefopt.options import Option, options, sections

MAX_WIDTH = 110
LABEL_WIDTH = 40

EXIT_CODES = """\
exit codes: 0 done; 1 the run failed; 2 usage or config; 3 data or model; 4 resources, storage or checkpoint;
            130 interrupted (the command that resumes is printed)"""

FLAGS = """\
Names may be written with - or _. A list is given by repeating its flag, or as JSON. `--engine.deepspeed.some.key VALUE`
sets a key of a mapping, `null` unsets, and a flag of true or false alone means true."""


def overview(summaries: Mapping[str, str]) -> str:
    """What `ray-prefopt --help` prints; `summaries` are those of the commands."""
    return "\n".join(
        [
            "usage: ray-prefopt COMMAND [ARGUMENT]...",
            "",
            "Preference fine-tuning (SimPO, CPO, CPO-SimPO) of language models on a Ray cluster.",
            "",
            *(f"  {name:<10}{summary}" for name, summary in summaries.items()),
            "",
            "`ray-prefopt COMMAND --help` lists the arguments of a command, `ray-prefopt --version` the version.",
            EXIT_CODES,
        ]
    )


def command_help(parser: argparse.ArgumentParser, shown_sections: Sequence[str]) -> str:
    """What `ray-prefopt COMMAND --help` prints: the command's own arguments, then config fields by section."""
    lines = [f"usage: {parser.prog} {parser.usage}", "", str(parser.description), ""]
    for action in parser._actions:
        value = f" {action.metavar}" if action.option_strings and action.metavar else ""
        lines += _entry((", ".join(action.option_strings) or str(action.metavar)) + value, str(action.help))
    for section in shown_sections:
        lines += ["", f"{section}: {sections()[section]}"]
        for option in options().values():
            if option.name.startswith(section + "."):
                lines += _entry(flag_form(option), f"{option.description} [{default_text(option)}]")
    return "\n".join([*lines, "", *([FLAGS, ""] if shown_sections else []), EXIT_CODES])


def _entry(label: str, text: str) -> list[str]:
    """A label and its text beside it, or below it when the label is long, no wider than the terminal."""
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    lines = textwrap.wrap(text, max(width - LABEL_WIDTH, 30), break_long_words=False, break_on_hyphens=False)
    if len(label) > LABEL_WIDTH - 4:
        lines = ["", *lines]
    return [
        f"{first:<{LABEL_WIDTH}}{line}".rstrip()
        for first, line in zip([f"  {label}", *[""] * len(lines)], lines, strict=False)
    ]


def flag_form(option: Option) -> str:
    """`--run.epochs N`: a flag and the kind of its value."""
    kinds = {list: "TEXT...", bool: "BOOL", int: "N", float: "X", tuple: "X,X", str: "TEXT"}
    if option.choices:
        is_number_too = option.takes(int) and all(isinstance(choice, str) for choice in option.choices)
        value = "|".join([*(["N"] if is_number_too else []), *map(str, option.choices)])
    elif not option.takes(str) and (option.is_mapping or option.is_section):
        value = "{KEY: VALUE}"
    elif option.takes(int) and option.takes(tuple):
        value = "N|[N,N]"
    else:
        value = next(text for kind, text in kinds.items() if option.takes(kind))
    return f"--{option.name} {value}"


def default_text(option: Option) -> str:
    """The default as it would be typed; when losses differ, the default of each."""
    if option.required:
        return "required"
    by_value: dict[str, list[str]] = {}
    for kind, value in option.defaults.items():
        by_value.setdefault(_typed(value), []).append(kind)
    everywhere = len(by_value) == 1 and len(option.kinds) in (0, len(options()["loss.kind"].choices))
    if everywhere or option.name == "loss.kind":
        return next(iter(by_value))
    return "; ".join(f"{', '.join(kinds)}: {value}" for value, kinds in by_value.items())


def _typed(value: Any) -> str:
    if value is None or value == {}:
        return "unset"
    if isinstance(value, tuple):
        return ",".join(map(_typed, value))
    return value if isinstance(value, str) else json.dumps(value)
