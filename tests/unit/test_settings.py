"""Files and flags become a config, and every mistake is answered with its place and what was probably meant."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ray_prefopt.config import CPOLoss, LoraConfig, SimPOLoss, Source, TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.options import nearest_fields, options, sections
from ray_prefopt.settings import (
    config_schema,
    dump_yaml,
    load_config,
    parse_scalar,
    split_flags,
)

MINIMAL = "model:\n  path: m\ndata:\n  train: a.jsonl\n"
FLAGS = ["--model.path", "m", "--data.train", "a.jsonl"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, so that messages name files as a user would."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "run.yaml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def flags(*given: str) -> TrainConfig:
    return load_config([], [*FLAGS, *given])


def refusal(*given: str) -> str:
    with pytest.raises(ConfigError) as error:
        flags(*given)
    return str(error.value)


def file_refusal(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config([write(text)], [])
    return str(error.value)


# --- Values ---


def test_flags_alone_are_enough() -> None:
    assert flags() == TrainConfig(model={"path": "m"}, data={"train": "a.jsonl"})


def test_later_files_win_and_flags_win_over_files(folder: Path) -> None:
    first = write(
        MINIMAL + "optim: {learning_rate: 1e-6, schedule: linear}\nrun: {seed: 1, epochs: 2}\n", "a.yaml"
    )
    second = write("optim: {learning_rate: 2e-6}\nrun: {seed: 2}\n", "b.yaml")
    config = load_config([first, second], ["--run.seed", "3"])
    assert (config.optim.learning_rate, config.optim.schedule) == (2e-6, "linear")
    assert (config.run.seed, config.run.epochs) == (3, 2)


@pytest.mark.parametrize(
    ("text", "number"),
    [("5e-7", 5e-7), ("1e-6", 1e-6), ("2e8", 2e8), ("5.0e8", 5e8), ("-.5E+3", -500.0), ("1_000", 1000)],
)
def test_numbers_are_numbers_in_files_and_flags(folder: Path, text: str, number: float) -> None:
    file = write(MINIMAL + f"engine:\n  deepspeed: {{a: {{b: {text}}}}}\n")
    for config in (
        load_config([file], []),
        flags("--engine.deepspeed", f"{{a: {{b: {text}}}}}"),
        flags("--engine.deepspeed.a.b", text),
        flags(f"--engine.deepspeed.a.b={text}"),
    ):
        value = config.engine.deepspeed["a"]["b"]
        assert value == number
        assert not isinstance(value, str)


def test_scalars_are_those_of_yaml_1_2() -> None:
    texts = ["no", "off", "2026-01-01", "010", "0x1F", "1:30", "~", "true", ".inf", "1e5", "e5", "1.2.3", "."]
    values = ["no", "off", "2026-01-01", 10, 31, "1:30", None, True, float("inf"), 1e5, "e5", "1.2.3", "."]
    assert [parse_scalar(text) for text in texts] == values


def test_free_mappings_are_merged_by_key() -> None:
    config = flags(
        "--engine.deepspeed",
        '{"a": {"b": 1}}',
        "--engine.deepspeed.a.c-d",
        "x",
        "--engine.deepspeed",
        "{e: 2}",
    )
    assert config.engine.deepspeed == {"a": {"b": 1, "c-d": "x"}, "e": 2}
    assert flags("--data.columns.prompt", "question").data.columns == {"prompt": "question"}


def test_dashes_and_underscores_are_the_same_in_names() -> None:
    assert (
        flags("--run.global-batch", "8").run.global_batch
        == flags("--run.global_batch", "8").run.global_batch
        == 8
    )


def test_a_bare_flag_is_true_and_takes_a_value_too() -> None:
    assert flags("--run.use_gpu", "--run.seed", "1").run.use_gpu
    assert not flags("--run.use_gpu", "false").run.use_gpu
    assert flags("--run.use_gpu", "yes").run.use_gpu


@pytest.mark.parametrize(
    ("text", "value"), [("10", 10), ("1e1", 10), ("0.25", 0.25), ("epoch", "epoch"), ("null", None)]
)
def test_intervals_are_steps_shares_or_epochs(folder: Path, text: str, value: Any) -> None:
    found = flags("--run.save_steps", text).run.save_steps
    assert (found, type(found)) == (value, type(value))
    file = write(MINIMAL + f"run: {{eval_steps: {text}}}\n")
    assert load_config([file]).run.eval_steps == value


def test_beta_alone_keeps_the_kind(folder: Path) -> None:
    assert flags("--loss.beta", "3").loss == SimPOLoss(beta=3)
    file = write(MINIMAL + "loss: {kind: cpo, cpo_alpha: 0.5}\n")
    assert load_config([file], ["--loss.beta", "3"]).loss == CPOLoss(beta=3, cpo_alpha=0.5)


def test_an_empty_section_is_its_defaults(folder: Path) -> None:
    assert load_config([write(MINIMAL + "loss:\nrun:\n")], []) == flags()


def test_sub_models_are_made_and_unset(folder: Path) -> None:
    assert flags("--model.lora.r", "8").model.lora == LoraConfig(r=8)
    assert flags("--model.lora", '{"r": 8}', "--model.lora.lora_alpha", "4").model.lora == LoraConfig(
        r=8, lora_alpha=4
    )
    file = write("model: {path: m, lora: {r: 8}}\ndata: {train: a}\n")
    assert load_config([file], ["--model.lora", "null"]).model.lora is None


@pytest.mark.parametrize(
    ("given", "sources"),
    [
        (["a.jsonl"], "a.jsonl"),
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (['["a", "b"]'], ["a", "b"]),
        (["x,y.jsonl"], "x,y.jsonl"),
        (["part-{0,1}.jsonl"], "part-{0,1}.jsonl"),
        (["x,y.jsonl", "z"], ["x,y.jsonl", "z"]),
        (["[01].jsonl"], "[01].jsonl"),
        (["{a,b}.jsonl"], "{a,b}.jsonl"),
        (['"a'], '"a'),
        (["a", '{"path": "b"}', '["c"]'], ["a", Source(path="b"), "c"]),
        (["null", "a", "b"], ["a", "b"]),
        (['{"path": "a", "rows": 3}'], Source(path="a", rows=3)),
        (["-a.jsonl"], "-a.jsonl"),
        (['[{"path": "a", "weight": 5e-1}, "b"]'], [Source(path="a", weight=0.5), "b"]),
    ],
)
def test_lists_by_repetition_or_json(given: list[str], sources: Any) -> None:
    words = [word for value in given for word in ("--data.train", value)]
    assert load_config([], ["--model.path", "m", *words]).data.train == sources


def test_named_evaluation_sets() -> None:
    expected = {"chat": "x.jsonl", "code": "y.jsonl"}
    assert flags("--data.eval.chat", "x.jsonl", "--data.eval.code", "y.jsonl").data.eval == expected
    assert flags("--data.eval", '{"chat": "x.jsonl", "code": "y.jsonl"}').data.eval == expected


def test_a_source_as_a_mapping() -> None:
    plain, limited = flags("--data.train", "{path: b.jsonl, rows: 5}").data.train_sources
    assert (plain.path, limited.path, limited.rows) == ("a.jsonl", "b.jsonl", 5)


def test_values_that_look_like_something_else() -> None:
    assert flags("--data.chat_template", "{{ messages, 1 }}").data.chat_template == "{{ messages, 1 }}"
    assert flags("--run.name", "2026").run.name == "2026"
    assert flags("--engine.zero_stage", "3").engine.zero_stage == 3
    for words in (
        ["--optim.betas", "[0.9, 0.95]"],
        ["--optim.betas=0.9,0.95"],
        ["--optim.betas", ".9", "--optim.betas", "95e-2"],
    ):
        assert flags(*words).optim.betas == (0.9, 0.95)
    for words in (["--run.num_workers=[2,8]"], ["--run.num_workers", "2,8"], ["--run.num_workers", "[2, 8]"]):
        assert flags(*words).run.num_workers == (2, 8)
    assert flags("--run.num_workers", "[2, 8]", "--run.num_workers", "4").run.num_workers == 4
    assert flags("--model.lora.modules_to_save", "embed,head").model.lora == LoraConfig(
        modules_to_save=["embed", "head"]
    )
    assert flags("--data.max_prompt_length", "null").data.max_prompt_length is None


def test_base_lies_under_everything() -> None:
    config = load_config([], ["--model.path", "m"], base={"data": {"train": []}})
    assert config.data.train_sources == ()


def test_anchors_and_merge_keys(folder: Path) -> None:
    text = "model: {path: m}\ndata: {train: a}\nengine:\n  deepspeed:\n    a: &x {lr: 1e-3}\n    b: {<<: *x, c: 1}\n"
    assert load_config([write(text)], []).engine.deepspeed == {"a": {"lr": 1e-3}, "b": {"lr": 1e-3, "c": 1}}


# --- Writing ---


def test_dump_reads_back_equal(folder: Path) -> None:
    config = flags(
        *(
            "--loss.kind",
            "cpo_simpo",
            "--optim.learning_rate",
            "5e-7",
            "--run.name",
            "1e5",
            "--model.lora.r",
            "2",
        ),
        *("--engine.deepspeed", "{a: 5.0e8, b: yes, c: '2e8', d: null}", "--data.columns.prompt", "no"),
    )
    text = dump_yaml(config)
    assert load_config([write(text)], []) == config
    # Other readers, of YAML 1.1, see the same text in the same places.
    assert yaml.safe_load(text)["data"]["columns"] == {"prompt": "no"}
    assert yaml.safe_load(text)["engine"]["deepspeed"]["c"] == "2e8"


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12))
def test_any_text_survives_the_dump(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    config = flags()
    config = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": text})})
    path = tmp_path_factory.mktemp("dump") / "run.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config([path], []).data.chat_template == text


def test_schema_names_every_section() -> None:
    schema = config_schema()
    assert list(schema["properties"]) == list(sections())
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["SimPOLoss"]["properties"]["beta"]["default"] == 2.0


# --- Names ---


def test_options_are_the_leaves_of_the_tree() -> None:
    dumped = flags().model_dump()
    leaves = {
        f"{section}.{name}" for section, values in dumped.items() if section != "loss" for name in values
    }
    assert leaves <= options().keys()
    assert options()["loss.gamma_beta_ratio"].kinds == ("simpo", "cpo_simpo")
    assert options()["loss.beta"].defaults == {"simpo": 2.0, "cpo": 0.1, "cpo_simpo": 2.0, "ipo": 0.1}
    assert options()["loss.kind"].choices == ("simpo", "cpo", "cpo_simpo", "ipo")
    assert options()["data.train"].required
    assert all(option.kinds or not option.name.startswith("loss.") for option in options().values())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("loss.bata", ["loss.beta"]),
        ("loss.learning_rate", ["optim.learning_rate"]),
        ("beta", ["loss.beta"]),
        ("lr", ["optim.learning_rate"]),
        ("loss.gamma", ["loss.gamma_beta_ratio"]),
        ("run.kind", ["loss.kind", "engine.kind"]),
        ("run.global-bach", ["run.global_batch"]),
        ("optm.learning_rate", ["optim.learning_rate"]),
        ("zzzzzz", []),
    ],
)
def test_nearest_fields(typed: str, meant: list[str]) -> None:
    assert nearest_fields(typed, list(options())) == meant


def test_split_flags_leaves_the_rest_in_order() -> None:
    rest, found = split_flags(
        ["a", "--loss.beta", "-3", "-c", "x.yaml", "--loss", "{}", "--run.use_gpu", "--json"]
    )
    assert rest == ["a", "-c", "x.yaml", "--json"]
    assert found == ["--loss.beta=-3", "--loss={}", "--run.use_gpu"]


# --- Mistakes in files ---


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("loss:\n  bata: 3", "run.yaml:6: loss.bata is not a field. Did you mean loss.beta?"),
        (
            "loss:\n  learning_rate: 3",
            "run.yaml:6: loss.learning_rate is not a field. Did you mean optim.learning_rate?",
        ),
        ("beta: 3", "run.yaml:5: beta is not a field. Did you mean loss.beta?"),
        ("zzz: {}", "run.yaml:5: zzz is not a field. `ray-prefopt train --help` lists the fields."),
        ("loss.beta: 3", "run.yaml:5: loss.beta is a field, but not in one key: write {loss: {beta: ...}}"),
        ("loss: {alpha: .nan}", "run.yaml:5: loss.alpha must be a finite number; got NaN"),
        ("run: {storage_path: ''}", 'run.yaml:5: run.storage_path must be text that is not empty; got ""'),
        (
            "optim: {betas: [2, .inf]}",
            "run.yaml:5: optim.betas[0] must be < 1; got 2\n"
            "run.yaml:5: optim.betas[1] must be a finite number; got Infinity",
        ),
        ("los: {}", "run.yaml:5: los is not a field. Did you mean loss?"),
        (
            "loss: {kind: cpo, gamma_beta_ratio: 1}",
            "run.yaml:5: loss.gamma_beta_ratio is not a field of loss.kind cpo; "
            "the kinds that have it: simpo, cpo_simpo",
        ),
        (
            "loss: {kind: simp}",
            'run.yaml:5: loss.kind must be one of simpo, cpo, cpo_simpo, ipo; got "simp". Did you mean simpo?',
        ),
        ("loss: 3", "run.yaml:5: loss must be a mapping; got 3"),
        ("loss: {beta: high}", 'run.yaml:5: loss.beta must be a number; got "high"'),
        ("loss: {beta: 0}", "run.yaml:5: loss.beta must be > 0; got 0"),
        ("loss: {beta: true}", "run.yaml:5: loss.beta must be a number; got true"),
        ("run: {micro_batch: true}", "run.yaml:5: run.micro_batch must be an integer; got true"),
        ("run: {micro_batch: 1.5}", "run.yaml:5: run.micro_batch must be an integer; got 1.5"),
        ("run: {name: 2026}", "run.yaml:5: run.name must be text; got 2026"),
        ("run: {name: true}", "run.yaml:5: run.name must be text; got true"),
        ("run: {use_gpu: 3}", "run.yaml:5: run.use_gpu must be true or false; got 3"),
        ("run: {seed: null}", "run.yaml:5: run.seed must be an integer; got nothing"),
        (
            "run: {name: ../b}",
            "run.yaml:5: run.name must be a folder name of letters, digits, '.', '_' and '-'; got '../b'",
        ),
        ("engine: {zero_stage: 4}", "run.yaml:5: engine.zero_stage must be one of 0, 1, 2, 3; got 4"),
        ("engine: {deepspeed: []}", "run.yaml:5: engine.deepspeed must be a mapping; got []"),
        (
            "engine:\n  offload_param: cpu",
            "run.yaml:6: engine: offload_param needs zero_stage 3; got zero_stage 2",
        ),
        ("optim: {betas: [0.9]}", "run.yaml:5: optim.betas is too short; got [0.9]"),
        ("optim: {betas: [0.9, x]}", 'run.yaml:5: optim.betas[1] must be a number; got "x"'),
        ("optim: {betas: [1, 2, 3]}", "run.yaml:5: optim.betas must be a list of 2; got [1, 2, 3]"),
        ("run: {num_workers: 0}", "run.yaml:5: run.num_workers must be >= 1 or a list; got 0"),
        ("run: {num_workers: [0, 2]}", "run.yaml:5: run.num_workers[0] must be >= 1; got 0"),
        (
            "run: {num_workers: [4, 2]}",
            "run.yaml:5: run.num_workers must be the fewest and the most workers, in this order; got [4, 2]",
        ),
        ("run: {num_workers: x}", 'run.yaml:5: run.num_workers must be an integer or a list; got "x"'),
        (
            "optim: {schedule: linear, schedule: cosine}",
            "run.yaml:5: optim.schedule is given twice, first in line 5; keep one",
        ),
        (
            "loss:\n  beta: 1\n  kind: cpo\n  beta: 2",
            "run.yaml:8: loss.beta is given twice, first in line 6; keep one",
        ),
        ("engine: {deepspeed: {a: {1: 2}}}", "run.yaml:5: a key must be text; got '1', put it in quotes"),
    ],
)
def test_mistakes_in_files(folder: Path, lines: str, message: str) -> None:
    assert file_refusal(MINIMAL + lines + "\n") == message


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("3", "data.train must be text or a mapping or a list; got 3"),
        ("[3]", "data.train[0] must be text or a mapping; got 3"),
        ("[{path: a, wieght: 2}]", "data.train[0].wieght is not a field. Did you mean data.train[0].weight?"),
        ("{path: a, weight: -1}", "data.train.weight must be > 0; got -1"),
        ("[a, {rows: 3}]", "data.train[1] lacks path"),
        ("a, eval: {x: {path: b, rows: many}}", 'data.eval.x.rows must be an integer; got "many"'),
        ("a, eval: {x: {pth: b}}", "data.eval.x.pth is not a field. Did you mean data.eval.x.path?"),
        ("[a, '']", 'data.train[1] must be text that is not empty; got ""'),
        ("a, eval: {x: 3}", "data.eval.x must be text or a mapping or a list; got 3"),
        (
            "a, columns: {promt: q}",
            "data.columns.promt is not a key of data.columns; its keys are 'prompt', 'chosen' or 'rejected'",
        ),
        (
            "a, max_length: 8",
            "data: max_prompt_length (512) must be smaller than max_length (8), or no completion would fit",
        ),
    ],
)
def test_mistakes_in_sources(folder: Path, train: str, message: str) -> None:
    assert file_refusal(f"model: {{path: m}}\ndata: {{train: {train}}}\n") == f"run.yaml:2: {message}"


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    told = file_refusal(MINIMAL + "loss: {beta: x}\nrun: {sed: 1, micro_batch: true}\n").splitlines()
    assert sorted(told) == [
        'run.yaml:5: loss.beta must be a number; got "x"',
        "run.yaml:6: run.micro_batch must be an integer; got true",
        "run.yaml:6: run.sed is not a field. Did you mean run.seed?",
    ]


def test_a_mistyped_required_field_is_not_also_missing(folder: Path) -> None:
    told = file_refusal("model: {path: m}\ndata: {trian: a}\n")
    assert told == "run.yaml:2: data.trian is not a field. Did you mean data.train?"


def test_what_a_run_cannot_do_without() -> None:
    with pytest.raises(ConfigError) as error:
        load_config([], [])
    assert str(error.value).splitlines() == [
        "set model.path (a folder or hub id), or model.from_config (an architecture to initialise)",
        "data.train is missing: set it in a file or with --data.train",
    ]


def test_the_file_that_had_the_last_word_is_named(folder: Path) -> None:
    first = write(MINIMAL + "loss: {beta: 1}\n", "a.yaml")
    second = write("loss:\n\n  beta: -1\n", "b.yaml")
    with pytest.raises(ConfigError, match=r"^b\.yaml:3: loss\.beta must be > 0; got -1$"):
        load_config([first, second], [])
    with pytest.raises(ConfigError, match=r"^--loss\.beta must be > 0; got -2$"):
        load_config([first, second], ["--loss.beta", "-2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config file run.yaml is empty; it needs at least `model:` and `data:`, or leave it out"),
        (
            "# nothing\n",
            "config file run.yaml is empty; it needs at least `model:` and `data:`, or leave it out",
        ),
        ("- a\n", "config file run.yaml must hold sections such as `model:` and `data:`; got a list"),
        ("hello", "config file run.yaml must hold sections such as `model:` and `data:`; got 'hello'"),
        (
            "a: [\n",
            "run.yaml:2: this is not YAML: expected the node content, but found '<stream end>'; check indentation",
        ),
        (
            "a: 1\n b: 2\n",
            "run.yaml:2: this is not YAML: mapping values are not allowed here; check indentation",
        ),
        (
            "a: !!python/object:os.system {}\n",
            "run.yaml:1: this is not YAML: could not determine a constructor for the tag",
        ),
        (
            "model:\n\tpath: m\n",
            "run.yaml:2: this is not YAML: found character '\\t' that cannot start any token; indent with spaces",
        ),
        ("a: *b\n", "run.yaml:1: this is not YAML: found undefined alias 'b'; check indentation"),
        ("a: &b {c: *b}\n", "config file run.yaml: an alias stands inside of what it names; write it out"),
        ("a: \x01\n", "run.yaml: this is not YAML"),
        (
            "a: !!float b\n",
            "run.yaml: this is not YAML: could not convert string to float: 'b'; check indent",
        ),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: this is not YAML: but found another document"),
    ],
)
def test_what_is_no_config_file(folder: Path, text: str, message: str) -> None:
    assert file_refusal(text).startswith(message)


def test_files_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config file none\.yaml does not exist; the working directory is /"
    ):
        load_config(["none.yaml"], [])
    with pytest.raises(
        ConfigError, match=r"config file \. cannot be read: Is a directory; give a YAML file in UTF-8"
    ):
        load_config([Path()], [])
    Path("latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml cannot be read: .*; give a YAML file in UTF-8"):
        load_config([Path("latin.yaml")], [])


# --- Mistakes in flags ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--loss.bata 3", "--loss.bata is not a field. Did you mean --loss.beta?"),
        ("--optim.lr=3", "--optim.lr is not a field. Did you mean --optim.learning_rate?"),
        ("--beta 3", "--beta is not a flag of the config. Did you mean --loss.beta?"),
        (
            "pairs.jsonl",
            "pairs.jsonl is not a flag of the config. `ray-prefopt train --help` lists the fields.",
        ),
        ("--data.train.path x", "--data.train.path is not a field: set --data.train as a whole"),
        ("--loss.beta.x 3", "--loss.beta.x is not a field: set --loss.beta as a whole"),
        ("--zzz.qqq 3", "--zzz.qqq is not a field. `ray-prefopt train --help` lists the fields."),
        (
            "--data.eval x --data.eval.chat y",
            "--data.eval=x and --data.eval.chat=y contradict each other; leave one out",
        ),
        (
            "--loss.kind SimPO",
            '--loss.kind must be one of simpo, cpo, cpo_simpo, ipo; got "SimPO". Did you mean simpo?',
        ),
        ("--optim.learning_rate nan", '--optim.learning_rate must be a finite number; got "nan"'),
        ("--optim.learning_rate 5e-7x", '--optim.learning_rate must be a number; got "5e-7x"'),
        ("--loss.beta=", "--loss.beta must be a number; got nothing"),
        ("--model.tokenizer=", '--model.tokenizer must be text that is not empty; got ""'),
        ("--run.use_gpu maybe", '--run.use_gpu must be true or false; got "maybe"'),
        ("--model.path", "--model.path needs a value: --model.path VALUE"),
        ("--loss.beta --run.seed 1", "--loss.beta needs a value: --loss.beta VALUE"),
        ("--loss.beta high", '--loss.beta must be a number; got "high"'),
        ("--run.global-batch 0", "--run.global_batch must be >= 1; got 0"),
        ("--run.save_steps 0", "--run.save_steps must be >= 1 or > 0 or one of epoch; got 0"),
        (
            "--run.save_steps epoc",
            '--run.save_steps must be an integer or a number or one of epoch; got "epoc". Did you mean epoch?',
        ),
        ("--engine.zero_stage x", '--engine.zero_stage must be one of 0, 1, 2, 3; got "x"'),
        (
            "--data.format standart",
            '--data.format must be one of auto, standard, conversational; got "standart". Did you mean standard?',
        ),
        (
            "--loss.kind cpo --loss.gamma_beta_ratio 0.3",
            "--loss.gamma_beta_ratio is not a field of loss.kind cpo; the kinds that have it: simpo, cpo_simpo",
        ),
        (
            "--engine.offload_param cpu",
            "--engine.offload_param: engine: offload_param needs zero_stage 3; got zero_stage 2",
        ),
        ("--engine.deepspeed 3", "--engine.deepspeed must be a mapping such as '{key: value}'; got '3'"),
        (
            "--engine.deepspeed {a:1}",
            "--engine.deepspeed needs a space after each colon, or JSON with quoted keys; got '{a:1}'",
        ),
        (
            "--data.columns.promt q",
            "--data.columns.promt is not a key of data.columns; its keys are 'prompt', 'chosen' or 'rejected'",
        ),
        ("--loss [", "--loss must be a mapping such as '{key: value}'; got '['"),
        (
            "--model.lora null --model.lora.r 3",
            "--model.lora=null and --model.lora.r=3 contradict each other; leave one out",
        ),
        ("--model.lora 3", "--model.lora must be a mapping such as '{key: value}'; got '3'"),
        (
            "--optim.betas [0.9",
            '--optim.betas must be a list; got "[0.9"',
        ),
        ("--loss null --loss.beta 3", "--loss=null and --loss.beta=3 contradict each other; leave one out"),
        ("--model.lora.rank 3", "--model.lora.rank is not a field. Did you mean --model.lora.r?"),
    ],
)
def test_mistakes_in_flags(given: str, message: str) -> None:
    assert refusal(*given.split(" ")) == message


def test_no_message_speaks_of_pydantic(folder: Path) -> None:
    for lines in (
        "loss: {beta: x}",
        "optim: {betas: x}",
        "data2: 1",
        "engine: {zero_stage: []}",
        "model: {path: [1]}",
    ):
        text = MINIMAL.replace("model:\n  path: m\n", "") if lines.startswith("model") else MINIMAL
        told = file_refusal(text + lines + "\n")
        assert "pydantic" not in told
        assert "Input should" not in told
