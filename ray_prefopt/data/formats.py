"""From a raw row to the three texts of a preference pair, in every form that TRL knows.

A row is explicit (it has a prompt) or implicit (the prompt is the common beginning of both completions).
Its values are text, or conversations (lists of messages), which go through the tokenizer's own chat template.
"""

import inspect
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ray_prefopt.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["auto", "standard", "conversational"]
AssistantHeader = Literal["trl", "official"]
Message = dict[str, Any]

PROMPTS = ("question", "instruction", "query", "input", "problem")
"""Names of columns that hold prompts elsewhere."""
IMPLICIT = ""
"""The column of a prompt that is what both completions begin with."""
OF_TEMPLATES = frozenset({"tools", "chat_template_kwargs"})
"""Columns that chat templates are given besides."""
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt and the completions that were preferred and refused."""

    prompt: str
    chosen: str
    rejected: str
    templated: bool = False
    """True when a chat template wrote the texts, special tokens included."""

    @property
    def is_tie(self) -> bool:
        """Whether both completions are the same: such a pair teaches no preference."""
        return self.chosen == self.rejected


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that makes no pair: a fixed slug to count by, and what was found."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of a tokenizer: messages in, text out."""

    tokenizer: "PreTrainedTokenizerBase"

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Any] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
        **ending: Any,
    ) -> str:
        """Text of a conversation; `ending` is add_generation_prompt or continue_final_message."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, **ending, **variables
        )
        return str(text)

    @property
    def reserved(self) -> frozenset[str]:
        """Names that chat_template_kwargs may not use: they are arguments, not variables of the template."""
        return frozenset(inspect.signature(self.tokenizer.apply_chat_template).parameters)


class _RowError(Exception):
    """Carries a Skipped out of the helpers below; never leaves this module."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        printable = detail[:300].encode(errors="backslashreplace").decode()
        self.skipped = Skipped(reason, printable)


def to_pair(
    row: Mapping[str, Any],
    render: ChatTemplate | None,
    *,
    form: Form,
    columns: Mapping[str, str],
    assistant_header: AssistantHeader,
) -> PreferencePair | Skipped:
    """The pair in a row, or why there is none; `columns` maps prompt/chosen/rejected to the row's own names.

    Columns that are not asked for are ignored, except `tools` and `chat_template_kwargs` of conversations.
    Raises DataError for a conversation when there is no chat template, as no other row would fare better.

    >>> row = {"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}
    >>> to_pair(row, None, form="auto", columns={}, assistant_header="trl")
    PreferencePair(prompt='2 + 2 =', chosen=' 4', rejected=' 5', templated=False)
    >>> to_pair({"chosen": "four"}, None, form="auto", columns={}, assistant_header="trl")
    Skipped(reason='missing_column', detail="no column 'rejected'; got ['chosen']")
    """
    try:
        return _pair(row, render, form, columns, assistant_header)
    except _RowError as error:
        return error.skipped


def _pair(
    row: Mapping[str, Any],
    render: ChatTemplate | None,
    form: Form,
    columns: Mapping[str, str],
    assistant_header: AssistantHeader,
) -> PreferencePair:
    if not isinstance(row, Mapping):
        raise _RowError("not_a_row", f"a row is a mapping of columns; got {reprlib.repr(row)}")
    names = {ours: columns.get(ours, ours) for ours in ("prompt", "chosen", "rejected")}
    needed = [name for ours, name in names.items() if ours != "prompt" or columns.get(ours)]
    for name in needed:
        if name not in row:
            raise _RowError("missing_column", f"no column {name!r}; got {sorted(map(str, row))}")
    chosen, rejected = row[names["chosen"]], row[names["rejected"]]

    if _is_list(chosen) != _is_list(rejected):
        raise _RowError(
            "mixed_form", f"chosen is a {type(chosen).__name__}, rejected a {type(rejected).__name__}"
        )
    found = "conversational" if _is_list(chosen) else "standard"
    if form not in ("auto", found):
        raise _RowError("wrong_form", f"data.format is {form}; this row is {found}")
    if found == "standard":
        return _text_pair(row, names)
    if render is None:
        raise DataError(
            "the rows are conversations and the tokenizer has no chat template: set data.chat_template to a "
            "Jinja text or file, or use a tokenizer that has one"
        )
    prompt, chosen, rejected = _conversations(row, names)
    inputs = _template_inputs(row, render)
    return _rendered(partial(render, **inputs), prompt, chosen, rejected, assistant_header)


# --- text ---


def _text_pair(row: Mapping[str, Any], names: Mapping[str, str]) -> PreferencePair:
    chosen, rejected = _text(row, names["chosen"]), _text(row, names["rejected"])
    if names["prompt"] not in row:
        other = next((name for name in PROMPTS if isinstance(row.get(name), str)), None)
        if other is not None and names["prompt"] != IMPLICIT:
            raise _RowError(
                "missing_column",
                f"no column {names['prompt']!r}, and {other!r} looks like one: columns {{prompt: {other}}} takes it, "
                "{prompt: ''} what chosen and rejected begin with alike",
            )
        prompt = _shared_text(chosen, rejected)
        return PreferencePair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    if _is_list(row[names["prompt"]]):
        raise _RowError("mixed_form", "the prompt is a list of messages, but chosen and rejected are text")
    prompt = _text(row, names["prompt"])
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion:
            raise _RowError("empty_completion", f"{names[name]!r} is the empty string")
    return PreferencePair(prompt, chosen, rejected)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise _RowError("not_text", f"{name!r} is text; got {reprlib.repr(value)}")
    _check_unicode(value, name)
    return value


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _RowError("not_text", f"{name!r} is not Unicode text: {error}") from None


def _shared_text(chosen: str, rejected: str) -> str:
    """Longest common prefix, less a space at its end, which belongs to the completions.

    >>> _shared_text("The sky is blue", "The sky is black")
    'The sky is bl'
    >>> _shared_text("The sky is blue", "The sky is green")
    'The sky is'
    """
    shared = chosen[: shared_length(chosen, rejected)]
    if shared in (chosen, rejected):
        raise _RowError("empty_completion", "the implicit prompt takes up all of a completion")
    return shared.removesuffix(" ")


# --- conversations ---


def _conversations(
    row: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected as lists of messages, none of them empty."""
    chosen, rejected = _messages(row, names["chosen"]), _messages(row, names["rejected"])
    prompt_value = row.get(names["prompt"])
    if _is_list(prompt_value):
        prompt = _messages(row, names["prompt"])
    else:
        # A prompt that is text repeats the first user turn of both lists (UltraFeedback), or stands for it.
        begin_with_answers = all(lines and lines[0]["role"] == "assistant" for lines in (chosen, rejected))
        turns = _shared_turns(chosen, rejected)
        prompt, chosen, rejected = chosen[:turns], chosen[turns:], rejected[turns:]
        if begin_with_answers and prompt_value is not None:
            prompt = [{"role": "user", "content": _text(row, names["prompt"])}, *prompt]

    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(message.get("content") or message.get("tool_calls") for message in messages):
            raise _RowError("empty_completion", f"{names[name]!r} has no content after the prompt")
    if not prompt:
        raise _RowError("no_prompt", "there is no prompt, and chosen and rejected share no first turn")
    if prompt[-1]["role"] not in ("user", "tool", "assistant"):
        raise _RowError(
            "bad_role", f"a prompt ends with a user, tool or assistant turn; got {prompt[-1]['role']!r}"
        )
    return prompt, chosen, rejected


def _shared_turns(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Number of turns that both begin with; never the last turn of either.

    >>> hi, yes, no = ({"role": role, "content": role} for role in ("user", "assistant", "tool"))
    >>> _shared_turns([hi, yes], [hi, no]), _shared_turns([hi, yes], [hi, yes])
    (1, 1)
    """
    return min(shared_length(chosen, rejected), max(len(chosen) - 1, 0), max(len(rejected) - 1, 0))


def _messages(row: Mapping[str, Any], name: str) -> list[Message]:
    return [_message(value, name) for value in row[name]]


def _message(value: Any, name: str) -> Message:
    """A message without its null fields, which Arrow adds where other rows have a value."""
    if not isinstance(value, Mapping):
        raise _RowError("not_text", f"{name!r} is a list of messages; got {reprlib.repr(value)} in it")
    lists = {key: field.tolist() for key, field in value.items() if isinstance(field, np.ndarray)}
    message = {key: field for key, field in {**value, **lists}.items() if field is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _RowError("bad_role", f"a role in {name!r} is one of {ROLES}; got {reprlib.repr(role)}")
    if isinstance(content, list | tuple):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    else:
        texts = [] if content is None and message.get("tool_calls") else [content]
    for text in texts:
        if not isinstance(text, str):
            raise _RowError("not_text", f"a content in {name!r} is text; got {reprlib.repr(content)}")
        _check_unicode(text, name)
    return message


def _template_inputs(row: Mapping[str, Any], render: ChatTemplate) -> dict[str, Any]:
    """What a row hands to the chat template besides its messages."""
    tools = _json(row, "tools") or None
    if tools is not None and not (_is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)):
        raise _RowError("bad_template_input", f"'tools' is a list of JSON schemas; got {reprlib.repr(tools)}")
    variables = _json(row, "chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise _RowError(
            "bad_template_input", f"'chat_template_kwargs' is a mapping; got {reprlib.repr(variables)}"
        )
    variables = {name: value for name, value in variables.items() if value is not None}
    if variables and (taken := sorted(variables.keys() & render.reserved)):
        raise _RowError("bad_template_input", f"'chat_template_kwargs' cannot set {', '.join(taken)}")
    return {"tools": tools, "variables": variables}


def _json(row: Mapping[str, Any], name: str) -> Any:
    """A value that may be spelled as JSON text."""
    value = row.get(name)
    if not isinstance(value, str):
        return value.tolist() if isinstance(value, np.ndarray) else value
    try:
        return json.loads(value or "null")
    except (ValueError, RecursionError) as error:
        raise _RowError("bad_template_input", f"{name!r} is not JSON: {error}") from None


def _rendered(
    render: Callable[..., str],
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    assistant_header: AssistantHeader,
) -> PreferencePair:
    """Texts whose concatenations are the renderings of the whole conversations.

    `trl`: the prompt ends with the assistant header, as in trl.data_utils.apply_chat_template.
    `official`: the responses begin with it, as in princeton-nlp/SimPO; being cut out of whole conversations,
    they hold neither a default system prompt nor a second BOS.
    """
    last = prompt[-1]
    name = "continue_final_message" if last["role"] == "assistant" else "add_generation_prompt"
    is_bare_call = last["role"] == "assistant" and not last.get("content")  # it has no text to be continued
    ending = {name: True} if assistant_header == "trl" and not is_bare_call else {}
    try:
        before = render(prompt, **ending)
        with_chosen, with_rejected = render(prompt + chosen), render(prompt + rejected)
    except Exception as error:  # a template runs on the row's own data and may raise anything
        raise _RowError("template_error", f"{type(error).__name__}: {error}") from error
    # Some templates write a prompt differently when an answer follows: the prompt is what stays the same.
    before = before[: min(shared_length(before, with_chosen), shared_length(before, with_rejected))]
    pair = PreferencePair(before, with_chosen[len(before) :], with_rejected[len(before) :], templated=True)
    for name, text in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        _check_unicode(text, name)
        if not text and name != "prompt":
            raise _RowError("empty_completion", f"the chat template writes nothing for {name!r}")
    return pair


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Number of items (characters, turns or tokens) that two sequences begin with in common.

    >>> shared_length("prompt", "prone"), shared_length([7, 8], [7, 8, 9])
    (3, 2)
    """
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(i for i in range(shorter) if one[i] != other[i])


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)
