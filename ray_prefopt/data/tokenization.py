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
    texts = [pair.prompt for pair in pairs]
    texts += [pair.prompt + pair.chosen for pair in pairs]
    texts += [pair.prompt + pair.rejected for pair in pairs]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, **_BARE)["input_ids"]
    n = len(pairs)
    ends = _Ends(tokenizer)
    return [
        _tokenized(pair, prompt, chosen, rejected, ends, limits)
        for pair, prompt, chosen, rejected in zip(pairs, ids[:n], ids[n : 2 * n], ids[2 * n :], strict=True)
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
