"""Read a TrainConfig from YAML files and command line flags, and say plainly what is wrong with them.

PyYAML reads files, with the numbers of YAML 1.2 (so that `5e-7` is one); pydantic-settings reads
`--section.field value`; pydantic validates the two together. Ours is the rest: where a value came from, and which
name the user may have meant. Every problem is a ConfigError. Imports neither torch nor ray.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from ray_prefopt.config import Source, TrainConfig
from ray_prefopt.errors import ConfigError, suggest

Keys = tuple[str | int, ...]

# --- The fields of the tree ---


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
    for option in _walk(TrainConfig, "", ""):
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
    for name, field in TrainConfig.model_fields.items():
        model = _sections(field)[0]
        texts.setdefault(name, (model.__doc__ or "").partition("\n")[0])
    return {name: texts[name] for name in TrainConfig.model_fields}


def nearest_fields(name: str, known: Sequence[str]) -> list[str]:
    """The known dotted names that `name` may stand for, likeliest first, at most three.

    >>> nearest_fields("loss.bata", ["loss.beta", "optim.betas", "run.name"])
    ['loss.beta']
    >>> nearest_fields("loss.lr", ["loss.beta", "optim.learning_rate"])
    ['optim.learning_rate']
    """
    name = name.replace("-", "_")
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


# --- YAML ---


class _Loader(yaml.SafeLoader):
    """Scalars as in the core schema of YAML 1.2: `5e-7` is a number, `no` and `2026-01-01` are text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or our loader would read as something else."""


_NUMBER = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_SCALARS = {
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    "int": (re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*|0x[0-9a-fA-F]+"), "-+0123456789"),
    "float": (_NUMBER, "-+.0123456789"),
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "merge": (re.compile(r"<<"), "<"),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_regexp, _first) in _SCALARS.items():
    _whole = re.compile(f"(?:{_regexp.pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, list(_first))
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 16) if text.startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_scalar(text: str) -> Any:
    """A value as YAML would read it; text that is no YAML is itself.

    >>> parse_scalar("5e-7"), parse_scalar("no"), parse_scalar("[1, 2e8]"), parse_scalar("a: b: c")
    (5e-07, 'no', [1, 200000000.0], 'a: b: c')
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def dump_yaml(config: TrainConfig) -> str:
    """Every value of the config, defaults included; `load_config` reads it back to an equal config."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110
    )


def flatten(config: TrainConfig) -> dict[str, Any]:
    """The values by dotted name, as JSON has them; mappings are opened, lists are not."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                yield from walk(item, f"{name}.{key}" if name else key)
        else:
            yield name, value

    return dict(walk(config.model_dump(mode="json"), ""))


def config_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TrainConfig.model_json_schema()}


# --- Where values come from ---


@dataclass(frozen=True, slots=True)
class _File:
    """Values of one file, and the YAML nodes that know their lines."""

    name: str
    values: dict[str, Any]
    root: yaml.MappingNode

    def locate(self, keys: Keys) -> str | None:
        """`run.yaml:3`, or None when the file does not say anything under these keys."""
        node: yaml.Node = self.root
        mark = node.start_mark
        for key in keys:
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == str(key)), None)
                if found is None:
                    return None
                mark, node = found[0].start_mark, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
                mark = node.start_mark
            else:
                return None
        return f"{self.name}:{mark.line + 1}"


@dataclass(frozen=True, slots=True)
class _Flags:
    """Values of the command line."""

    values: dict[str, Any]

    def locate(self, keys: Keys) -> str | None:
        """The flag itself, or None when none was given under these keys."""
        value: Any = self.values
        for key in keys:
            if not _has(value, key):
                return None
            value = value[key]
        return "--" + _dotted(keys)


def _has(value: Any, key: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(key, int) and key < len(value)
    return isinstance(value, Mapping) and key in value


def _dotted(keys: Keys) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def _read_file(path: Path) -> _File:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist; the working directory is {Path.cwd()}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}; give a YAML file in UTF-8") from error
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(
                f"config file {path} is empty; it needs at least `model:` and `data:`, or leave it out"
            )
        if not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else f"{root.value!r}"
            raise ConfigError(
                f"config file {path} must hold sections such as `model:` and `data:`; got {kind}"
            )
        _check_keys(root, str(path))
        values = loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"{where}: this is not YAML: {problem}; check indentation, colons and quotes"
        ) from error
    finally:
        loader.dispose()
    return _File(str(path), values, root)


def _check_keys(root: yaml.Node, name: str) -> None:
    """Refuse keys that come twice, of which YAML would keep the last, and keys that are not text."""
    seen_nodes: set[int] = set()
    waiting: list[tuple[yaml.Node, str]] = [(root, "")]
    while waiting:
        node, prefix = waiting.pop()
        if id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, f"{prefix}[{index}]") for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                    raise ConfigError(
                        f"{name}:{line}: a key must be text; got {key.value!r}, put it in quotes"
                    )
                path = f"{prefix}.{key.value}" if prefix else key.value
                if key.value in lines:
                    raise ConfigError(
                        f"{name}:{line}: {path} is given twice, first in line {lines[key.value]}; keep one"
                    )
                lines[key.value] = line
                waiting.append((value, path))


class _FlagSettings(BaseSettings, TrainConfig):
    """The tree as pydantic-settings wants it: only its fields are used, never an instance."""

    model_config = SettingsConfigDict(extra="forbid")


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate `--section.field value` from the other arguments of a command; also `--section JSON`.

    >>> split_flags(["run.yaml", "--loss.beta", "3", "--dry-run", "--run.use-gpu", "--json"])
    (['run.yaml', '--dry-run', '--json'], ['--loss.beta=3', '--run.use-gpu'])
    """
    rest: list[str] = []
    flags: list[str] = []
    waiting = list(arguments)
    while waiting:
        token = waiting.pop(0)
        name, is_complete, _ = token.partition("=")
        if not name.startswith("--") or not ("." in name or name[2:] in sections()):
            rest.append(token)
        elif not is_complete and waiting and not waiting[0].startswith("--"):
            flags.append(f"{token}={waiting.pop(0)}")
        else:
            flags.append(token)
    return rest, flags


def _read_flags(arguments: Sequence[str]) -> _Flags:
    """Nested values of `--section.field value` flags; `-` and `_` are the same in names, a bare flag means true."""
    rest, flags = split_flags(arguments)
    if rest:
        names = [f"--{name}" for name in nearest_fields(rest[0].lstrip("-").partition("=")[0], list(options()))]
        raise ConfigError(f"{rest[0]} is not a flag of the config.{_did_you_mean(names)}")
    plain: list[str] = []
    keyed: list[dict[str, Any]] = []
    for flag in flags:
        typed, has_value, text = flag.partition("=")
        name = typed[2:].replace("-", "_")
        option = options().get(name)
        mapping = next(
            (other for other in options().values() if other.is_mapping and name.startswith(other.name + ".")),
            None,
        )
        if option is None and mapping is not None:
            # Keys inside a mapping are the user's own: their spelling stays.
            keys = typed[2 + len(mapping.name) + 1 :].split(".")
            keyed.append(_nest([*mapping.name.split("."), *keys], parse_scalar(text)))
        elif option is None and name not in sections():
            known = [*options(), *sections()]
            raise ConfigError(
                f"{typed} is not a field.{_did_you_mean([f'--{other}' for other in nearest_fields(name, known)])}"
            )
        if not has_value and (option is None or not option.takes(bool)):
            raise ConfigError(f"{typed} needs a value: {typed} VALUE")
        if option is not None and option.is_mapping and (text.startswith("{") or not option.takes(str)):
            keyed.append(_nest(name.split("."), _parse_mapping(typed, text)))
        elif option is not None or mapping is None:
            plain.append(f"--{name}={_quoted(option, text) if has_value else 'true'}")
    try:
        source = CliSettingsSource[Any](
            _FlagSettings, cli_prog_name="", cli_exit_on_error=False, cli_parse_args=plain
        )
        values: dict[str, Any] = dict(source())
    except SettingsError as error:
        raise ConfigError(f"{' '.join(flags)}: {error}; give VALUE, or JSON for a list or mapping") from error
    for extra in keyed:
        values = _merge(values, extra)
    for option in options().values():
        _set_scalar(values, option)
    return _Flags(values)


def _quoted(option: Option | None, text: str) -> str:
    """Text of a field that may be a list, quoted so that pydantic-settings does not split it at commas."""
    is_list = (
        option is not None and option.takes(list) and "," in text and not text.startswith(("[", "{", '"'))
    )
    return json.dumps(text) if is_list else text


def _parse_mapping(flag: str, text: str) -> Any:
    value = parse_scalar(text)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{flag} must be a mapping such as '{{key: value}}'; got {text!r}")
    if re.search(r"[{,][^{},\s\"':]+:[^\s/]", text):
        raise ConfigError(f"{flag} needs a space after each colon, or JSON with quoted keys; got {text!r}")
    return value


def _set_scalar(values: dict[str, Any], option: Option) -> None:
    """Read the text of a flag as YAML would, where the field has no use for text: `3` for a Literal of numbers."""
    *parents, leaf = option.name.split(".")
    section: Any = values
    for key in parents:
        section = section.get(key) if isinstance(section, dict) else None
    if isinstance(section, dict) and isinstance(section.get(leaf), str) and not option.takes(str):
        section[leaf] = parse_scalar(section[leaf])


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings, of which `high` wins; anything else, lists too, is replaced."""
    merged = dict(low)
    for key, value in high.items():
        under = merged.get(key)
        merged[key] = (
            _merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


# --- The whole ---


def load_config(
    files: Sequence[Path] = (), flags: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Build the config from `base`, files and flags, later ones over earlier ones; raises ConfigError alone."""
    layers: list[_File | _Flags] = [*map(_read_file, files), _read_flags(flags)]
    values = dict(base or {})
    for layer in layers:
        values = _merge(values, {key: value for key, value in layer.values.items() if value is not None})
    return _build(values, layers)


def override(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The config with some values changed by dotted name, as a sweep does; raises ConfigError.

    Fields that were never set follow the new `loss.kind`; fields that were set and that it lacks are refused.
    """
    values = config.model_dump(exclude_unset=True)
    if isinstance(values.get("loss"), dict):
        values["loss"]["kind"] = config.loss.kind
    for name, value in changes.items():
        values = _merge(values, _nest(name.split("."), value))
    return _build(values, [])


def _build(values: dict[str, Any], layers: Sequence[_File | _Flags]) -> TrainConfig:
    for name, field in TrainConfig.model_fields.items():
        section = values.setdefault(name, {})
        if field.discriminator and isinstance(section, dict):
            default = field.get_default(call_default_factory=True, validated_data={})
            values[name] = {field.discriminator: getattr(default, str(field.discriminator)), **section}
    problems = _Problems(values, layers)
    misused = problems.booleans()
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys([*misused, *problems.of(error)]))) from None
    if misused:
        raise ConfigError("\n".join(misused))
    return config


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
class _Problems:
    """Turns pydantic's errors about `values` into sentences that name the file and line, or the flag."""

    values: Mapping[str, Any]
    layers: Sequence[_File | _Flags]

    def of(self, error: ValidationError) -> list[str]:
        """One sentence per field; of a union, the branch that fits the form of the value."""
        by_field: dict[str, list[tuple[Keys, bool, ErrorDetails]]] = {}
        for details in error.errors(include_url=False):
            keys, fits = self._resolve(details)
            by_field.setdefault(".".join(map(str, keys[:2])), []).append((keys, fits, details))
        problems = []
        for found in by_field.values():
            by_keys: dict[Keys, list[ErrorDetails]] = {}
            for keys, _, details in [item for item in found if item[1]] or found:
                by_keys.setdefault(keys, []).append(details)
            # The branches of a union that do not fit complain higher up than the one that does.
            deepest = [
                keys for keys in by_keys if not any(other[: len(keys)] == keys != other for other in by_keys)
            ]
            problems += [self._sentence(keys, by_keys[keys]) for keys in deepest]
        named = [name for problem in problems for name in re.findall(r"Did you mean (.*)\?", problem)]
        return [
            problem
            for problem in problems
            if not (" is missing" in problem and any(problem.partition(" ")[0] in text for text in named))
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
            if _has(current, part):
                current = current[part]
                keys.append(part)
            elif is_last and details["type"] == "missing":
                keys.append(part)
            elif isinstance(current, str):
                fits = fits and part == "str"
            elif isinstance(current, list):
                fits = fits and str(part).startswith(("list[", "tuple["))
            elif isinstance(current, Mapping) and str(part).startswith(
                ("dict[", "list[", "str", Source.__name__)
            ):
                is_source = not current.keys().isdisjoint(Source.model_fields)
                fits = fits and str(part).startswith(Source.__name__ if is_source else "dict[")
        return tuple(keys), fits

    def _place(self, keys: Keys, text: str) -> str:
        """`run.yaml:3: loss.beta TEXT`, or `--loss.beta TEXT`, by the layer that had the last word."""
        for layer in reversed(self.layers):
            where = layer.locate(keys)
            if where is not None:
                return f"{where} {text}" if isinstance(layer, _Flags) else f"{where}: {_dotted(keys)} {text}"
        return f"{_dotted(keys)} {text}"

    def _sentence(self, keys: Keys, found: Sequence[ErrorDetails]) -> str:
        details = found[0]
        kind = details["type"]
        if kind == "extra_forbidden":
            return self._unknown(keys)
        if kind == "missing":
            if _dotted(keys) in options():
                return f"{_dotted(keys)} is missing: set it in a file or with --{_dotted(keys)}"
            return self._place(keys[:-1], f"lacks {_dotted(keys[-1:])}")
        if kind == "value_error":
            return self._contradiction(keys, details["msg"].removeprefix("Value error, "))
        if kind == "union_tag_invalid":
            keys = (*keys, "kind")
        if details["loc"][-1] == "[key]":
            expected = details.get("ctx", {}).get("expected")
            return self._place(keys, f"is not a key of {_dotted(keys[:-1])}; its keys are {expected}")
        value: Any = self.values
        for key in keys:
            value = value[key]
        expected = " or ".join(dict.fromkeys(map(_expectation, found)))
        option = options().get(_dotted(keys))
        advice = suggest(value, map(str, option.choices)) if option and isinstance(value, str) else ""
        return self._place(keys, f"must be {expected}; got {_show(value)}{'.' if advice else ''}{advice}")

    def _unknown(self, keys: Keys) -> str:
        name = _dotted(keys)
        option = options().get(name)
        if option is not None and option.kinds:
            chosen = self.values["loss"]["kind"]
            return self._place(
                keys,
                f"is not a field of loss.kind {chosen}; the kinds that have it: {', '.join(option.kinds)}",
            )
        parent = _dotted(keys[:-1])
        in_source = parent.startswith(("data.train", "data.eval"))
        known = (
            [f"{parent}.{field}" for field in Source.model_fields] if in_source else [*options(), *sections()]
        )
        sentence = self._place(keys, "is not a field.")
        dashes = "--" if sentence.startswith("--") else ""
        return sentence + _did_you_mean([dashes + other for other in nearest_fields(name, known)])

    def _contradiction(self, keys: Keys, message: str) -> str:
        """A validator's message, at the first field that it speaks of and that somebody set."""
        section = _dotted(keys)
        fields = [word for word in re.findall(r"\w+", message) if f"{section}.{word}" in options()]
        places = [layer.locate((*keys, field)) for field in fields for layer in reversed(self.layers)]
        places += [layer.locate(keys) for layer in reversed(self.layers)]
        where = next((place for place in places if place is not None), None)
        prefix = "" if f"{keys[0]}." in message else f"{section}: "
        return f"{where}: {prefix}{message}" if where else f"{prefix}{message}"


def _expectation(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in ("literal_error", "union_tag_invalid"):
        return "one of " + str(context.get("expected", context.get("expected_tags"))).replace(
            "'", ""
        ).replace(" or ", ", ")
    if kind in _BOUNDS:
        return f"{_BOUNDS[kind]} {next(iter(context.values())):g}"
    return _EXPECTED.get(kind.partition("_")[0], details["msg"])


def _did_you_mean(names: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(names)}?" if names else ""


def _show(value: Any) -> str:
    """A value as JSON, short."""
    text = "nothing" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
