"""What the documentation says is so: fields, commands, configs, rows, messages, modules and links exist."""

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

import ray_prefopt
from ray_prefopt.cli import COMMANDS
from ray_prefopt.config import CPOLoss, CPOSimPOLoss, IPOLoss, RunConfig, SimPOLoss
from ray_prefopt.data.formats import ChatTemplate, PreferencePair, to_pair
from ray_prefopt.data.tokenization import LengthLimits, TokenizedPair, tokenize_pairs
from ray_prefopt.options import options, sections
from ray_prefopt.settings import load_config, load_tune_config, split_flags
from ray_prefopt.training.folder import MAY_CHANGE
from ray_prefopt.training.metrics import METRICS
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("cluster/*.md")])
BASE = {"model": {"path": "some/model"}, "data": {"train": "pairs.jsonl"}}
"""What an excerpt of a config leaves out."""


@dataclass(frozen=True)
class Fence:
    """A block of code in a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fences(*languages: str) -> list[Fence]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Fence(page, line, match[1], match[2]))
    return [fence for fence in found if fence.language in languages]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[ParameterSet]:
    """The arguments of every `ray-prefopt` line in the pages and in comments of the examples."""
    sources = [(str(fence), fence.text) for fence in fences("bash")]
    for path in sorted(ROOT.glob("examples/*.yaml")):
        comments = "\n".join(re.findall(r"^#.*?(ray-prefopt .*)$", path.read_text(), re.MULTILINE))
        sources.append((path.name, comments))
    for where, text in sources:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "ray-prefopt" in words:
                yield pytest.param(words[words.index("ray-prefopt") + 1 :], id=f"{where} {line.strip()[:60]}")


def test_there_is_something_to_test() -> None:
    assert len(PAGES) > 12
    assert len(list(commands())) > 20
    assert len(fences("yaml")) > 1
    assert len(fences("python")) > 1


# --- config ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_exist(page: Path) -> None:
    names = re.findall(rf"`((?:{'|'.join(sections())})\.[a-z_.]*[a-z_])(?:: [^`]+)?`", prose(page))
    known = {*options(), *(f"{name}." for name in sections())}
    unknown = [name for name in names if name not in known and not is_file_or_key(name)]
    assert unknown == []


def is_file_or_key(name: str) -> bool:
    """`model.safetensors`; a key inside of a mapping such as engine.deepspeed."""
    parent = name.rpartition(".")[0]
    return name.endswith((".safetensors", ".jsonl", ".yaml")) or (
        parent in options() and options()[parent].is_mapping
    )


def test_the_page_of_all_fields_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("config_page", ROOT / "docs" / "config_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run `python docs/config_page.py`"
    named = re.findall(r"^\| `(\w+\.[\w.]+)` \|", module.page(), re.MULTILINE)
    assert named == list(options())


def test_the_table_of_defaults_is_that_of_the_config() -> None:
    losses = {loss.kind: loss for loss in (SimPOLoss(), CPOLoss(), CPOSimPOLoss(), IPOLoss())}
    text = (ROOT / "docs" / "losses.md").read_text()
    section = text.partition("## Defaults")[2].partition("## ")[0]
    head, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    kinds = [cell.strip(" `") for cell in head.strip("|").split("|")[1:]]
    table = {}
    for row in rows:
        name, *cells = (cell.strip(" `") for cell in row.strip("|").split("|"))
        table[name] = dict(zip(kinds, cells, strict=True))
    fields = {name for name in options() if name.startswith("loss.") and name != "loss.kind"}
    assert table == {
        name: {kind: str(getattr(loss, name[5:], "")) for kind, loss in losses.items()} for name in fields
    }


@pytest.mark.parametrize("fence", fences("yaml"), ids=str)
def test_configs_load(fence: Fence, tmp_path: Path) -> None:
    path = tmp_path / "excerpt.yaml"
    path.write_text(fence.text)
    load = load_tune_config if re.search("^search:", fence.text, re.MULTILINE) else load_config
    load([path], base=BASE)


@pytest.mark.parametrize("words", list(commands()))
def test_command_lines_parse(words: list[str]) -> None:
    name, *given = words
    if COMMANDS[name].takes_command:
        end = given.index("--")
        test_command_lines_parse(given[end + 1 :])
        given = given[:end]
    own, flags = split_flags(given)
    args = COMMANDS[name].parser(name).parse_args(own)
    if COMMANDS[name].sections:
        own_files = [ROOT / path for path in args.config if str(path).startswith("examples/")]
        base = {} if own_files else BASE
        if name == "evaluate":
            base = {"data": {"train": []}}
            flags += [f"--model.path={args.model or 'some/model'}"]
        if name == "tune":
            load_tune_config(
                own_files, flags, base=base if own_files else {**BASE, "search": {"preset": "simpo"}}
            )
        else:
            load_config(own_files, flags, base=base)
    else:
        assert flags == []


def test_all_commands_and_exit_codes_have_a_row() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    rows = re.findall(r"^\| `?(\w+)`? \| (.*) \|$", text, re.MULTILINE)
    assert [name for name, _ in rows if name in COMMANDS] == list(COMMANDS)
    assert [code for code, _ in rows if code.isdigit()] == ["0", "1", "2", "3", "4", "130", "141"]


def test_what_a_resumed_run_may_change_is_listed() -> None:
    text = " ".join((ROOT / "docs" / "training.md").read_text().split())
    after = text.partition("except for fields that do not change which step does what:")[2]
    listed = after.partition(". `")[0]
    assert set(re.findall(r"`run\.(\w+)`", listed)) == MAY_CHANGE


def test_all_metrics_are_explained() -> None:
    text = (ROOT / "docs" / "training.md").read_text().partition("## Metrics")[2]
    named = re.findall(r"`([\w/]+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))
    timed = ["grad_norm", "learning_rate", "epoch", "pairs_per_second", "tokens_per_second", "data_wait"]
    timed += ["num_input_tokens_seen"]
    assert sorted(named) == sorted([*METRICS, *timed])


# --- data ---


@pytest.mark.parametrize("fence", fences("json"), ids=str)
def test_example_rows_are_pairs(fence: Fence) -> None:
    tokenizer = tiny_tokenizer("qwen")
    limits = LengthLimits(1024, 512, None, "keep_end")
    for line in fence.text.splitlines():
        pair = to_pair(
            json.loads(line), ChatTemplate(tokenizer), form="auto", columns={}, assistant_header="trl"
        )
        assert isinstance(pair, PreferencePair), pair
        (tokenized,) = tokenize_pairs([pair], tokenizer, limits)
        assert isinstance(tokenized, TokenizedPair)
        assert tokenized.truncated == ()


def test_all_reasons_to_drop_a_row_are_explained() -> None:
    text = (ROOT / "docs" / "data.md").read_text().partition("## What is dropped")[2]
    explained = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))
    assert sorted(explained) == sorted(set(reasons()))


def reasons() -> Iterator[str]:
    """The first argument of every Skipped and _RowError."""
    for path in (ROOT / "ray_prefopt" / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Skipped", "_RowError"):
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    yield str(first.value)


# --- messages, code, links ---


def messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)


def said() -> str:
    """All text in the package, with `...` for what is filled in."""
    texts = []
    for path in (ROOT / "ray_prefopt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_are_those_of_the_code() -> None:
    text = said()
    unknown = [
        message
        for message in messages()
        if not all(part in text for part in re.split(r"\.{3,4}", message.removesuffix(".")) if part.strip())
    ]
    assert len(messages()) > 25
    assert unknown == []


@pytest.mark.parametrize("fence", fences("python"), ids=str)
def test_code_compiles_and_its_imports_are_there(fence: Fence) -> None:
    for node in ast.walk(ast.parse(fence.text)):
        if isinstance(node, ast.ImportFrom) and node.module == "ray_prefopt":
            assert {alias.name for alias in node.names} <= set(ray_prefopt.__all__)


def test_the_tour_names_modules_that_exist_and_all_of_them() -> None:
    tour = (ROOT / "CONTRIBUTING.md").read_text().partition("## Running")[0]
    named = {
        name
        for line in re.findall(r"^\d\..*(?:\n   .*)*", tour, re.MULTILINE)
        for name in re.findall(r"`([a-z_/]+)`", line)
    }
    modules = {
        path.relative_to(ROOT / "ray_prefopt").with_suffix("").as_posix()
        for path in (ROOT / "ray_prefopt").rglob("*.py")
        if not path.stem.startswith("__")
    }
    folders = {name for name in named if name.endswith("/")}
    missing = {name for name in modules - named if not name.startswith(tuple(folders))}
    assert (missing, named - modules - folders) == (set(), set())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


def test_the_readme_says_how_often_a_run_is_saved() -> None:
    assert f"one every {RunConfig().save_steps} steps (`run.save_steps`)" in (ROOT / "README.md").read_text()


def test_pages_are_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme] == []
