"""The memory that a stage's ranks will compute in, where it can be known before any rank starts."""

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU, or a machine's main memory, which its ranks share."""

    gpu: bool
    bytes: int


def device_of_ranks(gpu: bool | None) -> Device | None:
    """Return the device of a worker group's ranks; None where that is not known here.

    In a Ray cluster with GPUs it is known if this machine has some, and all of the cluster's are of their type; without
    GPUs if this machine is the only node.

    gpu  the setting ``workers.gpu``
    """
    import ray

    here, memory = smallest_gpu(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not ray.is_initialized():
        count, types, alone = int(here is not None), 1, True
    else:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpus = [node for node in nodes if node.get("GPU")]
        kinds = [frozenset(name for name in node if name.startswith("accelerator_type:")) for node in with_gpus]
        count, types, alone = len(with_gpus), len(set(kinds)), len(nodes) == 1
    if gpu is False or (gpu is None and not count):
        return Device(False, memory) if alone else None
    return Device(True, here) if count and types == 1 and here is not None else None


def smallest_gpu() -> int | None:
    """Return the bytes of this machine's smallest NVIDIA GPU; None without any."""
    sizes = [int(line) for line in _ask_driver("memory.total") if line.isdigit()]
    return min(sizes) * 2**20 if sizes else None


def gpu_names() -> tuple[str, ...]:
    """Return the types of this machine's NVIDIA GPUs."""
    return tuple(_ask_driver("name"))


def _ask_driver(field: str) -> list[str]:
    """Return what NVIDIA's driver says of each GPU; empty without any."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
