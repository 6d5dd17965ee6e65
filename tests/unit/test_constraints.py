"""constraints.txt: what pyproject.toml asks for, with all that it needs, in versions that go together."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [
    requirement
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, group)
    if requirement.name != PROJECT["name"]
]
"""By the package and by every extra of it."""


def pins() -> dict[str, str]:
    lines = [
        line.partition("==") for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")
    ]
    return {canonicalize_name(name): version for name, _, version in lines}


def test_all_that_is_asked_for_is_pinned() -> None:
    pinned = pins()
    wrong = [
        str(each)
        for each in ASKED
        if not each.specifier.contains(pinned.get(canonicalize_name(each.name), "0"))
    ]
    assert wrong == []


def test_pins_are_in_order() -> None:
    lines = CONSTRAINTS.read_text().splitlines()[1:]
    assert lines == sorted(set(lines), key=str.lower)


@pytest.mark.soak
def test_every_extra_can_be_installed() -> None:
    """pip finds versions of everything, and has none to choose by itself."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--report",
        "-",
        "-c",
        CONSTRAINTS,
    ]
    done = subprocess.run(
        [*command, *map(str, ASKED)], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    missing = [each["metadata"] for each in json.loads(done.stdout)["install"]]
    pinned = pins()
    found = {canonicalize_name(each["name"]): each["version"] for each in missing}
    assert found == {name: pinned.get(name) for name in found}
