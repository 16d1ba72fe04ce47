"""The pictures of docs/ are those of the figures in docs/data."""

import os
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import figures


def drawn(file: Path) -> str:
    """What an SVG shows: processors differ in the last digits of places, and so in the names that are made of them."""
    named = re.sub(r"#?\b[mp][0-9a-f]{10}\b", "name", file.read_text())
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}", named)


def test_the_pictures_are_drawn_from_the_recorded_figures(tmp_path: Path):
    """All marks at their places, and that of the report where there is a browser."""
    figures.main(["--out", str(tmp_path)])
    for name in figures.DRAWN:
        assert drawn(tmp_path / name) == drawn(figures.DOCS / name), f"make docs-figures for {name}"
    if shutil.which("chromium") or os.environ.get("CI") == "true":
        picture = (tmp_path / "report.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert tuple(int.from_bytes(picture[at : at + 4], "big") for at in (16, 20)) == figures.WINDOW
        assert len(picture) > 100_000


def test_what_cannot_be_recorded_leaves_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A pipeline that never ran is refused in words."""
    before = (figures.DATA / "report.json").read_bytes()
    with pytest.raises(SystemExit):
        figures.main(["--record", "configs/tiny.yaml", f"store.uri={tmp_path}", "--out", str(tmp_path / "out")])
    assert "ppo has measured nothing" in capsys.readouterr().err
    assert (figures.DATA / "report.json").read_bytes() == before
