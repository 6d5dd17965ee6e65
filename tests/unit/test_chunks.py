"""One tokenizing task: rows become a block, and every row is accounted for."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ray_prefopt.data.blocks import BLOCK_SCHEMA, decode
from ray_prefopt.data.chunks import Drop, Report, TokenizeJob, read_task, tokenize_chunk, tokenize_task
from ray_prefopt.data.formats import Skipped
from ray_prefopt.data.rows import Chunk, InputFile, Lane, Row
from ray_prefopt.data.tokenization import LengthLimits
from ray_prefopt.errors import DataError, ResourceError
from tests.tiny import chat_row, tiny_tokenizer

LIMITS = LengthLimits(
    max_length=256, max_prompt_length=128, max_completion_length=None, truncation_mode="keep_end"
)
PLAIN = tiny_tokenizer("plain")
GOOD = {"prompt": "What color is the sky?", "chosen": " It is blue.", "rejected": " It is green."}


def job(folder: Path, tokenizer: PreTrainedTokenizerFast = PLAIN, **changes: Any) -> TokenizeJob:
    values: dict[str, Any] = {
        "folder": str(folder),
        "attempt": "try",
        "tokenizer": pickle.dumps(tokenizer),
        "limits": LIMITS,
        "form": "auto",
        "columns": {},
        "assistant_header": "trl",
        "weights": (1.0,),
    }
    return TokenizeJob(**values | changes)


def chunk(*rows: Any, first_row: int = 0) -> Chunk:
    """A chunk of lines: rows as they are if bytes or Skipped, else as JSON."""
    lines: list[Row] = [
        row if isinstance(row, bytes | Skipped) else json.dumps(row, ensure_ascii=False).encode()
        for row in rows
    ]
    return Chunk(0, 0, 0, first_row, "a.jsonl", list(range(1, len(lines) + 1)), lines)


def texts(
    folder: Path, report: Report, tokenizer: PreTrainedTokenizerFast = PLAIN
) -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected of the pairs in a block, decoded."""
    if report.block is None:
        return []
    table = decode((folder / report.block["file"]).read_bytes(), BLOCK_SCHEMA)
    return [
        tuple(
            tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (
                row["chosen"][: row["chosen_start"]],
                row["chosen"][row["chosen_start"] :],
                row["rejected"][row["rejected_start"] :],
            )
        )
        for row in table.to_pylist()
    ]


def test_text_goes_through_unchanged(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {"prompt": "2024-01-01", "chosen": "1.50", "rejected": "123456789012345678901234567890"},
        {"prompt": "null", "chosen": " NaN", "rejected": " tabs\tand\r\nbreaks"},
        {"prompt": "你好", "chosen": "🙂 Straße", "rejected": "<|im_start|> is text"},
    ]
    report = tokenize_chunk(chunk(*rows), job(tmp_path))
    end = PLAIN.eos_token
    assert texts(tmp_path, report) == [
        (row["prompt"], row["chosen"] + end, row["rejected"] + end) for row in rows
    ]


BAD_ROWS = {
    "malformed_json": [
        b'{"prompt": "p", "chosen": "a"',
        b'{"prompt": "\xff"}',
        b"[]",
        b'{"chosen": 1, "chosen": 2}',
    ],
    "missing_column": [{"prompt": "p", "chosen": "a"}, {}],
    "not_text": [
        GOOD | {"chosen": 7},
        GOOD | {"chosen": None},
        GOOD | {"prompt": 123456789012345678901234567890},
        b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}',
        b'{"prompt": "p", "chosen": NaN, "rejected": "b"}',
    ],
    "mixed_form": [GOOD | {"chosen": [{"role": "assistant", "content": "a"}]}],
    "empty_completion": [GOOD | {"rejected": ""}],
    "malformed_csv": [Skipped("malformed_csv", "3 fields under a header of 2")],
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows_are_counted_and_change_no_good_one(tmp_path: Path, reason: str) -> None:
    bad = BAD_ROWS[reason]
    alone = tokenize_chunk(chunk(GOOD, GOOD), job(tmp_path / "alone"))
    mixed = tokenize_chunk(chunk(GOOD, *bad, GOOD), job(tmp_path / "mixed"))
    assert {name: drop.count for name, drop in mixed.dropped.items()} == {reason: len(bad)}
    assert mixed.dropped[reason].examples[0][0] == "a.jsonl:2"
    assert (mixed.rows, mixed.taken) == (len(bad) + 2, len(bad) + 2)
    assert alone.block is not None
    assert mixed.block is not None
    assert mixed.block["crc32"] == alone.block["crc32"]


row_values = st.one_of(
    st.text(max_size=8), st.none(), st.integers(), st.lists(st.text(max_size=3), max_size=2)
)
any_row = st.one_of(
    st.binary(max_size=20),
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "x"]), row_values),
    st.just(GOOD),
)


@given(st.lists(any_row, max_size=8), st.sampled_from([0.5, 1.0, 1.3, 2.0]), st.integers(0, 5))
def test_every_row_is_accounted_for(
    tmp_path_factory: Any, rows: list[Any], weight: float, first_row: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    report = tokenize_chunk(chunk(*rows, first_row=first_row), job(folder, weights=(weight,)))
    assert report.taken == len(report.lengths.chosen) + sum(drop.count for drop in report.dropped.values())
    assert report.taken == int((first_row + len(rows)) * weight) - int(first_row * weight)
    assert (report.block is None) == (len(report.lengths.chosen) == 0)


def test_a_weight_repeats_or_leaves_out_rows(tmp_path: Path) -> None:
    rows = [GOOD | {"prompt": str(number)} for number in range(4)]

    def prompts(weight: float, first_row: int = 0) -> str:
        folder = tmp_path / f"{weight}-{first_row}"
        report = tokenize_chunk(chunk(*rows, first_row=first_row), job(folder, weights=(weight,)))
        return "".join(prompt for prompt, _, _ in texts(folder, report))

    assert [prompts(0.5), prompts(0.5, first_row=1), prompts(1.5), prompts(2)] == [
        "13",
        "02",
        "011233",
        "00112233",
    ]


def test_rows_that_are_not_taken_are_not_judged(tmp_path: Path) -> None:
    report = tokenize_chunk(chunk(b"bad", GOOD, b"bad", GOOD), job(tmp_path, weights=(0.5,)))
    assert (report.rows, report.taken, report.dropped) == (4, 2, {})


def test_truncations_and_ties_are_counted(tmp_path: Path) -> None:
    long = GOOD | {"chosen": " It is blue." * 80}
    tie = GOOD | {"rejected": GOOD["chosen"]}
    report = tokenize_chunk(chunk(long, tie, GOOD), job(tmp_path, weights=(2.0,)))
    assert (report.truncated, report.ties) == ({"chosen": 2}, 2)
    assert report.lengths.chosen.max() == LIMITS.max_length


def test_conversations_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("chatml")
    report = tokenize_chunk(chunk(chat_row("sky?", "blue", "green")), job(tmp_path, tokenizer))
    assert texts(tmp_path, report, tokenizer) == [
        (
            "<|im_start|>user\nsky?<|im_end|>\n<|im_start|>assistant\n",
            "blue<|im_end|>\n",
            "green<|im_end|>\n",
        )
    ]


def test_conversations_without_a_template_stop_the_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no chat template: set data\.chat_template"):
        tokenize_chunk(chunk(chat_row("sky?", "blue", "green")), job(tmp_path))


def test_examples_are_few_and_short(tmp_path: Path) -> None:
    rows = [GOOD | {"chosen": ["x" * 10_000]} for _ in range(10)]
    (drop,) = tokenize_chunk(chunk(*rows), job(tmp_path)).dropped.values()
    assert drop.count == 10
    assert [place for place, _ in drop.examples] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert all(len(detail) <= 200 for _, detail in drop.examples)
    assert Drop(1, (("a:1", "x"),)) + Drop(2, (("b:1", "y"),)) == Drop(3, (("a:1", "x"), ("b:1", "y")))


def test_a_storage_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ResourceError, match=r"part-000-00000-000000\.parquet cannot be written .*: free some space"
    ):
        tokenize_chunk(chunk(GOOD), job(tmp_path / "file"))


def test_the_tasks_of_ray_data_pass_pickles(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(GOOD | {"prompt": str(number)}) + "\n" for number in range(3)))
    lane = Lane(0, 4, (InputFile(str(path), "jsonl", None, ()),), None, frozenset(GOOD))
    rows = list(read_task({"lane": pickle.dumps(lane)}, rows=2))
    reports = [pickle.loads(tokenize_task(row, job=job(tmp_path))["result"]) for row in rows]
    assert [(report.key, report.taken) for report in reports] == [((0, 4, 0), 2), ((0, 4, 1), 1)]
    prompts = [prompt for report in reports for prompt, _, _ in texts(tmp_path, report)]
    assert prompts == ["0", "1", "2"]


def test_the_tasks_of_ray_data_pass_errors_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"[{json.dumps(GOOD)}, oops]")
    lane = Lane(0, 0, (InputFile(str(path), "json", None, ()),), None, frozenset(GOOD))
    rows = list(read_task({"lane": pickle.dumps(lane)}, rows=1))
    results = [pickle.loads(tokenize_task(row, job=job(tmp_path))["result"]) for row in rows]
    assert [type(result) for result in results] == [Report, DataError]
    assert str(results[1]).startswith(f"{path} is not a JSON array: Expecting value")
    (tmp_path / "file").touch()
    refused = pickle.loads(tokenize_task(rows[0], job=job(tmp_path / "file"))["result"])
    assert type(refused) is ResourceError


def test_tasks_import_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'datasets', 'pandas'}"
    code = f"import sys, ray_prefopt.data.chunks; sys.exit(bool({heavy} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
