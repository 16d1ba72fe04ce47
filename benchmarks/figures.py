"""The pictures of docs/, drawn from the recorded figures in docs/data: ``make docs-figures``.

    python -m benchmarks.figures [--out FOLDER]
    python -m benchmarks.figures --record configs/quickstart.yaml [section.field=value ...]

``growth.json`` and ``overoptimisation.json`` are what the benchmarks of these names measured. ``reliability.json`` has
the bins of a reward model, with comparisons as shares of the largest bin's. ``report.json`` is what ``--record`` takes
from a pipeline's runs for the picture of the report, which needs Chromium.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl

from benchmarks import growth, overoptimisation
from rlhf.config.pipeline import load_pipeline
from rlhf.errors import NextCommand, RequestError, RlhfError
from rlhf.history.diagnosis import Symptom
from rlhf.history.reading import pipeline_history
from rlhf.models.evaluation import draw_reliability
from rlhf.pipeline.plan import plan
from rlhf.pipeline.stage import stages
from rlhf.report.page import content, rendered, vega
from rlhf.store import Store

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "data"
DRAWN: dict[str, Callable[[Any, Path], None]] = {
    "growth.svg": growth.draw,
    "overoptimisation.svg": overoptimisation.draw,
    "reliability.svg": draw_reliability,
}
WINDOW = (1000, 1700)
"""Pixels of the report that its picture shows."""


def recorded(name: str) -> Any:
    """Return the recorded figures of a picture."""
    return json.loads((DATA / name).with_suffix(".json").read_text(encoding="utf-8"))


def draw(out: Path) -> None:
    """Draw all pictures; the same figures give the same bytes, but for the report's."""
    out.mkdir(parents=True, exist_ok=True)
    for name, drawn in DRAWN.items():
        with mpl.rc_context({"svg.hashsalt": name}):
            drawn(recorded(name), out / name)
    if chromium := shutil.which("chromium"):
        photograph(chromium, out / "report.png")
    else:
        print("report.png is left as it is: chromium is not installed")


def photograph(chromium: str, out: Path) -> None:
    """Take a picture of the report's beginning."""
    shown = recorded("report.json")
    shown["symptoms"] = [Symptom(**symptom) for symptom in shown["symptoms"]]
    with TemporaryDirectory() as temporary:
        page = Path(temporary) / "page.html"
        page.write_text(rendered(shown, vega(Path(temporary))), encoding="utf-8")
        size = f"--window-size={WINDOW[0]},{WINDOW[1]}"
        # Root, which people often are in a container, has no sandbox there; the page is ours.
        flags = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", size)
        command = [chromium, *flags, "--timeout=6000", f"--screenshot={out.resolve()}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def record(file: Path, overrides: Sequence[str]) -> None:
    """Write what the picture of the report shows of a pipeline's runs, without their responses."""
    known = stages()
    config = load_pipeline(file, overrides, {name: stage.settings for name, stage in known.items()})
    store = Store.open(config.store.uri, create=False)
    shown = content(config, pipeline_history(plan(config, known, store), store), store)
    shown["symptoms"] = [asdict(symptom) for symptom in shown["symptoms"]]
    shown["sections"] = [one | {"parts": one["parts"][:1]} for one in shown["sections"] if one["name"] == "ppo"]
    if not shown["sections"]:
        raise RequestError("ppo has measured nothing that a picture could show", store.address, NextCommand("run"))
    shown |= {"store": "", "samples": [], "changes": [], "lineage": {}}
    (DATA / "report.json").write_bytes((json.dumps(shown, ensure_ascii=False) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, or record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the pictures")
    parser.add_argument("--record", type=Path, metavar="PIPELINE", help="record the report of its runs first")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    try:
        if given.record:
            record(given.record, given.overrides)
        draw(given.out)
    except (RlhfError, OSError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
