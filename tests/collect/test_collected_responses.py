from pathlib import Path

import pytest

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.collect.written import Written
from rlhf.config.collect import CompareSettings

pytestmark = pytest.mark.slow


def written(attempt: Path, attempts: list[Path]) -> Written:
    settings = CompareSettings(function="f.py:f")
    return Written(Context("collect", "key", settings, {}, attempt, attempt, attempt, attempts=tuple(attempts)))


def test_what_was_written_is_continued_from_where_it_got_furthest(group: None, tmp_path: Path) -> None:
    """Texts of any kind come back as they were; a line that a kill cut off is written again."""
    attempts = [tmp_path / name for name in ("1", "2", "3", "4")]
    for attempt in attempts:
        attempt.mkdir()
    first = written(attempts[0], attempts[:1])
    assert list(first.left(range(5), 2)) == [range(2), range(2, 4), range(4, 5)]
    first.add(["a\nb", "ü\u2028"])
    first.add([""])
    with AttemptFolder(attempts[0]).written.open("a") as file:
        file.write('"cut')
    written(attempts[1], attempts[:2]).add([])
    second = written(attempts[2], attempts[:3])
    assert second.texts == ["a\nb", "ü\u2028", ""]
    assert list(second.left(range(2, 5), 2)) == [range(3, 5)]
    second.add(["d", "e"])
    assert written(attempts[3], attempts).texts == ["a\nb", "ü\u2028", "", "d", "e"]
    assert list(second.left(range(5), 2)) == []
