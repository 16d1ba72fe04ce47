import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.config.tuning import LoraTuning
from tests.models.tiny import SHAPE, make_tiny_adapter, make_tiny_llama
from tests.zero.groups import ENVIRON, ROOT, TIMEOUT_S, run_groups
from tests.zero.inputs import ANSWER_TOKENS, CASES, SIZES, write_inputs

Results = dict[int, list[dict[str, Any]]]
Grid = dict[int, dict[tuple[str, str], dict[str, Any]]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the checks of ``tests.zero.checks`` found: by world size, by rank. All groups run once, side by side."""
    folder = tmp_path_factory.mktemp("groups")
    make_tiny_llama(folder / "tiny")
    make_tiny_adapter(folder / "tiny", folder / "policy", LoraTuning(rank=4), scores=False)
    make_tiny_adapter(folder / "tiny", folder / "reward", LoraTuning(rank=2, dora=True), scores=True)
    write_inputs(folder)
    run_groups("tests.zero.checks", folder)
    # Written by our own processes a moment ago.
    found: Results = {
        size: [torch.load(folder / str(size) / f"result-{rank}.pt", weights_only=False) for rank in range(size)]
        for size in SIZES
    }
    for case in CASES:
        apart = torch.load(folder / case.name / "apart.pt", weights_only=False)
        found[case.trainers][0]["apart"] = apart
    return found


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """What ``tests.zero.grid`` found: by world size, then by stage and method. What a fresh process reads is added."""
    folder = tmp_path_factory.mktemp("grid")
    make_tiny_llama(folder / "tiny", SHAPE.model_copy(update={"layers": 3}))
    write_inputs(folder, rows=8)
    run_groups("tests.zero.grid", folder)
    grid: Grid = {size: torch.load(folder / str(size) / "grid.pt", weights_only=False) for size in (1, 2)}
    cells = [(stage, cell) for by_method in grid.values() for (stage, _), cell in by_method.items()]
    jobs = {
        "ids": grid[1]["sft", "full"]["ids"],
        "length": ANSWER_TOKENS,
        "scorers": [str(cell["folder"]) for stage, cell in cells if stage == "rm"],
        "writers": [str(cell["folder"]) for stage, cell in cells if stage != "rm"],
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = [sys.executable, str(ROOT / "tests" / "zero" / "plain.py"), "jobs.json", "read.pt"]
    done = subprocess.run(
        program, cwd=folder, env=ENVIRON, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    read = torch.load(folder / "read.pt", weights_only=False)
    for _, cell in cells:
        cell["read"] = read[str(cell["folder"])]
    return grid


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of the tiny model, as its file has them."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("alone"))
    return load_file(folder / "model.safetensors")
