"""What the documents say: the site builds, every command in them works, and every metric is explained."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from docs import pages
from rlhf.cli.main import COMMANDS, parser_of
from rlhf.config.base import describe
from rlhf.config.pipeline import load_pipeline
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.stage import stages
from tests.small import TINY, Pipeline

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

PROGRAMS = "rlhf|make|python|python3|pip|ray|curl|ssh|tensorboard|mlflow|trackio|export|sbatch|srun|kubectl|docker|sky"
COMMAND = re.compile(rf"(?:\$ )?((?:[A-Za-z_]+=\S+ )*(?:\.venv/bin/)?(?:{PROGRAMS})(?: .*)?)")

NOT_RUN = {
    r"ssh |export |curl ": "another machine, or the reader's own shell and keys",
    r"(tensorboard|mlflow|\S+ trackio) ": "a server; what it shows is tested in tests/tracking",
    r"pip install ": "installs; tests/test_wheel.py does, and `make matrix` with every version",
    r"(ray start|RAY_ADDRESS=)|rlhf doctor --cluster": "a cluster of machines; tests/faults/test_hosts.py starts one",
    r"rlhf annotate ": "serves until it is interrupted; tests/collect/test_server.py",
    r"rlhf compare .*--blind": "asks a person at a terminal; tests/cli/test_talking.py",
    r"rlhf (plan|run) --config configs/cluster.yaml": "data of a cluster; tests/config/test_configs.py loads it",
    r"rlhf doctor --config billion.yaml": "a GPU; tests/pipeline/test_memory.py has its figures",
    r"rlhf run store.uri=s3:": "a bucket; tests/store runs against a server of S3",
    r"rlhf data convert export.json": "an export of a tool; tests/data/test_argilla.py has some",
    r"rlhf import (DIR|my/)": "DIR stands for a folder; tests/cli/test_messages.py imports",
    r"rlhf export ppo out/ppo --": "an adapter, and llama.cpp's converter; tests/pipeline/test_transfer.py has both",
    r"rlhf init": "asks, or writes the file that is here already; tests/cli/test_init.py and tests/test_wheel.py",
    r"python -m benchmarks\.": "measures for minutes or needs a GPU; tests/benchmarks runs the parts",
}
"""What cannot be run where tests run, by how it begins, and why. Of `rlhf` all commands are read by their parsers."""


class Command(NamedTuple):
    """A line for a shell in a document."""

    document: str
    line: str


def blocks(text: str) -> Iterator[list[str]]:
    """Yield the lines of each block of code: indented, after an empty line."""
    for block in re.findall(r"(?:(?<=\n\n)|^)(?: {4}.*\n|\n(?= {4}))+", text, re.MULTILINE):
        yield [line.removeprefix("    ") for line in block.splitlines()]


def commands() -> list[Command]:
    """Return the commands in blocks of code; in a block with a prompt, what has none is output."""
    found: list[Command] = []
    for document in DOCUMENTS:
        for block in blocks(document.read_text()):
            block = [line.strip() for line in block]
            prompted = [line for line in block if line.startswith("$ ")]
            for line in prompted or block:
                if match := COMMAND.fullmatch(re.sub(r"(\s+# |\s{2,}).*", "", line)):
                    found.append(Command(document.name, match[1].removeprefix(".venv/bin/")))
    return list(dict.fromkeys(found))


def mentions() -> Iterator[Command]:
    """Yield the commands of this program in running text."""
    for document in DOCUMENTS:
        for line in re.findall(r"`((?:\.venv/bin/)?rlhf [a-z][^`]*)`", document.read_text()):
            yield Command(document.name, " ".join(line.removeprefix(".venv/bin/").split()))


def words_of(line: str) -> list[str]:
    """Return the words of a command of this program, without the program, a redirection and variables."""
    words = shlex.split(line.split(" > ")[0].partition("rlhf")[2])
    return words or ["--help"]


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


def test_every_command_of_ours_is_read_by_its_parser() -> None:
    """In blocks and in running text: commands and options exist, and settings too, in one of our pipelines."""
    known = {name: stage.settings for name, stage in stages().items()}
    ours = {*commands(), *mentions()}
    assert len(ours) > 100
    for document, line in sorted(ours):
        if not line.startswith("rlhf ") or line.startswith("rlhf --"):
            continue
        name, *words = words_of(line)
        place = f"{document}: {line}"
        assert name in COMMANDS, place
        arguments = parser_of(name).parse_intermixed_args(words)
        overrides = [word for word in arguments.words if "=" in word and not word.startswith("store.uri=/")]
        file = ROOT / arguments.config if "--config" in words else TINY
        assert file.exists() or file.name in ("billion.yaml", "FILE"), place
        load_pipeline(file if file.exists() else TINY, overrides, known)


def test_commands_that_are_not_run_are_still_in_a_document() -> None:
    """The list of exceptions must not outlive its reasons."""
    lines = [command.line for command in commands()]
    for beginning in NOT_RUN:
        assert any(re.match(beginning, line) for line in lines), beginning


def test_make_knows_its_goals() -> None:
    """`make -n` prints what it would do, and stops at a goal that is not there."""
    lines = [line for _, line in commands() if line.startswith("make ")]
    assert lines
    for line in lines:
        subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=20)


def test_settings_beside_other_projects_are_settings() -> None:
    """The first column of the tables in docs/coming-from.md, whose heading names the stages."""
    page, section = (ROOT / "docs" / "coming-from.md").read_text(), []
    fields = {name: {field.path for field in describe(stages()[name].settings)} for name in ("sft", "rm", "ppo")}
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
    assert seen > 40


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
