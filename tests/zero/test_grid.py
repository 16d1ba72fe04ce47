"""Every way of fine-tuning in every stage on one rank, and in some on two: ``tests.zero.grid`` runs them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf.cli.main import main
from rlhf.models.layout import is_adapter
from tests.zero.conftest import Grid
from tests.zero.grid import LEARNING_RATE, cells
from tests.zero.inputs import PROMPT

# The groups run while the first of these tests waits.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(660)]

WHOLE = ("full", "top", "bottom-frozen", "gradual", "transfer")
CELLS = [(size, stage, method) for size in (1, 2) for stage, method in cells(size)]
every_cell = pytest.mark.parametrize(("size", "stage", "method"), CELLS)
of_ppo = pytest.mark.parametrize(
    ("size", "method"), [(size, method) for size, stage, method in CELLS if stage == "ppo"]
)


def trains(name: str, method: str, stage: str) -> bool:
    """Whether a weight trains, of a Llama of three blocks whose head is tied to its embeddings; independent of ours."""
    if "score." in name and "original_module" not in name:
        return True
    if method not in WHOLE:
        return any(part in name for part in ("lora_", "prompt_encoder.", "ia3_"))
    block = re.search(r"layers\.(\d)", name)
    depth = int(block[1]) if block else None
    match method:
        case "full":
            return True
        case "top":
            return depth == 2 or name == "model.norm.weight"
        case "bottom-frozen" | "gradual":
            # In two steps gradual unfreezing has reached the second block from the top.
            return depth in (1, 2) or name == "model.norm.weight"
        case _:
            return name == "lm_head.weight"


def moved(cell: dict[str, Any]) -> set[str]:
    return {name for name, weight in cell["start"].items() if not torch.equal(weight, cell["end"][name])}


def of_base(folder: Path) -> dict[str, Tensor]:
    return load_file(folder.parents[3] / "tiny" / "model.safetensors")


@every_cell
def test_exactly_what_should_train_has_moved(grid: Grid, method: str, stage: str, size: int) -> None:
    """By name; of ppo the policy. Gradual unfreezing has reached the blocks that are due, and no other."""
    cell = grid[size][stage, method]
    expected = {name for name in cell["start"] if trains(name, method, stage)}
    assert expected
    assert moved(cell) == expected


@every_cell
def test_what_should_not_train_is_the_base_s_in_the_result(grid: Grid, method: str, stage: str, size: int) -> None:
    """Bit for bit; beside an adapter lie the base's own files."""
    folder = grid[size][stage, method]["folder"]
    base = of_base(folder)
    assert is_adapter(folder) == (method not in WHOLE)
    if is_adapter(folder):
        tiny = folder.parents[3] / "tiny"
        for path in tiny.iterdir():
            # A reward model's normaliser, and the end of a turn, are written into these.
            if path.name not in ("config.json", "generation_config.json", "tokenizer_config.json"):
                assert (folder / "base" / path.name).read_bytes() == path.read_bytes(), path.name
        return
    written = load_file(folder / "model.safetensors")
    for name, weight in base.items():
        assert torch.equal(written[name], weight) != trains(name, method, stage), name


@pytest.mark.parametrize(("size", "stage"), [cell[:2] for cell in CELLS if cell[1] != "ppo" and cell[2] == "gradual"])
def test_a_block_s_first_step_is_adam_s_first(grid: Grid, stage: str, size: int) -> None:
    """Its size is the learning rate times its share, 1/4: moments that other blocks' steps had aged give 0.74 of it."""
    cell = grid[size][stage, "gradual"]
    name = "model.layers.1.mlp.up_proj.weight"
    steps = (cell["end"][name] - cell["start"][name]).abs()
    # The second of two steps has half the peak rate.
    assert steps.max() == pytest.approx(LEARNING_RATE / 2 / 4, rel=1e-3)
    assert steps.median() == pytest.approx(LEARNING_RATE / 2 / 4, rel=1e-2)


@every_cell
def test_a_resumed_run_is_the_unbroken_one(grid: Grid, method: str, stage: str, size: int) -> None:
    """Bit for bit: what it writes, its metrics and every step's row; the checkpoint is that of the first step."""
    unbroken, resumed = (grid[size][stage, method][name] for name in ("unbroken", "resumed"))
    assert unbroken["newest"] == "checkpoint-1"
    assert resumed["newest"] is None
    assert resumed["weights"].keys() == unbroken["weights"].keys()
    for name, weight in unbroken["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    assert resumed["rows"] == unbroken["rows"]
    assert resumed["metrics"] == unbroken["metrics"]


@pytest.mark.parametrize(("size", "stage", "method"), [cell for cell in CELLS if cell[1] != "ppo"])
def test_the_loss_falls(grid: Grid, method: str, stage: str, size: int) -> None:
    """Of the same rows, all of them, after the first step."""
    first, second = grid[size][stage, method]["unbroken"]["rows"]
    assert second["loss"] < first["loss"]


@of_ppo
def test_ppo_begins_at_its_reference_and_moves(grid: Grid, method: str, size: int) -> None:
    """The KL is exactly 0 before the first update, adapters and virtual tokens included, and then it is not."""
    first, second = (row["objective/kl"] for row in grid[size]["ppo", method]["unbroken"]["rows"])
    assert first == 0
    assert abs(second) > 1e-3


@of_ppo
def test_samples_come_from_the_policy_that_is_trained(grid: Grid, method: str, size: int) -> None:
    """After an update too: the sampler's log-probabilities are the training engine's but for rounding."""
    for row in grid[size]["ppo", method]["unbroken"]["rows"]:
        assert abs(row["rollout/kl_to_trained"]) < 1e-5


@every_cell
def test_a_fresh_process_with_transformers_and_peft_alone_reads_the_trained_model(
    grid: Grid, method: str, stage: str, size: int
) -> None:
    """Its logits or score are those of the model that was trained, which are not the base's; and what it writes is what
    `rlhf generate` answers.
    """
    cell = grid[size][stage, method]
    read, answer = cell["read"]
    trained = cell["logits"].reshape(read.shape)
    known = torch.isfinite(trained)
    torch.testing.assert_close(read[known], trained[known], atol=1e-4, rtol=1e-4)
    if stage != "rm":
        assert cell["answer"] == answer


@pytest.mark.parametrize(("stage", "method"), cells(1))
def test_a_result_is_the_base_of_a_next_stage(grid: Grid, method: str, stage: str) -> None:
    """By the same method: virtual tokens go on, other adapters are folded in. The first loss is below that of the run
    before, but with a head that is drawn anew. PPO starts from ppo's policy and rm's reward model, at a KL of 0.
    """
    cell = grid[1][stage, method]
    before, after = cell["unbroken"]["rows"][0], cell["next"]["rows"][0]
    if stage == "ppo":
        assert after["objective/kl"] == 0
        assert abs(after["rollout/kl_to_trained"]) < 1e-5
    elif (stage, method) == ("sft", "transfer"):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    else:
        assert after["loss"] < before["loss"]


@pytest.mark.parametrize("method", ["full", "lora", "prompt", "prefix"])
def test_the_program_answers_from_each_kind_of_result(
    grid: Grid, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain weights, an adapter, a soft prompt and a prefix, imported into a store."""
    cell = grid[1]["sft", method]
    config = tmp_path / "pipeline.yaml"
    store = f"store: {{uri: {tmp_path / 'store'}}}"
    config.write_text(f"pipeline: grid\n{store}\ndata: {{}}\nmodel: {{base: scratch}}\nsft: {{}}\n")
    assert main(["import", str(cell["folder"]), "--as", "sft", "--config", str(config)]) == 0
    capsys.readouterr()
    words = ["generate", "sft", "--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "3"]
    assert main([*words, "--config", str(config)]) == 0
    assert capsys.readouterr().out == cell["answer"] + "\n"
