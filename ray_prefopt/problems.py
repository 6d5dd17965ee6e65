"""Sentences about a config that cannot be: the file and line or the flag, what was found, what was probably meant."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ray_prefopt.config import Source
from ray_prefopt.errors import suggest
from ray_prefopt.options import Keys, did_you_mean, dotted, has, nearest_fields, options, sections


class Layer(Protocol):
    """Where some of the values came from: a file, or the command line."""

    def locate(self, keys: Keys) -> str | None:
        """`run.yaml:3` or `--loss.beta`; None when the layer says nothing under these keys."""


_EXPECTED = {
    "bool": "true or false",
    "dict": "a mapping",
    "finite": "a finite number",
    "float": "a number",
    "int": "an integer",
    "list": "a list",
    "mapping": "a mapping",
    "model": "a mapping",
    "string": "text",
    "tuple": "a list",
}
_BOUNDS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}


@dataclass(frozen=True, slots=True)
class Problems:
    """Turns pydantic's errors about `values` into sentences that name the file and line, or the flag."""

    values: Mapping[str, Any]
    layers: Sequence[Layer]

    def of(self, error: ValidationError) -> list[str]:
        """One sentence per field; of a union, the branch that fits the form of the value."""
        by_field: dict[str, list[tuple[Keys, bool, ErrorDetails]]] = {}
        for details in error.errors(include_url=False):
            keys, fits = self._resolve(details)
            by_field.setdefault(".".join(map(str, keys[:2])), []).append((keys, fits, details))
        problems: dict[Keys, list[ErrorDetails]] = {}
        for found in by_field.values():
            by_keys: dict[Keys, list[ErrorDetails]] = {}
            for keys, _, details in [item for item in found if item[1]] or found:
                by_keys.setdefault(keys, []).append(details)
            # The branches of a union that do not fit complain higher up than the one that does.
            for keys, several in by_keys.items():
                if not any(other[: len(keys)] == keys != other for other in by_keys):
                    problems[keys] = several
        meant = {
            name
            for keys, several in problems.items()
            if several[0]["type"] == "extra_forbidden"
            for name in _meant(keys)
        }
        return [
            self._sentence(keys, several)
            for keys, several in problems.items()
            if not (several[0]["type"] == "missing" and dotted(keys) in meant)
        ]

    def booleans(self) -> list[str]:
        """`micro_batch: true`, which pydantic would take for 1."""
        problems = []
        for option in options().values():
            keys = tuple(option.name.split("."))
            value: Any = self.values
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, bool) and not option.takes(bool):
                number = "an integer" if option.takes(int) else "a number" if option.takes(float) else "text"
                problems.append(self._place(keys, f"must be {number}; got {_show(value)}"))
        return problems

    def _resolve(self, details: ErrorDetails) -> tuple[Keys, bool]:
        """The keys of an error in `values` without pydantic's union tags, and whether those tags fit the values."""
        keys: list[str | int] = []
        current: Any = self.values
        fits = True
        for index, part in enumerate(details["loc"]):
            is_last = index == len(details["loc"]) - 1
            if has(current, part):
                current = current[part]
                keys.append(part)
            elif is_last and details["type"] == "missing":
                keys.append(part)
            elif isinstance(current, str):
                fits = fits and str(part).endswith("str")
            elif isinstance(current, list):
                fits = fits and str(part).startswith(("list[", "tuple["))
            elif isinstance(current, Mapping) and str(part).startswith(
                ("dict[", "list[", "constrained-str", "str", Source.__name__)
            ):
                is_named_sets = keys == ["data", "eval"] and current.keys().isdisjoint(Source.model_fields)
                fits = fits and str(part).startswith("dict[" if is_named_sets else Source.__name__)
        return tuple(keys), fits

    def _place(self, keys: Keys, text: str) -> str:
        """`run.yaml:3: loss.beta TEXT`, or `--loss.beta TEXT`, by the layer that had the last word."""
        for layer in reversed(self.layers):
            where = layer.locate(keys)
            if where is not None:
                return f"{where} {text}" if where.startswith("--") else f"{where}: {dotted(keys)} {text}"
        return f"{dotted(keys)} {text}"

    def _value(self, keys: Keys) -> Any:
        value: Any = self.values
        for key in keys:
            value = value[key]
        return value

    def _sentence(self, keys: Keys, found: Sequence[ErrorDetails]) -> str:
        details = found[0]
        kind = details["type"]
        if kind == "extra_forbidden":
            return self._unknown(keys)
        if kind == "missing":
            if isinstance(keys[-1], int):
                return self._place(keys[:-1], f"is too short; got {_show(self._value(keys[:-1]))}")
            if dotted(keys) in options():
                return f"{dotted(keys)} is missing: set it in a file or with --{dotted(keys)}"
            return self._place(keys[:-1], f"lacks {dotted(keys[-1:])}")
        if kind == "value_error":
            return self._contradiction(keys, details["msg"].removeprefix("Value error, "))
        if kind == "union_tag_invalid":
            keys = (*keys, "kind")
        if details["loc"][-1] == "[key]":
            expected = details.get("ctx", {}).get("expected")
            return self._place(keys, f"is not a key of {dotted(keys[:-1])}; its keys are {expected}")
        value = self._value(keys)
        expected = " or ".join(dict.fromkeys(map(_expectation, found)))
        option = options().get(dotted(keys))
        advice = suggest(value.lower(), map(str, option.choices)) if option and isinstance(value, str) else ""
        return self._place(keys, f"must be {expected}; got {_show(value)}{'.' if advice else ''}{advice}")

    def _unknown(self, keys: Keys) -> str:
        name = dotted(keys)
        if name == "search":
            return self._place(keys, "is for `ray-prefopt tune`, which varies this config: leave it out here")
        parts = str(keys[-1]).split(".")
        if len(parts) > 1 and name in options():
            nested = "{" + ": {".join(parts) + ": ..." + "}" * len(parts)
            return self._place(keys, f"is a field, but not in one key: write {nested}")
        option = options().get(name)
        if option is not None and option.kinds:
            chosen = self.values["loss"]["kind"]
            return self._place(
                keys,
                f"is not a field of loss.kind {chosen}; the kinds that have it: {', '.join(option.kinds)}",
            )
        sentence = self._place(keys, "is not a field.")
        return sentence + did_you_mean(_meant(keys), "--" if sentence.startswith("--") else "")

    def _contradiction(self, keys: Keys, message: str) -> str:
        """A validator's message: on a field, or on a section, at the first field that it names and somebody set."""
        section = dotted(keys)
        if section in options():
            return self._place(keys, message)
        fields = [word for word in re.findall(r"\w+", message) if f"{section}.{word}" in options()]
        places = [layer.locate((*keys, field)) for field in fields for layer in reversed(self.layers)]
        places += [layer.locate(keys) for layer in reversed(self.layers)]
        where = next((place for place in places if place is not None), None)
        prefix = "" if f"{keys[0]}." in message else f"{section}: "
        return f"{where}: {prefix}{message}" if where else f"{prefix}{message}"


def _meant(keys: Keys) -> list[str]:
    """The fields that an unknown key may stand for."""
    parent = dotted(keys[:-1])
    if parent.startswith(("data.train", "data.eval")):
        return nearest_fields(dotted(keys), [f"{parent}.{field}" for field in Source.model_fields])
    return nearest_fields(dotted(keys), [*options(), *sections()])


def _expectation(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in ("literal_error", "union_tag_invalid"):
        return "one of " + str(context.get("expected", context.get("expected_tags"))).replace(
            "'", ""
        ).replace(" or ", ", ")
    if kind in _BOUNDS:
        return f"{_BOUNDS[kind]} {next(iter(context.values())):g}"
    if kind == "string_too_short":
        return "text that is not empty"
    if kind in ("too_long", "too_short"):
        return f"a list of {context.get('max_length', context.get('min_length'))}"
    return _EXPECTED.get(kind.partition("_")[0], f"valid ({details['msg']})")


def _show(value: Any) -> str:
    """A value as JSON, short."""
    text = "nothing" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
