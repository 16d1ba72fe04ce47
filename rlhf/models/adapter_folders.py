"""The layout of adapter folders and what lies in all models' folders, as far as it needs no torch.

An *adapter* folder holds a PEFT adapter, the tokenizer, and in ``base/`` the plain folder that the adapter was trained
on, so that it is whole by itself.
"""

import json
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base"


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
