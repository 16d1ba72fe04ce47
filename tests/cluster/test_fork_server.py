"""Ranks that are forked from a process that has imported what they need."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.cluster import fork_server
from rlhf.cluster.session import Session
from rlhf.cluster.worker_group import WorkerGroup
from rlhf.pipeline.stage import OURS
from tests.cluster.test_worker import attempt, call
from tests.faults.running import gone
from tests.pipeline.helpers import until

__all__ = ["attempt"]  # a fixture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux only")

IMPORTS = "RLHF_FORK_SERVER_IMPORTS"
PROGRAM = """
import json, os, sys
told = {"arguments": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "environment": dict(os.environ),
        "pid": os.getpid(), "parent": os.getppid(), "own group": os.getpgid(0) == os.getpid(),
        "forked": "torch" in sys.modules}
print(json.dumps(told), flush=True)
print("an error", file=sys.stderr, flush=True)
sys.stdin.read()
"""
# Instead of seconds of imports, with what a forked process asks torch.
SERVER = """
import os, sys
from types import SimpleNamespace
from rlhf.cluster import fork_server
fork_server.IDLE_SECONDS = {idle}
user = os.getuid() + {other_user}
os.getuid = lambda: user
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(_is_in_bad_fork=lambda: {bad}))
fork_server.main(sys.argv[1:])
"""


@dataclass
class Machine:
    """A server of this test's alone, and starters that find it by their environment, to which Python adds nothing."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    processes: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def serve(
        self, idle: float = 60.0, bad: bool = False, other_user: bool = False, raylet: int | None = None
    ) -> "subprocess.Popen[str]":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address())
            listener.listen()
            code = SERVER.format(idle=idle, bad=bad, other_user=int(other_user))
            command = [sys.executable, "-c", code, "--serve", str(listener.fileno()), str(raylet or os.getpid())]
            environment = os.environ | self.environment
            server = subprocess.Popen(
                command, pass_fds=[listener.fileno()], env=environment, stderr=subprocess.PIPE, text=True
            )
        self.processes.append(server)
        return server

    def start(self, **variables: str) -> "subprocess.Popen[str]":
        """Run the starter as Ray does; the standard streams are the worker's too."""
        program = self.folder / "program.py"
        program.write_text(PROGRAM)
        command = [sys.executable, "-I", "-S", fork_server.__file__, str(program), "--worker-id=7"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        starter = subprocess.Popen(command, **pipes, text=True, cwd=self.folder, env=self.environment | variables)
        self.processes.append(starter)
        return starter

    def told(self, starter: "subprocess.Popen[str]") -> dict[str, Any]:
        """What the worker says of itself, which then waits for the end of its standard input."""
        assert starter.stdout is not None
        told = json.loads(starter.stdout.readline())
        assert told["arguments"] == [str(self.folder / "program.py"), "--worker-id=7"]
        assert (told["path"], told["folder"]) == (str(self.folder), str(self.folder))
        return told

    def address(self) -> str:
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name in list(os.environ):
                monkeypatch.delenv(name)
            for name, value in self.environment.items():
                monkeypatch.setenv(name, value)
            return fork_server.address()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path.resolve(), {"TEST": str(tmp_path), "LC_ALL": "C.UTF-8", IMPORTS: "json"})
    yield machine
    for process in machine.processes:
        process.kill()
        process.communicate(timeout=10)


def test_a_forked_worker_is_what_ray_asked_for(machine: Machine):
    """Its arguments, environment, folder and standard streams are the starter's, which has ended; so has its group."""
    machine.serve()
    starter = machine.start(RAY_JOB_ID="1")  # the server's environment has more, and not this
    told = machine.told(starter)
    assert starter.wait(10) == 0
    assert told["pid"] != starter.pid
    assert (told["forked"], told["own group"]) == (True, True)
    assert told["environment"] == machine.environment | {"RAY_JOB_ID": "1"}
    _, errors = starter.communicate()
    assert errors == "an error\n"
    until(lambda: gone(told["pid"]), "the end of the worker, whose standard input has ended", 10)


def test_starters_that_come_at_once_share_one_server(machine: Machine):
    """The first of them starts it."""
    (machine.folder / "torch.py").write_text("class cuda:\n    _is_in_bad_fork = staticmethod(lambda: False)")
    machine.environment |= {IMPORTS: "torch", "PYTHONPATH": str(machine.folder)}
    starters = [machine.start() for _ in range(8)]
    told = [machine.told(one) for one in starters]
    (server,) = {one["parent"] for one in told}
    os.kill(server, signal.SIGKILL)
    assert len({one["pid"] for one in told}) == 8
    assert server not in {one.pid for one in starters}


def test_a_server_that_is_killed_or_cannot_import_costs_time_and_nothing_else(machine: Machine):
    """The worker that was forked lives on, and the next starter becomes its worker itself."""
    server = machine.serve()
    worker = machine.told(machine.start())
    server.kill()
    server.wait()
    broken = machine.start(**{IMPORTS: "no_such_library"})
    told = machine.told(broken)
    assert (told["pid"], told["forked"]) == (broken.pid, False)
    assert "no fork server: " in broken.communicate()[1]
    assert not gone(worker["pid"])


def test_after_an_import_that_has_called_cuda_the_worker_imports_anew(machine: Machine):
    """CUDA does not survive a fork; the process is the same, but Python begins again."""
    machine.serve(bad=True)
    starter = machine.start()
    told = machine.told(starter)
    assert not told["forked"]
    assert told["pid"] != starter.pid
    assert "no forked rank: an import has initialised CUDA" in starter.communicate()[1]


def test_a_server_and_who_asks_it_talk_to_nobody_elses_processes(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    """Whoever is asked to fork would run anything as its own user, and is told the whole environment."""
    server = machine.serve(other_user=True)
    starter = machine.start()
    assert machine.told(starter)["pid"] == starter.pid
    assert "no fork server: " in starter.communicate()[1]
    assert server.poll() is None
    address, mine = machine.address(), os.getuid()
    monkeypatch.setattr(fork_server, "address", lambda: address)
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(PermissionError, match="another user's process has its address"), fork_server.connected():
        pass


def test_a_server_ends_once_it_has_had_no_rank_for_a_while(machine: Machine):
    """As long as there is one it stays, since that may fail and be started again."""
    server = machine.serve(idle=0.5)
    starter = machine.start()
    told = machine.told(starter)
    time.sleep(1)
    assert server.poll() is None
    os.kill(told["pid"], signal.SIGKILL)
    assert server.wait(10) == 0
    assert gone(told["pid"])


def test_a_server_ends_with_its_raylet_and_leaves_the_ranks_to_ray(machine: Machine):
    """At once: a cluster that is stopped leaves half a gigabyte to nobody."""
    raylet = subprocess.Popen(["sleep", "60"])
    server = machine.serve(raylet=raylet.pid)
    worker = machine.told(machine.start())
    assert server.poll() is None
    raylet.kill()
    raylet.wait()
    assert server.wait(10) == 0
    assert not gone(worker["pid"])


def test_another_environment_is_another_servers(machine: Machine):
    """Libraries read it as they are imported; but Ray's own variables differ from worker to worker."""
    one = machine.address()
    machine.environment["RAY_JOB_ID"] = "7"
    assert machine.address() == one
    machine.environment["HF_HOME"] = "/elsewhere"
    assert machine.address() != one


def test_who_knocks_and_says_nothing_or_nonsense_keeps_nobody_from_being_served(machine: Machine):
    """Such as a starter that gave up, or that was killed in the middle."""
    server = machine.serve()
    for words in (b"", b"\0", b"\0{", b'\0{"arguments": 7}'):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(machine.address())
            other.sendall(words)
    assert machine.told(machine.start())["forked"]
    assert server.poll() is None


LARGE = {"accelerate", "datasets", "deepspeed", "peft", "scipy", "sklearn", "torch", "transformers", "trl", "wandb"}


def forked(context: Context[Any]) -> dict[str, float]:
    """A stage: whom it was forked from."""
    del context
    return {"parent": float(os.getppid())}


def imports(context: Context[Any]) -> dict[str, float]:
    """A stage that imports ours, which find of others' large libraries all that they need."""
    del context
    before = set(sys.modules)
    for stage in ("sft", "rm", "ppo", "evaluate"):
        importlib.import_module(f"rlhf.stages.{stage}")
    late = {name for name in sys.modules.keys() - before if name.split(".")[0] in LARGE}
    assert not late, late
    return {}


def run(
    session: Session,
    attempt: Path,
    count: int,
    stage: Callable[[Context[Any]], dict[str, float]],
    imports: tuple[str, ...] = (),
) -> Any:
    """What the stage returns."""
    group = WorkerGroup(
        replace(call(attempt, ""), code=f"{__name__}:{stage.__name__}", imports=imports),
        session.resources().per_rank("total", count, 1, None),
    )
    assert group.is_over(120)
    assert group.outcome() is None
    return AttemptFolder(attempt).result.read()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestOnRay:
    def test_ranks_are_forked_from_one_process_and_from_another_when_it_is_gone(self, session: Session, attempt: Path):
        """Those of another group too."""
        server = run(session, attempt, 2, forked)
        assert run(session, attempt, 1, forked) == server
        os.kill(int(server["parent"]), signal.SIGKILL)
        assert run(session, attempt, 2, forked) != server

    def test_our_stages_find_imported_what_they_need(self, session: Session, attempt: Path):
        """All name the same modules, so that one server forks the ranks of all."""
        (modules,) = {stage.imports for stage in OURS if stage.runs == "workers"}
        assert run(session, attempt, 1, imports, modules) == {}


def test_on_a_node_with_another_python_the_rank_is_started_as_ray_would(tmp_path: Path):
    """By the Python beside that node's Ray; where Ray lies as it does here, the starter runs."""
    environment = fork_server.runtime_env((), True)
    assert environment is not None
    workers = Path("lib", "python3.12", "site-packages", "ray", "_private", "workers", "default_worker.py")
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)

    # As Ray runs it.
    command = f"exec {environment['py_executable']} {tmp_path / workers} --token='a b'"
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert told.stdout == f"{tmp_path / workers} --token=a b\n"
    assert "another Python than the driver" in told.stderr
    ours = Path(ray.__file__).parent / "_private" / "workers" / "default_worker.py"
    # Without its server's modules it says so, and becomes the worker itself.
    words = ["bash", "-c", f"exec {environment['py_executable']} {ours} --help"]
    told = subprocess.run(words, capture_output=True, text=True, env=os.environ | {IMPORTS: "no_such_library"})
    assert "no fork server: the server has ended" in told.stderr or "no fork server: [Errno" in told.stderr
    assert "--raylet-name" in told.stdout
