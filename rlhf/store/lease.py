"""Leases: who is working on a key, so that others wait instead of doing the same work.

A lease saves work and carries no correctness: two holders at once cost time, and the commit decides. So every race here
is resolved towards progress.
"""

import getpass
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rlhf.errors import DamageError, LeaseHeldError, StoreUnreachableError, TryAgainError
from rlhf.store.backend import Backend
from rlhf.store.keys import seal, unseal

LEASE_SECONDS = 30.0
"""A holder whose counter we have not seen move for so long, by our own clock, has lost its lease."""
BEAT_SECONDS = 5.0
"""How often a holder moves its counter."""
POLL_SECONDS = 0.5
REPORT_SECONDS = 60.0
"""How often ``on_wait`` is called."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    host: str
    machine: str
    """Equal for two processes exactly when they see each other's process ids: boot and process-id namespace."""
    pid: int
    started: str
    """When the process started, in the form the operating system gives; only compared for equality."""
    user: str
    since: str
    """When the lease was taken, UTC by the holder's clock: for people to read."""
    token: str
    """Tells apart two leases of one process."""
    count: int

    @classmethod
    def here(cls) -> "Holder":
        """Describe this process as the holder of a new lease."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_process_started(os.getpid()) or "",
            user=_user(),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            token=secrets.token_hex(8),
            count=0,
        )

    def to_json(self) -> bytes:
        """Write the lease's file."""
        return seal(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> "Holder | None":
        """Read a lease's file; None where it does not tell who holds it."""
        try:
            return cls(**unseal(data))
        except (DamageError, TypeError):
            return None

    def is_gone(self) -> bool:
        """Tell whether the holder was a process of this machine that has ended; False where that cannot be known."""
        return self.machine == _machine() and _process_started(self.pid) not in (self.started, "")

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"


@contextmanager
def hold(
    backend: Backend,
    name: str,
    *,
    timeout: float | None,
    on_wait: Callable[[str], None] | None,
    on_loss: Callable[[str], None] | None = None,
    check: Callable[[], None] | None = None,
) -> Generator[Holder, None, None]:
    """Hold the lease ``name`` while the body runs.

    A dead process of this machine is succeeded at once; any other holder when its counter has stood still for
    LEASE_SECONDS while we watched, which a ``timeout`` (seconds; None waits for ever) shorter than that never sees.
    Raises LeaseHeldError when the time is over.

    ``on_loss`` is called once, from another thread, with who holds the lease, when it is found to be ours no longer. A
    store that does not answer is no such loss: whether somebody took over is seen when it answers again. ``check`` is
    called at every look while waiting, and what it raises ends the waiting.
    """
    mine = _acquire(backend, name, timeout, on_wait, check)
    heart = _Heart(backend, name, mine, on_loss)
    heart.start()
    release = True
    try:
        yield mine
    except StoreUnreachableError:
        release = False  # to ask again would take as long again; the lease goes stale
        raise
    finally:
        heart.stop(release=release)


def holder_of(backend: Backend, name: str) -> Holder | None:
    """Find who holds a lease; None where nobody does or its holder is known to have ended."""
    raw = backend.read(name)
    holder = Holder.from_json(raw) if raw is not None else None
    return None if holder is None or holder.is_gone() else holder


def _acquire(
    backend: Backend,
    name: str,
    timeout: float | None,
    on_wait: Callable[[str], None] | None,
    check: Callable[[], None] | None,
) -> Holder:
    began = time.monotonic()
    seen, seen_at, report_at = b"", began, began
    while True:
        raw = backend.read(name)
        if raw is None:
            mine = Holder.here()
            if backend.create(name, mine.to_json()):
                return mine
            continue
        now = time.monotonic()
        if raw != seen:
            seen, seen_at = raw, now
        holder = Holder.from_json(raw)
        if (holder is not None and holder.is_gone()) or now - seen_at >= LEASE_SECONDS:
            if (mine := _take_over(backend, name, raw)) is not None:
                return mine
            continue
        who = str(holder) if holder is not None else "an unreadable lease"
        if timeout is not None and now - began >= timeout:
            raise LeaseHeldError(
                f"Somebody else is producing the same result: {who}.",
                where=name,
                next_step="Let it finish and run the same command again: it is then a cache hit. A holder that died "
                f"on another machine is succeeded after {LEASE_SECONDS:.0f} seconds of waiting.",
            )
        if check is not None:
            check()
        if on_wait is not None and now >= report_at:
            on_wait(f"Waiting for {who}.")
            report_at = now + REPORT_SECONDS
        time.sleep(POLL_SECONDS)


def _take_over(backend: Backend, name: str, judged: bytes) -> Holder | None:
    """Put a lease of ours in the place of the one that was judged dead, and only of that one; None where it is not."""
    mine = Holder.here()
    if not backend.replace(name, judged, mine.to_json()):
        return None  # another waiter was quicker, or the holder moved its counter after all
    # Two may have replaced it within one moment, where the storage cannot tell them apart: the later one holds it.
    time.sleep(POLL_SECONDS)
    raw = backend.read(name)
    holder = Holder.from_json(raw) if raw is not None else None
    return mine if holder is not None and holder.token == mine.token else None


class _Heart:
    """Moves a lease's counter from a daemon thread until it is stopped or the lease is somebody else's."""

    def __init__(self, backend: Backend, name: str, mine: Holder, on_loss: Callable[[str], None] | None) -> None:
        self._backend = backend
        self._on_loss = on_loss
        self._name = name
        self._token = mine.token
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, release: bool) -> None:
        """Stop beating and release the lease."""
        self._stopped.set()
        if not release:
            return
        self._thread.join()
        with suppress(
            TryAgainError
        ):  # a lease that cannot be removed goes stale, and an error of the body must be seen
            if self._mine_as_it_lies() is not None:
                self._backend.delete(self._name)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with suppress(TryAgainError):  # the next beat may get through; if none does, a successor may take over
                found = self._mine_as_it_lies()
                # Garbage collection that judged it dead too early moves it aside, and back.
                if found is None and not self._stopped.wait(POLL_SECONDS):
                    found = self._mine_as_it_lies()
                if found is None:
                    if self._on_loss is not None and not self._stopped.is_set():
                        self._on_loss(str(self._holder() or "nobody"))
                    return
                raw, mine = found
                # Only in its own place: this may arrive late, and a successor must not lose the lease to it.
                self._backend.replace(self._name, raw, replace(mine, count=mine.count + 1).to_json())

    def _mine_as_it_lies(self) -> tuple[bytes, Holder] | None:
        raw = self._backend.read(self._name)
        holder = Holder.from_json(raw) if raw is not None else None
        return (raw, holder) if raw is not None and holder is not None and holder.token == self._token else None

    def _holder(self) -> Holder | None:
        raw = self._backend.read(self._name)
        return Holder.from_json(raw) if raw is not None else None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux: containers there are machines of their own, with names of their own
        return socket.gethostname()


def _process_started(pid: int) -> str | None:
    """Find when a process started; None where there is none or it is a zombie, "" where it cannot be told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is there, and somebody else's
    if not Path("/proc/self/stat").exists():
        return subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], check=False, capture_output=True, text=True
        ).stdout.strip()
    try:
        # The second field, the program's name in brackets, may itself hold spaces and brackets (proc_pid_stat(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""  # hidden from us, or ended this very moment
    state, started = fields[0], fields[19]
    return None if state in "ZX" else started


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())
