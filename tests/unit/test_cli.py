"""The command as a user meets it: what it prints and where, its exit codes, and how soon."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from transformers import EvalPrediction

import ray_prefopt.training.export  # noqa: F401  for monkeypatch to find: the command imports it when it runs
from ray_prefopt import __version__
from ray_prefopt.cli import COMMANDS, main
from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import DataError, ResourceError, TrainingError
from ray_prefopt.help import default_text, flag_form
from ray_prefopt.options import options
from ray_prefopt.settings import config_schema, dump_yaml, load_config
from ray_prefopt.training.folder import resolved
from ray_prefopt.training.run import BEGUN, EvalResult

FLAGS = Path(__file__).with_name("flags.txt")
GIVEN = ["--model.path", "m", "--data.train", "a.jsonl"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    Path("run.yaml").write_text("model: {path: m}\ndata: {train: a.jsonl}\n")
    return tmp_path


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of one command."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capsys.readouterr()

    return run


Call = Callable[..., tuple[int, str, str]]


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def function(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise error

    return function


# --- Help ---


def test_overview(call: Call) -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "usage: ray-prefopt COMMAND [ARGUMENT]...",
        "",
        "Preference fine-tuning (SimPO, CPO, CPO-SimPO) of language models on a Ray cluster.",
        "",
        "  train     Train a model on preference pairs; a run of the same name is resumed.",
        "  tune      Search for the best values of any fields, in a space of yours or a published one.",
        "  tokenize  Make the token blocks that training reads; a later run finds them.",
        "  evaluate  Measure a model on held-out pairs.",
        "  export    Write a checkpoint as a Hugging Face folder.",
        "  submit    Run a command as a job of a Ray cluster; a run of the same name is resumed.",
        "  status    Show the jobs of a Ray cluster, or one of them.",
        "  logs      Print what a job has printed.",
        "  stop      End a job; a run of the same name goes on from its last checkpoint.",
        "  config    Show the config that files and flags amount to, or the JSON Schema of config files.",
        "  demo      Train a tiny model on this machine, offline, in minutes.",
        "",
        "`ray-prefopt COMMAND --help` lists the arguments of a command, `ray-prefopt --version` the version.",
        "exit codes: 0 done; 1 the run failed; 2 usage or config; 3 data or model; 4 resources, storage or checkpoint;",
        "            130 interrupted (the command that resumes is printed)",
    ]
    assert call("-h") == (0, out, "")
    assert call() == (2, out, "")


def test_help_of_a_command_without_config(call: Call) -> None:
    code, out, _ = call("export", "--help")
    assert code == 0
    assert out.splitlines()[:-3] == [
        "usage: ray-prefopt export CHECKPOINT_OR_RUN --out DIR [--merge]",
        "",
        "Write a checkpoint as a Hugging Face folder.",
        "",
        "  CHECKPOINT_OR_RUN                     Folder of a checkpoint, or of a run for its last one.",
        "  --out DIR                             Folder to write.",
        "  --merge                               Merge a low-rank adapter into the model's weights.",
        "  --json                                Result or error as JSON on stdout, all else on stderr.",
        "  -v, --verbose                         Show the traceback of an error.",
        "  -h, --help                            Show this text.",
    ]
    assert "FOLDER                                Where the demo's files go." in call("demo", "-h")[1]


@pytest.mark.parametrize(
    ("command", "usage", "sections"),
    [
        ("train", "", ["model", "data", "loss", "optim", "engine", "run"]),
        ("tokenize", "", ["model", "data", "run"]),
        ("evaluate", "[MODEL] --data.eval PAIRS ", ["model", "data", "loss", "run"]),
        ("config", "show|schema ", ["model", "data", "loss", "optim", "engine", "run"]),
    ],
)
def test_help_lists_the_fields_of_its_sections(
    call: Call, command: str, usage: str, sections: list[str]
) -> None:
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"usage: ray-prefopt {command} {usage}[-c FILE]... [--section.field VALUE]..."
    assert lines[2] == COMMANDS[command].summary
    listed = [line.split()[0][2:] for line in lines if line.startswith("  --") and "." in line.split()[0]]
    assert listed == [name for name in options() if name.partition(".")[0] in sections]
    assert max(map(len, lines)) <= 120


def test_help_says_what_a_field_is_and_its_default(call: Call) -> None:
    out = call("train", "--help")[1]
    for lines in (
        "  --optim.betas X,X                     Decay of Adam's averages of the gradient and of its square.\n"
        "                                        [0.9,0.999]\n",
        "  --loss.beta X                         Scale of the reward. [simpo, cpo_simpo: 2.0; cpo, ipo: 0.1]\n",
        "  --loss.kind simpo|cpo|cpo_simpo|ipo   Which loss. [simpo]\n",
        "  --engine.zero_stage 0|1|2|3           Shard nothing (0), optimizer states (1), also gradients (2), also\n"
        "                                        weights (3). [2]\n",
        "  --model.lora {KEY: VALUE}             Train low-rank adapters instead of all weights. [unset]\n",
        "  --run.use_gpu BOOL                    Give each worker a GPU. [false]\n",
    ):
        assert lines in out


def test_help_fits_a_narrow_terminal(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = [line for line in call("train", "--help")[1].splitlines() if line.startswith(" " * 40)]
    assert len(listed) > 100
    assert max(map(len, listed)) <= 80


def test_every_field_says_what_it_is() -> None:
    assert [name for name, option in options().items() if not option.description] == []


def test_flags_are_those_that_were_agreed_on(tmp_path: Path) -> None:
    flags = "".join(f"{flag_form(option)} [{default_text(option)}]\n" for option in options().values())
    new = tmp_path / FLAGS.name
    new.write_text(flags)
    assert flags == FLAGS.read_text(), f"the command line has changed; if it should have: cp {new} {FLAGS}"


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"ray-prefopt {__version__}\n", "")


def test_a_module_and_a_command_are_the_same(folder: Path) -> None:
    probe = "import sys, runpy; sys.argv[1:] = ['--version']; runpy.run_module('ray_prefopt', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=root(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"ray-prefopt {__version__}\n")


# --- Light and quick ---


def root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--loss.bata", "3"],
        ["train", "-c", "nowhere.yaml"],
        ["config", "show", *GIVEN],
    ],
)
def test_what_needs_no_model_loads_no_heavy_library(arguments: list[str]) -> None:
    probe = (
        "import sys; from ray_prefopt.cli import main; main(sys.argv[1:]); "
        "heavy = {'datasets', 'deepspeed', 'numpy', 'peft', 'pyarrow', 'ray', 'torch', 'transformers'}; "
        "print('heavy:', sorted(heavy & sys.modules.keys()))"
    )
    out = subprocess.check_output([sys.executable, "-c", probe, *arguments], cwd=root(), text=True)
    assert out.splitlines()[-1] == "heavy: []"


# --- Wrong usage ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "trian is not a command of ray-prefopt. Did you mean train?"),
        (
            "zzz",
            "zzz is not a command of ray-prefopt. They are train, tune, tokenize, evaluate, export, submit, status, "
            "logs, stop, config, demo",
        ),
        ("--verison", "--verison is not a command of ray-prefopt. Did you mean --version?"),
        ("train --dryrun", "--dryrun is not an option of ray-prefopt train. Did you mean --dry-run?"),
        ("train --beta 3", "--beta is not an option of ray-prefopt train. Did you mean --loss.beta?"),
        ("train --lr=3", "--lr is not an option of ray-prefopt train. Did you mean --optim.learning_rate?"),
        (
            "train --zzz",
            "--zzz is not an option of ray-prefopt train. `ray-prefopt train --help` lists the fields.",
        ),
        ("export x --ouy y", "ray-prefopt export: the following arguments are required: --out; "
         "see ray-prefopt export --help"),
        ("export x --out y --zzz", "--zzz is not an option of ray-prefopt export. See ray-prefopt export --help"),
        ("export x y --out z", "y is one argument too many for ray-prefopt export. See ray-prefopt export --help"),
        ("train run.yaml", "run.yaml is one argument too many for ray-prefopt train. Did you mean -c run.yaml?"),
        (
            "train -c run.yaml --optim.betas 0.9 0.95",
            "0.95 is one argument too many for ray-prefopt train. A flag takes one value; a list is given by "
            "repeating its flag, or as JSON",
        ),
        ("demo here --loss.beta 3", "--loss.beta is a config field; ray-prefopt demo reads no config"),
        ("train -c", "ray-prefopt train: argument -c/--config: expected one argument; see ray-prefopt train --help"),
        ("train -c .", "config file . cannot be read: Is a directory; give a YAML file in UTF-8"),
        ("train --loss.bata 3", "--loss.bata is not a field. Did you mean --loss.beta?"),
        ("train -c run.yaml --run.use_gpu -c none.yaml", "config file none.yaml does not exist; the working "
         "directory is {}"),
        ("evaluate m", "nothing to evaluate on: got no data.eval; add --data.eval PAIRS"),
        (
            "evaluate --data.eval e.jsonl",
            "set model.path (a folder or hub id), or model.from_config (an architecture to initialise)",
        ),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_code_2(
    call: Call, folder: Path, arguments: str, message: str
) -> None:
    assert call(*arguments.split(" ")) == (2, "", f"error: {message.format(folder)}\n")


def test_wrong_choice(call: Call) -> None:
    code, out, err = call("config", "shwo")
    assert (code, out) == (2, "")
    assert err.startswith(
        "error: ray-prefopt config: argument show|schema: invalid choice: 'shwo' (choose from "
    )
    assert err.endswith("; see ray-prefopt config --help\n")


# --- Results ---


def test_config_show_prints_a_config_file(call: Call) -> None:
    code, out, err = call("config", "show", "-c", "run.yaml", "--loss.kind", "cpo")
    assert (code, err) == (0, "")
    Path("shown.yaml").write_text(out)
    assert call("config", "show", "-c", "shown.yaml") == (0, out, "")
    config = load_config([Path("shown.yaml")])
    assert (config.loss.kind, out) == ("cpo", dump_yaml(config))


def test_config_show_as_json(call: Call) -> None:
    _, out, _ = call("config", "show", "--json", *GIVEN)
    assert TrainConfig.model_validate_json(out) == load_config([], GIVEN)


def test_config_schema_needs_no_config(call: Call) -> None:
    code, out, err = call("config", "schema")
    assert (code, err, json.loads(out)) == (0, "", config_schema())
    assert call("config", "schema", "--json")[1] == out


def test_train_hands_over_the_config_and_prints_the_result(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[TrainConfig] = []
    result = {"name": "x", "metrics": {"loss": float("nan"), "step": 3}, "model": Path("runs/x")}
    monkeypatch.setattr("ray_prefopt.training.run.train", lambda config: given.append(config) or result)
    code, out, err = call("train", "-c", "run.yaml", "--run.name", "x")
    assert given == [resolved(load_config([Path("run.yaml")], ["--run.name", "x"]))]
    assert code == 0
    assert yaml.safe_load(out) == {"name": "x", "metrics": {"loss": None, "step": 3}, "model": "runs/x"}
    assert err == "simpo on m: 1 x CPU, ZeRO 2, 128 pairs per step\n"
    assert json.loads(call("train", "-c", "run.yaml", "--json")[1]) == yaml.safe_load(out)


def test_predictions_are_not_printed(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    result = EvalResult("m", {"eval": 3}, {"eval_loss": 1.5}, {"eval": EvalPrediction([[1.0, 2.0]], [0])})
    monkeypatch.setattr("ray_prefopt.training.run.evaluate", lambda _: result)
    _, out, _ = call("evaluate", "org/name", "--data.eval", "e.jsonl", "--json")
    assert json.loads(out) == {"model": "m", "pairs": {"eval": 3}, "metrics": {"eval_loss": 1.5}}


def test_evaluate_takes_the_model_as_an_argument(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TrainConfig] = []
    monkeypatch.setattr("ray_prefopt.training.run.evaluate", given.append)
    assert call("evaluate", "org/name", "--data.eval", "e.jsonl") == (0, "", "")
    assert (given[0].model.path, given[0].data.train, given[0].data.eval) == ("org/name", [], "e.jsonl")


def test_tokenize_and_export_hand_over_what_was_given(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_prefopt.training.run.prepare_data", lambda config: [config.data.train])
    assert call("tokenize", *GIVEN) == (0, "- a.jsonl\n", "")
    exported: list[Any] = []
    monkeypatch.setattr(
        "ray_prefopt.training.export.export", lambda *given, **options: exported.append((given, options))
    )
    assert call("export", "runs/x", "--out", "m", "--merge") == (0, "exported: m\n", "")
    assert exported == [(("runs/x", "m"), {"merge": True})]


@pytest.mark.parametrize("command", ["train", "tokenize", "evaluate"])
def test_a_dry_run_prints_the_plan_alone(call: Call, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr("ray_prefopt.training.describe.describe", lambda config: {"steps": config.run.seed})
    for name in ("train", "prepare_data", "evaluate"):
        monkeypatch.setattr(f"ray_prefopt.training.run.{name}", raising(AssertionError(name)))
    code, out, _ = call(command, *GIVEN, "--data.eval", "e.jsonl", "--run.seed", "7", "--dry-run")
    assert (code, out) == (0, "steps: 7\n")


def test_with_json_nothing_else_is_on_stdout(tmp_path: Path) -> None:
    """Also what child processes print, and libraries that hold on to the process's stdout."""
    probe = (
        "import os, sys, ray_prefopt.training.run as run; from ray_prefopt.cli import main\n"
        "def train(config):\n"
        "    print('noise'); os.system('echo child'); return {'done': True}\n"
        "run.train = train; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "train", "--json", *GIVEN],
        cwd=root(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, json.loads(done.stdout)) == (0, {"done": True})
    assert {"noise", "child"} <= set(done.stderr.splitlines())


@pytest.mark.parametrize("arguments", [["train", "--help"], ["config", "schema", "--json"]])
def test_output_that_nobody_reads_is_no_error(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ray_prefopt", *arguments]
    done = subprocess.run(command, cwd=root(), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_stdout_is_no_error() -> None:
    command = f"{sys.executable} -m ray_prefopt config schema --json >&-"
    done = subprocess.run(["sh", "-c", command], cwd=root(), stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- Failures ---


def test_a_model_that_does_not_exist_is_exit_code_3(call: Call, folder: Path) -> None:
    code, out, err = call("train", "--model.path", "./none", "--data.train", "a.jsonl")
    assert (code, out) == (3, "")
    assert err.splitlines()[1:] == ["error: model ./none: no such folder, and not a hub id (org/name)"]


def test_a_source_that_is_no_checkpoint_is_exit_code_4(call: Call, folder: Path) -> None:
    assert call("export", "none", "--out", "m") == (
        4,
        "",
        "error: none: neither a checkpoint nor the folder of a run that has one\n",
    )


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("no rows"), 3), (ResourceError("no GPU"), 4), (TrainingError("rank 0"), 1)]
)
def test_our_own_errors_have_their_exit_codes(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    monkeypatch.setattr("ray_prefopt.training.run.prepare_data", raising(error))
    assert call("tokenize", *GIVEN) == (code, "", f"error: {error}\n")
    _, _, err = call("tokenize", *GIVEN, "--verbose")
    assert err.startswith("Traceback")
    assert err.endswith(f"error: {error}\n")


def test_a_bug_shows_its_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_prefopt.training.run.prepare_data", raising(KeyError("x")))
    code, out, err = call("tokenize", *GIVEN)
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith("error: KeyError: 'x'\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["train", "--loss.bata", "3"],
            {
                "kind": "ConfigError",
                "message": "--loss.bata is not a field. Did you mean --loss.beta?",
                "exit_code": 2,
            },
        ),
        (
            ["export", "none", "--out", "m"],
            {
                "kind": "CheckpointError",
                "message": "none: neither a checkpoint nor the folder of a run that has one",
                "exit_code": 4,
            },
        ),
    ],
)
def test_errors_as_json(call: Call, arguments: list[str], error: dict[str, Any]) -> None:
    code, out, err = call(*arguments, "--json")
    assert (code, json.loads(out)) == (error["exit_code"], {"error": error})
    assert err == f"error: {error['message']}\n"


# --- Interruption ---


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        ("train -c run.yaml --run.name x", ""),
        ("train -c run.yaml --run.name x --run.force_new", " --run.force_new=false"),
        ("tokenize -c run.yaml", ""),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(
    call: Call, monkeypatch: pytest.MonkeyPatch, arguments: str, added: str
) -> None:
    stop = KeyboardInterrupt()
    stop.add_note(BEGUN)
    for name in ("train", "prepare_data"):
        monkeypatch.setattr(f"ray_prefopt.training.run.{name}", raising(stop))
    code, out, err = call(*arguments.split(" "))
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == f"interrupted; go on with: ray-prefopt {arguments}{added}"


def test_a_run_that_has_not_begun_still_has_to_move_the_old_one_aside(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_prefopt.training.run.train", raising(KeyboardInterrupt()))
    arguments = "train -c run.yaml --run.name first --run.force_new"
    _, _, err = call(*arguments.split(" "))
    assert err.splitlines()[-1] == f"interrupted; go on with: ray-prefopt {arguments}"


def test_an_interrupted_run_without_a_name_is_resumed_by_the_one_it_was_given(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[TrainConfig] = []

    def train(config: TrainConfig) -> NoReturn:
        given.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_prefopt.training.run.train", train)
    code, out, _ = call("train", "-c", "run.yaml", "--json")
    name = given[0].run.name
    assert re.fullmatch(r"simpo-\d{8}-\d{6}", str(name))
    message = f"interrupted; go on with: ray-prefopt train -c run.yaml --json --run.name={name}"
    assert json.loads(out)["error"] == {"kind": "KeyboardInterrupt", "message": message, "exit_code": 130}
    assert code == 130
