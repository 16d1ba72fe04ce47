"""What stages will write, by their settings and models alone, before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.attempt.context import Context
from rlhf.attempt.folder import MARKER, AttemptFolder
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import EvaluateSettings, SftSettings
from rlhf.config.tuning import FULL, LoraTuning
from rlhf.errors import DiskFullError
from rlhf.models.layout import count_parameters
from rlhf.models.tuning import prepared
from rlhf.pipeline import disk
from rlhf.store import Store
from tests.models.tiny import make_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


def context(settings: Any, folder: Path, attempts: tuple[Path, ...] = (), **inputs: Path) -> Context[Any]:
    return Context("stage", "key", settings, inputs, folder, folder, folder, attempts)


@pytest.mark.parametrize("method", [FULL, LoraTuning(rank=4)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_and_a_result_take_what_was_said(base: Path, tmp_path: Path, method: Any, precision: Any) -> None:
    """A checkpoint: trained weights in fp32, and AdamW's real moments after a step; a result: the weights."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = prepared(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), method, base, scores=False, seed=0)
    trained: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
    masters = [weight.detach().float().clone().requires_grad_() for weight in trained]
    optimiser = torch.optim.AdamW(masters)
    torch.stack([weight.sum() for weight in masters]).sum().backward()
    optimiser.step()
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    checkpoint = sum(tensor.nbytes for tensor in [*masters, *moments])

    settings = SftSettings(tuning=method, precision=precision, checkpoint_every=1)
    found = disk.written(context(settings, tmp_path, base=base), [base], steps=2)
    assert found[disk.MEANWHILE] == checkpoint
    assert found[disk.RESULT] == sum(weight.nbytes for weight in trained)


@pytest.mark.parametrize("begun", [0, 3, 6])
@pytest.mark.parametrize("every", [1, 2, 3, 50])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_as_many_checkpoints_are_counted_as_lie_there_at_once(
    base: Path, tmp_path: Path, steps: int, every: int, begun: int
) -> None:
    """By a walk through the steps; none is due at the last, and those before a resume have been written."""
    lie, most = [], 0
    for step in range(begun + 1, steps):
        if step % every == 0:
            most = max(most, len(lie) + 1)
            lie = [*lie, step][-2:]
    if begun:
        checkpoint = AttemptFolder(tmp_path).checkpoint(begun)
        checkpoint.mkdir(parents=True)
        (checkpoint / MARKER).write_text('{"sizes": {}}')
    told = context(SftSettings(checkpoint_every=every), tmp_path, (tmp_path,), base=base)
    assert disk.written(told, [base], steps)[disk.MEANWHILE] == most * 12 * count_parameters(base)


def test_ppo_needs_room_for_two_models_and_the_average_and_leaves_one(base: Path, tmp_path: Path) -> None:
    """Policy and value model are in its checkpoints; the policy alone is its result."""
    settings = PpoSettings.model_validate({"iterations": 2, "checkpoint_every": 1, "average_decay": 0.9})
    found = disk.written(context(settings, tmp_path, policy=base), [base, base], settings.iterations, average=True)
    parameters = count_parameters(base)
    assert found == {disk.RESULT: 4 * parameters, disk.MEANWHILE: (2 * 12 + 4) * parameters}


def test_an_adapter_that_is_read_is_written_whole(base: Path, tmp_path: Path) -> None:
    """By stages that train nothing too, which otherwise need no room."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "base").symlink_to(base)
    settings = EvaluateSettings()
    assert disk.written(context(settings, tmp_path, before=base)) == {disk.RESULT: 0, disk.MEANWHILE: 0}
    whole = 4 * count_parameters(base)
    assert disk.written(context(settings, tmp_path, before=base, after=adapter))[disk.MEANWHILE] == whole


def test_room_is_wanted_for_what_is_written_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stage: results before it, its checkpoints, its result. One byte less is refused, in readable units."""
    store = Store.open(tmp_path / "store")
    told = {
        "sft": {disk.RESULT: 2e6, disk.MEANWHILE: 96e6},
        "evaluate": {},
        "ppo": {disk.RESULT: 2e6, disk.MEANWHILE: 97e6},
    }
    monkeypatch.setattr(store, "free_bytes", lambda: 101_000_000)
    disk.check(told, store)
    monkeypatch.setattr(store, "free_bytes", lambda: 100_900_000)
    with pytest.raises(DiskFullError) as caught:
        disk.check(told, store)
    assert caught.value.what == (
        "ppo will need 101.0 MB on disk (97.0 MB for checkpoints, 2.0 MB for its result, 2.0 MB for results before it)"
        ", and 100.9 MB are free"
    )
    assert "ppo.checkpoint_every" in caught.value.next_step
    with pytest.raises(DiskFullError, match=r"sft will need 9\.5 GB .*, and 100\.9 MB are free"):
        disk.check({"sft": {disk.RESULT: 9.5e9, disk.MEANWHILE: 0.0}}, store)
