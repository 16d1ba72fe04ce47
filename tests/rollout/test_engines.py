"""Which engine samples PPO's responses, where vLLM is not installed; with it: test_vllm.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.ppo import PpoSettings
from rlhf.errors import PreflightError
from rlhf.rollout import vllm_sampling
from rlhf.rollout.vllm_sampling import Room, VllmSampler
from rlhf.training import loading

pytestmark = pytest.mark.usefixtures("group")


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_sampling, "find_spec", lambda _: None)


def context_of(folder: Path, engine: str, **more: Any) -> Context[PpoSettings]:
    given = {"rollout": {"engine": engine}, "rollouts": 10, "max_prompt_length": 20, "sampling": {"max_new_tokens": 5}}
    return Context("tuned", "key", PpoSettings.model_validate(given | more), {}, folder, folder, folder)


def test_the_engine_is_the_one_asked_for(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be is an error, and not another engine."""
    assert loading.rollout_by_vllm(context_of(tmp_path, "native"), tiny) is None
    with pytest.raises(PreflightError, match="vLLM is not installed") as error:
        loading.rollout_by_vllm(context_of(tmp_path, "vllm"), tiny)
    assert error.value.where == "tuned.rollout.engine"
    monkeypatch.setattr(loading, "obstacle", lambda _: None)
    assert loading.rollout_by_vllm(context_of(tmp_path, "vllm"), tiny) == Room(rows=10, length=25)
    assert not AttemptFolder(tmp_path).notes()


@pytest.mark.parametrize(
    ("device", "problem", "more", "reason"),
    [
        ("cpu", None, {}, "native: ranks have no GPU"),
        ("cuda", ("it is not there", "install it"), {}, "native: it is not there"),
        (
            "cuda",
            None,
            {"tuning": {"method": "lora"}},
            "native: with tuning.method lora the policy is a model and an ad",
        ),
        ("cuda", None, {}, "vLLM: it is installed, knows the model, and ranks have GPUs"),
    ],
)
def test_auto_says_what_it_took_and_why(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, problem: Any, more: Any, reason: str
) -> None:
    """vLLM on GPUs where it can be, otherwise native."""
    monkeypatch.setattr(loading, "obstacle", lambda _: problem)
    monkeypatch.setattr(loading.group, "device", lambda: torch.device(device))
    monkeypatch.setattr(loading.group, "all_true", lambda condition: condition)
    room = loading.rollout_by_vllm(context_of(tmp_path, "auto", **more), tiny)
    assert (room is not None) == reason.startswith("vLLM")
    (note,) = AttemptFolder(tmp_path).notes()
    assert note.startswith(f"rollout.engine auto samples by {reason}")


def test_weights_that_vllm_would_not_find_by_name_are_refused(tiny: Path, tmp_path: Path) -> None:
    """Before its engine starts: weights that it is not given would stay random. A head of its own may be new."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    room = Room(1, 8)
    VllmSampler(tiny, "fp32", 1.0, room, fp32_head=True, source=model)
    shutil.copytree(tiny, tmp_path / "other")
    weights = load_file(tiny / "model.safetensors")
    save_file(
        {name.replace("norm", "scale"): weight for name, weight in weights.items()},
        tmp_path / "other/model.safetensors",
    )
    with pytest.raises(PreflightError, match=r"other names for 5 of them, such as model\.layers\.0\.input_layernorm"):
        VllmSampler(tmp_path / "other", "fp32", 1.0, room, fp32_head=True, source=model)
    model.lm_head.weight = nn.Parameter(torch.clone(model.lm_head.weight))
    VllmSampler(tiny, "fp32", 1.0, room, fp32_head=True, source=model)
