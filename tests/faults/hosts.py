"""Machines of a cluster, made of namespaces of this one: own network, processes, name, home and temporary folder.

They share a bridge, this machine's programs, and one folder, which each of them sees as :data:`SHARED`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SHARED = "/mnt/shared"
NETWORK = "10.77.0"
# $0 is the shared folder or empty, $1 the host's name, which stands for a loopback address as it does on Debian.
# Without a name server names are known or not at once. Ignoring SIGCHLD lets the kernel clear dead orphans away.
_BOOT = f"""set -e
mount --make-rprivate /
mount -t tmpfs none /dev/shm
mount -t tmpfs none /mnt
mkdir /mnt/home /mnt/tmp {SHARED}
if [ -n "$0" ]; then mount --bind "$0" {SHARED}; else rmdir {SHARED}; fi
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$1" > /mnt/hosts
mount --bind /mnt/hosts /etc/hosts
: > /mnt/resolv.conf
mount --bind /mnt/resolv.conf /etc/resolv.conf
hostname "$1"
ip link set lo up
trap '' CHLD
echo ready
exec cat"""
_OWN = ("--net", "--mount", "--uts", "--ipc")


@dataclass
class Host:
    """A machine: everything on it ends with its first process."""

    name: str
    address: str
    boot: "subprocess.Popen[str]"
    pid: int
    """Of its first process, as it is known here."""
    variables: dict[str, str]

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs another on this machine."""
        return ["nsenter", f"--target={self.pid}", *_OWN, "--pid", "env", f"--chdir={REPOSITORY}", *words]

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
        own = {"HOME": "/mnt/home", "TMPDIR": "/mnt/tmp", "RAY_TMPDIR": "/mnt/tmp", "PYTHONPATH": str(REPOSITORY)}
        return kept | own | self.variables | more

    def start(self, *words: str, **variables: str) -> "subprocess.Popen[str]":
        """Start a Python program on this machine."""
        return subprocess.Popen(
            self.command([sys.executable, *words]),
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, seconds: float = 60.0) -> str:
        """Run a Python program on this machine to its end, which must be a good one."""
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, out + err
        return out

    def start_ray(self, head: "Host | None" = None, cpus: int = 1) -> None:
        """Start Ray, as the head of a cluster or as a node of the head's."""
        place = [f"--address={head.address}:6379"] if head else ["--head", "--port=6379", "--include-dashboard=false"]
        words = ("-m", "ray.scripts.scripts", "start", *place, f"--num-cpus={cpus}", "--num-gpus=0")
        words += ("--object-store-memory=100000000", "--disable-usage-stats")
        self.run(*words, seconds=120.0)


@dataclass
class Hosts:
    """The machines of a test and the bridge between them."""

    shared: Path
    variables: dict[str, str]
    _bridge: "subprocess.Popen[str]"
    _hosts: list[Host] = field(default_factory=list)

    def add(self, name: str, *, shared: bool = True, interface: str = "eth0") -> Host:
        """Start a machine and plug it in. ``shared``: whether it sees the common folder."""
        number = len(self._hosts) + 1
        whole = ("--pid", "--fork", "--kill-child", "--mount-proc")
        boot = _boot(*_OWN, *whole, "sh", "-c", _BOOT, str(self.shared) if shared else "", name)
        pid = int(Path(f"/proc/{boot.pid}/task/{boot.pid}/children").read_text())
        host = Host(name, f"{NETWORK}.{number}", boot, pid, self.variables)
        self._hosts.append(host)
        self._switch("ip", "link", "add", name, "type", "veth", "peer", "name", interface, "netns", str(pid))
        self._switch("ip", "link", "set", name, "master", "bridge", "up")
        for words in (
            ("addr", "add", f"{host.address}/24", "dev", interface),
            ("link", "set", interface, "up"),
            # Ray finds a machine's own address by the route that it would take to any other.
            ("route", "add", "default", "via", f"{NETWORK}.254"),
        ):
            subprocess.run(host.command(["ip", *words]), check=True)
        return host

    def lose(self, host: Host) -> None:
        """Take a machine away as a power cut does: nobody is told, neither by it nor by its connections."""
        self._switch("ip", "link", "set", host.name, "down")
        os.kill(host.pid, 9)
        host.boot.wait()

    def end(self) -> None:
        for host in self._hosts:
            host.boot.kill()
            host.boot.communicate()
        self._bridge.kill()
        self._bridge.communicate()

    def _switch(self, *words: str) -> None:
        subprocess.run(["nsenter", f"--target={self._bridge.pid}", "--net", *words], check=True)


def _boot(*words: str) -> "subprocess.Popen[str]":
    """Start the first process of new namespaces, which says when it is ready. Skips the test where it may not."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(["unshare", *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        pytest.skip(f"namespaces are not permitted here: {process.communicate()[1].strip()}")
    return process


@contextmanager
def machines(shared: Path, **variables: str) -> Generator[Hosts]:
    """The machines of a test. Skips the test where they cannot be made."""
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"machines are made with {', '.join(missing)}, which is not there")
    script = f"set -e; ip link add bridge type bridge; ip addr add {NETWORK}.254/24 dev bridge; "
    script += "ip link set bridge up; echo ready; exec cat"
    bridge = _boot("--net", "sh", "-c", script)
    hosts = Hosts(shared, variables, bridge)
    try:
        yield hosts
    finally:
        hosts.end()
