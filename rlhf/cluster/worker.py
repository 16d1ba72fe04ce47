"""What runs on a worker: a stage's code with its output in the attempt's log and its errors kept for the driver."""

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

from rlhf.errors import DiskFullError, PreflightError, RlhfError, is_no_room
from rlhf.pipeline.context import Context

RESULT = "result.json"


@dataclass(frozen=True)
class Call:
    """A stage's code and what it is given."""

    code: str
    context: Context[Any]
    gpu: bool = False
    timeout_minutes: float = 30.0


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


def perform_rank(arguments: dict[str, Call]) -> None:
    """Run a stage on one rank of a worker group: Ray Train calls this on every rank."""
    call = arguments["call"]
    _perform(call, rank=int(os.environ["RANK"]), prepare=lambda: prepare_deepspeed(call))


def prepare_deepspeed(call: Call) -> None:
    """Join the process group, on kernels and collectives that can be relied on."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if not call.gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch
    from deepspeed.ops import __compatible_ops__

    # cuDNN's attention gives queries that may see no key, as padding on the left has, a gradient that is not a number
    # when the batch is 64 wide (torch 2.11, H200): one such batch ends a run. The other kernels give 0.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # DeepSpeed would compile its shared-memory collectives here, which takes a compiler and half a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if call.gpu else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=call.timeout_minutes),
    )


def _perform(call: Call, rank: int, prepare: Callable[[], None] = lambda: None) -> None:
    context = call.context
    if not context.attempt.is_dir():
        raise PreflightError(
            f"this worker does not see the store: {context.attempt} is not there",
            socket.gethostname(),
            "put store.uri (for a bucket store.scratch) on a file system that every node mounts at the same place",
        )
    with _log(context.attempt, rank):
        try:
            prepare()
            metrics = load(call.code)(context)
            if rank == 0:
                _write(context.attempt / RESULT, {name: float(value) for name, value in metrics.items()})
        except BaseException as error:
            with suppress(OSError):  # on a full disk the error itself must reach the driver
                traceback.print_exc()
            with suppress(OSError):
                failure = _failure(error, rank, context.attempt)
                _write(context.attempt / f"failure-{rank}.json", asdict(failure))
            raise


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


def _write(path: Path, values: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)


@contextmanager
def _log(attempt: Path, rank: int) -> Generator[None]:
    """Send everything the process prints, from Python or below, to the rank's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    file = os.open(attempt / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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
