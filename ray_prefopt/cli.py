"""The `ray-prefopt` command. It imports the config alone; each command imports what it needs, when it is run.

Exit codes: 0 done; 1 the run failed; 2 wrong usage or config; 3 data or model; 4 resources, storage or checkpoint;
130 interrupted, and resumable with the command that is printed.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import yaml
from pydantic import BaseModel

from ray_prefopt import __version__
from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError, PrefoptError, suggest
from ray_prefopt.options import Option, did_you_mean, nearest_fields, options, sections
from ray_prefopt.settings import config_schema, dump_yaml, load_config, split_flags

EXIT_CODES = """\
exit codes: 0 done; 1 the run failed; 2 usage or config; 3 data or model; 4 resources, storage or checkpoint;
            130 interrupted (the command that resumes is printed)"""


# --- Commands ---


def _train(args: argparse.Namespace, config: TrainConfig) -> Any:
    _note(_outline(config))
    if args.dry_run:
        return _plan(config)
    from ray_prefopt.train.run import train

    return train(config)


def _tokenize(args: argparse.Namespace, config: TrainConfig) -> Any:
    if args.dry_run:
        return _plan(config)
    from ray_prefopt.train.run import prepare_data

    return prepare_data(config)


def _evaluate(args: argparse.Namespace, config: TrainConfig) -> Any:
    if not config.data.eval_sets:
        raise ConfigError("nothing to evaluate on: got no data.eval; add --data.eval PAIRS")
    if args.dry_run:
        return _plan(config)
    from ray_prefopt.train.run import evaluate

    return evaluate(config)


def _export(args: argparse.Namespace) -> Any:
    from ray_prefopt.train.export import export

    export(args.source, args.out, merge=args.merge)
    return {"exported": str(args.out)}


def _config(args: argparse.Namespace, config: TrainConfig) -> Any:
    return config.model_dump(mode="json") if args.json else dump_yaml(config)


def _demo(args: argparse.Namespace) -> Any:
    from ray_prefopt.demo import run_demo

    return run_demo(args.folder)


def _plan(config: TrainConfig) -> Any:
    from ray_prefopt.train.run import describe

    return describe(config)


def _outline(config: TrainConfig) -> str:
    """What is about to run, said before torch and ray are loaded."""
    run, engine = config.run, config.engine
    sharding = f"ZeRO {engine.zero_stage}" if engine.kind == "zero" else "plain"
    model = config.model.path or f"new {(config.model.from_config or {}).get('model_type')}"
    batch = f"{run.global_batch} pairs per step"
    return f"{config.loss.kind} on {model}: {run.num_workers} x {'GPU' if run.use_gpu else 'CPU'}, {sharding}, {batch}"


@dataclass(frozen=True, slots=True)
class Command:
    """A verb: its arguments, the config sections its help lists, and what it runs."""

    summary: str
    usage: str
    run: Callable[..., Any]
    sections: tuple[str, ...] = ()
    arguments: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def parser(self, name: str) -> argparse.ArgumentParser:
        parser = _Parser(prog=f"ray-prefopt {name}", add_help=False, allow_abbrev=False)
        for flag, keywords in self.arguments:
            parser.add_argument(flag, **keywords)
        if self.sections:
            parser.add_argument(
                "-c", "--config", metavar="FILE", type=Path, action="append", default=[], help=_CONFIG
            )
            parser.add_argument("--dry-run", action="store_true", help=_DRY_RUN)
        parser.add_argument(
            "--json", action="store_true", help="Result or error as JSON on stdout, all else on stderr."
        )
        parser.add_argument("-v", "--verbose", action="store_true", help="Show the traceback of an error.")
        parser.add_argument("-h", "--help", action="store_true", help="Show this text.")
        return parser


_CONFIG = "YAML file with config sections; may be given again, later files win, flags win over files."
_DRY_RUN = "Check everything that can be known beforehand, print the plan, and stop."
_NO_TRAINING: Mapping[str, Any] = {"data": {"train": []}}

COMMANDS = {
    "train": Command(
        "Train a model on preference pairs; a run of the same name is resumed.",
        "[-c FILE]... [--section.field VALUE]...",
        _train,
        tuple(sections()),
    ),
    "tokenize": Command(
        "Make the token blocks that training reads; a later run finds them.",
        "[-c FILE]... [--section.field VALUE]...",
        _tokenize,
        ("model", "data", "run"),
    ),
    "evaluate": Command(
        "Measure a model on held-out pairs.",
        "[MODEL] --data.eval PAIRS [-c FILE]... [--section.field VALUE]...",
        _evaluate,
        ("model", "data", "loss", "run"),
        (
            (
                "model",
                {"nargs": "?", "metavar": "MODEL", "help": "Folder or hub id; the same as --model.path."},
            ),
        ),
        _NO_TRAINING,
    ),
    "export": Command(
        "Write a checkpoint as a Hugging Face folder.",
        "CHECKPOINT_OR_RUN --out DIR [--merge]",
        _export,
        arguments=(
            (
                "source",
                {
                    "metavar": "CHECKPOINT_OR_RUN",
                    "help": "Folder of a checkpoint, or of a run for its last one.",
                },
            ),
            ("--out", {"metavar": "DIR", "required": True, "help": "Folder to write."}),
            (
                "--merge",
                {"action": "store_true", "help": "Merge a low-rank adapter into the model's weights."},
            ),
        ),
    ),
    "config": Command(
        "Show the config that files and flags amount to, or the JSON Schema of config files.",
        "show|schema [-c FILE]... [--section.field VALUE]...",
        _config,
        tuple(sections()),
        (("what", {"metavar": "show|schema", "choices": ("show", "schema"), "help": "Which of the two."}),),
    ),
    "demo": Command(
        "Train a tiny model on this machine, offline, in minutes.",
        "[FOLDER]",
        _demo,
        arguments=(("folder", {"nargs": "?", "default": "demo", "help": "Where the demo's files go."}),),
    ),
}


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        if unknown != message.split(" ")[0] and unknown.startswith("-"):
            raise ConfigError(f"{unknown} is not an option of {self.prog}.{_nearest_flag(self, unknown)}")
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def _nearest_flag(parser: argparse.ArgumentParser, flag: str) -> str:
    typed = flag.partition("=")[0]
    own = [name for action in parser._actions for name in action.option_strings]
    close = difflib.get_close_matches(typed, own, 1)
    advice = did_you_mean(close) or did_you_mean(nearest_fields(typed.lstrip("-"), list(options())), "--")
    return advice or f" See {parser.prog} --help"


# --- Help ---


def overview() -> str:
    """What `ray-prefopt --help` prints."""
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ray-prefopt COMMAND [ARGUMENT]...",
            "",
            "Preference fine-tuning (SimPO, CPO, CPO-SimPO) of causal language models on a Ray cluster.",
            "",
            *lines,
            "",
            "`ray-prefopt COMMAND --help` lists the arguments of a command, `ray-prefopt --version` the version.",
            EXIT_CODES,
        ]
    )


def command_help(name: str) -> str:
    """What `ray-prefopt NAME --help` prints: the command's own options, then config fields by section."""
    command = COMMANDS[name]
    lines = [f"usage: ray-prefopt {name} {command.usage}", "", command.summary, ""]
    for action in command.parser(name)._actions:
        label = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        if action.option_strings and action.metavar:
            label += f" {action.metavar}"
        lines.append(f"  {label:<26}  {action.help}")
    for section in command.sections:
        lines += ["", f"{section}: {sections()[section]}"]
        lines += [
            _option_help(option) for option in options().values() if option.name.startswith(section + ".")
        ]
    if command.sections:
        lines += ["", "Names may be written with - or _; a list is given by repeating its flag, or as JSON;"]
        lines += [
            "`--engine.deepspeed.some.key VALUE` sets a key of a mapping; `null` unsets; a bare flag is true."
        ]
    return "\n".join([*lines, "", EXIT_CODES])


def _option_help(option: Option) -> str:
    about = option.description.partition("\n")[0].partition(". ")[0]
    about = about if about.endswith("...") else about.removesuffix(".")
    return f"  {flag_form(option):<42}  {about + ' ' if about else ''}[{_default_text(option)}]"


def flag_form(option: Option) -> str:
    """`--run.epochs N`: a flag and the kind of its value."""
    if option.choices:
        value = "|".join(map(str, option.choices))
    elif option.is_mapping and not option.takes(str):
        value = "{KEY: VALUE}"
    else:
        kinds = {bool: "BOOL", int: "N", float: "X", tuple: "X X", str: "TEXT", list: "TEXT..."}
        value = next((text for kind, text in kinds.items() if option.takes(kind)), "JSON")
    return f"--{option.name} {value}"


def _default_text(option: Option) -> str:
    if option.required:
        return "required"
    by_value: dict[str, list[str]] = {}
    for kind, value in option.defaults.items():
        by_value.setdefault(_default_value(value), []).append(kind)
    everywhere = len(by_value) == 1 and len(option.kinds) in (0, len(options()["loss.kind"].choices))
    if everywhere or option.name == "loss.kind":
        return next(iter(by_value))
    return "; ".join(f"{', '.join(kinds)}: {value}" for value, kinds in by_value.items())


def _default_value(value: Any) -> str:
    if value is None or value == {}:
        return "unset"
    return str(value) if isinstance(value, str) else json.dumps(value)


# --- Running ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process when not given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    with _stdout_of_results(as_json) as out:
        try:
            return _dispatch(given, out)
        except PrefoptError as error:
            if not {"-v", "--verbose"}.isdisjoint(given):
                traceback.print_exc()
            return _fail(error, str(error), error.exit_code, out if as_json else None)
        except KeyboardInterrupt as error:
            return _fail(error, _resume_hint(given), 130, out if as_json else None)
        except Exception as error:
            traceback.print_exc()
            return _fail(error, f"{type(error).__name__}: {error}", 1, out if as_json else None)


def _dispatch(given: Sequence[str], out: TextIO) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(overview(), file=out)
        return 0 if given else ConfigError.exit_code
    if given[0] == "--version":
        print(f"ray-prefopt {__version__}", file=out)
        return 0
    name = given[0]
    if name not in COMMANDS:
        advice = suggest(name, COMMANDS) or f" The commands are {', '.join(COMMANDS)}."
        raise ConfigError(f"{name} is not a command of ray-prefopt.{advice}")
    own, flags = split_flags(given[1:])
    if not {"-h", "--help"}.isdisjoint(own):
        print(command_help(name), file=out)
        return 0
    command = COMMANDS[name]
    args = command.parser(name).parse_args(own)
    if name == "config" and args.what == "schema":
        result: Any = config_schema()
    elif command.sections:
        model = [f"--model.path={args.model}"] if getattr(args, "model", None) else []
        result = command.run(args, load_config(args.config, [*flags, *model], command.base))
    elif flags:
        raise ConfigError(
            f"{flags[0].partition('=')[0]} is a config field; ray-prefopt {name} reads no config"
        )
    else:
        result = command.run(args)
    _print_result(result, out, as_json=args.json or (name == "config" and args.what == "schema"))
    return 0


@contextmanager
def _stdout_of_results(as_json: bool) -> Iterator[TextIO]:
    """Stdout for results; with --json whatever else would be printed, also by child processes, goes to stderr."""
    if not as_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    try:
        is_process_stdout = sys.stdout.fileno() == 1
    except OSError:
        is_process_stdout = False
    if not is_process_stdout:
        out = sys.stdout
        with redirect_stdout(sys.stderr):
            yield out
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr), os.fdopen(kept, "w", closefd=False) as out:
            yield out
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _print_result(result: Any, out: TextIO, *, as_json: bool) -> None:
    if isinstance(result, str) and not as_json:
        print(result.rstrip("\n"), file=out)
    elif as_json:
        print(json.dumps(_plain(result), indent=2), file=out)
    elif result is not None:
        print(
            yaml.safe_dump(_plain(result), sort_keys=False, allow_unicode=True, width=110).rstrip("\n"),
            file=out,
        )


def _plain(value: Any) -> Any:
    """The value in JSON's types; NaN and infinities, which JSON lacks, become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _fail(error: BaseException, message: str, code: int, out: TextIO | None) -> int:
    """Say what went wrong on stderr, and as JSON where it was asked for."""
    _note(f"error: {message}" if code != 130 else message)
    if out is not None:
        details = {"kind": type(error).__name__, "message": message, "exit_code": code}
        print(json.dumps({"error": details}, indent=2), file=out)
    return code


def _resume_hint(given: Sequence[str]) -> str:
    command = shlex.join(["ray-prefopt", *given])
    if given[:1] != ["train"]:
        return f"interrupted; run it again with: {command}"
    try:
        own, flags = split_flags(given[1:])
        config = load_config(COMMANDS["train"].parser("train").parse_args(own).config, flags)
    except PrefoptError:
        return f"interrupted; run it again with: {command}"
    if config.run.name is None:
        return f"interrupted; resume with: {command} --run.name NAME (its folder is in {config.run.storage_path})"
    return f"interrupted; resume with: {command}"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
