"""What runs on a worker: a stage's code, with its output in the attempt's log and its error kept for the driver."""

import ctypes
import faulthandler
import gc
import importlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf import errors
from rlhf.attempt import liveness
from rlhf.attempt.context import Context
from rlhf.attempt.folder import Failure
from rlhf.cluster.network import use_interface_of
from rlhf.errors import DiskFullError, NextCommand, RlhfError, is_no_room

CONTINUE = NextCommand("run")
"""Continues from the newest checkpoint; the program adds the stages and the pipeline that it was called with."""
# CUDA outside torch's allocator; that allocator on a CPU; cuBLAS. All three come as a RuntimeError.
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")

# Of malloc.h: how much free memory is given back, and how large a block is mapped by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Call:
    """A stage's code and what it is given."""

    code: str
    context: Context[Any]
    gpu: bool = False
    timeout_minutes: float = 24 * 60
    """How long none of its processes may make progress before it counts as hanging. The default is for tasks, which
    have no steps: one fit of strengths may take hours."""
    imports: tuple[str, ...] = ()
    """Modules that are imported ahead of its ranks."""
    set_apart: int = 0
    """How many of its ranks, the last ones, are a process group of their own."""
    code_apart: str = ""
    """What those run in the place of ``code``."""
    working_folder: Path = field(default_factory=Path.cwd)
    """The driver's, where relative paths of the settings begin. Processes of a cluster were started in another."""


@dataclass(frozen=True)
class Location:
    """Where Ray has placed a rank."""

    node: str
    """Ray's name of it."""
    address: str
    port: int
    """Where a group can meet."""
    gpus: tuple[str, ...]
    """The GPUs that are the rank's own."""


class Rank:
    """One process of a worker group, as a Ray actor."""

    def __init__(self) -> None:
        # Bound for the rank's whole life, so that no other process is given its port; torch may still listen there.
        self._meeting_point = socket.socket()
        self._meeting_point.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._meeting_point.bind(("", 0))

    def locate(self) -> Location:
        """Return where this rank is."""
        import ray

        here = ray.get_runtime_context()
        port = self._meeting_point.getsockname()[1]
        gpus = here.get_accelerator_ids()["GPU"]
        return Location(here.get_node_id(), ray.util.get_node_ip_address(), port, tuple(gpus))

    def run(self, call: Call, rank: int, environment: dict[str, str]) -> None:
        """Run a stage as a rank of the worker group; the environment says which of its process group it is."""

        def join_group() -> Context[Any]:
            import ray

            use_interface_of(ray.util.get_node_ip_address())
            if call.gpu:
                import torch

                # A rank sees all devices that its group has on its node, to reach the others directly.
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            prepare_deepspeed(call)
            from rlhf.zero.group import computable

            return computable(call.context)

        os.environ |= environment
        perform(call, rank, join_group)


def prepare_deepspeed(call: Call) -> None:
    """Join the process group, on kernels and collectives that are reliable."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if not call.gpu:
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
        keep_freed_memory()
    import deepspeed
    import torch
    from deepspeed.ops import __compatible_ops__

    # Ray sets how many threads are a worker's own; torch reads that as it is imported, in a forked rank before that.
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
        # Longer than the driver waits for the ranks: it can tell which of them hangs.
        timeout=timedelta(minutes=call.timeout_minutes + 1),
    )


def keep_freed_memory() -> None:
    """Let the C library keep this process's freed memory, where it is glibc.

    It gives large tensors back to the kernel as they are freed. On a CPU, where all memory is its own, a sixth of a
    training step then goes into mapping and clearing the same pages anew.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_MMAP_THRESHOLD, 2**31 - 1)


def perform(call: Call, rank: int = 0, prepare: Callable[[], Context[Any]] | None = None) -> None:
    """Run a stage's code as a task or a rank, with its signs of life, and keep its error for the driver.

    prepare  returns the context to run in, where that is not the call's
    """
    folder = call.context.folder
    if not folder.path.is_dir():
        raise errors.PreflightError(
            f"this worker does not see the store: {folder.path} is not there",
            socket.gethostname(),
            "put store.uri (for a bucket store.scratch) on a file system that every node mounts at the same place",
        )
    ray = sys.modules.get("ray")  # it started this process, except in tests
    node = ray.get_runtime_context().get_node_id() if ray is not None and ray.is_initialized() else ""
    files = folder.rank(rank)
    with _log(files.log), liveness.beating(folder.path, rank, node, files.log, 60 * call.timeout_minutes):
        try:
            # A crash below Python leaves its signal in the log.
            faulthandler.enable(file=2)
            if call.working_folder.is_dir():
                os.chdir(call.working_folder)
            else:
                print(f"there is no {call.working_folder} here: relative paths begin at {Path.cwd()}", flush=True)
            with _importing():
                context = call.context if prepare is None else prepare()
                device = "CPU" if context is call.context else "CPU in fp32"
                if call.gpu:
                    import torch

                    device = torch.cuda.get_device_name()
                files.device.write({"host": socket.gethostname(), "device": device})
                liveness.beat()
                code = load(call.code)
            liveness.beat()
            metrics = code(context)
            if rank == 0:
                folder.result.write({name: float(value) for name, value in metrics.items()})
        except BaseException as error:
            with suppress(OSError, UnicodeError):  # on a full disk the error itself must reach the driver
                traceback.print_exc()
            with suppress(OSError):
                if "SIGTERM" in getattr(error, "ray_terminate_msg", ""):  # of the exception that Ray makes of it
                    error = errors.PreemptedError(f"rank {rank} of {call.context.stage} was told to end (SIGTERM)")
                files.failure.write(_failure(error, rank, folder.path, files.log))
            raise


@contextmanager
def _importing() -> Generator[None]:
    """Inside, each module that is imported is a sign of life: from a slow file system all of them take minutes.

    Garbage collection is off meanwhile, since it costs imports a tenth of their time; and what they made is exempt from
    it: DeepSpeed collects garbage again and again, half a second each time otherwise.
    """
    # It is asked for every module, and finds none.
    finder: Any = SimpleNamespace(find_spec=lambda *_: liveness.beat())
    gc.disable()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        gc.freeze()
        gc.enable()


def load(code: str) -> Callable[[Context[Any]], dict[str, float]]:
    """Import ``module:function``."""
    module, _, function = code.partition(":")
    return getattr(importlib.import_module(module), function)


def disk_full(error: OSError, attempt: Path) -> DiskFullError:
    """Return the error that a full disk means to the user."""
    return DiskFullError(
        "there is no room left on the file system",
        str(error.filename or attempt),
        "free some space, then run the same command again",
    )


def _failure(error: BaseException, rank: int, attempt: Path, log: Path) -> Failure:
    torch = sys.modules.get("torch")  # where it was never imported, it raised nothing
    if isinstance(error, OSError) and is_no_room(error):
        error = disk_full(error, attempt)
    elif (
        isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    ):
        # Below their first lines CUDA's errors have advice on debugging kernels.
        error = errors.OutOfMemoryError(next(iter(str(error).splitlines()), type(error).__name__))
    args = tuple(map(str, error.args)) if isinstance(error, RlhfError) else (str(error),)
    return Failure(time.time(), rank, socket.gethostname(), os.getpid(), type(error).__name__, args, str(log))


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
