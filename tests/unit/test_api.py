"""What `ray_prefopt` offers by name."""

import subprocess
import sys

import ray_prefopt


def test_every_name_is_there() -> None:
    assert {name for name in ray_prefopt.__all__ if getattr(ray_prefopt, name, None) is None} == set()
    assert ray_prefopt.load_config.__module__ == "ray_prefopt.settings"
    assert ray_prefopt.export.__module__ == "ray_prefopt.training.export"
    assert ray_prefopt.evaluate.__module__ == "ray_prefopt.training.run"


def test_importing_it_loads_neither_torch_nor_ray() -> None:
    code = "import sys, ray_prefopt; ray_prefopt.TrainConfig; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
