import pytest
import torch
from peft import PromptEncoderConfig

from rlhf.models.virtual_tokens import AnchoredEncoder


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
