"""Every module of the package can be imported by itself."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ray_prefopt

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ray_prefopt.__path__, "ray_prefopt.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_version_is_that_of_the_package_metadata() -> None:
    metadata = importlib.import_module("importlib.metadata")
    try:
        assert metadata.version("ray-prefopt") == ray_prefopt.__version__
    except metadata.PackageNotFoundError:
        pytest.skip("the package is on the path, not installed")


@pytest.mark.parametrize(
    "imports",
    [
        "from ray_prefopt import train",
        "from ray_prefopt import evaluate, export, train",
        "import ray_prefopt.train.run; from ray_prefopt import train",
        "import ray_prefopt; ray_prefopt.train; train = ray_prefopt.train",
    ],
)
def test_train_is_a_function_whatever_was_imported_before(imports: str) -> None:
    """It is the name of a package too, to which an import of that package binds it."""
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}; train(None)"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ray_prefopt/train/run.py" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("AttributeError: 'NoneType' object has no attribute")


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"^module 'ray_prefopt' has no attribute 'trian'$"):
        ray_prefopt.trian  # noqa: B018
