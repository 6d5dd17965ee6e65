"""Read a TrainConfig from YAML files and command line flags, and say plainly what is wrong with them.

PyYAML reads files, with the numbers of YAML 1.2 (so that `5e-7` is one), and pydantic-settings reads flags; pydantic
validates the two together. Every problem is a ConfigError that says where the value came from, and which name the
user may have meant. Imports neither torch nor ray.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.options import Keys, Option, did_you_mean, dotted, has, nearest_fields, options, sections
from ray_prefopt.problems import Layer, Problems
from ray_prefopt.search_config import TuneConfig

T = TypeVar("T", bound=TrainConfig)
Files = str | Path | Sequence[str | Path]

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


def config_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors."""
    schema = TuneConfig.model_json_schema()
    schema["required"].remove("search")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


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
            if not has(value, key):
                return None
            value = value[key]
        return "--" + dotted(keys)


def _read_file(file: str | Path) -> _File:
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist; the working directory is {Path.cwd()}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"config file {path} cannot be read: {reason}; give a YAML file in UTF-8"
        ) from error
    try:
        loader = _Loader(text)
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
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # such as a tag of another type than its value
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        advice = "indent with spaces" if r"'\t'" in problem else "check indentation, colons and quotes"
        raise ConfigError(f"{where}: this is not YAML: {problem}; {advice}") from error
    try:
        json.dumps(values, default=str)
    except (ValueError, RecursionError):
        raise ConfigError(
            f"config file {path}: an alias stands inside of what it names; write it out"
        ) from None
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


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate `--section.field value` from the other arguments of a command; also `--section JSON`.

    >>> split_flags(["run.yaml", "--loss.beta", "3", "--dry-run", "--run.use-gpu", "-v"])
    (['run.yaml', '--dry-run', '-v'], ['--loss.beta=3', '--run.use-gpu'])
    """
    rest: list[str] = []
    flags: list[str] = []
    waiting = list(arguments)
    while waiting:
        token = waiting.pop(0)
        name, is_complete, _ = token.partition("=")
        if not name.startswith("--") or not ("." in name or name[2:] in sections()):
            rest.append(token)
        elif not is_complete and waiting and not re.match("--|-[a-z]$", waiting[0]):
            flags.append(f"{token}={waiting.pop(0)}")
        else:
            flags.append(token)
    return rest, flags


@dataclass(frozen=True, slots=True)
class _Flag:
    """A flag as it was typed, and the field it sets; None for a whole section."""

    typed: str
    text: str
    keys: Keys
    option: Option | None

    @classmethod
    def of(cls, flag: str) -> "_Flag":
        typed, has_value, text = flag.partition("=")
        keys, option = _find_field(typed)
        if not has_value and not (option and option.takes(bool)):
            raise ConfigError(f"{typed} needs a value: {typed} VALUE")
        return cls(typed, text if has_value else "true", keys, option)

    @property
    def is_plain(self) -> bool:
        """Whether pydantic-settings reads it: of mappings it takes no YAML, and texts it splits, which paths forbid."""
        option = self.option
        if option is None or self.text == "null" or dotted(self.keys) != option.name:
            return False
        return not (option.is_mapping or option.is_section or option.is_list)


class _FlagSettings(BaseSettings, TuneConfig):
    """The tree as pydantic-settings wants it: only its fields are used, never an instance."""

    model_config = SettingsConfigDict(extra="forbid")


def _read_flags(arguments: Sequence[str]) -> _Flags:
    """Nested values of `--section.field value` flags, in their order: lists grow, mappings are merged."""
    rest, flags = split_flags(arguments)
    if rest:
        names = nearest_fields(rest[0].lstrip("-").partition("=")[0], list(options()))
        raise ConfigError(f"{rest[0]} is not a flag of the config.{did_you_mean(names, '--')}")
    parsed = [_Flag.of(flag) for flag in flags]
    plain = _read_plain([flag for flag in parsed if flag.is_plain])
    values: dict[str, Any] = {}
    given: dict[Keys, tuple[str, Any]] = {}
    for spelled, flag in zip(flags, parsed, strict=True):
        keys, option = flag.keys, flag.option
        value = plain[keys] if flag.is_plain else _parse_value(flag)
        for other, (spelled_before, held) in given.items():
            if _leaves_no_room(other, held, keys) or _leaves_no_room(keys, value, other):
                raise ConfigError(f"{spelled_before} and {spelled} contradict each other; leave one out")
        grows = option and option.grows and not (option.is_mapping and isinstance(value, Mapping))
        if grows and given.get(keys, (spelled, None))[1] is not None:
            value = [*_as_list(given[keys][1]), *_as_list(value)]
        given[keys] = spelled, value
        values = _merge(values, _nest(keys, value))
    return _Flags(values)


def _read_plain(flags: Sequence[_Flag]) -> dict[Keys, Any]:
    """The values of flags by their keys; of a field that is given twice, the last one."""
    arguments = [f"--{dotted(flag.keys)}={flag.text}" for flag in flags]
    tree = CliSettingsSource[Any](
        _FlagSettings, cli_prog_name="", cli_exit_on_error=False, cli_parse_args=arguments
    )()
    values = {}
    for flag in flags:
        value: Any = tree
        for key in flag.keys:
            value = value[key]
        # It leaves numbers of a Literal, and numbers as only YAML writes them, as text.
        option = flag.option
        may_be_text = option is None or (
            option.takes(str) and (value in option.choices or not option.takes(float))
        )
        values[flag.keys] = parse_scalar(value) if isinstance(value, str) and not may_be_text else value
    return values


def _find_field(flag: str) -> tuple[Keys, Option | None]:
    """The keys that a flag sets, and its field, which is None for a whole section.

    In names `-` and `_` are the same; keys inside a mapping are the user's own and keep their spelling.
    """
    typed = flag[2:].split(".")
    for size in range(len(typed), 0, -1):
        name = ".".join(typed[:size]).replace("-", "_")
        option = options().get(name)
        if option and (size == len(typed) or option.is_mapping):
            return (*name.split("."), *typed[size:]), option
        if option and not any(other.startswith(f"{name}.") for other in options()):
            raise ConfigError(f"{flag} is not a field: set --{name} as a whole")
        if size == len(typed) and name in sections():
            return (name,), None
    names = nearest_fields(flag[2:], [*options(), *sections()])
    raise ConfigError(f"{flag} is not a field.{did_you_mean(names, '--')}")


def _parse_value(flag: _Flag) -> Any:
    """The value of a flag that may hold a mapping or a list."""
    option, text = flag.option, flag.text
    if option is not None and dotted(flag.keys) != option.name:  # a key inside a mapping
        return parse_scalar(text)
    if text == "null":
        return None
    if option is not None and option.takes(str):
        may_be_mapping = option.is_mapping or option.is_section
        is_mapping = may_be_mapping and isinstance(parse_scalar(text), Mapping)
        return _parse_mapping(flag.typed, text) if is_mapping else _parse_json(text)
    if option is not None and option.is_list:
        is_whole = text.startswith("[") or not (option.grows or "," in text)
        return parse_scalar(text if is_whole else f"[{text}]")
    return _parse_mapping(flag.typed, text)


def _parse_json(text: str) -> Any:
    """A list or mapping in JSON, or the text: YAML would take the brackets of a glob for a list."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, list | dict) else text


def _parse_mapping(flag: str, text: str) -> Any:
    value = parse_scalar(text)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{flag} must be a mapping such as '{{key: value}}'; got {text!r}")
    if re.search(r"[{,][^{},\s\"':]+:[^\s/]", text):
        raise ConfigError(f"{flag} needs a space after each colon, or JSON with quoted keys; got {text!r}")
    return value


def _leaves_no_room(keys: Keys, value: Any, below: Keys) -> bool:
    """Whether nothing can be set `below` these keys, because they hold a value that is no mapping."""
    return len(keys) < len(below) and below[: len(keys)] == keys and not isinstance(value, Mapping)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _nest(keys: Keys, value: Any) -> dict[str, Any]:
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
    files: Files = (), flags: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Build the config from `base`, files and flags, later ones over earlier ones; raises ConfigError alone."""
    return _load(TrainConfig, files, flags, base)


def load_tune_config(
    files: Files = (), flags: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> TuneConfig:
    """The same with a section `search`."""
    return _load(TuneConfig, files, flags, base)


def _load(kind: type[T], files: Files, flags: Sequence[str], base: Mapping[str, Any] | None) -> T:
    files = [files] if isinstance(files, str | Path) else files
    layers: list[_File | _Flags] = [*map(_read_file, files), _read_flags(flags)]
    values = dict(base or {})
    for layer in layers:
        values = _merge(values, {key: value for key, value in layer.values.items() if value is not None})
    return _build(kind, values, layers)


def _build(kind: type[T], values: dict[str, Any], layers: Sequence[Layer]) -> T:
    for name, field in kind.model_fields.items():
        section = values.setdefault(name, {})
        if field.discriminator and isinstance(section, dict):
            default = field.get_default(call_default_factory=True, validated_data={})
            values[name] = {field.discriminator: getattr(default, str(field.discriminator)), **section}
    problems = Problems(values, layers)
    misused = problems.booleans()
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys([*misused, *problems.of(error)]))) from None
    if misused:
        raise ConfigError("\n".join(misused))
    return config
