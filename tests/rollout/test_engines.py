"""Which engine samples PPO's responses, where vLLM is not installed; with it: test_vllm.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.ppo import PpoSettings
from rlhf.errors import PreflightError
from rlhf.rollout import vllm_sampling
from rlhf.rollout.vllm_sampling import Room, misnamed
from rlhf.training import loading
from tests.models.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("group")


SHARED = {"share_base": True, "tuning": {"method": "lora"}}


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
    ("kind", "device", "problem", "more", "reason"),
    [
        ("falcon", "cpu", None, {}, "native: ranks have no GPU"),
        ("falcon", "cuda", ("it is not there", "install it"), {}, "native: it is not there"),
        (
            "falcon",
            "cuda",
            None,
            {"tuning": {"method": "lora"}},
            "native: with tuning.method lora the policy is",
        ),
        ("falcon", "cuda", None, SHARED, "native: with share_base the policy is an adapter"),
        ("llama", "cuda", None, {}, "native: its steps are CUDA graphs for this type of model, and faster"),
        ("qwen3_moe", "cuda", None, {}, "vLLM: native has no CUDA graphs for this type of model"),
        ("falcon", "cuda", None, {}, "vLLM: native has no CUDA graphs for this type of model"),
        ("bloom", "cuda", None, {}, "vLLM: native has no CUDA graphs for this type of model"),
    ],
)
def test_auto_says_what_it_took_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, device: str, problem: Any, more: Any, reason: str
) -> None:
    """vLLM on GPUs where native is slow and vLLM can be, otherwise native."""
    tiny_config(kind).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "obstacle", lambda _: problem)
    monkeypatch.setattr(loading.group, "device", lambda: torch.device(device))
    monkeypatch.setattr(loading.group, "all_true", lambda condition: condition)
    room = loading.rollout_by_vllm(context_of(tmp_path, "auto", **more), tmp_path / "model")
    assert (room is not None) == reason.startswith("vLLM")
    (note,) = AttemptFolder(tmp_path).notes()
    assert note.startswith(f"rollout.engine auto samples by {reason}")


def test_weights_that_vllm_would_not_find_by_name_are_known_beforehand(tiny: Path, tmp_path: Path) -> None:
    """A mixture's experts are one tensor in transformers, and a tensor each in the files; a tied head is in neither."""
    assert misnamed(tiny) == []
    config = tiny_config("qwen3_moe")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    names = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
    assert misnamed(tmp_path) == names
