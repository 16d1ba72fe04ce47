"""The program in surroundings that are not a terminal's: its output never fails, and a cause around it is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main
from tests.cli.conftest import Ask
from tests.pipeline.helpers import REPOSITORY, install_toys, make, planned, write_pipeline
from tests.privileges import permissions_obeyed

PRECIOUS = "α “quoted” words…"


def run(folder: Path, words: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a line of shell, in which ``rlhf`` stands for the program and ``CONFIG`` for the folder's pipeline."""
    site = folder / "site"
    if not site.exists():
        install_toys(site)
    line = words.replace("rlhf", '"$0" -m rlhf').replace("CONFIG", '--config "$1"')
    return subprocess.run(
        ["/bin/sh", "-c", line, sys.executable, str(folder / "toy.yaml")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{site}"} | environment,
        capture_output=True,
        timeout=60,
        check=False,
    )


LOCALES = [
    {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


@pytest.fixture
def changed(path: Path) -> Path:
    """A pipeline with results, of which a text has changed since."""
    make(path)
    path.write_text(path.read_text().replace("words: {}", f"words: {{left: '{PRECIOUS}'}}"), encoding="utf-8")
    return path


@pytest.mark.parametrize("locale", LOCALES)
def test_what_a_locale_has_no_character_for_is_replaced(changed: Path, locale: dict[str, str]):
    """In tables and in errors; the exit status is what it is elsewhere."""
    shown = run(changed.parent, "rlhf plan CONFIG", **locale)
    assert shown.returncode == 0, shown.stderr
    assert b"left one two ? ? " in shown.stdout
    changed.write_text(changed.read_text().replace("left:", "leftα:"))
    refused = run(changed.parent, "rlhf plan CONFIG", **locale)
    assert refused.returncode == 2
    assert b"words has no setting left?" in refused.stderr


@pytest.mark.parametrize("locale", LOCALES)
def test_what_a_program_reads_is_exact_in_every_locale(changed: Path, locale: dict[str, str]):
    """JSON and the printed settings keep every character, escaped where the locale has none for it."""
    answer = run(changed.parent, "rlhf plan --json CONFIG", **locale)
    assert json.loads(answer.stdout.decode("ascii"))["stages"][0]["why"] == f"left one two → {PRECIOUS}"
    printed = changed.parent / "printed.yaml"
    printed.write_bytes(run(changed.parent, "rlhf config CONFIG", **locale).stdout)
    assert yaml.safe_load(printed.read_text(encoding="ascii"))["words"]["left"] == PRECIOUS
    assert planned(printed)["words"].key == planned(changed)["words"].key


@pytest.mark.parametrize(
    ("words", "status"),
    [("plan", 0), ("plan --json", 0), ("config --fields", 0), ("plan nosuch", 2), ("plan nosuch --json", 2)],
)
def test_closed_streams_are_no_error(path: Path, words: str, status: int):
    """As of a service that was started without any: the exit status is all that is asked for."""
    answer = run(path.parent, f"rlhf {words} CONFIG >&- 2>&- <&-")
    assert answer.returncode == status


@pytest.mark.parametrize("words", ["plan", "plan --json"])
def test_a_full_disk_behind_standard_output_is_told(path: Path, words: str):
    """On standard error, as the full disk that it is."""
    answer = run(path.parent, f"rlhf {words} CONFIG >/dev/full")
    assert answer.returncode == 75
    assert answer.stderr.startswith(b"error: there is no room left to write\n  where: standard output\n")


@pytest.mark.parametrize("columns", ["0", "1", "²", "-5", "many"])
def test_a_width_that_is_none_is_not_gone_by(ask: Ask, monkeypatch: pytest.MonkeyPatch, columns: str):
    """Of 0 columns nothing was printed, of 1 a letter a line."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    assert any(line.split()[:2] == ["words", "missing"] for line in ask("plan").out.splitlines())


def test_a_working_folder_that_was_deleted_is_named(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Whatever path is relative to it."""
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    relative = write_pipeline(tmp_path, name="relative.yaml")
    relative.write_text("store: {uri: store}\nmodel: {base: scratch}\n")
    assert main(["plan", "--config", str(relative)]) == 2
    assert "the working folder was deleted" in capsys.readouterr().err


def test_a_home_folder_that_is_none_is_named(ask: Ask):
    """Of a user that there is not, for instance."""
    answer = ask("plan", "store.uri=~nosuchuser/store")
    assert answer.status == 2
    assert "a path begins with ~, and there is no such home folder" in answer.err
    assert "HOME=" in answer.err


@pytest.mark.parametrize(
    "words", ["import {} --as total", "generate {}", "generate total --file {}", "export total {}", "data convert A {}"]
)
@pytest.mark.parametrize(("named", "said"), [("closed/x", "Permission denied"), ("n" * 256, "File name too long")])
def test_a_path_that_the_system_refuses_is_named(
    ask: Ask, made: Path, monkeypatch: pytest.MonkeyPatch, words: str, named: str, said: str
):
    """By whatever command, with what the system says."""
    monkeypatch.chdir(made.parent)
    Path("closed").mkdir(mode=0)
    Path("A").write_text('{"prompt": "a", "completion": "b"}\n')
    with permissions_obeyed():
        answer = ask(*words.format(named).split())
    assert answer.status == 2
    assert said in answer.err
    assert f"where: {named}" in answer.err
    assert "rlhf itself" not in answer.err


def test_a_link_that_leads_back_to_itself_is_named(ask: Ask, made: Path, monkeypatch: pytest.MonkeyPatch):
    """Python says it with an error of its own."""
    monkeypatch.chdir(made.parent)
    Path("loop").symlink_to("loop")
    answer = ask("export", "total", "loop")
    assert answer.status == 2
    assert "Too many levels of symbolic links" in answer.err
    assert "loop\n" in answer.err
