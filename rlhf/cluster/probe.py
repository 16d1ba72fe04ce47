"""What ``rlhf doctor --cluster`` asks every node: its versions, network, clock, and view of the store.

Without torch until two nodes measure the bandwidth between them.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from rlhf.cluster import network
from rlhf.cluster.devices import gpu_names

CONNECT_SECONDS = 5.0
MEET_SECONDS = 30.0
REPEATS = 3
PING_REPEATS = 20
_OURS = "rlhf-pipeline"


@dataclass(frozen=True)
class Facts:
    """What must agree between nodes, and what their users want to know."""

    host: str
    python: str
    executable: str
    packages: Mapping[str, str]
    """Distribution to version, without this project's own."""
    code: str
    """Digest of the project's files."""
    cpus: int
    gpus: tuple[str, ...]
    address: str = ""
    """By which Ray knows the node."""
    interface: str | None = None
    """The network interface with that address."""
    missing_interfaces: tuple[tuple[str, str], ...] = ()
    """Variable and name of interfaces that the node's environment names and the node has not."""


def facts(address: str = "") -> Facts:
    """Return those of this process, which is a node's if it has an address."""
    # Of several, Python imports the one that comes first on its path.
    found = reversed(list(importlib.metadata.distributions()))
    versions = {one.name.lower().replace("_", "-"): one.version for one in found}
    there = list(psutil.net_if_addrs())
    return Facts(
        host=socket.gethostname(),
        python=platform.python_version(),
        executable=sys.executable,
        packages={name: versions[name] for name in sorted(versions) if name != _OURS},
        code=_code_digest(),
        cpus=os.cpu_count() or 0,
        gpus=gpu_names(),
        address=address,
        interface=network.interface_of(address),
        missing_interfaces=tuple(network.missing_interfaces(os.environ, there)) if address else (),
    )


def _code_digest() -> str:
    """Return the first digits of SHA-256 over the names and contents of the project's Python files."""
    digest = hashlib.sha256()
    for package in ("rlhf", "stages"):
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            continue
        root = Path(found.origin).parent
        for path in sorted(root.rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{package}/{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]


class Probe:
    """A Ray actor on each node; the driver calls its methods."""

    def __init__(self) -> None:
        import ray

        self._address = ray.util.get_node_ip_address()
        # The kernel completes others' connections, without a call of this process.
        self._listener = socket.create_server(("", 0), backlog=1024)
        self._meeting: Any = None

    def facts(self) -> tuple[Facts, int]:
        """Return what is known here, and a port at which this node can be reached."""
        return facts(self._address), self._listener.getsockname()[1]

    def clock(self) -> float:
        """Return the time in seconds since 1970."""
        return time.time()

    def write(self, folder: str, name: str) -> str:
        """Write a file into the store's folder; return why that is impossible, or nothing."""
        try:
            (Path(folder) / name).write_text(name)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def unseen(self, folder: str, names: list[str]) -> list[str]:
        """Return which of the files that other nodes have written are not there."""
        return [name for name in names if not _reads(Path(folder) / name, name)]

    def remove(self, folder: str, name: str) -> None:
        """Remove this node's file."""
        (Path(folder) / name).unlink(missing_ok=True)

    def unreachable(self, places: list[tuple[str, int]]) -> list[str]:
        """Connect to each address and port; return why that is impossible, or nothing, in their order."""
        return [_connects(*place) for place in places]

    def host_meeting(self) -> int:
        """Open a place where this node and another meet; return its port."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - it is documented there

        network.use_interface_of(self._address)
        until = timedelta(seconds=MEET_SECONDS)
        self._meeting = TCPStore(self._address, 0, 2, is_master=True, timeout=until, wait_for_workers=False)
        return self._meeting.port

    def all_reduce(self, rank: int, address: str, port: int, gpu: bool) -> tuple[float, float]:
        """Sum tensors with another node; return bytes per second of a large one, and seconds of the smallest.

        Of two ranks each sends and receives the tensor's size, so that this is what passes in each direction.

        rank           0 on the node that hosts the meeting, 1 on the other
        address, port  of the meeting
        """
        import torch
        import torch.distributed as dist
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - it is documented there

        network.use_interface_of(self._address)
        until = timedelta(seconds=MEET_SECONDS)
        store = TCPStore(address, port, 2, is_master=False, timeout=until) if rank else self._meeting
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=2, timeout=until)
        try:
            device = torch.device("cuda", 0) if gpu else torch.device("cpu")
            large = torch.zeros((64 if gpu else 8) * 2**20, device=device)
            return large.nbytes / _seconds(large, REPEATS), _seconds(torch.zeros(1, device=device), PING_REPEATS)
        finally:
            dist.destroy_process_group()


def _seconds(tensor: Any, repeats: int) -> float:
    """Return the shortest time that an all-reduce of the tensor takes, after one that connects."""
    import torch.distributed as dist

    seconds: list[float] = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()  # a GPU's stream has ended by then
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _reads(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except (OSError, UnicodeDecodeError):
        return False


def _connects(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
