"""The demo's pairs, tokenizer and folder; that it trains is shown where Ray is started."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ray_prefopt.data.formats import ChatTemplate, PreferencePair, to_pair
from ray_prefopt.demo import (
    CONFIG,
    SPECIAL,
    THINGS,
    VOCABULARY,
    Row,
    claim_folder,
    demo_config,
    make_tokenizer,
    preference_rows,
    texts,
)
from ray_prefopt.errors import ConfigError
from ray_prefopt.settings import dump_yaml, load_config


def things_in(row: Row) -> tuple[str, ...]:
    """The two things that a row is about, the smaller first."""
    words = texts(row)[0].replace("?", " ").replace(",", " ").split()
    return tuple(thing for thing in THINGS if thing in words)


def test_held_out_pairs_of_things_never_meet_in_training() -> None:
    learned, held_out = preference_rows(seed=0)
    assert {things_in(row) for row in learned}.isdisjoint(things_in(row) for row in held_out)
    # 26 things meet 325 times, 32 of these are held out; 3 questions, both orders, bigger and smaller.
    assert (len(learned), len(held_out)) == (293 * 12, 32 * 12)


def test_the_order_of_held_out_pairs_follows_from_others() -> None:
    learned, held_out = preference_rows(seed=0)
    assert set(pairwise(THINGS)) <= {things_in(row) for row in learned}
    assert all(THINGS.index(big) - THINGS.index(small) > 1 for small, big in map(things_in, held_out))


def test_the_chosen_answer_is_true_and_the_rejected_one_its_mirror() -> None:
    learned, held_out = preference_rows(seed=3)
    for row in learned + held_out:
        small, big = things_in(row)
        _, chosen, rejected = texts(row)
        true = (f"The {big} is bigger than the {small}.", f"The {small} is smaller than the {big}.")
        false = (f"The {small} is bigger than the {big}.", f"The {big} is smaller than the {small}.")
        assert (chosen, rejected) in zip(true, false, strict=True)


def test_neither_order_nor_length_gives_the_answer_away() -> None:
    learned, _ = preference_rows(seed=0)
    rows = [texts(row) for row in learned]
    winner_first = [
        question.find(chosen.split()[1]) < question.find(rejected.split()[1])
        for question, chosen, rejected in rows
    ]
    assert sum(winner_first) == len(rows) / 2
    assert sum("bigger" in chosen for _, chosen, _ in rows) == len(rows) / 2
    assert all(sorted(chosen) == sorted(rejected) for _, chosen, rejected in rows)


def test_pairs_depend_on_the_seed_alone() -> None:
    assert preference_rows(seed=1) == preference_rows(seed=1) != preference_rows(seed=2)


def test_the_saved_tokenizer_is_the_same_and_fits_the_model(tmp_path: Path) -> None:
    learned, held_out = preference_rows(seed=0)
    tokenizer = make_tokenizer([text for row in learned for text in texts(row)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    read = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    architecture = demo_config(tmp_path).model.from_config
    assert architecture is not None
    assert len(read) <= VOCABULARY == architecture["vocab_size"]
    assert read.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2]
    assert (read.pad_token_id, read.eos_token_id) == (
        architecture["pad_token_id"],
        architecture["eos_token_id"],
    )
    pair = to_pair(held_out[0], ChatTemplate(read), form="auto", columns={}, assistant_header="trl")
    assert isinstance(pair, PreferencePair)
    question, chosen, _ = texts(held_out[0])
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{chosen}<|im_end|>\n"
    assert pair.prompt + pair.chosen == text
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.decode(read(text)["input_ids"]) == text
    words = {thing for thing in THINGS if len(read(f" {thing}")["input_ids"]) == 1}
    assert words == set(THINGS)  # a thing is one token, and so one vector


def test_the_config_reads_back_the_same(tmp_path: Path) -> None:
    config = demo_config(tmp_path)
    (tmp_path / CONFIG).write_text(dump_yaml(config))
    assert load_config([tmp_path / CONFIG]) == config
    assert (config.loss.kind, config.run.num_workers, config.engine.zero_stage) == ("cpo_simpo", 2, 2)


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    (tmp_path / CONFIG).touch()
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    mine = tmp_path / "runs" / "mine"
    mine.mkdir()
    (tmp_path / "train.jsonl").write_text(json.dumps({}))
    assert claim_folder(tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, "runs", "train.jsonl"]
    assert list((tmp_path / "runs").iterdir()) == [mine]


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    assert claim_folder(tmp_path / "new" / "demo").is_dir()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(
        ConfigError, match=r"is not empty and holds no earlier demo \(demo\.yaml is missing\)"
    ):
        claim_folder(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "demo").touch()
    with pytest.raises(ConfigError, match="demo is a file: give the demo another folder"):
        claim_folder(tmp_path / "demo")
