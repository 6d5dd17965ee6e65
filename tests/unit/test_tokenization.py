"""Splits, BOS, EOS and limits, with ids worked out by hand.

The hand tokenizer has one token per letter, numbered a=0, b=1, ..., then its merges, then BOS and EOS.
"""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from ray_prefopt.data import tokenization
from ray_prefopt.data.formats import ChatTemplate, PreferencePair, Skipped, to_pair
from ray_prefopt.data.tokenization import PROBE, LengthLimits, TokenizedPair, tokenize_pairs
from tests.tiny import (
    CHATS,
    CORPUS,
    chat_row,
    merge_tokenizer,
    tiny_bart_tokenizer,
    tiny_t5_tokenizer,
    tiny_tokenizer,
)

A, B, C, D, E, F, X, BOS, EOS = range(9)
LETTERS = merge_tokenizer("abcdefx", [], bos_token="<s>", eos_token="</s>")
NO_BOS = merge_tokenizer("abcdefx", [], eos_token="</s>")
ROOMY = LengthLimits(1000, 500, None, "keep_end")


def one(
    prompt: str,
    chosen: str,
    rejected: str,
    tokenizer: Any = LETTERS,
    limits: LengthLimits = ROOMY,
    *,
    is_encoder_decoder: bool = False,
    **kind: bool,
) -> TokenizedPair | Skipped:
    pair = PreferencePair(prompt, chosen, rejected, **kind)
    (result,) = tokenize_pairs([pair], tokenizer, limits, is_encoder_decoder=is_encoder_decoder)
    return result


def limits(
    max_length: int, max_prompt: int | None = None, max_completion: int | None = None, mode: Any = "keep_end"
) -> LengthLimits:
    return LengthLimits(max_length, max_prompt, max_completion, mode)


# --- splits ---


def test_prompt_and_completion_are_joined_and_ended() -> None:
    expected = TokenizedPair([BOS, A, B, C, EOS], [BOS, A, B, D, E, EOS], 3, 3)
    assert one("ab", "c", "de") == expected


def test_a_block_keeps_its_order_and_its_skips() -> None:
    pairs = [PreferencePair("a", "b", "c"), PreferencePair("a", "", "c"), PreferencePair("d", "e", "f")]
    first, skipped, last = tokenize_pairs(pairs, LETTERS, ROOMY)
    assert first == TokenizedPair([BOS, A, B, EOS], [BOS, A, C, EOS], 2, 2)
    assert skipped == Skipped("empty_completion", "chosen adds no token to its prompt")
    assert last == TokenizedPair([BOS, D, E, EOS], [BOS, D, F, EOS], 2, 2)


def test_an_empty_block_has_no_pairs() -> None:
    assert tokenize_pairs([], LETTERS, ROOMY) == []


def test_a_token_over_the_boundary_is_scored() -> None:
    """'bc' is one token, so 'xab' + 'c' is x, a, bc: the prompt keeps two of its three tokens."""
    tokenizer = merge_tokenizer("abcx", [("b", "c")], eos_token="</s>")
    a, b, _, x, bc, eos = range(6)
    assert one("xab", "c", "a", tokenizer) == TokenizedPair([x, a, bc, eos], [x, a, b, a, eos], 2, 3)


def test_a_split_steps_back_as_far_as_it_has_to() -> None:
    """'xabcdef' is x, ab, cd, ef; with 'g' after it, x, a, bc, de, fg."""
    merges = [("f", "g"), ("e", "f"), ("d", "e"), ("c", "d"), ("b", "c"), ("a", "b")]
    tokenizer = merge_tokenizer("abcdefgx", merges, eos_token="</s>")
    a, x = 0, 7
    fg, ef, de, cd, bc, ab, eos = range(8, 15)
    pair = one("xabcdef", "g", "x", tokenizer)
    assert pair == TokenizedPair([x, a, bc, de, fg, eos], [x, ab, cd, ef, x, eos], 1, 4)


def test_a_merge_that_swallows_the_prompt_leaves_its_bos() -> None:
    merges = [("b", "c"), ("a", "bc")]
    with_bos = merge_tokenizer("abc", merges, bos_token="<s>", eos_token="</s>")
    a, b, _, _, abc, bos, eos = range(7)
    assert one("ab", "c", "b", with_bos) == TokenizedPair([bos, abc, eos], [bos, a, b, b, eos], 1, 3)
    without = merge_tokenizer("abc", merges, eos_token="</s>")
    assert one("ab", "c", "b", without) == Skipped(
        "empty_prompt", "the prompt has no token, and the tokenizer has no BOS for its place"
    )


def test_an_empty_prompt_is_its_bos() -> None:
    assert one("", "a", "b") == TokenizedPair([BOS, A, EOS], [BOS, B, EOS], 1, 1)
    skipped = one("", "a", "b", NO_BOS)
    assert isinstance(skipped, Skipped)
    assert skipped.reason == "empty_prompt"


@pytest.mark.parametrize(("chosen", "rejected", "name"), [("", "b", "chosen"), ("b", "", "rejected")])
def test_an_empty_completion_is_skipped_rather_than_ended(chosen: str, rejected: str, name: str) -> None:
    assert one("a", chosen, rejected) == Skipped("empty_completion", f"{name} adds no token to its prompt")


# --- BOS and EOS ---


def test_bos_in_the_text_is_not_repeated() -> None:
    assert one("<s>a", "b", "c") == TokenizedPair([BOS, A, B, EOS], [BOS, A, C, EOS], 2, 2)


def test_eos_in_the_text_is_not_repeated() -> None:
    assert one("a", "b</s>", "c") == TokenizedPair([BOS, A, B, EOS], [BOS, A, C, EOS], 2, 2)


def test_a_tokenizer_without_eos_ends_nothing() -> None:
    tokenizer = merge_tokenizer("ab", [])
    assert one("a", "b", "a", tokenizer) == TokenizedPair([0, 1], [0, 0], 1, 1)


TEMPLATED_ENDS = [
    ("chatml", "yes<|im_end|>", []),
    ("chatml", "yes<|im_end|>\n", []),
    ("chatml", "yes<|im_end|> \n\t\n", []),
    ("chatml", "yes<|endoftext|>\n", []),  # a special token, though not the EOS
    ("chatml", "yes\n", ["<|im_end|>"]),
    ("chatml", "<|im_end|>yes\n", ["<|im_end|>"]),
    ("chatml", "\n \n", ["<|im_end|>"]),
    ("llama3", "yes<|eot_id|>", []),
    ("llama3", "yes", ["<|end_of_text|>"]),
    ("gemma", "yes<end_of_turn>\n", []),
    ("mistral", " yes</s>", []),
]


@pytest.mark.parametrize(("chat", "answer", "ending"), TEMPLATED_ENDS)
def test_a_templated_answer_is_ended_only_when_it_is_open(chat: str, answer: str, ending: list[str]) -> None:
    tokenizer = tiny_tokenizer(chat)
    pair = one("hello 1", answer, answer, tokenizer, templated=True)
    assert isinstance(pair, TokenizedPair)
    written = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert pair.chosen[pair.chosen_start :] == written + tokenizer.convert_tokens_to_ids(ending)


def test_plain_text_is_ended_whatever_it_ends_with() -> None:
    tokenizer = tiny_tokenizer("chatml")
    pair = one("hello", " yes<|im_end|>\n", " no<|im_end|>", tokenizer)
    assert isinstance(pair, TokenizedPair)
    end = tokenizer.eos_token_id
    assert [ids.count(end) for ids in (pair.chosen, pair.rejected)] == [2, 1]
    assert [ids[-1] for ids in (pair.chosen, pair.rejected)] == [end, end]


# --- limits ---


def test_nothing_is_cut_at_the_limit() -> None:
    pair = one("abcd", "ef", "e", limits=limits(8, 2))  # BOS a b c d e f EOS
    assert pair == TokenizedPair([BOS, A, B, C, D, E, F, EOS], [BOS, A, B, C, D, E, EOS], 5, 5)


def test_the_prompt_is_cut_first_and_the_completions_to_what_is_left() -> None:
    pair = one("abcde", "fxfx", "f", limits=limits(7, 3))
    assert pair == TokenizedPair([BOS, D, E, F, X, F, X], [BOS, D, E, F, EOS], 3, 3, ("prompt", "chosen"))


def test_a_long_completion_cuts_the_prompt_of_both_branches() -> None:
    pair = one("abcd", "f", "fxfxf", limits=limits(9, 3))
    assert pair == TokenizedPair([BOS, C, D, F, EOS], [BOS, C, D, F, X, F, X, F, EOS], 3, 3, ("prompt",))


def test_keep_start_keeps_the_start() -> None:
    pair = one("abcde", "fxfx", "f", limits=limits(7, 3, mode="keep_start"))
    assert pair == TokenizedPair([BOS, A, B, F, X, F, X], [BOS, A, B, F, EOS], 3, 3, ("prompt", "chosen"))


def test_without_bos_the_whole_limit_is_for_the_prompt() -> None:
    pair = one("abcde", "fx", "f", NO_BOS, limits(6, 2))
    eos = NO_BOS.eos_token_id
    assert pair == TokenizedPair([D, E, F, X, eos], [D, E, F, eos], 2, 2, ("prompt",))


def test_a_short_prompt_is_left_alone_and_the_completions_cut() -> None:
    pair = one("a", "bcdef", "x", limits=limits(4, 3))
    assert pair == TokenizedPair([BOS, A, B, C], [BOS, A, X, EOS], 2, 2, ("chosen",))


def test_without_a_prompt_limit_the_completion_keeps_one_token() -> None:
    pair = one("abcdef", "xx", "f", limits=limits(4))
    assert pair == TokenizedPair([BOS, E, F, X], [BOS, E, F, F], 3, 3, ("prompt", "chosen", "rejected"))


def test_a_prompt_limit_as_large_as_max_length_still_leaves_one_token() -> None:
    pair = one("abcdef", "xx", "f", limits=limits(4, 10))
    assert pair == TokenizedPair([BOS, E, F, X], [BOS, E, F, F], 3, 3, ("prompt", "chosen", "rejected"))


def test_completions_have_a_limit_of_their_own() -> None:
    pair = one("abc", "defx", "d", limits=limits(100, 50, 2))
    assert pair == TokenizedPair([BOS, A, B, C, D, E], [BOS, A, B, C, D, EOS], 4, 4, ("chosen",))


def test_a_completion_that_was_cut_may_save_the_prompt() -> None:
    pair = one("abc", "defxdef", "d", limits=limits(6, 2, 2))
    assert pair == TokenizedPair([BOS, A, B, C, D, E], [BOS, A, B, C, D, EOS], 4, 4, ("chosen",))


def test_both_branches_lose_the_same_tokens() -> None:
    """'de' is one token, so the prompt 'xabcd' has a token less before 'ee' than before 'xx'."""
    tokenizer = merge_tokenizer("abcdex", [("d", "e")], bos_token="<s>", eos_token="</s>")
    a, _, c, d, e, x, de, bos, eos = range(9)
    keep_end = one("xabcd", "ee", "xx", tokenizer, limits(7, 3))
    assert keep_end == TokenizedPair([bos, c, de, e, eos], [bos, c, d, x, x, eos], 2, 3, ("prompt",))
    keep_start = one("xabcd", "ee", "xx", tokenizer, limits(7, 3, mode="keep_start"))
    assert keep_start == TokenizedPair([bos, x, a, de, e, eos], [bos, x, a, x, x, eos], 3, 3, ("prompt",))


def test_a_prompt_that_cannot_be_cut_far_enough_is_skipped() -> None:
    """Only BOS is prompt in both branches, so the rejected one's long prompt cannot be cut for both."""
    merges = [("f", "x"), ("e", "fx"), ("d", "efx"), ("c", "defx"), ("b", "cdefx"), ("a", "bcdefx")]
    tokenizer = merge_tokenizer("abcdefx", merges, bos_token="<s>", eos_token="</s>")
    skipped = one("abcdef", "x", "a", tokenizer, limits(4, 3))
    assert skipped == Skipped("empty_completion", "no completion token fits max_length (4)")


# --- encoder-decoders ---


def framing(before: str, after: str, **special: str) -> PreTrainedTokenizerFast:
    """The hand tokenizer, which puts BOS or EOS around a text by itself."""
    tokenizer = merge_tokenizer("abcdefx", [], bos_token="<s>", eos_token="</s>", **special)
    ids = [("<s>", BOS), ("</s>", EOS)]
    form = " ".join(part for part in (before, "$A", after) if part)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=ids
    )
    return tokenizer


T5, BART, BARE = framing("", "</s>"), framing("<s>", "</s>"), framing("", "")


def apart(
    prompt: str, chosen: str, rejected: str, tokenizer: Any = T5, **given: Any
) -> TokenizedPair | Skipped:
    return one(prompt, chosen, rejected, tokenizer, is_encoder_decoder=True, **given)


def test_an_encoder_and_a_decoder_read_texts_of_their_own() -> None:
    """'ab' is one token, but none reaches over the end of a prompt."""
    assert apart("ab", "c", "de") == TokenizedPair([A, B, EOS, C, EOS], [A, B, EOS, D, E, EOS], 3, 3)
    merging = merge_tokenizer("abc", [("a", "b")], eos_token="</s>")
    assert apart("a", "b", "c", merging) == TokenizedPair([0, 1, 4], [0, 2, 4], 1, 1)


def test_texts_have_the_special_tokens_of_the_tokenizer() -> None:
    expected = TokenizedPair([BOS, A, EOS, BOS, B, EOS], [BOS, A, EOS, BOS, C, EOS], 3, 3)
    assert apart("a", "b", "c", BART) == expected
    assert apart("<s>a</s>", "b</s>", "<s>c", BART) == expected  # never two of them


def test_completions_end_when_the_tokenizer_adds_nothing() -> None:
    assert apart("a", "b", "c</s>", BARE) == TokenizedPair([A, B, EOS], [A, C, EOS], 1, 1)


def test_a_templated_completion_ends_with_its_own_token() -> None:
    tokenizer = framing("", "</s>", extra_special_tokens=["<end>"])
    end = len(tokenizer) - 1
    assert apart("a", "b<end>", "c", tokenizer, templated=True) == TokenizedPair(
        [A, EOS, B, end], [A, EOS, C, EOS], 2, 2
    )
    assert apart("a", "b<end>", "c", tokenizer) == TokenizedPair(
        [A, EOS, B, end, EOS], [A, EOS, C, EOS], 2, 2
    )


def test_prompt_and_completions_are_cut_each_to_its_bound() -> None:
    """Special tokens stay where they are."""
    bounds = limits(100, 4, 3)
    assert apart("abcdef", "abcd", "ab", BART, limits=bounds) == TokenizedPair(
        [BOS, E, F, EOS, BOS, A, EOS], [BOS, E, F, EOS, BOS, A, EOS], 4, 4, ("prompt", "chosen", "rejected")
    )
    ends = limits(100, 4, 4, "keep_start")
    assert apart("abcdef", "abcd", "ab</s>", BART, limits=ends) == TokenizedPair(
        [BOS, A, B, EOS, BOS, A, B, EOS], [BOS, A, B, EOS, BOS, A, B, EOS], 4, 4, ("prompt", "chosen")
    )


def test_max_length_bounds_each_of_them() -> None:
    assert apart("abcdef", "abcdef", "a", limits=limits(3)) == TokenizedPair(
        [E, F, EOS, A, B, EOS], [E, F, EOS, A, EOS], 3, 3, ("prompt", "chosen")
    )
    # together they may be longer
    assert apart("ab", "ab", "a", limits=limits(3)) == TokenizedPair(
        [A, B, EOS, A, B, EOS], [A, B, EOS, A, EOS], 3, 3
    )


def test_an_encoder_may_read_special_tokens_alone() -> None:
    assert apart("", "a", "b") == TokenizedPair([EOS, A, EOS], [EOS, B, EOS], 1, 1)
    assert apart("abc", "a", "b", BART, limits=limits(9, 1)) == TokenizedPair(
        [BOS, EOS, BOS, A, EOS], [BOS, EOS, BOS, B, EOS], 2, 2, ("prompt",)
    )


@pytest.mark.parametrize(
    ("texts", "tokenizer", "bounds", "reason", "detail"),
    [
        (("a", "", "b"), T5, ROOMY, "empty_completion", "chosen has no token"),
        (("a", "b", ""), BART, ROOMY, "empty_completion", "rejected has no token"),
        (("", "a", "b"), BARE, ROOMY, "empty_prompt", "the prompt has no token, and the tokenizer adds none"),
        (("a", "b", "c"), BART, limits(9, None, 2), "empty_completion", "no token of chosen fits beside the"),
    ],
)
def test_what_an_encoder_decoder_cannot_score(
    texts: tuple[str, str, str], tokenizer: Any, bounds: LengthLimits, reason: str, detail: str
) -> None:
    found = apart(*texts, tokenizer, limits=bounds)
    assert isinstance(found, Skipped)
    assert found.reason == reason
    assert found.detail.startswith(detail)


# --- whatever the text ---

PIECES = [
    *" ".join(CORPUS).split(" "),
    " ",
    "  ",
    "\n",
    "</s>",
    "<|im_end|>",
    "<|im_start|>",
    "<s>",
    "e\u0301",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join)


@settings(deadline=None)
@given(
    chat=st.sampled_from(sorted(CHATS)),
    texts=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4),
    templated=st.booleans(),
    max_length=st.integers(2, 40),
    max_prompt=st.none() | st.integers(1, 30),
    max_completion=st.none() | st.integers(1, 10),
    mode=st.sampled_from(["keep_end", "keep_start"]),
)
def test_what_always_holds(
    chat: str,
    texts: list[tuple[str, str, str]],
    templated: bool,
    max_length: int,
    max_prompt: int | None,
    max_completion: int | None,
    mode: Any,
) -> None:
    tokenizer = tiny_tokenizer(chat)
    bounds = LengthLimits(max_length, max_prompt, max_completion, mode)
    pairs = [PreferencePair(*each, templated=templated) for each in texts]
    results = tokenize_pairs(pairs, tokenizer, bounds)
    assert [tokenize_pairs([pair], tokenizer, bounds)[0] for pair in pairs] == results  # blocks do not matter
    for result, pair in zip(results, pairs, strict=True):
        if isinstance(result, Skipped):
            assert result.reason in ("empty_completion", "empty_prompt")
            continue
        shared = min(result.chosen_start, result.rejected_start)
        assert result.chosen[:shared] == result.rejected[:shared]
        branches = (
            (result.chosen, result.chosen_start, pair.chosen),
            (result.rejected, result.rejected_start, pair.rejected),
        )
        for ids, start, completion in branches:
            assert 1 <= start < len(ids) <= max_length
            assert max_completion is None or len(ids) - start <= max_completion
            assert tokenizer.bos_token_id in (None, ids[0])
            if not result.truncated:
                text = tokenizer.decode(ids)
                whole = tokenizer.decode(
                    tokenizer(pair.prompt + completion, add_special_tokens=False)["input_ids"]
                )
                assert whole in text


@settings(deadline=None)
@given(
    tokenizer=st.sampled_from([tiny_t5_tokenizer(), tiny_bart_tokenizer()]),
    texts=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4),
    max_length=st.integers(2, 40),
    max_prompt=st.none() | st.integers(2, 30),
    max_completion=st.none() | st.integers(1, 10),
    mode=st.sampled_from(["keep_end", "keep_start"]),
)
def test_what_always_holds_apart(
    tokenizer: Any,
    texts: list[tuple[str, str, str]],
    max_length: int,
    max_prompt: int | None,
    max_completion: int | None,
    mode: Any,
) -> None:
    bounds = LengthLimits(max_length, max_prompt, max_completion, mode)
    pairs = [PreferencePair(*each) for each in texts]
    for result in tokenize_pairs(pairs, tokenizer, bounds, is_encoder_decoder=True):
        if isinstance(result, Skipped):
            assert result.reason == "empty_completion"
            continue
        start = result.chosen_start
        assert start == result.rejected_start
        assert result.chosen[:start] == result.rejected[:start]
        assert start <= min(max_length, max_prompt or max_length)
        for ids in (result.chosen, result.rejected):
            assert 2 <= len(ids) - start <= min(max_length, max_completion or max_length)
            assert ids[-1] == ids[start - 1] == tokenizer.eos_token_id


# --- prompts that are encoded once ---


def spaced(*, normalizer: Any = None, scheme: str | None = None) -> PreTrainedTokenizerFast:
    """Words begin with a visible space as in SentencePiece, written by a normalizer or a pre-tokenizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer:
        backend.normalizer = normalizer
    if scheme:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )


def with_tokens(*tokens: AddedToken | str) -> PreTrainedTokenizerFast:
    """The tokenizer of ChatML with other tokens for, or beside, `<|im_start|>`; text means one like that."""
    tokenizer = tiny_tokenizer("plain")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) if isinstance(token, str) else token for token in tokens]
    )
    return tokenizer


def byte_level(**options: bool) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


LEGACY = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
TINY = tiny_tokenizer("chatml")
MARK, END = "<|im_start|>", "<|im_end|>"
PARTED: dict[str, tuple[PreTrainedTokenizerFast, str | None]] = {
    "chatml": (TINY, MARK),
    "first": (spaced(scheme="first"), MARK),
    "always": (spaced(scheme="always"), MARK),
    "legacy": (spaced(normalizer=LEGACY), MARK),
    "prefixed": (byte_level(add_prefix_space=True), MARK),
    "lstrip": (with_tokens(AddedToken(MARK, lstrip=True, normalized=False)), MARK),
    "rstrip": (with_tokens(AddedToken(MARK, rstrip=True, normalized=False)), MARK),
    "single word": (with_tokens(AddedToken(MARK, single_word=True, normalized=False)), END),
    "normalized": (with_tokens(AddedToken(MARK, normalized=True)), END),
    "overlapping": (with_tokens(MARK, "l<|"), MARK),
    "longer": (with_tokens(MARK, f"{MARK}assistant"), f"{MARK}assistant"),
    "around": (with_tokens(MARK, f"\n{MARK}a"), f"\n{MARK}a"),
    "part of another": (with_tokens(MARK, f"{MARK}system"), None),
    "none": (merge_tokenizer("abc", []), None),
}
"""Tokenizers, and where they part a prompt of ChatML."""
MARKED = st.lists(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "assistant", "user", "l<|", "all", " ", "  ", "\n", "sky is", "\u0338"]
    )
    | st.text(max_size=3),
    max_size=8,
).map("".join)


def encoded(
    pairs: list[PreferencePair], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[str]]:
    """The ids of prompts and of prompts with completions, and the texts that were encoded for them."""
    texts: list[str] = []

    def ids(some: list[str], tokenizer: Any) -> list[list[int]]:
        texts.extend(some)
        return encode(some, tokenizer)

    encode = tokenization._ids
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "_ids", ids)
        return tokenization._encoded(pairs, tokenizer), texts


def whole(pairs: list[PreferencePair], tokenizer: Any) -> list[tuple[list[int], ...]]:
    """The same by calls of the tokenizer itself."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [
        (ids(pair.prompt), ids(pair.prompt + pair.chosen), ids(pair.prompt + pair.rejected)) for pair in pairs
    ]


TURN = "<|im_end|>\n<|im_start|>assistant\n"
CHAT = PreferencePair(f"<|im_start|>user\nWhat color is the sky?{TURN}", "It is blue.", " It is black.")


@pytest.mark.parametrize("kind", PARTED)
@given(texts=st.lists(st.tuples(MARKED, MARKED, MARKED), min_size=1, max_size=3))
def test_parted_texts_have_the_ids_of_whole_ones(kind: str, texts: list[tuple[str, str, str]]) -> None:
    tokenizer, _ = PARTED[kind]
    pairs = [CHAT] * PROBE + [PreferencePair(*each) for each in texts]
    assert tokenization._encoded(pairs, tokenizer) == whole(pairs, tokenizer)


@pytest.mark.parametrize("kind", PARTED)
def test_a_long_prompt_is_encoded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, mark = PARTED[kind]
    prompt = f"<|im_start|>user\n{' '.join(CORPUS)}{TURN}"
    ids, texts = encoded([CHAT] * PROBE + [replace(CHAT, prompt=prompt)], tokenizer, monkeypatch)
    assert ids[-1:] == whole([replace(CHAT, prompt=prompt)], tokenizer)
    if mark:
        head, _, tail = prompt.rpartition(mark)
        assert texts[-4:] == [
            head + mark,
            mark + tail,
            mark + tail + CHAT.chosen,
            mark + tail + CHAT.rejected,
        ]
    else:
        assert texts[-3:] == [prompt, prompt + CHAT.chosen, prompt + CHAT.rejected]


def test_a_mark_that_is_no_token_parts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 'all<|im_start|>' the token 'l<|' comes first."""
    tokenizer, _ = PARTED["overlapping"]
    pairs = [CHAT] * PROBE + [replace(CHAT, prompt="all<|im_start|>")]
    ids, texts = encoded(pairs, tokenizer, monkeypatch)
    assert ids == whole(pairs, tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(ids[-1][0])) == "all<|im_start|>"
    assert tokenizer.convert_tokens_to_ids("l<|") in ids[-1][0]
    assert texts[-1] == "all<|im_start|>" + CHAT.rejected


def test_a_block_stays_whole_when_its_first_pairs_are_others_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenization, "_parted", lambda pairs, *_: [([0], [0], [0])] * len(pairs))
    pairs = [CHAT] * (PROBE + 1)
    assert tokenization._encoded(pairs, TINY) == whole(pairs, TINY)


def test_special_tokens_that_are_split_part_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.split_special_tokens = True
    pairs = [CHAT] * (PROBE + 1)
    ids, _ = encoded(pairs, tokenizer, monkeypatch)
    assert ids == whole(pairs, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in ids[0][0]


def test_a_tokenizer_with_code_of_its_own_is_asked_itself() -> None:
    class Lower(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *given: Any, **options: Any) -> Any:
            texts = text.lower() if isinstance(text, str) else [each.lower() for each in text]
            return super()._encode_plus(texts, *given, **options)

    lower = Lower(tokenizer_object=TINY.backend_tokenizer, eos_token=END)
    pairs = [CHAT] * (PROBE + 1)
    assert tokenization._encoded(pairs, lower) == whole(pairs, lower) != whole(pairs, TINY)


def test_what_was_set_in_the_backend_cuts_nothing() -> None:
    tokenizer = tiny_tokenizer("chatml")
    expected = whole([CHAT], tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    assert tokenization._encoded([CHAT], tokenizer) == expected


@pytest.mark.parametrize("chat", sorted(chat for chat, parts in CHATS.items() if "template" in parts))
def test_blocks_of_chats_have_the_ids_of_single_pairs(chat: str) -> None:
    tokenizer = tiny_tokenizer(chat)
    render = ChatTemplate(tokenizer)
    rows = [chat_row(f"What color is {n}?", f"It is {n}.", f" {n}") for n in range(PROBE + 4)]
    pairs = [to_pair(row, render, form="auto", columns={}, assistant_header="trl") for row in rows]
    assert all(isinstance(pair, PreferencePair) for pair in pairs)
    block: Any = pairs
    assert tokenize_pairs(block, tokenizer, ROOMY) == [
        tokenize_pairs([pair], tokenizer, ROOMY)[0] for pair in block
    ]
