"""What runs on a worker: a stage's code with its output in the attempt's log and its errors kept for the driver."""

import faulthandler
import gc
import importlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rlhf.attempt import liveness
from rlhf.attempt.context import Context
from rlhf.attempt.cost import RANKS
from rlhf.errors import (
    DiskFullError,
    NextCommand,
    OutOfMemoryError,
    PreemptedError,
    PreflightError,
    RlhfError,
    is_no_room,
)

RESULT = "result.json"
CONTINUE = NextCommand("run")
"""What goes on from the newest checkpoint; the program adds the stages and the pipeline that it was called with."""
TASK_MINUTES = 24 * 60.0
"""How long a task may go without a note or progress: it has no steps, and one fit of strengths may take hours."""
COLLECTIVE_SLACK_MINUTES = 1.0
"""Ranks wait so much longer for each other than the driver waits for them, since it can tell which of them hangs."""
# CUDA outside torch's allocator; that allocator on a CPU; cuBLAS. All three come as a RuntimeError.
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Call:
    """A stage's code and what it is given."""

    code: str
    context: Context[Any]
    gpu: bool = False
    timeout_minutes: float = TASK_MINUTES
    """How long none of its processes may get on before it counts as hanging."""
    imports: tuple[str, ...] = ()
    """Modules that are imported ahead of its ranks."""


@dataclass(frozen=True)
class Failure:
    """Why a rank stopped, as it told it itself; a rank that was killed tells nothing."""

    at: float
    rank: int
    host: str
    pid: int
    error: str
    """The class in ``rlhf.errors``, or the name of another exception."""
    args: tuple[str, ...]
    log: str


def perform_task(call: Call) -> None:
    """Run a stage as one Ray task."""
    _perform(call, rank=0)


@dataclass(frozen=True)
class Place:
    """Where Ray has put a process."""

    node: str
    """Ray's name of it."""
    address: str
    port: int
    """Where a group can meet."""
    gpus: tuple[str, ...]
    """Those that are its own."""


class Rank:
    """One process of a worker group, as a Ray actor."""

    def __init__(self) -> None:
        # Bound as long as it lives, so that nobody is given its port; torch may listen at it all the same.
        self._meeting_point = socket.socket()
        self._meeting_point.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._meeting_point.bind(("", 0))

    def place(self) -> Place:
        """Where it is."""
        import ray

        here = ray.get_runtime_context()
        port = self._meeting_point.getsockname()[1]
        gpus = here.get_accelerator_ids()["GPU"]
        return Place(here.get_node_id(), ray.util.get_node_ip_address(), port, tuple(gpus))

    def run(self, call: Call, environment: dict[str, str]) -> None:
        """Run a stage as the rank that the environment says."""
        os.environ |= environment
        _perform(call, rank=int(environment["RANK"]), prepare=_join_group)


def _join_group(call: Call) -> Context[Any]:
    if call.gpu:
        import torch

        # A rank sees all devices that its group has on its node, to reach the others directly.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    prepare_deepspeed(call)
    from rlhf.zero.group import computable

    return computable(call.context)


def prepare_deepspeed(call: Call) -> None:
    """Join the process group, on kernels and collectives that can be relied on."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if not call.gpu:
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    import deepspeed
    import torch
    from deepspeed.ops import __compatible_ops__

    # Ray says how many threads are a worker's own; torch looks there as it is imported, in a forked rank before that.
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        torch.set_num_threads(int(threads))
    # cuDNN's attention gives queries that may see no key, as padding on the left has, a gradient that is not a number
    # when the batch is 64 wide (torch 2.11, H200): one such batch ends a run. The other kernels give 0.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # DeepSpeed would compile its shared-memory collectives here, which takes a compiler and half a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if call.gpu else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=call.timeout_minutes + COLLECTIVE_SLACK_MINUTES),
    )


def _perform(call: Call, rank: int, prepare: Callable[[Call], Context[Any]] = lambda call: call.context) -> None:
    context = call.context
    if not context.attempt.is_dir():
        raise PreflightError(
            f"this worker does not see the store: {context.attempt} is not there",
            socket.gethostname(),
            "put store.uri (for a bucket store.scratch) on a file system that every node mounts at the same place",
        )
    log = context.attempt / f"log-{rank}.txt"
    with _log(log), liveness.beating(context.attempt, rank, _node(), log, 60 * call.timeout_minutes):
        try:
            # A crash below Python leaves its signal in the log.
            faulthandler.enable(file=2)
            with _importing():
                context = prepare(call)
                device = _device(call, context)
                _write(context.attempt / RANKS.format(rank), {"host": socket.gethostname(), "device": device})
                liveness.beat()
                code = load(call.code)
            liveness.beat()
            metrics = code(context)
            if rank == 0:
                _write(context.attempt / RESULT, {name: float(value) for name, value in metrics.items()})
        except BaseException as error:
            with suppress(OSError, UnicodeError):  # on a full disk the error itself must reach the driver
                traceback.print_exc()
            with suppress(OSError):
                if "SIGTERM" in getattr(error, "ray_terminate_msg", ""):  # of the exception that Ray makes of it
                    error = PreemptedError(f"rank {rank} of {context.stage} was told to end (SIGTERM)")
                failure = _failure(error, rank, context.attempt)
                _write(context.attempt / f"failure-{rank}.json", asdict(failure))
            raise


@contextmanager
def _importing() -> Generator[None]:
    """Inside each module that is imported is a sign of life: from a slow file system all of them take minutes.

    Nobody looks for garbage meanwhile, which costs imports a tenth of their time; and what they made stays. DeepSpeed
    looks for garbage again and again, half a second each time otherwise.
    """
    gc.disable()
    sys.meta_path.insert(0, _BeatAtImports)
    try:
        yield
    finally:
        sys.meta_path.remove(_BeatAtImports)
        gc.freeze()
        gc.enable()


class _BeatAtImports:
    """A finder that is asked for every module, and finds none."""

    @staticmethod
    def find_spec(_name: str, _path: object = None, _target: object = None) -> None:
        liveness.beat()


def _device(call: Call, context: Context[Any]) -> str:
    if not call.gpu:
        return "CPU" if context is call.context else "CPU in fp32"
    import torch

    return torch.cuda.get_device_name()


def _node() -> str:
    ray = sys.modules.get("ray")  # which brought this process here, if it is no test
    return ray.get_runtime_context().get_node_id() if ray is not None and ray.is_initialized() else ""


def load(code: str) -> Callable[[Context[Any]], dict[str, float]]:
    """Import ``module:function``."""
    module, _, function = code.partition(":")
    return getattr(importlib.import_module(module), function)


def read_failures(attempt: Path) -> list[Failure]:
    """What the ranks of an attempt told of their failures, the earliest first."""
    failures: list[Failure] = []
    for path in attempt.glob("failure-*.json"):
        values = json.loads(path.read_text())
        failures.append(Failure(**(values | {"args": tuple(values["args"])})))
    return sorted(failures, key=lambda failure: failure.at)


def no_room(error: OSError, attempt: Path) -> DiskFullError:
    """What a full disk means to the user."""
    return DiskFullError(
        "there is no room left on the file system",
        str(error.filename or attempt),
        "free some space, then run the same command again",
    )


def _failure(error: BaseException, rank: int, attempt: Path) -> Failure:
    if isinstance(error, OSError) and is_no_room(error):
        error = no_room(error, attempt)
    elif _is_out_of_memory(error):
        # Below their first lines CUDA's errors have advice on debugging kernels.
        error = OutOfMemoryError(next(iter(str(error).splitlines()), type(error).__name__))
    args = tuple(map(str, error.args)) if isinstance(error, RlhfError) else (str(error),)
    return Failure(
        at=time.time(),
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        error=type(error).__name__,
        args=args,
        log=str(attempt / f"log-{rank}.txt"),
    )


def _is_out_of_memory(error: BaseException) -> bool:
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    torch = sys.modules.get("torch")  # where it was never imported, nothing of it was raised
    return told or isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _write(path: Path, values: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)


@contextmanager
def _log(path: Path) -> Generator[None]:
    """Send everything the process prints, from Python or below, to the rank's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(file)
