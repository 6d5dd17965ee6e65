"""Rows and tokens equal to trl's CPOTrainer, and a test for each place where trl is wrong and we differ."""

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template, maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.cpo import cpo_trainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer

from ray_prefopt.data.formats import ChatTemplate, PreferencePair, Skipped, to_pair
from ray_prefopt.data.tokenization import LengthLimits, TokenizedPair, tokenize_pairs
from tests.tiny import CHATS, CORPUS, chat_row, merge_tokenizer, tiny_tokenizer

pytestmark = pytest.mark.parity


def adding_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before and EOS after a text by itself, unless told not to."""
    tokenizer = tiny_tokenizer("bos")
    tokens = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    adds = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    tokenizer.backend_tokenizer.post_processor = adds
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Words begin with a visible space as in SentencePiece, and a text always begins with a word."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS = {chat: tiny_tokenizer(chat) for chat in CHATS}
TOKENIZERS |= {"adds": adding_tokenizer(), "metaspace": metaspace_tokenizer()}
TEMPLATED = [chat for chat, tokenizer in TOKENIZERS.items() if tokenizer.chat_template]
PIECES = [*" ".join(CORPUS).split(" "), " ", "  ", "\n", "<s>", "</s>", "<|im_end|>", "e\u0301"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join)
SOME_TEXT = TEXTS.filter(lambda text: bool(text.strip()))


def trl_row(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, str], max_length: int = 10**6
) -> dict[str, Any]:
    """What CPOTrainer.tokenize_row makes of texts; the trainer itself is a stand-in with what that method reads."""
    trainer = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=max_length)
    trainer.build_tokenized_answer = MethodType(CPOTrainer.build_tokenized_answer, trainer)
    tokens: dict[str, Any] = CPOTrainer.tokenize_row(trainer, row)
    return tokens


def trl_pair(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, str], max_length: int = 10**6
) -> TokenizedPair:
    """The same as a TokenizedPair: a completion starts where the labels do."""
    tokens = trl_row(tokenizer, row, max_length)
    starts = []
    for name in ("chosen", "rejected"):
        ids, labels = tokens[f"{name}_input_ids"], tokens[f"{name}_labels"]
        starts.append(labels.count(-100))
        assert labels == [-100] * starts[-1] + ids[starts[-1] :]
    return TokenizedPair(tokens["chosen_input_ids"], tokens["rejected_input_ids"], *starts)


def our_pair(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, str],
    max_length: int = 10**6,
    *,
    templated: bool = False,
) -> TokenizedPair | Skipped:
    pair = PreferencePair(row["prompt"], row["chosen"], row["rejected"], templated=templated)
    (result,) = tokenize_pairs([pair], tokenizer, LengthLimits(max_length, None, None, "keep_end"))
    return result


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def trl_is_right(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> bool:
    """Whether completions have tokens, something comes before them, and at most one token crosses the boundary."""
    prompt = ids_of(tokenizer, row["prompt"])
    for completion in (row["chosen"], row["rejected"]):
        full = ids_of(tokenizer, row["prompt"] + completion)
        n = len(prompt) if full[: len(prompt)] == prompt else len(prompt) - 1
        if n < 0 or full[:n] != prompt[:n] or len(full) == n or (n == 0 and tokenizer.bos_token_id is None):
            return False
    return True


# --- tokens ---


@st.composite
def cut_texts(draw: st.DrawFn) -> dict[str, str]:
    """A text that is cut anywhere, so that words and tokens cross the boundary, and another end for it."""
    text = draw(TEXTS.filter(lambda text: len(text) > 1))
    cut = draw(st.integers(1, len(text) - 1))
    return {"prompt": text[:cut], "chosen": text[cut:], "rejected": draw(TEXTS.filter(bool))}


@settings(deadline=None, max_examples=500)
@given(chat=st.sampled_from(sorted(TOKENIZERS)), row=cut_texts())
@example(chat="plain", row={"prompt": "two t", "chosen": "wo", "rejected": "hree"})
@example(chat="bos", row={"prompt": "two t", "chosen": "oo", "rejected": "wofold"})
def test_tokens_are_those_of_trl(chat: str, row: dict[str, str]) -> None:
    tokenizer = TOKENIZERS[chat]
    assume(trl_is_right(tokenizer, row))
    ours = our_pair(tokenizer, row)
    assert ours == trl_pair(tokenizer, row)
    event(f"a token crosses: {ours.chosen_start < len(ids_of(tokenizer, row['prompt']))}")
    event(f"starts differ: {ours.chosen_start != ours.rejected_start}")


def test_a_token_that_crosses_is_split_as_by_trl() -> None:
    """' two' is one token, ' t' and 'wo' are not: the prompt is a token shorter before 'wo'."""
    tokenizer, row = TOKENIZERS["plain"], {"prompt": "two t", "chosen": "wo", "rejected": "hree"}
    ours = our_pair(tokenizer, row)
    assert ours == trl_pair(tokenizer, row)
    assert isinstance(ours, TokenizedPair)
    assert tokenizer.convert_ids_to_tokens(ours.chosen) == ["two", "Ġtwo", "<|endoftext|>"]
    assert (ours.chosen_start, ours.rejected_start) == (1, 2)


@settings(deadline=None, max_examples=200)
@given(
    chat=st.sampled_from(sorted(TOKENIZERS)),
    prompt=SOME_TEXT,
    chosen=SOME_TEXT,
    rejected=SOME_TEXT,
    room=st.integers(1, 12),
)
def test_completions_are_cut_as_by_trl(chat: str, prompt: str, chosen: str, rejected: str, room: int) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    tokenizer = TOKENIZERS[chat]
    assume(trl_is_right(tokenizer, row))
    max_length = 1 + len(ids_of(tokenizer, prompt)) + room  # 1 is for a BOS
    ours, theirs = our_pair(tokenizer, row, max_length), trl_pair(tokenizer, row, max_length)
    assert isinstance(ours, TokenizedPair)
    assert (ours.chosen, ours.rejected) == (theirs.chosen, theirs.rejected)
    assert (ours.chosen_start, ours.rejected_start) == (theirs.chosen_start, theirs.rejected_start)
    assert "prompt" not in ours.truncated


@pytest.mark.parametrize("chat", ["llama3", "mistral"])
def test_templated_rows_that_end_in_eos_are_those_of_trl(chat: str) -> None:
    tokenizer = TOKENIZERS[chat]
    if chat == "llama3":  # as in Llama-3-Instruct, where the end of a turn is the EOS
        tokenizer = tiny_tokenizer(chat)
        tokenizer.eos_token = "<|eot_id|>"
    row = apply_chat_template(chat_row("What color?", "Blue.", "Red."), tokenizer)
    assert our_pair(tokenizer, row, templated=True) == trl_pair(tokenizer, row)


# --- rows ---

ROLE_TURNS = st.lists(st.tuples(SOME_TEXT, SOME_TEXT), max_size=2)


@st.composite
def conversational_rows(draw: st.DrawFn) -> dict[str, Any]:
    """A conversation with two last turns, in one of the forms: explicit, implicit, UltraFeedback."""
    prompt = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for question, answer in draw(ROLE_TURNS):
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt.append({"role": "user", "content": draw(SOME_TEXT)})
    chosen, rejected = ({"role": "assistant", "content": draw(SOME_TEXT)} for _ in range(2))
    form = draw(st.sampled_from(["explicit", "implicit", "ultrafeedback"]))
    if form == "explicit":
        return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    row = {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]}
    return row if form == "implicit" else {"prompt": prompt[-1]["content"], **row}


@settings(deadline=None, max_examples=200)
@given(chat=st.sampled_from(TEMPLATED), row=conversational_rows())
def test_conversations_are_rendered_as_by_trl(chat: str, row: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS[chat]
    ours = to_pair(row, ChatTemplate(tokenizer), form="auto", columns={}, assistant_header="trl")
    try:
        theirs = maybe_apply_chat_template(maybe_extract_prompt(row), tokenizer)
        expected = PreferencePair(theirs["prompt"], theirs["chosen"], theirs["rejected"], templated=True)
    except TemplateError as refusal:
        expected = Skipped("template_error", f"TemplateError: {refusal}")
    assert ours == expected


@pytest.mark.parametrize("chat", ["chatml", "qwen", "llama3"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}],
         "chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "d"}]},
        {"prompt": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
         "chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "d"}]},
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                      {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
        {**chat_row("a", "b", "c"), "chat_template_kwargs": {"custom": 1}},
    ],
    ids=["prefilled answer", "tool", "tie", "one goes on", "variables"],
)  # fmt: skip
def test_rarer_conversations_are_rendered_as_by_trl(chat: str, row: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS[chat]
    ours = to_pair(row, ChatTemplate(tokenizer), form="auto", columns={}, assistant_header="trl")
    theirs = maybe_apply_chat_template(maybe_extract_prompt(row), tokenizer)
    assert ours == PreferencePair(theirs["prompt"], theirs["chosen"], theirs["rejected"], templated=True)


@settings(deadline=None, max_examples=200)
@given(shared=TEXTS, chosen=TEXTS, rejected=TEXTS, explicit=st.booleans())
def test_texts_are_split_as_by_trl(shared: str, chosen: str, rejected: str, explicit: bool) -> None:
    if explicit:
        row = {"prompt": shared, "chosen": chosen, "rejected": rejected}
        assume(chosen and rejected)
    else:
        row = {"chosen": shared + chosen, "rejected": shared + rejected}
        assume(
            not row["chosen"].startswith(row["rejected"]) and not row["rejected"].startswith(row["chosen"])
        )
        assume(
            row["chosen"][0] == row["rejected"][0] or row["chosen"][-1] != " "
        )  # see the test of that name
    theirs = maybe_extract_prompt(row)
    ours = to_pair(row, None, form="auto", columns={}, assistant_header="trl")
    assert ours == PreferencePair(theirs["prompt"], theirs["chosen"], theirs["rejected"])


def standalone(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """A response as princeton-nlp/SimPO renders it: by itself, less a BOS at its beginning."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return text.removeprefix(tokenizer.bos_token or "")


@settings(deadline=None, max_examples=100)
@given(
    chat=st.sampled_from(["chatml", "llama3", "gemma"]),
    prompt=SOME_TEXT,
    chosen=SOME_TEXT,
    rejected=SOME_TEXT,
)
def test_the_official_header_is_where_simpo_has_it(
    chat: str, prompt: str, chosen: str, rejected: str
) -> None:
    tokenizer = TOKENIZERS[chat]
    row = chat_row(prompt, chosen, rejected)
    ours = to_pair(row, ChatTemplate(tokenizer), form="auto", columns={}, assistant_header="official")
    assert ours == PreferencePair(
        prompt=str(tokenizer.apply_chat_template(row["prompt"], tokenize=False)),
        chosen=standalone(tokenizer, row["chosen"]),
        rejected=standalone(tokenizer, row["rejected"]),
        templated=True,
    )


# --- where trl is wrong ---


def test_trl_ends_chatml_twice() -> None:
    """The template ends an answer with EOS and a newline; trl sees the newline, and adds and trains a second EOS."""
    tokenizer = TOKENIZERS["chatml"]
    row = apply_chat_template(chat_row("What color?", "Blue.", "Red."), tokenizer)
    theirs, ours = trl_pair(tokenizer, row), our_pair(tokenizer, row, templated=True)
    assert isinstance(ours, TokenizedPair)
    assert tokenizer.decode(theirs.chosen[theirs.chosen_start :]) == "Blue.<|im_end|>\n<|im_end|>"
    assert tokenizer.decode(ours.chosen[ours.chosen_start :]) == "Blue.<|im_end|>\n"
    assert [*ours.chosen, tokenizer.eos_token_id] == theirs.chosen


@pytest.mark.parametrize(("chat", "end"), [("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>\n")])
def test_trl_ends_an_ended_turn_with_another_eos(chat: str, end: str) -> None:
    tokenizer = TOKENIZERS[chat]
    row = apply_chat_template(chat_row("What color?", "Blue.", "Red."), tokenizer)
    theirs, ours = trl_pair(tokenizer, row), our_pair(tokenizer, row, templated=True)
    assert isinstance(ours, TokenizedPair)
    assert tokenizer.decode(ours.chosen[ours.chosen_start :]) == f"Blue.{end}"
    assert [*ours.chosen, tokenizer.eos_token_id] == theirs.chosen


def test_trl_does_not_cut_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpo_trainer.logger, "warning_once", lambda _: None)  # it wants an accelerate state
    tokenizer = merge_tokenizer("abcdef", [], eos_token="</s>")
    row = {"prompt": "abcdefabcd", "chosen": "ab", "rejected": "cd"}
    theirs, ours = trl_pair(tokenizer, row, max_length=8), our_pair(tokenizer, row, max_length=8)
    assert (len(theirs.chosen), len(theirs.chosen) - theirs.chosen_start) == (10, 0)
    assert isinstance(ours, TokenizedPair)
    assert (len(ours.chosen), len(ours.chosen) - ours.chosen_start) == (8, 1)


def test_trl_trains_an_empty_completion() -> None:
    tokenizer = TOKENIZERS["plain"]
    row = {"prompt": "The sky is", "chosen": "", "rejected": " black."}
    theirs = trl_pair(tokenizer, row)
    assert theirs.chosen[theirs.chosen_start :] == [tokenizer.eos_token_id]
    assert our_pair(tokenizer, row) == Skipped("empty_completion", "chosen adds no token to its prompt")


def test_trl_stops_at_a_merge_of_several_tokens() -> None:
    """'xabcdef' is x, ab, cd, ef; with 'g' after it, x, a, bc, de, fg."""
    merges = [("f", "g"), ("e", "f"), ("d", "e"), ("c", "d"), ("b", "c"), ("a", "b")]
    tokenizer = merge_tokenizer("abcdefgx", merges, eos_token="</s>")
    row = {"prompt": "xabcdef", "chosen": "g", "rejected": "x"}
    with pytest.raises(ValueError, match="might only differ on the last token"):
        trl_row(tokenizer, row)
    ours = our_pair(tokenizer, row)
    assert isinstance(ours, TokenizedPair)
    assert tokenizer.convert_ids_to_tokens(ours.chosen) == ["x", "a", "bc", "de", "fg", "</s>"]
    assert (ours.chosen_start, ours.rejected_start) == (1, 4)


def test_trl_stops_at_a_merge_that_shortens_the_prompt() -> None:
    tokenizer = merge_tokenizer("abcx", [("b", "c"), ("a", "bc")], eos_token="</s>")
    row = {"prompt": "xab", "chosen": "c", "rejected": "a"}
    with pytest.raises(ValueError, match="should have the same length"):
        trl_row(tokenizer, row)
    ours = our_pair(tokenizer, row)
    assert isinstance(ours, TokenizedPair)
    assert (ours.chosen_start, ours.rejected_start) == (1, 3)


def test_trl_puts_a_control_token_of_the_answer_into_the_prompt() -> None:
    """The rendered prompt ends in '<t', which is two tokens alone, and one control token with its answer."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<tool>", "<think>"]})
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    row = apply_chat_template(chat_row("What color?", "<tool>f", "<tool>g"), tokenizer)
    assert row["prompt"].endswith("assistant\n<t")
    theirs, ours = trl_pair(tokenizer, row), our_pair(tokenizer, row, templated=True)
    assert isinstance(ours, TokenizedPair)
    assert tokenizer.decode(theirs.chosen[theirs.chosen_start :]).startswith("f<|im_end|>")
    assert tokenizer.decode(ours.chosen[ours.chosen_start :]) == "<tool>f<|im_end|>\n"


def test_trl_adds_no_eos_when_there_is_none() -> None:
    tokenizer = merge_tokenizer("ab", [])
    row = {"prompt": "a", "chosen": "b", "rejected": "a"}
    assert trl_pair(tokenizer, row).chosen == [0, 1, None]
    assert our_pair(tokenizer, row) == TokenizedPair([0, 1], [0, 0], 1, 1)


def test_trl_leaves_the_first_token_of_an_empty_prompt_unscored() -> None:
    tokenizer = TOKENIZERS["plain"]
    row = {"prompt": "", "chosen": "yes", "rejected": "no"}
    assert trl_pair(tokenizer, row).chosen_start == 0
    ours = our_pair(tokenizer, row)
    assert isinstance(ours, Skipped)
    assert ours.reason == "empty_prompt"


def test_trl_takes_a_last_space_for_one_before_the_first_character() -> None:
    row = {"chosen": "yes ", "rejected": "no"}
    assert maybe_extract_prompt(row) == {"prompt": "yes", "chosen": " ", "rejected": "o"}
    ours = to_pair(row, None, form="auto", columns={}, assistant_header="trl")
    assert ours == PreferencePair("", "yes ", "no")


def test_trl_splits_a_text_that_is_the_beginning_of_the_other_before_its_last_character() -> None:
    row = {"chosen": "It is 4", "rejected": "It is 42"}
    assert maybe_extract_prompt(row) == {"prompt": "It is ", "chosen": "4", "rejected": "42"}
    ours = to_pair(row, None, form="auto", columns={}, assistant_header="trl")
    assert isinstance(ours, Skipped)
    assert ours.reason == "empty_completion"


def test_trl_forgets_a_conversation_before_completions_that_are_text() -> None:
    row = {"prompt": [{"role": "user", "content": "What color?"}], "chosen": "Blue.", "rejected": "Blau."}
    assert maybe_extract_prompt(row)["prompt"] == "Bl"
    ours = to_pair(row, None, form="auto", columns={}, assistant_header="trl")
    assert isinstance(ours, Skipped)
    assert ours.reason == "mixed_form"


def test_simpo_writes_a_default_system_prompt_into_the_response() -> None:
    tokenizer = TOKENIZERS["qwen"]
    row = chat_row("What color?", "Blue.", "Red.")
    assert "You are helpful." in standalone(tokenizer, row["chosen"])
    ours = to_pair(row, ChatTemplate(tokenizer), form="auto", columns={}, assistant_header="official")
    assert isinstance(ours, PreferencePair)
    assert ours.chosen == "<|im_start|>assistant\nBlue.<|im_end|>\n"
