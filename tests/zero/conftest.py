import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.cluster.session import ENVIRONMENT
from rlhf.config.tuning import LoraTuning
from tests.models.tiny import make_tiny_adapter, make_tiny_llama
from tests.zero.inputs import write_inputs

ROOT = Path(__file__).parents[2]
# An idle machine takes a fifth of it.
TIMEOUT_S = 600

Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the checks of ``tests.zero.checks`` found: by world size, by rank. Both groups run once, side by side."""
    folder = tmp_path_factory.mktemp("groups")
    make_tiny_llama(folder / "tiny")
    make_tiny_adapter(folder / "tiny", folder / "policy", LoraTuning(rank=4), scores=False)
    make_tiny_adapter(folder / "tiny", folder / "reward", LoraTuning(rank=2, dora=True), scores=True)
    write_inputs(folder)
    processes: list[tuple[Path, subprocess.Popen[bytes]]] = []
    # Threads of three processes would wait for each other's cores more than they compute on so small a model.
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    for world_size in (1, 2):
        (folder / str(world_size)).mkdir()
        for rank in range(world_size):
            log = folder / f"log-{world_size}-{rank}.txt"
            command = [sys.executable, "-m", "tests.zero.checks", str(rank), str(world_size)]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [*command, str(folder / str(world_size))],
                    cwd=ROOT,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            processes.append((log, process))
    try:
        for log, process in processes:
            assert process.wait(TIMEOUT_S) == 0, log.read_text()[-5000:]
    finally:
        for _, process in processes:
            process.kill()
            process.wait()
    # Written by our own processes a moment ago.
    return {
        size: [torch.load(folder / str(size) / f"result-{rank}.pt", weights_only=False) for rank in range(size)]
        for size in (1, 2)
    }


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of the tiny model, as its file has them."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("alone"))
    return load_file(folder / "model.safetensors")
