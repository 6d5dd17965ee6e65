"""The `ray-prefopt` command. It imports the config alone; each command imports what it needs, when it is run.

Exit codes: 0 done; 1 the run failed; 2 wrong usage or config; 3 data or model; 4 resources, storage or checkpoint;
130 interrupted, and resumable with the command that is printed; 141 when nobody reads the output to its end.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import shlex
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

import yaml
from pydantic import BaseModel

from ray_prefopt import __version__
from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError, PrefoptError, suggest
from ray_prefopt.help import command_help, overview
from ray_prefopt.options import did_you_mean, nearest_fields, options, sections
from ray_prefopt.settings import config_schema, dump_yaml, load_config, load_tune_config, split_flags

# --- Commands ---


def _train(args: argparse.Namespace) -> Any:
    config = load_config(args.config, args.flags)
    _note(_outline(config))
    if args.dry_run:
        return _plan(config)
    from ray_prefopt.training.folder import resolved
    from ray_prefopt.training.run import BEGUN, train

    named = resolved(config)
    try:
        return train(named)
    except KeyboardInterrupt as stop:
        to_resume = [] if config.run.name else [f"--run.name={named.run.name}"]
        has_begun = BEGUN in getattr(stop, "__notes__", [])  # else an older run may still be in its folder
        to_resume += ["--run.force_new=false"] if config.run.force_new and has_begun else []
        raise KeyboardInterrupt(*to_resume) from None


def _tokenize(args: argparse.Namespace) -> Any:
    config = load_config(args.config, args.flags)
    if args.dry_run:
        return _plan(config)
    from ray_prefopt.training.run import prepare_data

    return prepare_data(config)


def _loaded(command: str, args: argparse.Namespace) -> TrainConfig:
    """The config of a command, here or in a job."""
    load = load_tune_config if command == "tune" else load_config
    model = [f"--model.path={args.model}"] if getattr(args, "model", None) else []
    base: dict[str, Any] | None = {"data": {"train": []}} if command == "evaluate" else None
    return load(args.config, [*args.flags, *model], base)


def _evaluate(args: argparse.Namespace) -> Any:
    config = _loaded("evaluate", args)
    if not config.data.eval_sets:
        raise ConfigError("nothing to evaluate on: got no data.eval; add --data.eval PAIRS")
    if args.dry_run:
        return _plan(config)
    from ray_prefopt.training.run import evaluate

    return evaluate(config)


def _tune(args: argparse.Namespace) -> Any:
    config = load_tune_config(args.config, args.flags)
    _note(_outline(config))
    from ray_prefopt.search.tune import describe_search, named, tune

    if args.dry_run:
        return describe_search(config, config.search)
    base = named(config)
    try:
        return tune(base, config.search, resume=args.resume)
    except KeyboardInterrupt:
        to_resume = [] if config.run.name else [f"--run.name={base.run.name}"]
        to_resume += [] if args.resume else ["--resume"]
        to_resume += ["--run.force_new=false"] if config.run.force_new else []
        raise KeyboardInterrupt(*to_resume) from None


def _export(args: argparse.Namespace) -> Any:
    from ray_prefopt.training.export import export

    export(args.source, args.out, merge=args.merge)
    return {"exported": str(args.out)}


def _submit(args: argparse.Namespace) -> Any:
    files, parcel = _parcel(args)
    from ray_prefopt.submit import Jobs, Parcel

    jobs = Jobs(args.address)
    job = jobs.submit(Parcel(files=files, **parcel))
    _note(
        f"job {job}: ray-prefopt status, logs --follow and stop know it by this name, and as {parcel['run']}"
    )
    return _follow(jobs, job) if args.wait else jobs.status(job)[0]


def _status(args: argparse.Namespace) -> Any:
    from ray_prefopt.submit import Jobs

    return Jobs(args.address).status(args.name)


def _stop(args: argparse.Namespace) -> Any:
    from ray_prefopt.submit import Jobs

    return Jobs(args.address).stop(args.name)


def _logs(args: argparse.Namespace) -> Any:
    from ray_prefopt.submit import Jobs

    jobs = Jobs(args.address)
    return _follow(jobs, args.name) if args.follow else jobs.logs(args.name)


def _follow(jobs: Any, name: str) -> Any:
    """The status of a job at its end, or when Ctrl-C ends the following of it."""
    try:
        return jobs.follow(name, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        _note(f"{name} goes on without being followed: ray-prefopt logs --follow {name}")
        return jobs.status(name)[0]


def _parcel(args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, Any]]:
    """What a job brings and runs, after the checks that need no cluster."""
    if not args.job:
        raise ConfigError("nothing to submit: give a command after --, as in submit -- train -c run.yaml")
    name, *given = args.job
    if name not in SUBMITTABLE:
        raise ConfigError(f"{name} cannot be submitted; what can is {', '.join(SUBMITTABLE)}")
    inner = _parse(name, given)
    config = _loaded(name, inner)
    if "://" not in config.run.storage_path and not os.path.isabs(config.run.storage_path):
        raise ConfigError(
            f"run.storage_path {config.run.storage_path} would be in a folder that goes with the job: "
            "give a path or URI that all nodes see"
        )
    if args.wheel is not None and not zipfile.is_zipfile(args.wheel):
        raise ConfigError(f"--wheel {args.wheel} is no wheel: build one with `pip wheel --no-deps .`")
    if args.working_dir is not None and not args.working_dir.is_dir():
        raise ConfigError(f"--working-dir {args.working_dir} is no folder")
    files = {f"config-{index}{path.suffix}": path for index, path in enumerate(inner.config)}
    own = [word for word in split_flags(given)[0] if word != "--"]
    command = [name, *_with_files(own, list(files)), *inner.flags]
    run = config.run.name or f"{config.loss.kind}-{datetime.now():%Y%m%d-%H%M%S}"
    if name in ("train", "tune"):
        command += [] if config.run.name else [f"--run.name={run}"]
        goes_on = name == "tune" and not inner.resume and not config.run.force_new
        command += ["--resume"] if goes_on else []
    else:
        run = f"{run}-{name}"
    return files, {
        "run": run,
        "command": command,
        "wheel": args.wheel,
        "folder": args.working_dir,
        "env": _environment(args.env),
        "num_cpus": args.cpus,
        "resources": _resources(args.resources),
    }


def _with_files(words: Sequence[str], names: list[str]) -> list[str]:
    """The arguments of a command with other names for its config files, in their order."""
    renamed: list[str] = []
    for word in words:
        if renamed and renamed[-1] in ("-c", "--config"):
            renamed.append(names.pop(0))
        elif word.startswith("--config="):
            renamed += ["--config", names.pop(0)]
        elif re.match("-c.", word):
            renamed += ["-c", names.pop(0)]
        else:
            renamed.append(word)
    return renamed


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    env = {}
    for pair in pairs:
        name, has_value, value = pair.partition("=")
        if not has_value:
            raise ConfigError(f"--env {pair} has no value: --env NAME=VALUE")
        if re.search("token|secret|password|credential|key$", name, re.IGNORECASE):
            raise ConfigError(
                f"--env {name}: everybody who reaches the cluster's job server can read what a job brings; "
                "set secrets in the environment of the nodes"
            )
        env[name] = value
    return env


def _resources(text: str | None) -> dict[str, float]:
    try:
        resources = json.loads(text or "{}")
        return {str(name): float(number) for name, number in resources.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(f"--resources must be JSON such as '{{\"driver\": 1}}'; got {text!r}") from None


def _config(args: argparse.Namespace) -> Any:
    if args.what == "schema":
        schema = config_schema()
        return schema if args.json else json.dumps(schema, indent=2)
    config = load_config(args.config, args.flags)
    return config if args.json else dump_yaml(config)


def _demo(args: argparse.Namespace) -> Any:
    from ray_prefopt.demo import run_demo

    return run_demo(args.folder)


def _plan(config: TrainConfig) -> Any:
    from ray_prefopt.training.describe import describe

    return describe(config)


def _outline(config: TrainConfig) -> str:
    """What is about to run, said before torch and ray are loaded."""
    run, engine = config.run, config.engine
    sharding = f"ZeRO {engine.zero_stage}" if engine.kind == "zero" else "plain"
    model = config.model.path or f"new {(config.model.from_config or {}).get('model_type')}"
    batch = f"{run.global_batch} pairs per step"
    return f"{config.loss.kind} on {model}: {run.workers_text} x {'GPU' if run.use_gpu else 'CPU'}, {sharding}, {batch}"


Argument = tuple[tuple[str, ...], Mapping[str, Any]]


def _argument(*names: str, **keywords: Any) -> Argument:
    """What ArgumentParser.add_argument is called with."""
    return names, keywords


@dataclass(frozen=True, slots=True)
class Command:
    """A verb: what it runs, its own arguments, and the sections of the config that its help lists, if it reads one."""

    run: Callable[[argparse.Namespace], Any]
    summary: str
    usage: str
    arguments: tuple[Argument, ...] = ()
    sections: tuple[str, ...] = ()
    takes_command: bool = False
    """Whether the command line of another command follows after `--`."""

    def parser(self, name: str) -> argparse.ArgumentParser:
        parser = _Parser(
            prog=f"ray-prefopt {name}",
            usage=self.usage,
            description=self.summary,
            add_help=False,
            allow_abbrev=False,
        )
        for names, keywords in (*self.arguments, *_ALL):
            parser.add_argument(*names, **keywords)
        return parser


_CONFIG = _argument(
    "-c",
    "--config",
    metavar="FILE",
    type=Path,
    action="append",
    default=[],
    help="YAML file with config sections; may be given again, later files win, flags win over files.",
)
_DRY_RUN = _argument(
    "--dry-run",
    action="store_true",
    help="Check everything that can be known beforehand, print the plan, and stop.",
)
_ADDRESS = _argument(
    "--address",
    metavar="URL",
    help="Of the cluster's dashboard; RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265, when not given.",
)
_ALL = (
    _argument("--json", action="store_true", help="Result or error as JSON on stdout, all else on stderr."),
    _argument("-v", "--verbose", action="store_true", help="Show the traceback of an error."),
    _argument("-h", "--help", action="store_true", help="Show this text."),
)
_CONFIG_USAGE = "[-c FILE]... [--section.field VALUE]..."
_RUN_SECTIONS = tuple(name for name in sections() if name != "search")

SUBMITTABLE = ("train", "tune", "tokenize", "evaluate")

COMMANDS = {
    "train": Command(
        _train,
        "Train a model on preference pairs; a run of the same name is resumed.",
        _CONFIG_USAGE,
        (_CONFIG, _DRY_RUN),
        _RUN_SECTIONS,
    ),
    "tune": Command(
        _tune,
        "Search for the best values of any fields, in a space of yours or a published one.",
        f"[--resume] {_CONFIG_USAGE}",
        (
            _CONFIG,
            _argument("--resume", action="store_true", help="Go on with the search of this run.name."),
            _DRY_RUN,
        ),
        tuple(sections()),
    ),
    "tokenize": Command(
        _tokenize,
        "Make the token blocks that training reads; a later run finds them.",
        _CONFIG_USAGE,
        (_CONFIG, _DRY_RUN),
        ("model", "data", "run"),
    ),
    "evaluate": Command(
        _evaluate,
        "Measure a model on held-out pairs.",
        f"[MODEL] --data.eval PAIRS {_CONFIG_USAGE}",
        (
            _argument(
                "model", nargs="?", metavar="MODEL", help="Folder or hub id; the same as --model.path."
            ),
            _CONFIG,
            _DRY_RUN,
        ),
        ("model", "data", "loss", "run"),
    ),
    "export": Command(
        _export,
        "Write a checkpoint as a Hugging Face folder.",
        "CHECKPOINT_OR_RUN --out DIR [--merge]",
        (
            _argument(
                "source",
                metavar="CHECKPOINT_OR_RUN",
                help="Folder of a checkpoint, or of a run for its last one.",
            ),
            _argument("--out", metavar="DIR", required=True, help="Folder to write."),
            _argument(
                "--merge", action="store_true", help="Merge a low-rank adapter into the model's weights."
            ),
        ),
    ),
    "submit": Command(
        _submit,
        "Run a command as a job of a Ray cluster; a run of the same name is resumed.",
        "[--wait] [--wheel FILE] [--working-dir DIR] [--env NAME=VALUE]... -- train|tune|tokenize|evaluate ...",
        (
            _ADDRESS,
            _argument("--wait", action="store_true", help="Print what the job prints until it ends."),
            _argument(
                "--wheel",
                metavar="FILE",
                type=Path,
                help="Of this package, for nodes that have none or another.",
            ),
            _argument(
                "--working-dir",
                metavar="DIR",
                type=Path,
                help="Folder that the job brings along, and runs in.",
            ),
            _argument(
                "--env",
                metavar="NAME=VALUE",
                action="append",
                default=[],
                help="Environment variable of the job; no secrets, which belong into the nodes' environment.",
            ),
            _argument("--cpus", metavar="N", type=float, help="CPUs to reserve for the driver."),
            _argument("--resources", metavar="JSON", help="Further resources to reserve for the driver."),
        ),
        takes_command=True,
    ),
    "status": Command(
        _status,
        "Show the jobs of a Ray cluster, or one of them.",
        "[NAME] [--address URL]",
        (_argument("name", nargs="?", metavar="NAME", help="Name of a run, or id of a job."), _ADDRESS),
    ),
    "logs": Command(
        _logs,
        "Print what a job has printed.",
        "[--follow] NAME [--address URL]",
        (
            _argument("name", metavar="NAME", help="Name of a run, or id of a job."),
            _argument("--follow", action="store_true", help="Go on until the job ends."),
            _ADDRESS,
        ),
    ),
    "stop": Command(
        _stop,
        "End a job; a run of the same name goes on from its last checkpoint.",
        "NAME [--address URL]",
        (_argument("name", metavar="NAME", help="Name of a run, or id of a job."), _ADDRESS),
    ),
    "config": Command(
        _config,
        "Show the config that files and flags amount to, or the JSON Schema of config files.",
        f"show|schema {_CONFIG_USAGE}",
        (
            _argument(
                "what", metavar="show|schema", choices=("show", "schema"), help="The config, or the schema."
            ),
            _CONFIG,
        ),
        _RUN_SECTIONS,
    ),
    "demo": Command(
        _demo,
        "Train a tiny model on this machine, offline, in minutes.",
        "[FOLDER]",
        (
            _argument(
                "folder", nargs="?", default="demo", metavar="FOLDER", help="Where the demo's files go."
            ),
        ),
    ),
}


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def _parse(name: str, given: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, with the flags of config fields as a list in `flags`. Raises ConfigError."""
    command = COMMANDS[name]
    parser = command.parser(name)
    job: Sequence[str] = ()
    if command.takes_command and "--" in given:
        end = given.index("--")
        given, job = given[:end], given[end + 1 :]
    own, flags = split_flags(given)
    args, unknown = parser.parse_known_args(own)
    if unknown:
        raise ConfigError(_not_an_argument(unknown[0], parser, reads_config=bool(command.sections)))
    if flags and not command.sections:
        raise ConfigError(f"{flags[0].partition('=')[0]} is a config field; {parser.prog} reads no config")
    args.flags, args.job = flags, list(job)
    return args


def _not_an_argument(word: str, parser: argparse.ArgumentParser, *, reads_config: bool) -> str:
    """A sentence about a word that a command has no use for, and what it may have been meant for."""
    if word.startswith("-"):
        typed = word.partition("=")[0]
        own = [name.lstrip("-") for action in parser._actions for name in action.option_strings]
        names = difflib.get_close_matches(typed.lstrip("-"), own, 1)
        if reads_config:
            names = names or nearest_fields(typed.lstrip("-"), list(options()))
        advice = did_you_mean(names, "--") if names or reads_config else f" See {parser.prog} --help"
        return f"{typed} is not an option of {parser.prog}.{advice}"
    advice = f"See {parser.prog} --help"
    if reads_config and word.endswith((".yaml", ".yml", ".json")):
        advice = f"Did you mean -c {word}?"
    elif reads_config:
        advice = "A flag takes one value; a list is given by repeating its flag, or as JSON"
    return f"{word} is one argument too many for {parser.prog}. {advice}"


# --- Running ---

UNHEARD = 141
"""Exit code of a command whose output nobody reads to its end: 128 and the number of SIGPIPE, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process when not given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _stdout_of_results("--json" in given) as out:
            code = _answer(given, out)
            print(end="", file=out, flush=True)
            return code
    except BrokenPipeError:  # who reads has heard enough, as `head` has
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # for what Python would still write at its end
        return UNHEARD


def _answer(given: Sequence[str], out: TextIO) -> int:
    """Run one command and say what went wrong, if anything."""
    try:
        return _dispatch(given, out)
    except BrokenPipeError:
        raise
    except PrefoptError as error:
        if not {"-v", "--verbose"}.isdisjoint(given):
            traceback.print_exc()
        return _fail(error, str(error), error.exit_code, given, out)
    except KeyboardInterrupt as error:
        again = shlex.join(["ray-prefopt", *given, *error.args])
        return _fail(error, f"interrupted; go on with: {again}", 130, given, out)
    except Exception as error:
        traceback.print_exc()
        return _fail(error, f"{type(error).__name__}: {error}", 1, given, out)


def _dispatch(given: Sequence[str], out: TextIO) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(overview({name: command.summary for name, command in COMMANDS.items()}), file=out)
        return 0 if given else ConfigError.exit_code
    if given[0] == "--version":
        print(f"ray-prefopt {__version__}", file=out)
        return 0
    name = given[0]
    if name not in COMMANDS:
        advice = suggest(name, [*COMMANDS, "--help", "--version"])
        raise ConfigError(
            f"{name} is not a command of ray-prefopt.{advice or ' They are ' + ', '.join(COMMANDS)}"
        )
    if not {"-h", "--help"}.isdisjoint(split_flags(given[1:])[0]):
        print(command_help(COMMANDS[name].parser(name), COMMANDS[name].sections), file=out)
        return 0
    args = _parse(name, given[1:])
    _print_result(COMMANDS[name].run(args), out, as_json=args.json)
    return 0


@contextmanager
def _stdout_of_results(as_json: bool) -> Iterator[TextIO]:
    """Stdout for results; with --json whatever else would be printed, also by child processes, goes to stderr."""
    if not as_json or sys.stdout is None:  # it is closed
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
        shown = [field.name for field in dataclasses.fields(value) if field.repr]
        return {name: _plain(getattr(value, name)) for name in shown}
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _fail(error: BaseException, message: str, code: int, given: Sequence[str], out: TextIO) -> int:
    """Say what went wrong on stderr, and as JSON where it was asked for."""
    _note(f"error: {message}" if code != 130 else message)
    if "--json" in given:
        details = {"kind": type(error).__name__, "message": message, "exit_code": code}
        print(json.dumps({"error": details}, indent=2), file=out)
    return code


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
