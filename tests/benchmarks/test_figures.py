"""The pictures of docs/ are those of the figures in docs/data."""

import os
import shutil
from pathlib import Path

from benchmarks import figures


def test_the_pictures_are_drawn_from_the_recorded_figures(tmp_path: Path):
    """Byte for byte, and that of the report where there is a browser."""
    figures.main(["--out", str(tmp_path)])
    for name in figures.DRAWN:
        assert (tmp_path / name).read_bytes() == (figures.DOCS / name).read_bytes(), f"make docs-figures for {name}"
    if shutil.which("chromium") or os.environ.get("CI") == "true":
        picture = (tmp_path / "report.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert tuple(int.from_bytes(picture[at : at + 4], "big") for at in (16, 20)) == figures.WINDOW
        assert len(picture) > 100_000
