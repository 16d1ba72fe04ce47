"""Without it, each rank imports its libraries itself: nothing is lost but 7 to 9 seconds at every start.

To import torch, transformers, TRL and DeepSpeed takes a rank that long on a core, and minutes from a slow file system,
also after a failure. This server has imported them, forks ranks in a second, and its imports are in memory once for all
of them.

Ray runs the command of :func:`runtime_env` where it would run Python, on every node. That is the starter: it hands its
arguments, its environment and its standard streams to the machine's server, which it starts where there is none, and
ends. The forked process becomes the worker that Ray asked for. Where no server answers in time, the starter becomes
that worker itself. A server ends with the raylet whose worker was the first to need it.

Our own code is not in the server: it may be newer by the next run.
"""

import gc
import hashlib
import importlib
import importlib.util
import json
import os
import runpy
import selectors
import shlex
import socket
import struct
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALL_RANKS = ("deepspeed",)
"""Third-party modules that every rank imports, with all that they import."""
READY_SECONDS = 30.0
"""How long a starter waits for a server that still imports: Ray gives up a worker that does not start within 60 s."""
IDLE_SECONDS = 60.0
"""How long a server stays without a rank: the next stage may start soon."""
# Runs on each node, where Ray's arguments begin with its own program for workers. Where that is another path than here,
# Python is installed elsewhere, and the starter's path may be anybody's: the rank then starts as Ray would start it.
_ON_ANY_NODE = """if [ "$1" = {worker} ] && [ -r {file} ]; then exec {starter} "$@"; fi
echo "no fork server: this node has another Python than the driver" >&2
python="${{1%/lib*/python3*}}/bin/python3"
[ -x "$python" ] || python=python3
exec "$python" "$@\""""
_SERVE = "--serve"
_MODULES = "RLHF_FORK_SERVER_IMPORTS"
_STREAMS = (0, 1, 2)
_OOM_SCORE = Path("/proc/self/oom_score_adj")


def runtime_env(imports: Sequence[str], gpu: bool) -> dict[str, Any] | None:
    """Return Ray's ``runtime_env`` of ranks that are forked; None where they cannot be.

    imports  the stage's modules that are imported ahead, beside :data:`ALL_RANKS`
    """
    # No other system reliably forks a process that has loaded torch.
    if sys.platform != "linux":
        return None
    libraries, ray = importlib.util.find_spec("torch"), importlib.util.find_spec("ray")
    assert libraries is not None
    assert libraries.origin is not None
    assert ray is not None
    assert ray.origin is not None
    # As part of the server's environment they give each set of modules and of installed packages a server of its own.
    variables = {
        _MODULES: ",".join((*ALL_RANKS, *imports)),
        # Changes as packages are installed.
        "RLHF_FORK_SERVER_LIBRARIES": str(Path(libraries.origin).parents[1].stat().st_mtime_ns),
    }
    if not gpu:
        variables["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for GPUs as it is imported
    script = _ON_ANY_NODE.format(
        worker=shlex.quote(str(Path(ray.origin).with_name("_private") / "workers" / "default_worker.py")),
        starter=shlex.join([sys.executable, "-I", "-S", __file__]),
        file=shlex.quote(__file__),
    )
    return {"py_executable": shlex.join(["bash", "-c", script, "rank"]), "env_vars": variables}


def start(arguments: list[str]) -> None:
    """Run Python with the arguments, in a process that the server forks, or else in this one."""
    try:
        with connected() as server:
            server.settimeout(READY_SECONDS)
            _expect_byte(server)
            request = {
                "arguments": arguments,
                "environment": dict(os.environ),
                "folder": str(Path.cwd()),
                "oom_score": _OOM_SCORE.read_text(),
            }
            socket.send_fds(server, [b"\0"], _STREAMS)
            server.sendall(json.dumps(request).encode())
            server.shutdown(socket.SHUT_WR)
            _expect_byte(server)  # from the worker itself: from now on it does not need the server
    except Exception as error:  # noqa: BLE001 - whatever the error is, Ray waits for its worker
        print(f"no fork server: {error}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606


@dataclass(frozen=True)
class Worker:
    """A starter's request: the worker that a forked process becomes."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    oom_score: str
    """How readily the kernel kills it when memory runs out, as Ray has set it."""
    streams: list[int]
    starter: socket.socket

    def become(self) -> None:
        """Continue as Python does when it is run with the arguments."""
        for stream, descriptor in zip(_STREAMS, self.streams, strict=True):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        # Ray ends the whole process group of a worker that ends.
        os.setsid()
        os.environ.clear()
        os.environ |= self.environment
        os.chdir(self.folder)
        with suppress(PermissionError):  # only privileged users may lower it
            _OOM_SCORE.write_text(self.oom_score)
        gc.enable()
        self.starter.sendall(b"\0")
        self.starter.close()
        if sys.modules["torch"].cuda._is_in_bad_fork():  # an import has called CUDA in the server
            print("no forked rank: an import has initialised CUDA", file=sys.stderr, flush=True)
            os.execv(sys.executable, [sys.executable, *self.arguments])  # noqa: S606
        sys.argv = list(self.arguments)
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


def serve(listener: socket.socket, raylet: int) -> Worker | None:
    """Import, then fork at each request of a starter, until there has been no rank for :data:`IDLE_SECONDS`.

    Return in each forked process the worker that it becomes; at the end, in the server itself, None.

    raylet  a file descriptor of the process with whose end the server's comes; it is readable from then on
    """
    # Makes torch ask the driver's library alone whether there are GPUs: CUDA does not survive a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    gc.disable()
    for module in os.environ[_MODULES].split(","):
        importlib.import_module(module)
    gc.freeze()  # a rank's first collection would otherwise copy all memory that it shares
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(raylet, selectors.EVENT_READ)
        ranks: set[int] = set()
        while events := selector.select(None if ranks else IDLE_SECONDS):
            for key, _ in events:
                if key.data in ranks:
                    ranks.remove(key.data)
                    os.waitpid(key.data, 0)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    continue
                if key.fd == raylet:
                    return None
                worker = _accept(listener)
                if worker is None:
                    continue
                rank = os.fork()
                if rank == 0:
                    for descriptor in [key.fd for key in selector.get_map().values() if key.fileobj is not listener]:
                        os.close(descriptor)
                    return worker
                worker.starter.close()
                for stream in worker.streams:
                    os.close(stream)
                ranks.add(rank)
                selector.register(os.pidfd_open(rank), selectors.EVENT_READ, rank)
    return None


def _accept(listener: socket.socket) -> Worker | None:
    """Return the next starter's request; None where it has ended, or is another user's."""
    starter, _ = listener.accept()
    starter.settimeout(5)
    try:
        if _user(starter) != os.getuid():
            raise PermissionError("another user's process asks")
        starter.sendall(b"\0")
        _, streams, _, _ = socket.recv_fds(starter, 1, len(_STREAMS))
        with starter.makefile("rb") as file:
            return Worker(**json.load(file), streams=streams, starter=starter)
    except (OSError, ValueError):
        starter.close()
        return None


@contextmanager
def connected() -> Generator[socket.socket]:
    """Connect to this machine's server, which is started where there is none; raise OSError where none is reached."""
    here = address()
    with socket.socket(socket.AF_UNIX) as server:
        for _ in range(100):
            try:
                server.connect(here)
                break
            except ConnectionRefusedError:
                try:
                    with socket.socket(socket.AF_UNIX) as listener:
                        listener.bind(here)
                        listener.listen()
                        # -P: the modules beside this file must not shadow others. Ray's raylet starts starters.
                        command = [sys.executable, "-P", __file__, _SERVE, str(listener.fileno()), str(os.getppid())]
                        listener.set_inheritable(True)
                        os.posix_spawn(sys.executable, command, os.environ, setsid=True)
                except OSError:  # another starter has the address already, but does not listen yet
                    time.sleep(0.01)
        else:
            raise ConnectionRefusedError("nothing listens at its address")
        if _user(server) != os.getuid():
            raise PermissionError("another user's process has its address")
        yield server


def _user(connection: socket.socket) -> int:
    """Return the user whose process is at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1]  # process, user, group


def address() -> str:
    """Return the address of the server for this Python and environment, which libraries read; it is no file."""
    environment = sorted((name, value) for name, value in os.environ.items() if not name.startswith("RAY_"))
    return f"\0rlhf-{hashlib.sha256(json.dumps([sys.executable, environment]).encode()).hexdigest()}"


def _expect_byte(connection: socket.socket) -> None:
    if not connection.recv(1):
        raise ConnectionError("the server has ended")


def main(arguments: list[str]) -> None:
    """Run the server, or a starter."""
    if arguments[0] != _SERVE:
        start(arguments)
    elif (worker := serve(socket.socket(fileno=int(arguments[1])), os.pidfd_open(int(arguments[2])))) is not None:
        worker.become()


if __name__ == "__main__":
    main(sys.argv[1:])
