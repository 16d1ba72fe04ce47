"""Tiny models: a Llama of two layers, made once for many tests, and the configuration of any other architecture."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config.stages import ScratchSettings
from rlhf.config.tuning import LoraTuning
from rlhf.models import tuning
from rlhf.models.base_models import make_from_scratch

SHAPE = ScratchSettings(vocabulary=300, hidden_size=32, layers=2, heads=2, context=64)
TEXTS = ["a film of two halves", "the film is a joy", "dull , dull , dull"]

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    # Shorter than most texts, so that a window's mask is tried as well.
    "sliding_window": 6,
    # So large that the model has opinions.
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(model_type: str, **more: Any) -> Any:
    """The configuration of a tiny model of this type, of what it knows by these names."""
    default: Any = AutoConfig.for_model(model_type)
    known = default.to_dict().keys() | default.attribute_map.keys()
    return type(default)(**{name: value for name, value in SMALL.items() if name in known} | more)


def make_tiny_llama(folder: Path, shape: ScratchSettings = SHAPE) -> Path:
    """Write the model, with weights so large that it has opinions: a fresh one finds all tokens alike."""
    make_from_scratch(shape, TEXTS, seed=0, target=folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8
    model.save_pretrained(folder)
    return folder


NORMALISER = {"score_mean": 0.5, "score_std": 2.0, "sees": "conversation", "score_max_length": 32}


def make_tiny_adapter(tiny: Path, folder: Path, method: LoraTuning, *, scores: bool) -> Path:
    """Write an adapter as sft or rm makes it of the model, with weights that matter."""
    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    base = auto.from_pretrained(tiny, **({"num_labels": 1} if scores else {}))
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        model = tuning.prepared(base, method, tiny, scores=scores, seed=0)
    generator = torch.Generator().manual_seed(int(scores))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    tuning.save(model, weights, tiny, folder, method, scores=scores, config=NORMALISER if scores else None)
    return folder
