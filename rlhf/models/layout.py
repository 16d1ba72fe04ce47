"""What a model's folder says of itself, read without torch: layout, configuration, context length, licence.

An *adapter* folder holds a PEFT adapter, the tokenizer, and in ``base/`` the plain folder that the adapter was trained
on, so that it is whole by itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base"
UNBOUNDED = 1 << 30
"""The context of models whose positions are relative or none, which any text fits."""

# These number positions from pad_token_id + 1 on, so that their table holds that many texts' tokens less.
NUMBERED_FROM_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
_LONGEST_CARD = 1 << 16


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter rather than whole weights."""
    return (folder / ADAPTER_CONFIG).exists()


def config_file(folder: Path) -> Path:
    """The model's ``config.json``: an adapter's is its base's, since transformers takes one beside an adapter to mean
    that the whole weights are there too.
    """
    return (folder / BASE if is_adapter(folder) else folder) / "config.json"


def config_of(folder: Path) -> dict[str, Any]:
    """The model's configuration, a reward model's score normaliser included."""
    return json.loads(config_file(folder).read_text())


def context_length(config: Mapping[str, Any]) -> int:
    """The longest sequence in tokens, special tokens included."""
    # A model that reads more than text keeps what concerns text by itself.
    config = config.get("text_config", config)
    length = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(length, int) or length < 1:  # XLNet says -1
        return UNBOUNDED
    if config.get("model_type") in NUMBERED_FROM_PADDING:
        return length - int(config.get("pad_token_id", 1)) - 1
    return length


def licence_of(folder: Path) -> str | None:
    """The ``license`` in the YAML head of the folder's model card, or None where there is none to read."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as card:
            text = card.read(_LONGEST_CARD)
    except (OSError, UnicodeDecodeError):
        return None
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        head: Any = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else None
