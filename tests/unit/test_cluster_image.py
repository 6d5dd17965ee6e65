"""The steps of cluster/Dockerfile, taken on this machine: in a folder instead of an image, in a venv on top of ours."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ray_prefopt import __version__

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
Step = tuple[str, str]


def steps() -> list[Step]:
    """Instructions and their arguments, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined]


def values(instruction: str) -> dict[str, str]:
    """Of ARG and ENV."""
    pairs = [pair for name, text in steps() if name == instruction for pair in text.split()]
    return {name: value.strip('"') for name, value in (pair.split("=", 1) for pair in pairs)}


def test_the_image_has_the_pinned_ray_and_its_own_user() -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert values("ARG")["RAY_VERSION"] == pinned[1]
    (image,) = (text for name, text in steps() if name == "FROM")
    assert image == "rayproject/ray:${RAY_VERSION}-py311-${VARIANT}"
    assert [text for name, text in steps() if name == "USER"][-1] == "1000"
    tags = re.findall(r"ray-prefopt:(\S+)", DOCKERFILE.read_text())
    assert tags == [f"{pinned[1]}-gpu", f"{pinned[1]}-cpu"]


def test_what_is_copied_is_sent_to_the_engine() -> None:
    sent = {
        line[1:]
        for line in (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
        if line[0] == "!"
    }
    copied = {word for name, text in steps() if name == "COPY" for word in text.split()[1:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in sent)


@pytest.mark.slow
@pytest.mark.soak
def test_the_steps_make_an_installation(tmp_path: Path) -> None:
    """pip finds torch and all others in our own environment, at the very versions that the steps ask for."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    (Path(site.strip()) / "ours.pth").write_text(sysconfig.get_path("purelib"))
    folder = tmp_path
    env = {**os.environ, **values("ARG"), **values("ENV"), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)

    def here(text: str) -> str:
        return text.replace("/opt/", f"{tmp_path}/opt/").replace("1000:100", f"{os.getuid()}:{os.getgid()}")

    for name, text in steps():
        if name == "WORKDIR":
            folder = Path(here(text))
        elif name == "COPY":
            _, *sources, target = text.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, folder / target, ignore=ignored)
                else:
                    shutil.copy(ROOT / source, folder / target)
        elif name == "RUN":
            done = subprocess.run(
                ["sh", "-c", here(text)], cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    assert done.stdout.endswith(f"ray-prefopt {__version__}\n")
    left = {path.name for path in folder.iterdir()}
    assert left == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "ray_prefopt", "examples"}
    probe = "import ray_prefopt; print(ray_prefopt.__file__)"
    found = subprocess.check_output([python, "-c", probe], cwd=tmp_path, env=env, text=True)
    assert found.strip().startswith(str(tmp_path / "venv"))
