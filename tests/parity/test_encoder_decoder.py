"""T5 and BART beside trl's CPOTrainer: rows, batches, gradients and steps; and what trl gets wrong with them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from ray.train import ScalingConfig
from torch import nn
from transformers import AutoModelForSeq2SeqLM, NllbTokenizer, PreTrainedTokenizerBase
from trl.data_utils import maybe_apply_chat_template
from trl.experimental.cpo import CPOConfig as TrlConfig
from trl.experimental.cpo.cpo_trainer import CPOTrainer as TrlTrainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer.utils import disable_dropout_in_model

from ray_prefopt import CPOConfig, CPOTrainer
from ray_prefopt.compat.batches import repacked, row_of
from ray_prefopt.config import ModelConfig
from ray_prefopt.data.formats import PreferencePair, Skipped
from ray_prefopt.data.tokenization import LengthLimits, TokenizedPair, tokenize_pairs
from ray_prefopt.errors import ConfigError
from ray_prefopt.model.load import load_model
from tests.parity.test_trainer import (
    LOSSES,
    SHARED,
    STEPS,
    assert_same_run,
    pair_of_trainers,
    plain_rows,
    trained_here,
)
from tests.tiny import (
    CHATML,
    CORPUS,
    chat_row,
    save_tiny_model,
    tiny_bart_tokenizer,
    tiny_config,
    tiny_model,
    tiny_t5_tokenizer,
    tiny_tokenizer,
)

pytestmark = pytest.mark.parity

KINDS = ("t5", "bart")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


# --- rows ---


def trl_row(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, str], max_completion_length: int = 128
) -> dict[str, Any]:
    """What CPOTrainer.tokenize_row makes of texts; the trainer itself is a stand-in with what that method reads."""
    trainer = SimpleNamespace(
        processing_class=tokenizer, is_encoder_decoder=True, max_completion_length=max_completion_length
    )
    found: dict[str, Any] = TrlTrainer.tokenize_row(trainer, row)
    return found


def our_row(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, str],
    max_completion_length: int = 128,
    *,
    templated: bool = False,
) -> dict[str, Any] | Skipped:
    limits = LengthLimits(10**6, None, max_completion_length, "keep_end")
    pair = PreferencePair(row["prompt"], row["chosen"], row["rejected"], templated=templated)
    (found,) = tokenize_pairs([pair], tokenizer, limits, is_encoder_decoder=True)
    return found if isinstance(found, Skipped) else row_of(found, is_encoder_decoder=True)


TOKENIZERS = {"t5": tiny_t5_tokenizer(), "bart": tiny_bart_tokenizer()}
TEXTS = st.lists(st.sampled_from(" ".join(CORPUS).split(" ")) | st.text(max_size=5), max_size=8).map(" ".join)
SOME_TEXT = TEXTS.filter(lambda text: any(character.isalnum() for character in text))


@given(
    kind=st.sampled_from(KINDS),
    row=st.fixed_dictionaries({"prompt": TEXTS, "chosen": SOME_TEXT, "rejected": SOME_TEXT}),
    max_completion_length=st.integers(3, 20),
)
def test_rows_are_those_of_trl(kind: str, row: dict[str, str], max_completion_length: int) -> None:
    theirs = trl_row(TOKENIZERS[kind], row, max_completion_length)
    assert our_row(TOKENIZERS[kind], row, max_completion_length) == theirs


def test_trl_doubles_the_end_that_a_text_has() -> None:
    row = {"prompt": "two plus two", "chosen": "four</s>", "rejected": "five"}
    theirs, ours = trl_row(TOKENIZERS["t5"], row), our_row(TOKENIZERS["t5"], row)
    assert theirs["chosen_labels"][-2:] == [1, 1]
    assert isinstance(ours, dict)
    assert ours == {**theirs, "chosen_labels": theirs["chosen_labels"][:-1]}


def test_trl_ends_a_message_after_its_template_did() -> None:
    tokenizer = tiny_t5_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    row = maybe_apply_chat_template(chat_row("What color?", "Blue.", "Red."), tokenizer)
    theirs, ours = trl_row(tokenizer, row), our_row(tokenizer, row, templated=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert theirs["chosen_labels"][-2:] == [end, tokenizer.eos_token_id]
    assert isinstance(ours, dict)
    assert ours["chosen_labels"] == theirs["chosen_labels"][:-1]


def test_trl_never_ends_a_completion_when_the_tokenizer_does_not() -> None:
    tokenizer = tiny_tokenizer("plain")
    row = {"prompt": "two plus two", "chosen": "four", "rejected": "five"}
    theirs, ours = trl_row(tokenizer, row), our_row(tokenizer, row)
    assert tokenizer.eos_token_id not in theirs["chosen_labels"]
    assert isinstance(ours, dict)
    assert ours["chosen_labels"] == [*theirs["chosen_labels"], tokenizer.eos_token_id]


def test_trl_scores_the_end_of_an_empty_completion() -> None:
    row = {"prompt": "two plus two", "chosen": "", "rejected": "five"}
    assert trl_row(TOKENIZERS["t5"], row)["chosen_labels"] == [1]
    assert our_row(TOKENIZERS["t5"], row) == Skipped("empty_completion", "chosen has no token")


def test_trl_writes_the_source_language_over_a_translation() -> None:
    vocabulary = {
        token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "\u2581", "a", "b"])
    }
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[], src_lang="eng_Latn", tgt_lang="deu_Latn")
    english, german = tokenizer.convert_tokens_to_ids(["eng_Latn", "deu_Latn"])
    row = {"prompt": "a", "chosen": "b", "rejected": "a"}
    theirs, ours = trl_row(tokenizer, row), our_row(tokenizer, row)
    assert theirs["chosen_labels"] == [english, 4, 6, 2]
    assert isinstance(ours, dict)
    assert ours["chosen_labels"] == [german, 4, 6, 2]
    assert ours["prompt_input_ids"] == theirs["prompt_input_ids"] == [english, 4, 5, 2]


# --- batches ---


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    weights = dict(model.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_methods_give_what_trl_gives(loss: str, folder: str, tmp_path: Path) -> None:
    rows = plain_rows(6)
    their, our = pair_of_trainers(folder, tmp_path, rows, max_completion_length=24, **LOSSES[loss])
    features = [dict(row) for row in their.train_dataset]
    kept = [name for name in features[0] if name.endswith(("input_ids", "attention_mask", "labels"))]
    assert [our.tokenize_row(row) for row in rows] == [{name: row[name] for name in kept} for row in features]
    batch = DPODataCollatorWithPadding(pad_token_id=their.pad_token_id, is_encoder_decoder=True)(
        [{name: feature[name] for name in kept} for feature in features]
    )
    model = their.model.eval()
    theirs, ours = (list(each.concatenated_forward(model, batch)) for each in (their, our))
    if not our.args.cpo_alpha:  # trl leaves it out
        theirs[4] = ours[4]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    (their_loss, their_metrics), (our_loss, our_metrics) = (
        each.get_batch_loss_metrics(model, batch) for each in (their, our)
    )
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(our_loss, model), gradients(their_loss, model), rtol=1e-4, atol=1e-6)
    compared = {name for name in their_metrics if not name.startswith("logits/")}  # trl's: padding too
    compared -= set() if our.args.cpo_alpha else {"nll_loss"}
    assert {name: our_metrics[name] for name in compared} == pytest.approx(
        {name: their_metrics[name] for name in compared}, rel=1e-5, abs=1e-5
    )


def test_a_collator_of_trl_packs_the_same_pairs() -> None:
    pairs = [
        TokenizedPair([5, 1, 6, 7, 1], [5, 1, 8, 1], 2, 2),
        TokenizedPair([9, 1, 6, 1], [9, 1, 5, 5, 1], 2, 2),
    ]
    collator = DPODataCollatorWithPadding(pad_token_id=0, is_encoder_decoder=True)
    assert repacked(collator, pairs, is_encoder_decoder=True) == pairs
    with pytest.raises(
        ConfigError, match=r"its batch has no prompt_attention_mask, prompt_input_ids; it has chosen_"
    ):
        repacked(
            lambda rows: {side: [row[side] for row in rows] for side in ("chosen_labels", "rejected_labels")},
            pairs,
            is_encoder_decoder=True,
        )


def test_log_probabilities_of_labels_in_place() -> None:
    """Two rows over four tokens: logits log 1, 2, 3, 4, so that token i has probability (i + 1) / 10."""
    logits = torch.arange(1.0, 5.0).log().expand(2, 3, 4)
    labels = torch.tensor([[0, 1, 3], [2, -100, -100]])
    expected = torch.tensor([0.1 * 0.2 * 0.4, 0.3]).log()
    found = CPOTrainer.get_batch_logps(logits, labels, is_encoder_decoder=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        TrlTrainer.get_batch_logps(logits, labels.clone(), is_encoder_decoder=True), expected
    )
    means = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True, is_encoder_decoder=True)
    torch.testing.assert_close(means, expected / torch.tensor([3.0, 1.0]))


# --- runs ---


@pytest.mark.parametrize(
    ("folder", "loss"),
    [*(("t5", loss) for loss in LOSSES), ("bart", "cpo"), ("bart", "simpo")],
    indirect=["folder"],
)
def test_ten_steps_equal_those_of_trl(loss: str, folder: str, tmp_path: Path) -> None:
    rows = plain_rows(4 * STEPS)
    # Adam's first steps are as long where a gradient is all rounding as elsewhere, without an epsilon above that.
    arguments = {**LOSSES[loss], "gradient_accumulation_steps": 2, "max_steps": STEPS, "adam_epsilon": 1e-4}
    their, our = pair_of_trainers(folder, tmp_path, rows, max_completion_length=24, **arguments)
    their.train()
    assert_same_run(*trained_here(our, rows, tmp_path), their)


def test_completions_are_cut_where_trl_cuts_them(folder: str, tmp_path: Path) -> None:
    """With nothing said, to 128 tokens."""
    rows = Dataset.from_list([{"prompt": "two", "chosen": "four " * 300, "rejected": "five " * 300}])
    their, our = pair_of_trainers(folder, tmp_path, rows, max_length=256)
    assert len(their.train_dataset[0]["chosen_labels"]) == 128
    assert our.tokenize_row(rows[0])["chosen_labels"] == their.train_dataset[0]["chosen_labels"]


# --- models ---


@pytest.mark.parametrize(("kind", "name"), [("t5", "dropout_rate"), ("bart", "dropout")])
def test_trl_leaves_dropout_on_that_is_no_module(kind: str, name: str) -> None:
    """All of BART's, and that of T5's attention, are calls of a function."""
    model = tiny_model(kind, **{name: 0.5}).train()
    disable_dropout_in_model(model)
    ids = {name: torch.arange(8).view(1, 8) for name in ("input_ids", "decoder_input_ids")}
    assert not torch.equal(model(**ids).logits, model(**ids).logits)
    config = ModelConfig(from_config=tiny_config(kind, **{name: 0.5}), tokenizer="-")
    ours = load_model(config, dtype=torch.float32, seed=0)
    assert torch.equal(ours(**ids).logits, ours(**ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_trl_takes_no_encoder_decoder_by_its_name(kind: str, tmp_path: Path) -> None:
    """T5 is refused, since it is no decoder; of BART the decoder alone is trained, in silence."""
    path = save_tiny_model(tmp_path / "model", kind)
    arguments = {**SHARED, "output_dir": str(tmp_path / "out")}
    their: Any = None
    if kind == "t5":
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            TrlTrainer(path, TrlConfig(**arguments), train_dataset=plain_rows(2))
    else:
        their = TrlTrainer(path, TrlConfig(**arguments), train_dataset=plain_rows(2))
        assert type(their.model).__name__ == "BartForCausalLM"
    our = CPOTrainer(path, CPOConfig(**arguments), scaling_config=ScalingConfig(num_workers=1))
    assert our.is_encoder_decoder
    assert our.tokenize_row(plain_rows(1)[0]).keys() == {
        "chosen_labels", "rejected_labels", "prompt_input_ids", "prompt_attention_mask",
    }  # fmt: skip


def test_what_a_model_is_cannot_be_talked_away(folder: str, tmp_path: Path) -> None:
    arguments = {**SHARED, "output_dir": str(tmp_path)}
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    CPOTrainer(folder, CPOConfig(is_encoder_decoder=True, **arguments))
    with pytest.raises(
        ConfigError, match=r"is_encoder_decoder .* got False: the model is an encoder-decoder; leave"
    ):
        CPOTrainer(model, CPOConfig(is_encoder_decoder=False, **arguments), processing_class=TOKENIZERS["t5"])


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_labels_in_parts_are_refused(side: str) -> None:
    pairs = [TokenizedPair([5, 1, 6, 7, 1], [5, 1, 8, 9, 1], 2, 2)]
    collator = DPODataCollatorWithPadding(pad_token_id=0, is_encoder_decoder=True)

    def without_the_middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collator(rows)
        batch[f"{side}_labels"][0, 1] = -100
        return batch

    with pytest.raises(
        ConfigError, match=r"^labels: a completion is scored as a whole; got labels that leave out"
    ):
        repacked(without_the_middle, pairs, is_encoder_decoder=True)
