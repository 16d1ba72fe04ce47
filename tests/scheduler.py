"""How the tests are shared between the two processes of `make test`: whole files, the slow ones first."""

from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
PIPELINE = "the small pipeline"
# To train the small pipeline takes minutes, so one process has all the files that look at it.
FILES_OF_THE_PIPELINE = frozenset(
    {
        "tests/faults/test_stages.py",
        "tests/stages/test_flywheel.py",
        "tests/stages/test_pipeline.py",
        "tests/test_documented_commands.py",
        "tests/test_documents.py",
    }
)
# Each computes on three processes for minutes. Tests on Ray wait for most of their time, so these go beside them.
BUSIEST = frozenset({"tests/zero/test_grid.py", "tests/zero/test_group.py"})


class Scheduler(LoadScopeScheduling):
    """Gives a process that has little left to do the next file, or all files of the small pipeline."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return PIPELINE if file in FILES_OF_THE_PIPELINE else file


def order(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that the processes end at about the same time.

    Raises:
        pytest.UsageError: A file uses the small pipeline without being among those that share it.
    """
    using = {_file(item) for item in items if "pipeline" in getattr(item, "fixturenames", ())}
    if unknown := sorted(using - FILES_OF_THE_PIPELINE):
        raise pytest.UsageError(f"{', '.join(unknown)}: name it in FILES_OF_THE_PIPELINE, tests/scheduler.py")
    slow = {_file(item) for item in items if item.get_closest_marker("slow")}

    def place(item: pytest.Item) -> tuple[bool, ...]:
        file = _file(item)
        return file not in FILES_OF_THE_PIPELINE, file not in BUSIEST, file not in slow

    items.sort(key=place)


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT).as_posix()
