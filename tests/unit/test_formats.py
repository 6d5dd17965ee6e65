"""Every form of row, and every way in which a row can be unusable."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_prefopt.data.formats import ChatTemplate, PreferencePair, Skipped, shared_length, to_pair
from ray_prefopt.errors import DataError
from tests.tiny import CHATML, chat_row, tiny_tokenizer

USER = {"role": "user", "content": "What color?"}
BLUE = {"role": "assistant", "content": "Blue."}
RED = {"role": "assistant", "content": "Red."}
ASKED = "<|im_start|>user\nWhat color?<|im_end|>\n"
HEADER = "<|im_start|>assistant\n"


def pair_of(
    row: Any,
    chat: str = "chatml",
    *,
    template: str | None = None,
    form: Any = "auto",
    columns: Mapping[str, str] | None = None,
    header: Any = "trl",
) -> PreferencePair | Skipped:
    render = ChatTemplate(tiny_tokenizer(chat, template=template))
    return to_pair(row, render, form=form, columns=columns or {}, assistant_header=header)


# --- text ---


def test_explicit_text_is_taken_as_it_is() -> None:
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " red.", "score": 3, "tools": "{"}
    assert pair_of(row) == PreferencePair("The sky is", " blue.", " red.", templated=False)


def test_an_empty_prompt_is_a_prompt() -> None:
    assert pair_of({"prompt": "", "chosen": "a", "rejected": "b"}) == PreferencePair("", "a", "b")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),  # the space goes with the completions
        ("The sky is blue.", "The sky is black.", "The sky is bl"),
        ("yes", "no", ""),
        (" a", " b", ""),
        ("a  b", "a  c", "a "),  # one space only
    ],
)
def test_implicit_text_shares_its_beginning(chosen: str, rejected: str, prompt: str) -> None:
    pair = pair_of({"chosen": chosen, "rejected": rejected})
    assert pair == PreferencePair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_an_implicit_prompt_is_none_where_another_column_looks_like_one() -> None:
    row = {"system": "s", "question": "q", "chosen": "It is blue", "rejected": "It is red"}
    assert to_pair(row, None, form="auto", columns={}, assistant_header="trl") == Skipped(
        "missing_column",
        "no column 'prompt', and 'question' looks like one: columns {prompt: question} takes it, "
        "{prompt: ''} what chosen and rejected begin with alike",
    )
    pair = to_pair(row, None, form="auto", columns={"prompt": ""}, assistant_header="trl")
    assert pair == PreferencePair("It is", " blue", " red")
    pair = to_pair(row, None, form="auto", columns={"prompt": "question"}, assistant_header="trl")
    assert pair == PreferencePair("q", "It is blue", "It is red")


@pytest.mark.parametrize(("chosen", "rejected"), [("4", "42"), ("42", "4"), ("same", "same"), ("", "x")])
def test_an_implicit_prompt_may_not_be_everything(chosen: str, rejected: str) -> None:
    skipped = pair_of({"chosen": chosen, "rejected": rejected})
    assert skipped == Skipped("empty_completion", "the implicit prompt takes up all of a completion")


def test_a_tie_is_kept_and_can_be_counted() -> None:
    tie = pair_of({"prompt": "p", "chosen": "same", "rejected": "same"})
    assert isinstance(tie, PreferencePair)
    assert tie.is_tie
    assert not PreferencePair("p", "a", "b").is_tie


def test_columns_are_found_under_other_names() -> None:
    row = {"question": "q", "good": "a", "bad": "b", "prompt": 7}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert pair_of(row, columns=columns) == PreferencePair("q", "a", "b")


# --- conversations ---


@pytest.mark.parametrize(
    "row",
    [
        chat_row("What color?", "Blue.", "Red."),
        {"chosen": [USER, BLUE], "rejected": [USER, RED]},
        {"prompt": "What color?", "chosen": [USER, BLUE], "rejected": [USER, RED]},
        {"prompt": "ignored", "chosen": [USER, BLUE], "rejected": [USER, RED]},
        {"prompt": None, "chosen": [USER, BLUE], "rejected": [USER, RED]},
        {"prompt": "What color?", "chosen": [BLUE], "rejected": [RED]},
        {"prompt": np.array([USER]), "chosen": (BLUE,), "rejected": np.array([RED])},
        {"prompt": [USER], "chosen": [{**BLUE, "tool_calls": np.array([1, 2])}], "rejected": [RED]},
        {"chosen": [USER, {**BLUE, "tool_calls": None}], "rejected": [{**USER, "name": None}, RED]},
    ],
    ids=[
        "explicit",
        "implicit",
        "ultrafeedback",
        "other text",
        "null prompt",
        "text prompt",
        "arrays",
        "inner arrays",
        "nulls",
    ],
)
def test_conversations_are_rendered(row: dict[str, Any]) -> None:
    expected = PreferencePair(ASKED + HEADER, "Blue.<|im_end|>\n", "Red.<|im_end|>\n", templated=True)
    assert pair_of(row) == expected


def test_conversations_that_are_the_same_keep_their_last_turn_as_completion() -> None:
    pair = pair_of({"chosen": [USER, BLUE], "rejected": [USER, BLUE]})
    assert pair == PreferencePair(ASKED + HEADER, "Blue.<|im_end|>\n", "Blue.<|im_end|>\n", templated=True)


def test_completions_may_have_several_turns() -> None:
    again = {"role": "user", "content": "Sure?"}
    pair = pair_of({"chosen": [USER, BLUE, again, RED], "rejected": [USER, BLUE]})
    assert isinstance(pair, PreferencePair)
    assert pair.prompt == ASKED + HEADER
    assert pair.chosen == f"Blue.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n{HEADER}Red.<|im_end|>\n"
    assert pair.rejected == "Blue.<|im_end|>\n"


def test_a_prompt_that_ends_with_an_assistant_turn_is_continued() -> None:
    turn = "{{ message['role'][0] + ':' + message['content'] }}{% if not loop.last %}|{% endif %}"
    template = "{% for message in messages %}" + turn + "{% endfor %}"
    row = {"prompt": [USER, {"role": "assistant", "content": "It is"}], "chosen": [BLUE], "rejected": [RED]}
    pair = pair_of(row, template=template)
    assert pair == PreferencePair("u:What color?|a:It is", "|a:Blue.", "|a:Red.", templated=True)


def test_the_official_header_belongs_to_the_response() -> None:
    pair = pair_of(chat_row("What color?", "Blue.", "Red."), header="official")
    assert pair == PreferencePair(
        ASKED, HEADER + "Blue.<|im_end|>\n", HEADER + "Red.<|im_end|>\n", templated=True
    )


def test_the_official_response_has_no_default_system_prompt() -> None:
    pair = pair_of(chat_row("What color?", "Blue.", "Red."), "qwen", header="official")
    assert isinstance(pair, PreferencePair)
    assert pair.prompt == "<|im_start|>system\nYou are helpful.<|im_end|>\n" + ASKED
    assert pair.chosen == HEADER + "Blue.<|im_end|>\n"


@pytest.mark.parametrize("chat", ["llama3", "gemma", "mistral"])
@pytest.mark.parametrize("header", ["trl", "official"])
def test_bos_is_written_once_and_only_in_the_prompt(chat: str, header: str) -> None:
    pair = pair_of(chat_row("What color?", "Blue.", "Red."), chat, header=header)
    assert isinstance(pair, PreferencePair)
    bos = str(tiny_tokenizer(chat).bos_token)
    assert pair.prompt.startswith(bos)
    assert [text.count(bos) for text in (pair.prompt, pair.chosen, pair.rejected)] == [1, 0, 0]


def test_a_prompt_ends_where_the_template_writes_something_else() -> None:
    template = CHATML + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    pair = pair_of(chat_row("What color?", "<tool>", "Red."), template=template)
    assert isinstance(pair, PreferencePair)
    assert pair.prompt == ASKED + HEADER  # with the chosen answer alone, it would end in '<t'
    assert pair.chosen == "<tool><|im_end|>\n"


TOOLS_TEMPLATE = "{{ tools | length if tools else 'no' }} tools{{ mood | default('') }};" + CHATML


@pytest.mark.parametrize(
    ("extra", "beginning"),
    [
        ({}, "no tools;"),
        ({"tools": None, "chat_template_kwargs": None}, "no tools;"),
        ({"tools": [], "chat_template_kwargs": {}}, "no tools;"),
        ({"tools": "", "chat_template_kwargs": ""}, "no tools;"),
        ({"tools": [{"name": "a"}, {"name": "b"}]}, "2 tools;"),
        ({"tools": np.array([{"name": "a"}])}, "1 tools;"),
        ({"tools": json.dumps([{"name": "a"}])}, "1 tools;"),
        ({"chat_template_kwargs": {"mood": " please", "unset": None}}, "no tools please;"),
        ({"chat_template_kwargs": '{"mood": "!"}'}, "no tools!;"),
    ],
)
def test_a_row_may_bring_tools_and_variables(extra: dict[str, Any], beginning: str) -> None:
    pair = pair_of(chat_row("What color?", "Blue.", "Red.") | extra, template=TOOLS_TEMPLATE)
    assert isinstance(pair, PreferencePair)
    assert pair.prompt == beginning + ASKED + HEADER


def test_an_assistant_turn_may_hold_a_tool_call_alone() -> None:
    template = CHATML.replace("message['content']", "(message['content'] or 'called')")
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    pair = pair_of({"prompt": [USER], "chosen": [call], "rejected": [RED]}, template=template)
    assert isinstance(pair, PreferencePair)
    assert pair.chosen == "called<|im_end|>\n"


def test_a_prompt_may_end_with_a_tool_call_alone() -> None:
    """Which has no text to be continued: what the tools answer is where the completions begin."""
    template = CHATML.replace("message['content']", "(message['content'] or 'called')")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    answers = [[{"role": "tool", "content": text}, BLUE] for text in ("1", "2")]
    row = {"chosen": [USER, call, *answers[0]], "rejected": [USER, call, *answers[1]]}
    pair = pair_of(row, template=template)
    assert isinstance(pair, PreferencePair)
    assert pair.prompt.startswith(ASKED + HEADER + "called<|im_end|>\n")
    assert (pair.prompt + pair.chosen).endswith("tool\n1<|im_end|>\n" + HEADER + "Blue.<|im_end|>\n")


def test_a_prompt_of_text_comes_before_answers_that_begin_alike() -> None:
    more = {"role": "user", "content": "Sure?"}
    pair = pair_of({"prompt": "What color?", "chosen": [BLUE, more, BLUE], "rejected": [BLUE, more, RED]})
    assert isinstance(pair, PreferencePair)
    assert pair.prompt.startswith(ASKED + HEADER + "Blue.<|im_end|>\n")
    assert (pair.chosen, pair.rejected) == ("Blue.<|im_end|>\n", "Red.<|im_end|>\n")


def test_a_content_may_be_parts_of_text() -> None:
    template = CHATML.replace("message['content']", "message['content'][0]['text']")
    parts = {"role": "user", "content": ({"type": "text", "text": "What color?"},)}
    answers = [
        {"role": "assistant", "content": [{"type": "text", "text": text}]} for text in ("Blue.", "Red.")
    ]
    pair = pair_of({"prompt": [parts], "chosen": answers[:1], "rejected": answers[1:]}, template=template)
    assert isinstance(pair, PreferencePair)
    assert (pair.prompt, pair.chosen) == (ASKED + HEADER, "Blue.<|im_end|>\n")


def test_conversations_without_a_template_are_an_error() -> None:
    with pytest.raises(DataError, match=r"no chat template: set data\.chat_template"):
        to_pair(chat_row("q", "a", "b"), None, form="auto", columns={}, assistant_header="trl")


# --- unusable rows ---


def chat_with(**changes: Any) -> dict[str, Any]:
    return chat_row("What color?", "Blue.", "Red.") | changes


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ("a string", "not_a_row", "a row is a mapping of columns; got 'a string'"),
        ({"chosen": "a"}, "missing_column", "no column 'rejected'; got ['chosen']"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "not_text", "'prompt' is text; got 3"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "not_text", "'prompt' is text; got None"),
        ({"prompt": "p", "chosen": float("nan"), "rejected": "b"}, "not_text", "'chosen' is text; got nan"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "not_text", "'rejected' is text; got None"),
        ({"prompt": "p", "chosen": {}, "rejected": "b"}, "not_text", "'chosen' is text; got {}"),
        ({"prompt": "\ud800", "chosen": "a", "rejected": "b"}, "not_text", "surrogates not allowed"),
        ({"prompt": "p", "chosen": "a", "rejected": "b\udfff"}, "not_text", "'rejected' is not Unicode text"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty_completion", "'chosen' is the empty string"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "empty_completion", "'rejected' is the empty string"),
        ({"prompt": "p", "chosen": "a", "rejected": [RED]}, "mixed_form", "chosen is a str, rejected a list"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "mixed_form", "the prompt is a list of messages"),
        (chat_with(chosen=[]), "empty_completion", "'chosen' has no content after the prompt"),
        (chat_with(rejected=[{**RED, "content": ""}]), "empty_completion", "'rejected' has no content"),
        (chat_with(prompt=[]), "no_prompt", "share no first turn"),
        ({"chosen": [BLUE], "rejected": [RED]}, "no_prompt", "share no first turn"),
        ({"prompt": "p", "chosen": [USER, BLUE], "rejected": [RED]}, "no_prompt", "share no first turn"),
        ({"prompt": 5, "chosen": [BLUE], "rejected": [RED]}, "not_text", "'prompt' is text; got 5"),
        (chat_with(prompt=[{**USER, "role": "system"}]), "bad_role", "got 'system'"),
        (chat_with(prompt=[{**USER, "role": "human"}]), "bad_role", "got 'human'"),
        (chat_with(prompt=[{"content": "no role"}]), "bad_role", "got None"),
        (chat_with(prompt=[{**USER, "role": ["user"]}]), "bad_role", "got ['user']"),
        (chat_with(prompt=["What color?"]), "not_text", "a list of messages; got 'What color?' in it"),
        (chat_with(chosen=[{**BLUE, "content": 4}]), "not_text", "a content in 'chosen' is text; got 4"),
        (chat_with(chosen=[{"role": "assistant"}]), "not_text", "a content in 'chosen' is text; got None"),
        (chat_with(prompt=[{**USER, "content": "\udc00"}]), "not_text", "'prompt' is not Unicode text"),
        (chat_with(prompt=[{**USER, "content": [{"type": "image"}]}]), "not_text", "'image'"),
        (chat_with(tools={"name": "a"}), "bad_template_input", "'tools' is a list of JSON schemas"),
        (chat_with(tools="[{"), "bad_template_input", "'tools' is not JSON"),
        (chat_with(tools="[" * 10**5), "bad_template_input", "'tools' is not JSON: maximum recursion depth"),
        (chat_with(tools=["f"]), "bad_template_input", "'tools' is a list of JSON schemas; got ['f']"),
        (chat_with(chat_template_kwargs=[1]), "bad_template_input", "is a mapping; got [1]"),
        (chat_with(chat_template_kwargs={"chat_template": "x"}), "bad_template_input", "cannot set chat_template"),
        (chat_with(chat_template_kwargs={"tokenize": True}), "bad_template_input", "cannot set tokenize"),
    ],
)  # fmt: skip
def test_an_unusable_row_is_skipped_with_a_reason(row: Any, reason: str, detail: str) -> None:
    skipped = pair_of(row)
    assert isinstance(skipped, Skipped)
    assert skipped.reason == reason
    assert detail in skipped.detail


def test_a_mapped_prompt_has_to_be_there() -> None:
    skipped = pair_of({"chosen": "ab", "rejected": "ac"}, columns={"prompt": "question"})
    assert skipped == Skipped("missing_column", "no column 'question'; got ['chosen', 'rejected']")


@pytest.mark.parametrize(
    ("form", "row", "found"),
    [
        ("standard", chat_row("q", "a", "b"), "conversational"),
        ("conversational", {"prompt": "q", "chosen": "a", "rejected": "b"}, "standard"),
    ],
)
def test_a_row_of_the_other_form_is_skipped(form: str, row: dict[str, Any], found: str) -> None:
    assert pair_of(row, form=form) == Skipped("wrong_form", f"data.format is {form}; this row is {found}")


def test_a_template_may_refuse_a_row() -> None:
    row = {"prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": [BLUE], "rejected": [RED]}
    assert pair_of(row, "gemma") == Skipped("template_error", "TemplateError: System role not supported")
    assert isinstance(pair_of(row, "llama3"), PreferencePair)


def test_details_can_be_written_to_a_file() -> None:
    template = "{{ raise_exception(mood + messages[0]['content']) }}"
    row = chat_row("long" * 1000, "a", "b") | {"chat_template_kwargs": {"mood": "\udc00"}}
    skipped = pair_of(row, template=template)
    assert isinstance(skipped, Skipped)
    assert skipped.detail.startswith("TemplateError: \\udc00long")
    assert len(skipped.detail.encode()) < 310


def test_a_template_that_writes_no_completion_makes_no_pair() -> None:
    skipped = pair_of(chat_row("q", "a", "b"), template="{{ messages[0]['content'] }}")
    assert skipped == Skipped("empty_completion", "the chat template writes nothing for 'chosen'")


def test_text_from_a_template_has_to_be_unicode_as_well() -> None:
    row = chat_with(chat_template_kwargs={"mood": "\ud83d"})
    skipped = pair_of(row, template=TOOLS_TEMPLATE)
    assert isinstance(skipped, Skipped)
    assert (skipped.reason, skipped.detail[:25]) == ("not_text", "'prompt' is not Unicode t")


def test_details_stay_short() -> None:
    skipped = pair_of({"prompt": list(range(10**6)), "chosen": [BLUE], "rejected": list(range(10**6))})
    assert isinstance(skipped, Skipped)
    assert len(skipped.detail) < 200


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
)
KEYS = st.sampled_from(["prompt", "chosen", "rejected", "role", "content", "user", "tools", "x"])
VALUES = st.recursive(
    SCALARS | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": SCALARS}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
RENDER = ChatTemplate(tiny_tokenizer("chatml"))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    row=st.fixed_dictionaries({}, optional=dict.fromkeys(["prompt", "chosen", "rejected", "tools"], VALUES))
)
def test_no_row_raises(row: dict[str, Any]) -> None:
    result = to_pair(row, RENDER, form="auto", columns={}, assistant_header="trl")
    if isinstance(result, PreferencePair):
        assert result.chosen
        assert result.rejected
        "".join((result.prompt, result.chosen, result.rejected)).encode()


@given(st.text(alphabet="ab", max_size=6), st.text(alphabet="ab", max_size=6))
def test_shared_length_is_the_longest(one: str, other: str) -> None:
    n = shared_length(one, other)
    assert one[:n] == other[:n]
    assert one[: n + 1] != other[: n + 1] or n == min(len(one), len(other))
