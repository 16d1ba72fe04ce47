import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.cluster.session import Session
from rlhf.cluster.worker import Location, Rank
from rlhf.cluster.worker_group import WorkerGroup, environments, run_task
from rlhf.errors import StageError
from tests.cluster.test_worker import attempt, call

__all__ = ["attempt"]  # a fixture


def place(node: str, *gpus: str) -> Location:
    return Location(node, f"address of {node}", 1000 + ord(node), gpus)


def test_ranks_of_a_node_follow_each_other_by_their_gpus():
    """Each sees all GPUs of its group there, and its own is the one with its number among them."""
    places = [place("b", "10"), place("a", "1"), place("b", "9"), place("a", "0"), place("b", "8")]
    numbered = environments(places)
    assert [index for index, _ in numbered] == [4, 2, 0, 3, 1]
    found = [environment for _, environment in numbered]
    assert [one["RANK"] for one in found] == ["0", "1", "2", "3", "4"]
    assert [one["LOCAL_RANK"] for one in found] == ["0", "1", "2", "0", "1"]
    assert [one["LOCAL_WORLD_SIZE"] for one in found] == ["3", "3", "3", "2", "2"]
    assert {one["WORLD_SIZE"] for one in found} == {"5"}
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["8,9,10"] * 3 + ["0,1"] * 2
    for index, one in numbered:
        assert one["CUDA_VISIBLE_DEVICES"].split(",")[int(one["LOCAL_RANK"])] == places[index].gpus[0]
    # Where rank 0 is.
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in found} == {("address of b", str(1000 + ord("b")))}


def test_ranks_that_are_set_apart_are_a_group_of_their_own():
    """The last ones, which know where the others meet; GPUs are numbered on each node as ever."""
    places = [place("a", "1"), place("b", "0"), place("a", "0"), place("b", "1")]
    found = [environment for _, environment in environments(places, 1)]
    assert [one["RANK"] for one in found] == ["0", "1", "2", "0"]
    assert [one["WORLD_SIZE"] for one in found] == ["3", "3", "3", "1"]
    assert [one["LOCAL_RANK"] for one in found] == ["0", "1", "0", "1"]
    assert [one["LOCAL_WORLD_SIZE"] for one in found] == ["2", "2", "1", "1"]
    assert {(one["TRAINERS_ADDR"], one["TRAINERS_PORT"]) for one in found} == {("address of a", str(1000 + ord("a")))}
    assert [one["MASTER_ADDR"] for one in found] == ["address of a"] * 3 + ["address of b"]
    assert all("TRAINERS_ADDR" not in one for _, one in environments(places))


def test_what_ranks_without_gpus_see_is_left_as_it_is():
    """An empty variable would hide the GPUs from whoever asks what the machine has."""
    numbered = environments([place("a"), place("a")])
    assert [environment["LOCAL_RANK"] for _, environment in numbered] == ["0", "1"]
    assert all("CUDA_VISIBLE_DEVICES" not in environment for _, environment in numbered)


def test_nobody_is_given_the_port_that_ranks_meet_at():
    """Seconds pass until torch listens there, and Ray's own processes connect all the time."""
    code = "from rlhf.cluster.worker import Rank\nrank = Rank()\nprint(rank._meeting_point.getsockname()[1])\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        with socket.socket() as torchs:
            torchs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            torchs.bind(("", port))
            torchs.listen()
        process.communicate("\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_ended_group_gives_its_room_back(session: Session, attempt: Path):
    """Also one that only begins, and one that waits for room; the next one has it at once."""
    both_cores = session.resources().per_rank("total", 2, 1, None)
    beginning, waiting = (WorkerGroup(call(attempt, "loud"), both_cores) for _ in range(2))
    waiting.stop()
    beginning.stop()
    group = WorkerGroup(call(attempt, "loud"), both_cores)
    assert group.is_over(60)
    assert group.outcome() is None
    assert (attempt / "log-1.txt").read_text().endswith("from python\nfrom below\nfrom a child\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_relative_paths_begin_at_the_driver_s_folder_wherever_ray_was_started(
    session: Session, attempt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """In a task and in a rank of a session that began elsewhere; a node without that folder says so in its log."""
    session.start()
    (tmp_path / "here.txt").write_text("7")
    monkeypatch.chdir(tmp_path)
    assert run_task(call(attempt, "reading"), 1, lambda: None) == {"value": 7}
    group = WorkerGroup(call(attempt, "reading"), session.resources().per_rank("total", 1, 1, None))
    assert group.is_over(60)
    assert group.outcome() is None
    elsewhere = replace(call(attempt, "loud"), working_folder=tmp_path / "nowhere")
    assert run_task(elsewhere, 1, lambda: None) == {"value": 1}
    assert f"there is no {tmp_path}/nowhere here" in (attempt / "log-0.txt").read_text()


class Misplaced(Rank):
    """As on a node that has not got our code."""

    def __init__(self) -> None:
        raise ModuleNotFoundError("No module named 'rlhf'")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_keeps_a_rank_from_being_made_is_told_as_it_came(
    session: Session, attempt: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nobody was killed, though Ray says that an actor died."""
    monkeypatch.setattr("rlhf.cluster.worker_group.Rank", Misplaced)
    group = WorkerGroup(call(attempt, "loud"), session.resources().per_rank("total", 1, 1, None))
    assert group.is_over(60)
    error = group.outcome()
    assert type(error) is StageError
    assert error.what.startswith("total failed before it began: ")
    assert error.what.endswith("ModuleNotFoundError: No module named 'rlhf'")


@pytest.mark.slow
def test_no_log_monitor_runs_beside_a_session(session: Session):
    """Ray's, which would read every worker's log ten times a second for nobody."""
    import ray._private.worker

    node: Any = ray._private.worker._global_node  # pyright: ignore[reportPrivateUsage]
    commands: list[str] = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            commands.append(command.read_text())
    here = [command for command in commands if node.get_session_dir_path() in command]
    assert any("raylet" in command for command in here)
    assert not [command for command in here if "log_monitor.py" in command]
