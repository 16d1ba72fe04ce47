"""LoRA through PEFT: attach adapters, and write trained models as folders that need no other folder."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config.stages import LoraSettings
from rlhf.models import folders, reward
from rlhf.models.layout import ADAPTER_CONFIG, BASE, update_json
from rlhf.randomness import seed_of


def lora_config(lora: LoraSettings, *, scores: bool) -> LoraConfig:
    """Return PEFT's settings of adapters on every linear layer of the body; a score head is trained whole."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - PEFT takes fractions, its annotation does not
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        modules_to_save=["score"] if scores else None,
    )


def with_lora(model: PreTrainedModel, lora: LoraSettings | None, *, scores: bool, seed: int) -> Any:
    """Return the model with fresh adapters, or as it is without ``lora``."""
    if lora is None:
        return model
    torch.manual_seed(seed_of("adapters", seed, scores))
    # ZeRO-3 gathers small weights together and takes the type of the first for all: adapters must have the base's.
    return get_peft_model(model, lora_config(lora, scores=scores), autocast_adapter_dtype=False)


def save(
    model: Any,
    weights: dict[str, Tensor],
    source: Path,
    target: Path,
    lora: LoraSettings | None,
    *,
    scores: bool,
    config: dict[str, Any] | None = None,
) -> None:
    """Write a trained model's folder, tokenizer included.

    weights  the trained weights by name, whole, as ``rlhf.zero.engine.whole_weights`` gives them
    source   the plain folder that the model was loaded from
    config   entries to add to ``config.json``; of a reward model its normaliser and what it reads
    """
    if lora is None:
        model.save_pretrained(target, state_dict=weights)
        folders.copy_tokenizer(source, target)
        update_json(target / "config.json", config or {}, ensure_ascii=True)
    elif lora.merge:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            adapter = Path(scratch)
            _save_adapter(model, weights, source, adapter, config or {})
            # In bf16 updates below half a step of a weight would be lost.
            folders.write_plain(adapter, target, scores=scores, dtype=torch.float32)
    else:
        _save_adapter(model, weights, source, target, config or {})
    if scores:
        reward.complete(target)
    else:
        folders.write_end_of_turn(target)


def _save_adapter(
    model: PeftModel, weights: dict[str, Tensor], source: Path, target: Path, config: dict[str, Any]
) -> None:
    model.save_pretrained(str(target), state_dict=weights)
    (target / "README.md").unlink(missing_ok=True)  # PEFT's model card names the folder that the base was loaded from
    folders.copy_tokenizer(source, target)
    base = target / BASE
    base.mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            copy = base / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy)
            except OSError:
                shutil.copyfile(path, copy)
    update_json(target / ADAPTER_CONFIG, {"base_model_name_or_path": BASE}, ensure_ascii=True)
    if config:
        update_json(base / "config.json", config, ensure_ascii=True)
