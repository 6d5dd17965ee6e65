"""Imports go down the floors: the layers of pyproject.toml, and who may import which heavy library."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LAYERS = [
    [name.strip(" ()") for name in layer.split(":")]
    for contract in CONTRACTS
    if contract["type"] == "layers"
    for layer in reversed(contract["layers"])
]
WORDS = {"pydantic", "pydantic_core", "pydantic_settings", "yaml"}
OWNERS = {
    "deepspeed": ("ray_prefopt.engine.zero",),
    "ray": (
        "ray_prefopt.compat.inputs",
        "ray_prefopt.compat.trainer",
        "ray_prefopt.data.prepare",
        "ray_prefopt.data.sources",
        "ray_prefopt.submit",
        "ray_prefopt.training",
        "ray_prefopt.search",
        "ray_prefopt.compat",
    ),
    "peft": ("ray_prefopt.compat.inputs", "ray_prefopt.model"),
}


def _modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted((ROOT / "ray_prefopt").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


MODULES = _modules()


def _floor(module: str) -> int | None:
    """The floor of a module: that of the longest listed name it lies under."""
    places = [
        (len(name), floor)
        for floor, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(places)[1] if places else None


def _imports(body: list[ast.stmt]) -> Iterator[str]:
    """Dotted names imported when the module is, without those for type checkers."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from _imports(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _imports(handler.body)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    floor = _floor(name)
    imported = set(_imports(MODULES[name].body))
    if floor is None:
        # The root gives out words of floor 0; packages that span floors say what they are, and import nothing.
        is_package = any(other.startswith(name + ".") for other in MODULES)
        assert is_package, f"{name} is on no floor: add it to the layers in pyproject.toml"
        allowed = {other for other in MODULES if _floor(other) == 0} if name == "ray_prefopt" else set()
        assert not {other for other in imported - allowed if other.startswith("ray_prefopt")}
        return
    for other in imported & MODULES.keys():
        below = _floor(other)
        assert below is None or below <= floor, f"{name} (floor {floor}) imports {other} (floor {below})"


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_have_owners(name: str) -> None:
    libraries = {other.partition(".")[0] for other in _imports(MODULES[name].body)} - {"ray_prefopt"}
    for library in libraries & OWNERS.keys():
        assert any(name == owner or name.startswith(owner + ".") for owner in OWNERS[library]), (
            f"{name}: {library}"
        )
    if _floor(name) == 0 or name in ("ray_prefopt", "ray_prefopt.cli", "ray_prefopt.__main__"):
        assert libraries <= WORDS | sys.stdlib_module_names, f"{name} must stay light"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"ray_prefopt", "ray_prefopt.cli"}))
def test_imports_are_at_the_top(name: str) -> None:
    functions = [
        node for node in ast.walk(MODULES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    inner = [
        node.lineno
        for f in functions
        for node in ast.walk(f)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not inner, f"{name} imports inside a function in lines {inner}"


def test_layers_name_what_exists() -> None:
    required = {
        name.strip()
        for contract in CONTRACTS
        if contract["type"] == "layers"
        for layer in contract["layers"]
        for name in layer.split(":")
        if "(" not in name
    }
    assert required <= MODULES.keys()
