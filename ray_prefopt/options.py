"""The fields that files and flags can set, read off the config tree, and the search for a mistyped one."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ray_prefopt.search_config import TuneConfig

Keys = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """A field that files and flags can set. `defaults` are by loss kind; outside `loss` the one under ""."""

    name: str
    annotation: Any
    description: str
    required: bool
    defaults: Mapping[str, Any]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The losses that have the field; empty outside `loss`."""
        return tuple(kind for kind in self.defaults if kind)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal field."""
        literals = [part for part in _parts(self.annotation) if get_origin(part) is Literal]
        return tuple(value for literal in literals for value in get_args(literal))

    @property
    def is_mapping(self) -> bool:
        """Whether `--name.key value` may set one of its keys."""
        return any(get_origin(part) is dict for part in _parts(self.annotation))

    @property
    def is_section(self) -> bool:
        """Whether it holds further fields when it is set."""
        return any(isinstance(part, type) and issubclass(part, BaseModel) for part in _parts(self.annotation))

    @property
    def is_list(self) -> bool:
        """Whether it may hold several values."""
        return self.takes(list) or self.takes(tuple)

    @property
    def grows(self) -> bool:
        """Whether its flag may be repeated for more values; where it may be one number the last flag counts."""
        return self.is_list and not self.takes(int)

    def takes(self, kind: type) -> bool:
        """Whether a value of this type is among those of the field."""
        parts = set(map(_plain, _parts(self.annotation)))
        return kind in parts or Any in parts or any(type(choice) is kind for choice in self.choices)


def _parts(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def _plain(annotation: Any) -> Any:
    return get_origin(annotation) or annotation


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    """The sections that a field opens: none for a value, several for a discriminated union."""
    parts = [part for part in _parts(field.annotation) if part is not type(None)]
    models = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    return models if len(models) == len(parts) else []


def _walk(model: type[BaseModel], prefix: str, kind: str) -> Iterator[Option]:
    for name, field in model.model_fields.items():
        path, sections = prefix + name, _sections(field)
        default = (
            None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        )
        if not sections or (default is None and not field.is_required()):
            description = (field.description or "").strip()
            yield Option(path, field.annotation, description, field.is_required(), {kind: default})
        for section in sections:
            tag = section.model_fields["kind"].default if field.discriminator else kind
            yield from _walk(section, path + ".", tag)


@cache
def options() -> Mapping[str, Option]:
    """Every field by dotted name, in the order of the tree. Fields of several losses are joined into one."""
    joined: dict[str, Option] = {}
    for option in _walk(TuneConfig, "", ""):
        first = joined.get(option.name)
        if first is not None:
            defaults = {**first.defaults, **option.defaults}
            option = replace(first, annotation=first.annotation | option.annotation, defaults=defaults)
        joined[option.name] = option
    return joined


@cache
def sections() -> Mapping[str, str]:
    """The top sections with the first line of what they say about themselves."""
    texts = {"loss": "Which loss, and its weights; `kind` decides which of the fields there are."}
    for name, field in TuneConfig.model_fields.items():
        model = _sections(field)[0]
        texts.setdefault(name, (model.__doc__ or "").partition("\n")[0])
    return {name: texts[name] for name in TuneConfig.model_fields}


def nearest_fields(name: str, known: Sequence[str]) -> list[str]:
    """The known dotted names that `name` may stand for, likeliest first, at most three.

    >>> nearest_fields("loss.bata", ["loss.beta", "optim.betas", "run.name"])
    ['loss.beta']
    >>> nearest_fields("loss.lr", ["loss.beta", "optim.learning_rate"])
    ['optim.learning_rate']
    """
    name = name.replace("-", "_")
    if not name.startswith("search."):  # whose fields are those of one command
        known = [other for other in known if not other.startswith("search.")] or known
    section, _, leaf = name.rpartition(".")
    leaves: dict[str, list[str]] = {}
    for other in known:
        leaves.setdefault(other.rpartition(".")[2], []).append(other)
    here = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    searches = [
        leaves.get(leaf, []),
        [f"{section}.{other}" if section else other for other in difflib.get_close_matches(leaf, here, 1)],
        [other for part, others in leaves.items() if _abbreviates(leaf, part) for other in others],
        difflib.get_close_matches(name, known, 1, 0.7),
        [other for part in difflib.get_close_matches(leaf, leaves, 1, 0.7) for other in leaves[part]],
    ]
    return next((found[:3] for found in searches if found), [])


def _abbreviates(short: str, name: str) -> bool:
    """`lr` for `learning_rate`, `gamma` for `gamma_beta_ratio`."""
    words = name.split("_")
    return len(words) > 1 and (short == "".join(word[0] for word in words if word) or short == words[0])


def dotted(keys: Keys) -> str:
    """`data.train[0].path`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def did_you_mean(names: Sequence[str], dashes: str = "") -> str:
    """' Did you mean X or Y?', or where to look when there is no name."""
    if not names:
        return " `ray-prefopt train --help` lists the fields."
    return f" Did you mean {' or '.join(dashes + name for name in names)}?"


def has(value: Any, key: str | int) -> bool:
    """Whether a mapping or list has something under the key."""
    if isinstance(value, list):
        return isinstance(key, int) and key < len(value)
    return isinstance(value, Mapping) and key in value
