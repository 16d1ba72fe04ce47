"""One Ray session for a whole command: attached to a cluster, or started on this machine and stopped at the end."""

import atexit
import os
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

from rlhf.cluster import reaper
from rlhf.cluster.ray_token import MODE, default_path, entrance, known_token, prepare_token, warning_of_open
from rlhf.cluster.temporary import check_temporary_folder
from rlhf.config.pipeline import ClusterSettings
from rlhf.errors import ClusterLostError, PreflightError, TryAgainError

# What a worker needs in its environment before it imports anything.
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Nothing of ours is compiled, but DeepSpeed imports an optimiser that is, and two seconds of compiler with it.
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Text files are UTF-8, also those that libraries read and write, whatever the locale says.
    "PYTHONUTF8": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
KNOCK_SECONDS = 10.0
SILENT_SECONDS = 30.0
"""How long a cluster's head may refuse connections before it counts as lost."""
SHUTDOWN_SECONDS = 10.0
"""How long Ray may take to shut down before its processes are killed."""


class Session:
    """A context manager that starts Ray when it is first needed."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self._started = False
        self._knocked = self._answered = 0.0
        self._reaped = ExitStack()
        self.notices: list[str] = []
        """What the user should be told of the cluster's entrance, once it has started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._reaped:
            if self._started and isinstance(error, ClusterLostError):
                _abandon()
            elif self._started:
                _shut_down()

    @property
    def address(self) -> str | None:
        """The cluster to attach to; None starts one here."""
        return self._settings.address or os.environ.get("RAY_ADDRESS")

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
        # It is meant for this program's output. That of the workers is logs, whose texts must not fail for a character.
        os.environ.pop("PYTHONIOENCODING", None)
        self._show_token()
        import ray
        import ray._private.worker

        # Of a process or a node that dies it prints a paragraph on standard output, and no option stops that. We tell
        # it ourselves, with what it means.
        ray._private.worker._worker_logs_enabled = False  # pyright: ignore[reportPrivateUsage]
        at_termination = signal.getsignal(signal.SIGTERM)
        common: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "ERROR",
            "namespace": "rlhf",
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if self.address:
                    ray.init(address=self.address, runtime_env={"env_vars": _for_workers()}, **common)
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
            except Exception as error:
                # Ray raises a bare one where its processes do not come up in time.
                if isinstance(error, OSError | RuntimeError) or type(error) is Exception:
                    raise _not_there(error, self.address) from error
                raise
            finally:
                os.environ.pop(reaper.MARK, None)
        self._started = True
        # Ray puts a handler of its own in place of the program's, which aborts whoever cleans up for longer than 3 s.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_termination)

    def _show_token(self) -> None:
        """Have a token ready: a private one for a cluster that is started, the user's for one that asks for it.

        Raises:
            TryAgainError: nobody listens at the address.
            PreflightError: the cluster asks for a token, and there is none; or the token is another user's.
        """
        if self.address is None:
            notice = prepare_token()
        elif not _is_host_and_port(self.address):
            notice = None  # found or forwarded by Ray, which then also looks for the token
        else:
            _knock(self.address)
            found = entrance(self.address)
            notice = warning_of_open(self.address) if found == "open" else None
            # Ray by itself waits 20 s for a cluster that does not let it in, and shows its token only when told to.
            if found == "guarded":
                token = known_token()
                if token is None or entrance(self.address, token) == "guarded":
                    raise PreflightError(
                        f"the Ray cluster asks for a token, and {'none' if token is None else 'another'} is known here",
                        self.address,
                        f"copy the cluster's to {default_path()} (mode 0600), or set RAY_AUTH_TOKEN_PATH to its file",
                    )
                os.environ[MODE] = "token"
                from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue] - compiled, without types

                # Ray may have been imported before, and have read the variable then.
                Config.initialize("")
        if notice is not None:
            self.notices.append(notice)

    def check(self) -> None:
        """Look whether Ray is still there: its own calls would wait for a minute and more, and then end this process.

        Raises:
            ClusterLostError: a process that Ray cannot do without has ended, or the cluster's head does not answer.
        """
        if not self._started:
            return
        import ray

        if self.address is None:
            died = {kind for kind, _ in _node().dead_processes()} & {"gcs_server", "raylet"}
            if died:
                raise _lost(f"Ray's {' and '.join(sorted(died))} died", "this machine")
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
            if now - (self._answered or now) >= SILENT_SECONDS:
                raise _lost(f"the head of the Ray cluster does not answer: {error.what}", head) from error
            self._answered = self._answered or now

    def resources(self) -> "Resources":
        """What the cluster has."""
        import ray

        self.start()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return Resources(
            cpus=[int(node.get("CPU", 0)) for node in nodes], gpus=[int(node.get("GPU", 0)) for node in nodes]
        )


@contextmanager
def _reaped() -> Generator[None]:
    """Whoever inherits the environment of now ends with this process, or with the context if that is first."""
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


def _for_workers() -> dict[str, str]:
    """What a cluster's workers are given; ours inherit it."""
    return {name: os.environ[name] for name in ENVIRONMENT}


def _node() -> Any:
    """Ray's own account of the processes that it has started here."""
    import ray._private.worker

    return ray._private.worker._global_node  # pyright: ignore[reportPrivateUsage] - there is no public one


def _lost(what: str, where: str) -> ClusterLostError:
    return ClusterLostError(
        what, where, "run the same command again: what was committed and the newest checkpoints stay"
    )


def _abandon() -> None:
    """End what is left of a broken Ray: its own way to shut down would end this process, without a word."""
    import ray

    if (node := _node()) is not None:  # None where Ray runs elsewhere
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    # It would be called as Python ends.
    atexit.unregister(ray.shutdown)


def _shut_down() -> None:
    """Shut Ray down in a bounded time: it may wait for ever for a process of its own that does not answer."""
    import ray

    thread = threading.Thread(target=ray.shutdown, name="ray.shutdown", daemon=True)
    thread.start()
    thread.join(SHUTDOWN_SECONDS)
    if thread.is_alive():
        _abandon()


def _is_host_and_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return port.isdigit() and "/" not in host


def _knock(address: str) -> None:
    """Raise TryAgainError where nobody listens at ``host:port``: Ray itself would try for minutes."""
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


class Resources:
    """CPU cores and GPUs of each node."""

    def __init__(self, cpus: list[int], gpus: list[int]) -> None:
        self.cpus, self.gpus = cpus, gpus

    def for_task(self) -> int:
        """How many cores a task takes: all of the smallest node that has any.

        Raises:
            PreflightError: no node has a core, so that Ray would wait for ever.
        """
        with_cores = [node for node in self.cpus if node]
        if not with_cores:
            raise PreflightError(
                f"the cluster has no CPU core on any of its {len(self.cpus)} node(s)",
                "the Ray cluster",
                "add a node, or start one with cores (`ray start --num-cpus`)",
            )
        return min(with_cores)

    def of_task(self) -> "RankResources":
        """The same, in the form of a worker group of one."""
        return RankResources(1, self.for_task(), gpu=False)

    def have_room(self, wanted: "RankResources", beside: Sequence["RankResources"]) -> bool:
        """Whether a group finds places beside others that run, wherever Ray has put those; alone it always does.

        A rank that takes n times what one of the wanted takes is taken to cost n places, rounded up, which it can at
        most.
        """
        cost = sum(one.count * max(-(-one.cpus // wanted.cpus), one.gpu and wanted.gpu) for one in beside)
        return not beside or self._fitting(wanted.cpus, wanted.gpu) - cost >= wanted.count

    @property
    def has_gpu(self) -> bool:
        """Whether any node has a GPU."""
        return sum(self.gpus) > 0

    def per_rank(self, stage: str, count: int, cpus: int | None, gpu: bool | None) -> "RankResources":
        """What each of ``count`` ranks gets.

        Raises:
            PreflightError: the cluster does not have that much, so that Ray would wait for ever.
        """
        use_gpu = self.has_gpu if gpu is None else gpu
        if use_gpu and count > sum(self.gpus):
            raise PreflightError(
                f"{stage} asks for {count} GPUs, one for each rank, and the cluster has {sum(self.gpus)}",
                f"{stage}.workers.count",
                f"{stage}.workers.count={max(1, sum(self.gpus))}"
                + ("" if self.has_gpu else f" {stage}.workers.gpu=false"),
            )
        share = cpus or (1 if use_gpu else self._share(count))
        fits = self._fitting(share, use_gpu)
        if fits < count:
            raise PreflightError(
                f"{stage} asks for {count} ranks of {share} CPU cores, and the cluster has "
                f"{sum(self.cpus)} cores on {len(self.cpus)} node(s)" + (", not all beside a GPU" if use_gpu else ""),
                f"{stage}.workers",
                f"{stage}.workers.count={max(1, fits)}",
            )
        return RankResources(count, share, use_gpu)

    def _fitting(self, share: int, gpu: bool) -> int:
        """How many ranks of ``share`` cores, and one GPU where they need it, find a place."""
        places = [node // share for node in self.cpus]
        return sum(map(min, places, self.gpus) if gpu else places)

    def _share(self, count: int) -> int:
        """The most cores that each of ``count`` ranks can have; 1 where not even that is there."""
        return next((cores for cores in range(max(self.cpus), 1, -1) if self._fitting(cores, False) >= count), 1)


class RankResources:
    """How many ranks, and what each gets."""

    def __init__(self, count: int, cpus: int, gpu: bool) -> None:
        self.count, self.cpus, self.gpu = count, cpus, gpu
