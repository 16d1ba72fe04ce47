"""One Ray session for a whole command: attached to a cluster, or started on this machine and stopped at the end."""

import atexit
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.cluster import network, reaper
from rlhf.cluster.ray_token import MODE, default_path, entrance, known_token, prepare_token
from rlhf.config.pipeline import ClusterSettings
from rlhf.config.stages import WorkerSettings
from rlhf.errors import ClusterLostError, DiskFullError, PreflightError, TryAgainError, is_no_room, size

# What a worker needs in its environment before it imports anything.
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Nothing of ours is compiled, but DeepSpeed imports an optimiser that is, and two seconds of compiler with it.
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Text files are UTF-8, also those that libraries read and write, whatever the locale is.
    "PYTHONUTF8": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
KNOCK_SECONDS = 10.0
TEMPORARY_VARIABLES = ("RAY_TMPDIR", "TMPDIR")
"""The variables that name Ray's temporary folder, in Ray's order."""
_SOCKET_BYTES = 107
"""The longest path of a socket on Linux (unix(7), without the closing zero)."""


def check_temporary_folder() -> None:
    """Refuse a temporary folder in which Ray would not start. An empty variable counts as one that is not set.

    Ray keeps its sockets and logs there. Its own message for a folder that it cannot use names no variable, or comes
    after half a minute.

    Raises:
        PreflightError: its path is relative or too long for a socket, or it cannot be written.
        DiskFullError: it has no room.
    """
    for name in TEMPORARY_VARIABLES:
        if os.environ.get(name) == "":
            del os.environ[name]
    default = "/tmp"  # noqa: S108 - Ray's own
    variable = next((name for name in TEMPORARY_VARIABLES if name in os.environ), None)
    folder = Path(os.environ[variable] if variable else default)
    where = f"{variable}={folder}" if variable else str(folder)
    change = "set RAY_TMPDIR to a folder on a disk with room that you can write"
    if not folder.is_absolute():
        raise PreflightError("Ray's temporary folder must have an absolute path", where, change)
    # Ray names a session after the time and this process, as in session_2026-11-28_04-10-39_943285_23890.
    socket_name = f"ray/session_{'x' * 26}_{os.getpid()}/sockets/plasma_store"
    if (length := len(os.fsencode(folder / socket_name))) > _SOCKET_BYTES:
        raise PreflightError(
            f"Ray's temporary folder has too long a path: its sockets' would take {length} bytes, and "
            f"{_SOCKET_BYTES} are allowed",
            where,
            f"set RAY_TMPDIR to one of at most {_SOCKET_BYTES - len(socket_name) - 1} bytes, {default} for instance",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # An existing folder of Ray's may be another user's.
        existing = folder / "ray" if (folder / "ray").exists() else folder
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        if not is_no_room(error):
            what = f"Ray's temporary folder cannot be written: {error.strerror or error}"
            raise PreflightError(what, where, change) from error
        free = 0
    if free < 10**6:  # what Ray writes before it runs; with a tenth of that it does not start
        raise DiskFullError(f"Ray's temporary folder has no room: {size(free)} are free", where, change)


class Session(AbstractContextManager["Session"]):
    """A context manager that starts Ray when it is first needed."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self.address = settings.address or os.environ.get("RAY_ADDRESS")
        """The cluster to attach to; None starts one here."""
        self._started = False
        self._knocked = self._answered = 0.0
        self._reaped = ExitStack()
        self.notices: list[str] = []
        """What the user should know of the cluster's authentication, once it has started."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._reaped:
            if not self._started:
                return
            import ray

            if not isinstance(error, ClusterLostError):
                # Shutting down may wait without end for a process of Ray's that does not answer.
                thread = threading.Thread(target=ray.shutdown, name="ray.shutdown", daemon=True)
                thread.start()
                thread.join(10)
                if not thread.is_alive():
                    return
            # Of a broken Ray, its own way to shut down would end this process, without a message.
            if (node := _node()) is not None:  # None where Ray runs elsewhere
                node.kill_all_processes(check_alive=False, allow_graceful=False)
            atexit.unregister(ray.shutdown)  # Python would call it as it ends

    def start(self) -> None:
        """Start Ray or attach to it, once.

        Raises:
            TryAgainError: the cluster cannot be reached, or Ray does not start.
            PreflightError: this machine's temporary or home folder cannot be used.
        """
        if self._started:
            return
        if self.address is None:
            check_temporary_folder()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # It is meant for this program's output. Workers write logs, which must not fail at a character.
        os.environ.pop("PYTHONIOENCODING", None)
        self._show_token()
        import ray
        import ray._private.worker

        # Ray prints a paragraph on standard output when a process or a node dies, and no option stops that. Our errors
        # report such a death with its meaning.
        ray._private.worker._worker_logs_enabled = False  # pyright: ignore[reportPrivateUsage]
        at_termination = signal.getsignal(signal.SIGTERM)
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "rlhf"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if self.address:
                    # Those of a Ray that is started here inherit it.
                    workers = {name: os.environ[name] for name in ENVIRONMENT} | network.variables()
                    ray.init(address=self.address, runtime_env={"env_vars": workers}, **common)
                else:
                    self._reaped.enter_context(_reaped())
                    ray.init(
                        address="local",
                        num_cpus=self._settings.cpus,
                        num_gpus=self._settings.gpus,
                        include_dashboard=False,
                        object_store_memory=256 * 2**20,
                        **common,
                    )
                    # It would read every worker's log ten times a second, for a driver that prints none of them.
                    _node().kill_log_monitor(check_alive=False)
            except Exception as error:
                # Ray raises a bare Exception where its processes do not come up in time.
                if isinstance(error, OSError | RuntimeError) or type(error) is Exception:
                    raise _not_there(error, self.address) from error
                raise
            finally:
                os.environ.pop(reaper.MARK, None)
        self._started = True
        # Ray replaces the program's handler by its own, which aborts a cleanup that takes longer than 3 s.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_termination)

    def _show_token(self) -> None:
        """Prepare a token: a private one for a cluster that is started, the user's for one that asks for it."""
        address, notice = self.address, None
        if address is None:
            notice = prepare_token()
        # Any other form of address is resolved by Ray, which then also looks for the token.
        elif address.rpartition(":")[2].isdigit() and "/" not in address:
            _knock(address)
            door = entrance(address)
            if door == "open":
                notice = (
                    f"the Ray cluster at {address} asks for no token: anyone who reaches its ports can run code on it; "
                    f"start it with {MODE}=token"
                )
            # Ray by itself waits 20 s for a cluster that refuses it, and sends its token only when told to.
            if door == "guarded":
                token = known_token()
                if token is None or entrance(address, token) == "guarded":
                    raise PreflightError(
                        f"the Ray cluster asks for a token, and {'none' if token is None else 'another'} is known here",
                        address,
                        f"copy the cluster's to {default_path()} (mode 0600), or set RAY_AUTH_TOKEN_PATH to its file",
                    )
                os.environ[MODE] = "token"
                from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue] - compiled, without types

                # Ray may have been imported before, and have read the variable then.
                Config.initialize("")
        if notice is not None:
            self.notices.append(notice)

    def check(self) -> None:
        """Refuse to go on without Ray: its own calls would block for over a minute, and then exit this process.

        Raises:
            ClusterLostError: a process that Ray needs has ended, or the cluster's head does not answer.
        """
        if not self._started:
            return
        import ray

        again = "run the same command again: what was committed and the newest checkpoints stay"
        if self.address is None:
            died = {kind for kind, _ in _node().dead_processes()} & {"gcs_server", "raylet"}
            if died:
                raise ClusterLostError(f"Ray's {' and '.join(sorted(died))} died", "this machine", again)
            return
        now = time.monotonic()
        if now - self._knocked < KNOCK_SECONDS / 2:
            return
        self._knocked = now
        head = ray.get_runtime_context().gcs_address
        try:
            _knock(head)
            self._answered = now
        except TryAgainError as error:
            if now - (self._answered or now) >= 30:
                what = f"the head of the Ray cluster does not answer: {error.what}"
                raise ClusterLostError(what, head, again) from error
            self._answered = self._answered or now

    def resources(self) -> "Resources":
        """Return what the cluster has, after it was started."""
        import ray

        self.start()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return Resources(
            cpus=[int(node.get("CPU", 0)) for node in nodes], gpus=[int(node.get("GPU", 0)) for node in nodes]
        )


@contextmanager
def _reaped() -> Generator[None]:
    """Kill every process started inside, known by a mark in its environment, when the context or this process ends."""
    if sys.platform != "linux":  # no other system shows processes' environments as files
        yield
        return
    mark = secrets.token_hex(16)
    process = reaper.start(mark)  # before the mark is in the environment, or it would end itself
    os.environ[reaper.MARK] = mark
    try:
        yield
    finally:
        reaper.kill_all(mark)
        process.kill()
        process.communicate()


def _node() -> Any:
    """Return Ray's own account of the processes that it has started here."""
    import ray._private.worker

    return ray._private.worker._global_node  # pyright: ignore[reportPrivateUsage] - there is no public one


def _knock(address: str) -> None:
    """Raise TryAgainError where nothing listens at ``host:port``: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        raise _not_there(error, address) from error


def _not_there(error: Exception, address: str | None) -> TryAgainError:
    return TryAgainError(
        f"Ray {'did not answer' if address else 'did not start'}: {str(error).splitlines()[0]}",
        address or "this machine",
        "check `ray status` there" if address else "rlhf doctor",
    )


@dataclass(frozen=True)
class RankResources:
    """How many ranks, and what each gets."""

    count: int
    cpus: int
    gpu: bool


@dataclass(frozen=True)
class Resources:
    """CPU cores and GPUs of each node."""

    cpus: Sequence[int]
    gpus: Sequence[int]

    def for_task(self) -> int:
        """Return how many cores a task takes: all of the smallest node that has any.

        Raises:
            PreflightError: no node has a core, so that Ray would wait without end.
        """
        with_cores = [node for node in self.cpus if node]
        if not with_cores:
            raise PreflightError(
                f"the cluster has no CPU core on any of its {len(self.cpus)} node(s)",
                "the Ray cluster",
                "add a node, or start one with cores (`ray start --num-cpus`)",
            )
        return min(with_cores)

    def have_room(self, wanted: RankResources, beside: Sequence[RankResources]) -> bool:
        """Return whether a group finds places beside others that run, wherever Ray has put those; alone it always does.

        A running rank n times the size of a requested one counts as ceil(n) places, the worst case.
        """
        cost = sum(group.count * max(-(-group.cpus // wanted.cpus), group.gpu and wanted.gpu) for group in beside)
        return not beside or self._fitting(wanted.cpus, wanted.gpu) - cost >= wanted.count

    def ranks(
        self,
        stage: str,
        workers: WorkerSettings,
        dealt_out: Sequence[int],
        together: int = 1,
        set_apart: int = 0,
    ) -> int:
        """Return how many ranks a group has: as many as are set, or with ``auto`` as the cluster has room for.

        dealt_out  numbers that the ranks must divide, for ``auto``
        together   more ranks than these must be a multiple of them, for ``auto``
        set_apart  ranks beside those, among whom nothing is dealt out

        Raises:
            PreflightError: fewer than ``min`` have room, or no number that may be taken divides the batch.
        """
        if workers.count != "auto":
            return workers.count
        gpu, cpus = self._uses_gpus(workers.gpu), workers.cpus
        room = self._fitting(cpus or 1, gpu)
        if room < workers.min:
            raise PreflightError(
                f"{stage} asks for at least {workers.min} ranks, and the cluster has room for {room}",
                f"{stage}.workers.min",
                f"add nodes, or {stage}.workers.min={max(1, room)}",
            )
        # On CPUs a node's ranks would share its cores, and one with all of them is faster.
        most = room if gpu or cpus else max(workers.min, sum(node > 0 for node in self.cpus))
        most = min(most, workers.max or most)
        counts = [count for count in range(most, workers.min - 1, -1) if count > set_apart]
        counts = [count for count in counts if count - set_apart <= together or not (count - set_apart) % together]
        found = next((n for n in counts if not any(number % (n - set_apart) for number in dealt_out)), None)
        if found is None:
            raise PreflightError(
                f"{stage} may have {workers.min} to {most} ranks"
                + (f", {set_apart} of which do not train" if set_apart else "")
                + ", and none of these numbers "
                + (f"that zero.secondary_partition {together} allows " if together > 1 else "")
                + f"divides {' and '.join(map(str, dealt_out))}, which are dealt out among them in each update",
                f"{stage}.workers.min",
                f"lower {stage}.workers.min, or change the batch",
            )
        return found

    def _uses_gpus(self, gpu: bool | None) -> bool:
        return sum(self.gpus) > 0 if gpu is None else gpu

    def has(self, group: RankResources) -> bool:
        """Return whether a group would find places if nothing else ran."""
        return self._fitting(group.cpus, group.gpu) >= group.count

    def per_rank(self, stage: str, count: int, cpus: int | None, gpu: bool | None) -> RankResources:
        """Return what each of ``count`` ranks gets.

        Raises:
            PreflightError: the cluster does not have that much, so that Ray would wait without end.
        """
        all_cpus, all_gpus = sum(self.cpus), sum(self.gpus)
        use_gpu = self._uses_gpus(gpu)
        if use_gpu and count > all_gpus:
            raise PreflightError(
                f"{stage} asks for {count} GPUs, one for each rank, and the cluster has {all_gpus}",
                f"{stage}.workers.count",
                f"{stage}.workers.count={max(1, all_gpus)}" + ("" if all_gpus else f" {stage}.workers.gpu=false"),
            )
        # On CPUs, the most cores that each of the ranks can have; 1 where not even that is there.
        cores = range(max(self.cpus), 1, -1)
        share = cpus or (1 if use_gpu else next((share for share in cores if self._fitting(share, False) >= count), 1))
        fits = self._fitting(share, use_gpu)
        if fits < count:
            raise PreflightError(
                f"{stage} asks for {count} ranks of {share} CPU cores, and the cluster has "
                f"{all_cpus} cores on {len(self.cpus)} node(s)" + (", not all beside a GPU" if use_gpu else ""),
                f"{stage}.workers",
                f"{stage}.workers.count={max(1, fits)}",
            )
        return RankResources(count, share, use_gpu)

    def _fitting(self, share: int, gpu: bool) -> int:
        """Return how many ranks of ``share`` cores, and one GPU where they need it, find a place."""
        places = [node // share for node in self.cpus]
        return sum(map(min, places, self.gpus) if gpu else places)
