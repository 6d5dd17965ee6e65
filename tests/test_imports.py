"""Every module of the package can be imported by itself."""

import importlib
import pkgutil

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


def test_every_name_is_there() -> None:
    modules = {name: getattr(ray_prefopt, name).__module__ for name in ray_prefopt.__all__}
    assert modules["train"] == modules["evaluate"] == "ray_prefopt.training.run"
    assert modules["export"] == "ray_prefopt.training.export"


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"^module 'ray_prefopt' has no attribute 'trian'$"):
        ray_prefopt.trian  # noqa: B018
