"""Leases: which process works on a key, so that others wait instead of doing the same work.

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
from typing import TypeGuard

from rlhf.errors import DamageError, LeaseHeldError, StoreUnreachableError, TryAgainError
from rlhf.store.backend import Backend
from rlhf.store.keys import seal, unseal

LEASE_SECONDS = 30.0
"""A holder whose counter does not move for this time, by the waiting process's clock, has lost its lease."""
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
    """When the process started, in the operating system's form; only compared for equality."""
    user: str
    since: str
    """When the lease was taken, UTC by the holder's clock: for people to read."""
    token: str
    """Distinguishes two leases of one process."""
    count: int

    @classmethod
    def here(cls) -> "Holder":
        """Return this process as the holder of a new lease."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user need not have a name
            user = str(os.getuid())
        return cls(
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            started=_process_started(os.getpid()) or "",
            user=user,
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            token=secrets.token_hex(8),
            count=0,
        )

    def to_json(self) -> bytes:
        """Return the contents of the lease's file."""
        return seal(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> "Holder | None":
        """Read a lease from its file's contents; None if they name no holder."""
        try:
            return cls(**unseal(data))
        except (DamageError, TypeError):
            return None

    def is_gone(self) -> bool:
        """Tell whether the holder was a process of this machine that has ended; False if that cannot be known."""
        return self.machine == machine() and _process_started(self.pid) not in (self.started, "")

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"


@contextmanager
def hold(
    backend: Backend,
    name: str,
    *,
    timeout: float | None,
    on_wait: Callable[[str], None] | None = None,
    on_loss: Callable[[str], None] | None = None,
    check: Callable[[], None] | None = None,
) -> Generator[Holder, None, None]:
    """Hold the lease ``name`` while the body runs.

    A lease of a dead process of this machine is taken over at once; any other when its counter has not moved for
    LEASE_SECONDS of waiting. ``timeout`` is in seconds: 0 raises LeaseHeldError at once, None waits without limit.

    ``on_wait`` is called every REPORT_SECONDS of waiting, with a line that names the holder. ``check`` is called at
    every look while waiting; an error that it raises ends the waiting. ``on_loss`` is called once, from another thread,
    with the new holder, when the lease is seen to be lost. A store that does not answer is no such loss: whether
    another process took over is seen when the store answers again.
    """
    mine = _acquire(backend, name, timeout, on_wait, check)
    heart = _Heart(backend, name, mine, on_loss)
    release = True
    try:
        yield mine
    except StoreUnreachableError:
        release = False  # asking again would take as long again; the lease goes stale
        raise
    finally:
        heart.stop(release=release)


def _read(backend: Backend, name: str) -> tuple[bytes, Holder | None]:
    raw = backend.read(name) or b""
    return raw, Holder.from_json(raw)


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
            mine = Holder.here()
            # Of several waiters one replaces the lease, and none if the holder moved its counter after all.
            if backend.replace(name, raw, mine.to_json()):
                # Two may pass within one moment, if the storage cannot tell them apart: the later one holds the lease.
                time.sleep(POLL_SECONDS)
                _, holder = _read(backend, name)
                if holder is not None and holder.token == mine.token:
                    return mine
            continue
        shown = str(holder) if holder is not None else "an unreadable lease"
        if timeout is not None and now - began >= timeout:
            raise LeaseHeldError(
                f"Another process is producing the same result: {shown}.",
                where=name,
                next_step="Let it finish and run the same command again: it is then a cache hit. The lease of a "
                f"process that died on another machine is taken over after {LEASE_SECONDS:.0f} seconds of waiting.",
            )
        if check is not None:
            check()
        if on_wait is not None and now >= report_at:
            on_wait(f"Waiting for {shown}.")
            report_at = now + REPORT_SECONDS
        time.sleep(POLL_SECONDS)


class _Heart:
    """Moves a lease's counter from a daemon thread until it is stopped or the lease is another process's."""

    def __init__(self, backend: Backend, name: str, mine: Holder, on_loss: Callable[[str], None] | None) -> None:
        self._backend = backend
        self._on_loss = on_loss
        self._name = name
        self._token = mine.token
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {name}", daemon=True)
        self._thread.start()

    def stop(self, *, release: bool) -> None:
        """Stop beating, and with ``release`` delete the lease."""
        self._stopped.set()
        if not release:
            return
        self._thread.join()
        # A lease that cannot be removed goes stale, and an error of the body must be seen.
        with suppress(TryAgainError):
            _, holder = _read(self._backend, self._name)
            if self._is_mine(holder):
                self._backend.delete(self._name)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with suppress(TryAgainError):  # the next beat may get through; if none does, a successor may take over
                raw, holder = _read(self._backend, self._name)
                # Garbage collection that judged it dead too early moves it aside, and back.
                if not self._is_mine(holder) and not self._stopped.wait(POLL_SECONDS):
                    raw, holder = _read(self._backend, self._name)
                if not self._is_mine(holder):
                    if self._on_loss is not None and not self._stopped.is_set():
                        self._on_loss(str(holder or "nobody"))
                    return
                # Only in its own place: this may arrive late, and a successor must not lose the lease to it.
                self._backend.replace(self._name, raw, replace(holder, count=holder.count + 1).to_json())

    def _is_mine(self, holder: Holder | None) -> TypeGuard[Holder]:
        return holder is not None and holder.token == self._token


def machine() -> str:
    """Return what a process's number means here: the kernel since its start, and its namespace of such numbers.

    Hosts that share a name, such as containers, differ in it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux: containers there are machines of their own, with names of their own
        return socket.gethostname()


def _process_started(pid: int) -> str | None:
    """Return when a process started; None if there is none or it is a zombie, "" if that cannot be known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it exists, and is another user's
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
