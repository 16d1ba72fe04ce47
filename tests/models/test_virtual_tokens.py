from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig

from rlhf.config.stages import SftSettings
from rlhf.models.folders import load_policy
from rlhf.models.tuning import as_at_start, prepared, with_reference
from rlhf.models.virtual_tokens import AnchoredEncoder
from rlhf.zero import group as ranks
from tests.models.tiny import make_tiny_llama


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("method", ["p-tuning", "prefix", "prompt", "p-tuning-v2"])
def test_a_policy_begins_as_its_reference(
    group: None, method: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, in bf16 too and in batches of any size: the reference's tokens are what the encoder computes."""
    monkeypatch.setattr(ranks, "device", lambda: torch.device(device))
    monkeypatch.setattr(ranks, "on_gpu", lambda: device == "cuda")
    folder = make_tiny_llama(tmp_path)
    size = {"template": [6]} if method == "p-tuning" else {"tokens": 6}
    tuning = SftSettings.model_validate({"tuning": {"method": method} | size}).tuning
    plain: Any = load_policy(folder, torch.bfloat16, tuning=tuning)
    model: Any = with_reference(prepared(plain, tuning, folder, scores=False, seed=0)).to(device).eval()
    for rows in (1, 5):
        ids = torch.arange(3, 3 + 8 * rows, device=device).view(rows, 8) % 50
        trained = model(input_ids=ids).logits
        assert trained.requires_grad
        with torch.no_grad(), as_at_start(model):
            assert torch.equal(trained, model(input_ids=ids).logits)


@pytest.mark.gpu
def test_p_tuning_s_encoder_has_gradients_outside_training_mode() -> None:
    """As PPO needs them, and as cuDNN's LSTM does not give them."""
    config = PromptEncoderConfig(
        num_virtual_tokens=4,
        num_transformer_submodules=1,
        token_dim=8,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
    )
    encoder = AnchoredEncoder(config, {}).cuda().eval()
    encoder(torch.arange(4, device="cuda")[None]).sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())
