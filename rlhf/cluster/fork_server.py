"""Starts ranks in a second: each is forked from a process of its node that has imported the libraries already.

To import torch, transformers, TRL and DeepSpeed takes a rank 7 to 9 seconds of a core, and minutes from a slow file
system, at every start, also the one after a failure. A server that has imported them forks ranks in no time, and what
it has imported is in memory once for all of them.

Ray runs the command of :func:`runtime_env` where it would run Python. That is the starter: it hands its arguments, its
environment and its standard streams to the machine's server, which it starts where there is none, and ends. What the
server forks goes on as the worker that Ray asked for. Where no server is to be had in time, the starter becomes that
worker itself, which imports everything: nothing depends on the server but time.

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
from typing import Any, NoReturn

ALL_RANKS = ("deepspeed",)
"""Third-party modules that every rank imports, with all that they import."""
READY_SECONDS = 30.0
"""How long a starter waits for a server that still imports: Ray gives a worker up that has not come within 60 s."""
REQUEST_SECONDS = 5.0
"""How long a starter may take to say what it wants once it was told to."""
TRIES = 100
"""How often a starter knocks at an address that another one has just taken."""
PAUSE_SECONDS = 0.01
IDLE_SECONDS = 60.0
"""How long a server stays without a rank: the next stage's may be about to come."""
_SERVE = "--serve"
_MODULES = "RLHF_FORK_SERVER_IMPORTS"
_INSTALLED = "RLHF_FORK_SERVER_LIBRARIES"
_STREAMS = (0, 1, 2)
_CREDENTIALS = "3i"  # process, user, group
_OOM_SCORE = Path("/proc/self/oom_score_adj")


def runtime_env(imports: Sequence[str], gpu: bool, raylets: Sequence[str]) -> dict[str, Any] | None:
    """Ray's ``runtime_env`` of ranks that are to be forked; None where they cannot be.

    imports  the stage's modules that are imported ahead, beside :data:`ALL_RANKS`
    raylets  the sockets of Ray's nodes: what is not a file of this user's on this machine may have Python elsewhere
    """
    # No other system forks reliably what has loaded torch.
    if sys.platform != "linux" or not all(map(_is_ours, raylets)):
        return None
    libraries = importlib.util.find_spec("torch")
    assert libraries is not None
    assert libraries.origin is not None
    # All are in the server's environment, so that there is another one for others.
    variables = {
        _MODULES: ",".join((*ALL_RANKS, *imports)),
        _INSTALLED: str(Path(libraries.origin).parents[1].stat().st_mtime_ns),  # changes as packages are installed
    }
    if not gpu:
        variables["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for GPUs as it is imported
    return {"py_executable": shlex.join([sys.executable, "-I", "-S", __file__]), "env_vars": variables}


def _is_ours(path: str) -> bool:
    with suppress(OSError):
        return Path(path).stat().st_uid == os.getuid()
    return False


def start(arguments: list[str]) -> None:
    """Have Python run with the arguments, in a process that the server forks, or else in this one."""
    try:
        with connected() as server:
            server.settimeout(READY_SECONDS)
            _expect_byte(server)
            wanted = {
                "arguments": arguments,
                "environment": dict(os.environ),
                "folder": str(Path.cwd()),
                "oom_score": _OOM_SCORE.read_text(),
            }
            socket.send_fds(server, [b"\0"], _STREAMS)
            server.sendall(json.dumps(wanted).encode())
            server.shutdown(socket.SHUT_WR)
            _expect_byte(server)  # by the worker itself: from now on it is there, whatever becomes of the server
    except Exception as error:  # noqa: BLE001 - whatever it is, Ray waits for its worker
        print(f"no fork server: {error}", file=sys.stderr, flush=True)
        _run_anew(arguments)


@dataclass(frozen=True)
class Worker:
    """What a forked process is to become."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    oom_score: str
    """How readily the kernel kills it when memory runs out, as Ray has set it."""
    streams: list[int]
    starter: socket.socket

    def become(self) -> None:
        """Go on as Python would that was run with the arguments."""
        for stream, given in zip(_STREAMS, self.streams, strict=True):
            os.dup2(given, stream)
            os.close(given)
        # Ray ends the whole process group of a worker that ends.
        os.setsid()
        os.environ.clear()
        os.environ |= self.environment
        os.chdir(self.folder)
        with suppress(PermissionError):  # to lower it takes rights
            _OOM_SCORE.write_text(self.oom_score)
        gc.enable()
        self.starter.sendall(b"\0")
        self.starter.close()
        if sys.modules["torch"].cuda._is_in_bad_fork():  # somebody's import has called CUDA all the same
            print("no forked rank: an import has initialised CUDA", file=sys.stderr, flush=True)
            _run_anew(self.arguments)
        program = self.arguments[0]
        sys.argv = list(self.arguments)
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")


def serve(listener: socket.socket) -> Worker | None:
    """Import, then fork whenever a starter asks at the listener, until there has been no rank for a while.

    Returns what to become in each process that was forked, and at the end None in the server itself.
    """
    # Whether there are GPUs is then asked of the driver's library alone: CUDA does not survive a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    gc.disable()
    for module in os.environ[_MODULES].split(","):
        importlib.import_module(module)
    gc.freeze()  # a rank's first collection would otherwise copy all that it shares
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        ranks: set[int] = set()
        while events := selector.select(None if ranks else IDLE_SECONDS):
            for key, _ in events:
                if key.data in ranks:
                    ranks.remove(key.data)
                    os.waitpid(key.data, 0)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    continue
                worker = _asked(listener)
                if worker is None:
                    continue
                rank = os.fork()
                if rank == 0:
                    for ours in [one.fd for one in selector.get_map().values() if one.data is not None]:
                        os.close(ours)
                    return worker
                worker.starter.close()
                for stream in worker.streams:
                    os.close(stream)
                ranks.add(rank)
                selector.register(os.pidfd_open(rank), selectors.EVENT_READ, rank)
    return None


def _asked(listener: socket.socket) -> Worker | None:
    """What the next starter wants; None of one that has gone, or is another user's."""
    starter, _ = listener.accept()
    starter.settimeout(REQUEST_SECONDS)
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
    """A connection to this machine's server, which is started where there is none.

    Raises:
        OSError: there can be none.
    """
    here = address()
    with socket.socket(socket.AF_UNIX) as server:
        for _ in range(TRIES):
            try:
                server.connect(here)
                break
            except ConnectionRefusedError:
                try:
                    _start_server(here)
                except OSError:  # another starter has the address already, but does not listen yet
                    time.sleep(PAUSE_SECONDS)
        else:
            raise ConnectionRefusedError("nobody listens at its address")
        if _user(server) != os.getuid():
            raise PermissionError("another user's process has its address")
        yield server


def _start_server(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listener.set_inheritable(True)
        # -P: modules beside this one have names of the standard library's.
        command = [sys.executable, "-P", __file__, _SERVE, str(listener.fileno())]
        os.posix_spawn(sys.executable, command, os.environ, setsid=True)


def _user(connection: socket.socket) -> int:
    """Whose process listens at the other end, or has connected from there."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_CREDENTIALS))
    return struct.unpack(_CREDENTIALS, credentials)[1]


def address() -> str:
    """One for each Python and environment, which libraries read as they are imported; it is no file."""
    environment = sorted((name, value) for name, value in os.environ.items() if not name.startswith("RAY_"))
    return f"\0rlhf-{hashlib.sha256(json.dumps([sys.executable, environment]).encode()).hexdigest()}"


def _expect_byte(connection: socket.socket) -> None:
    if not connection.recv(1):
        raise ConnectionError("the server has ended")


def _run_anew(arguments: list[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606


def main(arguments: list[str]) -> None:
    """Be the server, or a starter."""
    if arguments[0] != _SERVE:
        start(arguments)
        return
    worker = serve(socket.socket(fileno=int(arguments[1])))
    if worker is not None:
        worker.become()


if __name__ == "__main__":
    main(sys.argv[1:])
