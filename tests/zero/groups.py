"""A module's groups of ranks, side by side: ``python -m tests.zero.groups MODULE FOLDER``.

The module has ``SIZES``, the groups' numbers of ranks, and ``main(rank, world_size, folder)``, the folder being
``FOLDER/<world size>``. It may have ``CASES``, of groups whose last ranks are set apart, and ``apart(rank, case,
folder)``, the folder being ``FOLDER/<name>``. To import torch, transformers, TRL and DeepSpeed takes longer than most
of what a rank then does, so one process imports them and forks the ranks, as the fork server does.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rlhf.cluster.session import ENVIRONMENT
from rlhf.cluster.worker import Location
from rlhf.cluster.worker_group import environments

ROOT = Path(__file__).parents[2]
# An idle machine takes a fifth of it.
TIMEOUT_S = 600

# Threads of three processes would wait for each other's cores more than they compute on so small a model.
ENVIRON = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run_groups(module: str, folder: Path) -> None:
    """Run a module's groups; raise what a failed rank wrote."""
    command = [sys.executable, "-m", "tests.zero.groups", module, str(folder)]
    # A session of their own: the ranks must not outlive a launcher that hangs.
    groups = subprocess.Popen(command, cwd=ROOT, env=ENVIRON, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, error = groups.communicate(timeout=TIMEOUT_S)
        assert groups.returncode == 0, error
    finally:
        with suppress(ProcessLookupError):
            os.killpg(groups.pid, signal.SIGKILL)
        groups.wait()


def start(main: Callable[[int, int, Path], None], rank: int, world_size: int, folder: Path) -> None:
    """Be a rank, whose output goes to ``FOLDER/log-<world size>-<rank>.txt``."""
    with (folder / f"log-{world_size}-{rank}.txt").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    known = {"RANK": rank, "LOCAL_RANK": rank}
    known |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), world_size)
    os.environ |= {name: str(value) for name, value in known.items()}
    main(rank, world_size, folder / str(world_size))


def start_apart(apart: Callable[[int, Any, Path], None], rank: int, names: dict[str, str], case: Any, folder: Path):
    """Be a rank of a group of which some are set apart, with output as :func:`start`."""
    with (folder / f"log-{case.name}-{rank}.txt").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ |= names
    apart(rank, case, folder / case.name)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(name: str, folder: Path) -> None:
    """Run all ranks; end with the first that fails, since those of its group would wait for it."""
    gc.disable()
    module = importlib.import_module(name)
    gc.freeze()  # a rank's first collection would otherwise copy all memory that it shares
    gc.enable()
    forking = multiprocessing.get_context("fork")
    ranks: dict[int, BaseProcess] = {}
    for size in module.SIZES:
        (folder / str(size)).mkdir()
        for rank in range(size):
            log = f"log-{size}-{rank}.txt"
            process = forking.Process(target=start, args=(module.main, rank, size, folder), name=log, daemon=True)
            process.start()
            ranks[process.sentinel] = process
    for case in getattr(module, "CASES", ()):
        (folder / case.name / "output").mkdir(parents=True)
        (folder / case.name / "attempt").mkdir()
        places = [Location("here", "127.0.0.1", free_port(), ()) for _ in range(case.trainers + case.scorers)]
        for rank, (_, names) in enumerate(environments(places, case.scorers)):
            arguments = module.apart, rank, names, case, folder
            log = f"log-{case.name}-{rank}.txt"
            process = forking.Process(target=start_apart, args=arguments, name=log, daemon=True)
            process.start()
            ranks[process.sentinel] = process
    while ranks:
        for sentinel in wait(list(ranks)):
            assert isinstance(sentinel, int)
            ended = ranks.pop(sentinel)
            ended.join()
            if ended.exitcode != 0:
                sys.exit(f"{ended.name}, status {ended.exitcode}:\n{(folder / ended.name).read_text()[-5000:]}")


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
