"""Reading and writing the folders in which models travel: plain ones, which ``from_pretrained`` reads, and adapters."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf.models import trust
from rlhf.models.adapter_folders import ADAPTER_CONFIG, BASE, config_of, is_adapter

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def load_whole(folder: Path, *, scores: bool, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, unsharded and on the CPU, any adapter folded into the weights."""
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    named = {"num_labels": 1} if scores else {}
    trust.refuse_code(folder)
    if not is_adapter(folder):
        return auto.from_pretrained(folder, dtype=dtype, **named, **trust.MODEL)
    base = auto.from_pretrained(folder / BASE, dtype=dtype, **named, **trust.MODEL)
    return PeftModel.from_pretrained(base, str(folder), local_files_only=True).merge_and_unload()  # pyright: ignore[reportCallIssue] - PEFT proxies it


def write_plain(folder: Path, target: Path, *, scores: bool, dtype: torch.dtype) -> Path:
    """Write an adapter folder as a plain one at ``target``, tokenizer included."""
    model = load_whole(folder, scores=scores, dtype=dtype)
    for name in ("score_mean", "score_std", "score_low", "score_high", "score_max_length", "sees"):
        if name in (config := config_of(folder)):
            setattr(model.config, name, config[name])
    model.save_pretrained(target)
    copy_tokenizer(folder, target)
    return target


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what is neither weights nor a model's configuration: the tokenizer and its chat template."""
    for path in source.iterdir():
        if path.is_file() and path.name not in ("config.json", ADAPTER_CONFIG, "README.md") and not is_weights(path):
            shutil.copyfile(path, target / path.name)


def is_weights(path: Path) -> bool:
    """Whether a file belongs to the weights."""
    return any(path.match(pattern) for pattern in WEIGHTS)
