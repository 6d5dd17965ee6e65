"""Prepare on a real Ray: what the blocks hold, when they are found, and what is refused.

Every character is a token here, so that lengths and counts can be read off the rows.
"""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext, ExecutionResources
from ray.exceptions import RayTaskError
from transformers import NllbTokenizer

from ray_prefopt.allocator import allocator
from ray_prefopt.config import DataConfig, ModelConfig, TrainConfig
from ray_prefopt.data import prepare as prepare_module
from ray_prefopt.data.blocks import Blocks, read_block
from ray_prefopt.data.chunks import Report
from ray_prefopt.data.prepare import find_blocks, prepare
from ray_prefopt.errors import DataError, ResourceError
from ray_prefopt.training.job import make_plan
from tests.tiny import CHATML, chat_row, merge_tokenizer, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .-_"
EOS = "<eos>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    merge_tokenizer(LETTERS, [], eos_token=EOS, pad_token=EOS).save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Blocks]:
    """`prepare` of `train` and other fields of `data`, silently, from a working directory with the files."""
    monkeypatch.chdir(tmp_path)

    def make(train: Any, *, chunk_rows: int = 2, progress: bool = False, **fields: Any) -> Blocks:
        data = DataConfig.model_validate({"train": train, **fields})
        model = model_with(tokenizer)
        return prepare(
            data, model, data.train_sources, str(tmp_path / "store"), chunk_rows=chunk_rows, progress=progress
        )

    return make


Make = Callable[..., Blocks]


def model_with(tokenizer: str, kind: str = "qwen2") -> ModelConfig:
    return ModelConfig(from_config=tiny_config(kind), tokenizer=tokenizer)


def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_lines(name: str, *rows: dict[str, Any] | str) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows)
    data = text.encode()
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def texts(blocks: Blocks) -> list[str]:
    """`prompt|chosen|rejected` of every pair, in order."""
    words = [*LETTERS, "$"]

    def text(ids: list[int]) -> str:
        return "".join(words[number] for number in ids)

    return [
        "|".join(
            text(ids)
            for ids in (
                pair["chosen"][: pair["chosen_start"]],
                pair["chosen"][pair["chosen_start"] :],
                pair["rejected"][pair["rejected_start"] :],
            )
        )
        for index in range(len(blocks.files))
        for pair in read_block(blocks, index).to_pylist()
    ]


def never(*_args: Any) -> NoReturn:
    raise AssertionError("this must not run")


# --- what the blocks hold ---


def test_every_source_form_and_number(make: Make, tmp_path: Path) -> None:
    """Seven sources; what is taken of them, in which order, and every number of the manifest, counted by hand."""
    write_lines("a.jsonl.gz", row("q", "yes", "no"), "{oops", row("q2", "x", "x"), row("q3", "", "no"))
    Path("b.json").write_text(json.dumps([row(f"b{i}", "r", "s") for i in range(5)]))
    pq.write_table(pa.Table.from_pylist([row("c0", "r", "s"), row("c1", "rr", "ss")]), "c.parquet")
    Path("d.csv").write_text("prompt,chosen,rejected\nd0,r,s\nd1,r,s\nd2,r,s\n")
    datasets.Dataset.from_list([row("e0", "r", "s"), row("e1", "r", "s")]).save_to_disk("e")
    for name in ("f-2", "f-1"):
        write_lines(f"{name}.jsonl", row(name, "r", "s"))
    write_lines("g.jsonl", row("a long prompt", "a long answer", "short"))

    blocks = make(
        [
            "a.jsonl.gz",
            {"path": "b.json", "weight": 0.5},
            {"path": "c.parquet", "weight": 2},
            {"path": "d.csv", "rows": 2},
            "e",
            "f-*.jsonl",
            str(tmp_path / "g.jsonl"),
        ],
        max_length=16,
        max_prompt_length=6,
        max_bad_fraction=0.2,
    )
    assert (
        texts(blocks)
        == [
            *("q|yes$|no$", "q2|x$|x$"),
            *("b1|r$|s$", "b3|r$|s$"),  # every other of five
            *("c0|r$|s$", "c0|r$|s$", "c1|rr$|ss$", "c1|rr$|ss$"),
            *("d0|r$|s$", "d1|r$|s$"),
            *("e0|r$|s$", "e1|r$|s$"),
            *("f-1|r$|s$", "f-2|r$|s$"),
            "prompt|a long ans|short$",  # 13 + 14 tokens: the prompt is cut to its last 6, the answer to what is left
        ]
    )
    assert blocks.num_pairs == 15
    assert blocks.lengths.chosen.tolist() == [5, 4, 4, 4, 4, 4, 5, 5, 4, 4, 4, 4, 5, 5, 16]
    assert blocks.rejected_lengths.tolist() == [3, 2, 2, 2, 2, 2, 3, 3, 2, 2, 2, 2, 2, 2, 6]
    assert blocks.manifest["counts"] == {
        "rows": 18,  # 4 + 5 + 2 + 2 + 2 + 2 + 1, of which d.csv gives its first two
        "taken": 17,
        "pairs": 15,
        "ties": 1,
        "dropped": {
            "empty_completion": {
                "count": 1,
                "examples": [{"at": f"{tmp_path}/a.jsonl.gz:4", "detail": "'chosen' is the empty string"}],
            },
            "malformed_json": {
                "count": 1,
                "examples": [
                    {
                        "at": f"{tmp_path}/a.jsonl.gz:2",
                        "detail": "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
                    }
                ],
            },
        },
        "truncated": {"prompt": 1, "chosen": 1, "rejected": 0},
    }
    # The value that half, 95 %, ... of the 15 pairs do not exceed: the 8th and the last of the sorted lengths.
    assert blocks.manifest["percentiles"] == {
        "prompt": {"p50": 2, "p95": 6, "p99": 6, "max": 6},
        "chosen": {"p50": 2, "p95": 10, "p99": 10, "max": 10},
        "rejected": {"p50": 2, "p95": 6, "p99": 6, "max": 6},
        "total": {"p50": 4, "p95": 16, "p99": 16, "max": 16},
    }
    assert all(rows <= 4 for _, rows in blocks.files)  # chunks of two rows, taken twice at most


def test_conversations_go_through_the_template(make: Make) -> None:
    write_lines("a.jsonl", *(chat_row(f"q{i}", "yes", "no") for i in range(3)))
    template = "{% for m in messages %}{{ m.role[0] + m.content + '.' }}{% endfor %}"
    template += "{% if add_generation_prompt %}a{% endif %}"
    blocks = make("a.jsonl", chat_template=template)
    assert texts(blocks) == [f"uq{i}.a|yes.$|no.$" for i in range(3)]


def test_the_order_is_that_of_the_rows_however_many_cpus(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"{i}", "r" * (i % 7 + 1), "s") for i in range(60)]
    write_lines("a-1.jsonl", *rows[:25])
    write_lines("a-2.jsonl", *rows[25:])
    expected = [f"{r['prompt']}|{r['chosen']}$|{r['rejected']}$" for r in rows]
    four = make("a-*.jsonl", chunk_rows=4)
    assert texts(four) == expected
    context = DataContext.get_current().copy()
    context.execution_options.resource_limits = ExecutionResources(cpu=1)
    with DataContext.current(context):
        one = make("a-*.jsonl", chunk_rows=5)
    assert texts(one) == expected
    assert one.folder != four.folder

    # Whatever finishes first:
    finish = prepare_module._run

    def backwards(*args: Any) -> Iterator[Report]:
        return iter(list(finish(*args))[::-1])

    monkeypatch.setattr(prepare_module, "_run", backwards)
    assert texts(make("a-*.jsonl", chunk_rows=6)) == expected


def test_tasks_have_our_allocator(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("a.jsonl", row("p", "c", "r"))
    library, tokenize = allocator().get("LD_PRELOAD", ""), prepare_module.tokenize_task

    def checked(*args: Any, **options: Any) -> dict[str, Any]:
        assert library in Path("/proc/self/maps").read_text()
        return tokenize(*args, **options)

    monkeypatch.setattr(prepare_module, "tokenize_task", checked)
    assert texts(make("a.jsonl")) == ["p|c$|r$"]


# --- when they are found ---


def test_a_second_call_finds_them(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines("a.jsonl", *(row(f"q{i}", "r", "s") for i in range(4)))
    first = make("a.jsonl", progress=True)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("prepared 4 pairs of 4 rows in ")
    assert told.endswith(f"pairs/s): {first.folder}")
    monkeypatch.setattr(prepare_module, "_run", never)
    second = make("a.jsonl", progress=True)
    assert (second.folder, second.manifest) == (first.folder, first.manifest)
    assert capsys.readouterr().err == f"blocks found: 4 pairs in {first.folder}\n"


def test_what_changes_the_blocks_changes_their_folder(make: Make, tmp_path: Path, tokenizer: str) -> None:
    write_lines("a.jsonl", row("q", "r", "s"))
    write_lines("b.jsonl", row("q", "r", "s"))

    def is_found(
        train: Any = "a.jsonl", tokenizer: str = tokenizer, kind: str = "qwen2", **fields: Any
    ) -> bool:
        data = DataConfig.model_validate({"train": train, **fields})
        model = model_with(tokenizer, kind)
        return find_blocks(data, model, data.train_sources, f"{tmp_path}/store") is not None

    assert not is_found()
    make("a.jsonl", chunk_rows=prepare_module.CHUNK_ROWS)
    assert is_found()
    assert is_found(max_bad_fraction=0.5, shuffle=False, shuffle_window=3, eval="b.jsonl")
    assert is_found(kind="llama")
    assert not is_found(kind="t5")
    for change in (
        {"train": "b.jsonl"},
        {"train": ["a.jsonl", "b.jsonl"]},
        {"train": {"path": "a.jsonl", "weight": 2}},
        {"train": {"path": "a.jsonl", "rows": 1}},
        {"max_length": 1000},
        {"max_prompt_length": 100},
        {"max_prompt_length": None},
        {"max_completion_length": 100},
        {"truncation_mode": "keep_start"},
        {"format": "standard"},
        {"columns": {"prompt": "prompt"}},
        {"assistant_header": "official"},
        {"chat_template": CHATML},
    ):
        assert not is_found(**change), change
    for letters, special in ((LETTERS + "#", EOS), (LETTERS, "<end>")):
        merge_tokenizer(letters, [], eos_token=special, pad_token=special).save_pretrained("other")
        assert not is_found(tokenizer=str(tmp_path / "other"))

    before = os.stat("a.jsonl")
    write_lines("a.jsonl", row("q", "r", "t"))  # as many bytes
    assert not is_found()
    write_lines("a.jsonl", row("q", "r", "s"))
    os.utime("a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_found()
    write_lines("a.jsonl", row("q", "r", "s"), row("q", "r", "s"))
    os.utime("a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not is_found()


def test_the_language_of_targets_changes_the_blocks(make: Make, tmp_path: Path) -> None:
    """It is in no file of the tokenizer but its settings."""
    write_lines("a.jsonl", row("q", "r", "s"))
    words = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "q", "r", "s"]
    vocabulary = {word: index for index, word in enumerate(words)}
    data = DataConfig(train="a.jsonl")
    folders = []
    for language in ("deu_Latn", "fra_Latn"):
        tokenizer = NllbTokenizer(vocab=vocabulary, merges=[], src_lang="eng_Latn", tgt_lang=language)
        tokenizer.save_pretrained(language)
        model = model_with(str(tmp_path / language), "t5")
        blocks = prepare(data, model, data.train_sources, str(tmp_path / "store"), progress=False)
        folders.append(blocks.folder)
        (pair,) = read_block(blocks, 0).to_pylist()
        english, target = tokenizer.convert_tokens_to_ids(["eng_Latn", language])
        assert pair["chosen"] == [english, 4, 5, 2, target, 4, 6, 2]
        assert pair["chosen_start"] == 4
    assert len(set(folders)) == 2


def test_a_template_that_writes_the_date_is_found_tomorrow(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed after midnight goes on with the pairs it began with."""
    write_lines("a.jsonl", chat_row("q", "r", "s"))
    template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    first = make("a.jsonl", chat_template=template)
    assert first.manifest["date"] == time.strftime("%Y-%m-%d")
    monkeypatch.setattr(prepare_module, "_run", never)
    assert make("a.jsonl", chat_template=template).folder == first.folder


# --- attempts that came to nothing ---


def test_blocks_without_a_manifest_are_not_there(make: Make) -> None:
    write_lines("a.jsonl", *(row(f"q{i}", "r", "s") for i in range(4)))
    killed = make("a.jsonl")
    Path(killed.folder, "manifest.json").unlink()
    old = Path(killed.folder, killed.manifest["attempt"])
    two_days_ago = time.time() - 2 * 86_400
    for path in old.iterdir():
        os.utime(path, (two_days_ago, two_days_ago))
    young = Path(killed.folder, "young")
    young.mkdir()
    (young / "part-000-00000-000000.parquet").write_bytes(b"half of a bl")

    blocks = make("a.jsonl")
    attempt = blocks.manifest["attempt"]
    assert attempt not in (old.name, "young")
    assert texts(blocks) == [f"q{i}|r$|s$" for i in range(4)]
    # What is a day old is dead; the young one may be another driver at work.
    assert sorted(path.name for path in Path(blocks.folder).iterdir()) == sorted(
        ["manifest.json", attempt, "young"]
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("no")])
def test_a_failed_attempt_leaves_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_lines("a.jsonl", row("q", "r", "s"))
    written: list[str] = []

    def fail(reports: Any) -> NoReturn:
        written.extend(report.block["file"] for report in reports)
        raise error

    monkeypatch.setattr(prepare_module, "_counts", fail)
    with pytest.raises(type(error)):
        make("a.jsonl")
    [folder] = Path("store/blocks").iterdir()
    assert len(written) == 1
    assert list(folder.iterdir()) == []


def test_of_two_drivers_the_first_one_s_blocks_stay(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("a.jsonl", *(row(f"q{i}", "r", "s") for i in range(4)))
    count = prepare_module._counts
    firsts: list[Blocks] = []

    def late(reports: Any) -> dict[str, Any]:
        monkeypatch.setattr(prepare_module, "_counts", count)
        firsts.append(make("a.jsonl"))
        return count(reports)

    monkeypatch.setattr(prepare_module, "_counts", late)
    second = make("a.jsonl")
    assert second.manifest == firsts[0].manifest
    assert sorted(path.name for path in Path(second.folder).iterdir()) == sorted(
        ["manifest.json", second.manifest["attempt"]]
    )


@pytest.mark.soak
def test_two_drivers_at_once_both_succeed(make: Make, tmp_path: Path, tokenizer: str) -> None:
    rows = [row(f"q{i}", "r", "s") for i in range(50)]
    write_lines("a.jsonl", *rows)
    pairs = f"{tmp_path}/a.jsonl"
    code = (
        "import sys, ray; from ray_prefopt.config import *; from ray_prefopt.data.prepare import prepare\n"
        "address, pairs, tokenizer, store = sys.argv[1:]\n"
        "ray.init(address=address, log_to_driver=False)\n"
        "data = DataConfig(train=pairs)\n"
        "model = ModelConfig(from_config={'model_type': 'qwen2'}, tokenizer=tokenizer)\n"
        "print(prepare(data, model, data.train_sources, store, chunk_rows=3).folder)"
    )
    address = ray.get_runtime_context().gcs_address
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, pairs, tokenizer, f"{tmp_path}/store"],
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    folders = {driver.communicate(timeout=300)[0].strip() for driver in drivers}
    assert [driver.returncode for driver in drivers] == [0, 0]
    blocks = make(pairs, chunk_rows=3)
    assert folders == {blocks.folder}
    assert texts(blocks) == [f"q{i}|r$|s$" for i in range(50)]


# --- what is refused ---


def test_too_many_bad_rows(make: Make, tmp_path: Path) -> None:
    good, bad = row("q", "r", "s"), row("q", "r", "")
    write_lines("a.jsonl", *[good] * 6, *[bad] * 4, {"prompt": "q", "text": "r"}, "[]")
    with pytest.raises(DataError) as error:
        make("a.jsonl", max_bad_fraction=0.4)
    at = f"{tmp_path}/a.jsonl"
    empty = "; ".join(f"{at}:{line}: 'rejected' is the empty string" for line in (7, 8, 9))
    assert str(error.value).splitlines() == [
        "6 of 12 rows are unusable, and data.max_bad_fraction allows 0.4 of them:",
        f"  4 empty_completion: {empty}",
        f"  1 malformed_json: {at}:12: a row is an object; got []",
        f"  1 missing_column: {at}:11: no column 'chosen'; got ['prompt', 'text']",
        "set data.columns, as in {prompt: question, chosen: better, rejected: worse}, or repair these rows, "
        "or raise data.max_bad_fraction",
    ]
    assert list(Path("store/blocks").rglob("*.parquet")) == []
    assert make("a.jsonl", max_bad_fraction=0.5).num_pairs == 6
    with pytest.raises(
        DataError, match=r"6 of 12 rows are unusable, and data.max_bad_fraction allows 0.4 of"
    ):
        make("a.jsonl", max_bad_fraction=0.4)  # though its blocks are there


def test_no_pair_is_left(make: Make) -> None:
    write_lines("a.jsonl", {"question": "q", "better": "r", "worse": "s"})
    with pytest.raises(DataError) as error:
        make("a.jsonl", max_bad_fraction=1.0)
    assert str(error.value).splitlines() == [
        "1 of 1 rows are unusable, and no pair is left:",
        f"  1 missing_column: {Path.cwd()}/a.jsonl:1: no column 'chosen'; got ['better', 'question', 'worse']",
        "set data.columns, as in {prompt: question, chosen: better, rejected: worse}, or repair these rows",
    ]
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert texts(make("a.jsonl", columns=columns)) == ["q|r$|s$"]


def test_nothing_is_there(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("blank.jsonl", "", " ")
    write_lines("one.jsonl", row("q", "r", "s"))
    with pytest.raises(
        DataError, match=r"^no preference pair in 0 rows of blank\.jsonl: check the files, and rows"
    ):
        make("blank.jsonl")
    with pytest.raises(
        DataError, match=r"^no preference pair in 1 rows of one\.jsonl: check the files, and rows"
    ):
        make({"path": "one.jsonl", "weight": 0.1})
    monkeypatch.setattr(prepare_module, "_run", never)
    with pytest.raises(DataError, match=r"^none\.jsonl does not exist: data paths are files, globs"):
        make("none.jsonl")
    with pytest.raises(
        DataError, match=r"^there is nothing to prepare: a list of sources is empty; name a file"
    ):
        make([])


def test_conversations_need_a_template(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines("a.jsonl", chat_row("q", "r", "s"))
    with pytest.raises(
        DataError, match=r"^the rows are conversations and the tokenizer has no chat template: set"
    ):
        make("a.jsonl")
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_file_is_named(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    write_lines("a.jsonl.gz", *(row(f"{os.urandom(9).hex()}", "r", "s") for _ in range(500)))
    Path("a.jsonl.gz").write_bytes(Path("a.jsonl.gz").read_bytes()[:-100])
    with pytest.raises(
        DataError, match=r"a\.jsonl\.gz cannot be read as gzip jsonl: .*; check that it is whole"
    ):
        make("a.jsonl.gz")
    assert "Traceback" not in capfd.readouterr().err


def test_a_storage_that_refuses_is_named(make: Make) -> None:
    write_lines("a.jsonl", row("q", "r", "s"))
    Path("store").write_text("a file, not a folder")
    with pytest.raises(
        ResourceError, match=r"parquet cannot be written .*: free some space or allow the access"
    ):
        make("a.jsonl")


def test_an_error_of_somebody_else_is_raised_as_it_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_column(row: dict[str, Any], **_job: Any) -> Any:
        return row["no such thing"]

    write_lines("a.jsonl", row("q", "r", "s"))
    monkeypatch.setattr(prepare_module, "tokenize_task", no_such_column)
    with pytest.raises(RayTaskError, match="KeyError: 'no such thing'"):
        make("a.jsonl")


def test_fewer_pairs_than_a_global_batch(make: Make, tokenizer: str) -> None:
    write_lines("a.jsonl", *(row(f"q{i}", "r", "s") for i in range(4)))
    config = {"model": {"path": tokenizer}, "data": {"train": "a.jsonl"}}
    blocks = make("a.jsonl")
    with pytest.raises(
        DataError, match=r"^4 usable pairs do not fill one global batch of 5: add pairs, or set run"
    ):
        make_plan(TrainConfig.model_validate({**config, "run": {"global_batch": 5}}), blocks)
    assert (
        make_plan(TrainConfig.model_validate({**config, "run": {"global_batch": 4}}), blocks).total_steps == 1
    )


# --- progress ---


def test_progress_is_told_line_by_line_without_a_terminal(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines("a.jsonl", *(row(f"q{i}", "r" * 2000, "s") for i in range(6)), "oops")
    monkeypatch.setattr(prepare_module, "NOTE_EVERY_S", 0.0)
    make("a.jsonl", progress=True, chunk_rows=3, max_bad_fraction=0.2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" pairs, ")[0] for line in lines[:2]] == ["preparing: 3", "preparing: 6"]
    assert lines[-1].startswith("prepared 6 pairs of 7 rows in ")
    assert ", 1 dropped as malformed_json, 6 chosen truncated: " in lines[-1]
    make("a.jsonl", chunk_rows=2, max_bad_fraction=0.2)
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines("a.jsonl", row("q", "r", "r"))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    make("a.jsonl", progress=True)
    told = capsys.readouterr().err
    assert "preparing: starting Ray Data" in told
    assert "prepared 1 pairs of 1 rows in " in told
    assert ", 1 ties: " in told
