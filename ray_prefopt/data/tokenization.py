"""From the texts of preference pairs to token ids: one tokenizer call for a whole block of pairs.

The rules are those of `tokenize_row` in trl 1.16's CPOTrainer, except where it is wrong: see tokenize_pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray_prefopt.data.formats import PreferencePair, Skipped, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """Bounds in tokens, and which end of a prompt survives."""

    max_length: int
    max_prompt_length: int | None
    max_completion_length: int | None
    truncation_mode: Literal["keep_end", "keep_start"]

    @property
    def prompt_room(self) -> int:
        """Tokens that a prompt keeps when it has to be cut; at least one is left for the completion."""
        room = self.max_length - 1
        return room if self.max_prompt_length is None else min(room, self.max_prompt_length)


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Ids of prompt + completion for both completions, of decoders as of encoder-decoders.

    Neither prompt nor completion (`chosen[:chosen_start]`, `chosen[chosen_start:]`) is ever empty. The prompt is
    the same in both: `chosen[:n] == rejected[:n]` for n = min(chosen_start, rejected_start). The starts differ
    when a token reaches over the end of the prompt in one of them only.
    """

    chosen: list[int]
    rejected: list[int]
    chosen_start: int
    rejected_start: int
    truncated: tuple[str, ...] = ()
    """Which of `prompt`, `chosen` and `rejected` were cut."""


def tokenize_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: "PreTrainedTokenizerBase",
    limits: LengthLimits,
    *,
    is_encoder_decoder: bool = False,
) -> list[TokenizedPair | Skipped]:
    """Ids of each pair, in the same order; a pair in which nothing can be scored is Skipped.

    A decoder reads prompt and completion as one text:

    * Split: the prompt is the tokens that it has both alone and before the completion; a token that reaches
      over its end is scored with the completion. TRL steps back one token at most, and stops when that is
      not enough.
    * BOS: begins every prompt when the tokenizer has one, unless the text does already.
    * EOS: ends every completion, except a templated one that ends with a special token of its own, perhaps
      with white space after it. TRL adds a second EOS after the newline of ChatML.
    * Limits: completions are cut to max_completion_length. When prompt + longer completion still exceed
      max_length, the prompt is cut to max_prompt_length (its BOS stays), and each completion to what is left.
      TRL cuts no prompt, so its max_length is no bound and can leave nothing of a completion.

    An encoder-decoder reads them as texts of their own:

    * Special tokens: those that the tokenizer puts around a text, and around a target, unless they are there
      already; TRL doubles them. EOS ends completions as above; TRL adds none when the tokenizer does not.
    * Limits: a completion is cut to max_completion_length, a prompt to max_prompt_length, each to max_length; their
      special tokens stay. TRL cuts no prompt.
    """
    if not pairs:
        return []
    return (_apart if is_encoder_decoder else _together)(pairs, tokenizer, limits)


_BARE = {
    "padding": False,
    "truncation": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}
"""Options of a tokenizer: ids alone, all of them."""


def _together(
    pairs: Sequence[PreferencePair], tokenizer: "PreTrainedTokenizerBase", limits: LengthLimits
) -> list[TokenizedPair | Skipped]:
    ends = _Ends(tokenizer)
    return [
        _tokenized(pair, *ids, ends, limits)
        for pair, ids in zip(pairs, _encoded(pairs, tokenizer), strict=True)
    ]


def _apart(
    pairs: Sequence[PreferencePair], tokenizer: "PreTrainedTokenizerBase", limits: LengthLimits
) -> list[TokenizedPair | Skipped]:
    options = {"add_special_tokens": True, "return_special_tokens_mask": True, **_BARE}
    targets = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    prompts = _framed(tokenizer([pair.prompt for pair in pairs], **options))
    answers = _framed(tokenizer(text_target=targets, **options))
    n = len(pairs)
    ends = _Ends(tokenizer)
    return [
        _tokenized_apart(pair, prompt, (chosen, rejected), ends, limits)
        for pair, prompt, chosen, rejected in zip(pairs, prompts, answers[:n], answers[n:], strict=True)
    ]


# --- encoding ---

PROBE = 8
"""Pairs of a block that are encoded both whole and parted."""

_Triple = tuple[list[int], list[int], list[int]]
"""Ids of a prompt, and of the prompt with each completion as one text."""


def _encoded(pairs: Sequence[PreferencePair], tokenizer: "PreTrainedTokenizerBase") -> list[_Triple]:
    """The ids of each pair. Long prompts are encoded once, where the tokenizer has a mark to part them at."""
    first, rest = pairs[:PROBE], pairs[PROBE:]
    triples = _whole(first, tokenizer)
    mark = _mark(triples[0][0], tokenizer) if rest else None
    parted = _parted(rest, mark, tokenizer) if mark and _parted(first, mark, tokenizer) == triples else None
    return triples + (_whole(rest, tokenizer) if parted is None else parted)


def _whole(pairs: Sequence[PreferencePair], tokenizer: "PreTrainedTokenizerBase") -> list[_Triple]:
    texts = [pair.prompt for pair in pairs]
    texts += [pair.prompt + pair.chosen for pair in pairs]
    texts += [pair.prompt + pair.rejected for pair in pairs]
    ids, n = _ids(texts, tokenizer), len(pairs)
    return list(zip(ids[:n], ids[n : 2 * n], ids[2 * n :], strict=True))


def _ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Ids of each text, and no special token that is not in it."""
    if not _is_plain(tokenizer):
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, **_BARE)["input_ids"]
        return ids
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _is_plain(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer hands texts to its backend as they are; one with code of its own may not."""
    kind = type(tokenizer)
    names = [kind.__call__.__qualname__, kind._encode_plus.__qualname__]
    return names == ["PreTrainedTokenizerBase.__call__", "TokenizersBackend._encode_plus"]


def _mark(prompt: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> tuple[int, str] | None:
    """The last token of a prompt that texts can be parted at, as a template's `<|im_start|>`, and its text.

    It is found in a text before all else, so that nothing reaches over it, and is no part of another such token.
    """
    if tokenizer.split_special_tokens or not _is_plain(tokenizer):
        return None
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if not token.normalized}
    mark = next((index for index in reversed(prompt) if index in added), None)
    if mark is None or any(
        added[mark].content in token.content for index, token in added.items() if index != mark
    ):
        return None
    return mark, added[mark].content


def _parted(
    pairs: Sequence[PreferencePair], mark: tuple[int, str], tokenizer: "PreTrainedTokenizerBase"
) -> list[_Triple] | None:
    """The same as `_whole`: prompts are encoded once up to their last mark, the rest as of there three times.

    Both parts have the mark, which says that it is a token whatever is beside it, and keeps the second from being the
    beginning of a text; where it is none, there is nothing to return.
    """
    mark_id, text = mark
    heads, tails = [], []
    for pair in pairs:
        before, found, after = pair.prompt.rpartition(text)
        heads.append(before + found)
        tails.append(found + after)
    texts = heads + tails
    texts += [tail + pair.chosen for tail, pair in zip(tails, pairs, strict=True)]
    texts += [tail + pair.rejected for tail, pair in zip(tails, pairs, strict=True)]
    ids, n = _ids(texts, tokenizer), len(pairs)
    triples = []
    for head, *parts in zip(ids[:n], ids[n : 2 * n], ids[2 * n : 3 * n], ids[3 * n :], strict=True):
        if head and any(part[:1] != [mark_id] for part in (head[-1:], *parts)):
            return None
        prompt, chosen, rejected = (head[:-1] + part for part in parts)
        triples.append((prompt, chosen, rejected))
    return triples


class _Ends:
    """The tokens that begin and end a sequence of this tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.bos: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(token_id for token_id, token in added if token.special)}
        self.blank: dict[int, bool] = {}

    def has_ended(self, completion: Sequence[int], *, templated: bool) -> bool:
        """Whether a completion needs no EOS any more."""
        return completion[-1:] == self.eos or (templated and self.is_closed(completion))

    def is_closed(self, completion: Sequence[int]) -> bool:
        """Whether the last token that is not white space is a special one."""
        last = next((token_id for token_id in reversed(completion) if not self._is_blank(token_id)), None)
        return last in self.special

    def _is_blank(self, token_id: int) -> bool:
        if token_id not in self.blank:
            text = str(self.tokenizer.decode([token_id]))
            self.blank[token_id] = token_id not in self.special and not text.strip()
        return self.blank[token_id]


def _tokenized(
    pair: PreferencePair,
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    ends: _Ends,
    limits: LengthLimits,
) -> TokenizedPair | Skipped:
    prompts, answers = [], []
    for name, full in (("chosen", chosen), ("rejected", rejected)):
        start = shared_length(prompt, full)
        head, answer = full[:start], full[start:]
        if not answer:
            return Skipped("empty_completion", f"{name} adds no token to its prompt")
        prompts.append(head if head[:1] == ends.bos else ends.bos + head)
        answers.append(answer + ([] if ends.has_ended(answer, templated=pair.templated) else ends.eos))
    if not all(prompts):
        return Skipped("empty_prompt", "the prompt has no token, and the tokenizer has no BOS for its place")

    whole = [*prompts, *answers]
    answers = [answer[: limits.max_completion_length] for answer in answers]
    if max(len(prompts[0]) + len(answers[0]), len(prompts[1]) + len(answers[1])) > limits.max_length:
        prompts = _cut_prompts(prompts, limits, has_bos=prompts[0][:1] == ends.bos)
        rooms = [max(limits.max_length - len(head), 0) for head in prompts]
        answers = [answer[:room] for answer, room in zip(answers, rooms, strict=True)]
        if not all(answers):
            return Skipped("empty_completion", f"no completion token fits max_length ({limits.max_length})")
    names = ("prompt", "prompt", "chosen", "rejected")
    cut = [
        name for name, old, new in zip(names, whole, [*prompts, *answers], strict=True) if len(new) < len(old)
    ]
    return _joined(prompts, answers, cut)


def _joined(prompts: list[list[int]], answers: list[list[int]], cut: Sequence[str]) -> TokenizedPair:
    """The pair of both branches' prompts and completions; `cut` names what was cut."""
    return TokenizedPair(
        chosen=prompts[0] + answers[0],
        rejected=prompts[1] + answers[1],
        chosen_start=len(prompts[0]),
        rejected_start=len(prompts[1]),
        truncated=tuple(dict.fromkeys(cut)),
    )


def _cut_prompts(prompts: list[list[int]], limits: LengthLimits, *, has_bos: bool) -> list[list[int]]:
    """The prompts of both branches without the same tokens, the longer one at most limits.prompt_room long.

    >>> _cut_prompts([[0, 1, 2, 3, 4], [0, 1, 2, 3]], LengthLimits(9, 3, None, "keep_end"), has_bos=True)
    [[0, 3, 4], [0, 3]]
    >>> _cut_prompts([[0, 1, 2, 3, 4], [0, 1, 2, 3]], LengthLimits(9, 3, None, "keep_start"), has_bos=True)
    [[0, 1, 2], [0, 1, 2]]
    """
    room = limits.prompt_room
    if limits.truncation_mode == "keep_start":
        return [head[:room] for head in prompts]
    surplus = max(map(len, prompts)) - room
    first = 1 if has_bos else 0
    surplus = min(surplus, min(map(len, prompts)) - 1)
    return [head[:first] + head[first + surplus :] for head in prompts] if surplus > 0 else prompts


# --- encoder-decoders ---


@dataclass(frozen=True, slots=True)
class _Framed:
    """A text, and the special tokens that belong around it."""

    before: list[int]
    text: list[int]
    after: list[int]

    @property
    def ids(self) -> list[int]:
        return self.before + self.text + self.after


def _framed(encoded: Mapping[str, Any]) -> list[_Framed]:
    """Texts that were encoded with special tokens; what a text begins or ends with by itself is not added to it.

    >>> _framed({"input_ids": [[0, 5, 1], [0, 5, 1, 1]], "special_tokens_mask": [[1, 0, 1], [1, 0, 0, 1]]})
    [_Framed(before=[0], text=[5], after=[1]), _Framed(before=[0], text=[5, 1], after=[])]
    """
    parts = []
    for ids, mask in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        start = mask.index(0) if 0 in mask else len(mask)
        end = len(mask) - mask[::-1].index(0) if 0 in mask else len(mask)
        before, text, after = ids[:start], ids[start:end], ids[end:]
        begins, ends = text[: len(before)] == before, text[len(text) - len(after) :] == after
        parts.append(_Framed([] if begins else before, text, [] if ends else after))
    return parts


def _tokenized_apart(
    pair: PreferencePair,
    prompt: _Framed,
    answers: tuple[_Framed, _Framed],
    ends: _Ends,
    limits: LengthLimits,
) -> TokenizedPair | Skipped:
    if not prompt.ids:
        return Skipped("empty_prompt", "the prompt has no token, and the tokenizer adds none")
    room = min(limits.max_prompt_length or limits.max_length, limits.max_length)
    head = _fitted(prompt, room, keep_end=limits.truncation_mode == "keep_end")
    cut = ["prompt"] if len(head) < len(prompt.ids) else []
    room = min(limits.max_completion_length or limits.max_length, limits.max_length)
    targets = []
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer.text:
            return Skipped("empty_completion", f"{name} has no token")
        closed = _Framed(answer.before, answer.text, answer.after or ends.eos)
        if room <= len(closed.ids) - len(closed.text):
            return Skipped("empty_completion", f"no token of {name} fits beside the special ones in {room}")
        has_ended = ends.has_ended(answer.text, templated=pair.templated)
        target = answer.before + answer.text if has_ended else closed.ids
        if len(target) > room:
            target = _fitted(closed, room, keep_end=False)
            cut.append(name)
        targets.append(target)
    return _joined([head, head], targets, cut)


def _fitted(framed: _Framed, room: int, *, keep_end: bool) -> list[int]:
    """All of it, or what is left when the text is cut until it fits.

    >>> _fitted(_Framed([0], [5, 6, 7], [1]), 4, keep_end=True)
    [0, 6, 7, 1]
    >>> _fitted(_Framed([0], [5, 6, 7], [1]), 4, keep_end=False)
    [0, 5, 6, 1]
    """
    surplus = max(min(len(framed.ids) - room, len(framed.text)), 0)
    text = framed.text[surplus:] if keep_end else framed.text[: len(framed.text) - surplus]
    return framed.before + text + framed.after
