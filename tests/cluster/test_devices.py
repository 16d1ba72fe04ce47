"""Which memory the ranks of a group will have, where that can be known."""

import os
import subprocess
from typing import Any

import pytest
import ray

from rlhf.cluster import devices
from rlhf.cluster.devices import Device, device_of_ranks, smallest_gpu

H100 = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}
L4 = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
CPUS = {"CPU": 8.0}


@pytest.mark.parametrize(("listed", "found"), [("81559\n40960\n", 40960 * 2**20), ("[N/A]\n", None)])
def test_the_smallest_gpu_counts(monkeypatch: pytest.MonkeyPatch, listed: str, found: int | None) -> None:
    """As nvidia-smi lists them, in MiB."""
    monkeypatch.setattr("shutil.which", lambda _: "nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: answer)
    assert smallest_gpu() == found


CASES: list[tuple[list[dict[str, float]], int | None, bool | None, bool | None]] = [
    ([H100], 80, None, True),
    ([H100, H100, CPUS], 80, None, True),
    ([H100, L4], 80, None, None),
    ([H100], None, None, None),
    ([CPUS], 80, None, False),
    ([CPUS], None, True, None),
    ([H100], 80, False, False),
    ([CPUS, CPUS], None, None, None),
]


@pytest.mark.parametrize(("nodes", "here", "wanted", "on_gpus"), CASES)
def test_a_clusters_devices_are_known_where_they_are_alike(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    here: int | None,
    wanted: bool | None,
    on_gpus: bool | None,
) -> None:
    """GPUs of one type that this machine has too, or the cores of this machine alone; otherwise nothing is known."""
    alive: list[dict[str, Any]] = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(devices, "smallest_gpu", lambda: here)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    known = {True: Device(True, 80), False: Device(False, memory), None: None}
    assert device_of_ranks(wanted) == known[on_gpus]
