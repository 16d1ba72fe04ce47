"""The files of an attempt's folder: their names stand once, and what an older version wrote is still read."""

import json
import re
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from rlhf.attempt.folder import AttemptFolder, Failure, JsonFile, Progress, Pulse
from rlhf.errors import NextCommand, RlhfError
from rlhf.store import SCRATCH
from tests.pipeline.helpers import until

ROOT = Path(__file__).parents[2]
NAMES = re.compile(
    r'["/](progress\.json|(failure|resources|result|origin)[\w{}-]*\.json|(pulse|device)-.*\.json|stack-.*\.trace|log-.*\.txt'
    r'|notes\.jsonl|quarantine-.*\.jsonl|(metrics|verdicts|written)\.jsonl|stop|checkpoints/.*)"'
)
"""Samples are not among them: the file of a report, which is a result, has the same name."""


def test_no_other_module_names_a_file_of_an_attempt():
    """What driver, ranks and stage tell each other passes through one class; the store alone knows what it sweeps."""
    files = {*ROOT.glob("rlhf/**/*.py"), *ROOT.glob("stages/*.py")}
    files -= {ROOT / "rlhf/attempt/folder.py", ROOT / "rlhf/store/garbage.py"}
    lines = [f"{file}: {line}" for file in files for line in file.read_text().splitlines() if NAMES.search(line)]
    assert not [line for line in lines if "`" not in line]


def test_what_the_store_sweeps_after_a_commit_are_folders_of_an_attempt(tmp_path: Path):
    """``ray`` is one of an older version."""
    folders = {value.name for value in vars(AttemptFolder(tmp_path)).values() if isinstance(value, Path)}
    assert set(SCRATCH) - {"ray"} <= folders


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("progress", '{"message": "step 1/2", "done": 1, "total": 2, "at": 2.5, "times": [[1.0, 0], [2.5, 1]]}'),
        ("resources", '{"ranks": 2, "gpus": 0}'),
        ("result", '{"loss": 0.5}'),
        ("origin", '{"model": {"source": "hub"}}'),
        ("error", '{"what": "it failed", "where": "rank 0", "next": "rlhf run"}'),
    ],
)
def test_a_file_holds_what_it_always_held(tmp_path: Path, name: str, text: str):
    """Attempts of earlier versions stay in stores: what is read from one and written again is the same."""
    file: JsonFile[object] = getattr(AttemptFolder(tmp_path), name)
    assert file.get() is None
    file.path.write_text(text)
    file.write(file.read())
    assert json.loads(file.path.read_text()) == json.loads(text)
    assert list(tmp_path.iterdir()) == [file.path]


def test_progress_of_a_version_that_wrote_no_times_is_read():
    """Its run may be under way while the status is asked for."""
    assert Progress.parse('{"message": "", "done": 1, "total": 2, "at": 2.5}').times == ()


def test_an_error_is_kept_with_its_words(tmp_path: Path):
    """A command to run next is kept as it is shown."""
    file = AttemptFolder(tmp_path).error
    file.write(RlhfError("it failed", "rank 0", NextCommand("run")))
    error = file.read()
    assert (error.what, error.where, error.next_step) == ("it failed", "rank 0", "rlhf run")


def test_the_ranks_files_are_read_by_rank_and_by_time_and_a_torn_one_is_left_out(tmp_path: Path):
    """A rank's number has no leading zeros: sorted by name, 10 would come before 9."""
    folder = AttemptFolder(tmp_path)
    for rank in (10, 9):
        folder.rank(rank).pulse.write(Pulse(rank, "node", "", 1, "log", 0, None, 1, 0.0))
        folder.rank(rank).failure.write(Failure(float(rank), rank, "node", 1, "ValueError", ("bad",), "log"))
        folder.rank(rank).device.write({"host": f"node-{rank}", "device": "CPU"})
    (tmp_path / "pulse-11.json").write_text(json.dumps(asdict(folder.rank(9).pulse.read()))[:-9])
    assert list(folder.pulses()) == [9, 10]
    assert [failure.rank for failure in folder.failures()] == [9, 10]
    assert folder.failures()[0].args == ("bad",)
    assert folder.resources_used() == {}
    folder.resources.write({"ranks": 2, "gpus": 0})
    assert folder.resources_used() == {"ranks": 2, "gpus": 0, "hosts": ["node-10", "node-9"], "devices": ["CPU"]}
    assert folder.cost().keys() == {"attempt", "seconds", "ranks", "gpus"}
    folder.clear_group()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "device-10.json",
        "device-9.json",
        "output",
        "resources.json",
    ]


def test_a_rank_of_another_host_of_this_name_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Containers may share a name, and each numbers its processes from 1: another's rank must not be killed here."""
    process = subprocess.Popen(["bash", "-c", "exec -a ray::Rank.run sleep 60"])
    try:
        pulse = Pulse(0, socket.gethostname(), "", process.pid, "log", 0, None, 1, 0.0)
        AttemptFolder(tmp_path).rank(0).pulse.write(pulse)
        read = AttemptFolder(tmp_path).pulses()[0]
        until(read.is_here, "the process's name")
        monkeypatch.setattr("rlhf.attempt.folder.machine", lambda: "another boot pid:[4026531836]")
        assert not read.is_here()
        assert not read.is_of_this_host()
    finally:
        process.kill()
        process.wait()
