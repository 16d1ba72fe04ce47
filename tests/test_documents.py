"""What the documents say: the site builds, every command in them works, and every metric is explained."""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from docs import pages
from rlhf.config.base import describe
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.stage import stages
from tests.small import Pipeline

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    """Links and their anchors between all pages, written or made from the source; every page is in a menu."""
    pages.write(tmp_path / "build" / "docs")
    shutil.copyfile(ROOT / "zensical.toml", tmp_path / "zensical.toml")
    zensical = shutil.which("zensical", path=Path(sys.executable).parent)
    if zensical is None:
        why = "zensical is not here: pip install 'rlhf-pipeline[docs]'"
        assert os.environ.get("CI") != "true", why
        pytest.skip(why)
    built = subprocess.run([zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    site = tmp_path / "build" / "site"
    errors_page = (site / "errors.html").read_text()
    assert "the chat template leaves out a user&#39;s question" in errors_page or "leaves out a user's" in errors_page
    assert "ppo.kl.coef" in (site / "commands.html").read_text()
    assert "kl.coef" in (site / "settings.html").read_text()


def test_settings_beside_other_projects_are_settings() -> None:
    """The first column of the tables in docs/coming-from.md, whose heading names the stages."""
    page, section = (ROOT / "docs" / "coming-from.md").read_text(), []
    fields = {name: {field.path for field in describe(stage.settings)} for name, stage in stages().items()}
    seen = 0
    for line in page.splitlines():
        first = line.strip("| ").split(" | ")[0]
        if first.startswith("ours"):
            section = re.findall(r"`(\w+)\.…`", first)
        elif line.startswith("| `") and section:
            for name in re.findall(r"`(?:rm\.|sft\.)?([\w.]+)", first):
                assert any(name in fields[stage] for stage in section), line
                seen += 1
        else:
            section = section if line.startswith("| ---") else []
    assert seen > 60


def explained() -> set[str]:
    """Return the metrics that the documents explain, as patterns: `*` is anything, `<task>` the name of a task."""
    cells = [row.split("|")[1] for _, _, table in pages.metric_tables() for row in table]
    return {re.sub("<.*?>", "*", name) for cell in cells for name in re.findall("`(.*?)`", cell)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_metric_that_a_run_writes_is_explained(pipeline: Pipeline, unbroken: dict[str, Planned]) -> None:
    """The final ones and those of each step are in a table of metrics, and so in the glossary."""
    patterns = explained()
    for name, planned in unbroken.items():
        assert planned.record is not None
        written = set(planned.record.metrics)
        for file in (pipeline.store.root / "work" / planned.record.key).glob("*/metrics.jsonl"):
            written |= {key for line in file.read_text().splitlines() for key in json.loads(line)} - {"step", "time"}
        unknown = {metric for metric in written if not any(fnmatch(metric, pattern) for pattern in patterns)}
        assert not unknown, f"{name} writes metrics that no table of metrics in docs/ explains: {sorted(unknown)}"
