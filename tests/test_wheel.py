"""The wheel in an environment and a folder of its own, where nothing of the checkout can be imported."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf.config.yaml_tree import read_tree

ROOT = Path(__file__).parents[1]
SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "configs", "pyproject.toml", "rlhf", "stages")
SURROUNDINGS = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}

Rlhf = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built out of the source distribution, which is built out of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    build(folder, "sdist")
    (archive,) = (folder / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    build(unpacked, "wheel")
    (wheel,) = (unpacked / "dist").glob("*.whl")
    return wheel


def build(folder: Path, kind: str) -> None:
    program = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; it sees the packages that ours has, and not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, env=SURROUNDINGS, check=True, capture_output=True, timeout=120)
    # Afterwards: pip takes what it finds of the same version for what is to be installed.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"{Path(yaml.__file__).parents[1]}\n")
    return folder


@pytest.fixture(scope="module")
def rlhf(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Rlhf:
    """The installed program in an empty folder; its standard output, or its error if it ends with another status."""
    folder = tmp_path_factory.mktemp("empty")

    def run(*words: str, status: int = 0) -> str:
        program = [str(environment / "bin" / "rlhf"), *words]
        ended = subprocess.run(
            program, cwd=folder, env=SURROUNDINGS, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=250
        )
        assert ended.returncode == status, ended.stderr
        return ended.stderr if status else ended.stdout

    return run


def test_only_names_that_begin_with_rlhf_are_installed(environment: Path) -> None:
    """What everybody's site-packages gets must not collide with anything."""
    (packages,) = environment.glob("lib/python*/site-packages")
    assert sorted(path.name.partition("-")[0] for path in packages.iterdir()) == ["rlhf", "rlhf_pipeline", "shared.pth"]
    installed = {str(path.relative_to(packages)) for path in packages.glob("rlhf/**/*") if path.is_file()}
    own = {*(ROOT / "rlhf").glob("**/*"), *(ROOT / "rlhf" / "stages").glob("*.py")}
    paths = {str(path.relative_to(ROOT)) for path in own if path.is_file() and path.parent.name != "__pycache__"}
    assert {path for path in installed if "__pycache__" not in path} == paths | {
        "rlhf/configs/demo.yaml",
        "rlhf/configs/quickstart.yaml",
        "rlhf/configs/tiny.yaml",
    }
    assert (packages / "rlhf" / "stages" / "ppo.py").read_text() == (ROOT / "stages" / "ppo.py").read_text()


def test_an_empty_folder_is_enough(rlhf: Rlhf, tmp_path: Path) -> None:
    """`pip install` and `rlhf init --yes`, and there is a plan."""
    assert rlhf("--version").startswith("rlhf-pipeline ")
    assert "rlhf init" in rlhf("plan", status=2)
    assert "--yes" in rlhf("init", status=2)
    assert "wrote rlhf.yaml" in rlhf("init", "--yes")
    assert "evaluate" in rlhf("plan")
    assert "is there already" in rlhf("init", "--yes", status=2)
    rlhf("init", "--yes", str(tmp_path))
    assert read_tree(tmp_path / "rlhf.yaml").values == read_tree(ROOT / "configs" / "quickstart.yaml").values


@pytest.mark.slow
def test_stages_run_out_of_the_wheel(rlhf: Rlhf, sdist: Path) -> None:
    """In Ray's processes too, which know the environment by the program that started them."""
    rlhf("init", "--yes", "--model", "scratch", "--force")
    rlhf("run", "data", "model", "rank", f"data.downloads={sdist.parent}")
    assert rlhf("plan", "model", "rank", f"data.downloads={sdist.parent}").count("cached") >= 3
