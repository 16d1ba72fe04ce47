"""Faults in rounds: each round is a seed, few of them in `make test` and many in `make chaos`.

A test marked ``rounds(short, long)`` takes ``seed``, from which it draws the moment and the place of its fault; with 0
short rounds it is for `make chaos` alone. What
`make chaos` has passed is kept in the ignored folder ``.chaos``, so that it can be interrupted and goes on.
"""

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.faults.running import Toy
from tests.faults.toys import KNOWN
from tests.pipeline.helpers import install_toys, marked

PASSED = Path(__file__).parents[2] / ".chaos" / "passed.txt"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("rounds")
    if marker is not None:
        short, long = marker.args
        metafunc.parametrize("seed", range(long if metafunc.config.getoption("--chaos") else short))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--chaos"):
        return
    passed = set(PASSED.read_text().splitlines()) if PASSED.exists() else set[str]()
    done = [item for item in items if item.nodeid in passed]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("--chaos") and call.when == "call" and report.passed:
        PASSED.parent.mkdir(exist_ok=True)
        with PASSED.open("a") as file:
            file.write(f"{item.nodeid}\n")
    return report


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: many small stores that are written and synchronised at no cost."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return install_toys(tmp_path / "site", "tests.faults.toys", KNOWN)


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark whose processes are all gone at the end, whatever the test did."""
    mark = uuid4().hex
    yield mark
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)
