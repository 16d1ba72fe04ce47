import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config.training import LoraSettings
from rlhf.models import adapters, folders
from rlhf.models.adapter_folders import config_of, is_adapter, relocate_adapter

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 40, 41, 99, 60, 61, 4]])
NORMALISER = {"score_mean": 0.25, "score_std": 1.5, "sees": "response", "score_max_length": 64}
FORMS = {"full": None, "adapter": LoraSettings(rank=4), "merged": LoraSettings(rank=4, merge=True)}


def trained(tiny: Path, lora: LoraSettings | None, *, scores: bool) -> tuple[Any, dict[str, Tensor]]:
    """A model whose trainable weights have moved, and those weights by name."""
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_pretrained(tiny, **({"num_labels": 1} if scores else {}))
    model = adapters.with_lora(model, lora, scores=scores, seed=0).eval()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.2 * torch.randn(weight.shape)
    return model, {name: weight.detach().clone() for name, weight in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_saved_model_loads_anywhere_without_our_code(tmp_path: Path, tiny: Path, form: str, scores: bool) -> None:
    """Moved away from its base, the folder gives the trained model's outputs, tokenizer and normaliser."""
    lora = FORMS[form]
    model, weights = trained(tiny, lora, scores=scores)
    adapters.save(model, weights, tiny, tmp_path / "saved", lora, scores=scores, config=NORMALISER if scores else None)
    folder = tmp_path / "moved"
    shutil.move(tmp_path / "saved", folder)
    assert is_adapter(folder) == (form == "adapter")
    if is_adapter(folder):
        relocate_adapter(folder)

    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    loaded = auto.from_pretrained(folder, **({"num_labels": 1} if scores else {})).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-3, rtol=1e-4)
    whole = folders.load_whole(folder, scores=scores, dtype=torch.float32).eval()
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, atol=1e-3, rtol=1e-4)
    base = auto.from_pretrained(tiny, **({"num_labels": 1} if scores else {})).eval()
    assert (base(IDS).logits - loaded(IDS).logits).abs().max() > 0.01

    original, copy = AutoTokenizer.from_pretrained(tiny), AutoTokenizer.from_pretrained(folder)
    assert copy.get_vocab() == original.get_vocab()
    assert copy.chat_template == original.chat_template
    if scores:
        assert {name: getattr(loaded.config, name) for name in NORMALISER} == NORMALISER
        assert config_of(folder).items() >= NORMALISER.items()
        assert not config_of(tiny).items() & NORMALISER.items()


def test_an_adapter_s_folder_is_small_beside_its_base_and_leaves_the_base_alone(tmp_path: Path, tiny: Path) -> None:
    """Only what was trained is stored beside the base, whose files are the same, byte by byte."""
    before = {path.name: path.read_bytes() for path in tiny.iterdir()}
    model, weights = trained(tiny, FORMS["adapter"], scores=False)
    adapters.save(model, weights, tiny, tmp_path / "saved", FORMS["adapter"], scores=False)
    relocate_adapter(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved" / "base").iterdir()} == before
    assert {path.name: path.read_bytes() for path in tiny.iterdir()} == before
    assert sum(weight.numel() for weight in weights.values()) * 4 < len(before["model.safetensors"])
    assert not list((tmp_path / "saved").rglob("*.bin"))


def test_an_adapter_written_as_a_plain_folder_is_the_same_reward_model(tmp_path: Path, tiny: Path) -> None:
    """PPO reads it so: outputs, normaliser and tokenizer carry over."""
    model, weights = trained(tiny, FORMS["adapter"], scores=True)
    adapters.save(model, weights, tiny, tmp_path / "saved", FORMS["adapter"], scores=True, config=NORMALISER)
    plain = folders.write_plain(tmp_path / "saved", tmp_path / "plain", scores=True, dtype=torch.float32)
    assert not is_adapter(plain)
    assert NORMALISER.items() <= config_of(plain).items()
    loaded = AutoModelForSequenceClassification.from_pretrained(plain, num_labels=1).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-3, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(plain).chat_template


def test_fresh_adapters_change_nothing_and_follow_the_seed(tiny: Path) -> None:
    """LoRA's B begins at 0, so that training starts from the base model."""
    base: Any = AutoModelForCausalLM.from_pretrained(tiny).eval()
    models = [
        adapters.with_lora(AutoModelForCausalLM.from_pretrained(tiny), LoraSettings(rank=4), scores=False, seed=seed)
        for seed in (0, 0, 1)
    ]
    with torch.no_grad():
        torch.testing.assert_close(models[0].eval()(IDS).logits, base(IDS).logits)
    first, again, other = (
        torch.cat([weight.flatten() for weight in model.parameters() if weight.requires_grad]) for model in models
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
