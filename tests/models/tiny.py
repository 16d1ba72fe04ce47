"""A Llama of two layers, made once for many tests."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf.config.stages import ScratchSettings
from rlhf.models.base import make_from_scratch

SHAPE = ScratchSettings(vocabulary=300, hidden_size=32, layers=2, heads=2, context=64)
TEXTS = ["a film of two halves", "the film is a joy", "dull , dull , dull"]


def make_tiny_llama(folder: Path) -> Path:
    """Write the model, with weights so large that it has opinions: a fresh one finds all tokens alike."""
    make_from_scratch(SHAPE, TEXTS, seed=0, target=folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8
    model.save_pretrained(folder)
    return folder
